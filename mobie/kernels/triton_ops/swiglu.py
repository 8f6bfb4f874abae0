"""Elementwise parts of the experts: SwiGLU with the router's weight, and the sum over a token's experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.kernels.triton_ops.common import check_activation, check_tensor, on_device, silu

BLOCK = 1024


@triton.jit
def _swiglu(gate_up, pair_weights, out, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + 2 * pair * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * pair + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    value = silu(gate) * up
    if WEIGHTED:
        value *= tl.load(pair_weights + pair).to(tl.float32)
    tl.store(out + pair * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_pairs(x, out, rows, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(COUNT):  # in order, so that the sum does not depend on the launch
        total += tl.load(x + (token * COUNT + slot) * rows + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, pair_weights: Tensor | None = None) -> Tensor:
    """`silu(gate) · up · pair_weights`, computed in float32.

    Args:
        gate_up: `(N, 2, W)`, gate first; float16 or bfloat16.
        pair_weights: `(N,)`, the router's weight of each pair, any float dtype.

    Returns:
        `(N, W)` in the dtype of `gate_up`.

    Raises:
        UnsupportedError, ValueError: see `common`.
    """
    gate_up = check_activation("swiglu", "gate_up", gate_up, 3)
    pairs, parts, width = gate_up.shape
    if parts != 2:
        raise ValueError(f"swiglu: gate_up has shape {tuple(gate_up.shape)}, expected (N, 2, W)")
    check_tensor("swiglu", "pair_weights", pair_weights, gate_up, (pairs,))
    out = gate_up.new_empty(pairs, width)
    if out.numel():
        with on_device(gate_up):
            grid = (pairs, triton.cdiv(width, BLOCK))
            _swiglu[grid](gate_up, pair_weights, out, width, WEIGHTED=pair_weights is not None, BLOCK=BLOCK)
    return out


def reduce_pairs(x: Tensor, count: int) -> Tensor:
    """Sum of every `count` consecutive rows, in order, in float32.

    Args:
        x: `(T·count, R)` float16 or bfloat16: pair p = token · count + slot.

    Returns:
        `(T, R)` in the dtype of `x`.

    Raises:
        UnsupportedError, ValueError: see `common`; a number of rows that is no multiple of `count`.
    """
    x = check_activation("reduce_pairs", "x", x, 2)
    check_count("reduce_pairs", x, count)
    return sum_consecutive(x, count, x.dtype)


def sum_consecutive(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Sum of every `count` consecutive rows of a contiguous `x (N·count, R)`, in float32, as `dtype`."""
    out = torch.empty(x.shape[0] // count, x.shape[1], dtype=dtype, device=x.device)
    if out.numel():
        with on_device(x):
            _reduce_pairs[(len(out), triton.cdiv(x.shape[1], BLOCK))](x, out, x.shape[1], COUNT=count, BLOCK=BLOCK)
    return out


def check_count(operation: str, x: Tensor, count: int) -> None:
    """Raises ValueError unless the rows of `x` are a multiple of `count`."""
    if count < 1 or x.shape[0] % count:
        raise ValueError(f"{operation}: {x.shape[0]} rows are no multiple of {count}, the pairs of a token")
