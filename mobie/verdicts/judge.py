"""From the numbers of a check to the verdict on a statement.

A number has an interval; against a bound it *holds* beyond it, is *within noise*, or is *opposite* beyond it. Where a
statement needs all of several comparisons, one that is opposite refutes it; as the chance of a false one grows with
their number, it must be opposite at the error rate divided by it (Bonferroni). Holding needs no such correction: all
must hold.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobie.comparable import KINDS as GATED
from mobie.comparable import comparability
from mobie.paper.audit import Report, audit
from mobie.paper.printed import same_model
from mobie.paths import Layout
from mobie.results import Model, Results
from mobie.tables.table10 import text_names
from mobie.verdicts import document
from mobie.verdicts.arithmetic import evaluate
from mobie.verdicts.document import Check, Ours, Relation, Value, load_ours
from mobie.verdicts.sampling import CONFIDENCE, Draws, Sampler, half_width
from mobie.verdicts.sources import EXACT, Drawn, Hole, Reader, first_hole, stacked

Test = Literal["holds", "within noise", "opposite"]
#: of one comparison; `shown`: there is a number, and nothing that it could be compared with on this model
Outcome = Literal["holds", "direction", "within noise", "opposite", "shown", "missing"]
Scope = Literal["paper", "nano"]

NOT_RUN, NOT_CHECKABLE = "not run", "not checkable"
VERDICTS: dict[Scope, dict[Outcome, str]] = {
    "paper": {
        "holds": "reproduced",
        "direction": "direction only",
        "within noise": "within noise",
        "opposite": "not reproduced",
    },
    "nano": {
        "holds": "direction only (nano model)",
        "direction": "direction only (nano model)",
        "within noise": "within noise (nano model)",
        "opposite": "not reproduced (nano model)",
    },
}
MEANING = {
    "reproduced": "on the paper's own model, the stated relation or value holds within the tolerance.",
    "direction only": "on the paper's own model the direction holds beyond noise; the stated magnitude does not, or is "
    "not measured.",
    "within noise": "on the paper's own model the interval of ours does not decide.",
    "not reproduced": "on the paper's own model ours is opposite beyond noise, or off the stated value by more than "
    "the tolerance where no direction is stated.",
    "direction only (nano model)": "the direction holds beyond noise on a model that is not the paper's. The magnitude "
    "is not compared. It says nothing about the paper's models.",
    "within noise (nano model)": "on a model that is not the paper's, the interval does not decide the direction.",
    "not reproduced (nano model)": "on a model that is not the paper's, the direction is opposite beyond noise. It "
    "says nothing about the paper's models.",
    NOT_RUN: "a record, a method or a model is missing; the reason says which.",
    NOT_CHECKABLE: "no measurement of this suite's models can confirm or refute it; the reason says why.",
}
#: worst first: what a statement is that needs all of its comparisons, or any of them
ALL_ORDER: tuple[Outcome, ...] = ("opposite", "within noise", "missing", "direction", "holds", "shown")
ANY_ORDER: tuple[Outcome, ...] = ("holds", "direction", "within noise", "missing", "opposite", "shown")


@dataclass(frozen=True)
class Case:
    """One comparison.

    value, tolerance: ours and half its interval, in `unit`; None where it is missing.
    compared:         with what, in words.
    beside:           shown only; the verdict does not rest on it.
    basis, gaps:      what the tolerance rests on, and what it leaves out.
    gate:             why a model of the paper's has numbers that may not be compared with the printed ones; empty
                      where they may, or no protocol of the gate's decides them.
    """

    label: str
    model: str
    scope: Scope
    outcome: Outcome
    value: float | None
    tolerance: float | None
    unit: str
    digits: int
    compared: str
    beside: bool = False
    basis: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    reason: str = ""
    records: tuple[str, ...] = ()
    gate: str = ""

    @property
    def shown(self) -> str:
        """`−12.3 ± 1.2 %`."""
        if self.value is None:
            return "–"
        error = "" if not self.tolerance else f" ± {self.tolerance:.{self.digits}f}"
        return f"{self.value:.{self.digits}f}{error}{f' {self.unit}' if self.unit else ''}"


@dataclass(frozen=True)
class ClaimVerdict:
    """A statement with the verdict of the paper's own entries and of ours."""

    id: str
    where: tuple[str, ...]
    claim: str
    paper: str
    verdict: str
    reason: str
    cases: tuple[Case, ...] = ()
    proxy: str = ""
    note: str = ""

    @property
    def tolerance_source(self) -> str:
        """What the tolerances rest on, and what they leave out."""
        basis = sorted({word for case in self.cases for word in case.basis})
        gaps = sorted({word for case in self.cases for word in case.gaps})
        return "; ".join([*basis, *(f"not in it: {gap}" for gap in gaps)])

    @property
    def gate(self) -> str:
        """Which of its models have numbers that may not be compared with the paper's, and why; empty where none has."""
        return "; ".join(dict.fromkeys(case.gate for case in self.cases if case.gate))

    @property
    def records(self) -> tuple[str, ...]:
        """Records behind the values, in order."""
        return tuple(dict.fromkeys(record for case in self.cases for record in case.records))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {
            "tolerance_source": self.tolerance_source,
            "records": self.records,
            "gate": self.gate,
        }


@dataclass(frozen=True)
class Verdicts:
    """All statements, in the order of the paper's file.

    notes: what a reader must know about the suite and its texts.
    """

    suite: str
    notes: tuple[str, ...]
    title: str
    claims: tuple[ClaimVerdict, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Statements by our verdict, in the order of `MEANING`."""
        found = Counter(claim.verdict for claim in self.claims)
        return {verdict: found[verdict] for verdict in MEANING if found[verdict]}

    @property
    def paper_counts(self) -> dict[str, int]:
        """Statements by the verdict of the paper's own entries."""
        return dict(sorted(Counter(claim.paper for claim in self.claims).items()))

    def claim(self, name: str) -> ClaimVerdict:
        """The verdict on a statement."""
        return next(claim for claim in self.claims if claim.id == name)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "suite": self.suite,
            "notes": self.notes,
            "title": self.title,
            "meaning": MEANING,
            "counts": self.counts,
            "paper_counts": self.paper_counts,
            "claims": [claim.as_dict() for claim in self.claims],
        }


def judge(results: Results) -> Verdicts:
    """Judge every statement with the records of a suite; what has not run is `not run` with its reason.

    Raises:
        ConfigError: a mistake in `claims.yaml` or `ours.yaml`.
        DataError: a damaged record.
    """
    ours, cases = load_ours(), _cases(results)
    report = _audited(document.FILE.parent)
    verdicts = []
    for paper in report.claims:
        entry, found = ours.claims[paper.id], cases[paper.id]
        verdict, reason = decide(entry, found)
        told = (entry.proxy or "", entry.note)
        verdicts.append(ClaimVerdict(paper.id, paper.where, paper.claim, paper.verdict, verdict, reason, found, *told))
    return Verdicts(results.suite_name, _notes(results), report.title, tuple(verdicts))


@cache
def _audited(folder: Path) -> Report:
    return audit(folder)


def _cases(results: Results) -> dict[str, tuple[Case, ...]]:
    """All comparisons of every statement."""
    ours = load_ours()
    reader = Reader(results, Sampler(), document.paper_document(document.FILE.parent).columns)
    return {
        name: tuple(case for check in entry.checks for case in run_check(reader, check, _tests(reader, entry)))
        for name, entry in ours.claims.items()
    }


def _notes(results: Results) -> tuple[str, ...]:
    """The suite, and which texts stand in for the paper's."""
    texts = [f"`{ours}` for {paper}" for paper, ours in text_names(results).items() if ours != paper]
    told = [f"Texts that stand in for the paper's: {', '.join(texts)}."] if texts else []
    return (results.suite.description, *told)


def verdict_records(suite: str, layout: Layout) -> list[Path]:
    """The records that the verdicts of a suite read."""
    plan = Results(suite, layout, plan=True)
    _cases(plan)
    return list(plan.asked)


# --- one check --------------------------------------------------------------------------------------------------------


def _tests(reader: Reader, ours: Ours) -> int:
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


# --- the verdict ------------------------------------------------------------------------------------------------------


def decide(ours: Ours, cases: Sequence[Case]) -> tuple[str, str]:
    """Verdict and reason of a statement, from its comparisons."""
    if ours.not_run is not None:
        return NOT_RUN, ours.not_run
    if ours.not_checkable is not None:
        return NOT_CHECKABLE, ours.not_checkable
    cases = [case for case in cases if not case.beside]
    found = {case.outcome for case in cases}
    outcome = next(o for o in (ANY_ORDER if ours.require == "any" else ALL_ORDER) if o in found)
    scope: Scope = "nano" if any(case.scope == "nano" for case in cases) else "paper"
    if outcome == "missing":
        return NOT_RUN, _missing(cases)
    if outcome == "shown":
        return NOT_CHECKABLE, (
            "It states a magnitude of the paper's own models, which a nano model neither confirms nor refutes; ours is "
            "shown."
        )
    if outcome == "holds" and ours.proxy is not None:
        outcome = "direction"
    return VERDICTS[scope][outcome], _reason(outcome, ours, cases, scope)


def _missing(cases: Sequence[Case]) -> str:
    """Reasons of the holes, and how far the rest got."""
    reasons = Counter(case.reason for case in cases if case.outcome == "missing")
    told = "; ".join(f"{reason} ({count} of {len(cases)} comparisons)" for reason, count in reasons.items())
    rest: Counter[Outcome] = Counter(case.outcome for case in cases if case.outcome != "missing")
    return told + (f". The rest: {_counted(rest, len(cases))}" if rest else "")


WORDS: dict[Outcome, str] = {
    "holds": "holds beyond noise",
    "direction": "only the direction holds",
    "within noise": "within noise",
    "opposite": "opposite beyond noise",
    "shown": "a number without a comparison",
    "missing": "not run",
}


def _counted(found: Counter[Outcome], total: int) -> str:
    return ", ".join(f"{WORDS[outcome]} in {found[outcome]} of {total}" for outcome in WORDS if found[outcome])


def _reason(outcome: Outcome, ours: Ours, cases: Sequence[Case], scope: Scope) -> str:
    """What the verdict rests on, in sentences."""
    models = ", ".join(dict.fromkeys(case.model for case in cases))
    parts = []
    if scope == "nano":
        parts.append(
            f"On the nano model {models}, not one of the paper's: direction only, the magnitude is not compared."
        )
    parts.append(f"{_counted(Counter(case.outcome for case in cases), len(cases)).capitalize()} comparisons.")
    worst: Outcome = "within noise" if outcome == "within noise" else "opposite"
    telling = [case for case in cases if case.outcome == worst]
    if outcome in ("opposite", "within noise") and telling:
        shown = "; ".join(f"{case.label} [{case.model}]: {case.shown} ({case.compared})" for case in telling[:3])
        parts.append(f"{WORDS[worst].capitalize()}: {shown}{' and more' if len(telling) > 3 else ''}.")
    if ours.require == "any":
        read = [f"{case.label} [{case.model}]" for case in cases if case.outcome == outcome]
        parts.append(f"Read as: {'; '.join(dict.fromkeys(read))}.")
    if ours.proxy is not None:
        parts.append(f"Measured in its place: {ours.proxy}.")
    gates = dict.fromkeys(case.gate for case in cases if case.gate)
    if gates:
        parts.append(f"Protocol gate: {'; '.join(gates)}.")
    return " ".join(parts)
