"""The n-bit uniform grid, asymmetric or symmetric: its arithmetic, and the format in which it is stored.

    W[i, j] = (code[i, j] - zero[i, g]) · scale[i, g] / column_scale[j]        g = j // group_size

A group is `group_size` consecutive inputs of one output row (the last group of a row may be shorter), or the whole row
when `group_size` is None. The grid always contains 0. A scale is rounded to float16 before any code is computed, so
what a method sees is what is stored. `column_scale` is AWQ's; without one it is left out. In a symmetric grid every
zero point is `2^(bits-1)`, and none is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from mobie.errors import ConfigError, DataError
from mobie.packing.base import Packed, register_format
from mobie.packing.bits import pack_codes, unpack_codes

MAX_BITS = 8
SMALLEST_SCALE = 2.0**-24  # smallest positive float16
GROUP_OVERHEAD_BITS = 32  # scale and zero point of one group, 16 bits each, as papers count them
SYMMETRIC_OVERHEAD_BITS = 16  # the scale alone


def check_grid_options(method: str, bits: int, group_size: int | None, option: str = "bits") -> None:
    """Refuse options that no grid has; `option` is the method's name for the bits.

    Raises:
        ConfigError: `bits` is not an integer in 1..8, or `group_size` neither None nor a positive integer.
    """
    if type(bits) is not int or not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"{method}: {option} is {bits!r}; expected an integer from 1 to {MAX_BITS}")
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise ConfigError(
            f"{method}: group_size is {group_size!r}; expected a positive number of inputs, or null for the whole row"
        )


def nominal_bits(bits: int, group_size: int | None, *, symmetric: bool = False) -> float:
    """Bits per weight as papers count a grid: scales per row are free, those of groups and zeros cost 16 each."""
    overhead = SYMMETRIC_OVERHEAD_BITS if symmetric else GROUP_OVERHEAD_BITS
    return float(bits) if group_size is None else bits + overhead / group_size


def symmetric_zero(bits: int) -> int:
    """The zero point of a symmetric grid, whose codes stand for `-2^(bits-1) .. 2^(bits-1) - 1` times the scale."""
    return 1 << (bits - 1)


def split_groups(values: Tensor, group_size: int | None) -> Tensor:
    """`(..., in)` → `(..., groups, group_size)`, the last group padded with zeros (which no grid's range notices)."""
    size = group_size or values.shape[-1]
    missing = -values.shape[-1] % size
    return (pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, size))


def join_groups(groups: Tensor, columns: int) -> Tensor:
    """Inverse of `split_groups`: `(..., groups, group_size)` → `(..., columns)`."""
    return groups.flatten(-2)[..., :columns]


def spread_groups(values: Tensor, group_size: int | None, columns: int) -> Tensor:
    """One value per group `(..., groups)` → one per column `(..., columns)`."""
    if group_size is None:
        return values.expand(*values.shape[:-1], columns)
    return values.repeat_interleave(group_size, dim=-1)[..., :columns]


def fit_grid(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Grid of each group from its least and greatest weight, `min <= 0 <= max` forced.

        scale = (max - min) / (2^bits - 1), rounded to float16        zero = round(-min / scale)

    Args:
        weight: `(..., out, in)` float32.

    Returns:
        Scale, holding float16 values, and zero, holding integers: both `(..., out, groups)` float32.

    Raises:
        DataError: the weights span more than a float16 scale can cover, or are not finite.
    """
    groups = split_groups(weight, group_size)
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    top = (1 << bits) - 1
    scale = ((high - low) / top).half().float().clamp(min=SMALLEST_SCALE)
    if not scale.isfinite().all():
        raise DataError(
            f"weights span {low.min():.3g}..{high.max():.3g}; expected finite values within {65504 * top:.3g} of each "
            f"other, the reach of a {bits}-bit grid with float16 scales: rescale the weights"
        )
    return scale, (-low / scale).round().clamp(0, top)


def nearest_code(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Code of the grid point nearest to each weight, as float32 integers; the arguments broadcast."""
    return (weight / scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Nearest codes `(..., out, in)` uint8 of weights on the grids `(..., out, groups)`."""
    codes = nearest_code(split_groups(weight, group_size), scale[..., None], zero[..., None], bits)
    return join_groups(codes.to(torch.uint8), weight.shape[-1])


def decode(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int | None) -> Tensor:
    """Weights `(..., out, in)` float32 that codes stand for: `(code - zero) · scale`."""
    groups = (split_groups(codes, group_size) - zero[..., None]).mul_(scale[..., None])
    return join_groups(groups, codes.shape[-1])


def round_trip(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Weights `(..., out, in)` rounded to the nearest point of their groups' grids: `fit_grid`, `encode`, `decode`."""
    scale, zero = (values[..., None] for values in fit_grid(weight, bits, group_size))
    codes = nearest_code(split_groups(weight, group_size), scale, zero, bits)
    return join_groups(codes.sub_(zero).mul_(scale), weight.shape[-1])


@register_format
@dataclass(frozen=True)
class Grid(Packed):
    """A matrix `(out, in)` on a uniform grid.

    codes:        `(out, bits, ceil(in/8))` uint8, bit planes (`packing.bits`).
    scale:        `(out, groups)` float16.
    zero:         `(groups, bits, ceil(out/8))` uint8: integer zero points, as many bits as a code, packed along `out`;
                  None in a symmetric grid.
    column_scale: `(in,)` float16 or None; the stored grid is that of `W · column_scale`.
    columns:      `in`.
    paper:        bits per weight that the method's paper prints; the method decides.
    """

    format = "grid"
    code_tensors = frozenset({"codes"})
    scale_tensors = frozenset({"scale"})

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    column_scale: Tensor | None
    columns: int
    bits: int
    group_size: int | None
    paper: float

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        group_size: int | None,
        paper: float,
        column_scale: Tensor | None = None,
    ) -> Self:
        """Store codes `(out, in)` on grids `(out, groups)`; `zero` None: symmetric; `column_scale` `(in,)`."""
        return cls(
            codes=pack_codes(codes, bits),
            scale=scale.half().cpu().contiguous(),
            zero=None if zero is None else pack_codes(zero.T, bits),
            column_scale=None if column_scale is None else column_scale.half().cpu().contiguous(),
            columns=codes.shape[-1],
            bits=bits,
            group_size=group_size,
            paper=paper,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.scale.shape[0], self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = unpack_codes(self.codes, self.columns)
        scale = self.scale.float()
        dense = decode(codes, scale, self._zero_points(scale), self.group_size)
        if self.column_scale is not None:
            dense = dense / self.column_scale.float()
        return dense.to(dtype)

    def _zero_points(self, scale: Tensor) -> Tensor:
        """`(out, groups)` float32, as `scale` has them."""
        if self.zero is None:
            return torch.full_like(scale, symmetric_zero(self.bits))
        return unpack_codes(self.zero, self.shape[0]).T.float()

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "column_scale": self.column_scale}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def header(self) -> dict[str, Any]:
        header = {"columns": self.columns, "bits": self.bits, "group_size": self.group_size, "paper": self.paper}
        return header if self.zero is not None else header | {"symmetric": True}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        absent: dict[str, Any] = {"column_scale": None}
        if header.get("symmetric"):  # else a file without zero points is a damaged one
            absent["zero"] = None
        layout = {name: value for name, value in header.items() if name != "symmetric"}
        return cls(**{**absent, **tensors}, **layout)

    def paper_bits(self, active_share: float = 1.0) -> float:
        return self.paper


def pack_bank(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    paper: float,
    column_scale: Tensor | None = None,
) -> list[Grid]:
    """`Grid.pack` for every expert of codes `(experts, out, in)`; `column_scale` `(experts, in)`."""
    return [
        Grid.pack(
            codes[e],
            scale[e],
            None if zero is None else zero[e],
            bits=bits,
            group_size=group_size,
            paper=paper,
            column_scale=None if column_scale is None else column_scale[e],
        )
        for e in range(len(codes))
    ]
