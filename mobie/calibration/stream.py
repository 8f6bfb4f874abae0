"""Hidden states of the calibration text on their way through the blocks, moved by the library's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mobie.calibration.observer import BlockObserver, BlockShape
from mobie.calibration.store import ActivationStore
from mobie.models.experts import SharedExpert
from mobie.models.weights import StreamedModel

Arguments = dict[str, Any]


class Stream:
    """Hidden states of all calibration batches at the entry of a block, in a store."""

    def __init__(self, name: str, batches: Sequence[Tensor], store: ActivationStore, device: torch.device) -> None:
        """Args:
        name: of the stream in the store.
        batches: token ids `(sequences, length)`.
        device: where the blocks are.
        """
        self._name, self._store, self._device = name, store, device
        self._batches = batches
        self._index = 0  # of the block that comes next
        self.arguments: list[list[Arguments]] = []

    def put(self, batch: int, hidden: Tensor) -> None:
        """Take what enters the first block."""
        self._store.put(self._key(batch), hidden)

    def _key(self, batch: int) -> str:
        return f"{self._name}-{batch:05d}"

    def _outputs(self, block: nn.Module, after_batch: Callable[[int], None]) -> Iterator[Tensor]:
        for batch, arguments in enumerate(self.arguments):
            hidden = self._store.get(self._key(batch), self._device)
            yield run_block(block, hidden, arguments[self._index])
            after_batch(hidden.shape[0] * hidden.shape[1])

    def through(self, block: nn.Module) -> None:
        """Move behind a block."""
        self._move(block, lambda tokens: None)

    def _move(self, block: nn.Module, after_batch: Callable[[int], None]) -> None:
        for batch, output in enumerate(self._outputs(block, after_batch)):
            self._store.put(self._key(batch), output)
        self._index += 1

    def observe(self, block: nn.Module, observer: BlockObserver, *, move: bool) -> None:
        """Let `observer` see the block at work, and move behind it where told."""
        with observer.watching():
            if move:
                self._move(block, observer.next_batch)
            else:
                for _ in self._outputs(block, observer.next_batch):
                    pass

    def shape(
        self,
        linear_groups: list[dict[str, nn.Module]],
        experts: nn.Module | None,
        shared: SharedExpert | None = None,
    ) -> BlockShape:
        """What an observer of a block must know."""
        sequences, length = sum(map(len, self._batches)), self._batches[0].shape[1]
        return BlockShape(linear_groups, experts, sequences, length, len(self._batches), shared)


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """What a decoder block makes of hidden states `(sequences, length, hidden)`."""
    result = block(hidden, **arguments)
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def stubbed(blocks: Sequence[nn.Module], record: Callable[[Tensor, Arguments], object]) -> Iterator[None]:
    """Let every block return the hidden states as they are, and tell what it was given, while the context lasts."""

    def stub(hidden_states: Tensor, **arguments: Any) -> Tensor:
        record(hidden_states, arguments)
        return hidden_states

    for block in blocks:
        block.forward = stub
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def enter_first_block(
    streamed: StreamedModel, batches: Sequence[Tensor], take: Callable[[int, Tensor], object]
) -> list[list[Arguments]]:
    """Run the library's model with every block passed over. Needs the values outside the blocks.

    Args:
        batches: token ids `(sequences, length)`.
        take: given, batch by batch, the hidden states that enter the first block.

    Returns:
        Per batch and block, the keyword arguments of the block (masks differ between kinds of attention). Batches and
        blocks share equal tensors.
    """
    seen: list[Tensor] = []
    arguments = []
    for batch, ids in enumerate(batches):
        given: list[tuple[Tensor, Arguments]] = []
        with stubbed(streamed.blocks, lambda *seen, given=given: given.append(seen)):
            streamed.model.base_model(ids.to(streamed.device), use_cache=False)
        take(batch, given[0][0])
        arguments.append([{n: _shared(v, seen) for n, v in own.items() if n != "past_key_values"} for _, own in given])
    return arguments


def _shared(value: Any, seen: list[Tensor]) -> Any:
    """The first of all equal tensors; those of a tuple likewise."""
    if isinstance(value, tuple):
        return tuple(_shared(one, seen) for one in value)
    if not isinstance(value, Tensor):
        return value
    for other in seen:
        if other is value or (other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value)):
            return other
    seen.append(value)
    return value
