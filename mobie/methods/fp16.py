"""The full-precision baseline: weights kept in 16 bits, stored and counted as any other method's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mobie.methods.base import LinearStats, Method, register
from mobie.packing.dense import Dense16


@register
@dataclass(frozen=True)
class FP16(Method):
    """No quantization; weights are stored in bfloat16, the format in which the suite's models are published."""

    name: ClassVar[str] = "fp16"
    needs_statistics: ClassVar[bool] = False

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Dense16:
        return Dense16(weight.to(torch.bfloat16).cpu().contiguous())
