"""Our method with one switch changed at a time: what each part of it is worth."""

from __future__ import annotations

from mobie.config import Ablation
from mobie.errors import ConfigError
from mobie.excess import comparison, difference, excess, interval, stored_bits
from mobie.results import Model, Results
from mobie.tables.beyond import EXCESS, STORED, seeds_cell, texts_of
from mobie.tables.table import Column, Row, Table, model_notes

DIFFERENCE, SEEDS, REACH, BEYOND = "difference", "seeds", "reach", "beyond_interval"
AGAINST = "Mean difference to the method as it is, nats per token"


def build(results: Results) -> Table:
    """Read the excess of the method as it is and of each variant, and their paired difference."""
    plan = comparison(results).ablation
    if plan is None:
        raise ConfigError(
            f"suite {results.suite_name!r} has no ablation, expected the key `beyond.ablation` with `base` and "
            "`variants`"
        )
    models = results.models("ablation")
    rows = [_row(results, model, plan, name) for model in models for name in (plan.base, *plan.variants)]
    return Table(
        "ablation",
        results.suite_name,
        f"what each part of {results.method(plan.base).label} is worth",
        "row",
        _columns(results),
        tuple(rows),
        model_notes(results, models),
        (
            "Above zero: worse than the method as it is. The difference is over the calibration seeds that both rows "
            "have, runs of one seed compared with each other; reach: half of its 95 % t-interval, which one seed does "
            "not give.",
        ),
        tuple(models),
    )


def _columns(results: Results) -> tuple[Column, ...]:
    return (
        Column("switch", "What is changed", text=True, group=EXCESS),
        Column(STORED.key, STORED.heading, STORED.digits, group=EXCESS),
        *(Column(text, text.capitalize(), 3, group=EXCESS) for text in texts_of(results)),
        Column(DIFFERENCE, "Difference", 4, group=AGAINST),
        Column(SEEDS, "Seeds", 0, group=AGAINST),
        Column(REACH, "Reach of its interval", 4, group=AGAINST),
        Column(BEYOND, "Beyond the interval", text=True, group=AGAINST),
    )


def _row(results: Results, model: Model, plan: Ablation, name: str) -> Row:
    cells = {STORED.key: stored_bits(results, model, name, None)}
    cells |= {column: excess(results, model, name, texts) for column, texts in texts_of(results).items()}
    texts = {"switch": results.method(name).description}
    if name != plan.base:
        found, _ = difference(results, model, name, plan.base, results.protocol.texts)
        reach = interval(found)
        cells |= {DIFFERENCE: found, SEEDS: seeds_cell(found), REACH: reach, BEYOND: reach}
        if found.value is not None and reach.value is not None:
            texts[BEYOND] = "yes" if abs(found.value) > reach.value else "no"
    return Row(model.label, results.method(name).label, cells, texts, config=name)
