"""Quality against the bits that are really stored, and which methods no other beats in both."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mobie.figures.fig10 import PLUG_INS
from mobie.figures.figure import FigureData, facts, hole, point
from mobie.figures.places import Box, free_place
from mobie.figures.style import INTERVAL, SMALL
from mobie.results import Cell, Model, Results, average
from mobie.tables import table4, table5
from mobie.tables.table2 import TASK_METRICS, task_cells, text_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Better = Literal["higher", "lower"]
ACCURACY, PERPLEXITY = "accuracy", "perplexity"
PANELS: dict[str, tuple[str, Better]] = {
    ACCURACY: ("mean accuracy of seven tasks, %", "higher"),
    PERPLEXITY: ("perplexity", "lower"),
}
BACKBONES = {"fig10": "billm", "fig11": "arb-llm"}
REFERENCE = "fp16"
NUMBER_SIZE = SMALL
BEYOND = 2.0  # a perplexity, or bits, of more than so many medians stand at the edge with their value written


def collect(results: Results) -> FigureData:
    """Every method config that the suite's tables and plug-in figures ask for, on the models they ask it for."""
    wanted = _wanted(results)
    models = [model for model, _ in wanted.values()]
    labels = _labels(results, [name for _, configs in wanted.values() for name in configs])
    rows = [row for model, configs in wanted.values() for row in _model_rows(results, model, configs, labels)]
    return FigureData(
        "pareto",
        results.suite_name,
        "Quality against stored bits",
        f"Mean accuracy over the seven tasks of Table 2 and perplexity on `{results.suite.wikitext2_text}` against the "
        "bits stored per quantized weight: every byte of codes, scales, means, maps and indices. The step line joins "
        "the methods that no other beats in both; it does not weigh the intervals. A faint line leads to the bits that "
        "the method's own paper counts (small stroke). Dashed and shaded: full precision. Numbers name the methods; a "
        f"hollow marker is not above chance. Values beyond {BEYOND:g} medians stand at the edge, written out. "
        f"{INTERVAL}",
        tuple(rows),
        facts(results, models),
    )


def _wanted(results: Results) -> dict[str, tuple[Model, dict[str, bool]]]:
    """Models by name with their method configs; True for one whose tasks are scored too."""
    wanted: dict[str, tuple[Model, dict[str, bool]]] = {}

    def want(target: str, methods: Iterable[str], tasks: bool) -> None:
        for model in results.models(target):
            if model.absent is None:
                configs = wanted.setdefault(model.name, (model, {}))[1]
                configs |= {name: configs.get(name, False) or tasks for name in methods}

    want("table2", results.suite.methods, True)
    want("table4", table4.ROWS, True)
    want("table5", table5.ROWS.values(), True)
    for target, backbone in BACKBONES.items():
        want(target, [backbone + end for end in PLUG_INS], False)
    return wanted


def _labels(results: Results, methods: Iterable[str]) -> dict[str, str]:
    """A name for every config; where two share one, the config's own name tells them apart."""
    labels = {name: results.method(name).label for name in methods}
    shared = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {name: f"{label} ({name})" if label in shared else label for name, label in labels.items()}


def _model_rows(
    results: Results, model: Model, configs: dict[str, bool], labels: dict[str, str]
) -> list[dict[str, Any]]:
    """Both panels of a model, numbered in the order of the tables, with the front marked."""
    rows = []
    for number, (name, tasks) in enumerate(configs.items(), 1):
        values = {PERPLEXITY: text_perplexity(results, model, name)}
        if tasks:
            accuracies = task_cells(results, model, name, tuple(TASK_METRICS))
            values = {ACCURACY: average(list(accuracies.values())), **values}
        keys = {"model": model.label, "series": labels[name], "config": name, "number": number}
        stored, printed = (results.cell(model, name, "quantize", f"bits_{kind}") for kind in ("stored", "paper"))
        rows += [_row(cell, stored, printed, keys | {"panel": panel}) for panel, cell in values.items()]
    for panel, (_, better) in PANELS.items():
        found = [row for row in rows if row["panel"] == panel and row["y"] is not None]
        on_front = pareto_front([(row["x"], row["y"]) for row in found], better)
        for index, row in enumerate(found):
            row["front"] = index in on_front
    return rows


def _row(value: Cell, stored: Cell, printed: Cell, keys: dict[str, Any]) -> dict[str, Any]:
    if stored.value is None:  # without its bits a value has no place
        return hole(stored.status, stored.reason or "", **keys) | {"record": stored.record}
    at_chance = value.at_chance if value.value is not None else None
    return point(value, x=stored.value, bits_paper=printed.value, at_chance=at_chance, **keys)


def pareto_front(points: Sequence[tuple[float, float]], better: Better) -> list[int]:
    """Indices of the `(bits, value)` that no other point beats: fewer bits and a value as good, or as few and better.

    In the order of their bits; equal points are all on the front.
    """
    sign = 1 if better == "higher" else -1

    def beaten(bits: float, value: float) -> bool:
        return any(
            (other <= bits and sign * found >= sign * value) and (other, found) != (bits, value)
            for other, found in points
        )

    return sorted((i for i, known in enumerate(points) if not beaten(*known)), key=lambda i: points[i][0])


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(data: FigureData) -> Figure:
    """Per model: accuracy above, perplexity below; beside them, what the numbers stand for."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    figure = style.new_figure(style.FULL, 5.4 * len(models))
    grid = figure.add_gridspec(2 * len(models), 2, width_ratios=(4.6, 2.2))
    drawn = []
    for place, model in enumerate(models):
        rows = data.select(model=model)
        for line, (panel, (label, better)) in enumerate(PANELS.items(), 2 * place):
            axes = figure.add_subplot(grid[line, 0])
            axes.set_title(f"{model}: {panel}")
            axes.set_ylabel(label)
            found = [row for row in rows if row["panel"] == panel]
            if _draw_panel(axes, found, better):
                drawn.append((axes, [r for r in found if r["y"] is not None and r["config"] != REFERENCE]))
        axes.set_xlabel("bits stored per quantized weight")
        _draw_key(figure.add_subplot(grid[2 * place : 2 * place + 2, 1]), rows)
    figure.draw_without_rendering()  # the layout is needed to see which numbers would overlap
    for axes, found in drawn:
        _place_numbers(axes, found)
    return figure


def _draw_key(axes: Axes, rows: Sequence[Any]) -> None:
    """What the numbers stand for, with each method's marker; one without any value with its reason."""
    import textwrap

    from mobie.figures import style

    axes.axis("off")
    numbers = {row["number"]: row for row in sorted(rows, key=lambda row: row["y"] is None, reverse=True)}
    step = 1 / max(30, len(numbers))
    for line, (number, row) in enumerate(sorted(numbers.items())):
        known, how, y = row["y"] is not None, style.method_style(row["config"]), 1 - (line + 0.5) * step
        name = row["series"] if known else f"{row['series']}: {style.reason(row)}"
        place = {"transform": axes.transAxes, "clip_on": False}
        axes.plot(0.02, y, how.marker, color=how.color, markersize=4, alpha=1 if known else 0.25, **place)
        colour = style.BLACK if known else style.GREY
        texts = ((0.13, str(number), "right"), (0.16, textwrap.shorten(name, 32, placeholder=" …"), "left"))
        for x, text, align in texts:
            axes.text(x, y, text, ha=align, va="center", size=style.SMALL, color=colour, in_layout=False, **place)


def _draw_panel(axes: Axes, rows: Sequence[Any], better: Better) -> bool:
    """Points, intervals, the bits of the papers and the front; False where there is nothing but holes."""
    from mobie.figures import style

    known = [row for row in rows if row["y"] is not None]
    if not known:
        style.hole(axes, style.reason(rows[0]) if rows else "nothing is scored")
        return False
    points = [row for row in known if row["config"] != REFERENCE]
    edge = _Edge.of(points or known, better)
    _scale_bits(axes, points or known, edge)
    _draw_front(axes, known, edge)
    for row in known:
        if row not in points:
            _draw_reference(axes, row)
            continue
        how, (x, y) = style.method_style(row["config"]), edge.place(row)
        if row["bits_paper"] is not None:
            faint = {"color": how.color, "alpha": 0.35, "zorder": 1.1}
            axes.plot([row["bits_paper"], x], [y, y], linewidth=0.7, **faint)
            axes.plot(row["bits_paper"], y, "|", markersize=5, **faint)
        if y == row["y"]:
            style.interval(axes, x, y, row["stderr"], color=how.color)
        fill = "white" if row["at_chance"] else how.color
        axes.plot(x, y, how.marker, color=how.color, markerfacecolor=fill, markersize=4, zorder=3)
    axes.margins(y=0.1)
    return True


@dataclass(frozen=True)
class _Edge:
    """Where a panel ends: a destroyed model, or a method that stores far more than others, would flatten the rest."""

    x: float
    y: float

    @classmethod
    def of(cls, rows: Sequence[Any], better: Better) -> _Edge:
        """The largest values, or those of `BEYOND` medians where some are larger; accuracies all have a place."""
        bits, values = ([row[key] for row in rows] for key in ("x", "y"))
        top = max(values) if better == "higher" else min(max(values), BEYOND * statistics.median(values))
        return cls(min(max(bits), BEYOND * statistics.median(bits)), top)

    def place(self, row: Any) -> tuple[float, float]:
        """Where a row's point is drawn."""
        return min(row["x"], self.x), min(row["y"], self.y)

    def beyond(self, row: Any) -> str:
        """The values that are not where the point is, behind its number."""
        parts = [f"→ {row['x']:.0f} bits"] if row["x"] > self.x else []
        parts += [f"↑ {row['y']:.0f}"] if row["y"] > self.y else []
        return f" ({', '.join(parts)})" if parts else ""


def _draw_reference(axes: Axes, row: Any) -> None:
    """Full precision as a line with its interval: its bits would squeeze all others into a corner."""
    from mobie.figures import style

    axes.axhline(row["y"], color=style.BLACK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.2)
    if row["stderr"] is not None:
        reach = style.STDERRS * row["stderr"]
        axes.axhspan(row["y"] - reach, row["y"] + reach, color=style.PALE, alpha=0.6, zorder=0.5)
    text = f"{row['number']} {row['series']}, {row['x']:.3g} bits"
    where = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "size": NUMBER_SIZE}
    axes.annotate(text, (0.01, row["y"]), (0, 1.5), va="bottom", **where)


def _scale_bits(axes: Axes, rows: Sequence[Any], edge: _Edge) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import NullLocator

    bits = [value for row in rows for value in (edge.place(row)[0], row["bits_paper"]) if value is not None]
    axes.set_xscale("log", base=2)
    low, high = min(bits) / 1.08, max(bits) * 1.08
    axes.set_xlim(low, high)
    ticks = [tick for tick in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 16) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_front(axes: Axes, rows: Sequence[Any], edge: _Edge) -> None:
    """Steps from each method of the front to the next; the last goes on to the edge."""
    from mobie.figures import style

    front = sorted((row for row in rows if row["front"]), key=lambda row: row["x"])
    steps = [(row["x"], row["y"]) if row["config"] == REFERENCE else edge.place(row) for row in front]
    steps.append((axes.get_xlim()[1], steps[-1][1]))
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=style.GREY, linewidth=1.0, zorder=1.3)


def _place_numbers(axes: Axes, rows: Sequence[Any]) -> None:
    """Write each method's number where it hides the least: eight directions, then farther out with a thin line."""
    from mobie.figures import style

    pixel = axes.figure.dpi / 72
    if not rows:
        return
    edge = _Edge.of(rows, PANELS[rows[0]["panel"]][1])
    spots = [tuple(axes.transData.transform(edge.place(row))) for row in rows]
    taken = [Box(x, y, 5 * pixel, 5 * pixel) for x, y in spots]
    taken += [Box(x, y, 2 * pixel, _bar_height(axes, row)) for row, (x, y) in zip(rows, spots, strict=True)]
    frame = axes.get_window_extent()
    for row, spot in zip(rows, spots, strict=True):
        text = f"{row['number']}{edge.beyond(row)}"
        size = (0.62 * NUMBER_SIZE * len(text) * pixel, NUMBER_SIZE * pixel)
        best = free_place(spot, size, taken, (frame.x0, frame.y0, frame.x1, frame.y1), pixel)
        taken.append(best)
        offset = ((best.x - spot[0]) / pixel, (best.y - spot[1]) / pixel)
        far = max(abs(part) for part in offset) > 12
        how = {"size": NUMBER_SIZE, "ha": "center", "va": "center", "zorder": 4, "textcoords": "offset points"}
        line = {"arrowstyle": "-", "color": style.GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2} if far else None
        how["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.7}
        axes.annotate(text, edge.place(row), offset, arrowprops=line, **how)


def _bar_height(axes: Axes, row: Any) -> float:
    """Height in pixels of a point's interval."""
    from mobie.figures import style

    if row["stderr"] is None:
        return 0.0
    (_, low), (_, high) = axes.transData.transform([(1, 0), (1, 2 * style.STDERRS * row["stderr"])])
    return high - low
