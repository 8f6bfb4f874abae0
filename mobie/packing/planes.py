"""Matrices of nested sign planes: a column has as many signs per weight as it was given, a row has one scale.

    value[i, j] = row_scale[i] · Σ_{q < p_j} ratio[p_j, q] · sign[q, i, j]

p_j is the number of planes of column j; a column without any is zero. The ratios are shared by the whole matrix: the
columns of p planes have p of them, so that a weight of two planes lies on one of four levels of its row, and so on.

    p_j         2  0  1  3  1          ratios    class 1   ρ10
    plane 0     a  .  b  c  d                    class 2   ρ20 ρ21
    plane 1     e  .  .  f  .                    class 3   ρ30 ρ31 ρ32
    plane 2     .  .  .  g  .
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mobie.packing.base import Packed, register_format
from mobie.packing.binary import to_half
from mobie.packing.bits import pack_codes, pack_mask, unpack_codes, unpack_signs


def ratio_at(planes: int, plane: int) -> int:
    """Where the ratio of plane q < p of the columns of p planes is stored."""
    return planes * (planes - 1) // 2 + plane


def stored_bytes(size: tuple[int, int], plane_columns: tuple[int, ...]) -> int:
    """Bytes of a matrix `(out, in)` of which plane q covers `plane_columns[q]` columns."""
    (out, columns), planes = size, len(plane_columns)
    signs = out * sum(-(-count // 8) for count in plane_columns)
    scales = 2 * (out if planes else 0) + 2 * ratio_at(planes + 1, 0)
    return signs + scales + planes.bit_length() * -(-columns // 8)


@register_format
@dataclass(frozen=True)
class PlaneMatrix(Packed):
    """A matrix `(out, in)` of nested sign planes; see the head of this file.

    signs:         `(out, Σ_q ceil(plane_columns[q]/8))` uint8, packed bits, 1 for +1; plane after plane, of a plane the
                   columns that it covers, in order.
    row_scale:     `(out,)` float16; none where there is no plane.
    ratio:         `(planes·(planes + 1)/2,)` float16, at `ratio_at`.
    counts:        `(bits, ceil(in/8))` uint8: p_j as codes (`packing.bits`), as many bits as the largest takes.
    plane_columns: how many columns each plane covers, falling.
    size:          (out, in).
    """

    format = "planes"
    code_tensors = frozenset({"signs"})
    scale_tensors = frozenset({"row_scale", "ratio"})

    signs: Tensor
    row_scale: Tensor
    ratio: Tensor
    counts: Tensor
    plane_columns: tuple[int, ...]
    size: tuple[int, int]

    @classmethod
    def pack(cls, signs: Tensor, row_scale: Tensor, ratio: Tensor, counts: Tensor) -> Self:
        """Round scales to float16 and pack bits.

        Args:
            signs: `(planes, out, in)`, +1 where `>= 0`; of plane q only the columns with `counts > q` are read.
            row_scale: `(out,)`.
            ratio: `(planes·(planes + 1)/2,)`.
            counts: `(in,)` integers, the largest is the number of planes.

        Raises:
            ValueError: a scale is not finite, or shapes that do not belong together.
        """
        counts = counts.cpu()
        planes, out = int(counts.max()), signs.shape[1]
        covered = [counts > plane for plane in range(planes)]
        if len(ratio) != ratio_at(planes + 1, 0) or len(signs) < planes:
            raise ValueError(f"{len(ratio)} ratios and {len(signs)} planes of signs for counts up to {planes}")
        if not (row_scale.isfinite().all() and ratio.isfinite().all()):
            raise ValueError("scales must be finite, got NaN or infinity")
        kept = [pack_mask(plane.cpu()[:, columns] >= 0) for plane, columns in zip(signs, covered, strict=False)]
        return cls(
            torch.cat(kept, dim=1) if kept else torch.zeros(out, 0, dtype=torch.uint8),
            to_half(row_scale if planes else row_scale[:0]).cpu().contiguous(),
            to_half(ratio).cpu().contiguous(),
            pack_codes(counts, planes.bit_length()),
            tuple(int(columns.sum()) for columns in covered),
            (out, len(counts)),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def planes(self) -> int:
        return len(self.plane_columns)

    def plane_counts(self) -> Tensor:
        """p of every column, `(in,)` int64."""
        if not self.planes:
            return torch.zeros(self.size[1], dtype=torch.int64, device=self.counts.device)
        return unpack_codes(self.counts, self.size[1]).long()

    def plane(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """One plane: its columns `(n,)` int64, their ratios `(n,)` float16, the packed signs `(out, ceil(n/8))`."""
        counts = self.plane_counts()
        # a stable sort has a size known beforehand: no wait for a GPU, and it works without values
        columns = (counts <= number).to(torch.uint8).argsort(stable=True)[: self.plane_columns[number]]
        start = sum(-(-count // 8) for count in self.plane_columns[:number])
        width = -(-self.plane_columns[number] // 8)
        own = counts[columns]
        return columns, self.ratio[own * (own - 1) // 2 + number], self.signs[:, start : start + width]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = torch.zeros(self.size, device=self.signs.device)
        for number in range(self.planes):
            columns, ratio, signs = self.plane(number)
            dense[:, columns] += unpack_signs(signs, len(columns)).mul_(ratio.float())
        if self.planes:
            dense.mul_(self.row_scale.float()[:, None])
        return dense.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs, "row_scale": self.row_scale, "ratio": self.ratio, "counts": self.counts}

    def header(self) -> dict[str, Any]:
        return {"size": list(self.size), "plane_columns": list(self.plane_columns)}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(**tensors, plane_columns=tuple(header["plane_columns"]), size=tuple(header["size"]))

    def paper_bits(self, active_share: float = 1.0) -> float:
        """Signs per weight: scales, ratios and counts are left out."""
        return sum(self.plane_columns) / self.size[1]
