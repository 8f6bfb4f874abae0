"""Our method against every other per stored bit: excess loss on three texts, over calibration seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mobie.config import Scope
from mobie.excess import (
    comparison,
    excess,
    interval,
    least_similarity,
    less,
    name_of,
    ratio,
    rows_of,
    stored_bits,
)
from mobie.results import Cell, Model, Results
from mobie.tables.table import Column, Row, Table, model_notes

MEAN = "mean"
STORED = Column("stored", "Stored bits per weight", 3)
EXCESS = "Excess loss over full precision, nats per token"
INTERVALS = "Reach of the 95 % interval over the seeds, to either side"
RATIOS = "Mean excess as a share of another method's, and routing"
ROUTING_RIVAL = "mobie"
LEGEND = (
    "Stored bits: every byte of codes, scales, maps and indices, per weight that the section's methods quantize; of "
    "experts only, per weight of an expert.",
    "The standard error of an excess is over calibration seeds (column Seeds); full precision and the scored windows "
    "are the same for all. Interval: t-distribution with one degree of freedom less than seeds.",
    "Routing: similarity of the routing to full precision less that of MoBiE, in the layer where this is least; of the "
    "suite's own seed.",
)


def build(results: Results) -> Table:
    """Read excess losses, bytes and routes of every row of every scope."""
    models = [model for model in results.models("beyond")]
    rows = [
        row
        for model in models
        for scope in comparison(results).scopes.values()
        for row in _scope_rows(results, model, scope)
    ]
    return Table(
        "beyond",
        results.suite_name,
        "excess loss by the bits that are really stored",
        "method",
        columns(results),
        tuple(rows),
        model_notes(results, models),
        LEGEND,
        tuple(models),
        section="scope",
    )


def texts_of(results: Results) -> dict[str, tuple[str, ...]]:
    """Column → the texts that its excess is averaged over: each of the protocol's, then all of them."""
    return {text: (text,) for text in results.protocol.texts} | {MEAN: results.protocol.texts}


def columns(results: Results) -> tuple[Column, ...]:
    """Excess by text, its intervals, and shares of the rivals' that any scope names."""
    texts = texts_of(results)
    rivals = dict.fromkeys(rival for scope in comparison(results).scopes.values() for rival in scope.rivals)
    return (
        Column(STORED.key, STORED.heading, STORED.digits, group=EXCESS),
        *(Column(text, text.capitalize(), 3, group=EXCESS) for text in texts),
        Column("seeds", "Seeds", 0, group=EXCESS),
        *(Column(f"{text}_interval", text.capitalize(), 3, group=INTERVALS) for text in texts),
        *(Column(f"of_{rival}", _label(results, rival), 3, group=RATIOS) for rival in rivals),
        Column("routing", "Routing similarity less MoBiE's", 4, group=RATIOS),
    )


def _label(results: Results, rival: str) -> str:
    """A rival's name: of its row in the first scope that has it."""
    names = [scope.rivals[rival] for scope in comparison(results).scopes.values() if rival in scope.rivals]
    return f"Of {results.method(names[0]).label}'s"


def seeds_cell(mean: Cell) -> Cell:
    """Number of seeds that a mean is over, as a value of its own; a hole where the mean is one."""
    return replace(mean, value=None if mean.value is None or mean.n is None else float(mean.n), stderr=None)


def _scope_rows(results: Results, model: Model, scope: Scope) -> list[Row]:
    names = rows_of(results, scope)
    means = {name: excess(results, model, name, results.protocol.texts) for name in names}
    return [_row(results, model, scope, name, means) for name in names]


def _row(results: Results, model: Model, scope: Scope, name: str, means: Mapping[str, Cell]) -> Row:
    cells = {STORED.key: stored_bits(results, model, name, scope.component)}
    for column, texts in texts_of(results).items():
        found = excess(results, model, name, texts)
        cells |= {column: found, f"{column}_interval": interval(found)}
    cells["seeds"] = seeds_cell(cells[MEAN])
    for rival, row in scope.rivals.items():
        cells[f"of_{rival}"] = ratio(means[name], means[row])
    if name in scope.dial and ROUTING_RIVAL in scope.rivals:
        cells["routing"] = less(*least_similarity(results, model, name, scope.rivals[ROUTING_RIVAL]))
    return Row(model.label, name_of(results, name), cells, config=name, section=scope.label)
