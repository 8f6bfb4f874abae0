"""What the second-order methods share: damping, dead columns, and the Cholesky factor of the inverse Hessian.

H: `2/n · XᵀX`, `(..., in, in)`.  U: upper triangular with H⁻¹ = UᵀU.
"""

from __future__ import annotations

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
    identity = torch.eye(size, dtype=torch.float64, device=hessian.device)
    for index, matrix in enumerate(flat):
        lower, info = torch.linalg.cholesky_ex(matrix.double().flip(0, 1))
        if info.item() or not lower.isfinite().all():
            raise DataError(
                f"Hessian {index + 1} of {len(flat)} (width {size}) is not positive definite; expected XᵀX of finite "
                "inputs plus damping: give more calibration tokens or a larger percdamp (0.01 is usual, try 0.1)"
            )
        factors[index] = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return factors.reshape(hessian.shape)
