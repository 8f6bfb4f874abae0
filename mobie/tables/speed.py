"""Speed of MoBiE's packed weights against 16 bits, by runner, batch size and routing.

All rows of a model come from one record, so from one process on one machine. The models of published shape have random
weights; a suite that does not time them shows the committed records of a machine with a GPU, or how to make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mobie.jobs.speed import KIND, gpu_command
from mobie.records import Record
from mobie.results import Cell, Results, is_published
from mobie.speed.architectures import NAMES, load_shape
from mobie.speed.runners import DENSE, GROUPED, LABELS
from mobie.tables.table import Column, Row, Table, model_notes

METHOD = "mobie"
SHAPES_SUITE = "paper"  # whose records are published
SPEED = "tokens_per_second"
COLUMNS = (
    Column(SPEED, "Tokens/s", 1),
    Column("lower", "Lower quartile", 1),
    Column("upper", "Upper quartile", 1),
    Column("with_prefill", "Tokens/s with prefill", 1),
    Column("first_token", "First token, ms", 1),
    Column("against_dense", "× our 16-bit runner"),
    Column("against_grouped", "× library grouped_mm"),
    Column("roofline", "Roofline, %", 1),
    Column("step_megabytes", "MB per step", 1),
    Column("distinct", "Experts per layer", 1),
    Column("peak_gigabytes", "Peak memory, GB"),
    Column("weight_gigabytes", "Weights, GB", 3),
    Column("activated_gibibytes", "Activated, GiB", 3),
    Column("milliseconds", "Block, ms", 4),
    Column("block_against_dense", "× 16-bit block"),
)
#: column → key of a run, factor
SCALED = {
    "with_prefill": ("tokens_per_second_with_prefill", 1.0),
    "step_megabytes": ("bytes_per_step", 1e-6),
    "roofline": ("roofline_share", 100.0),
    "distinct": ("distinct_experts", 1.0),
    "peak_gigabytes": ("peak_memory_bytes", 1e-9),
    "weight_gigabytes": ("weight_bytes", 1e-9),
    "activated_gibibytes": ("activated_bytes", 2.0**-30),
}
BLOCK_LABELS = {name: LABELS[name].removeprefix("our runner, ") for name in LABELS}
LEGEND = (
    "Tokens/s: new tokens of all rows, decoding only, by the median step, and with the prefill of a whole generation. "
    "× …: both timed in the same process. Roofline: bytes that a step must read, as stored, over its time and over the "
    "copy bandwidth measured in the same process. Experts per layer: different experts that a step reads. Activated: "
    "by the definition that gives the paper's 9.64 GB (section 5.4): every row chooses experts of its own, embeddings "
    "and head take 16 bits. Peak memory: of tensors on a GPU, of the whole process, since it began, on a CPU.",
)


def build(results: Results) -> Table:
    """Read the record of `mobie` of every model of the suite, then the published ones of the other shapes."""
    own = results.models("speed")
    rows: list[Row] = []
    notes = [*model_notes(results, own)]
    for model in own:
        record = results.record(model, METHOD, KIND)
        where = results.cell(model, METHOD, KIND, SPEED)
        rows += _rows(model.label, record, where)
        notes += _notes(model.label, record, where)
    for name in NAMES:
        if name in {model.name for model in own}:
            continue
        label = load_shape(name).label
        record, where = _published(results, name)
        rows += _rows(label, record, where)
        notes += _notes(label, record, where)
    return Table(
        "speed",
        results.suite_name,
        "decoding with packed weights against 16 bits",
        "runner",
        COLUMNS,
        tuple(rows),
        tuple(notes),
        LEGEND,
        tuple(own),
        section="setting",
    )


def _published(results: Results, name: str) -> tuple[Record | None, Cell]:
    """The committed record of a shape, and a cell that says where it lies or how to make it."""
    path, record = results.published(SHAPES_SUITE, name, METHOD, KIND) or (None, None)
    if path is None or record is None:
        command = gpu_command(SHAPES_SUITE, name, METHOD)
        return None, Cell(None, status="absent", reason=f"needs a CUDA GPU; measure it on one with {command}")
    where = path.relative_to(results.layout.root).as_posix()
    return record, Cell(None, status=record.status, reason=record.reason, record=where)


def _rows(label: str, record: Record | None, where: Cell) -> Iterator[Row]:
    """All runs of a record, the paper's setting first; without a record, one hole for each runner."""
    if record is None or not record.details.get("runs"):
        hole = Cell(None, status=where.status, reason=where.reason, record=where.record)
        for name in LABELS:
            yield Row(label, LABELS[name], {SPEED: hole}, config=METHOD, section=_section({}))
        return
    runs = record.details["runs"]
    first = runs[0]
    at_first = [run for run in runs if _setting(run) == _setting(first)]
    for run in [*at_first, *sorted((r for r in runs if r not in at_first), key=_order)]:
        yield _row(label, run, runs, where.record)
    for block in record.details.get("block", ()):
        yield _block_row(label, block, where.record)


def _setting(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(run[key] for key in ("batch", "prefill", "decode", "router"))


def _order(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return (run["router"] != "natural", run["router"], run["batch"], list(LABELS).index(run["runner"]))


def _section(run: Mapping[str, Any]) -> str:
    if not run:
        return "not measured"
    return f"batch {run['batch']}, {run['prefill']} + {run['decode']} tokens, {run['router']} routing"


def _row(label: str, run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], record: str) -> Row:
    cells: dict[str, Cell] = {}
    row = Row(label, LABELS[run["runner"]], cells, config=METHOD, section=_section(run))
    if run["status"] != "ok":
        cells[SPEED] = Cell(None, status=run["status"], reason=run["reason"], record=record)
        return row
    speed, steps = run[SPEED], run["step_seconds"]["n"]
    cells |= {
        SPEED: Cell(speed["median"], run["tokens_per_second_stderr"], steps, record=record),
        "lower": Cell(speed["lower"], record=record),
        "upper": Cell(speed["upper"], record=record),
        "first_token": Cell(1000 * run["time_to_first_token"]["median"], record=record),
    }
    for column, (key, factor) in SCALED.items():
        if run.get(key) is not None:
            cells[column] = Cell(factor * run[key], record=record)
    for column, baseline in (("against_dense", DENSE), ("against_grouped", GROUPED)):
        other = next((r for r in runs if r["runner"] == baseline and _setting(r) == _setting(run)), None)
        if other is not None and other["status"] == "ok" and run["runner"] != baseline:
            cells[column] = Cell(speed["median"] / other[SPEED]["median"], record=record)
    return row


def _block_row(label: str, block: Mapping[str, Any], record: str) -> Row:
    cells = {"milliseconds": Cell(1e3 * block["seconds"]["median"], n=block["seconds"]["n"], record=record)}
    cells["step_megabytes"] = Cell(1e-6 * block["bytes"], record=record)
    if "times_dense" in block:
        cells["block_against_dense"] = Cell(block["times_dense"], record=record)
    section = f"MoE block alone, decode, batch {block['batch']}, balanced routing"
    return Row(label, BLOCK_LABELS[block["way"]], cells, config=METHOD, section=section)


def _notes(label: str, record: Record | None, where: Cell) -> Iterator[str]:
    """Where a model was timed and with what, and what int8 costs in perplexity."""
    if record is None or not record.details.get("runs"):
        return
    details = record.details
    published = "; a published record" if is_published(where) else ""
    weights = "random weights of the true shape" if details["weights"] == "random" else "its stored checkpoint"
    yield f"**{label}**: {weights}, timed on {details['device']}{published}."
    if "no_verdict" in details:
        yield f"**{label}**: CPU timings of a small model: they say nothing about the speed that the paper states."
    if "quality" in details:
        yield f"**{label}**: {_quality_text(details['quality'])}"


def _quality_text(quality: Mapping[str, Any]) -> str:
    names = {
        "int8-activations": "int8 activations",
        "int8-head": "an int8 head",
        "int8-activations-and-head": "both",
    }
    changes = {label: quality["difference"][name] for name, label in names.items()}
    parts = [f"{label} {100 * c['mean']:+.3f} ± {100 * c['stderr']:.3f} %" for label, c in changes.items()]
    start = quality["perplexity"]["16bit"]
    return (
        f"perplexity on `{quality['text']}` {start:.2f} with 16-bit activations ({quality['windows']} windows, "
        f"{quality['dtype']}); change by {', '.join(parts)} (log ratio, paired by window, ± one standard error)."
    )
