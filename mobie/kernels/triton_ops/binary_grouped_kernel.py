"""The kernel of `binary_grouped`: products of binary matrices with the pairs (token, expert) of a layer.

    y[p, part, row] = Σ_c row_scale[row, block(c)] · sign[row, c] · column_scale[c] · x[c]      plain: every column
                    + the same over the salient columns, with their own signs and scales         extra

A program makes ROWS × TILE outputs of one expert. Signs become operands of the tensor cores in registers:

16-bit activations: a word holds the signs of 32 columns. In `word << s`, bits 15 and 31 are the signs of two 16-bit
floats. Exclusive or with the negative row scale, held twice, makes two weights by two instructions:

    word << s                       column 31-s ...  column 15-s ...      16 bits each
    & 0x80008000                    s000000000000000 s000000000000000
    ^ -scale, -scale                ±scale           ±scale               + where the stored bit is 1

so x is read in the order 0 16 1 17 … 15 31 of every 32 columns. bfloat16 cannot hold a float16 scale: there the signs
are ±1, and the scale multiplies the float32 sum of a block.

int8 activations: in `word << s`, bits 7, 15, 23 and 31, exclusive or 0x40, are four bytes: -64 where the stored bit is
1 and 64 where it is 0. That is two instructions for four weights. x is quantized here, in groups of 128 columns, since
the expert's column scale comes first. The extra segment has 16-bit activations always: its row scale changes from one
column to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mobie.kernels.triton_ops.common import INTERPRETED, ROUNDER, multiply

GROUP = tl.constexpr(128)  # columns of one step: four words of signs; one group of int8 activations
SIGN_PAIR = tl.constexpr(-0x7FFF8000)  # 0x80008000 as int32
SIGN_BYTES = tl.constexpr(-0x7F7F7F80)  # 0x80808080
SMALLEST = tl.constexpr(1e-30)  # 127 divided by less than this could be infinite; such a group counts for nothing
MINUS_ONE_BFLOAT16 = -0x407F4080  # 0xbf80bf80: the argument `flip` for bfloat16
BYTES_OF_64 = 0x40404040  # the argument `flip` for int8 activations


@triton.jit
def _negative_pair(scale):
    """float16 or bfloat16 scale → int32 with -scale in both halves."""
    return ((scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001) ^ SIGN_PAIR


@triton.jit
def _signed(words, negative_pair, dtype: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """words (ROWS, WORDS) → weights (ROWS, 32·WORDS); negative_pair broadcasts to (ROWS, WORDS, 16)."""
    shift = 15 - tl.arange(0, 16)
    pair = ((words[:, :, None] << shift[None, None, :]) & SIGN_PAIR) ^ negative_pair
    weights = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))  # both halves of a register: costs nothing
    return tl.reshape(weights, (ROWS, 32 * WORDS)).to(dtype, bitcast=True)


@triton.jit
def _signed_bytes(words, flip, ROWS: tl.constexpr):
    """words (ROWS, 4) → (ROWS, 128) int8: -64 for the sign +, 64 for -; columns of a word: 0 8 16 24 1 9 …"""
    shift = 7 - tl.arange(0, 8)
    four = ((words[:, :, None] << shift[None, None, :]) & SIGN_BYTES) ^ flip
    even = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
    odd = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (ROWS, GROUP))


@triton.jit
def _once(x):
    """x itself, between its reshape and its product.

    Before Hopper the compiler would fold x again in every warp; it does not move work across assembly. And Triton 3.6
    fails where a product's operand in shared memory comes straight from a reshape of 32 columns.
    """
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _integer_product(weights, activations):
    """int8 (ROWS, K) @ (K, TILE) → int32. The interpreter multiplies in the operands' own type."""
    if INTERPRETED:
        return tl.dot(weights.to(tl.float32), activations.to(tl.float32), input_precision="ieee").to(tl.int32)
    return tl.dot(weights, activations, out_dtype=tl.int32)


@triton.jit
def _fetch_rows(words_at, row_scale_at, row_valid, step, GROUPS_PER_BLOCK: tl.constexpr):
    """Words (ROWS, 4) and row scales (ROWS,) of a step."""
    word = step * 4 + tl.arange(0, 4)
    words = tl.load(words_at[:, None] + word[None, :], mask=row_valid[:, None], other=0)
    if GROUPS_PER_BLOCK == 0:
        return words, tl.load(row_scale_at, mask=row_valid, other=0.0)
    return words, tl.load(row_scale_at + step // GROUPS_PER_BLOCK, mask=row_valid, other=0.0)


@triton.jit
def _fetch_x(x_at, column_scale_at, pair_valid, column, columns, WHOLE: tl.constexpr):
    """x (TILE, n) and column scales (1, n) at `column` (n,); x is 0 for spare pairs and beyond the last column."""
    column_scale = tl.load(column_scale_at + column)[None, :]
    if WHOLE:
        return tl.load(x_at[:, None] + column[None, :], mask=pair_valid[:, None], other=0.0), column_scale
    inside = pair_valid[:, None] & (column[None, :] < columns)
    return tl.load(x_at[:, None] + column[None, :], mask=inside, other=0.0), column_scale


@triton.jit
def _fetch_halves(x_at, column_scale_at, pair_valid, step, columns, WHOLE: tl.constexpr):
    """The lower and the upper 16 columns of every word of a step, each (TILE, 64), with their column scales."""
    place = tl.arange(0, 64)
    column = step * GROUP + place // 16 * 32 + place % 16
    return (
        _fetch_x(x_at, column_scale_at, pair_valid, column, columns, WHOLE),
        _fetch_x(x_at, column_scale_at, pair_valid, column + 16, columns, WHOLE),
    )


@triton.jit
def _fetch_quarters(x_at, column_scale_at, pair_valid, step, columns, WHOLE: tl.constexpr):
    """The columns of bytes 0, 1, 2 and 3 of every word of a step, each (TILE, 32), with their column scales."""
    place = tl.arange(0, 32)
    column = step * GROUP + place // 8 * 32 + place % 8
    return (
        _fetch_x(x_at, column_scale_at, pair_valid, column, columns, WHOLE),
        _fetch_x(x_at, column_scale_at, pair_valid, column + 8, columns, WHOLE),
        _fetch_x(x_at, column_scale_at, pair_valid, column + 16, columns, WHOLE),
        _fetch_x(x_at, column_scale_at, pair_valid, column + 24, columns, WHOLE),
    )


@triton.jit
def _folded(x_and_scale):
    """x · column scale, rounded once, to x's dtype."""
    x, column_scale = x_and_scale
    if x.dtype == tl.float16:
        return x * column_scale
    return (x.to(tl.float32) * column_scale.to(tl.float32)).to(x.dtype)


@triton.jit
def _folded_exactly(x_and_scale):
    """x · column scale in float32."""
    x, column_scale = x_and_scale
    return x.to(tl.float32) * column_scale.to(tl.float32)


@triton.jit
def _step_16bit(
    accumulator, rows, halves, flip, GROUPS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Add the 128 columns of a step; one scale per row (GROUPS_PER_BLOCK 0) is left to the end for bfloat16."""
    words, scale = rows
    low, high = halves
    x = tl.trans(_once(tl.reshape(tl.join(_folded(low), _folded(high)), (TILE, GROUP))))
    if x.dtype == tl.float16:
        return multiply(_signed(words, _negative_pair(scale)[:, None, None], x.dtype, ROWS, 4), x, accumulator)
    weights = _signed(words, flip, x.dtype, ROWS, 4)
    if GROUPS_PER_BLOCK == 0:
        return multiply(weights, x, accumulator)
    return accumulator + multiply(weights, x, tl.zeros((ROWS, TILE), tl.float32)) * scale.to(tl.float32)[:, None]


@triton.jit
def _code(x, inverse):
    """Nearest integer to x · inverse, ties to even, as int8: the low byte of a float32 near 1.5 · 2^23."""
    return tl.fma(x, inverse, ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _step_int8(
    accumulator, rows, quarters, flip, GROUPS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Add the 128 columns of a step, x rounded to int8; one scale per row (GROUPS_PER_BLOCK 0) is left to the end."""
    words, scale = rows
    first, second, third, fourth = quarters
    first, second = _folded_exactly(first), _folded_exactly(second)
    third, fourth = _folded_exactly(third), _folded_exactly(fourth)
    largest = tl.maximum(tl.maximum(tl.abs(first), tl.abs(second)), tl.maximum(tl.abs(third), tl.abs(fourth)))
    largest = tl.max(largest, axis=1)  # (TILE,)
    inverse = (127.0 / tl.maximum(largest, SMALLEST))[:, None]
    even = tl.join(_code(first, inverse), _code(third, inverse))
    odd = tl.join(_code(second, inverse), _code(fourth, inverse))
    codes = tl.trans(tl.reshape(tl.join(even, odd), (TILE, GROUP)))
    product = _integer_product(_signed_bytes(words, flip, ROWS), codes).to(tl.float32)
    x_scale = (largest * (-1.0 / (127.0 * 64.0)))[None, :]  # the bytes are -64 where the sign is +
    if GROUPS_PER_BLOCK == 0:
        return accumulator + product * x_scale
    return accumulator + product * (x_scale * scale.to(tl.float32)[:, None])


@triton.jit
def _plain(
    words_at,
    row_scale_at,
    column_scale_at,
    x_at,
    row_valid,
    pair_valid,
    columns,
    steps,
    flip,
    INT8: tl.constexpr,
    GROUPS_PER_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The plain segment, 128 columns a step."""
    accumulator = tl.zeros((ROWS, TILE), tl.float32)
    for step in range(steps):
        rows = _fetch_rows(words_at, row_scale_at, row_valid, step, GROUPS_PER_BLOCK)
        if INT8:
            quarters = _fetch_quarters(x_at, column_scale_at, pair_valid, step, columns, WHOLE)
            accumulator = _step_int8(accumulator, rows, quarters, flip, GROUPS_PER_BLOCK, ROWS, TILE)
        else:
            halves = _fetch_halves(x_at, column_scale_at, pair_valid, step, columns, WHOLE)
            accumulator = _step_16bit(accumulator, rows, halves, flip, GROUPS_PER_BLOCK, ROWS, TILE)
    if GROUPS_PER_BLOCK == 0 and (INT8 or x_at.dtype.element_ty != tl.float16):
        accumulator *= tl.load(row_scale_at, mask=row_valid, other=0.0).to(tl.float32)[:, None]
    return accumulator


@triton.jit
def _extra_half(
    row_scale_at, column_scale_at, columns_at, x_at, row_valid, pair_valid, place, GROUPS_PER_BLOCK: tl.constexpr
):
    """Of the salient columns at `place` (n,): x (TILE, n) times their column scales, and the bits of their row scales.

    The row scales are (ROWS, n), or (ROWS, 1) where a row has one.
    """
    column = tl.load(columns_at + place)
    x = tl.load(x_at[:, None] + column[None, :], mask=pair_valid[:, None], other=0.0)
    x = _folded((x, tl.load(column_scale_at + place)[None, :]))
    if GROUPS_PER_BLOCK == 0:
        scale_at = row_scale_at[:, None]
    else:
        scale_at = row_scale_at[:, None] + (column // (GROUPS_PER_BLOCK * GROUP))[None, :]
    row_scale = tl.load(scale_at, mask=row_valid[:, None], other=0.0)
    return x, row_scale.to(x.dtype).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _extra(
    accumulator,
    words_at,
    row_scale_at,
    column_scale_at,
    columns_at,
    x_at,
    row_valid,
    pair_valid,
    places,
    GROUPS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The salient columns, 32 places a step, in 16 bits. Their row scales are the operands' magnitudes."""
    dtype: tl.constexpr = x_at.dtype.element_ty
    for word in range(places // 32):
        place = word * 32 + tl.arange(0, 16)
        low, low_scale = _extra_half(
            row_scale_at, column_scale_at, columns_at, x_at, row_valid, pair_valid, place, GROUPS_PER_BLOCK
        )
        high, high_scale = _extra_half(
            row_scale_at, column_scale_at, columns_at, x_at, row_valid, pair_valid, place + 16, GROUPS_PER_BLOCK
        )
        x = tl.trans(_once(tl.reshape(tl.join(low, high), (TILE, 32))))
        words = tl.load(words_at + word, mask=row_valid, other=0)
        negative_pair = ((low_scale & 0xFFFF) | (high_scale << 16)) ^ SIGN_PAIR
        weights = _signed(words[:, None], negative_pair[:, None, :], dtype, ROWS, 1)
        accumulator = multiply(weights, x, accumulator)
    return accumulator


@triton.jit
def binary_grouped_kernel(
    words,
    row_scale,
    column_scale,
    extra_words,
    extra_columns,
    extra_row_scale,
    extra_column_scale,
    x,
    tile_expert,
    tile_pairs,
    out,
    rows,
    columns,
    steps,
    blocks,
    places,
    x_row_stride,
    x_part_stride,
    flip,
    PAIRS_PER_ROW: tl.constexpr,
    GROUPS_PER_BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    WHOLE: tl.constexpr,
    EXTRA: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (i, part, tile) writes rows i·ROWS … of one part for the pairs of one tile; steps: 128 columns each.

    words and extra_words: the signs as int32. places: extra columns. flip: the constant of `_signed` for bfloat16 or of
    `_signed_bytes`. GROUPS_PER_BLOCK: 128-column groups per row scale, 0 for one scale per row. WHOLE: `columns` is a
    multiple of 128.
    """
    flip |= rows >> 31  # adds nothing; keeps the constant in a register, where one instruction takes it with a mask
    tile = tl.program_id(2)
    expert = tl.load(tile_expert + tile)
    if expert < 0:  # a spare tile
        return
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    bank = expert.to(tl.int64) * parts + part
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_valid = row < rows
    pair = tl.load(tile_pairs + tile * TILE + tl.arange(0, TILE))
    pair_valid = pair >= 0
    x_at = x + tl.where(pair_valid, pair // PAIRS_PER_ROW, 0).to(tl.int64) * x_row_stride + part * x_part_stride
    bank_row = bank * rows + row
    words_at = words + bank_row * (steps * 4)
    column_scale_at = column_scale + bank * (steps * GROUP)
    row_scale_at = row_scale + bank_row * blocks
    accumulator = _plain(
        words_at,
        row_scale_at,
        column_scale_at,
        x_at,
        row_valid,
        pair_valid,
        columns,
        steps,
        flip,
        INT8,
        GROUPS_PER_BLOCK,
        WHOLE,
        ROWS,
        TILE,
    )
    if EXTRA:
        accumulator = _extra(
            accumulator,
            extra_words + bank_row * (places // 32),
            extra_row_scale + bank_row * blocks,
            extra_column_scale + bank * places,
            extra_columns + bank * places,
            x_at,
            row_valid,
            pair_valid,
            places,
            GROUPS_PER_BLOCK,
            ROWS,
            TILE,
        )
    out_at = out + pair.to(tl.int64)[None, :] * (parts * rows) + (part * rows + row)[:, None]
    tl.store(out_at, accumulator.to(out.dtype.element_ty), mask=row_valid[:, None] & pair_valid[None, :])
