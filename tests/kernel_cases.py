"""Random packed weights of any shape for the tests of kernels, and float64 answers to hold them against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mobie.kernels.layout import BinaryBank, Panel
from mobie.packing.bank import GATE_UP, PackedBank, SymmetricRows
from mobie.packing.base import Packed
from mobie.packing.binary import BinaryMatrix, Segment
from mobie.packing.dense import Dense16
from mobie.packing.planes import PlaneMatrix


def random_segment(
    rows: int,
    columns: int,
    blocks: int,
    generator: torch.Generator,
    *,
    order: int = 1,
    groups: int = 1,
    mean: bool = False,
    column_scale: bool = True,
) -> Segment:
    """A segment with scales around one, so that every tensor of it matters."""

    def positive(*shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=generator)

    return Segment.pack(
        torch.randn(order, rows, columns, generator=generator),
        positive(order, groups, rows, blocks),
        mean=torch.randn(groups, rows, blocks, generator=generator) if mean else None,
        column_scale=positive(order, groups, columns) if column_scale else None,
        second_group=torch.rand(rows, columns, generator=generator) < 0.5 if groups == 2 else None,
    )


def random_matrix(
    rows: int,
    columns: int,
    salient: int,
    generator: torch.Generator,
    *,
    block_size: int = 128,
    residual: bool = True,
    order: int = 1,
    extra_order: int = 1,
    groups: int = 1,
    mean: bool = False,
    column_scale: bool = True,
    column_factor: bool = False,
) -> BinaryMatrix:
    """A binary matrix; the defaults are MoBiE's format, where `salient` columns have a residual second order."""
    chosen = torch.randperm(columns, generator=generator)[:salient].sort().values
    blocks = -(-columns // block_size)
    plain_columns = columns if residual else columns - salient
    kind = {"groups": groups, "mean": mean, "column_scale": column_scale}
    return BinaryMatrix.build(
        (rows, columns),
        block_size,
        chosen,
        random_segment(rows, plain_columns, blocks, generator, order=order, **kind),
        random_segment(rows, salient, blocks, generator, order=extra_order, **kind) if salient else None,
        residual,
        0.5 + torch.rand(columns, generator=generator) if column_factor else None,
    )


def random_planes(rows: int, counts: Sequence[int] | Tensor, generator: torch.Generator) -> PlaneMatrix:
    """A matrix of sign planes with `counts` planes per column; row scales and ratios of both signs."""
    planes = max(1, int(max(counts)))
    sign = torch.randint(0, 2, (rows,), generator=generator) * 2 - 1
    most = int(max(counts))
    return PlaneMatrix.pack(
        torch.randn(planes, rows, len(counts), generator=generator),
        sign * (0.5 + torch.rand(rows, generator=generator)),
        torch.randn(most * (most + 1) // 2, generator=generator),
        torch.as_tensor(counts),
    )


def random_plane_experts(
    experts: int, hidden: int, width: int, *, most: int = 4, seed: int = 0
) -> dict[str, PackedBank]:
    """A layer's experts in sign planes: the first has none, of the others every column 0 … `most`, more or fewer."""
    generator = torch.Generator().manual_seed(seed)

    def bank(out: int, columns: int) -> PackedBank:
        tops = [most * e // max(1, experts - 1) for e in range(experts)]
        counts = [torch.randint(top + 1, (columns,), generator=generator) for top in tops]
        return PackedBank(tuple(random_planes(out, own, generator) for own in counts))

    return {"gate": bank(width, hidden), "up": bank(width, hidden), "down": bank(hidden, width)}


def random_bank(
    experts: int,
    out: int,
    columns: int,
    generator: torch.Generator,
    *,
    basis: int | None = 8,
    side: str = "left",
    rank: int | None = None,
    most_salient: int = 20,
    block_size: int = 128,
) -> PackedBank:
    """Experts of MoBiE's format; their numbers of salient columns differ. `basis`: its bits, or None."""
    inner = min(out, columns) if rank is None else rank
    size = (out, columns) if basis is None else (inner, columns) if side == "left" else (out, inner)
    counts = [min(most_salient * e // max(1, experts - 1), size[1]) for e in range(experts)]
    matrices = tuple(random_matrix(*size, salient, generator, block_size=block_size) for salient in counts)
    if basis is None:
        return PackedBank(matrices)
    shape = (out, inner) if side == "left" else (inner, columns)
    dense = torch.randn(*shape, generator=generator) / inner**0.5
    packed: Packed = Dense16(dense.half()) if basis == 16 else SymmetricRows.quantize(dense, basis)
    return PackedBank(matrices, packed, side)


def random_experts(
    experts: int,
    hidden: int,
    width: int,
    *,
    basis: int | None = 8,
    side: str = "left",
    down_side: str | None = None,
    fused: bool = False,
    rank: int | None = None,
    most_salient: int = 20,
    block_size: int = 128,
    seed: int = 0,
) -> dict[str, PackedBank]:
    """A layer's experts: gate and up `(width, hidden)`, or both as one bank, and down `(hidden, width)`."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"basis": basis, "rank": rank, "most_salient": most_salient, "block_size": block_size}
    if fused:
        packed = {GATE_UP: random_bank(2 * experts, width, hidden, generator, side=side, **kind)}
    else:
        packed = {name: random_bank(experts, width, hidden, generator, side=side, **kind) for name in ("gate", "up")}
    return packed | {"down": random_bank(experts, hidden, width, generator, side=down_side or side, **kind)}


def exact_signs(packed: Tensor) -> np.ndarray:
    """±1 in float64, `(..., 8·bytes)`."""
    return np.unpackbits(packed.numpy(), axis=-1, bitorder="little") * 2.0 - 1.0


def exact_bank(bank: BinaryBank) -> np.ndarray:
    """The matrices `(experts, parts, rows, columns)` float64 that a layout stands for, by its docstring."""
    row, extra_row, column, extra_column = (
        t.double().numpy() for t in (bank.row_scale, bank.extra_row_scale, bank.column_scale, bank.extra_column_scale)
    )
    signs, extra_signs = exact_signs(bank.signs), exact_signs(bank.extra_signs)
    dense = np.zeros((*row.shape[:3], bank.columns))
    for j in range(bank.columns):
        dense[..., j] = row[..., j // bank.block_size] * column[..., None, j] * signs[..., j]
    for e, p, k in np.ndindex(*extra_column.shape):
        j = int(bank.extra_columns[e, p, k])
        scale = extra_row[e, p, :, j // bank.block_size] * extra_column[e, p, k]
        dense[e, p, :, j] += scale * extra_signs[e, p, :, k]
    return dense


def exact_panel(panel: Panel) -> np.ndarray:
    """The matrices `(parts, rows, columns)` float64 of a panel."""
    codes = panel.codes.double().numpy()
    return codes if panel.scale is None else codes * panel.scale.double().numpy()[..., None]
