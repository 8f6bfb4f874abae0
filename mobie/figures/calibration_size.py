"""Excess loss by the size of the calibration sample, down to a handful of sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobie.excess import comparison, excess, half_width, name_of
from mobie.figures.fig8 import size_method
from mobie.figures.figure import FigureData, facts, point
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def collect(results: Results) -> FigureData:
    """Mean excess over texts and seeds of each method that the suite calibrates on several sizes."""
    models = results.models("calibration_size")
    return FigureData(
        "calibration_size",
        results.suite_name,
        "Excess loss by the size of the calibration sample",
        "Mean excess loss over full precision on "
        f"{', '.join(f'`{text}`' for text in results.protocol.texts)} by the number of calibration sequences. Bars: "
        "95 % t-intervals over calibration seeds.",
        tuple(
            _row(results, model, method, size)
            for model in models
            for method in comparison(results).sizes
            for size in results.suite.sweep.sizes
        ),
        facts(results, models),
    )


def _row(results: Results, model: Model, method: str, size: int) -> dict[str, Any]:
    variant = size_method(model, size, method)
    value = excess(results, model, variant, results.protocol.texts)
    keys = {"panel": model.label, "model": model.label, "series": name_of(results, method), "config": variant}
    return point(value, x=size, reach=half_width(value), **keys)


def draw(data: FigureData) -> Figure:
    """One panel per model."""
    from mobie.figures import style

    return style.panel_per_model(data, _draw_model)


def _draw_model(axes: Axes, rows: Sequence[Any]) -> None:
    from mobie.figures import style

    missing = [row for row in rows if row["y"] is None]
    if len(missing) == len(rows):
        style.hole(axes, style.reason(missing[0]))
        return
    sizes = sorted({row["x"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    series = list(dict.fromkeys(row["series"] for row in rows))
    for place, name in enumerate(series):
        own = [row for row in rows if row["series"] == name]
        how = style.method_style(own[0]["config"])
        aside = 1.03 ** (place - (len(series) - 1) / 2)  # so that bars do not hide each other
        axes.errorbar(
            [row["x"] * aside for row in own],
            [math.nan if row["y"] is None else row["y"] for row in own],
            [row["reach"] or 0 for row in own],
            **{"color": how.color, "marker": how.marker, "capsize": 2, "label": name},
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("calibration sequences")
    axes.set_ylabel("excess loss, nats per token")
    style.legend(axes, [next(r for r in missing if r["series"] == name) for name in {r["series"]: 0 for r in missing}])
