"""Grouped product of binary matrices with the pairs (token, expert) of a layer: decode and prefill, one launch.

What the kernel does is told in `binary_grouped_kernel`; here its inputs are checked and its sizes chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from mobie.errors import UnsupportedError
from mobie.kernels.layout import BinaryBank, Groups
from mobie.kernels.triton_ops.binary_grouped_kernel import (
    BYTES_OF_64,
    GROUP,
    MINUS_ONE_BFLOAT16,
    binary_grouped_kernel,
)
from mobie.kernels.triton_ops.common import check_activation, check_activations, check_tensor, on_device
from mobie.kernels.tuning import Sizes, default_table, grouped_sizes, shape_class

if TYPE_CHECKING:
    from mobie.kernels.budget import Variant

OPERATION = "binary_grouped"
BYTES_PER_STEP = 16
MOST_TILES = 65535  # programs along the third axis of a CUDA grid


def binary_grouped(
    bank: BinaryBank,
    x: Tensor,
    groups: Groups,
    *,
    pairs: int,
    pairs_per_row: int,
    activations: str = "16bit",
) -> Tensor:
    """Every pair's row of x times the matrices of the pair's expert.

    Args:
        x: `(N, columns)`, or `(N, parts, columns)` where every part has its own; pair p reads row `p // pairs_per_row`.
        pairs: number of pairs, all of which `groups` holds.
        activations: "16bit" or "int8", which rounds x times the column scales of the plain segment.

    Returns:
        `(pairs, parts, rows)` in the dtype of x.

    Raises:
        UnsupportedError: a dtype, device or size that the kernel does not take.
        ValueError: shapes that do not belong together.
    """
    x = check_activation(OPERATION, "x", x, x.dim() if x.dim() in (2, 3) else 2)
    check_activations(OPERATION, activations)
    _check_bank(bank, x)
    _check_groups(groups, x, pairs, pairs_per_row)
    tiles, tile = groups.tile_pairs.shape
    shape = shape_class(activations, tile)
    sizes = grouped_sizes(OPERATION, shape, x.device, rows=bank.rows, copies=bank.parts * tiles)
    out = x.new_empty(pairs, bank.parts, bank.rows)
    if out.numel():
        _launch(bank, x, groups, out, pairs_per_row, activations == "int8", sizes)
    return out


def _launch(
    bank: BinaryBank, x: Tensor, groups: Groups, out: Tensor, pairs_per_row: int, int8: bool, sizes: Sizes
) -> None:
    """Write `out (pairs, parts, rows)`; nothing is checked."""
    tiles, tile = groups.tile_pairs.shape
    with on_device(x):
        binary_grouped_kernel[(triton.cdiv(bank.rows, sizes.rows), bank.parts, tiles)](
            bank.signs.view(torch.int32),
            bank.row_scale,
            bank.column_scale,
            bank.extra_signs.view(torch.int32) if bank.extra else bank.extra_signs,
            bank.extra_columns,
            bank.extra_row_scale,
            bank.extra_column_scale,
            x,
            groups.tile_expert,
            groups.tile_pairs,
            out,
            bank.rows,
            bank.columns,
            bank.signs.shape[-1] // BYTES_PER_STEP,
            bank.blocks,
            bank.extra,
            x.stride(0),
            x.stride(1) if x.dim() == 3 else 0,
            BYTES_OF_64 if int8 else MINUS_ONE_BFLOAT16,
            PAIRS_PER_ROW=pairs_per_row,
            GROUPS_PER_BLOCK=0 if bank.blocks == 1 else bank.block_size // GROUP.value,
            INT8=int8,
            WHOLE=bank.columns % GROUP.value == 0,
            EXTRA=bank.extra > 0,
            ROWS=sizes.rows,
            TILE=tile,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )


def _check_bank(bank: BinaryBank, x: Tensor) -> None:
    """Shapes and memory order that the kernel's address arithmetic takes for granted."""
    experts, parts, rows, width = bank.signs.shape
    blocks, extra = bank.blocks, bank.extra
    shapes = {
        "signs": (experts, parts, rows, width),
        "row_scale": (experts, parts, rows, blocks),
        "column_scale": (experts, parts, 8 * width),
        "extra_signs": (experts, parts, rows, extra // 8),
        "extra_columns": (experts, parts, extra),
        "extra_row_scale": (experts, parts, rows, blocks),
        "extra_column_scale": (experts, parts, extra),
    }
    for name, shape in shapes.items():
        dtype = {"extra_columns": torch.int32}.get(name, torch.uint8 if "signs" in name else torch.float16)
        check_tensor(OPERATION, f"bank.{name}", getattr(bank, name), x, shape, (dtype,))
    if width % 16 or extra % 32:
        raise UnsupportedError(
            f"binary_grouped: rows of {width} bytes and {extra} extra columns; expected multiples of 16 and 32"
        )
    if blocks > 1 and bank.block_size % GROUP.value:
        raise UnsupportedError(f"binary_grouped: blocks of {bank.block_size} columns; expected a multiple of 128")
    expected = (bank.columns,) if x.dim() == 2 else (parts, bank.columns)
    if tuple(x.shape[1:]) != expected:
        raise ValueError(
            f"binary_grouped: x has shape {tuple(x.shape)}, expected (rows, {', '.join(map(str, expected))})"
        )


def _check_groups(groups: Groups, x: Tensor, pairs: int, pairs_per_row: int) -> None:
    tiles, tile = groups.tile_pairs.shape
    check_tensor(OPERATION, "groups.tile_pairs", groups.tile_pairs, x, (tiles, tile), (torch.int32,))
    check_tensor(OPERATION, "groups.tile_expert", groups.tile_expert, x, (tiles,), (torch.int32,))
    if tile < 8 or tile & (tile - 1):
        raise ValueError(f"binary_grouped: tiles of {tile} pairs; expected a power of two from 8 on")
    if pairs > len(x) * pairs_per_row:
        raise ValueError(f"binary_grouped: {pairs} pairs of {pairs_per_row} per row, but x has {len(x)} rows")
    if tiles > MOST_TILES:
        raise UnsupportedError(
            f"binary_grouped: {tiles} tiles in one launch, at most {MOST_TILES}: use a larger tile or a shorter prefill"
        )


def variants() -> list[Variant]:
    """What the budget of instructions is counted on: the default sizes of every shape class, scales per 128 columns."""
    from mobie.kernels.budget import Variant

    pointers = {
        "words": "*i32",
        "row_scale": "*fp16",
        "column_scale": "*fp16",
        "extra_words": "*i32",
        "extra_columns": "*i32",
        "extra_row_scale": "*fp16",
        "extra_column_scale": "*fp16",
        "tile_expert": "*i32",
        "tile_pairs": "*i32",
    }
    integers = ("rows", "columns", "steps", "blocks", "places", "x_row_stride", "x_part_stride", "flip")
    cases = [
        (activations, tile, dtype, extra)
        for activations in ("16bit", "int8")
        for tile in (8, 16, 64)
        for dtype in ("fp16", "bf16")
        for extra in (False, True)
        if dtype == "bf16" or (activations == "16bit" and not extra)
    ]
    found = []
    for activations, tile, dtype, extra in cases:
        sizes = default_table().sizes[OPERATION, shape_class(activations, tile)]
        found.append(
            Variant(
                name=f"{OPERATION} {activations} {dtype} tile {tile}{' extra' if extra else ''}",
                kernel=binary_grouped_kernel,
                signature=pointers | {"x": f"*{dtype}", "out": f"*{dtype}"} | dict.fromkeys(integers, "i32"),
                constants={
                    "PAIRS_PER_ROW": 8,
                    "GROUPS_PER_BLOCK": 1,
                    "INT8": activations == "int8",
                    "WHOLE": True,
                    "EXTRA": extra,
                    "ROWS": sizes.rows,
                    "TILE": tile,
                },
                warps=sizes.warps,
                stages=sizes.stages,
                weights_per_iteration=sizes.rows * GROUP.value,
                divisible=("rows", "columns", "x_row_stride", "x_part_stride"),
                extra_weights_per_iteration=sizes.rows * 32 if extra else None,
            )
        )
    return found
