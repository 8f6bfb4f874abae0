"""Hidden states of the calibration text on their way through the blocks, moved by the library's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import Tensor, nn

from mobie.calibration.capture import BlockShape, observe_experts
from mobie.errors import UnsupportedError
from mobie.models.base import Adapter


def check_attention(model: nn.Module) -> None:
    """Refuse a model whose blocks do not all get the same attention mask: the first block's serves them all."""
    kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise UnsupportedError(
            f"blocks with different attention ({', '.join(kinds)}), expected one kind in all blocks; choose a model "
            "without sliding windows in some of its blocks"
        )


class Stream:
    """Hidden states of all calibration batches at the entry of a block."""

    def __init__(self, hidden: list[Tensor], arguments: list[dict[str, Any]]) -> None:
        self.hidden = hidden
        self.arguments = arguments

    def outputs(self, block: nn.Module, after_batch: Callable[[int], None] = lambda tokens: None) -> Iterator[Tensor]:
        for hidden, kwargs in zip(self.hidden, self.arguments, strict=True):
            result = block(hidden, **kwargs)
            after_batch(hidden.shape[0] * hidden.shape[1])
            yield result[0] if isinstance(result, tuple) else result

    def through(self, block: nn.Module) -> Stream:
        return Stream(list(self.outputs(block)), self.arguments)

    def observe(self, block: nn.Module, experts: nn.Module | None, config: object, observer: Any) -> Stream:
        """Let `observer` see the block at work; returns the stream behind the block."""
        with ExitStack() as stack:
            stack.enter_context(observer.watching())
            stack.enter_context(observe_experts({experts: observer}, config) if experts is not None else nullcontext())
            return Stream(list(self.outputs(block, observer.next_batch)), self.arguments)

    def shape(self, linear_groups: list[dict[str, nn.Module]], experts: nn.Module | None) -> BlockShape:
        sequences, length = sum(map(len, self.hidden)), self.hidden[0].shape[1]
        return BlockShape(linear_groups, experts, sequences, length, len(self.hidden))


def enter_first_block(model: nn.Module, adapter: Adapter, batches: list[Tensor]) -> Stream:
    """Hidden states that enter the first block, with the keyword arguments the library gives to every block."""
    hidden, arguments = [], []

    class Stop(Exception):  # noqa: N818 (control flow, not an error)
        pass

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        arguments.append({k: v for k, v in kwargs.items() if k != "past_key_values"})
        raise Stop

    handle = adapter.blocks(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for ids in batches:
            try:
                model(ids, use_cache=False)
            except Stop:
                continue
    finally:
        handle.remove()
    return Stream(hidden, arguments)
