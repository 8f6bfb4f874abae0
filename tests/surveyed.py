"""Methods that share out bits, made ready for a block or a bank that stands for a whole model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import silu

from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method


def fixed(
    method: Method,
    bank: ExpertBank | None = None,
    bank_stats: BankStats | None = None,
    linears: Mapping[str, Tensor] | None = None,
    linear_stats: Mapping[str, LinearStats] | None = None,
) -> Method:
    """The method as it is where nothing is to be shared out, else that of the block that is given."""
    if not isinstance(method, AllocatingMethod):
        return method

    def output(expert: int, weights: Mapping[str, Tensor], most: int | None) -> Tensor:
        assert bank is not None and bank_stats is not None
        own = {name: weights.get(name, weight[expert]) for name, weight in bank.projections.items()}
        x = bank_stats.experts["gate"][expert].sample[:most]
        return (silu(x @ own["gate"].T) * (x @ own["up"].T)) @ own["down"].T

    return method.over(LayerView(linears or {}, linear_stats or {}, bank, bank_stats, output if bank else None))
