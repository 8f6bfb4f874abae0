"""What the second-order methods share: damping, dead columns, and the Cholesky factor of the inverse Hessian.

H: `2/n · XᵀX`, `(..., in, in)`.  U: upper triangular with H⁻¹ = UᵀU.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mobie.errors import DataError


def damp(hessian: Tensor, percdamp: float = 0.01) -> tuple[Tensor, Tensor]:
    """Make a Hessian invertible: 1 on the diagonal of dead columns, then `percdamp · mean(diag H)` on all of it.

    A column is dead when no input ever reached it (`H_jj = 0`); the caller sets its weights to zero.

    Args:
        hessian: `(..., in, in)`, left as it is.

    Returns:
        The damped Hessian, and which columns are dead, `(..., in)` bool.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)  # a view: writing to it writes to `damped`
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    diagonal += percdamp * diagonal.mean(dim=-1, keepdim=True)
    return damped, dead


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Upper triangular U with H⁻¹ = UᵀU, float32, for every matrix of `(..., in, in)`.

    H is read backwards (rows and columns reversed), where H = L Lᵀ; then U is L⁻¹ read backwards, and H⁻¹ itself is
    never formed. Computed in float64, one matrix at a time, so that a bank costs the memory of one of its matrices.

    Raises:
        DataError: a Hessian is not positive definite, or not finite.
    """
    size = hessian.shape[-1]
    flat = hessian.reshape(-1, size, size)
    factors = torch.empty(flat.shape, dtype=torch.float32, device=hessian.device)
    for index, matrix in enumerate(flat):
        inverse = _inverse_of_factor(matrix.flip(0, 1).double())
        if inverse is None:
            raise DataError(
                f"Hessian {index + 1} of {len(flat)} (width {size}) is not positive definite; expected XᵀX of finite "
                "inputs plus damping: give more calibration tokens or a larger percdamp (0.01 is usual, try 0.1)"
            )
        factors[index] = inverse.flip(0, 1)
    return factors.reshape(hessian.shape)


#: width up to which LAPACK factors and inverts; wider matrices are halved, which leaves nearly all work to products
DIRECT_WIDTH = 512


def _inverse_of_factor(matrix: Tensor) -> Tensor | None:
    """L⁻¹ for a matrix `L Lᵀ` `(n, n)`, None where it is not positive definite.

    A = [A₁  · ]    L⁻¹ = [     L₁⁻¹        0  ]    B = C L₁⁻ᵀ,  L₂ L₂ᵀ = A₂ - B Bᵀ
        [C   A₂]          [-L₂⁻¹ B L₁⁻¹    L₂⁻¹]
    """
    size = len(matrix)
    if size <= DIRECT_WIDTH:
        lower, info = torch.linalg.cholesky_ex(matrix)
        if info.item() or not lower.diagonal().isfinite().all():  # what is not finite in a row ends on its diagonal
            return None
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    first, second = slice(0, size // 2), slice(size // 2, size)
    upper_left = _inverse_of_factor(matrix[first, first])
    if upper_left is None:
        return None
    below = matrix[second, first] @ upper_left.T
    lower_right = _inverse_of_factor(matrix[second, second] - below @ below.T)
    if lower_right is None:
        return None
    inverse = torch.zeros_like(matrix)
    inverse[first, first], inverse[second, second] = upper_left, lower_right
    inverse[second, first] = -(lower_right @ (below @ upper_left))
    return inverse


#: what later columns take up of a block's error: E / diag U times U, as the released baselines do; the least-squares
#: answer E U_block⁻¹ U; or nothing
Feedback = Literal["diagonal", "triangular", "none"]


def handed_on(errors: Tensor, factor: Tensor, here: slice, rule: Feedback) -> Tensor:
    """What the columns behind a block must lose to make up for the block's errors `W - Ŵ`.

    Args:
        errors: `(..., out, n)`, of the n columns `here`.
        factor: U, `(..., in, in)`.

    Returns:
        `(..., out, in - here.stop)`.
    """
    square, behind = factor[..., here, here], factor[..., here, here.stop :]
    if rule == "none":
        return errors.new_zeros(*errors.shape[:-1], behind.shape[-1])
    if rule == "diagonal":
        return errors / square.diagonal(dim1=-2, dim2=-1)[..., None, :] @ behind
    return torch.linalg.solve_triangular(square, errors, upper=True, left=False) @ behind


#: the denominator d of a weight's saliency `(w / d)²`: `[H⁻¹]_jj` as MoBiE prints it, `U_jj` as released baselines do
SaliencyRule = Literal["inverse_diagonal", "cholesky_diagonal"]


def saliency_denominator(factor: Tensor, rule: SaliencyRule) -> Tensor:
    """d of every column, `(..., in)`, from U `(..., in, in)`."""
    return factor.diagonal(dim1=-2, dim2=-1) if rule == "cholesky_diagonal" else factor.square().sum(dim=-2)


def scaled_saliency_denominator(hessian: Tensor, rule: SaliencyRule, percdamp: float) -> Tensor:
    """d from a Hessian of any scale `(..., in, in)`, as loss gradients give; infinite for columns that nothing reaches.

    H is damped at unit mean diagonal, because damping sets dead columns to 1, and scaled back.
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    scale = torch.where(mean > 0, mean, 1.0)[..., None]
    damped, dead = damp(hessian / scale[..., None], percdamp)
    denominator = saliency_denominator(inverse_cholesky(damped), rule)
    power = 0.5 if rule == "cholesky_diagonal" else 1.0
    return (denominator / scale**power).masked_fill(dead, float("inf"))
