"""Saliency-guided mixed-order binarization (appendix B.3.3, Algorithm 3), all experts of a bank at once.

    V ≈ diag(r1) B1 diag(c1) + diag(r2) B2 diag(c2) on salient columns,   B1 = sign(V), B2 = sign(V - first term)

The scales are alternating least squares (eq. 46). In scope "block" each run of 128 columns has its own row scales, and
its error is handed on to the columns that follow (as ARB-LLM, which section 5.1 says MoBiE follows); in scope "matrix"
there is one set of scales and no hand-over, as Algorithm 3 is printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobie.methods.hessian import Feedback, handed_on
from mobie.packing.binary import BinaryMatrix, Segment, to_half

EPSILON = 1e-8  # B.3.3, implementation note 2


@dataclass(frozen=True)
class Plane:
    """One order: `signs (experts, rows, in)` ±1, `row (experts, rows, blocks)`, `column (experts, in)`.

    Outside its columns a plane has zero column scales.
    """

    signs: Tensor
    row: Tensor
    column: Tensor

    def dense(self, block_size: int) -> Tensor:
        """Values `(experts, rows, in)` from the scales as they are stored, in float16."""
        row = to_half(self.row).float().repeat_interleave(block_size, dim=2)[..., : self.signs.shape[2]]
        return row * self.signs * to_half(self.column).float()[:, None]

    def scaled(self, row: Tensor, column: Tensor) -> Plane:
        """The plane with scales multiplied by `row (experts, rows)` and `column (experts, in)` (eq. 11)."""
        return Plane(self.signs, self.row * row[..., None], self.column * column)


def times_columns(matrices: Tensor, columns: Tensor) -> Tensor:
    """`matrices (experts, rows, n)` times one vector each, `(experts, n)` → `(experts, rows)`.

    The vector stands on the left of the transpose: on the right, a CPU's library rounds differently for other numbers
    of experts, and is slower.
    """
    return (columns[:, None] @ matrices.mT).squeeze(1)


def fit_scales(
    projected: Tensor, columns: Tensor, row_weights: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Least-squares row and column scales by alternation, eq. 46.

    Args:
        projected: `V ∘ B`, `(experts, rows, n)`.
        columns: mask `(experts, n)`; sums run over these columns only.
        row_weights: `(rows,)`, weight of each row's squared error.

    Returns:
        row `(experts, rows)` and column `(experts, n)` scales; columns outside the mask get 0. The scales are balanced
        so that the mean column scale is one, which suits float16.
    """
    inside = columns.float()
    column = inside.clone()
    row = projected.new_ones(projected.shape[:2])
    running = torch.ones(len(row), 1, dtype=torch.bool, device=row.device)  # an expert stops where it has converged
    for _ in range(iterations):
        before = row, column
        row = times_columns(projected, column) / (column.square().sum(-1, keepdim=True) + EPSILON)
        weighted = row * row_weights
        column = inside * (weighted[:, None] @ projected).squeeze(1)
        column = column / ((weighted * row).sum(-1, keepdim=True) + EPSILON)
        row, column = (torch.where(running, new, old) for new, old in zip((row, column), before, strict=True))
        change = [
            ((new - old).abs() / (old.abs() + EPSILON)).amax(-1, keepdim=True)
            for new, old in zip((row, column), before, strict=True)
        ]
        running = running & ~(torch.maximum(*change) < tolerance)
        if not running.any():
            break
    balance = column.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
    safe = torch.where(balance > 0, balance, 1.0)
    return row * safe, column / safe


def _sign(values: Tensor) -> Tensor:
    return torch.where(values >= 0, 1.0, -1.0)  # eq. 3: sign(0) = +1


def binarize(
    weight: Tensor,
    salient: Tensor,
    factor: Tensor | None,
    *,
    feedback: Feedback,
    block_size: int,
    row_weights: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Plane, Plane]:
    """Algorithm 3 over blocks of columns.

    Args:
        weight: `(experts, rows, in)`.
        salient: `(experts, in)` bool, columns of second order.
        factor: U `(experts, in, in)` with H⁻¹ = UᵀU, for handing the error of a block on; None for none.
        feedback: how the error is handed on.

    Returns:
        First-order plane over all columns, second-order plane over the salient ones.
    """
    work = weight.clone()
    everywhere = torch.ones_like(salient)
    signs: tuple[list[Tensor], ...] = ([], [])
    rows: tuple[list[Tensor], ...] = ([], [])
    columns: tuple[list[Tensor], ...] = ([], [])
    for start in range(0, weight.shape[2], block_size):
        block = slice(start, start + block_size)
        target = work[..., block]
        approximation = torch.zeros_like(target)
        for order, mask in enumerate((everywhere[:, block], salient[:, block])):
            residual = target - approximation
            sign = _sign(residual)
            row, column = fit_scales(residual * sign, mask, row_weights, iterations, tolerance)
            approximation = approximation + Plane(sign, row[..., None], column).dense(block_size)
            signs[order].append(sign)
            rows[order].append(row)
            columns[order].append(column)
        if factor is not None:
            work[..., block.stop :] -= handed_on(target - approximation, factor, block, feedback)
    first, second = (Plane(torch.cat(signs[k], 2), torch.stack(rows[k], 2), torch.cat(columns[k], 1)) for k in range(2))
    return first, second


def pack(first: Plane, second: Plane, salient: Tensor, block_size: int) -> tuple[BinaryMatrix, ...]:
    """One `BinaryMatrix` per expert, the second plane as a residual on the salient columns."""
    size = tuple(first.signs.shape[1:])
    packed = []
    for e, mask in enumerate(salient):
        plain, extra = (
            Segment.pack(
                plane.signs[None, e][..., chosen],
                plane.row[None, None, e],
                column_scale=plane.column[None, None, e][..., chosen],
            )
            for plane, chosen in ((first, slice(None)), (second, mask.nonzero().flatten()))
        )
        packed.append(BinaryMatrix.build(size, block_size, mask, plain, extra if mask.any() else None, True))
    return tuple(packed)
