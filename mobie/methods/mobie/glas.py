"""Global Loss-Aligned Saliency (section 4.2, eqs. 8 and 9): which columns deserve a second order.

H: a Hessian, local (`2/n XᵀX`) or weighted by squared loss gradients (eq. 8); U: upper triangular with H⁻¹ = UᵀU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobie.methods.hessian import damp, inverse_cholesky


def inverse_diagonal(hessian: Tensor, rule: str, percdamp: float) -> Tensor:
    """The denominator of eq. 9 before squaring, `(..., in)`; infinite for columns that no (weighted) input reaches.

    rule "inverse_diagonal" is `[H⁻¹]_jj` as printed; "cholesky_diagonal" is `U_jj`, as released baselines do.
    H is damped at unit mean diagonal: loss gradients have any scale, and damping sets dead columns to 1.
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    scale = torch.where(mean > 0, mean, 1.0)[..., None]
    damped, dead = damp(hessian / scale[..., None], percdamp)
    factor = inverse_cholesky(damped)
    if rule == "cholesky_diagonal":
        inverse = factor.diagonal(dim1=-2, dim2=-1) / scale.sqrt()
    else:
        inverse = factor.square().sum(dim=-2) / scale
    return inverse.masked_fill(dead, float("inf"))


def saliency(
    weight: Tensor, hessians: Sequence[Tensor], rule: str = "inverse_diagonal", percdamp: float = 0.01
) -> Tensor:
    """Saliency of every weight, eq. 9; zero in a column that no (weighted) input reaches.

    Args:
        weight: `(experts, rows, in)`.
        hessians: one `(groups, in, in)` per expert; group g serves the g-th of `groups` contiguous runs of rows.

    Returns:
        `(experts, rows, in)`.
    """
    denominators = torch.stack([inverse_diagonal(hessian, rule, percdamp) for hessian in hessians])
    runs = weight.tensor_split(denominators.shape[1], dim=1)
    parts = [(run / denominators[:, g, None]).square() for g, run in enumerate(runs)]
    return torch.cat(parts, dim=1)


def salient_columns(scores: Tensor, share: float) -> Tensor:
    """Mask `(experts, in)` of the columns whose mean saliency is in the top `share` (B.3.2: the 95th percentile).

    The number of columns is rounded, and the same for every expert.
    """
    columns = scores.mean(dim=-2)
    count = round(share * columns.shape[-1])
    mask = torch.zeros_like(columns, dtype=torch.bool)
    return mask.scatter(-1, columns.topk(count, dim=-1).indices, True)
