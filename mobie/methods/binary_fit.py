"""Parts of a matrix binarized with scales: their values, the closed-form fit, and blocks put together to be stored.

value[i, j] = mean[g, i] + Σ_k row_scale[k, g, i] · column_scale[k, g, j] · sign[k, i, j]     g: magnitude group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mobie.packing.binary import BinaryMatrix, Segment, to_half


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


def _stored(scales: Tensor) -> Tensor:
    return to_half(scales).float()
