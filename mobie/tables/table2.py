"""Table 2: perplexity and zero-shot accuracy of every method of a suite; and what Tables 7, 8 and 9 share with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mobie.config import MethodConfig, PaperRow
from mobie.jobs.methods import method_fact
from mobie.paper.baseline import PERPLEXITY as PERPLEXITY
from mobie.paper.baseline import TASK_METRICS as TASK_METRICS
from mobie.paper.printed import printed, printed_rows
from mobie.results import Cell, Model, Results, average
from mobie.tables.table import Column, Row, Table, model_notes, stand_in_note

TASK_HEADINGS = {
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "hellaswag": "HellaSwag",
    "lambada_openai": "LAMBADA-o",
    "lambada_standard": "LAMBADA-s",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
}
AVERAGE = "avg7"
BITS = {"bits": "bits_paper", "bits_codes": "bits_codes", "bits_stored": "bits_stored"}  # column → measurement
BITS_COLUMNS = (Column("bits", "Bits"),)
STORED_COLUMNS = (Column("bits_codes", "codes", extra=True), Column("bits_stored", "stored", extra=True))
TASK_COLUMNS = tuple(Column(task, TASK_HEADINGS[task], better="higher") for task in TASK_METRICS)
AVERAGE_COLUMN = Column(AVERAGE, "Avg. 7", better="higher")
PERPLEXITY_COLUMN = Column(PERPLEXITY, "Perplexity", better="lower")
METRICS_LEGEND = "Accuracies in per cent. Metrics: {}.".format(
    ", ".join(f"{TASK_HEADINGS[task]} `{metric}`" for task, metric in TASK_METRICS.items())
)
NOT_IN_SUITE = "none of the suite's methods stands for this row of the paper"
BITS_LEGEND = "Bits per quantized weight: by the paper's formula; codes only; every stored byte."


def task_cells(results: Results, model: Model, method: str, tasks: Sequence[str]) -> dict[str, Cell]:
    """Accuracies in per cent, by task."""
    return {t: results.cell(model, method, "tasks", f"{t}.{TASK_METRICS[t]}", scale=100) for t in tasks}


def bits_cells(results: Results, model: Model, method: str) -> dict[str, Cell]:
    """The three countings of bits per quantized weight."""
    return {column: results.cell(model, method, "quantize", name) for column, name in BITS.items()}


def text_perplexity(
    results: Results, model: Model, method: str, text: str | None = None, *, seed: int | None = None
) -> Cell:
    """Perplexity on a text of the protocol; on the one that fills the column of WikiText-2 by default."""
    return results.cell(model, method, "perplexity", f"{text or results.suite.wikitext2_text}.perplexity", seed=seed)


def other_texts(results: Results) -> list[str]:
    """Texts of the protocol beside the one that fills the column of WikiText-2."""
    return [text for text in results.protocol.texts if text != results.suite.wikitext2_text]


def row_label(method: MethodConfig) -> str:
    """The paper's name where it has the row, else ours."""
    return method.paper.method if method.paper else method.label


def is_binary(method: MethodConfig) -> bool:
    """Whether a method's weights are nearly all signs."""
    return bool(method_fact(method.method, "stores_signs"))


def paper_entries(table: str, model: Model, row: PaperRow | None) -> dict[str, float]:
    """The paper's entries for a method's row of a model; empty where the table has none.

    Bits tell the rows of AWQ and GPTQ apart. The other methods have one row for a model, with bits that differ between
    models, so it is found by the method's name alone.
    """
    if row is None:
        return {}
    if row.bits is None or not told_by_bits(row.method):
        return printed(table, model.label, method=row.method)
    found = printed(table, model.label, method=row.method, bits=row.bits)
    return found | {"bits": row.bits} if found else {}


def told_by_bits(method: str) -> bool:
    """Whether the paper's Table 2 has several rows of a method for one model."""
    models = [row["model"] for row in printed_rows("table2") if row["method"] == method]
    return len(models) > len(set(models))


def row_keys(table: str) -> tuple[tuple[str, float | None], ...]:
    """Method, and bits where they tell its rows apart, of the rows that the paper's table has, in its order."""
    rows = printed_rows(table)
    keys = ((row["method"], float(row["bits"]) if told_by_bits(row["method"]) else None) for row in rows)
    return tuple(dict.fromkeys(keys))


def stands_for(row: PaperRow | None, name: str, bits: float | None) -> bool:
    """Whether a method's entry for the paper is the row of this name and, where they tell rows apart, these bits."""
    return row is not None and row.method == name and bits in (None, row.bits)


def method_row(table: str, results: Results, model: Model, name: str, cells: Mapping[str, Cell]) -> Row:
    """The row of a method config; it is marked as ours where the paper's table has none that it stands for."""
    method = results.method(name)
    return Row(
        model.label,
        row_label(method),
        cells,
        paper=paper_entries(table, model, method.paper),
        config=name,
        ranked=is_binary(method),
        own=not any(stands_for(method.paper, *key) for key in row_keys(table)),
    )


def papers_rows(table: str, results: Results, model: Model, cells_of: Callable[[str], Mapping[str, Cell]]) -> list[Row]:
    """The rows that the paper's table has, in its order, of the suite's methods; holes where none stands for a row."""
    suite = results.suite.methods
    configs = {
        key: next((own for own in suite if stands_for(results.method(own).paper, *key)), None)
        for key in row_keys(table)
    }
    cells = {name: cells_of(name) for name in configs.values() if name is not None}
    holes = dict.fromkeys(next(iter(cells.values()), ()), Cell(None, status="absent", reason=NOT_IN_SUITE))
    rows = []
    for (method, bits), name in configs.items():
        if name is not None:
            rows.append(method_row(table, results, model, name, cells[name]))
        else:
            paper = paper_entries(table, model, PaperRow(method=method, bits=bits))
            rows.append(Row(model.label, method, holes, paper=paper))
    return rows


def build(results: Results) -> Table:
    """Read the records of all rows of a suite. Raises `DataError` for a damaged one; a missing one is a hole."""
    models = results.models("table2")
    rows = [row for model in models for row in _model_rows(results, model)]
    others = [Column(f"ppl_{text}", f"ppl {text}", better="lower", extra=True) for text in other_texts(results)]
    routing = [
        Column("routing_similarity", "routing similarity", 4, "higher", extra=True),
        Column("expert_shift", "expert shift", 4, "lower", extra=True),
    ]
    stored = [Column("bits_codes", "codes"), Column("bits_stored", "stored")]
    return Table(
        "table2",
        results.suite_name,
        "perplexity and zero-shot accuracy",
        "method",
        (*BITS_COLUMNS, *stored, *TASK_COLUMNS, AVERAGE_COLUMN, PERPLEXITY_COLUMN, *others, *routing),
        tuple(rows),
        (*model_notes(results, models), *item_notes(rows, tuple(TASK_METRICS)), *stand_in_note(results)),
        (METRICS_LEGEND, BITS_LEGEND),
        tuple(models),
    )


def _model_rows(results: Results, model: Model) -> list[Row]:
    rows = []
    for name in results.suite.methods:
        tasks = task_cells(results, model, name, tuple(TASK_METRICS))
        cells = {
            **bits_cells(results, model, name),
            **tasks,
            AVERAGE: average(list(tasks.values())),
            PERPLEXITY: text_perplexity(results, model, name),
            **{f"ppl_{text}": text_perplexity(results, model, name, text) for text in other_texts(results)},
            "routing_similarity": results.cell(model, name, "routing", "similarity"),
            "expert_shift": results.cell(model, name, "routing", "expert_shift"),
        }
        rows.append(method_row("table2", results, model, name, cells))
    return rows


def item_notes(rows: Sequence[Row], tasks: Sequence[str]) -> tuple[str, ...]:
    """How many items stand behind an accuracy."""
    found = (row.cells[task].n for row in rows for task in tasks if task in row.cells)
    counts = sorted({n for n in found if n is not None})
    if not counts:
        return ()
    span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return (f"Accuracies are over {span} items per task, the same items for every method.",)
