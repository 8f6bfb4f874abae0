"""Round to nearest: the asymmetric grid of each group, no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mobie.methods.base import LinearStats, Method, register
from mobie.packing.grid import Grid, check_grid_options, encode, fit_grid, nominal_bits


@register
@dataclass(frozen=True)
class RTN(Method):
    """Every weight to the nearest point of its group's grid; `group_size` None is one grid per output row."""

    name: ClassVar[str] = "rtn"

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_grid_options(self.name, self.bits, self.group_size)

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Grid:
        scale, zero = fit_grid(weight, self.bits, self.group_size)
        codes = encode(weight, scale, zero, self.bits, self.group_size)
        paper = nominal_bits(self.bits, self.group_size)
        return Grid.pack(codes, scale, zero, bits=self.bits, group_size=self.group_size, paper=paper)
