"""Does a protocol reproduce the paper's full-precision row of a model, and does the suite's own.

The paper says neither how WikiText-2 is joined and cut nor which of lm-eval's accuracies it prints. What our tables
show was measured under the suite's own protocol: only if that one gives every printed entry can our numbers and the
paper's be compared. If another one gives it, the reason names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mobie.paper.baseline import AVERAGES, PERPLEXITY, TASK_METRICS, Printed
from mobie.records import Measurement
from mobie.scoring.gate import GateProtocol

#: of a model's results with the paper's numbers
Comparable = Literal["yes", "no", "unknown"]
METRICS = ("acc", "acc_norm")
#: how an average reads its tasks → for people
READINGS = {
    "acc": "acc",
    "acc_norm": "acc_norm, acc where there is none",
    "tables": "the metrics that the tables show",
}


@dataclass(frozen=True)
class Candidate:
    """A value that may stand in a column of the paper's baseline row.

    column:      `wikitext2_ppl`, a task, or an average.
    label:       of the protocol, for people.
    own:         it is what the suite's tables show.
    measurement: perplexity, or a fraction.
    sampled:     its standard error counts: not that of a perplexity on the whole text, which is the text of the paper.
    """

    column: str
    label: str
    own: bool
    measurement: Measurement
    sampled: bool = True

    @property
    def scale(self) -> float:
        """What the paper's unit is in ours: it prints per cent."""
        return 1.0 if self.column == PERPLEXITY else 100.0


@dataclass(frozen=True)
class Comparison:
    """A candidate beside a printed entry, in the paper's unit."""

    candidate: Candidate
    printed: Printed
    tolerance: float

    @property
    def value(self) -> float:
        return self.candidate.measurement.value * self.candidate.scale

    @property
    def distance(self) -> float:
        """Ours less the printed value."""
        return self.value - self.printed.value

    @property
    def reproduces(self) -> bool:
        return abs(self.distance) <= self.tolerance


@dataclass(frozen=True)
class Conclusion:
    """Whether a model's results can be compared with the paper's, and why."""

    comparable: Comparable
    reason: str


def accuracy_candidates(accuracies: Sequence[Measurement]) -> list[Candidate]:
    """Every task with either metric; averages by `acc`, by `acc_norm` where there is one, and as the tables read it."""
    by_name = {m.name: m for m in accuracies}
    found = [
        Candidate(task, f"{task} {metric}", metric == TASK_METRICS[task], by_name[f"{task}.{metric}"])
        for task in TASK_METRICS
        for metric in METRICS
        if f"{task}.{metric}" in by_name
    ]
    for column, tasks in AVERAGES.items():
        readings = {
            "acc": dict.fromkeys(tasks, "acc"),
            "acc_norm": {task: "acc_norm" if f"{task}.acc_norm" in by_name else "acc" for task in tasks},
            "tables": {task: TASK_METRICS[task] for task in tasks},
        }
        for reading, metrics in readings.items():
            parts = [by_name.get(f"{task}.{metric}") for task, metric in metrics.items()]
            there = [part for part in parts if part is not None]
            if len(there) == len(parts):
                mean = _mean(f"{column}.{reading}", there)
                label = f"mean of {len(tasks)} tasks: {READINGS[reading]}"
                found.append(Candidate(column, label, reading == "tables", mean))
    return found


def _mean(name: str, parts: Sequence[Measurement]) -> Measurement:
    """Unweighted mean of accuracies, its standard error as if they were independent."""
    errors = [part.stderr for part in parts if part.stderr is not None]
    chances = [part.chance for part in parts if part.chance is not None]
    return Measurement(
        name,
        math.fsum(part.value for part in parts) / len(parts),
        math.sqrt(math.fsum(error**2 for error in errors)) / len(parts) if len(errors) == len(parts) else None,
        sum(part.n for part in parts),
        math.fsum(chances) / len(parts) if len(chances) == len(parts) else None,
    )


def tolerance(candidate: Candidate, printed: Printed, gate: GateProtocol) -> float:
    """How far a candidate may be from a printed entry, in the paper's unit; see `GateProtocol`."""
    allowed = [printed.half_unit]
    if candidate.column == PERPLEXITY:
        allowed.append(gate.perplexity_relative * printed.value)
    if candidate.sampled and candidate.measurement.stderr is not None:
        allowed.append(gate.stderrs * candidate.measurement.stderr * candidate.scale)
    return max(allowed)


def compare(candidates: Iterable[Candidate], printed: Sequence[Printed], gate: GateProtocol) -> list[Comparison]:
    """Every candidate with every printed entry of its column."""
    return [
        Comparison(candidate, entry, tolerance(candidate, entry, gate))
        for candidate in candidates
        for entry in printed
        if entry.column == candidate.column
    ]


def conclude(comparisons: Sequence[Comparison], printed: Sequence[Printed]) -> Conclusion:
    """The verdict on a model: every printed column must be reproduced by the suite's own protocol.

    A column that the paper prints twice, with different values, is reproduced by either of them. One that could not be
    measured leaves the question open, unless another column has answered it.
    """
    columns = list(dict.fromkeys(entry.column for entry in printed))
    if not columns:
        return Conclusion("unknown", "no printed baseline, nothing to compare")
    off, missing = [], []
    for column in columns:
        own = [c for c in comparisons if c.printed.column == column and c.candidate.own]
        if not own:
            missing.append(column)
        elif not any(c.reproduces for c in own):
            off.append(_off(own[0], comparisons))
    if off:
        return Conclusion("no", "; ".join(off))
    if missing:
        return Conclusion("unknown", f"not measured under the suite's protocol: {', '.join(missing)}")
    return Conclusion("yes", f"the suite's protocol gives {', '.join(columns)} as printed, within the tolerance")


def _off(own: Comparison, comparisons: Sequence[Comparison]) -> str:
    """That the suite's protocol misses a printed entry, and which one meets it."""
    column = own.printed.column
    others = [c for c in comparisons if c.printed.column == column and c.reproduces]
    best = min(others, key=lambda c: abs(c.distance), default=None)
    met = f"{best.candidate.label} gives {best.value:.2f}" if best else "no protocol of the grid gives it"
    return f"{column}: {own.value:.2f}, printed {own.printed.text} ({own.printed.tables}); {met}"


def told(candidates: Iterable[Candidate], comparisons: Iterable[Comparison], conclusion: Conclusion) -> dict[str, Any]:
    """JSON values of the verdict, in the paper's units."""
    return {
        "comparable": conclusion.comparable,
        "why": conclusion.reason,
        "protocols": [
            {"name": c.measurement.name, "column": c.column, "label": c.label, "own": c.own} for c in candidates
        ],
        "comparisons": [
            {
                "name": c.candidate.measurement.name,
                "column": c.printed.column,
                "printed": c.printed.text,
                "tables": c.printed.tables,
                "distance": c.distance,
                "tolerance": c.tolerance,
                "reproduces": c.reproduces,
            }
            for c in comparisons
        ],
    }
