"""16-bit experts: every pair's row of x times its expert's weight. The baseline of the binary kernels.

One program has `rows` rows of one expert's weight for one tile of pairs. In decoding a tile holds all pairs of an
expert, so that its weight is read once, in whole runs, straight to the tensor cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.kernels.layout import Groups
from mobie.kernels.triton_ops.common import check_activation, check_tensor, multiply, on_device
from mobie.kernels.tuning import LEAST_TOKENS, default_table, grouped_sizes, shape_class

if TYPE_CHECKING:
    from mobie.kernels.budget import Variant


@triton.jit
def _dense_grouped(
    weight,
    x,
    tile_expert,
    tile_pairs,
    out,
    rows,
    columns,
    pairs_per_row,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) // row_blocks  # one axis for both: the others of a grid end at 65535
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
        pair = tl.load(tile_pairs + tile * TOKENS + tl.arange(0, TOKENS))
        used = pair >= 0
        lane = tl.arange(0, BLOCK_K)
        weight_rows = weight + expert.to(tl.int64) * rows * columns + row[:, None] * columns
        x_rows = x + (tl.where(used, pair, 0) // pairs_per_row).to(tl.int64)[None, :] * columns
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        for start in range(0, columns, BLOCK_K):
            column = start + lane
            known = column < columns
            w = tl.load(weight_rows + column[None, :], mask=(row < rows)[:, None] & known[None, :], other=0.0)
            values = tl.load(x_rows + column[:, None], mask=used[None, :] & known[:, None], other=0.0)
            total = multiply(w, values, total)
        place = pair.to(tl.int64)[None, :] * rows + row[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=used[None, :] & (row < rows)[:, None])


def dense_grouped(weight: Tensor, x: Tensor, groups: Groups, *, pairs: int, pairs_per_row: int) -> Tensor:
    """`out[p] = weight[expert of p] @ x[p // pairs_per_row]`, summed in float32.

    Args:
        weight: `(E, rows, K)` in the dtype of `x`.
        x: `(N, K)` float16 or bfloat16.
        groups: the pairs of each expert; every pair in one tile.

    Returns:
        `(pairs, rows)` in the dtype of `x`.

    Raises:
        UnsupportedError, ValueError: see `common`.
    """
    x = check_activation("dense_grouped", "x", x, 2)
    experts, rows = weight.shape[:2]
    check_tensor("dense_grouped", "weight", weight, x, (experts, rows, x.shape[1]), (x.dtype,))
    tiles, tokens = groups.tile_pairs.shape
    check_groups("dense_grouped", groups, x, pairs, pairs_per_row)
    out = torch.empty(pairs, rows, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    size = grouped_sizes("dense_grouped", shape_class("16bit", tokens), x.device, rows=rows, copies=tiles)
    with on_device(x):
        _dense_grouped[(triton.cdiv(rows, size.rows) * tiles,)](
            weight,
            x,
            groups.tile_expert,
            groups.tile_pairs,
            out,
            rows,
            x.shape[1],
            pairs_per_row,
            ROWS=size.rows,
            TOKENS=tokens,
            BLOCK_K=size.block_k,
            num_warps=size.warps,
            num_stages=size.stages,
        )
    return out


def check_groups(operation: str, groups: Groups, x: Tensor, pairs: int, pairs_per_row: int) -> None:
    """Raises ValueError where groups are of another device, or pairs would read past the rows of `x`."""
    tiles, tile = groups.tile_pairs.shape
    check_tensor(operation, "tile_expert", groups.tile_expert, x, (tiles,), (torch.int32,))
    check_tensor(operation, "tile_pairs", groups.tile_pairs, x, tuple(groups.tile_pairs.shape), (torch.int32,))
    if tile < LEAST_TOKENS or tile & (tile - 1):
        raise ValueError(f"{operation}: tiles of {tile} pairs, expected a power of two from {LEAST_TOKENS} on")
    if pairs != len(x) * pairs_per_row:
        raise ValueError(
            f"{operation}: {pairs} pairs of {pairs_per_row} per row, but x has {len(x)} rows; expected "
            f"{len(x) * pairs_per_row} pairs"
        )


def variants() -> list[Variant]:
    """Decoding, for the budget of compiled code."""
    from mobie.kernels.budget import Variant

    pointers = {"weight": "*bf16", "x": "*bf16", "tile_expert": "*i32", "tile_pairs": "*i32", "out": "*bf16"}
    sizes = {"rows": "i32", "columns": "i32", "pairs_per_row": "i32"}
    tile = 16
    size = default_table().sizes["dense_grouped", shape_class("16bit", tile)]
    return [
        Variant(
            name="dense_grouped-16",
            kernel=_dense_grouped,
            signature=pointers | sizes,
            constants={"ROWS": size.rows, "TOKENS": tile, "BLOCK_K": size.block_k},
            warps=size.warps,
            stages=size.stages,
            weights_per_iteration=size.rows * size.block_k,
            divisible=("rows", "columns"),
        )
    ]
