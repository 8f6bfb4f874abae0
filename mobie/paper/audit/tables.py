"""The CSV files of a paper as rows of entries, and references into them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mobie.errors import ConfigError, DataError, unknown_name
from mobie.paper.audit import document as doc
from mobie.paper.audit.expressions import Entry, parse_entry

EVERY = "*"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    table: str
    key: tuple[str, ...]  # values of the key columns
    entries: Mapping[str, Entry]

    def __getitem__(self, column: str) -> Entry:
        return self.entries[column]

    def matches(self, filters: Mapping[str, str | Sequence[str]]) -> bool:
        """Whether every filtered column has the value, or one of the values."""
        return all(
            self[column].text in ([wanted] if isinstance(wanted, str) else wanted) for column, wanted in filters.items()
        )

    @property
    def label(self) -> str:
        return ", ".join(self.key)


@dataclass(frozen=True)
class Table:
    """A CSV file with what its columns mean."""

    name: str
    spec: doc.Table
    columns: Mapping[str, doc.Column]  # in the file's order
    rows: tuple[Row, ...]

    @property
    def where(self) -> str:
        return self.spec.where

    @property
    def identity(self) -> tuple[str, ...]:
        return tuple(self.spec.identity or self.spec.key)

    def with_role(self, role: str) -> list[str]:
        """Columns of a role, in order."""
        return [name for name, column in self.columns.items() if column.role == role]

    @cached_property
    def scores(self) -> list[str]:
        """Columns with a direction that are no average."""
        return [n for n, column in self.columns.items() if column.better is not None and column.role != "average"]

    def find(self, wanted: Sequence[str]) -> list[Row]:
        """Rows whose first key values are `wanted`, `*` standing for any."""
        if len(wanted) > len(self.spec.key):
            return []
        return [row for row in self.rows if all(w in (EVERY, k) for w, k in zip(wanted, row.key, strict=False))]


class Paper:
    """A document and its tables.

    Raises:
        ConfigError: a table has a column that is not declared, or `claims.yaml` names one that is not there.
        DataError: a CSV file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.document = doc.load_document(folder)
        self.canonical = {alias: name for name, aliases in self.document.names.items() for alias in aliases}
        self.tables = {name: self._read(folder, name, spec) for name, spec in self.document.tables.items()}

    @property
    def results(self) -> list[Table]:
        """Tables of results, in order."""
        return [table for table in self.tables.values() if table.spec.kind == "results"]

    def same_name(self, name: str) -> str:
        """The one name that stands for all names of a thing."""
        return self.canonical.get(name, name)

    def table(self, name: str) -> Table:
        if name not in self.tables:
            raise ConfigError(unknown_name("table", name, self.tables))
        return self.tables[name]

    def row(self, reference: str) -> Row:
        """The row of a reference to one entry."""
        return self._rows(reference)[0]

    def entry(self, reference: str) -> Entry:
        """One entry. Raises `ConfigError` for a reference to several or none."""
        found = self.look_up(reference)
        if not isinstance(found, Entry):
            raise ConfigError(f"reference {reference!r}: got a list, expected one entry")
        return found

    def look_up(self, reference: str) -> Entry | tuple[Entry, ...]:
        """The entry of a reference `TABLE/ROW/COLUMN`, or the entries of one with `*`.

        Raises:
            ConfigError: unknown table, row or column (near names are suggested), or a row that is not unique.
        """
        column = self._split(reference)[2]
        rows = self._rows(reference)
        if column == EVERY:
            return tuple(row[name] for row in rows for name in self.tables[rows[0].table].scores)
        if EVERY in self._split(reference)[1]:
            return tuple(row[column] for row in rows)
        return rows[0][column]

    def _split(self, reference: str) -> tuple[str, list[str], str]:
        parts = reference.split("/")
        if len(parts) != 3:
            raise ConfigError(f"reference {reference!r}: got {len(parts)} parts, expected TABLE/ROW/COLUMN")
        return parts[0], [value.strip() for value in parts[1].split(",")], parts[2]

    def _rows(self, reference: str) -> list[Row]:
        name, wanted, column = self._split(reference)
        table = self.table(name)
        if column != EVERY and column not in table.columns:
            raise ConfigError(f"reference {reference!r}: {unknown_name('column', column, table.columns)}")
        rows = table.find(wanted)
        if not rows:
            known = [", ".join(row.key[: len(wanted)]) for row in table.rows]
            raise ConfigError(f"reference {reference!r}: {unknown_name('row', ', '.join(wanted), set(known))}")
        if len(rows) > 1 and EVERY not in wanted:
            raise ConfigError(
                f"reference {reference!r}: {len(rows)} rows fit: {'; '.join(row.label for row in rows)}; "
                f"give more of the key: {', '.join(table.spec.key)}"
            )
        return rows

    def _read(self, folder: Path, name: str, spec: doc.Table) -> Table:
        path = folder / spec.file
        header, lines = _read_csv(path)
        declared = {**self.document.columns, **spec.columns}
        for column in header:
            if column not in declared:
                raise ConfigError(f"{path}: {unknown_name('column', column, declared)} (columns in {doc.FILE})")
        used = [*spec.key, *spec.identity, *spec.reference, *spec.columns]
        for column in used:
            if column not in header:
                raise ConfigError(f"{doc.FILE}: table {name}: {unknown_name('column', column, header)}")
        columns = {column: declared[column] for column in header}
        rows = tuple(_row(name, spec, columns, line) for line in lines)
        keys = [row.key for row in rows]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two rows have the key {', '.join(twice)}; expected one (key: {spec.key})")
        return Table(name, spec, columns, rows)


def _row(table: str, spec: doc.Table, columns: Mapping[str, doc.Column], line: Mapping[str, str]) -> Row:
    entries = {n: parse_entry(line[n], column.decimals, column.exact) for n, column in columns.items()}
    return Row(table, tuple(line[column] for column in spec.key), entries)


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file, strict=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it is named in {doc.FILE}") from error
    except ValueError as error:
        raise DataError(f"{path}: not a table: expected a header and rows of text in UTF-8 ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error})") from error
    return header, list(_lines(path, header, lines))


def _lines(path: Path, header: list[str], lines: list[list[str]]) -> Iterator[dict[str, str]]:
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise DataError(f"{path}: line {number}: got {len(line)} fields, expected {len(header)} as in the header")
        yield dict(zip(header, line, strict=True))
