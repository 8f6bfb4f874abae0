"""What a figure shows: every drawn value as a flat row, so that the picture can be checked and drawn anew.

No matplotlib here, and nothing that depends on time or place: the same records give the same rows, CSV and digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mobie.results import Cell, Model, Results

#: keys of a row that come first in the CSV, in this order; a figure may add keys of its own, which follow
COLUMNS = (
    *("panel", "model", "series", "config", "x", "y", "stderr", "n", "chance"),
    *("paper", "status", "reason", "record"),
)
DIGITS = 10
Row = Mapping[str, Any]


@dataclass(frozen=True)
class FigureData:
    """All a figure shows.

    name:    of the module: `fig6`.
    title:   what it shows, without its number.
    caption: how to read it: what bars and intervals are, which text and sample, what limits the numbers.
    rows:    one per drawn value, flat (`COLUMNS`, and keys of the figure's own); `y` None is a hole.
    facts:   for the footer, e.g. the models and that they are not the paper's.
    arrays:  anything that is handy to draw from but stands in `rows` as well, e.g. matrices.
    """

    name: str
    suite: str
    title: str
    caption: str
    rows: tuple[Row, ...]
    facts: tuple[str, ...] = ()
    arrays: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """`Figure 6: …` for the paper's figures, else the title alone."""
        number = self.name.removeprefix("fig")
        return f"Figure {number}: {self.title}" if number.isdigit() else self.title

    @property
    def holes(self) -> tuple[Row, ...]:
        """Rows without a value."""
        return tuple(row for row in self.rows if row["status"] != "ok")

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Reason of a hole → the series that have it, in order, once each."""
        found: dict[str, list[str]] = {}
        for row in self.holes:
            reason = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
            names = " ".join(str(row[key]) for key in ("model", "series") if row.get(key))
            if names not in found.setdefault(reason, []):
                found[reason].append(names)
        return found

    @property
    def digest(self) -> str:
        """Eight digits that change with any drawn value, and with nothing else."""
        return hashlib.sha256(to_csv(self).encode()).hexdigest()[:8]

    def select(self, **keys: Any) -> list[Row]:
        """Rows that have these values, in order."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in keys.items())]


def point(cell: Cell, /, **keys: Any) -> dict[str, Any]:
    """A row from a cell: its value as `y`, and everything that is known about it.

    `keys` say where it is drawn (`panel`, `model`, `series`, `config`, `x`, `paper` or a figure's own) and overrule.
    """
    known = {
        "y": cell.value,
        "stderr": cell.stderr,
        "n": cell.n,
        "chance": cell.chance,
        "status": cell.status,
        "reason": cell.reason,
        "record": cell.record,
    }
    return known | keys


def hole(status: str, reason: str, /, **keys: Any) -> dict[str, Any]:
    """A row without a value: `absent` (the suite lacks it), `unsupported`, or a record's status, and why."""
    return point(Cell(None, status=status, reason=reason), **keys)


def record_hole(
    results: Results, model: Model, method: str, kind: str, what: str, /, **keys: Any
) -> dict[str, Any] | None:
    """The hole that a record leaves, or None where it is there and ok; `what` says what it lacks if it is.

    For figures that draw a record's details, not its measurements. Asks for the record.
    """
    cell = results.cell(model, method, kind, what)
    record = results.record(model, method, kind)
    return None if record is not None and record.ok else point(cell, **keys)


def facts(results: Results, models: Sequence[Model]) -> tuple[str, ...]:
    """What the footer says of a suite and the models of a figure: their names, and how far the numbers carry."""
    found = [", ".join(dict.fromkeys(model.name for model in models))]
    if any(not model.in_paper for model in models):
        found.append("not a model of the paper's: direction only")
    if results.protocol.tasks.limit is not None:
        found.append("small samples")
    return tuple(found)


def to_csv(data: FigureData) -> str:
    """The drawn values: one line per row, a hole has an empty `y`."""
    from mobie.tables.table import csv_text

    extra = dict.fromkeys(key for row in data.rows for key in row if key not in COLUMNS)
    columns = ("suite", "figure", *COLUMNS, *extra)
    return csv_text(columns, _lines(data, columns))


def _lines(data: FigureData, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    for row in data.rows:
        values = {"suite": data.suite, "figure": data.name, **row}
        yield {column: _text(values.get(column)) for column in columns}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
