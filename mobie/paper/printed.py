"""The paper's printed entries, by table and row, for whoever shows them beside ours. No model, no torch."""

from __future__ import annotations

import csv
from functools import cache

from mobie.errors import ConfigError
from mobie.parsing import parse_yaml
from mobie.paths import PACKAGE, paper_table


@cache
def _aliases() -> dict[str, str]:
    """Every name of a model → the one name that stands for all."""
    names = parse_yaml((PACKAGE / "paper" / "claims.yaml").read_text(encoding="utf-8"))["names"]
    return {alias: name for name, aliases in names.items() for alias in [name, *aliases]}


def same_model(one: str, other: str) -> bool:
    """Whether two names stand for one model: the tables call `DeepSeek-V2-Lite` `DeepSeekV2-Lite` as well."""
    return _aliases().get(one, one) == _aliases().get(other, other)


@cache
def printed_rows(table: str) -> tuple[dict[str, str], ...]:
    """Rows of `table1` … `table10` as printed, in order; none for a table that has no CSV."""
    path = paper_table(table)
    if not path.exists():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def printed(table: str, model: str, **keys: str | float) -> dict[str, float]:
    """Numeric entries of the row of a model with these key values; empty where the paper has no such row.

    Key values are compared as numbers where both are numbers.

    Raises:
        ConfigError: several rows fit; more keys tell them apart.
    """
    rows = [
        row
        for row in printed_rows(table)
        if same_model(row["model"], model) and all(_equal(row[key], value) for key, value in keys.items())
    ]
    if len(rows) > 1:
        raise ConfigError(f"{table}: {len(rows)} rows fit {model}, {keys}; expected one: give more keys")
    found = {column: _number(text) for row in rows for column, text in row.items() if column not in ("model", *keys)}
    return {column: value for column, value in found.items() if value is not None}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _equal(text: str, value: str | float) -> bool:
    number = _number(str(value))
    return text == str(value) if number is None else _number(text) == number
