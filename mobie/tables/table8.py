"""Table 8: harder tasks."""

from __future__ import annotations

from collections.abc import Sequence

from mobie.results import Cell, Model, Results, average
from mobie.tables.table import Column, Row, Table, model_notes
from mobie.tables.table2 import (
    BITS_COLUMNS,
    BITS_LEGEND,
    STORED_COLUMNS,
    bits_cells,
    item_notes,
    papers_rows,
)

#: which measurement of the records stands in a column: exact match of the number, share of problems that the greedy
#: program solves (after evalplus's sanitizer, on the base tests)
METRICS = {
    "mmlu": "acc",
    "mathqa": "acc",
    "gsm8k": "exact_match",
    "mbpp": "pass@1",
    "humaneval": "pass@1",
}
HEADINGS = {"mmlu": "MMLU", "mathqa": "MathQA", "gsm8k": "GSM8K", "mbpp": "MBPP", "humaneval": "HumanEval"}
TASKS = tuple(METRICS)
PROGRAMS = ("mbpp", "humaneval")  # from records of kind `code`


def build(results: Results) -> Table:
    """Read the records of the paper's rows: bits, harder tasks."""
    return hard_table("table8", results, "harder tasks", TASKS)


def hard_table(name: str, results: Results, title: str, tasks: Sequence[str], notes: Sequence[str] = ()) -> Table:
    """A table of harder tasks with their average, in the paper's rows."""
    models = results.models(name)
    rows = [row for model in models for row in _model_rows(name, results, model, tasks)]
    metrics = ", ".join(f"{HEADINGS[task]} `{METRICS[task]}`" for task in tasks)
    return Table(
        name,
        results.suite_name,
        title,
        "method",
        (
            *BITS_COLUMNS,
            *(Column(task, HEADINGS[task], better="higher") for task in tasks),
            Column(_average_name(tasks), f"Avg. {len(tasks)}", better="higher"),
            *STORED_COLUMNS,
        ),
        tuple(rows),
        (*model_notes(results, models), *notes, *program_notes(results, tasks), *item_notes(rows, tasks)),
        (f"In per cent. Metrics: {metrics}.", "The average is there only where all its parts are.", BITS_LEGEND),
        tuple(models),
    )


def hard_kind(task: str) -> str:
    """Kind of the records that hold a task's score."""
    return "code" if task in PROGRAMS else "hard"


def program_notes(results: Results, tasks: Sequence[str]) -> tuple[str, ...]:
    """Which reading of the paper's columns of programs is taken."""
    shown = [HEADINGS[task] for task in tasks if task in PROGRAMS]
    if not shown:
        return ()
    return (
        f"{' and '.join(shown)}: share of problems whose greedy program passes the base tests, after evalplus "
        f"{results.protocol.code.evalplus}'s sanitizer; the paper says neither how programs are generated nor which "
        "tests count. Records of kind `code` have other readings: raw programs, evalplus's further tests, drawn ones.",
    )


def score_cell(results: Results, model: Model, method: str, task: str) -> Cell:
    """A task's score in per cent."""
    return results.cell(model, method, hard_kind(task), f"{task}.{METRICS[task]}", scale=100)


def _average_name(tasks: Sequence[str]) -> str:
    return f"avg{len(tasks)}"


def _model_rows(table: str, results: Results, model: Model, tasks: Sequence[str]) -> list[Row]:
    def cells_of(name: str) -> dict[str, Cell]:
        scores = {task: score_cell(results, model, name, task) for task in tasks}
        average_cell = average(list(scores.values()))
        return {**bits_cells(results, model, name), **scores, _average_name(tasks): average_cell}

    return papers_rows(table, results, model, cells_of)
