"""PB-LLM after training, PB-GPTQ (Shang et al. 2023, arXiv 2310.00034): salient weights in 8 bits, signs for the rest.

W: weights (..., out, in)   H: Hessian (..., in, in)   U: upper Cholesky factor of H⁻¹
S: salient weights, single elements of W   g: group of columns, or the whole row (sections 3.2.1 and 3.3)

    W in S     min-max grid per row and group
    others     mu + alpha · sign(w - mu)      mu: mean per row and group (the "zero point"), alpha = mean |w - mu|

S, mu, alpha and the grids come from the weights as given. Then the columns are rounded as in GPTQ, one after another:
a weight is salient or not as decided before, whatever errors it has taken up.

What the paper leaves open, or says in two ways, is an option. The criterion: section 3.2.1 prefers magnitudes, Table 1
and the released commands the Hessian. Saliency: `w² / [H⁻¹]_jj²` as printed; the released code divides by U_jj².
What scales are fitted to: each kind's own weights (sections 3.3 and 3.4.2); in the released code whole rows, in which
salient weights count as zeros for mu and alpha, and the others widen the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mobie.errors import ConfigError
from mobie.methods.base import register
from mobie.methods.factored import FactoredMethod
from mobie.methods.gptq import RoundColumn, column_spans, round_columns
from mobie.methods.hessian import SaliencyRule, saliency_denominator
from mobie.packing.base import Packed
from mobie.packing.binary import to_half
from mobie.packing.grid import check_grid_options, fit_grid, nearest_code, split_groups
from mobie.packing.partial_binary import PartialBinary


def largest(values: Tensor, share: float) -> Tensor:
    """The `round(share · n)` largest of `(..., n)`, bool; of equal ones those that come first."""
    count = round(share * values.shape[-1])
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    least = values.topk(count, sorted=False).values.amin(dim=-1, keepdim=True)
    larger, equal = values > least, values == least
    return larger | (equal & (equal.cumsum(-1) <= count - larger.sum(dim=-1, keepdim=True)))


@dataclass(frozen=True)
class Scales:
    """What weights are rounded with, `(..., out, groups)` float32, as it will be stored.

    row_scale, mean: alpha and mu; mean is None without one.  scale, zero: grids of the salient weights.
    """

    row_scale: Tensor
    mean: Tensor | None
    scale: Tensor
    zero: Tensor


def fit_signs(weight: Tensor, others: Tensor, counted: Tensor, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    """alpha and mu of binarized weights, the least-squares answer for their signs `sign(w - mu)` (section 3.4.2).

    Args:
        weight: `(..., out, groups, n)`.
        others: 1 for weights that are binarized, 0 for the rest.
        counted: 1 for the weights that sums are divided by.

    Returns:
        alpha `(..., out, groups)`, and mu alike or None; 0 where nothing is counted.
    """
    count = counted.sum(dim=-1).clamp(min=1)
    if not with_mean:
        return to_half((weight.abs() * others).sum(dim=-1) / count).float(), None
    mean = to_half((weight * others).sum(dim=-1) / count).float()
    deviation = (weight * others - mean[..., None]).abs() * counted
    return to_half(deviation.sum(dim=-1) / count).float(), mean


@register
@dataclass(frozen=True)
class PBLLM(FactoredMethod):
    """PB-GPTQ.

    salient_share: share of the weights that are salient, met to the element.
    salient_bits:  bits of a salient weight.
    criterion:     what salient weights are the largest of: "hessian", `(w / d)²`, or "magnitude".
    saliency_rule: d is `[H⁻¹]_jj` ("inverse_diagonal", as printed) or U_jj ("cholesky_diagonal", as released).
    selection:     whether the share is met in the "matrix" as a whole or in every "block" of `block_size` columns.
    mean:          whether binarized weights have a mean.
    fit_on:        what scales are fitted to: each kind's "own" weights, or whole "rows" as in the released code.
    group_size:    columns with scales of their own; None: the whole row. The paper's group-wise form has 128 columns
                   and chooses salient weights within them, which is `selection: block` here.
    block_size:    columns that are finished before the columns behind them are updated in one product.
    percdamp:      damping of the Hessian, as a share of its mean diagonal.
    """

    name: ClassVar[str] = "pb-llm"
    seconds_per_weight: ClassVar[float] = 2.7e-7
    stored_bits: ClassVar[float] = 2.3
    stores_signs: ClassVar[bool] = True

    salient_share: float = 0.1
    salient_bits: int = 8
    criterion: Literal["hessian", "magnitude"] = "hessian"
    saliency_rule: SaliencyRule = "inverse_diagonal"
    selection: Literal["matrix", "block"] = "matrix"
    mean: bool = True
    fit_on: Literal["own", "rows"] = "own"
    group_size: int | None = None
    block_size: int = 128
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        check_grid_options(self.name, self.salient_bits, self.group_size, "salient_bits")
        if not 0 <= self.salient_share <= 1:
            raise ConfigError(f"pb-llm: salient_share is {self.salient_share!r}; expected a number from 0 to 1 (0.1)")
        if self.block_size < 1:
            raise ConfigError(f"pb-llm: block_size is {self.block_size!r}; expected a positive number of columns (128)")
        if not 0 <= self.percdamp < float("inf"):
            raise ConfigError(f"pb-llm: percdamp is {self.percdamp!r}; expected a number of at least 0 (0.01)")

    def quantize_batch(self, weight: Tensor, factor: Tensor, dead: Tensor) -> list[Packed]:
        remaining = weight.float().masked_fill(dead.unsqueeze(-2), 0)
        salient = self.choose_salient(remaining, factor)
        scales = self.fit_scales(remaining, salient)
        codes = torch.empty(remaining.shape, dtype=torch.uint8, device=remaining.device)
        columns = remaining.shape[-1]
        for start, stop in column_spans(columns, self.block_size, self.group_size):
            here, group = slice(start, stop), start // (self.group_size or columns)
            rounding = self._rounding(salient[..., here], scales, group)
            codes[..., here], errors = round_columns(remaining[..., here], factor[..., here, here], rounding)
            remaining[..., stop:] -= errors @ factor[..., here, stop:]
        return [self._pack(codes, salient, scales, expert) for expert in range(len(codes))]

    def choose_salient(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Salient weights among `(..., out, in)`, bool (section 3.2.1)."""
        saliency = weight.abs()
        if self.criterion == "hessian":
            saliency /= saliency_denominator(factor, self.saliency_rule).unsqueeze(-2)
        width = weight.shape[-1] if self.selection == "matrix" else self.block_size
        parts = saliency.split(width, dim=-1)
        chosen = [largest(part.flatten(-2), self.salient_share).unflatten(-1, part.shape[-2:]) for part in parts]
        return torch.cat(chosen, dim=-1)

    def fit_scales(self, weight: Tensor, salient: Tensor) -> Scales:
        """Scales of weights `(..., out, in)`, rounded as they will be stored."""
        groups = split_groups(weight, self.group_size)
        others = split_groups((~salient).float(), self.group_size)  # zero in the padding of the last group
        counted = others if self.fit_on == "own" else split_groups(torch.ones_like(weight), self.group_size)
        row_scale, mean = fit_signs(groups, others, counted, self.mean)
        grid = fit_grid(weight * salient if self.fit_on == "own" else weight, self.salient_bits, self.group_size)
        return Scales(row_scale, mean, *grid)

    def _rounding(self, salient: Tensor, scales: Scales, group: int) -> RoundColumn:
        """How columns of one group are rounded; `salient` is that of their span, `(..., out, width)`."""
        here = slice(group, group + 1)
        alpha, scale, zero = (t[..., here].mT.contiguous() for t in (scales.row_scale, scales.scale, scales.zero))
        mean = torch.zeros_like(alpha) if scales.mean is None else scales.mean[..., here].mT.contiguous()
        chosen = salient.mT.contiguous()

        def to_grid_or_sign(j: int, column: Tensor) -> tuple[Tensor, Tensor]:
            code, positive = nearest_code(column, scale, zero, self.salient_bits), column >= mean  # sign(0) = +1, eq. 1
            own = chosen[..., j : j + 1, :]
            value = torch.where(own, (code - zero) * scale, torch.where(positive, mean + alpha, mean - alpha))
            return torch.where(own, code, positive.float()), value

        return to_grid_or_sign

    def _pack(self, codes: Tensor, salient: Tensor, scales: Scales, expert: int) -> PartialBinary:
        return PartialBinary.pack(
            codes[expert],
            salient[expert],
            scales.row_scale[expert],
            None if scales.mean is None else scales.mean[expert],
            scales.scale[expert],
            scales.zero[expert],
            bits=self.salient_bits,
            group_size=self.group_size,
        )
