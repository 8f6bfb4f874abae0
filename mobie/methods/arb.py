"""ARB-LLM (Li et al. 2024, arXiv 2410.03129): alternating refinement of a binarization, block by block as in BiLLM.

    arb      mu + Σ_k alpha_k · B_k                      means, scales and signs in turn, against the weights
    arb-x    the same, then means and scales in turn against the outputs: r S rᵀ of a row's error r, S the block's XᵀX
    arb-rc   Σ_k (row factor)_k · (column factor)_k · B_k    no mean

Row r of a part (plain or salient) has mu and alpha per magnitude group. With `column_group_bitmap` the salient columns
have two magnitude groups too; ARB-LLM is `arb-rc` with it.

The searches are BiLLM's for every refinement. (The authors' implementation of `arb-x` picks the border of the plain
groups by an error weighted with S; the others are as here.) Least-squares steps divide by the exact sums; where these
are zero the scale is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mobie.errors import ConfigError
from mobie.methods.base import register
from mobie.methods.binary_common import BinaryMethod
from mobie.methods.binary_fit import Fit, Groups, divide, fit_means, sign
from mobie.methods.split_search import Split


def nearest_signs(target: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (B1, B2) for which `B1 · first + B2 · second` is nearest to `target`, of the four, elementwise.

    The larger term takes the side of the target, the smaller one the side of what is then left.

    Args:
        target: `(out, n)`.
        first, second: scales of either sign, broadcast to it.
    """
    side, first_side, second_side = sign(target), sign(first), sign(second)
    left_by_first = sign(target - side * first.abs())
    left_by_second = sign(target - side * second.abs())
    second_larger = (first.abs() < second.abs()).to(target.dtype)
    return (
        torch.lerp(side, left_by_second, second_larger) * first_side,
        torch.lerp(left_by_first, side, second_larger) * second_side,
    )


def refine_means(weights: Tensor, start: Fit, iterations: int) -> Fit:
    """ARB (Algorithms 1 and 2 of the paper): mean, then scales in turn, then signs, each the best for the others.

    Args:
        weights: `(out, n)`.
        start: its binarization with means, of first or second order.
    """
    groups = Groups(weights, start.second_group)
    mean, scales, signs = start.mean, list(start.row_scale), list(start.signs)

    def terms() -> list[Tensor]:
        return [groups.rows(scale) * b for scale, b in zip(scales, signs, strict=True)]

    for _ in range(iterations):
        mean = groups.row_mean(weights - sum(terms()))
        centred = weights - groups.rows(mean)
        if len(signs) == 1:
            scales = [groups.row_mean(signs[0] * centred)]
            signs = [sign(centred)]
        else:
            scales[0] = groups.row_mean(signs[0] * (centred - terms()[1]))
            scales[1] = groups.row_mean(signs[1] * (centred - terms()[0]))
            signs = list(nearest_signs(centred, groups.rows(scales[0]), groups.rows(scales[1])))
    return replace(start, signs=torch.stack(signs), row_scale=torch.stack(scales), mean=mean)


def refine_on_inputs(
    directions: Tensor, coefficients: Tensor, targets: Tensor, gram: Tensor, coupled: Tensor, iterations: int
) -> Tensor:
    """ARB-X: coefficients in turn, each the minimum of the output error `r S rᵀ` for the others, signs fixed.

    Args:
        directions: `(terms, out, n)`; a row of weights is approximated by their sum, times the coefficients.
        coefficients: `(terms, out)`, where to start.
        targets: `(terms, out, n)`, the weights that each term has to explain.
        gram: S, `(n, n)`.
        coupled: `(terms, terms)` bool, which terms share an error.

    Returns:
        Coefficients `(terms, out)`; a term that no input sees, up to rounding, stays as it is.
    """
    directions, gram = directions.double(), gram.double()
    weighted = directions @ gram
    products = torch.einsum("ton,son->tso", weighted, directions) * coupled[..., None]
    wanted = (weighted * targets).sum(-1)
    seen = directions.square() @ gram.diagonal()  # (terms, out), what the inputs' powers alone would give
    own = products.diagonal().T
    own = own * (own > 1e-6 * seen)
    current = coefficients.to(torch.float64, copy=True)
    for _ in range(iterations):
        for t in range(len(current)):
            current[t] += divide(wanted[t] - (products[t] * current).sum(0), own[t])
    return current.to(coefficients.dtype)


def fit_row_column(weights: Tensor, second_group: Tensor | None, order: int, iterations: int) -> Fit:
    """ARB-RC (Algorithm 3 of the paper): row and column factors without a mean, by alternating least squares.

    Start of each order, on what the order before leaves over: row factor `mean |r|`, column factor `mean |r / row|`.
    With one order the signs stay as they are; with two, both are chosen anew after each pass.

    Args:
        weights: `(out, n)`.
    """
    groups = Groups(weights, second_group)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    signs: list[Tensor] = []

    def scale(k: int) -> Tensor:  # (out, n)
        return groups.select(rows[k][..., None] * columns[k][:, None])

    residual = weights
    for k in range(order):
        rows.append(groups.row_mean(residual.abs()))
        row = groups.rows(rows[k]).expand_as(weights)
        present = (row != 0).to(weights.dtype)  # an all-zero row says nothing about columns
        columns.append(divide(groups.column_sum(divide(residual.abs(), row)), groups.column_sum(present)))
        signs.append(sign(residual))
        residual = residual - scale(k) * signs[k]

    for _ in range(iterations):
        for k in range(order):
            target = weights if order == 1 else weights - scale(1 - k) * signs[1 - k]
            target = target * signs[k]
            column = groups.select(columns[k][:, None]).expand_as(weights)
            rows[k] = divide(groups.row_sum(target * column), groups.row_sum(column.square()))
            row = groups.rows(rows[k]).expand_as(weights)
            columns[k] = divide(groups.column_sum(target * row), groups.column_sum(row.square()))
        if order == 2:
            signs = list(nearest_signs(weights, scale(0), scale(1)))
    return Fit(torch.stack(signs), torch.stack(rows), None, torch.stack(columns), second_group)


@register
@dataclass(frozen=True)
class ARB(BinaryMethod):
    """ARB-LLM.

    refinement:          see the head of this file.
    column_group_bitmap: whether the salient columns are split into two magnitude groups as well.
    iterations:          passes of the refinement; `arb-x` makes as many again against the outputs.
    x_scope:             error that `arb-x` lowers: each magnitude group's alone ("group", as released), or that of the
                         whole block with what the groups do to each other ("block").
    """

    name: ClassVar[str] = "arb"
    seconds_per_weight: ClassVar[float] = 1.4e-6
    stored_bits: ClassVar[float] = 3.2

    refinement: Literal["arb", "arb-x", "arb-rc"] = "arb-rc"
    column_group_bitmap: bool = True
    iterations: int = 15
    x_scope: Literal["group", "block"] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise ConfigError(f"{self.name}: iterations is {self.iterations}; expected at least 0 (15)")

    @property
    def splits_salient(self) -> bool:
        return self.column_group_bitmap

    def fit_block(self, weights: Tensor, split: Split, gram: Tensor) -> tuple[Fit, Fit]:
        rest, salient = ~split.salient, split.salient
        plain = self._fit(weights[:, rest], split.second_group[:, rest], order=1)
        second_group = split.second_group[:, salient] if self.column_group_bitmap else None
        extra = self._fit(weights[:, salient], second_group, order=2)
        return (plain, extra) if self.refinement != "arb-x" else self._refine_x(weights, split, plain, extra, gram)

    def _fit(self, weights: Tensor, second_group: Tensor | None, order: int) -> Fit:
        if self.refinement == "arb-rc":
            return fit_row_column(weights, second_group, order, self.iterations)
        return refine_means(weights, fit_means(weights, second_group, order), self.iterations)

    def _refine_x(self, weights: Tensor, split: Split, plain: Fit, extra: Fit, gram: Tensor) -> tuple[Fit, Fit]:
        """Refine the means and scales of both parts of a block `(out, n)` against its inputs."""
        directions, coefficients = [], []  # of each group: its members, then its signs; its mean, then its scales
        for fit, columns in ((plain, ~split.salient), (extra, split.salient)):
            assert fit.mean is not None  # of `refine_means`
            for g, mask in enumerate(Groups(fit.signs[0], fit.second_group).masks):
                terms = weights.new_zeros(1 + len(fit.signs), *weights.shape)
                terms[..., columns] = torch.cat((mask[None], fit.signs * mask))
                directions.append(terms)
                coefficients.append(torch.cat((fit.mean[g, None], fit.row_scale[:, g])))
        sizes = [len(terms) for terms in directions]
        if self.x_scope == "group":
            targets = torch.cat([(weights * terms[0]).expand_as(terms) for terms in directions])
            coupled = torch.block_diag(*(gram.new_ones(size, size) for size in sizes)).bool()
        else:
            targets = weights.expand(sum(sizes), *weights.shape)
            coupled = gram.new_ones(sum(sizes), sum(sizes), dtype=torch.bool)
        refined = refine_on_inputs(
            torch.cat(directions), torch.cat(coefficients), targets, gram, coupled, self.iterations
        ).split(sizes)
        assert plain.mean is not None
        count = plain.mean.shape[0]
        return _with_coefficients(plain, refined[:count]), _with_coefficients(extra, refined[count:])


def _with_coefficients(fit: Fit, groups: Sequence[Tensor]) -> Fit:
    """`fit` with mean and scales from each group's `(1 + order, out)`."""
    mean = torch.stack([group[0] for group in groups])
    return replace(fit, mean=mean, row_scale=torch.stack([group[1:] for group in groups], dim=1))
