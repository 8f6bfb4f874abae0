"""Cross-Expert Joint Decomposition (section 4.1, eq. 4): one SVD for all experts of a layer.

U, S: left singular vectors and values.  left:  [W1, W2, …] = (U S) [V1, V2, …]     basis U S (out × rank)
                                         right: [W1; W2; …] = [U1; U2; …] (S Vᵀ)    basis S Vᵀ (rank × in)

The wide matrix is never decomposed: its Gram matrix, `out × out` or `in × in`, is diagonalised in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mobie.packing.bank import Side

SIDES: tuple[Side, ...] = ("left", "right")


def joint_svd(bank: Tensor, side: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Decompose a bank `(experts, out, in)`.

    Args:
        side: "left" or "right", the side of the experts on which the shared basis stands.
        rank: how many singular directions are kept; None keeps all `min(out, experts · in)` (left).

    Returns:
        basis: `(out, rank)` for left, `(rank, in)` for right, float32.
        factors: `(experts, rank, in)` for left, `(experts, out, rank)` for right, float32.

        At full rank, `basis @ factors[e]` (left) is `bank[e]`. Directions without energy have zero factors.
    """
    if side == "right":
        basis, factors = joint_svd(bank.mT, "left", rank)
        return basis.T.contiguous(), factors.mT.contiguous()
    wide = bank.double()
    gram = torch.einsum("eoi,epi->op", wide, wide)
    squared, vectors = torch.linalg.eigh(gram)  # ascending
    full = min(bank.shape[1], bank.shape[0] * bank.shape[2])
    keep = min(rank or full, full)
    squared, vectors = squared.flip(0)[:keep], vectors.flip(1)[:, :keep]
    heaviest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(heaviest < 0, -1.0, 1.0)  # a sign convention, so that results do not hang on LAPACK
    negligible = squared <= squared[0] * len(gram) * torch.finfo(torch.float64).eps
    inverse = torch.where(negligible, 0.0, squared.clamp(min=1e-300).rsqrt())
    sigma = torch.where(negligible, 0.0, squared.clamp(min=0).sqrt())
    factors = (vectors * inverse).T @ wide
    return (vectors * sigma).float(), factors.float()


def basis_bytes(out_features: int, in_features: int, side: str) -> int:
    """Entries of the shared basis at full rank, to choose the side that stores less."""
    return (out_features if side == "left" else in_features) ** 2


def choose_side(side: Side | Literal["fewest_bytes"], out_features: int, in_features: int) -> Side:
    """Resolve "fewest_bytes" to the side with the smaller basis; "left" and "right" stay."""
    if side != "fewest_bytes":
        return side
    return min(SIDES, key=lambda s: basis_bytes(out_features, in_features, s))
