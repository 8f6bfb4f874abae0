"""Global Loss-Aligned Saliency (section 4.2, eqs. 8 and 9): which columns deserve a second order.

H: a Hessian, local (`2/n XᵀX`) or weighted by squared loss gradients (eq. 8); U: upper triangular with H⁻¹ = UᵀU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobie.methods.hessian import SaliencyRule, scaled_saliency_denominator


def saliency(
    weight: Tensor, hessians: Sequence[Tensor], rule: SaliencyRule = "inverse_diagonal", percdamp: float = 0.01
) -> Tensor:
    """Saliency of every weight, eq. 9; zero in a column that no (weighted) input reaches.

    Args:
        weight: `(experts, rows, in)`.
        hessians: one `(groups, in, in)` per expert; group g serves the g-th of `groups` contiguous runs of rows.

    Returns:
        `(experts, rows, in)`.
    """
    denominators = torch.stack([scaled_saliency_denominator(hessian, rule, percdamp) for hessian in hessians])
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
