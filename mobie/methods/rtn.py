"""Round to nearest: the asymmetric grid of each group, no calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mobie.methods.base import LinearStats, Method, register
from mobie.packing.base import Packed
from mobie.packing.grid import Grid, check_grid_options, encode, fit_grid, nominal_bits, pack_bank


@register
@dataclass(frozen=True)
class RTN(Method):
    """Every weight to the nearest point of its group's grid; `group_size` None is one grid per output row."""

    name: ClassVar[str] = "rtn"
    seconds_per_weight: ClassVar[float] = 5.8e-9
    reads_statistics: ClassVar[bool] = False

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_grid_options(self.name, self.bits, self.group_size)

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Grid:
        return Grid.pack(*self._round(weight), **self._layout)

    def quantize_chunk(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]]
    ) -> list[dict[str, Packed]]:
        packed = {name: pack_bank(*self._round(weight), **self._layout) for name, weight in weights.items()}
        return [{name: own[e] for name, own in packed.items()} for e in range(len(stats))]

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = fit_grid(weight, self.bits, self.group_size)
        return encode(weight, scale, zero, self.bits, self.group_size), scale, zero

    @property
    def _layout(self) -> dict[str, Any]:
        paper = nominal_bits(self.bits, self.group_size)
        return {"bits": self.bits, "group_size": self.group_size, "paper": paper}
