"""Statements of the paper against its own entries, and settings that several places give."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mobie.errors import ConfigError, unknown_name
from mobie.paper.audit import document as doc
from mobie.paper.audit import report
from mobie.paper.audit.entries import EPSILON, recomputed
from mobie.paper.audit.expressions import Entry, evaluate, parse_entry, shown
from mobie.paper.audit.report import ClaimResult, Finding, Verdict
from mobie.paper.audit.tables import Paper, Row, Table

STATED = {"equals": "", "at_least": "at least ", "at_most": "at most ", "above": "above ", "below": "below "}

#: how a verdict on a statement is called in the list of findings
FOUND: dict[Verdict, report.Outcome] = {
    "supported by the entries": "agrees",
    "contradicted by the paper's own entries": "differs",
    "not checkable": "not checkable",
}


@dataclass(frozen=True)
class Case:
    """One comparison of a check."""

    label: str
    holds: bool
    gives: str  # what the entries give, in words
    arithmetic: str
    entries: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        return f"{self.label}: {self.gives}" if self.label else self.gives


@dataclass(frozen=True)
class Outcome:
    """A check with all its cases."""

    check: doc.Check
    cases: tuple[Case, ...]

    @property
    def failing(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if not case.holds)

    @property
    def holds(self) -> bool:
        return not self.failing

    @property
    def sentence(self) -> str:
        """Every failing case, or that all hold with the first as an example."""
        if self.failing:
            count = f"{len(self.failing)} of {len(self.cases)}: " if len(self.cases) > 1 else ""
            return f"{self.check.name}: {count}{'; '.join(case.sentence for case in self.failing)}"
        rest = f" (and {len(self.cases) - 1} more)" if len(self.cases) > 1 else ""
        return f"{self.check.name}: {self.cases[0].sentence}{rest}"


def judge_claims(paper: Paper) -> tuple[list[Finding], list[ClaimResult]]:
    """A verdict for each statement, and a finding for each that has a check."""
    pairs = [_judge(paper, claim) for claim in paper.document.claims]
    findings = [finding for claim, (finding, _) in zip(paper.document.claims, pairs, strict=True) if claim.checks]
    return findings, [result for _, result in pairs]


def _judge(paper: Paper, claim: doc.Claim) -> tuple[Finding, ClaimResult]:
    try:
        outcomes = [run_check(paper, check) for check in claim.checks]
    except ConfigError as error:
        raise ConfigError(f"{doc.FILE}: claim {claim.id}: {error}") from error
    verdict, severity = _verdict(claim, outcomes)
    told = "not checkable further: " if outcomes else ""
    rest = [f"{told}{claim.not_checkable}"] if claim.not_checkable else []
    reason = ". ".join([*(_told(outcome) for outcome in outcomes), *rest])
    failing = [case for outcome in outcomes for case in outcome.failing]
    cases = failing or [case for outcome in outcomes for case in outcome.cases]
    finding = Finding(
        "statement",
        f"{', '.join(claim.where)} ({claim.id}): {claim.claim}",
        FOUND[verdict],
        severity,
        reason,
        tuple(dict.fromkeys(entry for case in cases for entry in case.entries)),
        "; ".join(dict.fromkeys(case.arithmetic for case in cases if case.arithmetic)),
        tuple(claim.explanations),
    )
    result = ClaimResult(
        claim.id,
        tuple(claim.where),
        claim.claim,
        claim.quote,
        verdict,
        _reading(claim, outcomes),
        reason,
        claim.tolerance,
        tuple(claim.needs),
    )
    return finding, result


def _told(outcome: Outcome) -> str:
    if outcome.check.assumes is None:
        return outcome.sentence
    return f"{outcome.sentence} (supposing that {outcome.check.assumes})"


def _reading(claim: doc.Claim, outcomes: Sequence[Outcome]) -> str:
    """Which readings of a statement hold, where not all do."""
    holding = [outcome.check.name for outcome in outcomes if outcome.holds]
    failing = [outcome.check.name for outcome in outcomes if not outcome.holds]
    if claim.require == "all" or not holding or not failing:
        return ""
    return f"read as: {', '.join(holding)}; not as: {', '.join(failing)}"


def _verdict(claim: doc.Claim, outcomes: Sequence[Outcome]) -> tuple[Verdict, doc.Severity]:
    """Verdict and severity; a failing check that rests on a supposition contradicts nothing."""
    failing = [outcome for outcome in outcomes if not outcome.holds]
    firm = [outcome for outcome in failing if outcome.check.assumes is None]
    if not outcomes:
        return "not checkable", "info"
    if claim.require == "any" and len(failing) < len(outcomes):
        return "supported by the entries", "notice" if firm else "info"
    if claim.require == "all" and not failing:
        return "supported by the entries", "info"
    if firm and (claim.require == "all" or len(firm) == len(outcomes)):
        return "contradicted by the paper's own entries", claim.severity
    return "not checkable", "notice"


def run_check(paper: Paper, check: doc.Check) -> Outcome:
    """All comparisons of a check. Raises `ConfigError` for a reference that leads nowhere."""
    if check.rank is not None:
        cases = list(_rank(paper, check.rank))
    elif check.covered is not None:
        cases = [_covered(paper, check.covered)]
    else:
        run = _compute if check.compute is not None else _same
        names = list(check.for_each)
        cases = [
            run(paper, check, dict(zip(names, values, strict=True)))
            for values in itertools.product(*check.for_each.values())
        ]
    if not cases:
        raise ConfigError(f"check {check.name!r} compares nothing: no row fits")
    return Outcome(check, tuple(cases))


def _filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _compute(paper: Paper, check: doc.Check, names: dict[str, str]) -> Case:
    assert check.compute is not None and check.printed is not None  # the schema sees to it
    references = {n: _filled(v, names) if isinstance(v, str) else v for n, v in check.values.items()}
    values = {
        name: paper.look_up(reference) if isinstance(reference, str) else Entry(f"{reference:g}", float(reference))
        for name, reference in references.items()
    }
    value, tolerance = evaluate(check.compute, values)
    text = _filled(check.printed, names)
    printed = parse_entry(text)
    difference = value - printed.number
    slack = tolerance + check.about + EPSILON
    holds = {
        "equals": abs(difference) <= slack + printed.half,
        "at_least": difference >= -slack,
        "at_most": difference <= slack,
        "above": difference > -slack,
        "below": difference < slack,
    }[check.relation]
    arithmetic = f"{shown(check.compute, values)} = {value:.4g}"
    gives = f"the entries give {value:.4g}, stated {STATED[check.relation]}{'about ' if check.about else ''}{text}"
    entries = tuple(f"{references[name]} = {_text(entry)}" for name, entry in values.items())
    return Case(", ".join(names.values()), holds, gives, arithmetic, entries)


def _text(entry: Entry | Sequence[Entry]) -> str:
    return entry.text if isinstance(entry, Entry) else ", ".join(part.text for part in entry)


def _same(paper: Paper, check: doc.Check, names: dict[str, str]) -> Case:
    references = [_filled(reference, names) for reference in check.same]
    entries = [paper.entry(reference) for reference in references]
    first = entries[0]
    holds = all(abs(e.number - first.number) <= max(e.half, first.half) + EPSILON for e in entries[1:])
    gives = " and ".join(f"{reference} prints {e.text}" for reference, e in zip(references, entries, strict=True))
    return Case(", ".join(names.values()), holds, gives, "")


def _covered(paper: Paper, covered: doc.Covered) -> Case:
    """Whether every value (under any of its names) is among those of `within`."""
    known = {paper.same_name(entry.text) for entry in _as_list(paper, covered.within)}
    missing: dict[str, str] = {}
    for reference in covered.values:
        for entry in _as_list(paper, reference):
            if paper.same_name(entry.text) not in known:
                missing.setdefault(entry.text, reference)
    gives = "; ".join(f"{value} of {reference} is not in {covered.within}" for value, reference in missing.items())
    return Case("", not missing, gives or f"every value is in {covered.within}", "")


def _as_list(paper: Paper, reference: str) -> Sequence[Entry]:
    found = paper.look_up(reference)
    return [found] if isinstance(found, Entry) else found


def _rank(paper: Paper, rank: doc.Rank) -> Iterator[Case]:
    table = paper.table(rank.table)
    columns = rank.columns or [name for name, column in table.columns.items() if column.better is not None]
    for name in [*columns, *rank.group_by, *rank.row, *rank.among, *rank.excluding]:
        if name not in table.columns:
            raise ConfigError(unknown_name(f"column of {rank.table}", name, table.columns))
    groups: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in table.rows:
        if row.matches(rank.among) and not (rank.excluding and row.matches(rank.excluding)):
            groups[tuple(row[column].text for column in rank.group_by)].append(row)
    for group, rows in groups.items():
        for own in (row for row in rows if row.matches(rank.row)):
            for column in columns:
                yield from _place(table, rows, own, column, rank.place, group)


def _place(
    table: Table, rows: Sequence[Row], own: Row, column: str, place: int, group: tuple[str, ...]
) -> Iterator[Case]:
    """The place of a row by the printed entries, and that of an average by the means of its parts too."""
    spec = table.columns[column]
    label = ", ".join([*group, column])
    printed = [(row, row[column].value) for row in rows if row[column].value is not None]
    case = _placed(own, printed, spec.better, place, label)
    yield case
    if case.holds and spec.parts and set(spec.parts) <= set(table.columns):
        means = [(row, recomputed(row, spec.parts)) for row, _ in printed]
        # only a difference is worth a case of its own
        by_means = _placed(own, means, spec.better, place, f"{label}, means of the entries")
        if not by_means.holds:
            yield by_means


def _placed(own: Row, values: Sequence[tuple[Row, float | None]], better: str | None, place: int, label: str) -> Case:
    """Place of a row; a tie does not push it down."""
    numbers = [(row, value) for row, value in values if value is not None]
    mine = next((value for row, value in numbers if row is own), None)
    if mine is None or better is None:
        raise ConfigError(f"{label}: {own.label} has no number, or the column no direction (better: higher or lower)")
    sign = 1 if better == "higher" else -1
    ahead = [(row, value) for row, value in numbers if sign * (value - mine) > EPSILON]
    others = ", ".join(f"{row.label} ({value:.2f})" for row, value in ahead)
    gives = f"{own.label} ({mine:.2f}) is in place {len(ahead) + 1} of {len(numbers)}" + (
        f" after {others}" if ahead else ""
    )
    entries = tuple(f"{row.label}: {value:.2f}" for row, value in [(own, mine), *ahead])
    return Case(label, len(ahead) + 1 == place, gives, "", entries)


def check_settings(paper: Paper) -> Iterator[Finding]:
    """Settings that several places give: numbers as numbers, everything else as text."""
    for setting in paper.document.settings:
        try:
            given = [(p.where, paper.entry(p.entry) if p.entry else parse_entry(p.value or "")) for p in setting.places]
        except ConfigError as error:
            raise ConfigError(f"{doc.FILE}: setting {setting.name}: {error}") from error
        values = {entry.text if entry.value is None else entry.value for _, entry in given}
        told = ", ".join(f"{where}: {entry.text}" for where, entry in given)
        agrees = len(values) == 1
        yield Finding(
            "setting",
            setting.name,
            "agrees" if agrees else "differs",
            "info" if agrees else setting.severity,
            f"{'all places give' if agrees else 'the places give'} {told}",
            tuple(f"{where}: {entry.text}" for where, entry in given),
            "",
            () if agrees else tuple(setting.explanations),
        )
