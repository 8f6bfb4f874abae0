"""What a CUDA graph does, on the CPU: record a step's operations once, then replay them on the same tensors.

No Python of the step runs in a replay, and every result lands where it lay when it was recorded. So a step that binds a
new tensor, or keeps a number on the host, gives other results replayed than called; and what CUDA refuses while it
captures (reading a value, shapes that depend on values, tensors made from host numbers) is refused here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], None]

#: operations that read a value on the host, or make a tensor from one
REFUSED = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
    "grouped_mm_fallback",
}


def _name(operation: Any) -> str:
    return operation._schema.name.split("::")[1]


def _refuse_host_work(operation: Any, arguments: list[Any]) -> None:
    indexing = _name(operation) in {"index", "index_put", "index_put_", "_index_put_impl_"}
    by_mask = indexing and any(isinstance(a, Tensor) and a.dtype == torch.bool for a in arguments[1:])
    if _name(operation) in REFUSED or by_mask:
        raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, operation: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        _refuse_host_work(operation, tree_leaves((args, kwargs)))
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result


def _is_view(operation: Any) -> bool:
    """Whether a result shares its memory with an argument: replaying the argument's operations is enough."""
    returns = operation._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class RecordedGraph:
    """`capture(step, reset)` as the runner calls it; counts what it was asked for."""

    def __init__(self, warm_up_steps: int = 2) -> None:
        self.warm_up_steps = warm_up_steps
        self.captures = 0
        self.replays = 0

    def __call__(self, step: Step, reset: Step) -> Step:
        for _ in range(self.warm_up_steps):
            step()
            reset()
        with _Recorder() as recorder:
            step()
        reset()
        self.captures += 1
        return lambda: self._replay(recorder.operations)

    @torch.no_grad()
    def _replay(self, operations: list[tuple[Any, tuple, dict, Any]]) -> None:
        self.replays += 1
        for operation, args, kwargs, recorded in operations:
            if _is_view(operation):
                continue
            result = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
