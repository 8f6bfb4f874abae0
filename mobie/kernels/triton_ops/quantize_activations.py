"""Activations rounded to int8 in groups of 128 columns, for products with int8 matrices: one launch, for all programs.

scale = largest magnitude of the group / 127        code = x · (127 / largest magnitude), ties to even
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.kernels.triton_ops.common import ACTIVATION_GROUP, int8_codes, int8_scale, on_device


@triton.jit
def _quantize(
    x,
    codes,
    scale,
    columns,
    groups,
    parts,
    x_stride,
    x_part_stride,
    REDUCE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int8 codes of the sum of REDUCE rows of x; program: (row · parts + part, BLOCK groups of its columns)."""
    line = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    source = x + line // parts * REDUCE * x_stride + line % parts * x_part_stride + column
    values = tl.zeros((BLOCK, GROUP), tl.float32)
    for slot in tl.static_range(REDUCE):  # in order
        values += tl.load(source + slot * x_stride, mask=column < columns, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    tl.store(codes + line * columns + column, int8_codes(values, largest[:, None]), mask=column < columns)
    tl.store(scale + line * groups + group, int8_scale(largest), mask=group < groups)


def quantize_activations(x: Tensor, reduce: int = 1) -> tuple[Tensor, Tensor]:
    """Symmetric int8 in groups of 128 columns, of the sum of every `reduce` consecutive rows.

    Args:
        x: `(N·reduce, parts, K)`.

    Returns:
        Codes `(N, parts, K)` int8, scales `(N, parts, ceil(K/128))` float32.
    """
    count, (parts, columns) = len(x) // reduce, x.shape[1:]
    groups = triton.cdiv(columns, ACTIVATION_GROUP.value)
    codes = torch.empty(count, parts, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(count, parts, groups, dtype=torch.float32, device=x.device)
    block = min(8, triton.next_power_of_2(groups))
    with on_device(x):
        _quantize[(count * parts, triton.cdiv(groups, block))](
            x,
            codes,
            scale,
            columns,
            groups,
            parts,
            x.stride(0),
            x.stride(1),
            REDUCE=reduce,
            GROUP=ACTIVATION_GROUP.value,
            BLOCK=block,
        )
    return codes, scale
