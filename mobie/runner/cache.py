"""The key-value cache of the decode runner: the library's static layers, written where one shared cursor says.

The library's `StaticLayer` counts its tokens in a tensor of its own: three small kernels per layer and step, which a
decode step of a millisecond feels. Here all layers read one position, and only the write itself is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

#: cache lengths are multiples of this: attention kernels copy a mask whose rows are not aligned
ALIGNMENT = 16


@dataclass
class Cursor:
    """Where the next keys and values go.

    position: `(1,)` int64 on the model's device, slot of the token of a decode step; read by a captured step.
    span:     first slot and the one after the last of a prefill chunk; None in a decode step.
    """

    position: Tensor
    span: tuple[int, int] | None = None


class CursorLayer(StaticLayer):
    """Keys and values of one layer, `(batch, heads, slots, head size)`, allocated at the first write."""

    def __init__(self, slots: int, cursor: Cursor) -> None:
        super().__init__(max_cache_len=slots)
        self.cursor = cursor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write and return what attention reads: the slots up to the chunk's end, or all slots in a decode step."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cursor.span is None:
            self.keys.index_copy_(2, self.cursor.position, key_states)
            self.values.index_copy_(2, self.cursor.position, value_states)
            return self.keys, self.values
        start, end = self.cursor.span
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that attention reads, and the first one's slot; asked only in a first chunk."""
        return (self.max_cache_len if self.cursor.span is None else self.cursor.span[1]), 0

    def get_seq_length(self) -> int:
        """Tokens before the present chunk."""
        assert self.cursor.span is not None, "a decode step brings its own mask and positions"
        return self.cursor.span[0]


class CursorCache(Cache):
    """Cache of `layers` layers for `context` tokens."""

    def __init__(self, layers: int, context: int, device: torch.device) -> None:
        self.cursor = Cursor(torch.zeros(1, dtype=torch.int64, device=device))
        self.slots = -(-context // ALIGNMENT) * ALIGNMENT
        super().__init__(layers=[CursorLayer(self.slots, self.cursor) for _ in range(layers)])
