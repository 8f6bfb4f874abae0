"""Table 1: what quantized weights and shifted routing each do to the perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mobie.paper.printed import printed
from mobie.results import Cell, Model, Results
from mobie.tables.table import Column, Row, Table, model_notes, stand_in_note
from mobie.tables.table2 import PERPLEXITY

PAPERS_METHOD = "arb-llm"  # the table's caption names it
METHODS = (PAPERS_METHOD, "mobie")
#: the paper's columns `quantized` and `expert_shift` → measurement
ROWS = {
    ("false", "false"): "full_weights.full_routing",
    ("false", "true"): "full_weights.shifted_routing",
    ("true", "false"): "quantized_weights.full_routing",
    ("true", "true"): "quantized_weights.shifted_routing",
}
FULL = ROWS["false", "false"]
COLUMNS = (
    Column("quantized", "Quantized weights", flag=True),
    Column("expert_shift", "Shifted routing", flag=True),
    Column(PERPLEXITY, "Perplexity"),
    Column("increase", "Increase"),
)


def build(results: Results) -> Table:
    """Read one record for each model and method."""
    models = results.models("table1")
    text = results.protocol.shift.text
    return Table(
        "table1",
        results.suite_name,
        "perplexity with quantized weights and with shifted routing",
        "method",
        COLUMNS,
        tuple(row for model in models for method in METHODS for row in _rows(results, model, method)),
        (*model_notes(results, models), *stand_in_note(results, text)),
        (
            "Shifted routing: tokens go to the experts that the quantized model chose; otherwise to those that full "
            "precision chose.",
            "Increase: over full precision in both, with a standard error paired over the windows of the text.",
        ),
        tuple(models),
    )


def _rows(results: Results, model: Model, method: str) -> list[Row]:
    own = method != PAPERS_METHOD
    rows = []
    for (quantized, shifted), name in ROWS.items():
        keys = {"quantized": quantized, "expert_shift": shifted}
        cells = {PERPLEXITY: results.cell(model, method, "shift", name)}
        if name != FULL:
            cells["increase"] = _increase(results, model, method, name)
        paper = {} if own else _paper(model, keys)
        rows.append(Row(model.label, results.method(method).label, cells, keys, paper, method, own=own))
    return rows


def _paper(model: Model, keys: dict[str, str]) -> dict[str, float]:
    """The printed perplexity, and the increase that the paper prints in parentheses beside it."""
    found = printed("table1", model.label, **keys)
    if not found or keys == dict.fromkeys(keys, "false"):
        return found
    full = printed("table1", model.label, quantized="false", expert_shift="false")[PERPLEXITY]
    return found | {"increase": round(found[PERPLEXITY] - full, 2)}


def _increase(results: Results, model: Model, method: str, name: str) -> Cell:
    """Perplexity less that of full precision; both are of one record, so on the same windows."""
    cell, full = (results.cell(model, method, "shift", part) for part in (name, FULL))
    if cell.value is None or full.value is None:
        return replace(cell if cell.value is None else full, stderr=None, n=None)
    losses = results.details(model, method, "shift")["window_nll"]
    error = difference_error(cell.value, losses[name], full.value, losses[FULL])
    return Cell(cell.value - full.value, error, cell.n, record=cell.record)


def difference_error(one: float, one_nll: Sequence[float], other: float, other_nll: Sequence[float]) -> float | None:
    """Standard error of the difference of two perplexities on the same windows (delta method); None for one window.

    one, other:         perplexities.
    one_nll, other_nll: mean losses of the windows, in nats, whose means' exponentials they are.
    """
    changes = [one * a - other * b for a, b in zip(one_nll, other_nll, strict=True)]
    n = len(changes)
    mean = math.fsum(changes) / n
    return math.sqrt(math.fsum((change - mean) ** 2 for change in changes) / (n - 1) / n) if n > 1 else None
