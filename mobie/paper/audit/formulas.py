"""Printed numbers against a formula of the paper, evaluated from facts about each model under every reading."""

from __future__ import annotations

from collections.abc import Iterator

from mobie.errors import ConfigError, unknown_name
from mobie.paper.audit import document as doc
from mobie.paper.audit.entries import EPSILON
from mobie.paper.audit.expressions import Entry, evaluate
from mobie.paper.audit.report import Finding
from mobie.paper.audit.tables import Paper, Row


def check_formulas(paper: Paper) -> Iterator[Finding]:
    """Every printed number of a formula: which readings give it, and what the others give."""
    for formula in paper.document.formulas:
        for reference in formula.printed:
            try:
                finding = _compare(paper, formula, reference)
            except ConfigError as error:
                raise ConfigError(f"{doc.FILE}: formula {formula.name}: {error}") from error
            yield finding


def _compare(paper: Paper, formula: doc.Formula, reference: str) -> Finding:
    printed, row = paper.entry(reference), paper.row(reference)
    facts = find_facts(paper, formula, row)
    given = {reading.name: formula_value(formula, reading, facts) for reading in formula.readings}
    matching = [name for name, value in given.items() if abs(value - printed.number) <= printed.half + EPSILON]
    where = f"{paper.table(row.table).where}, {row.label}: {formula.name}"
    entries = (f"printed {printed.text}", *(f"{name}: {value:.3f}" for name, value in given.items()))
    arithmetic = f"{formula.where}: {formula.expression}"
    if matching:
        sentence = f"printed {printed.text}, which the reading {' and '.join(map(repr, matching))} gives"
        return Finding("formula", where, "agrees", "info", sentence, entries, arithmetic)
    name, value = min(given.items(), key=lambda item: abs(item[1] - printed.number))
    sentence = (
        f"none of {len(given)} readings gives the printed {printed.text}; the nearest, {name!r}, gives {value:.2f}"
    )
    return Finding("formula", where, "differs", "notice", sentence, entries, arithmetic, tuple(formula.explanations))


def find_facts(paper: Paper, formula: doc.Formula, row: Row) -> Row:
    """The row of facts about the thing that a row of results names. Raises `ConfigError` where there is none."""
    table = paper.table(formula.facts)
    if formula.join not in table.columns or formula.join not in row.entries:
        raise ConfigError(f"no column {formula.join!r} in {formula.facts} or {row.table} (`join`)")
    wanted = paper.same_name(row[formula.join].text)
    for facts in table.rows:
        if paper.same_name(facts[formula.join].text) == wanted:
            return facts
    known = [facts[formula.join].text for facts in table.rows]
    raise ConfigError(f"{unknown_name(formula.join, wanted, known)} (rows of {formula.facts}; other names in `names`)")


def formula_value(formula: doc.Formula, reading: doc.Reading, facts: Row) -> float:
    """Value of the formula under one reading; facts first, then what the reading and the formula define, in order."""
    values = {name: entry for name, entry in facts.entries.items() if entry.value is not None}
    for name, given in [*reading.define.items(), *formula.define.items()]:
        value = evaluate(given, values)[0] if isinstance(given, str) else float(given)
        values[name] = Entry(f"{value:g}", value)
    return evaluate(formula.expression, values)[0]
