"""Checks of the entries of one table: averages, possible fractions of the item count, chance level, the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from mobie.paper.audit.expressions import Entry
from mobie.paper.audit.report import Finding
from mobie.paper.audit.tables import Paper, Row, Table

EPSILON = 1e-9  # of floating-point arithmetic on two-decimal numbers
FAR_BELOW_CHANCE = 4.0  # standard errors
ABOVE_REFERENCE = 2.0  # standard errors
UNINFORMATIVE = 0.95  # share of all numbers that pass a check

FRACTION_EXPLANATIONS = (
    "another number of items (a subset, a cleaned version of the task, another split)",
    "a mean over several runs, prompts or samples per item",
    "a mean over subtasks instead of over items",
    "a number taken over from a source with another protocol",
    "a truncated instead of a rounded number, or a typing error",
)
CHANCE_EXPLANATIONS = (
    "answers were generated and compared as text, so that an answer of the wrong form counts as wrong",
    "another metric than accuracy over the given choices",
)
REFERENCE_EXPLANATIONS = (
    "sampling error of the items",
    "calibration text that is near to the task",
    "rows taken from sources with different protocols",
)


def check_averages(paper: Paper) -> Iterator[Finding]:
    """Every printed average against the mean of its parts.

    Rounding of the parts and of the average together may move it by the sum of their half units.
    """
    for table in paper.results:
        for column in table.with_role("average"):
            parts = table.columns[column].parts
            if parts and set(parts) <= set(table.columns):
                yield from _averages(table, column, parts)


def recomputed(row: Row, parts: Sequence[str]) -> float | None:
    """Mean of the parts of an average, None where a part is no number."""
    values = [row[part].value for part in parts]
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if len(numbers) == len(values) else None


def _averages(table: Table, column: str, parts: Sequence[str]) -> Iterator[Finding]:
    agreeing = 0
    for row in table.rows:
        printed, mean = row[column], recomputed(row, parts)
        if printed.value is None or mean is None:
            continue
        if abs(mean - printed.value) <= fmean(row[part].half for part in parts) + printed.half + EPSILON:
            agreeing += 1
            continue
        texts = [row[part].text for part in parts]
        yield Finding(
            "average",
            f"{table.where}, {row.label}, {column}",
            "differs",
            "inconsistency",
            f"the entries give {mean:.2f}, printed {printed.text}",
            tuple(f"{part} {text}" for part, text in zip(parts, texts, strict=True)),
            f"({' + '.join(texts)}) / {len(parts)} = {mean:.4f}",
        )
    if agreeing:
        yield Finding(
            "average",
            f"{table.where}, {column}",
            "agrees",
            "info",
            f"{agreeing} averages are the mean of their {len(parts)} parts within rounding",
        )


def possible_fraction(entry: Entry, items: int) -> bool:
    """Whether an entry in per cent is k of `items` for some whole k, rounded to its decimals (a half either way)."""
    nearest = round(entry.number * items / 100)
    return any(
        0 <= k <= items and abs(100 * k / items - entry.number) <= entry.half + EPSILON
        for k in range(nearest - 1, nearest + 2)
    )


def chance_of_passing(items: int, half: float) -> float:
    """Share of all numbers of that many decimals from 0 to 100 that are a possible fraction."""
    decimals = round(-math.log10(2 * half))
    reachable = {round(100 * k / items, decimals) for k in range(items + 1)}
    return min(1.0, len(reachable) / (100 * 10**decimals + 1))


def check_fractions(paper: Paper) -> Iterator[Finding]:
    """Accuracies as possible fractions of the task's item count, for each column; zeros are left out."""
    for table in paper.results:
        for name in table.with_role("accuracy"):
            items = table.columns[name].items
            scored = [row for row in table.rows if row[name].value]
            if items is not None and scored:
                yield _fractions(table, name, items, scored)


def _fractions(table: Table, name: str, items: int, rows: Sequence[Row]) -> Finding:
    where = f"{table.where}, {name}"
    half = max(row[name].half for row in rows)
    impossible = [row for row in rows if not possible_fraction(row[name], items)]
    possible = len(rows) - len(impossible)
    chance = chance_of_passing(items, half)
    if chance > UNINFORMATIVE:
        sentence = (
            f"{100 * chance:.0f} % of all numbers are a fraction of {items} items, so that the check says nothing"
        )
        return Finding("fraction", where, "not checkable", "info", sentence)
    rate = (
        f"{possible} of {len(rows)} entries are a fraction of {items} items; "
        f"of unrelated numbers {100 * chance:.1f} % are, which would be {chance * len(rows):.1f} of {len(rows)}"
    )
    if not impossible:
        return Finding("fraction", where, "agrees", "info", rate)
    entries = tuple(f"{row.label} {row[name].text}{_nearest(row[name], items)}" for row in impossible)
    return Finding(
        "fraction",
        where,
        "differs",
        "notice",
        rate,
        entries,
        f"100 · k / {items} rounded, k = 0 … {items}",
        FRACTION_EXPLANATIONS,
    )


def _nearest(entry: Entry, items: int) -> str:
    k = round(entry.number * items / 100)
    return f" (nearest {k}/{items} = {100 * k / items:.2f})"


def standard_error(percent: float, items: int) -> float:
    """Binomial standard error of an accuracy, in per cent."""
    return math.sqrt(max(percent * (100 - percent), 0.0) / items)


def check_chance(paper: Paper) -> Iterator[Finding]:
    """Accuracies that lie far below what guessing gives."""
    for table in paper.results:
        for name in table.with_role("accuracy"):
            column = table.columns[name]
            if column.chance and column.items:
                yield from _below_chance(table, name, column.chance, column.items)


def _below_chance(table: Table, name: str, chance: float, items: int) -> Iterator[Finding]:
    error = standard_error(chance, items)
    limit = chance - FAR_BELOW_CHANCE * error
    low = [row for row in table.rows if row[name].value is not None and row[name].number < limit]
    far = f"more than {FAR_BELOW_CHANCE:g} standard errors below the {chance:g} of guessing"
    where = f"{table.where}, {name}"
    if not low:
        sentence = f"no entry is {far}"
        yield Finding("chance", where, "agrees", "info", sentence)
        return
    yield Finding(
        "chance",
        where,
        "differs",
        "notice",
        f"{len(low)} of {len(table.rows)} entries are {far}",
        tuple(f"{row.label} {row[name].text}" for row in low),
        f"standard error at {chance:g} % of {items} items: {error:.2f}; limit {limit:.2f}",
        CHANCE_EXPLANATIONS,
    )


def check_reference(paper: Paper) -> Iterator[Finding]:
    """Rows that score better than the full-precision row of their group."""
    for table in paper.results:
        if table.spec.reference:
            yield from _above_reference(table)


def _above_reference(table: Table) -> Iterator[Finding]:
    references = [row for row in table.rows if row.matches(table.spec.reference)]
    group = [column for column in table.spec.key if column not in table.spec.reference][:1]
    above, compared = [], 0
    for reference in references:
        same_group = {column: reference[column].text for column in group}
        others = [row for row in table.rows if row.matches(same_group) and row is not reference]
        for name in table.with_role("accuracy"):
            for row in others:
                excess = _excess(row[name], reference[name], table.columns[name].items)
                compared += excess is not None
                if excess is not None and excess > ABOVE_REFERENCE:
                    shown = f"{row.label}, {name} {row[name].text}, reference {reference[name].text}"
                    above.append(f"{shown} ({excess:.1f} standard errors)")
    where = f"{table.where}, rows of the reference"
    if not compared:
        return
    if not above:
        sentence = f"none of {compared} entries is above its reference by more than {ABOVE_REFERENCE:g} standard errors"
        yield Finding("reference", where, "agrees", "info", sentence)
        return
    yield Finding(
        "reference",
        where,
        "differs",
        "notice",
        f"{len(above)} of {compared} entries lie more than {ABOVE_REFERENCE:g} standard errors above their reference",
        tuple(above),
        "difference / sqrt(p(1-p)/n + q(1-q)/n); the same items in both rows would make it smaller",
        REFERENCE_EXPLANATIONS,
    )


def _excess(entry: Entry, reference: Entry, items: int | None) -> float | None:
    """How far an entry is above the reference, in standard errors of two independent samples."""
    if items is None or entry.value is None or reference.value is None:
        return None
    error = math.hypot(standard_error(entry.value, items), standard_error(reference.value, items))
    return (entry.value - reference.value) / error if error else None
