"""Cross-Expert Joint Decomposition (section 4.1, eq. 4): one SVD for all experts of a layer.

U, S: left singular vectors and values.  left:  [W1, W2, …] = (U S) [V1, V2, …]     basis U S (out × rank)
                                         right: [W1; W2; …] = [U1; U2; …] (S Vᵀ)    basis S Vᵀ (rank × in)

The wide matrix is never decomposed: its Gram matrix, `out × out` or `in × in`, is diagonalised in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mobie.packing.bank import Side

SIDES: tuple[Side, ...] = ("left", "right")


@dataclass(frozen=True)
class JointBasis:
    """What the experts share, and what gives each of them its own factor.

    basis:      `(out, rank)` for left, `(rank, in)` for right, float32.
    projection: `(rank, out)` for left, `(in, rank)` for right, float64.
    """

    basis: Tensor
    projection: Tensor
    side: Side

    def factors(self, bank: Tensor) -> Tensor:
        """Factors of experts `(experts, out, in)`: `(experts, rank, in)` for left, `(experts, out, rank)` for right.

        Computed in float64, one expert at a time, and rounded to float32. At full rank `basis @ factors[e]` (left) is
        `bank[e]`. Directions without energy have zero factors.
        """
        projection = self.projection.to(bank.device)
        if self.side == "left":
            return torch.stack([(projection @ weight.double()).float() for weight in bank])
        return torch.stack([(weight.double() @ projection).float() for weight in bank])


def joint_basis(
    banks: Sequence[Tensor], side: Side, rank: int | None = None, device: torch.device | None = None
) -> JointBasis:
    """Shared basis of banks `(experts, out, in)` of equally large matrices.

    The Gram matrix is summed over one expert after the other, in float64.

    Args:
        side: "left" or "right", the side of the experts on which the shared basis stands.
        rank: how many singular directions are kept; None keeps all `min(out, experts · in)` (left).
        device: where it is computed; None: where the weights lie.
    """
    experts = sum(map(len, banks))
    across, along = banks[0].shape[1:] if side == "left" else reversed(banks[0].shape[1:])
    gram = torch.zeros(across, across, dtype=torch.float64, device=device or banks[0].device)
    for bank in banks:
        for weight in bank:
            wide = weight.to(gram.device).double()
            gram += wide @ wide.T if side == "left" else wide.T @ wide
    squared, vectors = torch.linalg.eigh(gram)  # ascending
    full = min(across, experts * along)
    keep = min(rank or full, full)
    squared, vectors = squared.flip(0)[:keep], vectors.flip(1)[:, :keep]
    heaviest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(heaviest < 0, -1.0, 1.0)  # a sign convention, so that results do not hang on LAPACK
    negligible = squared <= squared[0] * len(gram) * torch.finfo(torch.float64).eps
    inverse = torch.where(negligible, 0.0, squared.clamp(min=1e-300).rsqrt())
    sigma = torch.where(negligible, 0.0, squared.clamp(min=0).sqrt())
    basis, projection = (vectors * sigma).float(), (vectors * inverse).T
    if side == "left":
        return JointBasis(basis, projection, side)
    return JointBasis(basis.T.contiguous(), projection.T, side)


def joint_svd(bank: Tensor, side: Side, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Basis and factors of one bank `(experts, out, in)`; see `JointBasis`."""
    joint = joint_basis([bank], side, rank)
    return joint.basis, joint.factors(bank)


def basis_bytes(out_features: int, in_features: int, side: str) -> int:
    """Entries of the shared basis at full rank, to choose the side that stores less."""
    return (out_features if side == "left" else in_features) ** 2


def choose_side(side: Side | Literal["fewest_bytes"], out_features: int, in_features: int) -> Side:
    """Resolve "fewest_bytes" to the side with the smaller basis; "left" and "right" stay."""
    if side != "fewest_bytes":
        return side
    return min(SIDES, key=lambda s: basis_bytes(out_features, in_features, s))
