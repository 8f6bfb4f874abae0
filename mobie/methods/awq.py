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
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, map_experts, register
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed
from mobie.packing.grid import (
    Grid,
    check_grid_options,
    encode,
    fit_grid,
    pack_bank,
    round_trip,
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


def scale_errors(
    weights: Sequence[Tensor], hessian: Tensor, mean_abs: Tensor, bits: int, group_size: int | None
) -> Tensor:
    """Output errors of the 20 ratios, summed over weights that share their input.

    Args:
        weights: each `(..., out, in)`.
        hessian: `(..., in, in)`, of their common input.
        mean_abs: `(in,)`: one scale for the whole batch; or `(..., in)`: one per matrix.

    Returns:
        `tr(ΔW H ΔWᵀ)`, `(ratios, weights, ...)`.
    """
    errors = []
    for ratio in RATIOS:
        scale = channel_scale(mean_abs, ratio)
        for weight in weights:
            scaled = weight * scale.unsqueeze(-2)
            change = round_trip(scaled, bits, group_size).sub_(scaled).div_(scale.unsqueeze(-2))
            errors.append((change @ hessian).mul_(change).sum(dim=(-2, -1)))
    return torch.stack(errors).unflatten(0, (len(RATIOS), len(weights)))


def best_scale(mean_abs: Tensor, errors: Tensor) -> Tensor:
    """The channel scale of the ratio with the least error, the smaller ratio of equals.

    Args:
        mean_abs: `(in,)`, or `(..., in)` for one scale per matrix.
        errors: `(ratios,)` or `(ratios, ...)`.

    Returns:
        The scale, shaped as `mean_abs`.
    """
    best = errors.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(dim=0)
    scales = torch.stack([channel_scale(mean_abs, ratio) for ratio in RATIOS])  # (ratios, ..., in)
    return scales.gather(0, best[None, ..., None].expand(1, *mean_abs.shape))[0]


def search_scale(
    weights: Sequence[Tensor], hessian: Tensor, mean_abs: Tensor, bits: int, group_size: int | None
) -> Tensor:
    """Of 20 ratios, the channel scale `(..., in)` with the least output error summed over weights `(..., out, in)`."""
    return best_scale(mean_abs, scale_errors(weights, hessian, mean_abs, bits, group_size).sum(dim=1))


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
        change = round_trip(clipped, bits, group_size).sub_(weight).div_(scale.unsqueeze(-2))
        change = split_groups(change, group_size).transpose(-3, -2)  # (..., groups, out, group_size)
        error = (change @ gram).mul_(change).sum(dim=-1).mT  # (..., out, groups)
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
    seconds_per_weight: ClassVar[float] = 8.0e-7

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
        packed: dict[str, PackedBank] = {}
        for names in bank.same_input:
            scale = self._common_scale(bank, stats, names) if len(names) > 1 else None
            # the last projection's statistics, for those of the first were read for the common scale
            packed |= self.quantize_chunks(bank, stats, names[::-1], partial(self._quantize_own, common=scale))
        return {name: packed[name] for name in bank.projections}

    def _common_scale(self, bank: ExpertBank, stats: BankStats, names: Sequence[str]) -> Tensor:
        """Scale `(in,)` of several projections of all experts, from the activations of all tokens."""
        mean_abs = stats.pooled[names[0]].mean_abs
        weights = {name: bank.projections[name] for name in names}

        def errors(experts: range, device: torch.device) -> list[Tensor]:
            own = [weight[experts.start : experts.stop].to(device) for weight in weights.values()]
            hessian = torch.stack([s.hessian for s in stats.of(names[0], experts, device)])
            found = scale_errors(own, hessian, mean_abs.to(device), self.bits, self.group_size)
            return list(found.cpu().movedim(-1, 0))

        shapes = [weight.shape[1:] for weight in weights.values()]
        by_expert = torch.stack(map_experts(bank, self.expert_bytes(shapes), errors), dim=-1)
        return best_scale(mean_abs.cpu(), by_expert.sum(dim=-1).sum(dim=1))

    def _quantize_own(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]], common: Tensor | None
    ) -> list[dict[str, Packed]]:
        """Quantize some experts with the common scale `(in,)`, or each with a scale of its own."""
        first = next(iter(weights))
        own = [expert[first] for expert in stats]
        gram = torch.stack([group_gram(s.sample, self.group_size) for s in own])
        if common is None:
            hessian, mean_abs = torch.stack([s.hessian for s in own]), torch.stack([s.mean_abs for s in own])
            scale = search_scale(list(weights.values()), hessian, mean_abs, self.bits, self.group_size)
        else:
            scale = common.to(gram.device)
        column_scale = scale.expand(len(own), -1)
        packed = {
            name: pack_bank(*self._round(weight, scale, gram), column_scale=column_scale, **self._layout)
            for name, weight in weights.items()
        }
        return [{name: grids[e] for name, grids in packed.items()} for e in range(len(own))]

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
