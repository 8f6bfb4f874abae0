"""The protocol gate: which protocol gives the paper's full-precision row of a model, beside the one the tables use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobie.comparable import KIND, REFERENCE, comparability, gated_models
from mobie.paper.baseline import PERPLEXITY
from mobie.results import Cell, Model, Results
from mobie.tables.table import Column, Row, Table, model_notes, stand_in_note

VALUE = "value"
COLUMNS = (
    Column(VALUE, "Ours"),
    Column("difference", "less the paper's"),
    Column("tolerance", "Tolerance"),
    Column("reproduces", "Reproduces", flag=True),
    Column("own", "Used in the tables", flag=True),
)
SHOWN = (VALUE, "reproduces", "own")  # columns that every row has, be it a hole
NOT_PRINTED = Cell(None, status="absent", reason="the paper prints no such entry of this model")
SECTIONS = {True: "Perplexity", False: "Accuracy in per cent"}
HOLES = "Not measured"
#: column → what it is called in the record
COMPARED = {"difference": "distance", "tolerance": "tolerance"}


def build(results: Results) -> Table:
    """Read the gate's record of every model that has one."""
    models = gated_models(results)
    gate = results.protocol.gate
    return Table(
        "gate",
        results.suite_name,
        "which protocol reproduces the paper's baseline",
        "protocol",
        COLUMNS,
        tuple(row for model in models for row in _rows(results, model)),
        (*model_notes(results, models), *stand_in_note(results, gate.text)),
        (
            "The model in full precision. A protocol reproduces a printed entry within half a unit of its last digit; "
            f"a perplexity also within {100 * gate.perplexity_relative:g} % of it, an accuracy, or a perplexity of a "
            f"part of the text, within {gate.stderrs:g} standard errors of ours.",
            "A model is comparable with the paper's numbers if the protocols that the tables use reproduce every "
            "printed entry of its full-precision rows. No job waits for that: differences between methods on a model "
            "stand on their own.",
        ),
        tuple(models),
        section="column",
        gate={model.label: comparability(results, model) for model in models},
    )


def _rows(results: Results, model: Model) -> list[Row]:
    """One for each protocol, and each printed entry of its column where there are several; a hole where none ran."""
    record = results.record(model, REFERENCE, KIND)
    if record is None or not record.ok:
        hole = results.cell(model, REFERENCE, KIND, "")
        return [Row(model.label, "no protocol", dict.fromkeys(SHOWN, hole), config=REFERENCE)]
    beside: dict[str, list[Mapping[str, Any]]] = {}
    for comparison in record.details["comparisons"]:
        beside.setdefault(comparison["name"], []).append(comparison)
    holes = {name: results.cell(model, REFERENCE, KIND, f"{name}.perplexity") for name in record.details["holes"]}
    return [
        *(
            _row(results, model, protocol, comparison, len(beside.get(protocol["name"], ())) > 1)
            for protocol in record.details["protocols"]
            for comparison in beside.get(protocol["name"], [{}])
        ),
        *(
            Row(model.label, name, dict.fromkeys(SHOWN, hole), config=REFERENCE, section=HOLES)
            for name, hole in holes.items()
        ),
    ]


def _row(
    results: Results, model: Model, protocol: Mapping[str, Any], comparison: Mapping[str, Any], several: bool
) -> Row:
    is_perplexity = protocol["column"] == PERPLEXITY
    cell = results.cell(model, REFERENCE, KIND, protocol["name"], scale=1 if is_perplexity else 100)
    cells, texts, paper = {VALUE: cell}, {"own": str(protocol["own"]).lower()}, {}
    if comparison:
        cells |= {key: Cell(comparison[name], record=cell.record) for key, name in COMPARED.items()}
        texts["reproduces"] = str(comparison["reproduces"]).lower()
        paper[VALUE] = float(comparison["printed"])
    else:
        cells["reproduces"] = NOT_PRINTED
    label = f"{protocol['label']} ({comparison['tables']})" if several else protocol["label"]
    return Row(model.label, label, cells, texts, paper, REFERENCE, section=SECTIONS[is_perplexity])
