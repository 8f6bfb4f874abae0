"""Linear with any stored binary matrix: groups, means, orders, salient columns replaced or added, a column factor.

Over the columns j of a run, which lie in one block b of scales (`binary_runs`), and in group g of row i or in none,

    y[i] += row_scale[k, g, i, b] · Σ_j [j in g] sign[k, i, j] · (column_scale[k, g, j] · x[j])
    y[i] += mean[g, i, b] · Σ_j [j in g] · (factor[j] · x[j])

Few tokens: one launch multiplies x by the column scales, gathered into the order of the runs and rounded to 16 bits;
the next unpacks signs to ±1 and groups to masks, two columns per instruction, in registers, where the tensor cores take
them; row scales multiply the sums of whole runs. Every warp has its own runs; their sums are joined at the end.

Many tokens: the matrix is decoded once to 16 bits for the library's own product, which then takes far longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from mobie.kernels.layout import BinaryTensors
from mobie.kernels.triton_ops.binary_runs import WORD, BinaryRuns, Runs, runs_of
from mobie.kernels.triton_ops.common import check_activation, check_tensor, multiply, on_device
from mobie.kernels.tuning import DECODE_TOKENS, default_table, fit_tokens, sizes_for

if TYPE_CHECKING:
    from mobie.kernels.budget import Variant

SIGN_PAIR = tl.constexpr(-0x7FFF8000)  # 0x80008000 as int32
MINUS_ONE_FLOAT16 = tl.constexpr(-0x43FF4400)  # 0xbc00bc00: two float16 of -1
MINUS_ONE_BFLOAT16 = tl.constexpr(-0x407F4080)  # 0xbf80bf80
LOW_BITS = tl.constexpr(0x00010001)
BLOCK = 1024  # columns of x that a program scales
SIZES = ("tokens", "rows", "width", "second_segment", "blocks")  # integer arguments of the kernel for few tokens


@triton.jit
def _scale_columns(x, columns, column_scale, out, width, places, BLOCK: tl.constexpr):
    """x of one token, gathered and scaled; program: (token, block of places)."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < places
    column = tl.load(columns + place, mask=inside, other=-1)
    value = tl.load(x + token * width + column, mask=column >= 0, other=0.0).to(tl.float32)
    value *= tl.load(column_scale + place, mask=inside, other=0.0)
    tl.store(out + token * places + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(word, minus_one: tl.constexpr):
    """Words `(slices, rows, words)` → ±1 in pairs, int32 `(slices, rows, words, 16)`."""
    shift = 15 - tl.arange(0, 16)
    return ((word[:, :, :, None] << shift[None, None, None, :]) & SIGN_PAIR) ^ minus_one


@triton.jit
def _masks(word):
    """Words `(slices, rows, words)` → all bits of a 16-bit number set where the word has a one, in pairs."""
    shift = tl.arange(0, 16)
    return ((word[:, :, :, None] >> shift[None, None, None, :]) & LOW_BITS) * 0xFFFF


@triton.jit
def _operand(pair, kind: tl.constexpr):
    """Pairs `(slices, rows, words, 16)` → 16-bit floats `(slices, rows, 32 · words)`; halves of a register, no work."""
    both = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    return tl.reshape(both, (pair.shape[0], pair.shape[1], pair.shape[2] * 32)).to(kind, bitcast=True)


@triton.jit
def _add_segment(
    total,
    scaled,
    known_token,
    row,
    rows,
    signs,
    bitmap,
    block,
    row_scale,
    mean,
    runs,
    blocks,
    ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
    MEAN: tl.constexpr,
    WORDS: tl.constexpr,
    SLICES: tl.constexpr,
    kind: tl.constexpr,
):
    """Add a segment's product to `total (slices, rows, tokens)`; `scaled`: x of each token, the segment's variants."""
    minus_one: tl.constexpr = MINUS_ONE_BFLOAT16 if kind == tl.bfloat16 else MINUS_ONE_FLOAT16
    one: tl.constexpr = minus_one ^ SIGN_PAIR
    WIDTH: tl.constexpr = 32 * WORDS
    lane = tl.arange(0, WIDTH)
    for start in range(0, runs, SLICES):
        run = start + tl.arange(0, SLICES)
        known = run < runs
        inside = known[:, None] & (row < rows)[None, :]
        here = known[:, None, None] & known_token
        x_at = scaled + (run[:, None] * WIDTH + lane[None, :])[:, :, None]
        by_row = tl.load(block + run, mask=known, other=0)[:, None] * rows + row[None, :]
        word = (run[:, None, None] * rows + row[None, :, None]) * WORDS + tl.arange(0, WORDS)[None, None, :]
        if GROUPS == 2:
            second = _masks(tl.load(bitmap + word, mask=inside[:, :, None], other=0))
        for k in tl.static_range(ORDER):
            sign = _pairs(tl.load(signs + k * runs * rows * WORDS + word, mask=inside[:, :, None], other=0), minus_one)
            for g in tl.static_range(GROUPS):
                pair = sign
                if GROUPS == 2:
                    pair = (sign & second) if g == 1 else (sign & ~second)
                x = tl.load(x_at + (k * GROUPS + g) * runs * WIDTH, mask=here, other=0.0)
                product = multiply(_operand(pair, kind), x, tl.zeros_like(total))
                scale = tl.load(row_scale + (k * GROUPS + g) * blocks * rows + by_row, mask=inside, other=0.0)
                total += product * scale.to(tl.float32)[:, :, None]
        if MEAN:
            x = tl.load(x_at + ORDER * GROUPS * runs * WIDTH, mask=here, other=0.0)
            for g in tl.static_range(GROUPS):
                offset = tl.load(mean + g * blocks * rows + by_row, mask=inside, other=0.0).to(tl.float32)
                if GROUPS == 2:
                    pair = (second & one) if g == 1 else (~second & one)
                    total += multiply(_operand(pair, kind), x, tl.zeros_like(total)) * offset[:, :, None]
                else:
                    total += tl.sum(x.to(tl.float32), axis=1)[:, None, :] * offset[:, :, None]
    return total


@triton.jit
def _binary_few(
    scaled,
    bias,
    out,
    tokens,
    rows,
    width,
    second_segment,
    blocks,
    signs0,
    bitmap0,
    block0,
    row_scale0,
    mean0,
    runs0,
    signs1,
    bitmap1,
    block1,
    row_scale1,
    mean1,
    runs1,
    ORDER0: tl.constexpr,
    GROUPS0: tl.constexpr,
    MEAN0: tl.constexpr,
    WORDS0: tl.constexpr,
    ORDER1: tl.constexpr,
    GROUPS1: tl.constexpr,
    MEAN1: tl.constexpr,
    WORDS1: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """ROWS rows for TOKENS tokens; ORDER1 is 0 where there is one segment only."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = scaled + token.to(tl.int64)[None, None, :] * width
    known_token = (token < tokens)[None, None, :]
    kind: tl.constexpr = out.dtype.element_ty
    total = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    total = _add_segment(
        total, first, known_token, row, rows, signs0, bitmap0, block0, row_scale0, mean0, runs0,
        blocks, ORDER0, GROUPS0, MEAN0, WORDS0, SLICES, kind,
    )  # fmt: skip
    if ORDER1 > 0:
        total = _add_segment(
            total, first + second_segment, known_token, row, rows, signs1, bitmap1, block1, row_scale1, mean1, runs1,
            blocks, ORDER1, GROUPS1, MEAN1, WORDS1, SLICES, kind,
        )  # fmt: skip
    value = tl.sum(total, axis=0)
    if BIASED:
        value += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(out + token.to(tl.int64)[None, :] * rows + row[:, None], value.to(kind), mask=inside)


@triton.jit
def _decode(
    out,
    rows,
    width,
    signs,
    bitmap,
    columns,
    block,
    column_scale,
    row_scale,
    mean,
    runs,
    blocks,
    ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
    MEAN: tl.constexpr,
    WORDS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Dense float32 values of one run and ROWS rows, put where they belong, or added there."""
    run = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    WIDTH: tl.constexpr = 32 * WORDS
    lane = tl.arange(0, WIDTH)
    place = run * WIDTH + lane
    column = tl.load(columns + place)
    inside = (row < rows)[:, None] & (column >= 0)[None, :]
    by_row = tl.load(block + run) * rows + row
    word = (run * rows + row[:, None]) * WORDS + (lane // 32)[None, :]
    bit = (lane % 32 // 2 + 16 * (lane % 2))[None, :]
    value = tl.zeros((ROWS, WIDTH), tl.float32)
    second = tl.zeros((ROWS, WIDTH), tl.int32)
    if GROUPS == 2:
        second = (tl.load(bitmap + word, mask=inside, other=0) >> bit) & 1
    for g in tl.static_range(GROUPS):
        own = tl.zeros((ROWS, WIDTH), tl.float32)
        for k in tl.static_range(ORDER):
            sign = ((tl.load(signs + k * runs * rows * WORDS + word, mask=inside, other=0) >> bit) & 1) * 2 - 1
            scale = tl.load(row_scale + (k * GROUPS + g) * blocks * rows + by_row, mask=row < rows, other=0.0)
            factor = tl.load(column_scale + (k * GROUPS + g) * runs * WIDTH + place)
            own += sign.to(tl.float32) * (scale.to(tl.float32)[:, None] * factor[None, :])
        if MEAN:
            offset = tl.load(mean + g * blocks * rows + by_row, mask=row < rows, other=0.0).to(tl.float32)
            own += offset[:, None] * tl.load(column_scale + ORDER * GROUPS * runs * WIDTH + place)[None, :]
        value = tl.where(second == g, own, value)
    target = out + row[:, None].to(tl.int64) * width + column[None, :]
    if ADD:
        value += tl.load(target, mask=inside, other=0.0)
    tl.store(target, value, mask=inside)


def binary_linear(matrix: BinaryTensors, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ matrix.T + bias`, summed in float32.

    Args:
        matrix: `(rows, K)`; its bits are put in order for the kernel at the first call (`binary_runs`).
        x: `(N, K)` float16 or bfloat16.
        bias: `(rows,)`.

    Returns:
        `(N, rows)` in the dtype of x.

    Raises:
        UnsupportedError, ValueError: see `common`.
    """
    x = check_activation("binary_linear", "x", x, 2)
    if x.shape[1] != matrix.columns:
        raise ValueError(f"binary_linear: x has shape {tuple(x.shape)}, expected (N, {matrix.columns})")
    check_tensor("binary_linear", "plain_columns", matrix.plain_columns, x, tuple(matrix.plain_columns.shape))
    check_tensor("binary_linear", "bias", bias, x, (matrix.rows,))
    if not len(x) or not matrix.rows:
        return x.new_empty(len(x), matrix.rows)
    if len(x) > DECODE_TOKENS:
        return linear(x, decode(matrix).to(x.dtype), None if bias is None else bias.to(x.dtype))
    runs = runs_of(matrix)
    first, second = runs.segments[0], runs.segments[1] if len(runs.segments) > 1 else None
    scaled = _scale(runs, x)
    out = x.new_empty(len(x), matrix.rows)
    tile = fit_tokens(sizes_for("binary_linear", "16bit-few", x.device), len(x))
    with on_device(x):
        _binary_few[(triton.cdiv(len(x), tile.tokens), triton.cdiv(matrix.rows, tile.rows))](
            scaled,
            bias,
            out,
            len(x),
            matrix.rows,
            scaled.shape[1],
            runs.starts[-1],
            first.row_scale.shape[2],
            *_tensors(first),
            *_tensors(second),
            **_flags(first, "0"),
            **_flags(second, "1"),
            BIASED=bias is not None,
            ROWS=tile.rows,
            TOKENS=tile.tokens,
            SLICES=tile.slices,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def decode(matrix: BinaryTensors) -> Tensor:
    """Dense values `(rows, K)` float32; the second segment is added where the first has been."""
    out = torch.zeros(matrix.rows, matrix.columns, device=matrix.plain_columns.device)
    rows_per_program = 16
    with on_device(out):
        for number, segment in enumerate(runs_of(matrix).segments):
            _decode[(len(segment.block), triton.cdiv(matrix.rows, rows_per_program))](
                out,
                matrix.rows,
                matrix.columns,
                segment.signs,
                segment.bitmap,
                segment.columns,
                segment.block,
                segment.column_scale,
                segment.row_scale,
                segment.mean,
                len(segment.block),
                segment.row_scale.shape[2],
                **_flags(segment, ""),
                ADD=number > 0,
                ROWS=rows_per_program,
            )
    return out


def _scale(runs: BinaryRuns, x: Tensor) -> Tensor:
    """x `(N, K)` in the places of all runs, times the column scales: `(N, places)`."""
    places = len(runs.columns)
    scaled = x.new_empty(len(x), places)
    with on_device(x):
        grid = (len(x), triton.cdiv(places, BLOCK))
        _scale_columns[grid](x, runs.columns, runs.column_scale, scaled, x.shape[1], places, BLOCK=BLOCK)
    return scaled


def _tensors(segment: Runs | None) -> tuple[Tensor | int | None, ...]:
    """A segment's arguments of `_binary_few`, in its order."""
    if segment is None:
        return (None, None, None, None, None, 0)
    return segment.signs, segment.bitmap, segment.block, segment.row_scale, segment.mean, len(segment.block)


def _flags(segment: Runs | None, suffix: str) -> dict[str, int | bool]:
    """What a kernel is compiled for; order 0 stands for no segment."""
    flags = {"ORDER": 0, "GROUPS": 1, "MEAN": False, "WORDS": 1}
    if segment is not None:
        mean = segment.mean is not None
        flags = {"ORDER": segment.order, "GROUPS": segment.groups, "MEAN": mean, "WORDS": segment.words}
    return {name + suffix: value for name, value in flags.items()}


def variants() -> list[Variant]:
    """MoBiE's attention (two groups, salient columns in two orders) in decoding, for the budget of compiled code."""
    from mobie.kernels.budget import Variant

    tile = fit_tokens(default_table().sizes["binary_linear", "16bit-few"], 8)
    types = {"signs": "*i32", "bitmap": "*i32", "block": "*i32", "row_scale": "*fp16", "runs": "i32"}
    signature = {"scaled": "*bf16", "out": "*bf16"} | dict.fromkeys(SIZES, "i32")
    signature |= {f"{name}{number}": kind for number in "01" for name, kind in types.items()}
    del signature["bitmap1"]
    formats = {"ORDER0": 1, "GROUPS0": 2, "WORDS0": 4, "ORDER1": 2, "GROUPS1": 1, "WORDS1": 1}
    absent = {"bias": None, "mean0": None, "mean1": None, "bitmap1": None}
    tiling = {"ROWS": tile.rows, "TOKENS": tile.tokens, "SLICES": tile.slices}
    return [
        Variant(
            name="binary_linear-two-groups",
            kernel=_binary_few,
            signature=signature,
            constants=absent | formats | tiling | {"MEAN0": False, "MEAN1": False, "BIASED": False},
            warps=tile.warps,
            stages=tile.stages,
            weights_per_iteration=tile.rows * tile.slices * formats["WORDS0"] * WORD,
            divisible=("rows", "width", "second_segment", "blocks"),
        )
    ]
