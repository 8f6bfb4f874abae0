"""Stored matrices of signs as one matrix of a `BinaryBank`: a plane over all columns, and places of extra signs.

    binary matrix (MoBiE's)    plain segment         all columns    its second order     places
    sign planes (OBE's)        plane 0               all columns    planes 1, 2, …       places, a column once per plane

A column may have several places: kernels gather x at every place, and add. A column without any plane has the scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mobie.packing.binary import BinaryMatrix, Segment
from mobie.packing.bits import BYTE, unpack_mask
from mobie.packing.planes import PlaneMatrix


@dataclass(frozen=True)
class BankMatrix:
    """One matrix of a bank, before it is padded and stacked; fields as those of `BinaryBank`, for n places.

    signs:              `(rows, ceil(columns/8))` uint8.
    row_scale:          `(rows, blocks)` float16.
    column_scale:       `(columns,)` float16.
    extra_signs:        `(rows, ceil(n/8))` uint8.
    extra_columns:      `(n,)` int32.
    extra_row_scale:    `(rows, blocks)` float16.
    extra_column_scale: `(n,)` float16.
    """

    signs: Tensor
    row_scale: Tensor
    column_scale: Tensor
    extra_signs: Tensor
    extra_columns: Tensor
    extra_row_scale: Tensor
    extra_column_scale: Tensor
    columns: int
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.signs.shape[0], self.columns)

    @property
    def places(self) -> int:
        return len(self.extra_columns)

    @classmethod
    def of_binary(cls, matrix: BinaryMatrix) -> BankMatrix:
        """A matrix of one magnitude group and order, without means, whose salient columns are added."""
        plain, extra = matrix.plain, matrix.extra
        if extra is None:  # no places, and so no scale of a row is read
            extra = Segment(plain.signs[..., :0], plain.row_scale, column_scale=plain.row_scale[:, :, 0, :0])
        return cls(
            signs=plain.signs[0],
            row_scale=plain.row_scale[0, 0],
            column_scale=_column_scale(plain, matrix.size[1]),
            extra_signs=extra.signs[0],
            extra_columns=matrix.salient.int(),
            extra_row_scale=extra.row_scale[0, 0],
            extra_column_scale=_column_scale(extra, len(matrix.salient)),
            columns=matrix.size[1],
            block_size=matrix.block_size,
        )

    @classmethod
    def of_planes(cls, matrix: PlaneMatrix) -> BankMatrix:
        """Plane 0 spread over all columns; of a column of p planes p - 1 places."""
        rows, columns = matrix.size
        row_scale = matrix.row_scale if matrix.planes else matrix.ratio.new_zeros(rows)
        bits = matrix.signs.new_zeros(rows, columns)
        column_scale = row_scale.new_zeros(columns)
        at, ratios, extra = [bits[0, :0].int()], [row_scale[:0]], [bits[:, :0]]
        for number in range(matrix.planes):
            covered, ratio, packed = matrix.plane(number)
            own = unpack_mask(packed, len(covered)).to(bits.dtype)
            if number == 0:
                bits[:, covered] = own
                column_scale[covered] = ratio
            else:
                at.append(covered.int())
                ratios.append(ratio)
                extra.append(own)
        return cls(
            signs=_pack(bits),
            row_scale=row_scale[:, None],
            column_scale=column_scale,
            extra_signs=_pack(torch.cat(extra, dim=1)),
            extra_columns=torch.cat(at),
            extra_row_scale=row_scale[:, None],
            extra_column_scale=torch.cat(ratios),
            columns=columns,
            block_size=columns,
        )


def _column_scale(segment: Segment, columns: int) -> Tensor:
    if segment.column_scale is None:
        return segment.row_scale.new_ones(columns)
    return segment.column_scale[0, 0]


def _pack(bits: Tensor) -> Tensor:
    """Bits `(rows, n)` uint8 → `(rows, ceil(n/8))` uint8 in the order of `packing.bits`, on their device."""
    whole = pad(bits, (0, -bits.shape[-1] % BYTE)).unflatten(-1, (-1, BYTE))
    shifts = torch.arange(BYTE, dtype=torch.uint8, device=bits.device)
    return (whole << shifts).sum(-1, dtype=torch.uint8)
