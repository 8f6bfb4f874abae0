"""Excess loss against the bits that are really stored: our method at every budget, and every other method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobie.config import Scope
from mobie.excess import comparison, excess, half_width, name_of, rows_of, stored_bits
from mobie.figures.figure import FigureData, facts, hole, point
from mobie.figures.places import Box, free_place
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 4.0  # size of a marker


def collect(results: Results) -> FigureData:
    """Mean excess over texts and seeds of every row of every scope."""
    models = results.models("dial")
    return FigureData(
        "dial",
        results.suite_name,
        "Excess loss by stored bits",
        f"Mean excess loss over full precision on {', '.join(f'`{text}`' for text in results.protocol.texts)} against "
        "the bits stored per weight, every byte counted; of experts only, per weight of an expert. The line is our "
        "method at its budgets. Bars: 95 % t-intervals over calibration seeds; a hollow marker is a row with one seed. "
        "The upright axis is logarithmic where every row loses something.",
        tuple(
            row
            for model in models
            for name, scope in comparison(results).scopes.items()
            for row in _scope_rows(results, model, name, scope)
        ),
        facts(results, models),
    )


def _scope_rows(results: Results, model: Model, name: str, scope: Scope) -> list[dict[str, Any]]:
    """Points of a scope; without its bits a value has no place."""
    found = []
    for method in rows_of(results, scope):
        value = excess(results, model, method, results.protocol.texts)
        stored = stored_bits(results, model, method, scope.component)
        keys: dict[str, Any] = {"panel": scope.label, "model": model.label, "scope": name, "config": method}
        keys |= {"series": name_of(results, method), "dial": method in scope.dial}
        if stored.value is None:
            found.append(hole(stored.status, stored.reason or "", **keys) | {"record": stored.record})
        else:
            found.append(point(value, x=stored.value, reach=half_width(value), **keys))
    return found


def draw(data: FigureData) -> Figure:
    """A line of panels for each model, one for each scope."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    panels = list(dict.fromkeys(row["panel"] for row in data.rows))
    figure = style.new_figure(style.FULL, 3.1 * len(models))
    grid = figure.subplots(len(models), len(panels), squeeze=False, sharex="col")
    drawn = []
    for model, line in zip(models, grid, strict=True):
        for panel, axes in zip(panels, line, strict=True):
            axes.set_title(f"{model}: {panel}")
            rows = data.select(model=model, panel=panel)
            if _draw_panel(axes, rows):
                drawn.append((axes, [row for row in rows if row["y"] is not None]))
        line[0].set_ylabel("excess loss, nats per token")
    for axes in grid[-1]:
        axes.set_xlabel("bits stored per weight")
    figure.draw_without_rendering()  # the layout is needed to see which names would overlap
    for axes, rows in drawn:
        _place_names(axes, rows)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Any]) -> bool:
    """Points, intervals and the line of the dial; False where there is nothing but holes."""
    from mobie.figures import style

    known = [row for row in rows if row["y"] is not None]
    if not known:
        style.hole(axes, style.reason(rows[0]) if rows else "no row")
        return False
    ours = [row for row in rows if row["dial"]]
    if ours:  # holes interrupt the line
        line = [(row["x"], row["y"]) if row["y"] is not None else (math.nan, math.nan) for row in ours]
        how = style.method_style(ours[0]["config"])
        axes.plot(*zip(*line, strict=True), color=how.color, linewidth=1.4, zorder=2)
    for row in known:
        how = style.method_style(row["config"])
        if row["reach"] is not None:
            bars = {"ecolor": how.color, "elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8}
            axes.errorbar(row["x"], row["y"], row["reach"], fmt="none", **bars)
        fill = "white" if row["reach"] is None else how.color
        axes.plot(
            row["x"], row["y"], how.marker, color=how.color, markerfacecolor=fill, markersize=POINTS + 1, zorder=3
        )
    _scale(axes, known)
    missing = [row["series"] for row in rows if row["y"] is None]
    if missing:
        place = {"transform": axes.transAxes, "ha": "right", "va": "top", "size": style.SMALL, "color": style.GREY}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(0.99, 0.99, style.fit(f"not there: {'; '.join(missing)}", 1.6, 0.8), bbox=box, zorder=1.5, **place)
    return True


def _scale(axes: Axes, rows: Sequence[Any]) -> None:
    """A logarithmic axis with plain numbers; one from zero where a row loses nothing, so that all have a place."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values, tops = [row["y"] for row in rows], [row["y"] + (row["reach"] or 0) for row in rows]
    axes.margins(x=0.12)
    if min(values) <= 0:
        axes.set_ylim(1.12 * min(0.0, *values), 1.12 * max(tops))
        return
    axes.set_yscale("log")  # an interval that reaches zero ends at the edge
    axes.set_ylim(min(values) / 1.6, max(tops) * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _place_names(axes: Axes, rows: Sequence[Any]) -> None:
    """Write each method's name where it hides the least; of the dial, whose rows are one line, at its first row."""
    from mobie.figures import style

    pixel = axes.figure.dpi / 72
    spots = [tuple(axes.transData.transform((row["x"], row["y"]))) for row in rows]
    taken = [Box(x, y, POINTS * pixel, POINTS * pixel) for x, y in spots]
    for row, (x, _) in zip(rows, spots, strict=True):
        if row["reach"] is not None:
            bottom = max(row["y"] - row["reach"], axes.get_ylim()[0])
            (_, low), (_, high) = axes.transData.transform([(1, bottom), (1, row["y"] + row["reach"])])
            taken.append(Box(x, (low + high) / 2, 2 * pixel, high - low))
    taken += _along([spot for row, spot in zip(rows, spots, strict=True) if row["dial"]], pixel)
    frame = axes.get_window_extent()
    first = min((row["x"] for row in rows if row["dial"]), default=None)
    for row, spot in zip(rows, spots, strict=True):
        if row["dial"] and row["x"] != first:
            continue
        text = row["series"].split(",")[0]
        size = (0.66 * style.SMALL * len(text) * pixel, style.SMALL * pixel)
        best = free_place(spot, size, taken, (frame.x0, frame.y0, frame.x1, frame.y1), pixel)
        taken.append(best)
        offset = ((best.x - spot[0]) / pixel, (best.y - spot[1]) / pixel)
        how = {"size": style.SMALL, "ha": "center", "va": "center", "zorder": 4, "textcoords": "offset points"}
        how["color"] = style.method_style(row["config"]).color
        axes.annotate(text, (row["x"], row["y"]), offset, **how)


def _along(spots: Sequence[tuple[float, float]], pixel: float) -> list[Box]:
    """Small boxes along the line through some points, from left to right: names keep clear of it."""
    ordered, found = sorted(spots), []
    for (x0, y0), (x1, y1) in zip(ordered, ordered[1:], strict=False):
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / (4 * pixel)))
        found += [
            Box(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, 2 * pixel, 2 * pixel) for i in range(steps)
        ]
    return found
