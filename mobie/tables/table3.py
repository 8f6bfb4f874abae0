"""Table 3: architectures, from public configs; the paper's printed values beside them."""

from __future__ import annotations

from mobie.paper.printed import printed, printed_rows
from mobie.results import Cell, Results
from mobie.tables.architectures import Architecture, architecture, embedded_architecture
from mobie.tables.table import Column, Row, Table, model_notes

GIB = 1024**3
BYTES = 2  # of a weight in FP16
MEMORY = "fp16_memory_gb"
COLUMNS = (
    Column(MEMORY, "FP16 memory, GiB"),
    Column("difference", "less the paper's"),
    Column("decimal_gb", "in 10⁹ bytes"),
    Column("routed_experts", "Routed experts", 0),
    Column("shared_experts", "Shared experts", 0),
    Column("top_k", "Top-k", 0),
)


def build(results: Results) -> Table:
    """No record is read."""
    models = results.models("table3")
    embedded = [found for model in models if (found := embedded_architecture(model)) is not None]
    papers = [architecture(row["model"]) for row in printed_rows("table3")]
    return Table(
        "table3",
        results.suite_name,
        "architectures of the evaluated models",
        "model",
        COLUMNS,
        (*(_row(found) for found in papers), *(_row(found, own=True) for found in embedded)),
        model_notes(results, [model for model in models if embedded_architecture(model)]) if embedded else (),
        (
            "Counted from the models' public `config.json` files (`mobie/paper/architectures.csv`), two bytes for each "
            "weight; 1 GiB is 1024³ bytes. The audit says which reading of the unit fits the printed values.",
        ),
        tuple(models),
        flat=True,
    )


def _row(shape: Architecture, *, own: bool = False) -> Row:
    paper = {} if own else printed("table3", shape.model)
    size = BYTES * shape.parameters
    values = {
        MEMORY: size / GIB,
        "decimal_gb": size / 1e9,
        "routed_experts": shape.routed_experts,
        "shared_experts": shape.shared_experts,
        "top_k": shape.top_k,
    }
    if MEMORY in paper:
        values["difference"] = size / GIB - paper[MEMORY]
    return Row(shape.model, shape.model, {key: Cell(value) for key, value in values.items()}, paper=paper, own=own)
