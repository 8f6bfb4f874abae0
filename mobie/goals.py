"""Goals of our method (`mobie/paper/goals.yaml`) and what records say of each: holds, does not hold, not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from pydantic import Field, model_validator

from mobie.config import Scope, Strict, parse, read_yaml
from mobie.excess import (
    budget_of,
    comparison,
    difference,
    excess,
    first_hole,
    least_similarity,
    ratio,
    rows_of,
    stored_bits,
)
from mobie.paths import PACKAGE
from mobie.results import Cell, Model, Results

Verdict = Literal["holds", "does not hold", "not measured"]
GOALS = PACKAGE / "paper" / "goals.yaml"


class Goal(Strict):
    """One goal; the file says what its keys mean."""

    measure: Literal["excess", "unbeaten", "routing", "stored"]
    budget: float | None
    rival: str = ""
    share: float = Field(default=1.0, gt=0)
    within: float = Field(default=0.0, ge=0)
    statement: str

    @model_validator(mode="after")
    def _rival(self) -> Goal:
        if (self.measure in ("excess", "routing")) != bool(self.rival):
            raise ValueError("`excess` and `routing` have a rival, the other measures have none")
        return self


class _Goals(Strict):
    goals: tuple[Goal, ...] = Field(min_length=1, strict=False)


@cache
def load_goals() -> tuple[Goal, ...]:
    """The goals in their order. Raises `ConfigError` for a file of another form."""
    return parse(_Goals, read_yaml(GOALS), str(GOALS)).goals


@dataclass(frozen=True)
class Judged:
    """A goal at one budget, on one model and in one scope.

    method: our row; empty where the suite has none with this budget.
    ours, theirs: the two numbers that are compared; holes say why nothing is.
    against: what the second number is of.
    texts:  on how many of the texts it holds by itself, `2 of 3`; empty where the measure is not taken by text.
    """

    goal: Goal
    model: Model
    scope: Scope
    budget: float | None
    method: str
    ours: Cell
    theirs: Cell
    verdict: Verdict
    against: str = ""
    texts: str = ""

    @property
    def share(self) -> Cell:
        """Our number as a share of the other."""
        return ratio(self.ours, self.theirs)


def judge_goals(results: Results) -> list[Judged]:
    """Every goal on every model and in every scope, at each of its budgets."""
    return [
        judged
        for model in results.models("goals")
        for scope in comparison(results).scopes.values()
        for goal in load_goals()
        for judged in _at_budgets(results, model, scope, goal)
    ]


def _at_budgets(results: Results, model: Model, scope: Scope, goal: Goal) -> Iterator[Judged]:
    dial = {budget_of(results, name): name for name in scope.dial}
    wanted: list[float | None] = [*sorted(dial)] if goal.budget is None else [goal.budget]
    for budget in wanted or [None]:
        name = dial.get(budget, "") if budget is not None else ""
        if not name:
            yield _absent(goal, model, scope, budget, "no row of our method with this budget")
        elif goal.rival and goal.rival not in scope.rivals:
            yield _absent(goal, model, scope, budget, f"no {goal.rival} in this scope")
        else:
            judged = Judged(goal, model, scope, budget, name, NOTHING, NOTHING, "not measured")
            yield MEASURES[goal.measure](results, judged)


NOTHING = Cell(None, status="missing", reason="not measured")


def _absent(goal: Goal, model: Model, scope: Scope, budget: float | None, reason: str) -> Judged:
    hole = Cell(None, status="absent", reason=f"the suite has {reason}")
    return Judged(goal, model, scope, budget, "", hole, hole, "not measured")


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "does not hold"


def _excess(results: Results, known: Judged) -> Judged:
    """Means over texts and seeds; on how many texts it holds is said beside."""
    goal, rival = known.goal, known.scope.rivals[known.goal.rival]

    def both(texts: tuple[str, ...]) -> tuple[Cell, Cell]:
        ours, theirs = (excess(results, known.model, name, texts) for name in (known.method, rival))
        return ours, theirs

    def holds(ours: Cell, theirs: Cell) -> bool | None:
        return None if ours.value is None or theirs.value is None else ours.value <= goal.share * theirs.value

    ours, theirs = both(results.protocol.texts)
    found = replace(known, ours=ours, theirs=theirs, against=results.method(rival).label)
    by_text = [holds(*both((text,))) for text in results.protocol.texts]
    kept = holds(ours, theirs)
    if kept is None:
        return found
    return replace(found, verdict=_verdict(kept), texts=f"{sum(map(bool, by_text))} of {len(by_text)}")


@dataclass(frozen=True)
class _Other:
    """Another row on one text: bits that it stores, its loss less ours, and the reach of that difference's interval."""

    name: str
    text: str
    stored: Cell
    above: Cell
    reach: float

    @property
    def margin(self) -> float:
        """The upper end of the interval; below zero the other's loss is lower for sure."""
        return math.inf if self.above.value is None else self.above.value + self.reach


def _unbeaten(results: Results, known: Judged) -> Judged:
    """Every other row that stores as much or less, on every text; the two numbers are of the one that comes nearest."""
    model, texts, component = known.model, results.protocol.texts, known.scope.component
    size = stored_bits(results, model, known.method, component)
    mean = excess(results, model, known.method, texts)
    others = [
        _Other(
            name,
            text,
            stored_bits(results, model, name, component),
            *difference(results, model, name, known.method, (text,)),
        )
        for name in rows_of(results, known.scope)
        for text in texts
        if name not in known.scope.dial
    ]
    as_small = [one for one in others if (one.stored.value or 0.0) <= (size.value or math.inf)]
    cells = [size, mean, *(cell for one in as_small for cell in (one.stored, one.above))]
    hole = first_hole(cells)
    beaten = {one.text for one in as_small if one.margin < 0}
    nearest = min(as_small, key=lambda one: one.margin, default=None)
    if hole is not None and not beaten:
        return replace(known, ours=hole, theirs=hole)
    found = replace(known, verdict=_verdict(not beaten), texts=f"{len(texts) - len(beaten)} of {len(texts)}")
    if nearest is None:
        nothing = Cell(None, status="absent", reason="no other row stores as little")
        return replace(found, ours=mean, theirs=nothing)
    ours, theirs = (excess(results, model, name, (nearest.text,)) for name in (known.method, nearest.name))
    against = f"{results.method(nearest.name).label} on {nearest.text}"
    return replace(found, ours=ours, theirs=theirs, against=against)


def _routing(results: Results, known: Judged) -> Judged:
    """The layer in which our similarity is lowest against the rival's."""
    rival = known.scope.rivals[known.goal.rival]
    ours, theirs = least_similarity(results, known.model, known.method, rival)
    found = replace(known, ours=ours, theirs=theirs, against=results.method(rival).label)
    if ours.value is None or theirs.value is None:
        return found
    return replace(found, verdict=_verdict(ours.value >= theirs.value))


def _stored(results: Results, known: Judged) -> Judged:
    """Bits from bytes against the budget that they were to meet."""
    assert known.budget is not None  # a row of the dial has one
    ours = stored_bits(results, known.model, known.method, known.scope.component)
    found = replace(known, ours=ours, theirs=Cell(known.budget), against="the budget")
    if ours.value is None:
        return found
    return replace(found, verdict=_verdict(abs(ours.value / known.budget - 1) <= known.goal.within))


MEASURES = {"excess": _excess, "unbeaten": _unbeaten, "routing": _routing, "stored": _stored}
