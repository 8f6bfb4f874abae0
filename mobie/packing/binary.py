"""Binarized matrices: one sign bit per weight and per order, with small tables of scales.

A *segment* is a set of columns of a matrix that are binarized alike. Take row i and segment column j, whose column in
the matrix is c, in block b = c // block_size, and the element's magnitude group g (its bit of the bitmap; else 0):

    value[i, j] = mean[g, i, b] + Σ_k row_scale[k, g, i, b] · column_scale[k, g, j] · sign[k, i, j]

A matrix may have one factor per column, by which all of that is multiplied: the means too, which `column_scale` leaves
as they are.

A matrix has a `plain` segment and, for its salient columns, an `extra` one: in their place (BiLLM, ARB-LLM), or on
top of the plain segment that then covers every column (MoBiE, Algorithm 3).

    salient replaced               salient added
    columns   0 1 2 3 4 5          columns   0 1 2 3 4 5
    plain     a b . c d .          plain     a b c d e f
    extra     . . e . . f          extra     . . g . . h
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mobie.packing.base import Packed, register_format
from mobie.packing.bits import pack_mask, unpack_mask, unpack_signs


def to_half(values: Tensor) -> Tensor:
    """Round finite values to float16; magnitudes beyond its range become the largest finite ones, never infinite."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half()


def select_group(per_group: Tensor, second_group: Tensor | None) -> Tensor:
    """Value of each element's own magnitude group.

    per_group `(groups, …)` broadcasts to `(groups, out, n)`; second_group `(out, n)` bool, None with one group.
    """
    if second_group is None:
        return per_group[0]
    return torch.where(second_group, per_group[1], per_group[0])


@dataclass(frozen=True)
class Segment:
    """n columns of a matrix, binarized alike.

    signs:        `(order, out, ceil(n/8))` uint8, packed bits, 1 for +1.
    row_scale:    `(order, groups, out, blocks)` float16; blocks are those of the whole matrix.
    mean:         `(groups, out, blocks)` float16, the sum of the orders' means, or None.
    column_scale: `(order, groups, n)` float16, or None.
    bitmap:       `(out, ceil(n/8))` uint8, packed bits, 1 for the second group; present iff groups == 2.
    """

    signs: Tensor
    row_scale: Tensor
    mean: Tensor | None = None
    column_scale: Tensor | None = None
    bitmap: Tensor | None = None

    @classmethod
    def pack(
        cls,
        signs: Tensor,
        row_scale: Tensor,
        mean: Tensor | None = None,
        column_scale: Tensor | None = None,
        second_group: Tensor | None = None,
    ) -> Self:
        """Round scales to float16 and pack bits.

        signs `(order, out, n)`: bool (True is +1) or values, +1 where `>= 0`. row_scale, mean, column_scale: float, in
        the shapes of the fields. second_group `(out, n)` bool, needed iff there are two groups.

        Raises:
            ValueError: shapes that do not belong together, or a scale that is not finite.
        """
        order, out, n = signs.shape
        groups, blocks = row_scale.shape[1], row_scale.shape[3]
        _expect("row_scale", row_scale, (order, groups, out, blocks))
        _expect("mean", mean, (groups, out, blocks))
        _expect("column_scale", column_scale, (order, groups, n))
        _expect("second_group", second_group, (out, n))
        if groups != (1 if second_group is None else 2):
            raise ValueError(f"{groups} groups, expected 2 with second_group and 1 without")
        positive = signs if signs.dtype == torch.bool else signs >= 0
        return cls(
            pack_mask(positive),
            _store(row_scale),
            None if mean is None else _store(mean),
            None if column_scale is None else _store(column_scale),
            None if second_group is None else pack_mask(second_group),
        )

    def dequantize(self, columns: Tensor, block_size: int, *, every: bool = False) -> Tensor:
        """Dense values `(out, n)` float32.

        columns `(n,)`: the segment's columns in the matrix; `every` says that they are all of them, in order.
        """
        n = len(columns)
        second = None if self.bitmap is None else unpack_mask(self.bitmap, n)
        dense = None
        if self.mean is not None:
            dense = select_group(_of_columns(self.mean.float(), columns, block_size, every), second)
        for k, bits in enumerate(self.signs):
            scale = _of_columns(self.row_scale[k].float(), columns, block_size, every)  # (groups, out, n)
            if self.column_scale is not None:
                scale.mul_(self.column_scale[k].float()[:, None, :])  # in place: new memory costs more than the product
            value = select_group(scale, second).mul_(unpack_signs(bits, n))
            dense = value if dense is None else dense.add_(value)
        return dense

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        named = {
            "signs": self.signs,
            "row_scale": self.row_scale,
            "mean": self.mean,
            "column_scale": self.column_scale,
            "bitmap": self.bitmap,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@register_format
@dataclass(frozen=True)
class BinaryMatrix(Packed):
    """Matrix `(out, in)` of signs and scales; see the head of this file.

    size:              (out, in).
    block_size:        columns that share a row scale; `in` for one scale per row.
    salient:           sorted columns with extra bits, int16 (int32 where in > 32767); may be none, or all.
    plain:             segment of all columns if `extra_is_residual`, else of the columns that are not salient.
    extra:             segment of the salient columns; None only if there are none.
    extra_is_residual: whether `extra` is added to `plain` (MoBiE) or stands in its place (BiLLM, ARB-LLM).
    column_factor:     `(in,)` float16, multiplies whole columns, or None.
    """

    format = "binary"
    code_tensors = frozenset({"plain.signs", "extra.signs"})
    scale_tensors = frozenset(
        {"plain.row_scale", "plain.column_scale", "extra.row_scale", "extra.column_scale", "column_factor"}
    )

    size: tuple[int, int]
    block_size: int
    salient: Tensor
    plain: Segment
    extra: Segment | None
    extra_is_residual: bool
    column_factor: Tensor | None = None

    @classmethod
    def build(
        cls,
        size: tuple[int, int],
        block_size: int,
        salient: Tensor,
        plain: Segment,
        extra: Segment | None,
        extra_is_residual: bool,
        column_factor: Tensor | None = None,
    ) -> Self:
        """Put packed segments together; `salient` is a sorted list of columns or a mask `(in,)`.

        Raises:
            ValueError: salient columns without an extra segment, a size that does not fit, or a factor not finite.
        """
        columns = salient.nonzero().flatten() if salient.dtype == torch.bool else salient
        columns = columns.to("cpu", torch.int16 if size[1] <= torch.iinfo(torch.int16).max else torch.int32)
        if len(columns) and extra is None:
            raise ValueError(f"{len(columns)} salient columns, but no extra segment")
        _expect("column_factor", column_factor, (size[1],))
        factor = None if column_factor is None else _store(column_factor)
        matrix = cls(size, block_size, columns, plain, extra, extra_is_residual, factor)
        blocks = -(-size[1] // block_size)
        for name, segment, n in (("plain", plain, len(matrix.plain_columns())), ("extra", extra, len(columns))):
            if segment is not None:
                order, groups = segment.row_scale.shape[:2]
                _expect(f"{name}.signs", segment.signs, (order, size[0], -(-n // 8)))
                _expect(f"{name}.row_scale", segment.row_scale, (order, groups, size[0], blocks))
        return matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def plain_columns(self) -> Tensor:
        """Columns `(n,)` int64 that the plain segment covers."""
        if self.extra_is_residual:
            return torch.arange(self.size[1], device=self.salient.device)
        replaced = torch.zeros(self.size[1], dtype=torch.uint8, device=self.salient.device)
        replaced[self.salient.long()] = 1
        # a stable sort, unlike `nonzero`, has a size known beforehand: no wait for a GPU, and it works without values
        return replaced.argsort(stable=True)[: self.size[1] - len(self.salient)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        columns = self.plain_columns()
        dense = self.plain.dequantize(columns, self.block_size, every=self.extra_is_residual)
        if not self.extra_is_residual:
            dense = dense.new_zeros(self.size).index_copy_(1, columns, dense)
        if self.extra is not None:
            dense[:, self.salient.long()] += self.extra.dequantize(self.salient, self.block_size)
        if self.column_factor is not None:
            dense.mul_(self.column_factor.float())
        return dense.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"plain.{name}": tensor for name, tensor in self.plain.tensors().items()}
        if self.extra is not None:
            named |= {f"extra.{name}": tensor for name, tensor in self.extra.tensors().items()}
        if self.column_factor is not None:
            named["column_factor"] = self.column_factor
        return named | {"salient": self.salient}

    def header(self) -> dict[str, Any]:
        return {
            "size": list(self.size),
            "block_size": self.block_size,
            "extra_is_residual": self.extra_is_residual,
        }

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        parts: dict[str, dict[str, Tensor]] = {"plain": {}, "extra": {}}
        for name, tensor in tensors.items():
            part, dot, field = name.partition(".")
            if dot:
                parts[part][field] = tensor
        return cls(
            tuple(header["size"]),
            header["block_size"],
            tensors["salient"],
            Segment(**parts["plain"]),
            Segment(**parts["extra"]) if parts["extra"] else None,
            header["extra_is_residual"],
            tensors.get("column_factor"),
        )

    def paper_bits(self, active_share: float = 1.0) -> float:
        """`2r + (1 - r)`, r the share of salient columns: scales, means, bitmaps and indices are left out."""
        return 1 + len(self.salient) / self.size[1]


def _of_columns(per_block: Tensor, columns: Tensor, block_size: int, every: bool) -> Tensor:
    """One value per block `(..., blocks)` → that of each column's block `(..., n)`, in memory of its own."""
    if every:  # many times as fast as looking up each column
        return per_block.repeat_interleave(block_size, dim=-1)[..., : len(columns)].contiguous()
    return per_block.index_select(-1, columns.long() // block_size)


def _store(scales: Tensor) -> Tensor:
    if not scales.isfinite().all():
        raise ValueError("scales must be finite, got NaN or infinity")
    return to_half(scales).cpu().contiguous()


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
