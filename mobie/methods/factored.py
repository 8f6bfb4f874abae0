"""Base of methods that quantize projections of one input together, from one factor of their damped Hessian."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mobie.methods.base import LinearStats, Method
from mobie.methods.hessian import damp, inverse_cholesky
from mobie.packing.base import Packed


class FactoredMethod(Method):
    """Damps the Hessian of an input and factors it once for all weights that read it."""

    percdamp: float  # an option of every such method: what is added to the diagonal, as a share of its mean

    @abstractmethod
    def quantize_batch(self, weight: Tensor, factor: Tensor, dead: Tensor) -> Sequence[Packed]:
        """Quantize weights `(experts, out, in)`.

        Args:
            factor: `(experts, in, in)`, upper triangular U with H⁻¹ = UᵀU.
            dead: `(experts, in)` bool, columns that no input reaches; they count as zero.
        """

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        return self.quantize_group({"": weight}, {"": stats})[""]

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        return self.quantize_chunk({name: weight[None] for name, weight in weights.items()}, [stats])[0]

    def quantize_chunk(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]]
    ) -> list[dict[str, Packed]]:
        first = next(iter(weights))
        damped, dead = damp(torch.stack([own[first].hessian for own in stats]), self.percdamp)
        factor = inverse_cholesky(damped)
        packed = {name: self.quantize_batch(weight, factor, dead) for name, weight in weights.items()}
        return [{name: own[e] for name, own in packed.items()} for e in range(len(stats))]
