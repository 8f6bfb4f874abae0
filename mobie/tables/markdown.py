"""Table 2 as Markdown: what a person reads first, so what limits the numbers stands above and below them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mobie.config import ModelConfig, SuiteConfig
from mobie.tables.table2 import AVERAGE, PERPLEXITY, TASK_METRICS, Cell, TableRow

HEADINGS = {
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "hellaswag": "HellaSwag",
    "lambada_openai": "LAMBADA-o",
    "lambada_standard": "LAMBADA-s",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    AVERAGE: "Avg. 7",
    PERPLEXITY: "Perplexity",
}
BIT_HEADINGS = {"bits": "Bits", "bits_codes": "codes", "bits_stored": "stored"}
MAIN = tuple(BIT_HEADINGS | HEADINGS)
LOWER_IS_BETTER = frozenset({PERPLEXITY})
FOUR_DIGITS = frozenset({"routing_similarity", "expert_shift"})  # shares near 0 or 1


class Footnotes:
    """Reasons of holes, numbered in the order in which they are first met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, cell: Cell) -> str:
        text = f"{cell.status}: {cell.reason}" if cell.reason else cell.status
        return f"–[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {' '.join(text.split())}  " for text, number in self._numbers.items()]


def to_markdown(
    suite_name: str, suite: SuiteConfig, models: Mapping[str, ModelConfig], rows: Sequence[TableRow]
) -> str:
    """The table with its head note and footnotes, one section per model."""
    footnotes = Footnotes()
    lines = [f"# Table 2, suite `{suite_name}`", "", *_head_note(suite, models, rows), ""]
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        lines += [f"## {model}", "", *_table(own, MAIN, BIT_HEADINGS | HEADINGS, footnotes), ""]
        extra = tuple(column for column in own[0].cells if column not in MAIN)
        measured = [row for row in own if row.config]
        lines += [
            "Beside the paper's columns:",
            "",
            *_table(measured, extra, {column: column.replace("_", " ") for column in extra}, footnotes),
            "",
        ]
    lines += _legend(suite)
    if footnotes.lines():
        lines += ["", *footnotes.lines()]
    return "\n".join(lines).rstrip() + "\n"


def _head_note(suite: SuiteConfig, models: Mapping[str, ModelConfig], rows: Sequence[TableRow]) -> list[str]:
    lines = [suite.description]
    lines += [f"- **{name}**: {model.notes}" for name, model in models.items() if model.notes]
    counts = sorted({row.cells[task].n for row in rows for task in TASK_METRICS} - {None})
    if counts:
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(f"- Accuracies are over {span} items per task, the same items for every method.")
    if suite.wikitext2_text != "wikitext2":
        lines.append(
            f"- The column of WikiText-2 perplexity holds that of the text `{suite.wikitext2_text}`, "
            "which stands in for it."
        )
    if any(model.label is None for model in models.values()):
        lines.append("- The model is not one of the paper's: nothing here is a verdict on the paper's numbers.")
    return lines


def _legend(suite: SuiteConfig) -> list[str]:
    metrics = ", ".join(f"{HEADINGS[task]} `{metric}`" for task, metric in TASK_METRICS.items())
    return [
        "Accuracies in per cent ± standard error. † not above chance by more than two standard errors. "
        "**Bold**: best of the binary methods, where it is above chance. * not a row of the paper's table.  ",
        f"Metrics: {metrics}.  ",
        "Bits per quantized weight: by the paper's formula; codes only; every stored byte.",
    ]


def _table(
    rows: Sequence[TableRow], columns: Sequence[str], headings: Mapping[str, str], footnotes: Footnotes
) -> list[str]:
    best = {column: _best_binary(rows, column) for column in columns if column in HEADINGS}
    lines = [
        "| " + " | ".join(["Method", *(headings[column] for column in columns)]) + " |",
        "|" + "|".join(["---", *("---:" for _ in columns)]) + "|",
    ]
    for row in rows:
        name = row.method + ("" if row.paper else " *")
        lines.append("| " + " | ".join([name, *_cells(row, columns, best, footnotes)]) + " |")
    return lines


def _cells(row: TableRow, columns: Sequence[str], best: Mapping[str, float], footnotes: Footnotes) -> Iterator[str]:
    for column in columns:
        cell = row.cells[column]
        if cell.value is None:
            yield footnotes.mark(cell)
        else:
            bold = row.binary and cell.value == best.get(column) and not cell.at_chance
            yield _show(cell, bold, 4 if column in FOUR_DIGITS else 2)


def _best_binary(rows: Sequence[TableRow], column: str) -> float:
    """The best value of the binary rows; NaN, which equals none, where fewer than two have one."""
    values = [row.cells[column].value for row in rows if row.binary and row.cells[column].value is not None]
    if len(values) < 2:
        return math.nan
    return min(values) if column in LOWER_IS_BETTER else max(values)


def _show(cell: Cell, best: bool, digits: int) -> str:
    value = f"**{cell.value:.{digits}f}**" if best else f"{cell.value:.{digits}f}"
    error = "" if cell.stderr is None else f" ± {cell.stderr:.{digits}f}"
    return value + error + (" †" if cell.at_chance else "")
