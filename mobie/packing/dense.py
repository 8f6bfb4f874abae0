"""Weights kept in 16 bits: the full-precision baseline, stored and counted like any other format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mobie.packing.base import Packed, register_format


@register_format
@dataclass(frozen=True)
class Dense16(Packed):
    """`weight`: any shape, bfloat16 or float16, bit for bit as loaded."""

    format = "dense16"
    code_tensors = frozenset({"weight"})

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["weight"])

    def paper_bits(self, active_share: float = 1.0) -> float:
        return 16.0
