"""Table 11: what the models write after each prompt, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mobie.config import read_yaml
from mobie.paths import PACKAGE
from mobie.results import Cell, Model, Results
from mobie.tables.table import Column, Row, Table, model_notes

PROMPTS = PACKAGE / "paper" / "prompts.yaml"
TEXT = "continuation"
COLUMNS = (
    Column(TEXT, "Continuation", text=True),
    Column("tokens", "Tokens", 1),
    Column("finished", "Ended", flag=True),
    Column("repetition", "Repetition, %", 1),
)
OVER_ALL = "All prompts"


def build(results: Results) -> Table:
    """Read the generations of each method."""
    models = results.models("table11")
    asked = read_yaml(PROMPTS)
    rows = []
    for model in models:
        for entry in asked["prompts"]:
            rows += [_row(results, model, method, entry["prompt"]) for method in asked["methods"]]
        rows += [_mean(results, model, method) for method in asked["methods"]]
    return Table(
        "table11",
        results.suite_name,
        "continuations of prompts",
        "method",
        COLUMNS,
        tuple(rows),
        model_notes(results, models),
        (
            "At each step the most likely token, without a chat template. Ended: with an end-of-sequence token, else "
            f"the text is cut after {results.protocol.generations.max_new_tokens} tokens.",
            "Repetition: share of the sequences of four tokens that occurred before in the same text.",
        ),
        tuple(models),
        section="prompt",
    )


def _row(results: Results, model: Model, method: str, prompt: str) -> Row:
    row = Row(model.label, results.method(method).label, {}, config=method, section=prompt)
    whole = results.cell(model, method, "generations", "tokens")
    if whole.value is None:
        return replace(row, cells=dict.fromkeys((column.key for column in COLUMNS), whole))
    sample = _sample(results, model, method, prompt)
    if sample is None:
        hole = Cell(None, status="missing", reason="the record has no such prompt", record=whole.record)
        return replace(row, cells=dict.fromkeys((column.key for column in COLUMNS), hole))
    texts = {TEXT: sample["text"].strip(), "finished": str(sample["finished"]).lower()}
    found = Cell(None, record=whole.record)
    cells = {TEXT: found, "finished": found, "tokens": Cell(sample["tokens"], record=whole.record)}
    cells["repetition"] = _repetition(sample, whole.record)
    return replace(row, cells=cells, texts=texts)


def _sample(results: Results, model: Model, method: str, prompt: str) -> Mapping[str, Any] | None:
    samples = results.details(model, method, "generations")["samples"]
    return next((sample for sample in samples if sample["prompt"] == prompt), None)


def _repetition(sample: Mapping[str, Any], record: str) -> Cell:
    if sample["repetition"] is None:
        return Cell(None, status="unsupported", reason="fewer than four tokens: nothing can repeat", record=record)
    return Cell(100 * sample["repetition"], record=record)


def _mean(results: Results, model: Model, method: str) -> Row:
    """Means over the prompts."""
    cells = {
        "tokens": results.cell(model, method, "generations", "tokens"),
        "repetition": results.cell(model, method, "generations", "repetition", scale=100),
    }
    return Row(model.label, results.method(method).label, cells, config=method, section=OVER_ALL)
