"""Products with matrices that every token or pair goes through: shared bases, the int8 head, Linears.

Two kernels. In decoding the bytes of the matrix are the limit: each program has few rows, so that there are enough
programs, and its warps take different columns, their sums joined at the end. For many tokens each program has a
square tile. Both know the parts' codes as int8 or 16 bits, turn them into the 16-bit type of the activations (exact for
int8) or multiply int8 by int8, and end in the same epilogue:

    v = scale · product + bias                                per part
    v = silu(v of part 0) · v of part 1 · pair weight         where asked for
    v + residual                                              rounded once
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.kernels.layout import Panel
from mobie.kernels.triton_ops.common import (
    ACTIVATION_GROUP,
    as_kind,
    check_activation,
    check_activations,
    check_tensor,
    multiply,
    multiply_int8,
    on_device,
    power_of_two,
    silu,
)
from mobie.kernels.triton_ops.quantize_activations import quantize_activations
from mobie.kernels.triton_ops.swiglu import check_count, sum_consecutive
from mobie.kernels.tuning import DECODE_TOKENS, default_table, few_or_many, fit_tokens, sizes_for

if TYPE_CHECKING:
    from mobie.kernels.budget import Variant

#: with more rows of x than this to be summed, a launch of its own sums them once for all programs
SUM_IN_PRODUCT = 16
#: rows from which there are programs enough for any GPU
TALL = 16384
EPILOGUES = ("none", "swiglu")
#: arguments of both kernels that are integers
SIZES = ("tokens", "rows", "columns", "codes_stride", "scale_stride", "x_stride", "x_part_stride")


@triton.jit
def _finish(
    product,
    part,
    row,
    token,
    scale,
    scale_stride,
    bias,
    rows,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Scale and bias of the rows; `part` a scalar, or one per leading index of `product (parts, rows, tokens)`."""
    if SCALED:
        factor = tl.load(scale + part * scale_stride + row, mask=row < rows, other=0.0)
        product *= factor.to(tl.float32)
    if BIASED:
        product += tl.load(bias + part * rows + row, mask=row < rows, other=0.0).to(tl.float32)
    return product


@triton.jit
def _gate(gate, up, token, tokens, pair_weights, WEIGHTED: tl.constexpr):
    """SwiGLU of `(rows, tokens)`."""
    value = silu(gate) * up
    if WEIGHTED:
        value *= tl.load(pair_weights + token, mask=token < tokens, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _store(value, out, residual, place, inside, ADD: tl.constexpr):
    if ADD:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _panel_few(
    codes,
    x,
    x_scale,
    scale,
    bias,
    pair_weights,
    residual,
    out,
    tokens,
    rows,
    columns,
    codes_stride,
    scale_stride,
    x_stride,
    x_part_stride,
    PARTS: tl.constexpr,
    REDUCE: tl.constexpr,
    SLOTS: tl.constexpr,
    INT8: tl.constexpr,
    SWIGLU: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All parts of ROWS rows for TOKENS tokens; leading index of the products: part · SLICES + slice of the columns.

    A sum over REDUCE rows of x is the sum of their products: every row has a place of its own among TOKENS · SLOTS,
    which the tensor cores pad to 8 or 16 anyway, and the results are added in float32. x is not rounded in between.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    lead = tl.arange(0, PARTS * SLICES)
    part = (lead // SLICES)[:, None, None]
    piece = (lead % SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (lead, k)
    place = tl.program_id(0) * TOKENS * SLOTS + tl.arange(0, TOKENS * SLOTS)
    line = (place // SLOTS * REDUCE + place % SLOTS).to(tl.int64)[None, None, :]  # row of x
    known_line = ((place // SLOTS < tokens) & (place % SLOTS < REDUCE))[None, None, :]
    code_rows = codes + part.to(tl.int64) * codes_stride + row.to(tl.int64)[None, :, None] * columns
    x_rows = x + line * x_stride + part * x_part_stride
    known_row = (row < rows)[None, :, None]
    total = tl.zeros((PARTS * SLICES, ROWS, TOKENS * SLOTS), tl.float32)
    if INT8:
        groups = (columns + ACTIVATION_GROUP - 1) // ACTIVATION_GROUP
        scale_rows = x_scale + (line * PARTS + part) * groups
    for start in range(0, columns, SLICES * BLOCK_K):
        column = start + piece
        known = column < columns
        w = tl.load(code_rows + column[:, None, :], mask=known_row & known[:, None, :], other=0)
        values = tl.load(x_rows + column[:, :, None], mask=known_line & known[:, :, None], other=0)
        if INT8:
            group = start // ACTIVATION_GROUP + (lead % SLICES)[:, None, None]
            step = tl.load(scale_rows + group, mask=known_line & (group < groups), other=0.0)
            total += multiply_int8(w, values).to(tl.float32) * step
        else:
            total = multiply(as_kind(w, x.dtype.element_ty), values, total)
    joined = tl.reshape(total, (PARTS, SLICES, ROWS, TOKENS, SLOTS))
    result = tl.sum(tl.sum(joined, axis=4), axis=1)
    known_token = (token < tokens)[None, None, :]
    each = tl.arange(0, PARTS)[:, None, None]
    result = _finish(result, each, row[None, :, None], token, scale, scale_stride, bias, rows, SCALED, BIASED)
    if SWIGLU:
        gate = tl.sum(tl.where(each == 0, result, 0.0), axis=0)
        up = tl.sum(tl.where(each == 1, result, 0.0), axis=0)
        inside = (row < rows)[:, None] & (token < tokens)[None, :]
        place = token.to(tl.int64)[None, :] * rows + row[:, None]
        _store(_gate(gate, up, token, tokens, pair_weights, WEIGHTED), out, residual, place, inside, ADD)
    else:
        place = (token.to(tl.int64)[None, None, :] * PARTS + each) * rows + row[None, :, None]
        _store(result, out, residual, place, known_row & known_token, ADD)


@triton.jit
def _panel_tile(
    codes,
    x,
    x_scale,
    part,
    row,
    token,
    tokens,
    rows,
    columns,
    codes_stride,
    x_stride,
    x_part_stride,
    parts,
    kind: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Product `(rows, tokens)` of one part over all columns."""
    lane = tl.arange(0, BLOCK_K)
    code_rows = codes + part.to(tl.int64) * codes_stride + row.to(tl.int64)[:, None] * columns
    x_rows = x + token.to(tl.int64)[None, :] * x_stride + part * x_part_stride
    if INT8:
        groups = (columns + ACTIVATION_GROUP - 1) // ACTIVATION_GROUP
        scale_rows = x_scale + (token.to(tl.int64) * parts + part) * groups
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, columns, BLOCK_K):
        column = start + lane
        known = column < columns
        w = tl.load(code_rows + column[None, :], mask=(row < rows)[:, None] & known[None, :], other=0)
        values = tl.load(x_rows + column[:, None], mask=(token < tokens)[None, :] & known[:, None], other=0)
        if INT8:
            step = tl.load(scale_rows + start // ACTIVATION_GROUP, mask=token < tokens, other=0.0)
            total += multiply_int8(w, values).to(tl.float32) * step[None, :]
        else:
            total = multiply(as_kind(w, kind), values, total)
    return total


@triton.jit
def _panel_many(
    codes,
    x,
    x_scale,
    scale,
    bias,
    pair_weights,
    residual,
    out,
    tokens,
    rows,
    columns,
    codes_stride,
    scale_stride,
    x_stride,
    x_part_stride,
    PARTS: tl.constexpr,
    INT8: tl.constexpr,
    SWIGLU: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ROWS rows for TOKENS tokens, of both parts for SwiGLU, else of one part per program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(2)
    kind: tl.constexpr = out.dtype.element_ty
    value = _panel_tile(
        codes, x, x_scale, part, row, token, tokens, rows, columns, codes_stride, x_stride, x_part_stride, PARTS,
        kind, INT8, ROWS, TOKENS, BLOCK_K,
    )  # fmt: skip
    value = _finish(value, part, row[:, None], token, scale, scale_stride, bias, rows, SCALED, BIASED)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    if SWIGLU:
        second = part + 1
        up = _panel_tile(
            codes, x, x_scale, second, row, token, tokens, rows, columns, codes_stride, x_stride, x_part_stride, PARTS,
            kind, INT8, ROWS, TOKENS, BLOCK_K,
        )  # fmt: skip
        up = _finish(up, second, row[:, None], token, scale, scale_stride, bias, rows, SCALED, BIASED)
        value = _gate(value, up, token, tokens, pair_weights, WEIGHTED)
        place = token.to(tl.int64)[None, :] * rows + row[:, None]
    else:
        place = (token.to(tl.int64)[None, :] * PARTS + part) * rows + row[:, None]
    _store(value, out, residual, place, inside, ADD)


def panel(
    panel: Panel,
    x: Tensor,
    *,
    reduce: int = 1,
    epilogue: str = "none",
    pair_weights: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    activations: str = "16bit",
) -> Tensor:
    """Rows of x times the panel's matrices, each part its own; see the head of this file.

    Args:
        x: `(N·reduce, parts, K)` float16 or bfloat16, parts may be an expanded dimension; the sum of `reduce`
            consecutive rows, in float32, is what is multiplied (many rows: rounded to the dtype of x before that).
        epilogue: "none", or "swiglu" for two parts.
        pair_weights: `(N,)`, for "swiglu".
        residual: in the shape and dtype of what comes back.
        bias: `(parts·rows,)`.
        activations: "int8" rounds x in groups of 128 columns, where the panel is int8 itself; else it is ignored.

    Returns:
        `(N, parts, rows)`, or `(N, rows)` after "swiglu", in the dtype of x.

    Raises:
        UnsupportedError, ValueError: see `common`.
    """
    x = _check(panel, x, reduce, epilogue, activations)
    parts, rows, columns = panel.codes.shape
    count = len(x) // reduce
    swiglu = epilogue == "swiglu"
    out = torch.empty((count, rows) if swiglu else (count, parts, rows), dtype=x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    check_tensor("panel", "residual", residual, x, tuple(out.shape), (x.dtype,))
    check_tensor("panel", "pair_weights", pair_weights, x, (count,))
    check_tensor("panel", "bias", bias, x, (parts * rows,))
    if not out.numel():
        return out
    int8 = activations == "int8" and panel.codes.dtype == torch.int8
    few = count <= DECODE_TOKENS
    x_scale = None
    if int8:
        (x, x_scale), reduce = quantize_activations(x, reduce), 1
    elif reduce > 1 and (not few or len(x) > SUM_IN_PRODUCT):
        x, reduce = sum_consecutive(x.reshape(len(x), -1), reduce, x.dtype).view(count, parts, columns), 1
    tile = fit_tokens(sizes_for("panel", _shape_class(panel, count, int8), x.device), count)
    slots = power_of_two(reduce)
    tokens = max(1, tile.tokens // slots) if few else tile.tokens
    arguments = (panel.codes, x, x_scale, panel.scale, bias, pair_weights, residual, out, count, rows, columns)
    strides = (panel.codes.stride(0), 0 if panel.scale is None else panel.scale.stride(0), x.stride(0), x.stride(1))
    flags = {
        "PARTS": parts,
        "INT8": int8,
        "SWIGLU": swiglu,
        "SCALED": panel.scale is not None,
        "BIASED": bias is not None,
        "WEIGHTED": pair_weights is not None,
        "ADD": residual is not None,
        "ROWS": tile.rows,
        "TOKENS": tokens,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    row_tiles, token_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(count, tokens)
    with on_device(out):
        if few:
            slices = max(1, tile.slices // parts)
            grid = (token_tiles, row_tiles)  # programs that read the same rows of the matrix run side by side
            _panel_few[grid](*arguments, *strides, REDUCE=reduce, SLOTS=slots, SLICES=slices, **flags)
        else:
            _panel_many[(row_tiles, token_tiles, 1 if swiglu else parts)](*arguments, *strides, **flags)
    return out


def _shape_class(panel: Panel, count: int, int8: bool) -> str:
    """Shape class for `count` tokens."""
    if panel.codes.shape[1] >= TALL and count <= DECODE_TOKENS:
        return "tall-int8" if panel.codes.dtype == torch.int8 else "tall-16bit"
    return f"{'int8' if int8 else '16bit'}-{few_or_many(count)}"


def _check(panel: Panel, x: Tensor, reduce: int, epilogue: str, activations: str) -> Tensor:
    """x with a contiguous last dimension, after all that can be wrong with it or the panel."""
    codes = panel.codes
    check_activations("panel", activations)
    if epilogue not in EPILOGUES:
        raise ValueError(f"panel: epilogue is {epilogue!r}, expected one of {', '.join(EPILOGUES)}")
    check_activation("panel", "x", x[:0], 3)
    check_count("panel", x, reduce)
    parts, _, columns = codes.shape
    if tuple(x.shape[1:]) != (parts, columns):
        raise ValueError(f"panel: x has shape {tuple(x.shape)}, expected (N, {parts}, {columns}) as the panel's codes")
    if parts not in (1, 2) or (epilogue == "swiglu" and parts != 2):
        raise ValueError(f"panel: {parts} parts with epilogue {epilogue!r}; expected 2, or 1 or 2 without one")
    check_tensor("panel", "codes", codes[0], x, tuple(codes.shape[1:]), (torch.int8, torch.float16, torch.bfloat16))
    if panel.scale is not None:
        check_tensor("panel", "scale", panel.scale[0], x, (codes.shape[1],), (torch.float16, torch.float32))
    return x if x.stride(2) == 1 else x.contiguous()


def variants() -> list[Variant]:
    """A shared basis of gate and up in decoding and in prefill, for the budget of compiled code."""
    from mobie.kernels.budget import Variant

    pointers = {"codes": "*i8", "x": "*bf16", "scale": "*fp16", "pair_weights": "*fp32", "out": "*bf16"}
    sizes = dict.fromkeys(SIZES, "i32")
    absent = dict.fromkeys(("x_scale", "bias", "residual"))
    flags = {"INT8": False, "SWIGLU": True, "SCALED": True, "BIASED": False, "WEIGHTED": True, "ADD": False, "PARTS": 2}
    found = []
    for kernel, tokens in ((_panel_few, 8), (_panel_many, DECODE_TOKENS + 1)):
        tile = fit_tokens(default_table().sizes["panel", f"16bit-{few_or_many(tokens)}"], tokens)
        few = {"REDUCE": 1, "SLOTS": 1, "SLICES": max(1, tile.slices // 2)} if kernel is _panel_few else {}
        tiling = {"ROWS": tile.rows, "TOKENS": tile.tokens, "BLOCK_K": tile.block_k}
        found.append(
            Variant(
                name=f"panel-{'few' if few else 'many'}",
                kernel=kernel,
                signature=pointers | sizes,
                constants=absent | flags | tiling | few,
                warps=tile.warps,
                stages=tile.stages,
                weights_per_iteration=tile.rows * tile.block_k * (2 * few["SLICES"] if few else 1),
                divisible=("rows", "columns", "codes_stride", "scale_stride", "x_stride", "x_part_stride"),
            )
        )
    return found
