"""How a block of columns is split: salient columns, and two magnitude groups, searched by error.

The error of a split is that of binarizing its parts with the closed-form fit (`binary_fit.fit_means`), in place of the
method's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mobie.methods.binary_fit import Groups, divide

#: quantiles of the magnitudes that are tried as border between the two groups
BORDERS = tuple(i / 100 for i in range(10, 91))

#: elements, over all candidates of a search, that are worked on at a time: by the core's cache, by the GPU's memory
CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


@dataclass(frozen=True)
class Split:
    """How a block is divided: `salient` columns `(n,)` bool; larger magnitudes, `second_group` `(out, n)` bool."""

    salient: Tensor
    second_group: Tensor


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
