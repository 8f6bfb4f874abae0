"""How much each reading of the paper moves the result: one switch of MoBiE at a time against the default.

The readings are those of what the paper leaves open or prints in two ways. Everything else is equal, the calibration
tokens and the windows too, so a difference is paired window by window.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mobie.config import method_spec
from mobie.paired import log_ratio
from mobie.results import Cell, Model, Results
from mobie.tables.table import Column, Row, Table, model_notes
from mobie.tables.table10 import sweep_method

BASE = "mobie"
#: number of the reading, the question, what is tried, its method config; None: λ of the sweep
READINGS: tuple[tuple[int, str, str, str | None], ...] = (
    (1, "joint SVD over what", "gate and up together", "mobie-fused"),
    (2, "shared side", "input side (experts stacked)", "mobie-right"),
    (2, "shared side", "the side that stores fewer bytes", "mobie-fewest-bytes"),
    (3, "rank", "128 leading directions", "mobie-truncated"),
    (5, "shared basis", "16 bits", "mobie-u16"),
    (5, "shared basis", "4 bits", "mobie-u4"),
    (6, "attention", "16 bits", "mobie-16bit-attention"),
    (6, "attention", "like the expert factors", "mobie-mixed-order-attention"),
    (7, "GLAS gradient", "at the projection's output", "mobie-gradient-output"),
    (8, "GLAS Hessian", "one group of channels", "mobie-one-group"),
    (9, "saliency", "by the Cholesky factor", "mobie-cholesky-saliency"),
    (11, "scope of the scales", "whole matrix, no error feedback", "mobie-matrix-scope"),
    (11, "error feedback", "exact least squares", "mobie-triangular-feedback"),
    (12, "scale fit", "rows weighted by σ²", "mobie-sigma2"),
    (13, "NGES target", "experts and binarized router", "mobie-router-binarized"),
    (13, "NGES target", "binarized router only", "mobie-gate-only"),
    (13, "NGES target", "off", "mobie-cejd-glas"),
    (14, "null space", "of the mean over positions", "mobie-position-mean"),
    (15, "λ", "0.1", None),
)
COLUMNS = (
    Column("reading", "Reading", text=True),
    Column("question", "Open question", text=True),
    Column("change", "Perplexity, % against the default", 1),
    Column("stored", "Stored bits, against the default", 2),
    Column("beyond", "Beyond two standard errors", text=True),
)


def build(results: Results) -> Table:
    """Rank the readings by the size of their effect; readings that have not run come last."""
    models = results.models("sensitivity")
    rows = [row for model in models for row in sorted(_rows(results, model), key=_effect, reverse=True)]
    sequences = results.suite.sweep.sequences
    notes = [*model_notes(results, models)]
    if sequences is not None:
        notes.append(f"Calibrated on {sequences} sequences, the default too; the tables use the model's own number.")
    return Table(
        "sensitivity",
        results.suite_name,
        "what each reading of the paper moves",
        "tried",
        COLUMNS,
        tuple(rows),
        tuple(notes),
        ("Perplexity: geometric mean over the protocol's texts; below zero is better than the default.",),
        tuple(models),
    )


def _effect(row: Row) -> float:
    value = row.cells["change"].value
    return -math.inf if value is None else abs(value)


def _rows(results: Results, model: Model) -> list[Row]:
    default = sweep_method(results, 0.2, "wikitext2")
    return [_row(results, model, default, *reading) for reading in READINGS]


def _row(
    results: Results, model: Model, default: str, number: int, question: str, tried: str, config: str | None
) -> Row:
    method = sweep_method(results, float(tried), "wikitext2") if config is None else _at_sweep_size(results, config)
    change = _percent(log_ratio(results, model, method, default, results.protocol.texts))
    stored, base = (results.cell(model, m, "quantize", "bits_stored") for m in (method, default))
    if stored.value is not None and base.value is not None:
        stored = replace(stored, value=stored.value - base.value)
    beyond = ""
    if change.value is not None and change.stderr is not None:
        beyond = "yes" if abs(change.value) > 2 * change.stderr else "no"
    texts = {"reading": str(number), "question": question, "beyond": beyond}
    return Row(model.label, tried, {"change": change, "stored": stored}, texts, config=method)


def _at_sweep_size(results: Results, config: str) -> str:
    return method_spec(config, calibration__sequences=results.suite.sweep.sequences)


def _percent(cell: Cell) -> Cell:
    """A log ratio as a change in per cent."""
    if cell.value is None or cell.stderr is None:
        return cell
    ratio = math.exp(cell.value)
    return replace(cell, value=100 * (ratio - 1), stderr=100 * ratio * cell.stderr)
