"""MoEQuant (Chen et al. 2025): GPTQ whose Hessians weight each token by how much its expert counts for it.

    affinity-guided Hessian   H_e = 2/n · Σ_t s_te x_t x_tᵀ    s_te: router score of token t for expert e (section 4.2)
    symmetric grid            W[i, j] = q · scale[i]           q = -2^(b-1) .. 2^(b-1) - 1
    clip search               scale[i] = p · max_j |W[i, j]| / (2^(b-1) - 1) with the p of least Σ_j |W - Ŵ|^norm

A shared expert's score is the sigmoid of its gate, where there is one. The router is quantized first, from the inputs
as they are, without weights; scores and routes are then those of the quantized router. The paper's calibration text is
another part (`calibration` of a configuration). What the paper leaves open is as in its released code: norm 2.4, p from
1 in steps of 1/100 down to 0.21. That code quantizes the shared expert's gate as well, one row, which is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mobie.errors import ConfigError, DataError
from mobie.methods.base import TokenWeighting, register
from mobie.methods.gptq import GPTQ
from mobie.packing.grid import SMALLEST_SCALE, symmetric_zero

#: the router is quantized before the experts' statistics are gathered, after that, or not at all
RouterOrder = Literal["first", "last", "kept"]
#: weights that are rounded at a time in the search: little on a CPU, whose cache it should suit
SEARCHED = {"cpu": 1 << 17, "cuda": 1 << 26}


def fit_clipped(weight: Tensor, bits: int, norm: float, steps: int, max_shrink: float) -> tuple[Tensor, Tensor]:
    """Symmetric grid of each row, its range shrunk from the largest magnitude where that lowers `Σ |W - Ŵ|^norm`.

    Tried are the shares `1 - i/steps` of the range, `i = 0 .. max_shrink · steps - 1`, and the whole range at any rate;
    among equals the largest is taken. A scale is rounded to float16 before it is tried.

    Args:
        weight: `(..., out, columns)` float32.

    Returns:
        Scale, holding float16 values, and zero, which is the same everywhere: both `(..., out, 1)` float32.

    Raises:
        DataError: the weights are larger than a float16 scale can cover, or not finite.
    """
    shares = [1 - i / steps for i in range(max(1, round(max_shrink * steps)))]
    rows = max(1, SEARCHED[weight.device.type] // weight.shape[-1])
    # matrix by matrix, so that sums do not depend on how many are given
    scale = [
        torch.cat([_least_error_scale(part, bits, norm, shares) for part in matrix.split(rows)])
        for matrix in weight.reshape(-1, *weight.shape[-2:])
    ]
    found = torch.stack(scale).reshape(*weight.shape[:-1], 1)
    return found, torch.full_like(found, symmetric_zero(bits))


def _least_error_scale(weight: Tensor, bits: int, norm: float, shares: list[float]) -> Tensor:
    """Of each row `(rows, columns)` the scale `(rows, 1)` of least error."""
    top = symmetric_zero(bits) - 1
    widest = weight.abs().amax(dim=-1, keepdim=True) / top
    if not widest.half().isfinite().all():
        raise DataError(
            f"weights reach {weight.abs().max():.3g}; expected finite values up to {65504 * top:.3g}, the reach of a "
            f"symmetric {bits}-bit grid with float16 scales: rescale the weights"
        )
    least = torch.full_like(widest, float("inf"))
    best = widest.half().float().clamp(min=SMALLEST_SCALE)
    work = torch.empty_like(weight)
    for share in shares:
        scale = (share * widest).half().float().clamp(min=SMALLEST_SCALE)
        torch.div(weight, scale, out=work).round_().clamp_(-top - 1, top).mul_(scale).sub_(weight)
        # |e|^norm by way of the logarithm: a power takes four times as long, and is nearly all of the search
        error = work.abs_().log_().mul_(norm).exp_().sum(dim=-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


@register
@dataclass(frozen=True)
class MoEQuant(GPTQ):
    """GPTQ on a symmetric, clipped grid, with affinity-guided Hessians.

    norm, steps, max_shrink: of the clip search (`fit_clipped`); `max_shrink` 0 clips nothing.
    router: "first": the experts are shown the tokens that the quantized router sends them, weighted by its scores;
            "last": those of the original router; "kept": the router stays in 16 bits.
    """

    name: ClassVar[str] = "moequant"
    seconds_per_weight: ClassVar[float] = 5.5e-7
    symmetric: ClassVar[bool] = True

    token_weighting: TokenWeighting = "gate"
    norm: float = 2.4
    steps: int = 100
    max_shrink: float = 0.8
    router: RouterOrder = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise ConfigError(f"{self.name}: bits is {self.bits}; expected at least 2, for a grid symmetric to zero")
        if type(self.norm) not in (int, float) or not 0 < self.norm < float("inf"):
            raise ConfigError(f"{self.name}: norm is {self.norm!r}; expected a positive number (2.4)")
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"{self.name}: steps is {self.steps!r}; expected a positive integer (100)")
        if type(self.max_shrink) not in (int, float) or not 0 <= self.max_shrink <= 1:
            raise ConfigError(f"{self.name}: max_shrink is {self.max_shrink!r}; expected a share from 0 to 1 (0.8)")

    def fit(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return fit_clipped(weight, bits, self.norm, self.steps, self.max_shrink)

    @property
    def quantizes_router(self) -> bool:
        return self.router != "kept"

    @property
    def routes_as_stored(self) -> bool:
        return self.router == "first"
