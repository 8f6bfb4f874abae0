"""Null-space Guided Expert-shift Suppression (section 4.3, appendix B.1.3 and Algorithm 4).

P: projector onto directions that inputs hardly use.  The binarized weight Ŵ is modulated by one factor per row and one
per column, β_r and β_c, so that the part of the error outside that space shrinks (eq. 12):

    min ‖Δ - diag(β_r) Ŵ diag(β_c)‖² + λ(‖β_r - 1‖² + ‖β_c - 1‖²),   Δ = W - (W - Ŵ) P

If P is the identity, Δ = Ŵ and the factors stay one; if P is zero, Δ = W and this is one more scale fit with a ridge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobie.methods.mobie.mixed_order import times_columns

EPSILON = 1e-8


def null_space_projector(gram: Tensor, energy_ratio: float = 0.1) -> Tensor:
    """Projector P `(in, in)` onto the weak directions of inputs with Gram matrix `XᵀX` `(in, in)`.

    Eigenvalues are taken in falling order without the first, which a common mean usually dominates; the null space
    starts at the first index where the energy from there on is at most `energy_ratio` of the energy before it.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rest = values[1:]
    head = rest.cumsum(0) - rest  # energy before index i
    tail = rest.sum() - head
    weak = (tail <= energy_ratio * head).nonzero().flatten()
    start = 1 + int(weak[0]) if len(weak) else len(values)
    basis = vectors[:, start:]
    return (basis @ basis.T).float()


def suppress_shift(
    weight: Tensor, binarized: Tensor, projector: Tensor, regularization: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Factors β_r `(experts, rows)` and β_c `(experts, in)` by the closed forms of eqs. 49 and 50, alternating.

    Args:
        weight: W `(experts, rows, in)`.
        binarized: Ŵ, the same shape.
        projector: P `(in, in)`.
        regularization: λ.
    """
    target = weight - (weight - binarized) @ projector
    product = binarized * target
    energy = binarized.square()
    row = weight.new_ones(weight.shape[:2])
    column = weight.new_ones(weight.shape[0], weight.shape[2])
    running = torch.ones(len(row), 1, dtype=torch.bool, device=row.device)  # an expert stops where it has converged
    for _ in range(iterations):
        before = row, column
        row = times_columns(product, column) + regularization
        row = row / (times_columns(energy, column.square()) + regularization + EPSILON)
        column = (row[:, None] @ product).squeeze(1) + regularization
        column = column / ((row.square()[:, None] @ energy).squeeze(1) + regularization + EPSILON)
        row, column = (torch.where(running, new, old) for new, old in zip((row, column), before, strict=True))
        change = [(new - old).abs().amax(-1, keepdim=True) for new, old in zip((row, column), before, strict=True)]
        running = running & ~(torch.maximum(*change) < tolerance)
        if not running.any():
            break
    return row, column
