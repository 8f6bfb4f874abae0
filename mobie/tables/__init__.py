"""The paper's tables, one file each: records in, CSV, Markdown and LaTeX out; seconds, no model.

A module has `build(results: Results) -> Table`. To add a table is to add a file here and its name to `TABLES`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from mobie.comparable import TABLES as GATED
from mobie.comparable import comparability
from mobie.config import SuiteConfig
from mobie.errors import ConfigError, unknown_name
from mobie.paths import Layout
from mobie.results import Results
from mobie.tables.table import Table

TABLES = (
    "table1",
    "table2",
    "table3",
    "table4",
    "table5",
    "table6",
    "table7",
    "table8",
    "table9",
    "table10",
    "table11",
    "sensitivity",
    "speed",
    "gate",
)
#: of suites with a comparison per stored bit, which have no others
BEYOND = ("beyond", "goals", "ablation")
ALL_TABLES = (*TABLES, *BEYOND)


def tables_of(suite: SuiteConfig) -> tuple[str, ...]:
    """Tables that a suite consists of."""
    if suite.beyond is None:
        return TABLES
    return tuple(name for name in BEYOND if name != "ablation" or suite.beyond.ablation is not None)


def build_table(name: str, results: Results) -> Table:
    """Build a table from the records of a suite.

    Raises:
        ConfigError: unknown name.
        DataError: a record is damaged.
    """
    if name not in ALL_TABLES:
        raise ConfigError(unknown_name("table", name, ALL_TABLES))
    table: Table = importlib.import_module(f"mobie.tables.{name}").build(results)
    if name not in GATED:
        return table
    there = [model for model in table.models if model.absent is None]
    return replace(table, gate={model.label: comparability(results, model) for model in there})


def table_records(name: str, suite: str, layout: Layout) -> list[Path]:
    """The records that a table of a suite reads."""
    plan = Results(suite, layout, plan=True)
    build_table(name, plan)
    return list(plan.asked)
