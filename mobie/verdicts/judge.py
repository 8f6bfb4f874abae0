"""From the outcomes of comparisons to the verdict on a statement.

Where a statement needs all of several comparisons, one that is opposite refutes it; as the chance of a false one grows
with their number, it must be opposite at the error rate divided by it (Bonferroni). Holding needs no such correction:
all must hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mobie.paper.audit import Report, audit
from mobie.paths import Layout
from mobie.results import Results
from mobie.tables.table10 import text_names
from mobie.verdicts import document
from mobie.verdicts.comparisons import run_check, tests_of
from mobie.verdicts.document import Ours, load_ours
from mobie.verdicts.sampling import Sampler
from mobie.verdicts.sources import Reader
from mobie.verdicts.verdict import NOT_CHECKABLE, NOT_RUN, VERDICTS, WORDS, Case, ClaimVerdict, Outcome, Scope, Verdicts

#: worst first: what a statement is that needs all of its comparisons, or any of them
ALL_ORDER: tuple[Outcome, ...] = ("opposite", "within noise", "missing", "direction", "holds", "shown")
ANY_ORDER: tuple[Outcome, ...] = ("holds", "direction", "within noise", "missing", "opposite", "shown")


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
        name: tuple(case for check in entry.checks for case in run_check(reader, check, tests_of(reader, entry)))
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
