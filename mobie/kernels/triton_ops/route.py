"""The router: logits of all experts, softmax, and the most probable experts of every token.

Two launches. The weight, read once, is split over programs by experts: one multiprocessor alone would need longer for
it than all of them for the rest. Then one program per token picks its experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.kernels.triton_ops.common import (
    ACTIVATION_DTYPES,
    check_activation,
    check_tensor,
    multiply,
    on_device,
    power_of_two,
)
from mobie.kernels.tuning import few_or_many, fit_tokens, sizes_for


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    logits,
    tokens,
    experts,
    width,
    BIASED: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    piece = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    weight_rows = weight + expert[None, :, None] * width
    hidden_rows = hidden + token[None, None, :].to(tl.int64) * width
    total = tl.zeros((SLICES, EXPERTS, TOKENS), tl.float32)
    for start in range(0, width, SLICES * BLOCK_K):
        column = start + piece  # (slices, k)
        known = column < width
        w = tl.load(weight_rows + column[:, None, :], (expert < experts)[None, :, None] & known[:, None, :], other=0.0)
        x = tl.load(hidden_rows + column[:, :, None], (token < tokens)[None, None, :] & known[:, :, None], other=0.0)
        if WIDE:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        total = multiply(w, x, total)
    result = tl.sum(total, axis=0)
    if BIASED:
        result += tl.load(bias + expert, mask=expert < experts, other=0.0).to(tl.float32)[:, None]
    place = token[None, :].to(tl.int64) * experts + expert[:, None]
    tl.store(logits + place, result, mask=(token < tokens)[None, :] & (expert < experts)[:, None])


@triton.jit
def _choose(
    logits,
    weights,
    index,
    experts,
    NORMALIZE: tl.constexpr,
    TOP: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    slot = tl.arange(0, TOP_BLOCK)
    own = tl.load(logits + token * experts + expert, mask=expert < experts, other=float("-inf"))
    exponent = tl.exp(own - tl.max(own, axis=0))
    probability = exponent / tl.sum(exponent, axis=0)
    # spare places come after all experts, also after one whose logit is NaN: an index is always a real expert
    rank = tl.where(own == own, probability, -1.0)
    rank = tl.where(expert < experts, rank, -2.0)
    chosen_weight = tl.zeros((TOP_BLOCK,), tl.float32)
    chosen = tl.zeros((TOP_BLOCK,), tl.int32)
    for k in tl.static_range(TOP):
        best = tl.argmax(rank, axis=0, tie_break_left=True)
        chosen = tl.where(slot == k, best, chosen)
        chosen_weight = tl.where(slot == k, tl.sum(tl.where(expert == best, probability, 0.0), axis=0), chosen_weight)
        rank = tl.where(expert == best, -3.0, rank)
    if NORMALIZE:
        chosen_weight = chosen_weight / tl.sum(chosen_weight, axis=0)
    tl.store(weights + token * TOP + slot, chosen_weight, mask=slot < TOP)
    tl.store(index + token * TOP + slot, chosen.to(tl.int64), mask=slot < TOP)


def route(
    hidden: Tensor, weight: Tensor, top_k: int, *, normalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, the `top_k` most probable in falling order (of equals the lower index first).

    Args:
        hidden: `(T, H)` float16 or bfloat16.
        weight: `(E, H)` the same, or float32.
        normalize: whether the weights of the chosen sum to 1.
        bias: `(E,)`, added to the logits.

    Returns:
        Logits `(T, E)` float32, not rounded to 16 bits; weights `(T, k)` float32; index `(T, k)` int64.

    Raises:
        UnsupportedError, ValueError: see `common`; `top_k` not in `1 … E`.
    """
    hidden = check_activation("route", "hidden", hidden, 2)
    tokens, width = hidden.shape
    experts = weight.shape[0]
    check_tensor("route", "weight", weight, hidden, (experts, width), (*ACTIVATION_DTYPES, torch.float32))
    check_tensor("route", "bias", bias, hidden, (experts,))
    if not 1 <= top_k <= experts:
        raise ValueError(f"route: top_k is {top_k}, expected 1 to {experts}, the number of experts")
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=hidden.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=hidden.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=hidden.device)
    if not tokens:
        return logits, weights, index
    wide = weight.dtype != hidden.dtype
    shape = f"{'float32' if wide else '16bit'}-{few_or_many(tokens)}"
    tile = fit_tokens(sizes_for("route", shape, hidden.device), tokens)
    block = power_of_two(experts)
    with on_device(hidden):
        _logits[(triton.cdiv(experts, tile.rows), triton.cdiv(tokens, tile.tokens))](
            hidden,
            weight,
            bias,
            logits,
            tokens,
            experts,
            width,
            BIASED=bias is not None,
            WIDE=wide,
            EXPERTS=tile.rows,
            TOKENS=tile.tokens,
            SLICES=tile.slices,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _choose[(tokens,)](
            logits,
            weights,
            index,
            experts,
            NORMALIZE=normalize,
            TOP=top_k,
            TOP_BLOCK=power_of_two(top_k),
            BLOCK=block,
            num_warps=1 if block <= 256 else 4,
        )
    return logits, weights, index
