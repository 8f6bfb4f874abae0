"""Figure 5: throughput and memory against bits; quantization time against accuracy."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from mobie.figures.fig1 import accuracy
from mobie.figures.figure import FigureData, facts, hole, point, record_hole
from mobie.paths import PACKAGE
from mobie.results import Cell, Model, Results, is_published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BY_BITS = ("fp16", "mobie-u16", "mobie", "mobie-u4")  # the paper varies the bits of the shared basis
BY_TIME = ("billm", "arb-llm", "mobie")
THROUGHPUT, MEMORY, TIME = "Tokens per second", "Memory, % of FP16", "Average accuracy (%)"
FILES, QUANTIZED, RUNNING = "weight files", "quantized weights", "weights in memory"
SPEED = "speed"
READ_BACK = "some blocks were read back from an interrupted run, so their time is unknown"
PANEL_INCHES, LINE_INCHES = 2.4, 0.16  # height of the panels, and of a line of the legends under them
NO_TIME_PRINTED = "the paper shows its times in Figure 5 only"


def collect(results: Results) -> FigureData:
    """Left and middle: the first model of the figure, as in the paper. Right: all of them."""
    from mobie.figures.style import INTERVAL

    models = results.models("fig5")
    rows = [
        *_throughput(results, models[0]),
        *_memory(results, models[0]),
        *_papers(),
        *(_time(results, model, method) for model in models for method in BY_TIME),
        hole("absent", NO_TIME_PRINTED, panel=TIME, series="paper"),
    ]
    return FigureData(
        "fig5",
        results.suite_name,
        "throughput, memory and quantization time",
        "Left: throughput; middle: memory relative to full precision, both against the bits per quantized weight by "
        "the paper's formula, for 16, 8 and 4 bits of MoBiE's shared basis; weight files hold everything, embeddings "
        "and head too. Hollow diamonds: what the paper's text prints for Qwen1.5-MoE (activated parameters; 22.05 and "
        "51.38 tokens/s, 9.64 and 1.88 GB), a model and a graphics card that are not those measured here. Right: CPU "
        f"seconds of quantizing, loss gradients included, against the average over seven zero-shot tasks. "
        f"{_how_timed(results, models[0])}{INTERVAL}",
        tuple(rows),
        (*facts(results, models), *_timed_facts(results, models[0])),
    )


def _throughput(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    for method in BY_BITS:
        bits = _bits(results, model, method)
        cell = results.cell(model, method, SPEED, "tokens_per_second")
        label = results.method(method).label + (" (published record)" if is_published(cell) else "")
        yield point(cell, x=bits.value, **_keys(results, model, method, THROUGHPUT, label))


def _bits(results: Results, model: Model, method: str) -> Cell:
    """Bits per quantized weight; where a model was only timed, those of the weights that were timed."""
    bits = results.cell(model, method, "quantize", "bits_paper")
    return results.cell(model, method, SPEED, "bits_paper") if bits.value is None else bits


def _timed(results: Results, model: Model) -> Mapping[str, Any]:
    """Details of the first record of a speed that is there; empty without one."""
    records = [results.record(model, method, SPEED) for method in BY_BITS]
    return next((record.details for record in records if record is not None and record.ok), {})


def _timed_facts(results: Results, model: Model) -> tuple[str, ...]:
    """For the footer: that a CPU was timed."""
    return ("throughput of a CPU",) if "no_verdict" in _timed(results, model) else ()


def _how_timed(results: Results, model: Model) -> str:
    """What was timed and on what; empty without a record."""
    details = _timed(results, model)
    if "device" not in details:
        return ""
    weights = "random weights of the true shape" if details["weights"] == "random" else "the stored weights"
    limit = "; CPU timings of a small model say nothing about the paper's speed" if "no_verdict" in details else ""
    return f"Throughput is of {weights}, timed on {details['device']}{limit}. "


def _memory(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    """Bytes in per cent of the full-precision model's: of files, of the quantized weights, and while running."""
    for series in (FILES, QUANTIZED, RUNNING):
        reference = _bytes(results, model, BY_BITS[0], series)
        for method in BY_BITS:
            bits = _bits(results, model, method)
            found = _bytes(results, model, method, series)
            keys = _keys(results, model, method, MEMORY, series) | {"x": bits.value, "bytes": found.value}
            if found.value is None or reference.value is None:
                yield point(found if found.value is None else reference, **keys)
            else:
                yield point(found, **keys | {"y": 100 * found.value / reference.value})


def _bytes(results: Results, model: Model, method: str, series: str) -> Cell:
    """Bytes of a model, a cell."""
    if series == RUNNING:
        return results.cell(model, method, SPEED, "weight_bytes")
    stored = results.cell(model, method, "quantize", "bits_stored")
    if stored.value is None or stored.n is None:
        return stored
    if series == QUANTIZED:
        return Cell(stored.value * stored.n / 8, n=stored.n, record=stored.record)
    size = results.details(model, method, "quantize")["file_bytes"]
    return Cell(float(size), n=None, record=stored.record)


def _keys(results: Results, model: Model, method: str, panel: str, series: str) -> dict[str, Any]:
    return {"panel": panel, "model": model.label, "series": series, "config": method}


def _time(results: Results, model: Model, method: str) -> dict[str, Any]:
    """Seconds on x, accuracy on y; a hole where either is missing."""
    keys = _keys(results, model, method, TIME, results.method(method).label)
    cell = accuracy(results, model, method)
    gap = record_hole(results, model, method, "quantize", "bits_paper", **keys)
    if gap is not None:
        return gap
    details = results.details(model, method, "quantize")
    blocks = [block["cpu_seconds"] for block in details["blocks"]]
    if None in blocks:
        return hole("missing", READ_BACK, **keys)
    return point(cell, x=sum(blocks) + (details["gradient_cpu_seconds"] or 0.0), **keys)


@cache
def printed_facts() -> dict[str, tuple[str, float]]:
    """Numbers that stand in the paper's text only: id → model, value."""
    with (PACKAGE / "paper" / "text.csv").open(newline="", encoding="utf-8") as file:
        return {row["id"]: (row["model"], float(row["value"])) for row in csv.DictReader(file)}


def _papers() -> Iterator[dict[str, Any]]:
    """The paper's two points of the left part."""
    text = printed_facts()
    for method, bits in (("fp16", 16.0), ("mobie", text["bits-mobie"][1])):
        for panel, fact, reference in ((THROUGHPUT, "throughput", None), (MEMORY, "memory", "memory-fp16")):
            model, value = text[f"{fact}-{method}"]
            shown = value if reference is None else 100 * value / text[reference][1]
            keys = {"panel": panel, "model": model, "series": "paper", "config": method, "x": bits}
            yield {**keys, "y": shown, "paper": value, "status": "ok", "reason": None, "record": ""}


def draw(data: FigureData) -> Figure:
    """Three panels beside one another, a legend under each."""
    from mobie.figures import style

    figure = style.new_figure(style.FULL, PANEL_INCHES)
    grid = figure.add_gridspec(2, len(DRAWN), width_ratios=[1, 1, 1.2])
    lines = 0
    for column, (name, draw_panel) in enumerate(DRAWN.items()):
        axes, below = (figure.add_subplot(grid[line, column]) for line in range(2))
        rows = data.select(panel=name)
        ours = [row for row in rows if row["series"] != "paper"]
        models = dict.fromkeys(row["model"] for row in ours)
        axes.set_title(next(iter(models)) if len(models) == 1 else "")
        axes.set_ylabel(name)
        holes = draw_panel(axes, ours)
        _paper_points(axes, [row for row in rows if row["series"] == "paper" and row["y"] is not None])
        if not any(row["y"] is not None for row in ours):
            style.hole(axes, "; ".join(dict.fromkeys(style.reason(row) for row in ours)), ticks=name != TIME)
            holes = []
        below.axis("off")
        lines = max(lines, style.legend(below, holes, of=axes, loc="upper center", borderaxespad=0))
    inches = max(1, lines) * LINE_INCHES
    grid.set_height_ratios([PANEL_INCHES, inches])
    figure.set_size_inches(style.FULL, PANEL_INCHES + inches)
    return figure


def _draw_throughput(axes: Axes, rows: list[Any]) -> list[Any]:
    from mobie.figures import style

    _bits_axis(axes, rows)
    values = [row for row in rows if row["y"] is not None and row["x"] is not None]
    for row in values:
        how = style.method_style(row["config"])
        axes.plot(row["x"], row["y"], marker=how.marker, color=how.color, linestyle="none", label=row["series"])
        style.interval(axes, row["x"], row["y"], row["stderr"], color=how.color)
    axes.set_ylim(0, 1.15 * max([value for _, value in _throughputs()] + [row["y"] for row in values]))
    return [row for row in rows if row not in values]


def _throughputs() -> list[tuple[str, float]]:
    return [printed_facts()[f"throughput-{method}"] for method in ("fp16", "mobie")]


def _draw_memory(axes: Axes, rows: list[Any]) -> list[Any]:
    from mobie.figures import style

    _bits_axis(axes, rows)
    axes.set_ylim(0, 112)
    marks = {FILES: ("o", style.BLUE), QUANTIZED: ("^", style.SKY), RUNNING: ("s", style.GREEN)}
    holes: dict[tuple[str, str], dict[str, Any]] = {}
    for series, (marker, color) in marks.items():
        own = [row for row in rows if row["series"] == series]
        values = sorted((row for row in own if row["y"] is not None and row["x"] is not None), key=lambda row: row["x"])
        if values:
            x, y = [row["x"] for row in values], [row["y"] for row in values]
            axes.plot(x, y, marker=marker, color=color, label=series, linewidth=0.8)
        for row in own:
            if row["y"] is None:  # a method without a record lacks files and weights for one reason: told once
                name = row["config"] if values or series != RUNNING else series
                holes[(name, style.reason(row))] = {**row, "series": name}
    return list(holes.values())


def _draw_time(axes: Axes, rows: list[Any]) -> list[Any]:
    from matplotlib.ticker import MaxNLocator

    from mobie.figures import style

    axes.set_xlabel("Quantization (CPU seconds)")
    values = [row for row in rows if row["y"] is not None]
    if not values:
        return []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for method in BY_TIME:
        how = style.method_style(method)
        own = [row for row in values if row["config"] == method]
        x, y = [row["x"] for row in own], [row["y"] for row in own]
        if own:
            axes.plot(x, y, marker=how.marker, color=how.color, linestyle="none", label=own[0]["series"])
        for row in own:
            style.interval(axes, row["x"], row["y"], row["stderr"], color=how.color)
            number = str(models.index(row["model"]) + 1) if len(models) > 1 else ""
            axes.annotate(number, (row["x"], row["y"]), (4, 2), textcoords="offset points", size=style.SMALL)
    axes.margins(x=0.15, y=0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if chance := next((row["chance"] for row in values if row["chance"] is not None), None):
        axes.axhline(chance, color=style.GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1.2, label="chance")
    for place, model in enumerate(models if len(models) > 1 else [], start=1):
        axes.plot([], [], linestyle="none", marker=f"${place}$", color=style.BLACK, markeredgewidth=0.2, label=model)
    return [row | {"series": f"{row['series']}, {row['model']}"} for row in rows if row["y"] is None]


DRAWN = {THROUGHPUT: _draw_throughput, MEMORY: _draw_memory, TIME: _draw_time}


def _bits_axis(axes: Axes, rows: list[Any]) -> None:
    """Bits on a logarithmic axis, numbered in powers of two."""
    from matplotlib.ticker import NullLocator

    known = [16.0, printed_facts()["bits-mobie"][1], *(row["x"] for row in rows if row["x"] is not None)]
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(known) / 1.4, max(known) * 1.4)
    axes.set_xlabel("Bits per weight")


def _paper_points(axes: Axes, rows: list[Any]) -> None:
    from mobie.figures import style

    if rows:
        x, y = [row["x"] for row in rows], [row["y"] for row in rows]
        style.paper_mark(axes, x, y, label=f"paper: {rows[0]['model']}")
