"""Table 7: zero-shot accuracy of further models."""

from __future__ import annotations

from mobie.results import Cell, Model, Results, average
from mobie.tables.table import Column, Row, Table, model_notes, stand_in_note
from mobie.tables.table2 import (
    AVERAGE,
    AVERAGE_COLUMN,
    BITS_COLUMNS,
    BITS_LEGEND,
    METRICS_LEGEND,
    PERPLEXITY,
    STORED_COLUMNS,
    TASK_COLUMNS,
    TASK_METRICS,
    bits_cells,
    item_notes,
    other_texts,
    papers_rows,
    task_cells,
    text_perplexity,
)

NAME = "table7"


def build(results: Results) -> Table:
    """Read the records of the paper's rows: bits, tasks, perplexity."""
    models = results.models(NAME)
    rows = [row for model in models for row in _model_rows(results, model)]
    texts = [Column(f"ppl_{text}", f"ppl {text}", better="lower", extra=True) for text in other_texts(results)]
    return Table(
        NAME,
        results.suite_name,
        "zero-shot accuracy of further models",
        "method",
        (
            *BITS_COLUMNS,
            *TASK_COLUMNS,
            AVERAGE_COLUMN,
            *STORED_COLUMNS,
            Column(PERPLEXITY, "Perplexity", better="lower", extra=True),
            *texts,
        ),
        tuple(rows),
        (*model_notes(results, models), *item_notes(rows, tuple(TASK_METRICS)), *stand_in_note(results)),
        (METRICS_LEGEND, BITS_LEGEND),
        tuple(models),
    )


def _model_rows(results: Results, model: Model) -> list[Row]:
    def cells_of(name: str) -> dict[str, Cell]:
        tasks = task_cells(results, model, name, tuple(TASK_METRICS))
        return {
            **bits_cells(results, model, name),
            **tasks,
            AVERAGE: average(list(tasks.values())),
            PERPLEXITY: text_perplexity(results, model, name),
            **{f"ppl_{text}": text_perplexity(results, model, name, text) for text in other_texts(results)},
        }

    return papers_rows(NAME, results, model, cells_of)
