"""Table 2: perplexity and zero-shot accuracy of every row of a suite, built from records alone.

    table2.csv       the paper's layout; values in per cent, perplexities and bits as they are; a hole is an empty cell
    table2.md        the same to read: standard errors, chance level marked, holes with their reasons
    table2.long.csv  one line per value, with its sample size, the paper's value, and the record it comes from

Nothing in them depends on time or place: two runs of a suite give the same bytes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mobie.config import MethodConfig, ModelConfig, PaperRow, Row, SuiteConfig, load_method, load_model_config
from mobie.paths import Layout, paper_table
from mobie.records import Record, read_record

#: Which of lm-eval's metrics stands in a column. The paper does not say. Its full-precision entries for HellaSwag
#: (78.21 for OLMoE) and ARC-Challenge (49.23) are as high as length-normalised scoring gives for such models; the
#: harness has no `acc_norm` for LAMBADA and WinoGrande. For ARC-Easy and PIQA the two metrics lie close together, so
#: `acc`, the customary one, is a reading that the entries do not settle. Records keep both metrics.
TASK_METRICS = {
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "lambada_standard": "acc",
    "piqa": "acc",
    "winogrande": "acc",
}
AVERAGE = "avg7"
PERPLEXITY = "wikitext2_ppl"
BITS = {"bits": "bits_paper", "bits_codes": "bits_codes", "bits_stored": "bits_stored"}  # column → measurement
PAPER_COLUMNS = ("bits", *TASK_METRICS, AVERAGE, PERPLEXITY)
CSV_COLUMNS = ("model", "method", *PAPER_COLUMNS, "bits_codes", "bits_stored", "config")
LONG_COLUMNS = (
    *("suite", "model", "method", "config", "column", "ours", "stderr", "n", "chance", "at_chance"),
    *("paper", "difference", "status", "reason", "record"),
)
BINARY_METHODS = frozenset({"billm", "arb", "mobie"})  # registered names of the methods that store signs
CHANCE_STDERRS = 2.0


@dataclass(frozen=True)
class Cell:
    """One value in the unit of the table, or a hole (`value` None) with its status and reason."""

    value: float | None
    stderr: float | None = None
    n: int | None = None
    chance: float | None = None
    status: str = "ok"
    reason: str | None = None
    record: str = ""

    @property
    def at_chance(self) -> bool:
        """Whether the value is not above chance by more than two standard errors."""
        if self.value is None or self.chance is None or self.stderr is None:
            return False
        return self.value - self.chance <= CHANCE_STDERRS * self.stderr


@dataclass(frozen=True)
class TableRow:
    """One line of the table: a model and a method config, or one of the paper's methods that the suite lacks."""

    model: str
    method: str
    config: str
    paper: PaperRow | None
    binary: bool
    cells: dict[str, Cell]


def extra_columns(texts: Iterable[str], wikitext2_text: str) -> dict[str, tuple[str, str]]:
    """Columns beside the paper's, column → (kind of record, measurement): the other texts, and the routers."""
    others = {f"ppl_{text}": ("perplexity", f"{text}.perplexity") for text in texts if text != wikitext2_text}
    return others | {"routing_similarity": ("routing", "similarity"), "expert_shift": ("routing", "expert_shift")}


def build_rows(suite_name: str, suite: SuiteConfig, texts: Sequence[str], layout: Layout) -> list[TableRow]:
    """Read the records of all rows of a suite.

    Raises:
        DataError: a record is damaged. A record that does not exist is a hole with status `missing`.
    """
    columns = _columns(suite, texts)
    rows = []
    for model_name in suite.models:
        model = load_model_config(model_name, layout)
        for row in suite.rows:
            rows.append(_build_row(suite_name, suite, model_name, model, row, columns, layout))
    return rows


def _columns(suite: SuiteConfig, texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Column → (kind of record, measurement) of everything but the average."""
    columns = {column: ("quantize", name) for column, name in BITS.items()}
    columns |= {task: ("tasks", f"{task}.{metric}") for task, metric in TASK_METRICS.items()}
    columns[PERPLEXITY] = ("perplexity", f"{suite.wikitext2_text}.perplexity")
    return columns | extra_columns(texts, suite.wikitext2_text)


def _build_row(
    suite_name: str,
    suite: SuiteConfig,
    model_name: str,
    model: ModelConfig,
    row: Row,
    columns: dict[str, tuple[str, str]],
    layout: Layout,
) -> TableRow:
    shown = model.label or model_name
    if row.method is None:
        hole = Cell(None, status="absent", reason=row.absent)
        cells = dict.fromkeys([*columns, AVERAGE], hole)
        return TableRow(shown, row.label, "", PaperRow(method=row.label), False, cells)
    method = load_method(row.method, layout)
    records = {}
    for kind in {kind for kind, _ in columns.values()}:
        path = layout.record(suite_name, model_name, row.method, suite.seed, kind)
        records[kind] = (read_record(path) if path.exists() else None, path.relative_to(layout.root).as_posix())
    cells = {column: _cell(*records[kind], name) for column, (kind, name) in columns.items()}
    cells[AVERAGE] = average([cells[task] for task in TASK_METRICS], records["tasks"][1])
    return TableRow(shown, row_label(method), row.method, method.paper, method.method in BINARY_METHODS, cells)


def row_label(method: MethodConfig) -> str:
    """The paper's name where it has the row, else ours."""
    return method.paper.method if method.paper else method.label


def _cell(record: Record | None, path: str, name: str) -> Cell:
    if record is None:
        return Cell(None, status="missing", reason="its job has not run", record=path)
    if not record.ok:
        return Cell(None, status=record.status, reason=record.reason, record=path)
    found = record.measurement(name)
    if found is None:
        return Cell(None, status="missing", reason=f"the record has no {name}", record=path)
    scale = 100.0 if record.kind == "tasks" else 1.0
    return Cell(
        found.value * scale,
        None if found.stderr is None else found.stderr * scale,
        found.n,
        None if found.chance is None else found.chance * scale,
        record=path,
    )


def average(cells: Sequence[Cell], record: str) -> Cell:
    """Unweighted mean of accuracies, a hole unless all are there.

    The standard error is propagated as if the tasks were independent; the two LAMBADA columns share passages, so it is
    a little too small.
    """
    hole = next((cell for cell in cells if cell.value is None), None)
    if hole is not None:
        return replace(hole, stderr=None, n=None, chance=None)
    count = len(cells)
    errors = [cell.stderr for cell in cells]
    chances = [cell.chance for cell in cells]
    return Cell(
        sum(cell.value for cell in cells) / count,
        None if None in errors else math.sqrt(sum(error**2 for error in errors)) / count,
        sum(cell.n for cell in cells),
        None if None in chances else sum(chances) / count,
        record=record,
    )


def paper_values(row: TableRow) -> dict[str, float]:
    """The paper's entries for a row, by column; none where the model or the row is not in the paper."""
    if row.paper is None:
        return {}
    with paper_table("table2").open(newline="", encoding="utf-8") as file:
        found = [r for r in csv.DictReader(file) if (r["model"], r["method"]) == (row.model, row.paper.method)]
    if len(found) > 1:
        found = [r for r in found if float(r["bits"]) == row.paper.bits]
    return {column: float(found[0][column]) for column in PAPER_COLUMNS} if found else {}


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def to_csv(rows: Sequence[TableRow]) -> str:
    """The paper's layout."""
    keys = ("model", "method", "config")
    lines = [
        {key: getattr(row, key) for key in keys}
        | {column: _number(row.cells[column].value) for column in CSV_COLUMNS if column not in keys}
        for row in rows
    ]
    return _csv(CSV_COLUMNS, lines)


def to_long_csv(suite_name: str, rows: Sequence[TableRow]) -> str:
    """One line per value."""
    return _csv(LONG_COLUMNS, (line for row in rows for line in _long_lines(suite_name, row)))


def _long_lines(suite_name: str, row: TableRow) -> Iterator[dict[str, str]]:
    paper = paper_values(row)
    for column, cell in row.cells.items():
        printed = paper.get(column)
        both = cell.value is not None and printed is not None
        yield {
            "suite": suite_name,
            "model": row.model,
            "method": row.method,
            "config": row.config,
            "column": column,
            "ours": _number(cell.value, 4),
            "stderr": _number(cell.stderr, 4),
            "n": "" if cell.n is None else str(cell.n),
            "chance": _number(cell.chance, 4),
            "at_chance": "" if cell.chance is None else str(cell.at_chance).lower(),
            "paper": "" if printed is None else f"{printed:g}",
            "difference": _number(cell.value - printed, 4) if both else "",
            "status": cell.status,
            "reason": cell.reason or "",
            "record": cell.record,
        }


def _csv(columns: Sequence[str], lines: Iterable[dict[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def write_table2(suite_name: str, suite: SuiteConfig, texts: Sequence[str], layout: Layout) -> list[Path]:
    """Build the three files from the records under `layout`; returns their paths.

    Raises:
        DataError: a record is damaged.
        StorageError: a file cannot be written.
    """
    from mobie.storage import write_text
    from mobie.tables.markdown import to_markdown

    rows = build_rows(suite_name, suite, texts, layout)
    models = {name: load_model_config(name, layout) for name in suite.models}
    contents = {
        "csv": to_csv(rows),
        "md": to_markdown(suite_name, suite, models, rows),
        "long.csv": to_long_csv(suite_name, rows),
    }
    for suffix, text in contents.items():
        write_text(layout.table("table2", suffix), text)
    return [layout.table("table2", suffix) for suffix in contents]
