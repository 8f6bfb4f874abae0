"""Every file that a suite's records decide: tables, figures, verdicts, audit and report. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from mobie.config import load_suite
from mobie.figures import ALL_FIGURES, figures_of, write_figure
from mobie.paper.audit import audit, to_json, to_markdown
from mobie.paths import PACKAGE, Layout
from mobie.provenance import code_hash
from mobie.report.build import write_report
from mobie.results import Results
from mobie.storage import write_text
from mobie.tables import ALL_TABLES, build_table, tables_of
from mobie.tables.table import write_table
from mobie.verdicts import judge, write_claims

#: tables and figures are imported by name when they are asked for, so they are listed
MODULES = (
    "mobie.publish.targets",
    *(f"mobie.tables.{name}" for name in ALL_TABLES),
    *(f"mobie.figures.{name}" for name in ALL_FIGURES),
)


def builders_code() -> str:
    """Digest of the code that makes the files; with another one they may come out differently."""
    return code_hash(MODULES)


def build_targets(suite: str, layout: Layout) -> Iterator[tuple[str, list[Path]]]:
    """Write all files under `layout`, which has configuration and records; yields a name and its paths as it goes on.

    The same records give the same bytes wherever `layout` lies: the report shows paths in records as they are.

    Raises:
        ConfigError: no such suite.
        DataError: a record is damaged.
        StorageError: the system refused to write.
    """
    config = load_suite(suite, layout)
    count = len(tables_of(config)) + len(figures_of(config)) + 3
    yield from tqdm(_built(suite, layout), "build", count, unit="target", disable=None, leave=False)


def _built(suite: str, layout: Layout) -> Iterator[tuple[str, list[Path]]]:
    results = Results(suite, layout)
    for name in tables_of(results.suite):
        yield name, write_table(build_table(name, results), layout)
    yield "claims", write_claims(judge(results), layout)
    yield "audit", _write_audit(layout)
    for name in figures_of(results.suite):
        yield name, write_figure(name, results)
    yield "report", [write_report(suite, layout, tidy=_as_it_is)]


def _as_it_is(text: str) -> str:
    return text


def _write_audit(layout: Layout) -> list[Path]:
    found = audit(PACKAGE / "paper")
    writers: dict[str, Callable[..., str]] = {"json": to_json, "md": to_markdown}
    paths = [layout.table("audit", suffix) for suffix in writers]
    for path, writer in zip(paths, writers.values(), strict=True):
        write_text(path, writer(found))
    return paths
