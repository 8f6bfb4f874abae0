"""Table 4: MoBiE with and without each of its parts."""

from __future__ import annotations

from mobie.paper.printed import printed
from mobie.results import Model, Results, average
from mobie.tables.table import Column, Row, Table, model_notes, stand_in_note
from mobie.tables.table2 import (
    PERPLEXITY,
    TASK_HEADINGS,
    TASK_METRICS,
    is_binary,
    item_notes,
    other_texts,
    task_cells,
    text_perplexity,
)

PARTS = ("cejd", "glas", "nges")
#: method config → which parts it has; `fp16` as the paper's CSV has it
ROWS = {
    "fp16": ("fp16", "fp16", "fp16"),
    "mobie-none": ("false", "false", "false"),
    "mobie-cejd": ("true", "false", "false"),
    "mobie-glas": ("false", "true", "false"),
    "mobie-nges": ("false", "false", "true"),
    "mobie-cejd-glas": ("true", "true", "false"),
    "mobie": ("true", "true", "true"),
}
TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande")
AVERAGE = "avg4"


def build(results: Results) -> Table:
    """Read the records of the ablations: bits, tasks, perplexity."""
    models = results.models("table4")
    rows = tuple(_row(results, model, method) for model in models for method in ROWS)
    others = [Column(f"ppl_{text}", f"ppl {text}", better="lower", extra=True) for text in other_texts(results)]
    metrics = ", ".join(f"{TASK_HEADINGS[task]} `{TASK_METRICS[task]}`" for task in TASKS)
    return Table(
        "table4",
        results.suite_name,
        "the parts of MoBiE",
        "method",
        (
            *(Column(part, part.upper(), flag=True) for part in PARTS),
            *(Column(task, TASK_HEADINGS[task], better="higher") for task in TASKS),
            Column(AVERAGE, "Avg. 4", better="higher"),
            Column(PERPLEXITY, "Perplexity", better="lower", extra=True),
            *others,
            Column("bits_stored", "stored bits", extra=True),
        ),
        rows,
        (*model_notes(results, models), *item_notes(rows, TASKS), *stand_in_note(results)),
        (f"Accuracies in per cent. Metrics: {metrics}.", "Stored bits: every stored byte of the quantized weights."),
        tuple(models),
    )


def _row(results: Results, model: Model, name: str) -> Row:
    parts = dict(zip(PARTS, ROWS[name], strict=True))
    tasks = task_cells(results, model, name, TASKS)
    method = results.method(name)
    cells = {
        **tasks,
        AVERAGE: average(list(tasks.values())),
        PERPLEXITY: text_perplexity(results, model, name),
        **{f"ppl_{text}": text_perplexity(results, model, name, text) for text in other_texts(results)},
        "bits_stored": results.cell(model, name, "quantize", "bits_stored"),
    }
    paper = printed("table4", model.label, **parts)
    return Row(model.label, method.label, cells, parts, paper, name, ranked=is_binary(method))
