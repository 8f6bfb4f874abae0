"""The full-precision baseline: weights kept in 16 bits, stored and counted as any other method's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mobie.methods.base import LinearStats, Method, register
from mobie.packing.base import Packed
from mobie.packing.dense import Dense16


@register
@dataclass(frozen=True)
class FP16(Method):
    """No quantization; weights are stored in bfloat16, the format in which the suite's models are published."""

    name: ClassVar[str] = "fp16"
    seconds_per_weight: ClassVar[float] = 1e-9
    stored_bits: ClassVar[float] = 16.0
    needs_statistics: ClassVar[bool] = False
    reads_statistics: ClassVar[bool] = False

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Dense16:
        return Dense16(weight.to(torch.bfloat16).cpu().contiguous())

    def quantize_chunk(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]]
    ) -> list[dict[str, Packed]]:
        halves = {name: weight.to(torch.bfloat16).cpu() for name, weight in weights.items()}
        return [{name: Dense16(half[e].clone()) for name, half in halves.items()} for e in range(len(stats))]
