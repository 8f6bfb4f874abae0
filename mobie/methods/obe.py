"""OBE, output-aware binarization of experts: sign planes where the loss needs them, fitted to the layers' outputs.

Ours, not the paper's: `obe.md` beside this file derives it on a page. A matrix is a sum of sign planes with one scale
per row; which columns get how many planes is decided for the whole model at once, under a budget of stored bytes.

    survey      of every column, its importance: what the loss would lose with it (loss-weighted Hessian)
    allocate    planes to columns at one price per bit, for experts, attention and shared experts alike
    quantize    signs by error feedback, row scales and ratios by least squares on the outputs, in turns

A column or an expert that the loss hardly needs gets no plane and is zero: pruning is the end of the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mobie.errors import ConfigError, UnsupportedError
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, map_experts, register
from mobie.methods.fp16 import FP16
from mobie.methods.hessian import damp
from mobie.methods.mixed_bits import role_of
from mobie.methods.plane_budget import Candidate, share_out, summarize
from mobie.methods.plane_fit import MOST_PLANES, fit_planes
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed
from mobie.packing.planes import PlaneMatrix, stored_bytes


@dataclass(frozen=True)
class Allotment:
    """What a matrix was given: of its columns, how many each plane covers."""

    columns: int
    plane_columns: tuple[int, ...]

    @property
    def bits(self) -> float:
        """Signs per weight."""
        return sum(self.plane_columns) / self.columns


def listed(allotments: Sequence[Allotment]) -> dict[str, list[Any]]:
    """Of several experts, as JSON values, one list per field."""
    return {"bits": [own.bits for own in allotments], "plane_columns": [list(own.plane_columns) for own in allotments]}


def column_importance(weight: Tensor, hessian: Tensor) -> Tensor:
    """`‖W_j‖² H_jj` of every column: twice what zeroing it alone adds to the error that H measures.

    Args:
        weight: `(…, out, in)`.
        hessian: `(…, in, in)`.

    Returns:
        `(…, in)`.
    """
    return weight.square().sum(-2) * hessian.diagonal(dim1=-2, dim2=-1)


def counts_of(importance: Tensor, allotments: Sequence[Allotment]) -> Tensor:
    """Planes of every column `(experts, in)`, the most important ones first; importance `(experts, in)`."""
    rank = importance.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    counts = torch.zeros_like(rank)
    for expert, own in enumerate(allotments):
        for columns in own.plane_columns:
            counts[expert] += rank[expert] < columns
    return counts


@dataclass(frozen=True)
class Fitting:
    """How planes are fitted, once it is known how many each column has (`plane_fit.fit_planes`).

    rounds, refit_scales, error_feedback, sign_sweeps: see `OBE`.
    """

    rounds: int
    refit_scales: bool
    error_feedback: bool
    sign_sweeps: int
    percdamp: float

    def quantize(
        self, weights: Mapping[str, Tensor], stats: Sequence[LinearStats], allotments: Mapping[str, Sequence[Allotment]]
    ) -> list[dict[str, Packed]]:
        """Quantize weights `(experts, out, in)` that share their inputs."""
        hessian = torch.stack([own.hessian for own in stats])
        damped, dead = damp(hessian, self.percdamp)
        packed: list[dict[str, Packed]] = [{} for _ in stats]
        for name, weight in weights.items():
            seen = weight.masked_fill(dead[:, None], 0)
            counts = counts_of(column_importance(seen, hessian), allotments[name])
            planes = fit_planes(
                seen,
                damped,
                counts,
                rounds=self.rounds,
                refits=self.refit_scales,
                feeds_back=self.error_feedback,
                sweeps=self.sign_sweeps,
            )
            for expert, own in enumerate(counts):
                most = int(own.max())
                ratio = [planes.ratio[expert, p, q] for p in range(1, most + 1) for q in range(p)]
                packed[expert][name] = PlaneMatrix.pack(
                    planes.signs[:, expert], planes.row_scale[expert], weight.new_tensor(ratio), own
                )
        return packed


@dataclass(frozen=True)
class AllottedOBE(Method):
    """OBE of one block, the planes of every matrix given.

    linears: by the field's name (`q_proj`); what is missing stays in 16 bits.
    experts: projection → of every expert; empty for a block without experts.
    account: what the planes come to over the whole model, for the record, as JSON values.
    """

    name: ClassVar[str] = "allotted-obe"

    fitting: Fitting
    linears: Mapping[str, Allotment] = field(default_factory=dict)
    experts: Mapping[str, tuple[Allotment, ...]] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "linears": {name: asdict(own) | {"bits": own.bits} for name, own in self.linears.items()},
            "experts": {name: listed(each) for name, each in self.experts.items()},
            "account": dict(self.account),
        }

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Quantize the block's only Linear."""
        name = next(iter(self.linears), "")
        return self.quantize_group({name: weight}, {name: stats})[name]

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        chosen = [name for name in weights if name in self.linears]
        packed: dict[str, Packed] = {
            name: FP16().quantize_linear(weight, stats[name]) for name, weight in weights.items() if name not in chosen
        }
        if chosen:
            alone = {name: weights[name][None] for name in chosen}
            allotments = {name: [self.linears[name]] for name in chosen}
            packed |= self.fitting.quantize(alone, [stats[chosen[0]]], allotments)[0]
        return packed

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, PackedBank]:
        packed: dict[str, PackedBank] = {}
        for names in bank.same_input:

            def some(experts: range, device: torch.device, names: tuple[str, ...] = names) -> list[dict[str, Packed]]:
                chosen = slice(experts.start, experts.stop)
                weights = {name: bank.projections[name][chosen].to(device) for name in names}
                allotments = {name: self.experts[name][chosen] for name in names}
                return self.fitting.quantize(weights, stats.of(names[0], experts, device), allotments)

            shapes = [bank.projections[name].shape[1:] for name in names]
            parts = map_experts(bank, self.expert_bytes(shapes), some)
            packed |= {name: PackedBank(tuple(part[name] for part in parts)) for name in names}
        return {name: packed[name] for name in bank.projections}

    def expert_bytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        columns, weights = shapes[0][1], max(rows * columns for rows, columns in shapes)
        return 4 * (4 * columns**2 + (6 + 3 * MOST_PLANES) * weights)


@dataclass(frozen=True)
class _Place:
    """Where a candidate lies; expert None for a Linear."""

    block: int
    name: str
    expert: int | None


@register
@dataclass(frozen=True)
class OBE(AllocatingMethod):
    """Sign planes by importance, fitted to outputs; each part is a switch.

    budget:         stored bits per weight, every byte counted, of all that is quantized; the decimal number as written.
    scope:          "model" shares it among attention, shared experts, dense layers and experts; "experts" quantizes the
                    routed experts alone and leaves the rest in 16 bits.
    importance:     of a column, by the loss's gradients ("loss"), or by the share of its matrix's output ("output").
    allocation:     "global" has one price per bit for the whole model; "matrix" gives every matrix the budget.
    planes:         of a column, at most.
    rounds:         of choosing signs, each with the scales that the last one's signs were given.
    refit_scales:   by least squares on the outputs; off: row scales and ratios of normally distributed weights.
    error_feedback: later columns make up for the errors of earlier ones; off: every weight goes to its nearest level.
    sign_sweeps:    over all columns, turning single signs where that lowers the output error.
    percdamp:       of the Hessians, as in GPTQ.
    """

    name: ClassVar[str] = "obe"
    guided_by: ClassVar[tuple[str, Any] | None] = ("importance", "loss")
    gradient_options: ClassVar[tuple[str, ...]] = ()
    seconds_per_weight: ClassVar[float] = 8.2e-7
    stored_bits: ClassVar[float | str] = "budget"
    stores_signs: ClassVar[bool] = True

    budget: float = 1.5
    scope: Literal["model", "experts"] = "model"
    importance: Literal["loss", "output"] = "loss"
    allocation: Literal["global", "matrix"] = "global"
    planes: int = MOST_PLANES
    rounds: int = 2
    refit_scales: bool = True
    error_feedback: bool = True
    sign_sweeps: int = 0
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.budget < float("inf"):
            raise ConfigError(f"obe: budget is {self.budget}; expected a positive number of stored bits (1.5)")
        for option, least, most in (("planes", 1, MOST_PLANES), ("rounds", 1, 100), ("sign_sweeps", 0, 100)):
            value = getattr(self, option)
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"obe: {option} is {value!r}; expected a whole number from {least} to {most}")
        if type(self.percdamp) not in (int, float) or not 0 <= self.percdamp < float("inf"):
            raise ConfigError(f"obe: percdamp is {self.percdamp!r}; expected a number of at least 0 (0.01)")

    def survey(self, view: LayerView) -> dict[str, Any]:
        found: dict[str, Any] = {"linears": {}}
        if self.scope == "model":
            for name, weight in view.linears.items():
                found["linears"][name] = self._finding(weight, view.linear_stats[name])
        if view.bank is not None and view.bank_stats is not None:
            banks = view.bank.projections
            found["experts"] = {
                "tokens": [int(n) for n in view.bank_stats.tokens[next(iter(banks))]],
                "matrices": {
                    name: [self._finding(*pair) for pair in zip(weights, view.bank_stats.experts[name], strict=True)]
                    for name, weights in banks.items()
                },
            }
        return found

    def _finding(self, weight: Tensor, stats: LinearStats) -> dict[str, Any]:
        """Size and importances of a matrix."""
        if self.importance == "output":
            own = column_importance(weight, stats.hessian)
            own = own / own.sum().clamp(min=torch.finfo(own.dtype).tiny)
        else:
            assert stats.guided is not None  # `needs_gradients` says so
            own = stats.tokens * column_importance(weight, stats.guided.sum(0))
        return {"size": list(weight.shape), "importance": summarize(own)}

    def allocate(self, surveys: Sequence[Mapping[str, Any]]) -> list[Method]:
        places, candidates = self._candidates(surveys)
        weights = [out * columns for out, columns in (candidate.size for candidate in candidates)]
        if self.allocation == "global":
            chosen = share_out(candidates, int(self.budget * sum(weights) / 8), self.planes)
        else:
            alone = zip(candidates, weights, strict=True)
            chosen = [share_out([c], int(self.budget * n / 8), self.planes)[0] for c, n in alone]
        total = sum(stored_bytes(c.size, own) for c, own in zip(candidates, chosen, strict=True))
        full = sum(stored_bytes(c.size, (c.size[1],) * self.planes) for c in candidates)
        if full < self.budget * sum(weights) / 8:
            raise UnsupportedError(
                f"obe: budget is {self.budget} stored bits per weight; {self.planes} planes for every column take "
                f"{8 * full / sum(weights):.3f}, expected no more than that"
            )
        account = {
            "budget": self.budget,
            "reached": 8 * total / max(1, sum(weights)),
            "matrices": len(candidates),
            "matrices_without_planes": sum(not own for own in chosen),
        }
        allotments = [Allotment(c.size[1], own) for c, own in zip(candidates, chosen, strict=True)]
        return [self._allotted(block, places, allotments, account) for block in range(len(surveys))]

    def _candidates(self, surveys: Sequence[Mapping[str, Any]]) -> tuple[list[_Place], list[Candidate]]:
        found: list[tuple[_Place, Mapping[str, Any]]] = []
        for block, survey in enumerate(surveys):
            found += [(_Place(block, name, None), own) for name, own in survey["linears"].items()]
            for name, experts in survey.get("experts", {"matrices": {}})["matrices"].items():
                found += [(_Place(block, name, expert), own) for expert, own in enumerate(experts)]
        candidates = [Candidate((own["size"][0], own["size"][1]), np.array(own["importance"])) for _, own in found]
        return [place for place, _ in found], candidates

    def _allotted(
        self, block: int, places: Sequence[_Place], allotments: Sequence[Allotment], account: Mapping[str, Any]
    ) -> AllottedOBE:
        linears: dict[str, Allotment] = {}
        experts: dict[str, tuple[Allotment, ...]] = {}
        for place, own in zip(places, allotments, strict=True):
            if place.block == block and place.expert is None:
                linears[role_of(place.name)] = own
            elif place.block == block:
                experts[place.name] = (*experts.get(place.name, ()), own)
        fitting = Fitting(self.rounds, self.refit_scales, self.error_feedback, self.sign_sweeps, self.percdamp)
        return AllottedOBE(fitting, linears, experts, account)
