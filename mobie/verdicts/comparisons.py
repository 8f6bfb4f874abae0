"""From the numbers of a check to the outcomes of its comparisons.

A number has an interval; against a bound it *holds* beyond it, is *within noise*, or is *opposite* beyond it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobie.comparable import KINDS as GATED
from mobie.comparable import comparability
from mobie.paper.printed import same_model
from mobie.results import Model, Results
from mobie.verdicts.arithmetic import evaluate
from mobie.verdicts.document import Check, Ours, Relation, Value
from mobie.verdicts.sampling import CONFIDENCE, Draws, half_width
from mobie.verdicts.sources import EXACT, Drawn, Hole, Reader, first_hole, stacked
from mobie.verdicts.verdict import Case, Outcome, Scope, Test


def tests_of(reader: Reader, ours: Ours) -> int:
    """How many comparisons could each refute a statement that needs all of them."""
    if ours.require == "any":
        return 1
    return sum(len(_fillings(check)) * len(_models(reader, check)) for check in ours.checks if not check.beside)


def _fillings(check: Check) -> list[dict[str, str]]:
    names = list(check.for_each)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*check.for_each.values())]


def _models(reader: Reader, check: Check) -> list[list[Model]]:
    """Models of a check, one by one or pooled; a suite without any model of the paper's uses its own in their place."""
    models = reader.results.models(check.models)
    if check.only:
        named = [model for model in models if any(same_model(model.label, name) for name in check.only)]
        stand_ins = [model for model in models if not model.in_paper]
        absent = f"the suite's {check.models} does not have the model {' or '.join(check.only)}"
        models = named or stand_ins or [Model(check.only[0], check.only[0], None, absent)]
    return [models] if check.pool else [[model] for model in models]


def run_check(reader: Reader, check: Check, tests: int) -> Iterator[Case]:
    """All comparisons of a check; `tests` of them could each refute the statement."""
    for models in _models(reader, check):
        for names in _fillings(check):
            yield _case(reader, check, models, names, tests)


def _case(reader: Reader, check: Check, models: Sequence[Model], names: dict[str, str], tests: int) -> Case:
    reader.used.clear()
    found = _values(reader, check, models, names)
    gate = _gate(reader.results, models, reader.used)
    hole = first_hole(found.values())
    label = _put_in(check.name, names)
    scope: Scope = "paper" if all(model.in_paper for model in models) else "nano"
    compared = _compared(check, scope)
    told: dict[str, Any] = {
        "label": label,
        "model": ", ".join(model.label for model in models),
        "scope": scope,
        "unit": check.unit,
        "digits": check.digits,
        "beside": check.beside,
        "compared": "; ".join(f"{kind} {relation}" for kind, relation in compared.items()),
        "gate": gate,
    }
    if hole is not None:
        return Case(**told, outcome="missing", value=None, tolerance=None, reason=hole.reason)
    drawn = {name: value for name, value in found.items() if isinstance(value, Drawn)}
    draws = evaluate(check.compute, {name: value.draws for name, value in drawn.items()})
    if not np.isfinite(draws).all():
        reason = f"{check.compute} is not a number for these values: a denominator is or comes close to zero"
        return Case(**told, outcome="missing", value=None, tolerance=None, reason=reason, records=tuple(reader.used))
    parts = list(drawn.values())
    basis = frozenset().union(*(part.basis for part in parts))
    blind = all(part.at_chance for part in parts)
    return Case(
        **told,
        outcome="within noise" if blind and compared else _outcome(draws, compared, tests, basis == {EXACT}),
        value=float(draws[0]),
        tolerance=half_width(draws),
        basis=tuple(sorted(basis)),
        gaps=tuple(sorted(frozenset().union(*(part.gaps for part in parts)))),
        reason="no accuracy in it is above chance" if blind and compared else "",
        records=tuple(reader.used),
    )


def _gate(results: Results, models: Sequence[Model], records: Iterable[str]) -> str:
    """What the protocol gate has against comparing these numbers with the printed ones.

    All of the paper's models are asked for, so that a plan lists their records; of others the verdict says what they
    are.
    """
    found = {model.label: comparability(results, model) for model in models if model.in_paper and model.absent is None}
    if GATED.isdisjoint(Path(record).stem for record in records):
        return ""
    return "; ".join(f"{label} is {found.sentence}" for label, found in found.items() if found.state != "yes")


def _values(reader: Reader, check: Check, models: Sequence[Model], names: dict[str, str]) -> dict[str, Drawn | Hole]:
    """Every value of a check, all of them read even where one is a hole: a plan must list them all."""
    values = {name: _filled(value, names) for name, value in check.values.items()}
    against_one_run = check.stated is not None and check.stated.kind == "equals"
    context = reader.context(values.values(), against_one_run=against_one_run)
    found = {name: [reader.read(value, model, context) for model in models] for name, value in values.items()}
    return {name: stacked(parts) if check.pool else parts[0] for name, parts in found.items()}


def _filled(value: Value, names: dict[str, str]) -> Value:
    """A value with the names of `for_each` put in."""
    fields = value.model_dump(exclude_defaults=True)
    for key, text in fields.items():
        if isinstance(text, str):
            fields[key] = _put_in(text, names)
    return Value.model_validate(fields)


def _put_in(text: str, names: dict[str, str]) -> str:
    for name, replacement in names.items():
        text = text.replace(f"{{{name}}}", replacement)
    return text


def _compared(check: Check, scope: Scope) -> dict[str, Relation]:
    """What the number is compared with on a model: a stated magnitude is the paper's models' alone."""
    relations = {"direction": check.direction, "stated": check.stated}
    if scope == "nano" and not check.any_model:
        del relations["stated"]
    return {kind: relation for kind, relation in relations.items() if relation is not None}


def _outcome(draws: Draws, compared: dict[str, Relation], tests: int, is_exact: bool) -> Outcome:
    """The outcome of the stated relation where the direction holds too, else how far the direction holds."""
    direction = against(draws, compared["direction"], tests, is_exact) if "direction" in compared else None
    stated = against(draws, compared["stated"], tests, is_exact) if "stated" in compared else None
    if direction is None and stated is None:
        return "shown"
    if direction is None or stated is None:
        return direction or stated or "shown"
    if direction != "holds":
        return direction
    outcomes: dict[Test, Outcome] = {"holds": "holds", "within noise": "within noise", "opposite": "direction"}
    return outcomes[stated]


def against(draws: Draws, relation: Relation, tests: int = 1, is_exact: bool = False) -> Test:
    """Whether a number holds against a bound beyond its interval, is within noise, or is opposite beyond it.

    draws:    the value, then its draws.
    tests:    comparisons of which one that is opposite is looked for.
    is_exact: the number is known exactly, so a tie is one; a measured tie is within noise.
    """
    value, half, wide = float(draws[0]), half_width(draws), half_width(draws, tests)
    gap = value - relation.bound
    if relation.kind == "place":
        share = float((draws[1:] == relation.bound).mean())
        if gap == 0 and share >= CONFIDENCE:
            return "holds"
        return "opposite" if share < (1 - CONFIDENCE) / tests else "within noise"
    if relation.kind == "equals":
        return "holds" if abs(gap) <= half + relation.slack + 1e-9 else "opposite"
    if relation.kind == "not_above":
        return "holds" if gap <= half else "opposite" if gap > wide else "within noise"
    if relation.kind in ("below", "at_most"):
        gap = -gap
    if gap == 0:
        holds = relation.kind in ("at_least", "at_most")
        return ("holds" if holds else "opposite") if is_exact else "within noise"
    if gap > half:
        return "holds"
    return "opposite" if gap < -wide else "within noise"
