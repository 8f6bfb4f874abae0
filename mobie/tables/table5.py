"""Table 5: bits of the shared basis UΣ."""

from __future__ import annotations

from mobie.paper.printed import printed
from mobie.results import Model, Results, average
from mobie.tables.table import Row, Table, model_notes, stand_in_note
from mobie.tables.table2 import (
    AVERAGE,
    AVERAGE_COLUMN,
    BITS_COLUMNS,
    BITS_LEGEND,
    PERPLEXITY,
    PERPLEXITY_COLUMN,
    STORED_COLUMNS,
    TASK_METRICS,
    bits_cells,
    is_binary,
    task_cells,
    text_perplexity,
)

#: the paper's column `backbone_bits` → method config
ROWS = {"fp16": "fp16", "16": "mobie-u16", "8": "mobie", "4": "mobie-u4"}


def build(results: Results) -> Table:
    """Read the records of MoBiE with 16, 8 and 4 bits: bits, perplexity, tasks."""
    models = results.models("table5")
    rows = tuple(_row(results, model, bits) for model in models for bits in ROWS)
    return Table(
        "table5",
        results.suite_name,
        "bits of the shared basis",
        "backbone_bits",
        (*BITS_COLUMNS, PERPLEXITY_COLUMN, AVERAGE_COLUMN, *STORED_COLUMNS),
        rows,
        (*model_notes(results, models), *stand_in_note(results)),
        ("Avg. 7: mean accuracy in per cent over the tasks of Table 2.", BITS_LEGEND),
        tuple(models),
    )


def _row(results: Results, model: Model, bits: str) -> Row:
    name = ROWS[bits]
    cells = {
        **bits_cells(results, model, name),
        PERPLEXITY: text_perplexity(results, model, name),
        AVERAGE: average(list(task_cells(results, model, name, tuple(TASK_METRICS)).values())),
    }
    paper = printed("table5", model.label, backbone_bits=bits)
    return Row(model.label, bits, cells, paper=paper, config=name, ranked=is_binary(results.method(name)))
