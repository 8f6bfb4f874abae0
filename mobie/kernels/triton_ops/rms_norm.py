"""Root mean square norm of rows, with the residual sum before it: one launch in place of the library's six."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.kernels.triton_ops.common import check_activation, check_tensor, on_device, power_of_two

ELEMENTS = 4096  # of one program; short rows are taken several at a time


@triton.jit
def _rms_norm(
    x,
    weight,
    residual,
    normed,
    total,
    rows,
    width,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0)
    if ADD:  # the library adds in 16 bits and norms what it has rounded
        value = (value.to(tl.float32) + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(total + place, value, mask=inside)
    wide = value.to(tl.float32)
    variance = tl.sum(wide * wide, axis=1) / width
    scaled = (wide * tl.rsqrt(variance + eps)[:, None]).to(value.dtype)  # the library rounds before the weight
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(normed + place, (factor[None, :] * scaled.to(tl.float32)).to(value.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm of `x + residual`, and that sum: `weight · round(s / sqrt(mean(s²) + eps))`, float32 inside.

    Args:
        x, residual: `(T, H)` float16 or bfloat16, of one dtype.
        weight: `(H,)`, same dtype.

    Returns:
        Normed rows and the sum (`x` itself without a residual), both `(T, H)`.

    Raises:
        UnsupportedError, ValueError: see `common`.
    """
    x = check_activation("rms_norm", "x", x, 2)
    rows, width = x.shape
    check_tensor("rms_norm", "weight", weight, x, (width,), (x.dtype,))
    residual = None if residual is None else residual.contiguous()
    check_tensor("rms_norm", "residual", residual, x, (rows, width), (x.dtype,))
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        block = power_of_two(width)
        per_program = max(1, min(power_of_two(rows), ELEMENTS // block))
        with on_device(x):
            _rms_norm[(triton.cdiv(rows, per_program),)](
                x,
                weight,
                residual,
                normed,
                total,
                rows,
                width,
                eps,
                ADD=residual is not None,
                ROWS=per_program,
                BLOCK=block,
                num_warps=4 if per_program * block <= ELEMENTS else 8,
            )
    return normed, total
