"""Table 6: storage of the experts before and after the joint decomposition, its formulas evaluated.

Beside equations 43 and 44 stands what the stored MoBiE checkpoint of the embedded model takes.
"""

from __future__ import annotations

from mobie.paper.formulas import Bits, ExpertShape, active_average_bits, static_average_bits, table6
from mobie.results import Cell, Model, Results
from mobie.tables.architectures import Architecture, architectures, embedded_architecture
from mobie.tables.table import Column, Row, Table, model_notes

METHOD = "mobie"
BITS = Bits()
COLUMNS = (
    Column("before", "Before", None),
    Column("after", "After", None),
    Column("ratio", "After / before", 4),
)
#: what the record counts, in its own words → what it is called here
COUNTINGS = {
    "paper": "Stored checkpoint, by the paper's formula (eq. 44)",
    "codes": "Stored checkpoint, codes only",
    "stored": "Stored checkpoint, every stored byte",
}
EXPERTS = "experts"  # component of the record
STORED, ACTIVE = "Average bits, stored (eq. 43)", "Average bits, read for one token (eq. 44)"


def build(results: Results) -> Table:
    """Evaluate the formulas; of records, only those of the embedded models' MoBiE checkpoints are read."""
    models = results.models("table6")
    embedded = [(model, shape) for model in models if (shape := embedded_architecture(model)) is not None]
    rows = [row for shape in architectures() for row in _formula_rows(shape)]
    for model, shape in embedded:
        rows += [*_formula_rows(shape, own=True), *_stored_rows(results, model, shape)]
    return Table(
        "table6",
        results.suite_name,
        "storage before and after the joint decomposition",
        "quantity",
        COLUMNS,
        tuple(rows),
        model_notes(results, [model for model, _ in embedded]) if embedded else (),
        (
            f"One layer's routed experts with {BITS.full:g} bits before, {BITS.shared:g} for the shared basis and "
            f"{BITS.expert:g} for an expert's own part after; the rank is the number of outputs O.",
            "Formulas: the paper's Table 6; average bits: its equations 43 (stored) and 44 (read for one token).",
        ),
        tuple(models),
        section="projection",
    )


def shapes(model: Architecture) -> dict[str, ExpertShape]:
    """Shapes of the projections, gate and up being alike."""

    def shape(outputs: int, inputs: int) -> ExpertShape:
        return ExpertShape(model.routed_experts, outputs, inputs, model.top_k)

    return {"gate, up": shape(model.intermediate, model.hidden), "down": shape(model.hidden, model.intermediate)}


def _formula_rows(model: Architecture, *, own: bool = False) -> list[Row]:
    rows = []
    for name, shape in shapes(model).items():
        section = f"{name}: {shape.experts} experts, {shape.active} active, O = {shape.outputs}, I = {shape.inputs}"
        found = [(row.quantity, row.baseline, row.cejd) for row in table6(shape, BITS)]
        found.append((STORED, BITS.full, static_average_bits(shape, BITS)))
        found.append((ACTIVE, BITS.full, active_average_bits(shape, BITS)))
        for quantity, before, after in found:
            values = {"after": after} if before is None else {"before": before, "after": after, "ratio": after / before}
            cells = {column: Cell(value) for column, value in values.items()}
            rows.append(Row(model.model, quantity, cells, own=own, section=section))
    return rows


def _stored_rows(results: Results, model: Model, shape: Architecture) -> list[Row]:
    """Average bits of the three projections, which have equally many weights, and what the checkpoint takes."""
    section = "gate, up and down: formulas and the stored checkpoint"
    projections = shapes(shape)
    cells = {}
    for label, bits in ((STORED, static_average_bits), (ACTIVE, active_average_bits)):
        gate_up, down = (bits(projection, BITS) for projection in projections.values())
        cells[label] = Cell((2 * gate_up + down) / 3)
    formulas = [Row(model.label, label, {"after": cell}, own=True, section=section) for label, cell in cells.items()]
    stored = [
        Row(
            model.label,
            label,
            {"after": stored_bits(results, model, counting)},
            config=METHOD,
            own=True,
            section=section,
        )
        for counting, label in COUNTINGS.items()
    ]
    return [*formulas, *stored]


def stored_bits(results: Results, model: Model, counting: str) -> Cell:
    """Bits per weight of the experts of the MoBiE checkpoint; `counting` is `paper`, `codes` or `stored`."""
    whole = results.cell(model, METHOD, "quantize", f"bits_{counting}")
    if whole.value is None:
        return whole
    parts = results.details(model, METHOD, "quantize").get("bits_by_component", {})
    if EXPERTS not in parts:
        reason = f"the record has no bits of the component {EXPERTS!r}"
        return Cell(None, status="missing", reason=reason, record=whole.record)
    return Cell(parts[EXPERTS][counting], n=parts[EXPERTS]["weights"], record=whole.record)
