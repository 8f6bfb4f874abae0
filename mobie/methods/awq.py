"""AWQ (Lin et al. 2024): scale input channels before rounding by how active they are, then clip the weights.

W: weights (..., out, in)   H: Hessian (..., in, in)   s: channel scale (..., in)

The stored grid is that of `W · s`; the stored `s` divides it again. Both searches measure the output error of the
Linear itself, `‖X ΔWᵀ‖² ∝ tr(ΔW H ΔWᵀ)`. The released implementation searches the scale on the output of the whole
block behind the Linear (attention, or the experts' nonlinear sum): a deviation, for a method here sees weights and
input statistics only. As `s` is stored beside each weight and not folded into the layer before it, every Linear can
have one, also those that the released implementation leaves unscaled for want of such a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, register
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed
from mobie.packing.grid import (
    Grid,
    check_grid_options,
    decode,
    encode,
    fit_grid,
    pack_bank,
    split_groups,
    spread_groups,
)

RATIOS = tuple(i / 20 for i in range(20))
CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))  # 1 down to 0.55
SMALLEST_ACTIVATION = 1e-4
UNCLIPPED = frozenset({"q_proj", "k_proj"})  # clipping either would change every attention score


def channel_scale(mean_abs: Tensor, ratio: float) -> Tensor:
    """Scale `(..., in)` of channels whose mean |x| is `mean_abs` `(..., in)`: `mean_abs^ratio`, centred around 1.

    All ones at ratio 0. Float32 holding float16 values. A mean that is NaN (an expert that got no token) counts as 0.
    """
    scale = mean_abs.float().nan_to_num(nan=0).pow(ratio).clamp(min=SMALLEST_ACTIVATION)
    centre = (scale.amax(dim=-1, keepdim=True) * scale.amin(dim=-1, keepdim=True)).sqrt()
    half = torch.finfo(torch.float16)
    return (scale / centre).clamp(half.tiny, half.max).half().float()


def round_trip(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Weights `(..., out, in)` rounded to the nearest point of their groups' grids."""
    scale, zero = fit_grid(weight, bits, group_size)
    return decode(encode(weight, scale, zero, bits, group_size), scale, zero, group_size)


def search_scale(
    weights: Sequence[Tensor], hessian: Tensor, mean_abs: Tensor, bits: int, group_size: int | None
) -> Tensor:
    """Of 20 ratios, the channel scale with the least output error summed over weights that share their input.

    Args:
        weights: each `(..., out, in)`.
        hessian: `(..., in, in)`, of their common input.
        mean_abs: `(in,)`: one scale for the whole batch, errors summed over it; or `(..., in)`: one per matrix.

    Returns:
        The scale, shaped as `mean_abs`.
    """
    best = channel_scale(mean_abs, RATIOS[0])
    least = torch.full(mean_abs.shape[:-1], torch.inf, device=mean_abs.device)
    for ratio in RATIOS:
        scale = channel_scale(mean_abs, ratio)
        error = torch.zeros_like(least)
        for weight in weights:
            scaled = weight * scale.unsqueeze(-2)
            change = (round_trip(scaled, bits, group_size) - scaled) / scale.unsqueeze(-2)
            errors = (change @ hessian * change).sum(dim=(-2, -1))  # tr(ΔW H ΔWᵀ), (...)
            error += errors.sum() if mean_abs.dim() == 1 else errors
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better.unsqueeze(-1), scale, best)
    return best


def group_gram(sample: Tensor, group_size: int | None) -> Tensor:
    """`X_gᵀ X_g` for the inputs of each group: `(tokens, in)` → `(groups, group_size, group_size)`."""
    groups = split_groups(sample.float(), group_size).transpose(0, 1)  # (groups, tokens, group_size)
    return groups.mT @ groups


def clip(weight: Tensor, scale: Tensor, gram: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Clamp the scaled weights `W · s` of each group to ±(ratio · max |W · s|), the best of 10 ratios.

    Args:
        weight: `W · s`, `(..., out, in)`.
        scale: `s`, `(..., in)` or `(in,)`.
        gram: `group_gram` of the unscaled inputs, `(..., groups, group_size, group_size)`.
    """
    columns = weight.shape[-1]
    largest = split_groups(weight.abs(), group_size).amax(dim=-1)  # (..., out, groups)
    best = weight
    least = torch.full_like(largest, torch.inf)
    for ratio in CLIP_RATIOS:
        limit = spread_groups(largest * ratio, group_size, columns)
        clipped = weight.clamp(-limit, limit)
        change = (round_trip(clipped, bits, group_size) - weight) / scale.unsqueeze(-2)
        change = split_groups(change, group_size).transpose(-3, -2)  # (..., groups, out, group_size)
        error = (change @ gram * change).sum(dim=-1).mT  # (..., out, groups)
        best = torch.where(spread_groups(error < least, group_size, columns), clipped, best)
        least = torch.minimum(error, least)
    return best


@register
@dataclass(frozen=True)
class AWQ(Method):
    """AWQ on an asymmetric grid, group 128; `paper_bits` is the bare `bits`, as the literature prints it.

    Linears that share their input share one scale; so do the gate and up projections of all experts of a layer, whose
    input is that of the block's norm. Each expert's down projection has its own.
    """

    name: ClassVar[str] = "awq"

    bits: int
    group_size: int | None = 128

    def __post_init__(self) -> None:
        check_grid_options(self.name, self.bits, self.group_size)

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        return self.quantize_group({"": weight}, {"": stats})[""]

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        common = stats[next(iter(weights))]
        scale = search_scale(list(weights.values()), common.hessian, common.mean_abs, self.bits, self.group_size)
        gram = group_gram(common.sample, self.group_size)
        return {
            name: Grid.pack(
                *self._round(weight, scale, None if name in UNCLIPPED else gram), column_scale=scale, **self._layout
            )
            for name, weight in weights.items()
        }

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, PackedBank]:
        packed = {}
        for names in bank.same_input:
            weights = {name: bank.projections[name] for name in names}
            experts = stats.experts[names[0]]
            shared = len(names) > 1
            mean_abs = stats.pooled[names[0]].mean_abs if shared else torch.stack([s.mean_abs for s in experts])
            hessian = torch.stack([s.hessian for s in experts])
            scale = search_scale(list(weights.values()), hessian, mean_abs, self.bits, self.group_size)
            gram = torch.stack([group_gram(s.sample, self.group_size) for s in experts])
            for name, weight in weights.items():
                packed[name] = pack_bank(
                    *self._round(weight, scale, gram),
                    column_scale=scale.expand(len(experts), -1),
                    **self._layout,
                )
        return packed

    def _round(self, weight: Tensor, scale: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and grid of `W · s`, clipped first unless `gram` is None."""
        scaled = weight * scale.unsqueeze(-2)
        if gram is not None:
            scaled = clip(scaled, scale, gram, self.bits, self.group_size)
        step, zero = fit_grid(scaled, self.bits, self.group_size)
        return encode(scaled, step, zero, self.bits, self.group_size), step, zero

    @property
    def _layout(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "paper": float(self.bits)}
