"""GPTQ with a bit width of its own for every Linear and every expert: what methods that share out bits end in.

A block's widths are fixed when the object is made; who decides them is another method's matter. The Hessians' factors
do not depend on the widths, so each is computed once for all projections that share an input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobie.errors import ConfigError
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, map_experts
from mobie.methods.fp16 import FP16
from mobie.methods.gptq import gptq
from mobie.methods.hessian import damp, inverse_cholesky
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed
from mobie.packing.grid import check_grid_options, nominal_bits, pack_bank


@dataclass(frozen=True)
class Strategy:
    """How a weight is stored: on a grid of `bits` bits per `group_size` inputs; None is one grid per output row."""

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_grid_options("strategy", self.bits, self.group_size)

    @property
    def nominal_bits(self) -> float:
        """Bits per weight as papers count them, 32 per group included."""
        return nominal_bits(self.bits, self.group_size)


def columns(strategies: Sequence[Strategy]) -> dict[str, list[int | None]]:
    """The strategies of several experts as JSON values, one list per field."""
    return {key: [getattr(strategy, key) for strategy in strategies] for key in ("bits", "group_size")}


def role_of(name: str) -> str:
    """The field's name by which methods know a Linear: `self_attn.q_proj` → `q_proj`."""
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class MixedGPTQ(Method):
    """GPTQ of one block, as `gptq` does it, every width given.

    linears: by the field's name (`q_proj`) or the full one (`self_attn.q_proj`); None is kept in 16 bits.
    experts: projection → one strategy per expert; empty for a block without experts.
    paper: bits per weight that the method's paper prints for the whole model; None: what each width has.
    account: what the widths come to over the whole model, for the record, as JSON values.

    Raises:
        ConfigError: two full names end in the same field but differ in strategy.
    """

    name: ClassVar[str] = "mixed-gptq"

    linears: Mapping[str, Strategy | None] = field(default_factory=dict)
    experts: Mapping[str, tuple[Strategy, ...]] = field(default_factory=dict)
    block_size: int = 128
    percdamp: float = 0.01
    paper: float | None = None
    account: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, strategy in self.linears.items():
            if self._of_linear(role_of(name)) != strategy:
                raise ConfigError(
                    f"{name}: {strategy} differs from that of another Linear whose name ends in {role_of(name)!r}; "
                    "expected one strategy for both, a method knows Linears by that part of the name"
                )

    @property
    def options(self) -> dict[str, Any]:
        """Every width, one list per projection: what a record says of the block."""
        return {
            "linears": {name: strategy and asdict(strategy) for name, strategy in self.linears.items()},
            "experts": {name: columns(strategies) for name, strategies in self.experts.items()},
            "block_size": self.block_size,
            "percdamp": self.percdamp,
            "account": dict(self.account),
        }

    def _of_linear(self, role: str) -> Strategy | None:
        """The strategy of a Linear by its field's name."""
        for name, strategy in self.linears.items():
            if role_of(name) == role:
                return strategy
        raise ConfigError(f"no bit width for the Linear {role!r}; expected one of: {', '.join(self.linears)}")

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Quantize the block's only Linear."""
        (name,) = self.linears
        return self.quantize_group({name: weight}, {name: stats})[name]

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        strategies = {name: self._of_linear(role_of(name)) for name in weights}
        kept = [name for name, strategy in strategies.items() if strategy is None]
        packed: dict[str, Packed] = {name: FP16().quantize_linear(weights[name], stats[name]) for name in kept}
        chosen = {name: (strategy,) for name, strategy in strategies.items() if strategy is not None}
        if chosen:
            shared = stats[next(iter(chosen))]
            packed |= self._quantize({name: weights[name][None] for name in chosen}, [shared], chosen)[0]
        return packed

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, PackedBank]:
        packed: dict[str, PackedBank] = {}
        for names in bank.same_input:
            expert_bytes = self.expert_bytes([bank.projections[name].shape[1:] for name in names])
            parts = map_experts(bank, expert_bytes, partial(self._quantize_some, bank, stats, names))
            packed |= {name: PackedBank(tuple(part[name] for part in parts)) for name in names}
        return {name: packed[name] for name in bank.projections}

    def _quantize_some(
        self, bank: ExpertBank, stats: BankStats, names: Sequence[str], experts: range, device: torch.device
    ) -> list[dict[str, Packed]]:
        """Some experts of the projections `names`, whose statistics are those of the first."""
        chosen = slice(experts.start, experts.stop)
        weights = {name: bank.projections[name][chosen].to(device) for name in names}
        strategies = {name: self.experts[name][chosen] for name in names}
        return self._quantize(weights, stats.of(names[0], experts, device), strategies)

    def _quantize(
        self,
        weights: Mapping[str, Tensor],
        stats: Sequence[LinearStats],
        strategies: Mapping[str, Sequence[Strategy]],
    ) -> list[dict[str, Packed]]:
        """Quantize weights `(experts, out, in)` that share their inputs, those of one strategy in a batch."""
        damped, dead = damp(torch.stack([own.hessian for own in stats]), self.percdamp)
        factor = inverse_cholesky(damped)
        packed: list[dict[str, Packed]] = [{} for _ in stats]
        for name, weight in weights.items():
            alike: dict[Strategy, list[int]] = defaultdict(list)
            for expert, strategy in enumerate(strategies[name]):
                alike[strategy].append(expert)
            for strategy, experts in alike.items():
                bits, group_size = strategy.bits, strategy.group_size
                stored = gptq(weight[experts], factor[experts], dead[experts], bits, group_size, self.block_size)
                paper = strategy.nominal_bits if self.paper is None else self.paper
                grids = pack_bank(*stored, bits=bits, group_size=group_size, paper=paper)
                for expert, grid in zip(experts, grids, strict=True):
                    packed[expert][name] = grid
        return packed
