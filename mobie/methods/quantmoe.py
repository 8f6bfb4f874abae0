"""QuantMoE-Bench (Li et al. 2024, arXiv 2406.08155): GPTQ whose bit widths follow the structure of an MoE model.

The paper compares heuristics for who deserves more bits; it prints no recipe for 2.3 bits. Ours: attention, shared
experts and dense layers at four bits, routed experts at two, and the most used ones promoted to four for as long as the
average over all quantized weights stays within the budget.

Units (projections or whole experts) stand in one order, and the longest beginning of it that the budget pays for is
promoted. So more budget never takes bits from anyone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mobie.calibration.tokens import generator
from mobie.errors import ConfigError, UnsupportedError
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import Method, register
from mobie.methods.mixed_bits import MixedGPTQ, Strategy
from mobie.packing.grid import GROUP_OVERHEAD_BITS, check_grid_options

#: frequency: how often the router chooses the expert, which is the recipe; outlier: the paper's linear weight outlier
#: score; first_blocks: the first layers first; random: a control
Rule = Literal["frequency", "outlier", "first_blocks", "random"]
SHARED, ATTENTION = "shared_expert", "attn"  # in the names of Linears; what has neither is a dense layer's MLP


def outlier_score(weight: Tensor) -> Tensor:
    """The paper's linear weight outlier score of `(..., out, in)`: `max_j (max_i |w_ij| / mean_i |w_ij|)`.

    A column of zeros has none.
    """
    magnitude = weight.abs()
    ratio = magnitude.amax(dim=-2) / magnitude.mean(dim=-2)
    return ratio.nan_to_num(nan=0.0).amax(dim=-1)


@dataclass(frozen=True)
class Unit:
    """Projections of one expert that are promoted together.

    share:   of its layer's routing choices that go to the expert.
    outlier: greatest outlier score of the projections.
    weights: number of weights.
    """

    block: int
    expert: int
    projections: tuple[str, ...]
    share: float
    outlier: float
    weights: int


def in_turns(units: Sequence[Unit]) -> list[Unit]:
    """The first unit of every block, then every second one, and so on; within a turn the order stays."""
    turns: Counter[int] = Counter()
    numbered = []
    for unit in units:
        numbered.append((turns[unit.block], unit))
        turns[unit.block] += 1
    return [unit for _, unit in sorted(numbered, key=lambda pair: pair[0])]


def _shapes(found: Mapping[str, Any]) -> Mapping[str, list[int]]:
    """Projection → `(experts, out, in)` of a surveyed block; empty for one without experts."""
    return found["experts"]["shapes"] if "experts" in found else {}


def affordable(costs: Sequence[Fraction], spare: Fraction) -> int:
    """How many costs, from the first on, are within `spare` together."""
    return sum(total <= spare for total in accumulate(costs))


@register
@dataclass(frozen=True)
class QuantMoE(AllocatingMethod):
    """GPTQ with a bit width per module, met from below at a budget of average bits per quantized weight.

    budget:         average bits per quantized weight; the decimal number as written is meant.
    promote_by:     see `Rule`; ties go by frequency, then place in the model, then outlier score.
    granularity:    what is promoted at a time. "projection" uses the budget best; by frequency it still promotes whole
                    experts, all but the last one.
    scope:          "model" compares experts of all layers; "block" gives every layer the same number, within one.
    count_groups:   whether the budget pays for scales and zero points (32 bits per group), which papers leave out.
    attention_bits, shared_bits, dense_bits, expert_bits, promoted_bits: of attention, shared experts, the MLPs of dense
                    layers, routed experts before and after promotion.
    seed:           of the random order.
    """

    name: ClassVar[str] = "quantmoe"
    seconds_per_weight: ClassVar[float] = 1.3e-7
    stored_bits: ClassVar[float | str] = "budget"

    budget: float = 2.3
    promote_by: Rule = "frequency"
    granularity: Literal["projection", "expert"] = "projection"
    scope: Literal["model", "block"] = "model"
    count_groups: bool = False
    attention_bits: int = 4
    shared_bits: int = 4
    dense_bits: int = 4
    expert_bits: int = 2
    promoted_bits: int = 4
    group_size: int | None = 128
    block_size: int = 128
    percdamp: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("attention_bits", "shared_bits", "dense_bits", "expert_bits", "promoted_bits"):
            check_grid_options(f"{self.name}: {option}", getattr(self, option), self.group_size)
        if self.promoted_bits <= self.expert_bits:
            raise ConfigError(
                f"{self.name}: promoted_bits is {self.promoted_bits}; expected more than "
                f"expert_bits, {self.expert_bits}"
            )
        if not 0 < self.budget < float("inf"):
            raise ConfigError(f"{self.name}: budget is {self.budget}; expected a positive number of bits (2.3)")

    def survey(self, view: LayerView) -> dict[str, Any]:
        found: dict[str, Any] = {"linears": {name: list(weight.shape) for name, weight in view.linears.items()}}
        if view.bank is None or view.bank_stats is None:
            return found
        banks = view.bank.projections
        found["experts"] = {
            "shapes": {name: list(bank.shape) for name, bank in banks.items()},
            "tokens": [int(n) for n in view.bank_stats.tokens[next(iter(banks))]],
            "outliers": {name: [float(outlier_score(weight)) for weight in bank] for name, bank in banks.items()},
        }
        return found

    def allocate(self, surveys: Sequence[Mapping[str, Any]]) -> list[Method]:
        """Widths of all blocks.

        Raises:
            UnsupportedError: the budget is below what the model costs with nothing promoted, or above that with all.
        """
        units = self.order([unit for block, found in enumerate(surveys) for unit in self._units(block, found)])
        step = self._cost(self.promoted_bits) - self._cost(self.expert_bits)
        weights, floor = self._floor(surveys)
        spare = Fraction(str(self.budget)) * weights - floor
        costs = [step * unit.weights for unit in units]
        if units:
            self._check_budget(weights, floor, floor + sum(costs))
        count = affordable(costs, spare)
        promoted = {(unit.block, name, unit.expert) for unit in units[:count] for name in unit.projections}
        account = {
            "budget": self.budget,
            "reached": float((floor + sum(costs[:count])) / weights),
            "floor": float(floor / weights),
            "ceiling": float((floor + sum(costs)) / weights),
            "units": len(units),
            "promoted": count,
        }
        return [self._of_block(block, found, promoted, account) for block, found in enumerate(surveys)]

    def order(self, units: Sequence[Unit]) -> list[Unit]:
        """Units as they are promoted, first to last."""
        by_use = sorted(units, key=lambda unit: (-unit.share, unit.block, unit.expert, -unit.outlier))
        if self.promote_by == "outlier":
            by_use.sort(key=lambda unit: -unit.outlier)  # sorting is stable: use breaks ties
        elif self.promote_by == "first_blocks":
            by_use.sort(key=lambda unit: unit.block)
        elif self.promote_by == "random":
            drawn = torch.randperm(len(units), generator=generator(self.seed, "quantmoe: promotion"))
            by_use = [units[index] for index in drawn.tolist()]
        return in_turns(by_use) if self.scope == "block" else by_use

    def _units(self, block: int, found: Mapping[str, Any]) -> list[Unit]:
        """What can be promoted in a block, in the order of its experts."""
        if "experts" not in found:
            return []
        shapes, tokens, outliers = (found["experts"][key] for key in ("shapes", "tokens", "outliers"))
        sets = [tuple(shapes)] if self.granularity == "expert" else [(name,) for name in shapes]
        return [
            Unit(
                block,
                expert,
                names,
                share=tokens[expert] / max(1, sum(tokens)),
                outlier=max(outliers[name][expert] for name in names),
                weights=sum(prod(shapes[name][1:]) for name in names),
            )
            for expert in range(len(tokens))
            for names in sets
        ]

    def _floor(self, surveys: Sequence[Mapping[str, Any]]) -> tuple[int, Fraction]:
        """Number of weights, and the bits they cost with nothing promoted."""
        weights, bits = 0, Fraction(0)
        for found in surveys:
            sizes = [(self._linear_bits(name), shape) for name, shape in found["linears"].items()]
            sizes += [(self.expert_bits, shape) for shape in _shapes(found).values()]
            weights += sum(prod(shape) for _, shape in sizes)
            bits += sum(self._cost(width) * prod(shape) for width, shape in sizes)
        return weights, bits

    def _cost(self, bits: int) -> Fraction:
        """What a weight counts for in the average."""
        groups = Fraction(GROUP_OVERHEAD_BITS, self.group_size) if self.count_groups and self.group_size else 0
        return bits + Fraction(groups)

    def _linear_bits(self, name: str) -> int:
        if SHARED in name:
            return self.shared_bits
        return self.attention_bits if ATTENTION in name else self.dense_bits

    def _check_budget(self, weights: int, floor: Fraction, ceiling: Fraction) -> None:
        wanted = Fraction(str(self.budget)) * weights
        if not floor <= wanted <= ceiling:
            least, most = float(floor / weights), float(ceiling / weights)
            remedy = (
                "raise the budget, or lower attention_bits, shared_bits, dense_bits or expert_bits"
                if wanted < floor
                else "lower the budget, or raise promoted_bits"
            )
            raise UnsupportedError(
                f"{self.name}: budget is {self.budget} bits per weight, but this model costs {least:.4f} with nothing "
                f"promoted and {most:.4f} with every expert at {self.promoted_bits} bits; expected a budget between "
                f"the two: {remedy}"
            )

    def _of_block(
        self, block: int, found: Mapping[str, Any], promoted: Set[tuple[int, str, int]], account: Mapping[str, Any]
    ) -> MixedGPTQ:
        """The method of a block; `promoted` holds (block, projection, expert)."""

        def strategy(bits: int) -> Strategy:
            return Strategy(bits, self.group_size)

        linears = {name: strategy(self._linear_bits(name)) for name in found["linears"]}
        experts = {
            name: tuple(
                strategy(self.promoted_bits if (block, name, expert) in promoted else self.expert_bits)
                for expert in range(count)
            )
            for name, (count, *_) in _shapes(found).items()
        }
        return MixedGPTQ(linears, experts, self.block_size, self.percdamp, paper=account["reached"], account=account)
