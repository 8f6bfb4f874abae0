"""MxMoE (Duanmu et al. 2025, arXiv 2505.05799), weight-only: bits go where the layer's output needs them.

Every projection of every expert is quantized alone, with every strategy, and the change of the layer's output is
measured: its norm is the sensitivity. An integer program then picks one strategy for each, the sum of sensitivities
least, the average width within the budget, gate and up of one expert alike (they run as one product). GPTQ quantizes.

Left out are the paper's model of kernel time in the objective (its weight r is 1 here), and Hadamard rotations, which
its modes with quantized activations need. Of its released code these readings are the defaults: the six strategies of
its weight-only mode; the norm not squared; sensitivities by round to nearest; attention kept in 16 bits; a shared
expert allocated as the routed ones are. Other than there, the budget is one for all layers (`scope`), dense layers are
allocated too, there at a fixed 4 bits (`dense_layers`), and GPTQ is the suite's, without act-order. One bit has the
grid {0, span} or {-span, 0}, as there: it nearly takes a projection out, and pays for others' bits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import reduce
from math import floor, gcd, lcm, prod
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from mobie.errors import ConfigError, UnsupportedError
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import ExpertBank, LinearStats, Method, register
from mobie.methods.gptq import gptq
from mobie.methods.hessian import damp, inverse_cholesky
from mobie.methods.knapsack import choose
from mobie.methods.mixed_bits import MixedGPTQ, Strategy, role_of
from mobie.packing.grid import GROUP_OVERHEAD_BITS, decode, round_trip

#: of the released code's weight-only mode; one bit lets the average reach 2.25 with anything above it
WEIGHT_ONLY = (
    Strategy(1, 128),
    Strategy(2, 128),
    Strategy(3, 128),
    Strategy(4, None),
    Strategy(4, 128),
    Strategy(8, None),
)
ALIKE = ("gate_proj", "up_proj")  # of one MLP: one strategy for both
SHARED, ATTENTION = "shared_expert", "attn"  # in the names of Linears; what has neither is a dense layer's MLP
DIGITS = 6  # of a sensitivity: what differs by less is a tie

#: of Linears that are no routed experts: a share of the budget by their sensitivity, 16 bits, or a fixed strategy
Placement = Literal["allocated", "16bit"] | Strategy


@dataclass(frozen=True)
class Unit:
    """What gets one strategy: Linears of a block, or projections of one of its experts.

    expert: None for Linears.
    costs:  the sum of their sensitivities, by strategy.
    """

    block: int
    names: tuple[str, ...]
    expert: int | None
    weights: int
    costs: tuple[float, ...]


@register
@dataclass(frozen=True)
class MxMoE(AllocatingMethod):
    """GPTQ with the strategies that change the layers' outputs least within a budget.

    budget:        average bits per quantized weight; the decimal number as written is meant.
    strategies:    what may be chosen.
    count:         "nominal" counts 32 bits per group, scale and zero point, as the paper does (2 bits in groups of 128
                   are 2.25); "codes" leaves them out.
    scope:         "model" shares one budget among all layers; "layer" gives each layer the same.
    sensitivity:   quantized by "rtn", or by "gptq" as in the end.
    tokens:        of an expert or layer, at most so many are measured (None: all); the norm is scaled up.
    attention, shared_experts, dense_layers: a `Placement`; what is fixed counts in the budget, what has 16 bits does
                   not.
    block_size, percdamp: of GPTQ.
    """

    name: ClassVar[str] = "mxmoe"
    survey_passes: ClassVar[float] = 20.0  # as it is, and six strategies for each of three projections
    seconds_per_weight: ClassVar[float] = 1.6e-7
    stored_bits: ClassVar[float] = 2.8  # attention in 16 bits

    budget: float = 2.25
    strategies: tuple[Strategy, ...] = WEIGHT_ONLY
    count: Literal["nominal", "codes"] = "nominal"
    scope: Literal["model", "layer"] = "model"
    sensitivity: Literal["rtn", "gptq"] = "rtn"
    tokens: int | None = None
    attention: Placement = "16bit"
    shared_experts: Placement = "allocated"
    dense_layers: Placement = "allocated"
    block_size: int = 128
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.budget < float("inf"):
            raise ConfigError(f"{self.name}: budget is {self.budget}; expected a positive number of bits (2.25)")
        if len(set(self.strategies)) != len(self.strategies) or not self.strategies:
            given = ", ".join(map(str, self.strategies)) or "none"
            raise ConfigError(f"{self.name}: strategies are {given}; expected at least one, and none of them twice")
        for option in ("tokens", "block_size"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"{self.name}: {option} is {value}; expected at least 1")
        if not 0 <= self.percdamp < float("inf"):
            raise ConfigError(f"{self.name}: percdamp is {self.percdamp}; expected a number of at least 0 (0.01)")

    def survey(self, view: LayerView) -> dict[str, Any]:
        linears: dict[str, Any] = {}
        for name, weight in view.linears.items():
            linears[name] = {"shape": list(weight.shape)}
            if self._placement(name) == "allocated":
                linears[name]["sensitivity"] = self._of_linear(name, view)
        found: dict[str, Any] = {"strategies": [asdict(s) for s in self.strategies], "linears": linears}
        if view.bank is None or view.bank_stats is None:
            return found
        first = next(iter(view.bank.projections))
        experts = {
            "shapes": {name: list(weight.shape[1:]) for name, weight in view.bank.projections.items()},
            "tokens": [int(n) for n in view.bank_stats.tokens[first]],
            "alike": [list(names) for names in view.bank.same_input],
            "sensitivity": self._of_experts(view, view.bank),
        }
        return found | {"experts": experts}

    def _of_experts(self, view: LayerView, bank: ExpertBank) -> dict[str, list[list[float]]]:
        """Projection → expert → strategy → ‖score · (E'(x) - E(x))‖, E' with only that projection quantized.

        An expert that no token reaches has 0 throughout, and so ends with the narrowest strategy.
        """
        assert view.bank_stats is not None and view.expert_output is not None  # there are experts
        found: dict[str, list[list[float]]] = {name: [] for name in bank.projections}
        for names in bank.same_input:
            for expert in range(len(bank.projections[names[0]])):
                weights = {name: bank.projections[name][expert] for name in names}
                device = weights[names[0]].device
                stats = None
                if self.sensitivity == "gptq":
                    (stats,) = view.bank_stats.of(names[0], range(expert, expert + 1), device)
                original = view.expert_output(expert, {}, self.tokens)
                scale = (view.bank_stats.tokens[names[0]][expert] / max(1, len(original))) ** 0.5
                for name, rounded in self._rounded(weights, stats):
                    changes = (view.expert_output(expert, {name: w}, self.tokens) - original for w in rounded)
                    found[name].append([_digits(scale * change.norm()) for change in changes])
        return found

    def _of_linear(self, name: str, view: LayerView) -> list[float]:
        """By strategy, the change of the layer's output for a shared expert, else of the Linear's own.

        That is ‖X (W' - W)ᵀ‖, from the Hessian `2/n · XᵀX`.
        """
        weight, stats = view.linears[name], view.linear_stats[name]
        ((_, rounded),) = self._rounded({name: weight}, stats)
        if view.shared_output is not None and SHARED in name:
            original = view.shared_output({}, self.tokens)
            scale = (stats.tokens / max(1, len(original))) ** 0.5
            return [_digits(scale * (view.shared_output({name: w}, self.tokens) - original).norm()) for w in rounded]
        differences = (w - weight for w in rounded)
        squares = (((d @ stats.hessian) * d).sum().clamp(min=0) * stats.tokens / 2 for d in differences)
        return [_digits(square.sqrt()) for square in squares]

    def _rounded(
        self, weights: Mapping[str, Tensor], stats: LinearStats | None
    ) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Each weight `(out, in)` as every strategy leaves it; the weights share their inputs."""
        if self.sensitivity == "rtn" or stats is None:
            for name, weight in weights.items():
                yield name, (round_trip(weight, s.bits, s.group_size) for s in self.strategies)
            return
        damped, dead = damp(stats.hessian, self.percdamp)
        factor = inverse_cholesky(damped)
        for name, weight in weights.items():
            grids = (gptq(weight, factor, dead, s.bits, s.group_size, self.block_size) for s in self.strategies)
            yield name, (decode(*grid, s.group_size) for grid, s in zip(grids, self.strategies, strict=True))

    def allocate(self, surveys: Sequence[Mapping[str, Any]]) -> list[Method]:
        units = [unit for block, found in enumerate(surveys) for unit in self._units(block, found)]
        fixed = [(block, *part) for block, found in enumerate(surveys) for part in self._fixed(found)]
        shares: dict[int, list[Unit]] = defaultdict(list)
        for unit in units:
            shares[unit.block if self.scope == "layer" else 0].append(unit)
        chosen: dict[tuple[int, str, int | None], Strategy] = {}
        account: dict[str, Any] = {"budget": self.budget, "sensitivity": 0.0, "bound": 0.0}
        for share, members in shares.items():
            own = [part[1:] for part in fixed if self.scope == "model" or part[0] == share]
            strategies, cost, bound = self._share_out(members, own)
            account["sensitivity"] += cost
            account["bound"] += bound
            for unit, strategy in zip(members, strategies, strict=True):
                chosen |= {(unit.block, name, unit.expert): strategy for name in unit.names}
        account |= self._account(units, [part[1:] for part in fixed], chosen)
        return [self._of_block(block, found, chosen, account) for block, found in enumerate(surveys)]

    def _share_out(
        self, units: Sequence[Unit], fixed: Sequence[tuple[int, Fraction]]
    ) -> tuple[list[Strategy], float, float]:
        """The strategies of units under one budget, the sum of their sensitivities, and a lower bound of it.

        Sizes are counted in the greatest amount that divides them all, so that they are whole numbers.
        """
        widths = [self._width(strategy) for strategy in self.strategies]
        sizes = [[unit.weights * width for width in widths] for unit in units]
        step = _common(size for row in sizes for size in row)
        weights = sum(unit.weights for unit in units) + sum(count for count, _ in fixed)
        spare = Fraction(str(self.budget)) * weights - sum(count * width for count, width in fixed)
        choice = choose(
            np.array([unit.costs for unit in units]),
            np.array([[int(size / step) for size in row] for row in sizes], dtype=np.int64),
            floor(spare / step),
        )
        if choice is None:
            least = self.budget + float((sum(min(row) for row in sizes) - spare) / weights)
            where = "this model" if self.scope == "model" else f"layer {units[0].block}"
            raise UnsupportedError(
                f"{self.name}: budget is {self.budget} bits per weight, but {where} costs {least:.4f} with every "
                "allocated weight at its narrowest strategy; expected at least that: raise the budget, or give "
                "narrower strategies"
            )
        return [self.strategies[option] for option in choice.options], choice.cost, choice.bound

    def _units(self, block: int, found: Mapping[str, Any]) -> list[Unit]:
        """What is allocated in a block, its Linears before its experts."""
        together: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, linear in found["linears"].items():
            if "sensitivity" in linear:
                role = role_of(name)
                together[name.removesuffix(role), ALIKE[0] if role in ALIKE else role].append(name)
        units = []
        for names in together.values():
            own = [found["linears"][name] for name in names]
            units.append(_unit(block, names, None, [e["shape"] for e in own], [e["sensitivity"] for e in own]))
        experts = found.get("experts", {"tokens": [], "alike": []})
        for expert in range(len(experts["tokens"])):
            for names in experts["alike"]:
                shapes = [experts["shapes"][name] for name in names]
                costs = [experts["sensitivity"][name][expert] for name in names]
                units.append(_unit(block, names, expert, shapes, costs))
        return units

    def _fixed(self, found: Mapping[str, Any]) -> list[tuple[int, Fraction]]:
        """Number of weights and counted bits of each Linear of a block whose strategy is fixed."""
        placed = [(prod(linear["shape"]), self._placement(name)) for name, linear in found["linears"].items()]
        return [(weights, self._width(place)) for weights, place in placed if isinstance(place, Strategy)]

    def _width(self, strategy: Strategy) -> Fraction:
        """Bits per weight as the budget counts them."""
        grouped = self.count == "nominal" and strategy.group_size
        return strategy.bits + (Fraction(GROUP_OVERHEAD_BITS, strategy.group_size) if grouped else Fraction(0))

    def _placement(self, name: str) -> Placement:
        """Of a Linear by its name in the block."""
        if SHARED in name:
            return self.shared_experts
        return self.attention if ATTENTION in name else self.dense_layers

    def _account(
        self,
        units: Sequence[Unit],
        fixed: Sequence[tuple[int, Fraction]],
        chosen: Mapping[tuple[int, str, int | None], Strategy],
    ) -> dict[str, Any]:
        """What the allocation comes to, as JSON values: bits per counted weight, and units by strategy."""
        strategies = [chosen[unit.block, unit.names[0], unit.expert] for unit in units]
        parts = [(unit.weights, self._width(s)) for unit, s in zip(units, strategies, strict=True)] + list(fixed)
        weights = sum(count for count, _ in parts)
        bits = sum(count * width for count, width in parts)
        counts = Counter(strategies)
        return {
            "reached": float(bits / weights) if weights else None,
            "units": [asdict(strategy) | {"count": counts[strategy]} for strategy in self.strategies],
        }

    def _of_block(
        self,
        block: int,
        found: Mapping[str, Any],
        chosen: Mapping[tuple[int, str, int | None], Strategy],
        account: Mapping[str, Any],
    ) -> MixedGPTQ:
        linears: dict[str, Strategy | None] = {}
        for name in found["linears"]:
            place = self._placement(name)
            linears[name] = place if isinstance(place, Strategy) else chosen.get((block, name, None))
        experts = found.get("experts", {"shapes": {}, "tokens": []})
        banks = {
            name: tuple(chosen[block, name, expert] for expert in range(len(experts["tokens"])))
            for name in experts["shapes"]
        }
        return MixedGPTQ(linears, banks, self.block_size, self.percdamp, account=account)


def _digits(value: Tensor) -> float:
    return float(f"{float(value):.{DIGITS}g}")


def _unit(
    block: int,
    names: Sequence[str],
    expert: int | None,
    shapes: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
) -> Unit:
    total = tuple(map(sum, zip(*costs, strict=True)))
    return Unit(block, tuple(names), expert, sum(map(prod, shapes)), total)


def _common(sizes: Iterator[Fraction]) -> Fraction:
    """The greatest number of which all sizes are multiples."""
    values = list(sizes)
    denominator = reduce(lcm, (value.denominator for value in values))
    return Fraction(reduce(gcd, (int(value * denominator) for value in values)), denominator)
