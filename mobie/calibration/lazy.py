"""Values that are computed when they are asked for, and kept only while memory allows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch

from mobie.calibration.store import Memory

Value = TypeVar("Value")
#: values are made one at a time: several devices may ask for statistics at once
MAKING = threading.RLock()


class Lazy(Sequence[Value]):
    """A sequence whose items are made when it is indexed; it holds none of them."""

    def __init__(self, count: int, make: Callable[[int], Value]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Value: ...

    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...

    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        found = range(self._count)[index]  # raises IndexError, counts from the end
        with MAKING:
            return [self._make(i) for i in found] if isinstance(found, range) else self._make(found)


class LazyMap(Mapping[str, Value]):
    """A mapping whose values are made when they are first asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Value]) -> None:
        self._names, self._make = list(names), make
        self._made: dict[str, Value] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        with MAKING:
            if name not in self._made:
                self._made[name] = self._make(name)
            return self._made[name]


class Cache:
    """Keeps what was made once, as long as memory is left; what finds no room is made again each time."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._kept: dict[Hashable, Any] = {}
        self._taken = 0

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key."""
        if key in self._kept:
            return self._kept[key]
        value = make()
        size = _bytes(value)
        if self._memory.reserve(size):
            self._kept[key] = value
            self._taken += size
        return value

    def clear(self) -> None:
        """Forget all values."""
        self._kept.clear()
        self._memory.release(self._taken)
        self._taken = 0


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensors in an object's fields."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(field.nbytes for field in vars(value).values() if isinstance(field, torch.Tensor))
