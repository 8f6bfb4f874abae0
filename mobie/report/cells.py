"""Tables as the report shows them: every cell with what is known of it, ours and the paper's entry side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobie.paper.printed import printed_rows
from mobie.report.record_view import Tidy, tidied
from mobie.results import Cell
from mobie.tables.table import CHANCE_MARK, FLAGS, Column, Row, Table, is_best, number, sections, show

NARROW = 6  # columns of a table that may stand beside the paper's


@dataclass(frozen=True)
class Shown:
    """A cell to show.

    text:  the value, or a dash for a hole.
    error: standard error; empty where there is none.
    mark:  what stands behind the value: that it is at chance level, a mark of its row.
    paper: the paper's entry.
    sort:  what its column is sorted by; empty for a hole.
    about: JSON for the dialog; empty where nothing is known of it.
    prose: it is a text to read, not a value.
    """

    text: str
    error: str = ""
    mark: str = ""
    paper: str = ""
    best: bool = False
    hole: bool = False
    sort: str = ""
    about: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Grid:
    """One HTML table: `rows` of a label, whether the row is ours alone, and its cells."""

    caption: str
    row_label: str
    headings: tuple[str, ...]
    text_columns: tuple[bool, ...]
    rows: tuple[tuple[str, bool, tuple[Shown, ...]], ...]


@dataclass(frozen=True)
class TableView:
    """A table of the report with the paper's own, as printed, where no row of ours has an entry of it."""

    table: Table
    grids: tuple[Grid, ...]
    paper: Grid | None
    holes: dict[str, int]

    @property
    def heading(self) -> str:
        return f"{_number(self.table)}: {self.table.title}"

    @property
    def narrow(self) -> bool:
        return len(self.table.main) <= NARROW


def _number(table: Table) -> str:
    """`Table 2`; the heading without the suite, of which the page is."""
    return table.heading.partition(",")[0]


def table_view(table: Table, tidy: Tidy) -> TableView:
    """Grids of a table by model, section and group of columns; how many cells are holes, by reason."""
    grids = []
    for model, model_rows in table.groups.items():
        for section, rows in sections(model_rows).items():
            for group, columns in table.column_groups.items():
                grids.append(_grid(table, (table.marked(model), section, group), rows, columns, tidy))
            measured = [row for row in rows if row.config and any(c.key in row.cells for c in table.extra)]
            if measured:
                name = (table.marked(model), section, "beside the paper's columns")
                grids.append(_grid(table, name, measured, table.extra, tidy))
    return TableView(table, tuple(grids), _papers_grid(table), _holes(table))


def _grid(table: Table, names: Sequence[str], rows: Sequence[Row], columns: Sequence[Column], tidy: Tidy) -> Grid:
    return Grid(
        ": ".join(name.replace("`", "") for name in names if name) or table.title,
        table.label or table.row_label.replace("_", " ").capitalize(),
        tuple(column.heading for column in columns),
        tuple(not column.numeric for column in columns),
        tuple((row.label, row.own, tuple(_shown(table, row, column, tidy) for column in columns)) for row in rows),
    )


def _shown(table: Table, row: Row, column: Column, tidy: Tidy) -> Shown:
    cell, paper, text = row.cells.get(column.key), row.paper.get(column.key), row.texts.get(column.key)
    about = "" if cell is None else json.dumps(tidied(_about(table, row, column, cell), tidy), ensure_ascii=False)
    if text is not None:
        shown = FLAGS.get(text, text) if column.flag else text
        return Shown(shown, sort=text, about=about, prose=not column.flag)
    printed = "" if paper is None else f"{paper:g}"
    if cell is None:
        return Shown("", paper=printed)
    if cell.value is None:
        return Shown("–", paper=printed, hole=True, about=about)
    return Shown(
        show(cell, column)[0],
        "" if cell.stderr is None else number(cell.stderr, column.digits),
        " ".join(mark for mark in (CHANCE_MARK if cell.at_chance else "", row.marks.get(column.key, "")) if mark),
        printed,
        is_best(table, row, column),
        sort=repr(float(cell.value)),
        about=about,
    )


def _about(table: Table, row: Row, column: Column, cell: Cell) -> dict[str, Any]:
    """What a cell's dialog says beside its record."""
    difference = row.difference(column.key)
    names = (row.model, row.section, row.label, column.group.replace("`", ""), column.heading)
    facts = {
        "Value": cell.value,
        "Standard error": cell.stderr,
        "Sample size n": cell.n,
        "Chance level": cell.chance,
        "The paper's value": row.paper.get(column.key),
        "Ours less the paper's": difference,
        "Within two standard errors": row.verdict(column.key),
        "Status": cell.status,
        "Reason": cell.reason,
        "Method config": row.config,
    }
    return {
        "title": f"{_number(table)}: {', '.join(name for name in names if name)}",
        "facts": [[name, _fact(value)] for name, value in facts.items() if value not in (None, "")],
        "record": cell.record,
    }


def _fact(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _papers_grid(table: Table) -> Grid | None:
    rows = printed_rows(table.name)
    if table.has_paper or not rows:
        return None
    first, *others = rows[0]
    return Grid(
        "The paper's table as printed, of its own models",
        first,
        tuple(others),
        tuple(not any(_is_number(row[name]) for row in rows) for name in others),
        tuple((row[first], False, tuple(Shown(row[name], sort=row[name]) for name in others)) for row in rows),
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _holes(table: Table) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in table.rows:
        for column in table.columns:
            cell = row.cells.get(column.key)
            if cell is not None and cell.value is None and column.key not in row.texts:
                reason = f"{cell.status}: {cell.reason}" if cell.reason else cell.status
                found[reason] = found.get(reason, 0) + 1
    return found
