"""Every kernel's operation in plain torch, on any device: what the kernels are tested against, and the way without one.

    y = Σ_b r[i, b] Σ_{j in b} s[i, j] · (c[j] x[j])        r, c: row and column scales; s: signs; b: block of columns

x is float16, bfloat16 or float32 and so is what comes back; in between everything is float32. With
`activations="int8"` the vector that meets the integers is rounded first, in groups of 128 columns (`quantize_groups`):
c·x for signs, x for int8 panels. Products of integers are summed exactly, as tensor cores do.

Experts of one layer are looped over; pairs are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from mobie.kernels.layout import GROUP, BinaryBank, BinaryTensors, Groups, Panel, tiles_needed, unpack_bits
from mobie.packing.binary import Segment, select_group

Activations = Literal["16bit", "int8"]
LARGEST_CODE = 127
SMALLEST_AMPLITUDE = 1e-30  # a group that stays below is all zeros on the int8 path: its inverse scale would overflow


def route(
    hidden: Tensor, weight: Tensor, top_k: int, *, normalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Router: softmax over all experts, then the `top_k` largest, renormalised to sum 1 if `normalize`.

    Args:
        hidden: `(tokens, hidden)`.
        weight: `(experts, hidden)`.
        bias: `(experts,)`, added to the logits.

    Returns:
        Logits `(tokens, experts)` float32, weights `(tokens, top_k)` float32, experts `(tokens, top_k)` int64.
    """
    logits = linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    weights, index = logits.softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, index


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root mean square normalization of `x + residual`, `(tokens, hidden)`, rounded where the library rounds.

    Returns:
        The normalized sum, and the sum itself.
    """
    total = x if residual is None else x + residual
    exact = total.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), total


def group_pairs(index: Tensor, experts: int, tile: int) -> Groups:
    """Sort (token, expert) pairs by expert and pad every expert to whole tiles; nothing waits for the device.

    Args:
        index: `(tokens, k)` int64, the experts of each token; pair = token·k + slot, ascending within an expert.
    """
    flat = index.flatten()
    tiles = tiles_needed(len(flat), experts, tile)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    last_tile = ((counts + tile - 1) // tile).cumsum(0)  # of each expert, exclusive
    first_tile = last_tile - (counts + tile - 1) // tile
    first_pair = counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    expert = flat[order]
    place = torch.arange(len(flat), device=flat.device) - first_pair[expert] + first_tile[expert] * tile
    tile_pairs = torch.full((tiles * tile,), -1, dtype=torch.int32, device=flat.device)
    tile_pairs[place] = order.int()
    tile_expert = torch.searchsorted(last_tile, torch.arange(tiles, device=flat.device), right=True)
    return Groups(tile_expert.where(tile_expert < experts, -1).int(), tile_pairs.view(tiles, tile))


def pairs_by_expert(groups: Groups) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has pairs, with its pairs `(n,)` int64."""
    for expert in groups.tile_expert.unique().tolist():
        if expert >= 0:
            pairs = groups.tile_pairs[groups.tile_expert == expert]
            yield expert, pairs[pairs >= 0].long()


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 in groups of 128 along the last dimension, the largest magnitude of a group at ±127.

    Args:
        x: `(..., columns)`; the last group may be short.

    Returns:
        Codes `(..., groups, 128)`, integers held in float32: `x · (127 / largest)`, rounded half to even; scales
        `(..., groups)` float32: `largest / 127`.
    """
    groups = pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > SMALLEST_AMPLITUDE, LARGEST_CODE / largest, 0.0)
    return (groups * inverse[..., None]).round(), largest / LARGEST_CODE


def signs_of(packed: Tensor, length: int) -> Tensor:
    """±1 `(..., length)` float32 of packed bits."""
    return unpack_bits(packed, length).float() * 2 - 1


def binary_grouped(
    bank: BinaryBank,
    x: Tensor,
    groups: Groups,
    *,
    pairs: int,
    pairs_per_row: int,
    activations: Activations = "16bit",
) -> Tensor:
    """Every pair's row of x times the matrices of the pair's expert.

    Args:
        x: `(N, columns)`, or `(N, parts, columns)` where every part has its own; pair p reads row `p // pairs_per_row`.
        activations: "int8" rounds x times the column scales. The second-order columns stay as they are: neighbours
            among them belong to different blocks of row scales.

    Returns:
        `(pairs, parts, rows)` in the dtype of x.
    """
    out = x.new_zeros(pairs, bank.parts, bank.rows)
    for expert, members in pairs_by_expert(groups):
        inputs = x[members // pairs_per_row].float()
        if inputs.dim() == 2:
            inputs = inputs[:, None].expand(-1, bank.parts, -1)
        plain = _plain_int8(bank, expert, inputs) if activations == "int8" else _plain(bank, expert, inputs)
        out[members] = (plain + _extra(bank, expert, inputs)).to(x.dtype)
    return out


def _fold(bank: BinaryBank, expert: int, x: Tensor) -> Tensor:
    """x `(n, parts, columns)` times the column scales, with the spare columns: `(n, parts, 8·bytes)`."""
    scale = bank.column_scale[expert].float()
    return pad(x, (0, scale.shape[-1] - x.shape[-1])) * scale


def _plain(bank: BinaryBank, expert: int, x: Tensor) -> Tensor:
    folded = _fold(bank, expert, x)
    columns = torch.arange(folded.shape[-1], device=x.device)
    row_scale = bank.row_scale[expert].float()[..., columns // bank.block_size]  # (parts, rows, 8·bytes)
    weight = row_scale * signs_of(bank.signs[expert], len(columns))
    return torch.einsum("npj,prj->npr", folded, weight)


def _plain_int8(bank: BinaryBank, expert: int, x: Tensor) -> Tensor:
    codes, scale = quantize_groups(_fold(bank, expert, x))  # (n, parts, groups, 128), (n, parts, groups)
    signs = signs_of(bank.signs[expert], codes.shape[2] * GROUP).unflatten(-1, (-1, GROUP))
    total = x.new_zeros(len(x), bank.parts, bank.rows)
    for group in range(codes.shape[2]):
        row_scale = bank.row_scale[expert, :, :, group * GROUP // bank.block_size].float()  # (parts, rows)
        exact = torch.einsum("npj,prj->npr", codes[:, :, group], signs[:, :, group])
        total += exact * scale[:, :, group, None] * row_scale
    return total


def _extra(bank: BinaryBank, expert: int, x: Tensor) -> Tensor:
    """The second-order columns."""
    columns = bank.extra_columns[expert].long()  # (parts, extra)
    gathered = x.gather(-1, columns.expand(len(x), -1, -1)) * bank.extra_column_scale[expert].float()
    blocks = (columns // bank.block_size)[:, None].expand(-1, bank.rows, -1)
    row_scale = bank.extra_row_scale[expert].float().gather(-1, blocks)  # (parts, rows, extra)
    weight = row_scale * signs_of(bank.extra_signs[expert], bank.extra)
    return torch.einsum("npj,prj->npr", gathered, weight)


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
    """Rows of x times the panel's matrices, each part its own.

    Args:
        x: `(N·reduce, parts, columns)`; the sum of `reduce` consecutive rows, in order, is what is multiplied.
        epilogue: "swiglu" is `silu(part 0) · part 1 · pair_weights[n]`.
        pair_weights: `(N,)`.
        residual: in the shape of what comes back, added last.
        bias: `(parts·rows,)`.
        activations: "int8" rounds the sum; only where the panel is int8 itself.

    Returns:
        `(N, parts, rows)`, or `(N, rows)` after "swiglu", in the dtype of x.
    """
    inputs = sum_consecutive(x.float(), reduce)
    if activations == "int8" and panel.codes.dtype == torch.int8:
        out = _panel_int8(panel.codes, inputs)
    else:
        out = torch.einsum("npj,prj->npr", inputs, panel.codes.float())
    if panel.scale is not None:
        out = out * panel.scale.float()
    if bias is not None:
        out = out + bias.float().view(out.shape[1:])
    if epilogue == "swiglu":
        out = swiglu(out, pair_weights)
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


def _panel_int8(codes: Tensor, x: Tensor) -> Tensor:
    rounded, scale = quantize_groups(x)  # (N, parts, groups, 128), (N, parts, groups)
    total = x.new_zeros(len(x), *codes.shape[:2])
    for group, matrix in enumerate(codes.split(GROUP, dim=-1)):
        exact = torch.einsum("npj,prj->npr", rounded[:, :, group, : matrix.shape[-1]], matrix.float())
        total += exact * scale[:, :, group, None]
    return total


def sum_consecutive(x: Tensor, count: int) -> Tensor:
    """Sums of `count` consecutive rows, in order: `(N·count, ...)` → `(N, ...)`."""
    runs = x.unflatten(0, (-1, count))
    total = runs[:, 0]
    for slot in range(1, count):
        total = total + runs[:, slot]
    return total


def swiglu(gate_up: Tensor, pair_weights: Tensor | None = None) -> Tensor:
    """`silu(gate) · up · pair_weights`: `(N, 2, width)`, `(N,)` → `(N, width)`."""
    gate, up = gate_up.float().unbind(1)
    out = silu(gate) * up
    if pair_weights is not None:
        out = out * pair_weights.float()[:, None]
    return out.to(gate_up.dtype)


def reduce_pairs(x: Tensor, k: int) -> Tensor:
    """Sum over the `k` pairs of a token, in order, in float32: `(tokens·k, rows)` → `(tokens, rows)`."""
    return sum_consecutive(x.float(), k).to(x.dtype)


def binary_linear(matrix: BinaryTensors, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `(N, columns)` times any stored binary matrix: `(N, rows)`."""
    weight = x.new_zeros(matrix.rows, matrix.columns, dtype=torch.float32)
    for segment, columns in ((matrix.plain, matrix.plain_columns), (matrix.extra, matrix.extra_columns)):
        if segment is not None:
            weight.index_add_(1, columns, _dense(segment, columns, matrix.block_size))
    if matrix.column_factor is not None:
        weight = weight * matrix.column_factor.float()
    return linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _dense(segment: Segment, columns: Tensor, block_size: int) -> Tensor:
    """Values `(rows, n)` of a segment, as the head of `mobie.packing.binary` has it."""
    count = len(columns)
    blocks = columns.long() // block_size
    second = None if segment.bitmap is None else unpack_bits(segment.bitmap, count).bool()
    scales = segment.row_scale.float()[..., blocks]  # (order, groups, rows, n)
    if segment.column_scale is not None:
        scales = scales * segment.column_scale.float()[:, :, None]
    signs = signs_of(segment.signs, count)  # (order, rows, n)
    dense = sum(select_group(scale, second) * sign for scale, sign in zip(scales, signs, strict=True))
    if segment.mean is not None:
        dense = dense + select_group(segment.mean.float()[..., blocks], second)
    return dense


def dense_grouped(weight: Tensor, x: Tensor, groups: Groups, *, pairs: int, pairs_per_row: int) -> Tensor:
    """Every pair's row of x `(N, columns)` times its expert's weight `(experts, rows, columns)`: `(pairs, rows)`."""
    out = x.new_zeros(pairs, weight.shape[1])
    for expert, members in pairs_by_expert(groups):
        out[members] = linear(x[members // pairs_per_row].float(), weight[expert].float()).to(x.dtype)
    return out
