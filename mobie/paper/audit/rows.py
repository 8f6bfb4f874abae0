"""Checks across rows: the same row in two tables, and rows that repeat under other names."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from mobie.paper.audit.entries import EPSILON
from mobie.paper.audit.report import Finding
from mobie.paper.audit.tables import Paper, Row, Table

FEWEST_COLUMNS = 3
EXPECTED_AT_MOST = 0.01  # pairs of rows that would agree as much if all entries were unrelated

REPEAT_EXPLANATIONS = (
    "one measurement that was meant to be shown under one name",
    "a row carried over when a table was laid out",
)
WHOLE_EXPLANATIONS = (
    "coincidence: the rate is that of unrelated entries, and many pairs are compared",
    "a row used as the template of another one when a table was laid out",
)
TWO_TABLES_EXPLANATIONS = ("another run or setting in one of the tables", "a typing error")


def check_same_rows(paper: Paper) -> Iterator[Finding]:
    """The same model and method in two tables: their shared columns must be printed alike."""
    for first, second in itertools.combinations(paper.results, 2):
        if first.identity == second.identity:
            yield from _same_rows(paper, first, second)


def identities(paper: Paper, table: Table) -> dict[tuple[str, ...], Row]:
    """Rows by what was measured: the identity columns, or the whole key where these fit several rows."""
    short = [tuple(paper.same_name(row[column].text) for column in table.identity) for row in table.rows]
    often = Counter(short)
    full = [tuple(map(paper.same_name, row.key)) for row in table.rows]
    return {s if often[s] == 1 else f: row for s, f, row in zip(short, full, table.rows, strict=True)}


def _same_rows(paper: Paper, first: Table, second: Table) -> Iterator[Finding]:
    ours, theirs = identities(paper, first), identities(paper, second)
    columns = [c for c in first.columns if c in second.columns and c not in first.identity]
    agreeing = 0
    for identity in (i for i in ours if i in theirs):
        for column in columns:
            a, b = ours[identity][column], theirs[identity][column]
            if a.value is None or b.value is None:
                continue
            if abs(a.value - b.value) <= max(a.half, b.half) + EPSILON:
                agreeing += 1
                continue
            yield Finding(
                "same row",
                f"{first.where} and {second.where}, {', '.join(identity)}, {column}",
                "differs",
                "notice",
                f"{first.where} prints {a.text}, {second.where} {b.text}",
                (f"{first.where} {a.text}", f"{second.where} {b.text}"),
                f"{b.text} - {a.text} = {b.value - a.value:.2f}",
                TWO_TABLES_EXPLANATIONS,
            )
    if agreeing:
        where = f"{first.where} and {second.where}"
        yield Finding("same row", where, "agrees", "info", f"{agreeing} entries that both print agree")


def check_repeats(paper: Paper) -> Iterator[Finding]:
    """Rows under different names whose accuracies are equal, or differ by whole numbers, more often than chance.

    The difference of two unrelated entries of two decimals is whole once in 100 times (more often where the item count
    allows few of them). Reported are pairs so much alike that fewer than `EXPECTED_AT_MOST` are expected among all
    pairs of the paper.
    """
    rows = [(table, row) for table in paper.results for row in table.rows if len(table.with_role("accuracy")) > 2]
    pairs = [
        (first, second, shared)
        for first, second in itertools.combinations(rows, 2)
        if len(shared := _comparable(first, second)) >= FEWEST_COLUMNS and not _same_thing(paper, first, second)
    ]
    found = 0
    for (table_a, a), (table_b, b), shared in pairs:
        whole = [column for column in shared if _is_whole(a[column].number - b[column].number)]
        expected = len(pairs) * _tail([_rate(table_a, a, column) for column in shared], len(whole))
        if expected <= EXPECTED_AT_MOST:
            found += 1
            yield _repeat(table_a, a, table_b, b, shared, whole, expected)
    if pairs:
        sentence = (
            f"{len(pairs) - found} of {len(pairs)} pairs of rows under different names are no more alike than chance"
        )
        yield Finding("repeated row", "all tables", "agrees", "info", sentence)


def _comparable(first: tuple[Table, Row], second: tuple[Table, Row]) -> list[str]:
    """Accuracy columns that both rows have, with entries that are not zero."""
    (table_a, a), (table_b, b) = first, second
    names = [name for name in table_a.with_role("accuracy") if name in table_b.columns]
    return [name for name in names if a[name].value and b[name].value]


def _same_thing(paper: Paper, first: tuple[Table, Row], second: tuple[Table, Row]) -> bool:
    (table_a, a), (table_b, b) = first, second
    return table_a.identity == table_b.identity and all(
        paper.same_name(a[column].text) == paper.same_name(b[column].text) for column in table_a.spec.key
    )


def _is_whole(difference: float) -> bool:
    return abs(difference - round(difference)) < EPSILON


def _rate(table: Table, row: Row, column: str) -> float:
    """How often two unrelated accuracies differ by a whole number: they step by their last digit, or by 100/items."""
    items = table.columns[column].items
    last_digit = 2 * row[column].half
    return last_digit if items is None else max(last_digit, math.gcd(items, 100) / items)


def _tail(rates: Sequence[float], count: int) -> float:
    """Chance that at least `count` of independent events with these rates happen."""
    exactly = [1.0]
    for rate in rates:
        shifted = [0.0, *(p * rate for p in exactly)]
        exactly = [p * (1 - rate) + q for p, q in zip([*exactly, 0.0], shifted, strict=True)]
    return math.fsum(exactly[count:])


def _repeat(
    table_a: Table, a: Row, table_b: Table, b: Row, shared: Sequence[str], whole: Sequence[str], expected: float
) -> Finding:
    equal = [column for column in shared if a[column].value == b[column].value]
    identical = len(equal) == len(shared)
    alike = (
        f"all {len(shared)} accuracies are equal"
        if identical
        else f"{len(whole)} of {len(shared)} accuracies differ by a whole number ({len(equal)} by 0.00)"
    )
    return Finding(
        "repeated row",
        f"{table_a.where}, {a.label} and {table_b.where}, {b.label}",
        "differs",
        "inconsistency" if identical else "notice",
        f"{alike} under different names; {expected:.1g} such pairs are expected among unrelated rows",
        tuple(f"{c}: {a[c].text} and {b[c].text}, difference {a[c].number - b[c].number:.2f}" for c in shared),
        "pairs compared × binomial tail; of two decimals, a difference is whole once in 100",
        REPEAT_EXPLANATIONS if identical else WHOLE_EXPLANATIONS,
    )
