"""The skeleton that BiLLM and ARB-LLM share: blocks of columns, salient columns, magnitude groups, error feedback.

W: weights (out, in)   H: Hessian of the inputs (in, in)   U: upper triangular with H⁻¹ = UᵀU   s: saliency (w / d)²

A block of 128 columns is split into salient columns and two magnitude groups of the rest, its parts are binarized by
the method's own fit, and the error is handed on to the columns behind the block; inside a block nothing is updated. The
splits are searched by error, with the closed-form fit in place of the method's own.

Two parts of MoBiE can be plugged in (section B.4.7): GLAS as the source of the saliency, and NGES, which multiplies the
rows and columns of a binarized Ŵ by factors β_r and β_c:

    β_r · (mu + Σ_k alpha_k · B_k) · β_c

β_r goes into the row scales and the means. β_c goes into the column scales of ARB-RC; BiLLM, ARB and ARB-X have none,
and a mean is not scaled by column, so there β_c is stored by itself, 16 bits for each column.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mobie.errors import ConfigError, DataError
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.methods.hessian import (
    Feedback,
    SaliencyRule,
    damp,
    handed_on,
    inverse_cholesky,
    saliency_denominator,
    scaled_saliency_denominator,
)
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed
from mobie.packing.binary import BinaryMatrix, Segment, to_half

#: quantiles of the magnitudes that are tried as border between the two groups
BORDERS = tuple(i / 100 for i in range(10, 91))

#: elements, over all candidates of a search, that are worked on at a time: by the core's cache, by the GPU's memory
CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


@dataclass(frozen=True)
class Fit:
    """n columns of one block, binarized.

    signs: `(order, out, n)` ±1.  row_scale: `(order, groups, out)`.  mean: `(groups, out)` or None.
    column_scale: `(order, groups, n)` or None.  second_group: `(out, n)` bool, None with one group.
    """

    signs: Tensor
    row_scale: Tensor
    mean: Tensor | None = None
    column_scale: Tensor | None = None
    second_group: Tensor | None = None

    def dense(self) -> Tensor:
        """Values `(out, n)`, with the scales as they will be stored, in float16."""
        groups = Groups(self.signs[0], self.second_group)
        dense = torch.zeros_like(self.signs[0]) if self.mean is None else groups.rows(_stored(self.mean))
        for k, signs in enumerate(self.signs):
            scale = _stored(self.row_scale[k])[..., None]  # (groups, out, 1)
            if self.column_scale is not None:
                scale = scale * _stored(self.column_scale[k])[:, None]
            dense = dense + groups.select(scale) * signs
        return dense

    def scaled(self, row: Tensor, column: Tensor) -> Fit:
        """The fit times `row` `(out,)` and, where it has column scales, times `column` `(n,)`."""
        return replace(
            self,
            row_scale=self.row_scale * row,
            mean=None if self.mean is None else self.mean * row,
            column_scale=None if self.column_scale is None else self.column_scale * column,
        )


@dataclass(frozen=True)
class Split:
    """How a block is divided: `salient` columns `(n,)` bool; larger magnitudes, `second_group` `(out, n)` bool."""

    salient: Tensor
    second_group: Tensor


@dataclass(frozen=True)
class Binarization:
    """A matrix `(out, in)` binarized block by block, its scales not rounded yet.

    salient:      `(in,)` bool.
    plain, extra: a fit per block, of the columns that are not salient and of those that are.
    """

    salient: Tensor
    plain: tuple[Fit, ...]
    extra: tuple[Fit, ...]

    def dense(self) -> Tensor:
        """Values `(out, in)`, with the scales as they will be stored, in float16."""
        dense = torch.empty(self.plain[0].signs.shape[1], len(self.salient), device=self.salient.device)
        dense[:, ~self.salient] = torch.cat([fit.dense() for fit in self.plain], dim=1)
        dense[:, self.salient] = torch.cat([fit.dense() for fit in self.extra], dim=1)
        return dense

    def pack(self, block_size: int, factors: tuple[Tensor, Tensor] | None = None) -> BinaryMatrix:
        """Round and pack it, times factors β_r `(out,)` and β_c `(in,)` where given."""
        plain, extra, column_factor = self.plain, self.extra, None
        if factors is not None:
            row, column = factors
            plain, extra = _scaled(plain, row, column[~self.salient]), _scaled(extra, row, column[self.salient])
            column_factor = column if plain[0].column_scale is None else None
        size = (plain[0].signs.shape[1], len(self.salient))
        segments = (join_fits(plain), join_fits(extra))
        return BinaryMatrix.build(size, block_size, self.salient, *segments, False, column_factor)


def _scaled(fits: Sequence[Fit], row: Tensor, column: Tensor) -> tuple[Fit, ...]:
    pieces = column.split([fit.signs.shape[2] for fit in fits])
    return tuple(fit.scaled(row, piece) for fit, piece in zip(fits, pieces, strict=True))


def join_fits(fits: Sequence[Fit]) -> Segment:
    """Put the blocks of a segment side by side and pack them."""
    column_scale = None if fits[0].column_scale is None else torch.cat([f.column_scale for f in fits], dim=-1)
    second_group = None if fits[0].second_group is None else torch.cat([f.second_group for f in fits], dim=-1)
    return Segment.pack(
        torch.cat([f.signs for f in fits], dim=-1),
        torch.stack([f.row_scale for f in fits], dim=-1),
        None if fits[0].mean is None else torch.stack([f.mean for f in fits], dim=-1),
        column_scale,
        second_group,
    )


def sign(values: Tensor) -> Tensor:
    """±1, +1 for zero of either sign."""
    return torch.ones_like(values).copysign(values + 0.0)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 where the denominator is 0: an empty group or a part that is zero."""
    empty = denominator == 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)


class Groups:
    """The magnitude groups of a part `(out, n)`: sums over them, and values given back to their elements.

    Masks are numbers, 0 and 1: on a CPU, choosing by boolean masks is many times slower than arithmetic.
    """

    def __init__(self, weights: Tensor, second_group: Tensor | None) -> None:
        members = [weights.new_ones(weights.shape)]
        if second_group is not None:
            members = [(~second_group).to(weights.dtype), second_group.to(weights.dtype)]
        self.masks = torch.stack(members)  # (groups, out, n)
        self.counts = self.masks.sum(-1)  # (groups, out)

    def row_sum(self, values: Tensor) -> Tensor:
        """`(out, n)` → `(groups, out)`."""
        return torch.stack([(values * mask).sum(-1) for mask in self.masks])

    def row_mean(self, values: Tensor) -> Tensor:
        """`(out, n)` → `(groups, out)`, 0 for an empty group."""
        return divide(self.row_sum(values), self.counts)

    def column_sum(self, values: Tensor) -> Tensor:
        """`(out, n)` → `(groups, n)`."""
        return torch.stack([(values * mask).sum(0) for mask in self.masks])

    def select(self, per_group: Tensor) -> Tensor:
        """Each element's own group's value; `per_group` `(groups, …)` broadcasts to `(groups, out, n)`."""
        if len(per_group) == 1:
            return per_group[0]
        return torch.lerp(per_group[0], per_group[1], self.masks[1])  # exact at weights 0 and 1

    def rows(self, per_row: Tensor) -> Tensor:
        """`(groups, out)` → each element's own group's value, `(out, n)`; `(out, 1)` with one group."""
        return self.select(per_row[..., None])


def fit_means(weights: Tensor, second_group: Tensor | None, order: int) -> Fit:
    """Residual binarization in closed form (BiLLM, section 3.2), least squares in mean and scale for given signs.

    Each order takes, per row and group, `mu + alpha · sign(r - mu)` of the residual r, with mu its mean and alpha its
    mean absolute deviation. The orders' means add up.

    Args:
        weights: `(out, n)`.
        second_group: `(out, n)` bool; None is one group.
    """
    groups = Groups(weights, second_group)
    residual = weights
    mean = torch.zeros_like(groups.counts)
    signs, scales = [], []
    for _ in range(order):
        mu = groups.row_mean(residual)
        residual = residual - groups.rows(mu)
        signs.append(sign(residual))
        scales.append(groups.row_mean(residual.abs()))
        residual = residual - groups.rows(scales[-1]) * signs[-1]
        mean = mean + mu
    return Fit(torch.stack(signs), torch.stack(scales), mean, None, second_group)


def split_errors(values: Tensor, upper: Tensor, order: int) -> Tensor:
    """Squared errors of candidate splits of the columns, each side of a split fitted as by `fit_means`.

    Args:
        values: `(out, n)`.
        upper: which columns are on the upper side, `(candidates, n)` bool; or which elements, `(candidates, out, n)`.

    Returns:
        `(candidates,)`.
    """
    step = max(1, CHUNK_ELEMENTS[values.device.type] // max(1, values.numel()))
    chunk_errors = _column_split_errors if upper.dim() == 2 else _element_split_errors
    return torch.cat([chunk_errors(values, chunk, order) for chunk in upper.split(step)])


def _column_split_errors(values: Tensor, upper: Tensor, order: int) -> Tensor:
    sides = torch.stack((~upper, upper), dim=1).to(values.dtype)  # (candidates, 2, n)
    averaging = (sides / sides.sum(-1, keepdim=True).clamp(min=1)).mT
    residual = values.repeat(len(upper), 1, 1)
    for _ in range(order):
        residual.sub_(residual @ averaging @ sides)
        _subtract_signs(residual, residual.abs() @ averaging @ sides)
    return residual.square_().sum((1, 2))


def _element_split_errors(values: Tensor, upper: Tensor, order: int) -> Tensor:
    out, n = values.shape
    groups = Groups(values.repeat(len(upper), 1), upper.reshape(-1, n))
    residual = values.repeat(len(upper), 1)
    for _ in range(order):
        residual.sub_(groups.rows(groups.row_mean(residual)))
        _subtract_signs(residual, groups.rows(groups.row_mean(residual.abs())))
    return residual.square_().view(-1, out * n).sum(1)


def _subtract_signs(residual: Tensor, scale: Tensor) -> None:
    """Take `scale · sign(residual)` off the residual, in its own memory; `scale` is lost."""
    residual.add_(0.0)  # zero of either sign becomes +0
    residual.sub_(scale.copysign_(residual))


def border_errors(values: Tensor, borders: Tensor) -> Tensor:
    """Squared first-order errors of splitting by `|value| >= border`, for all borders at once.

    In a sorted row the smaller magnitudes are a run, and cumulative sums give every mean and every mean absolute
    deviation: the deviations above a mean are half of all.

    Args:
        values: `(out, n)`.
        borders: `(candidates,)`, not negative.

    Returns:
        `(candidates,)` float64.
    """
    ordered = values.sort(-1).values.double()
    sums = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))  # (out, n + 1): sums[:, k] of the first k
    borders = borders.double().expand(len(values), -1).contiguous()
    first = torch.searchsorted(ordered, -borders, right=True)  # the smaller magnitudes are first … last - 1
    last = torch.maximum(torch.searchsorted(ordered, borders), first)

    def inside(start: Tensor) -> tuple[Tensor, Tensor]:  # count and sum of the smaller magnitudes from `start` on
        start = torch.minimum(torch.maximum(start, first), last)
        return last - start, sums.gather(1, last) - sums.gather(1, start)

    def everything(start: Tensor) -> tuple[Tensor, Tensor]:
        return values.shape[1] - start, sums[:, -1:] - sums.gather(1, start)

    def outside(start: Tensor) -> tuple[Tensor, Tensor]:
        (count, total), (inner_count, inner_total) = everything(start), inside(start)
        return count - inner_count, total - inner_total

    def captured(side: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        count, total = side(torch.zeros_like(first))
        mean = divide(total, count)
        count_above, total_above = side(torch.searchsorted(ordered, mean, right=True))
        deviation = divide(2 * (total_above - mean * count_above), count)
        return count * (mean.square() + deviation.square())

    return ordered.square().sum() - (captured(inside) + captured(outside)).sum(0)


def search_salient(values: Tensor, saliency: Tensor, most: int) -> Tensor:
    """Salient columns `(n,)` bool: those of largest total saliency, as many of 1 … `most` as give the least error.

    The error is that of binarizing the salient columns and the others with second order each.

    Args:
        values: `(out, n)`, what the error is measured on.
        saliency: `(out, n)`, what the columns are ranked by.
    """
    columns = values.shape[1]
    ranking = saliency.sum(0).argsort(descending=True, stable=True)
    counts = torch.arange(1, min(most, columns) + 1, device=values.device)
    upper = torch.arange(columns, device=values.device) < counts[:, None]
    best = split_errors(values[:, ranking], upper, order=2).argmin()
    salient = torch.zeros(columns, dtype=torch.bool, device=values.device)
    salient[ranking[: counts[best]]] = True
    return salient


def border_candidates(magnitudes: Tensor) -> Tensor:
    """The 81 quantiles 0.10 … 0.90 of magnitudes of any shape; zeros if there are none."""
    quantiles = magnitudes.new_tensor(BORDERS)
    return torch.quantile(magnitudes.flatten(), quantiles) if magnitudes.numel() else torch.zeros_like(quantiles)


@dataclass(frozen=True)
class BinaryMethod(Method):
    """What BiLLM and ARB-LLM have in common.

    block_size:      columns that are split, binarized and scaled together.
    percdamp:        damping of the Hessian, as a share of its mean diagonal.
    saliency_rule:   w² over the square of U_jj ("cholesky_diagonal", as released) or of [H⁻¹]_jj ("inverse_diagonal").
    saliency_source: Hessian in the saliency: of the layer's inputs ("local"), or weighted by loss gradients, one per
                     contiguous group of output rows ("guided", GLAS). Error feedback always uses the local one.
    gradient_groups: number of those groups of rows.
    max_salient:     most salient columns in a block.
    search_on:       errors of the searches are those of the "saliency" matrix, as released, or of the "weights", as
                     BiLLM's Algorithm 2 is printed.
    feedback:        what later columns take up: (W - Ŵ) / diag U times U ("diagonal", as released), the least-squares
                     answer (W - Ŵ) U_block⁻¹ U ("triangular"), or nothing ("none").
    nges:            whether binarized expert projections are modulated by NGES (eqs. 12, 49 and 50), with the null
                     space of the inputs of all tokens of the layer. As in MoBiE, attention, shared experts and the
                     router, which stays in 16 bits, are not.
    null_space_energy, regularization (λ), nges_iterations, tolerance: of NGES, as MoBiE's.
    """

    guided_by: ClassVar[tuple[str, Any]] = ("saliency_source", "guided")
    stores_signs: ClassVar[bool] = True

    block_size: int = 128
    percdamp: float = 0.01
    saliency_rule: SaliencyRule = "cholesky_diagonal"
    saliency_source: Literal["local", "guided"] = "local"
    gradient_groups: int = 4
    max_salient: int = 49
    search_on: Literal["saliency", "weights"] = "saliency"
    feedback: Feedback = "diagonal"
    nges: bool = False
    null_space_energy: float = 0.1
    regularization: float = 0.2
    nges_iterations: int = 15
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        for option in ("block_size", "gradient_groups", "max_salient", "nges_iterations"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{self.name}: {option} is {getattr(self, option)}; expected at least 1")
        if not 0 <= self.percdamp < float("inf"):
            raise ConfigError(f"{self.name}: percdamp is {self.percdamp}; expected a number of at least 0 (0.01)")
        for option in ("null_space_energy", "regularization"):
            if not getattr(self, option) > 0:
                raise ConfigError(f"{self.name}: {option} is {getattr(self, option)}; expected more than 0")

    @property
    def splits_salient(self) -> bool:
        """Whether salient columns have two magnitude groups as well."""
        return False

    @abstractmethod
    def fit_block(self, weights: Tensor, split: Split, gram: Tensor) -> tuple[Fit, Fit]:
        """Binarize a block `(out, n)`: first order for its columns that are not salient, second for those that are.

        `gram` `(n, n)` is the block's own part of the Hessian of the inputs, not damped.
        """

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        return self.quantize_group({"": weight}, {"": stats})[""]

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        found = self._binarize(weights, stats)
        return {name: binarized.pack(self.block_size) for name, binarized in found.items()}

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, PackedBank]:
        if not self.nges:
            return super().quantize_experts(bank, stats)
        from mobie.methods.mobie.nges import null_space_projector  # here: its package imports this module

        packed: dict[str, PackedBank] = {}
        for names in bank.same_input:
            hessian = stats.pooled[names[0]].hessian.to(bank.working_devices[0])
            projector = null_space_projector(hessian, self.null_space_energy)
            packed |= self.quantize_chunks(bank, stats, names, partial(self._suppress_shift, projector=projector))
        return {name: packed[name] for name in bank.projections}

    def _suppress_shift(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]], projector: Tensor
    ) -> list[dict[str, Packed]]:
        """Binarize experts and fuse NGES's factors for the projector P `(in, in)` (eq. 11)."""
        from mobie.methods.mobie.nges import suppress_shift

        packed: list[dict[str, Packed]] = []
        for e, own in enumerate(stats):
            packed.append({})
            dead = next(iter(own.values())).hessian.diagonal() == 0
            for name, binarized in self._binarize({n: weight[e] for n, weight in weights.items()}, own).items():
                row, column = suppress_shift(
                    weights[name][e].float().masked_fill(dead, 0)[None],
                    binarized.dense()[None],
                    projector.to(dead.device),
                    self.regularization,
                    self.nges_iterations,
                    self.tolerance,
                )
                packed[-1][name] = binarized.pack(self.block_size, (row[0], column[0]))
        return packed

    def _binarize(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Binarization]:
        """Binarize weights `(out, in)` that share their input, and so its Hessian."""
        hessian = stats[next(iter(weights))].hessian
        damped, dead = damp(hessian, self.percdamp)
        factor = inverse_cholesky(damped)
        return {
            name: self._binarize_one(weight.float().masked_fill(dead, 0), stats[name], hessian, factor)
            for name, weight in weights.items()
        }

    def _binarize_one(self, remaining: Tensor, stats: LinearStats, hessian: Tensor, factor: Tensor) -> Binarization:
        """Binarize `remaining` `(out, in)`, which is lost; U is the factor of the damped Hessian."""
        rows, columns = remaining.shape
        denominators = self._denominators(factor, stats, rows)  # (out or 1, in)
        masks, plain, extra = [], [], []
        for start in range(0, columns, self.block_size):
            here = slice(start, start + self.block_size)
            block = remaining[:, here]
            split = self.split_block(block, (block / denominators[:, here]).square())
            fits = self.fit_block(block, split, hessian[here, here])
            dense = torch.empty_like(block)
            dense[:, ~split.salient], dense[:, split.salient] = (fit.dense() for fit in fits)
            remaining[:, here.stop :] -= handed_on(block - dense, factor, here, self.feedback)
            masks.append(split.salient)
            plain.append(fits[0])
            extra.append(fits[1])
        return Binarization(torch.cat(masks), tuple(plain), tuple(extra))

    def split_block(self, weights: Tensor, saliency: Tensor) -> Split:
        """Choose the salient columns and the magnitude groups of a block.

        The border between the groups is a quantile of the rest's magnitudes with zeros in place of the salient columns.
        Salient columns that are split too have a border of their own, a quantile of their magnitudes other than zero.

        Args:
            weights, saliency: `(out, n)`.
        """
        values = saliency if self.search_on == "saliency" else weights
        values = divide(values, values.abs().max())  # errors are squared again: keep them within float32
        salient = search_salient(values, saliency, self.max_salient)
        magnitudes = values.abs()
        borders = border_candidates(magnitudes * ~salient)
        upper = magnitudes >= borders[border_errors(values[:, ~salient], borders).argmin()]
        if self.splits_salient:
            own = magnitudes[:, salient]
            candidates = own >= border_candidates(own[own != 0])[:, None, None]
            upper[:, salient] = candidates[split_errors(values[:, salient], candidates, order=2).argmin()]
        return Split(salient, upper)

    def _denominators(self, factor: Tensor, stats: LinearStats, rows: int) -> Tensor:
        if self.saliency_source == "local":
            return saliency_denominator(factor, self.saliency_rule)[None]
        if stats.guided is None:
            raise DataError(
                f"{self.name}: saliency_source 'guided' needs Hessians weighted by loss gradients, got none; calibrate "
                "with gradients, or use saliency_source 'local'"
            )
        per_group = scaled_saliency_denominator(stats.guided, self.saliency_rule, self.percdamp)  # (groups, in)
        runs = torch.arange(rows, device=per_group.device).tensor_split(len(per_group))
        return torch.cat([row.expand(len(run), -1) for row, run in zip(per_group, runs, strict=True)])


def _stored(scales: Tensor) -> Tensor:
    return to_half(scales).float()
