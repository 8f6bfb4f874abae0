"""The operations of `mobie.kernels.twins` on a CPU, in C++ where that is many times faster than torch.

`ops.cpp` has the products with packed weights: `binary_grouped`, `binary_linear` and `panel` for int8 matrices. They
read the stored bits and compute in float32, on AVX-512, AVX2 or anything else, with equal results for every number of
threads. The rest is plain torch: `dense_grouped` with torch's own 16-bit products, all others are the twins.

Importing this package loads the operators, which builds them when it is the first time on this machine (about 20
seconds). Where that cannot be done, the import raises an ImportError that says why; `mobie.kernels.backend` then takes
the twins.

Measured on one core (benchmarks/cpu_decode.py, where the numbers are): see `mobie.kernels.cpu`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from mobie.kernels import twins
from mobie.kernels.cpp_ops.build import load_operators
from mobie.kernels.layout import BinaryBank, BinaryTensors, Groups, Panel
from mobie.kernels.twins import Activations, group_pairs, pairs_by_expert, reduce_pairs, rms_norm, route, swiglu

__all__ = [
    "binary_grouped",
    "binary_linear",
    "dense_grouped",
    "group_pairs",
    "panel",
    "reduce_pairs",
    "rms_norm",
    "route",
    "swiglu",
]

load_operators()
OPERATORS = torch.ops.mobie_cpu


@torch.library.register_fake("mobie_cpu::binary_grouped")
def _binary_grouped_shape(signs: Tensor, *inputs: Any) -> Tensor:
    x, pairs = inputs[7], inputs[10]
    return x.new_empty(pairs, signs.shape[1], signs.shape[2])


@torch.library.register_fake("mobie_cpu::binary_linear")
def _binary_linear_shape(signs: list[Tensor], *inputs: Any) -> Tensor:
    x = inputs[-1]
    return x.new_empty(x.shape[0], signs[0].shape[1])


@torch.library.register_fake("mobie_cpu::panel_product")
def _panel_product_shape(codes: Tensor, scale: Tensor, x: Tensor, int8: bool) -> Tensor:
    return x.new_empty(x.shape[0], *codes.shape[:2])


def binary_grouped(
    bank: BinaryBank,
    x: Tensor,
    groups: Groups,
    *,
    pairs: int,
    pairs_per_row: int,
    activations: Activations = "16bit",
) -> Tensor:
    """Every pair's row of x times the matrices of the pair's expert; arguments and result as those of the twin."""
    out = OPERATORS.binary_grouped(
        bank.signs,
        bank.row_scale,
        bank.column_scale,
        bank.extra_signs,
        bank.extra_columns,
        bank.extra_row_scale,
        bank.extra_column_scale,
        bank.block_size,
        x.float().contiguous(),
        groups.tile_expert,
        groups.tile_pairs,
        pairs,
        pairs_per_row,
        activations == "int8",
    )
    return out.to(x.dtype)


def binary_linear(matrix: BinaryTensors, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `(N, columns)` times any stored binary matrix: `(N, rows)`."""
    inputs = x.float() if matrix.column_factor is None else x.float() * matrix.column_factor.float()
    segments = [(matrix.plain, matrix.plain_columns)]
    if matrix.extra is not None:
        segments.append((matrix.extra, matrix.extra_columns))
    out = OPERATORS.binary_linear(
        [segment.signs for segment, _ in segments],
        [segment.row_scale for segment, _ in segments],
        [segment.mean for segment, _ in segments],
        [segment.column_scale for segment, _ in segments],
        [segment.bitmap for segment, _ in segments],
        [columns for _, columns in segments],
        matrix.block_size,
        inputs.contiguous(),
    )
    return (out if bias is None else out + bias.float()).to(x.dtype)


def panel(
    panel: Panel,
    x: Tensor,
    *,
    reduce: int = 1,
    epilogue: Literal["none", "swiglu"] = "none",
    pair_weights: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    activations: Activations = "16bit",
) -> Tensor:
    """Rows of x times the panel's matrices; arguments and result as those of the twin."""
    if panel.codes.dtype != torch.int8 or panel.scale is None:
        return twins.panel(
            panel, x, reduce=reduce, epilogue=epilogue, pair_weights=pair_weights, residual=residual, bias=bias
        )
    inputs = twins.sum_consecutive(x.float(), reduce).contiguous()
    out = OPERATORS.panel_product(panel.codes, panel.scale, inputs, activations == "int8")
    if bias is not None:
        out = out + bias.float().view(out.shape[1:])
    if epilogue == "swiglu":
        out = swiglu(out, pair_weights)
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


def dense_grouped(weight: Tensor, x: Tensor, groups: Groups, *, pairs: int, pairs_per_row: int) -> Tensor:
    """Every pair's row of x `(N, columns)` times its expert's weight `(experts, rows, columns)`: `(pairs, rows)`.

    torch multiplies in the dtype of the weights; the twin makes them float32 first, which costs more than the product.
    """
    out = x.new_zeros(pairs, weight.shape[1])
    for expert, members in pairs_by_expert(groups):
        out[members] = linear(x[members // pairs_per_row].to(weight.dtype), weight[expert]).to(x.dtype)
    return out
