"""Figure 8: perplexity of MoBiE by the size and the seed of its calibration sample."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobie.config import method_spec
from mobie.figures.figure import FigureData, facts, hole, point
from mobie.results import Model, Results
from mobie.tables.table2 import text_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD = "mobie"
BAND = 1.0  # per cent around the mean in which the paper says that perplexity stays (B.4.5)
MEAN, GRAND = "mean of seeds", "mean of all"


def size_method(model: Model, size: int, method: str = METHOD) -> str:
    """A method calibrated on a number of sequences: the plain config where that is the model's own number."""
    own = model.config.calibration.sequences if model.config else None
    return method if size == own else method_spec(method, calibration__sequences=size)


def collect(results: Results) -> FigureData:
    """Perplexities of all sizes and seeds on the protocol's first text, their mean by size and over all."""
    models = results.models("fig8")
    text, sweep = results.protocol.texts[0], results.suite.sweep
    return FigureData(
        "fig8",
        results.suite_name,
        "perplexity by the size and the seed of the calibration sample",
        f"Perplexity of MoBiE on `{text}` by the number of calibration sequences, one line for each of "
        f"{len(sweep.seeds)} seeds; black: their mean, its bars one standard deviation over the seeds. Shaded: "
        f"±{BAND:g} % around the mean of all, the range that section B.4.5 of the paper states. Grey bar at the right: "
        "two standard errors over the windows of the text, to either side of that mean. All points share the windows, "
        "so their differences are surer than that bar. `deviation` in the CSV: per cent from the mean of all.",
        tuple(row for model in models for row in _model_rows(results, model, text)),
        facts(results, models),
    )


def _model_rows(results: Results, model: Model, text: str) -> list[dict[str, Any]]:
    """Points by seed and size, then the mean of each size, then the mean of all."""
    sweep = results.suite.sweep
    points = [
        point(
            text_perplexity(results, model, size_method(model, size), text, seed=seed),
            **{"panel": model.label, "model": model.label, "series": f"seed {seed}", "x": size, "seed": seed},
            config=size_method(model, size),
        )
        for seed in sweep.seeds
        for size in sweep.sizes
    ]
    means = [_mean([row for row in points if row["x"] == size], MEAN, x=size) for size in sweep.sizes]
    grand = _mean(points, GRAND, x=None)
    for row in [*points, *means]:
        known = row["y"] is not None and grand["y"] is not None
        row["deviation"] = 100 * (row["y"] / grand["y"] - 1) if known else None
    found = [abs(row["deviation"]) for row in points if row["deviation"] is not None]
    return [*points, *means, grand | {"deviation": max(found, default=None)}]


def _mean(rows: Sequence[dict[str, Any]], series: str, *, x: int | None) -> dict[str, Any]:
    """Mean of points with the standard deviation over them (`spread`); a hole unless all are there.

    Its `stderr` is the mean one over windows: the points share them, so it does not shrink with their number.
    """
    keys = {"panel": rows[0]["panel"], "model": rows[0]["model"], "series": series, "config": METHOD, "x": x}
    missing = next((row for row in rows if row["y"] is None), None)
    if missing is not None:
        return hole(missing["status"], missing["reason"], **keys)
    values, errors = [row["y"] for row in rows], [row["stderr"] for row in rows]
    return keys | {
        "y": math.fsum(values) / len(values),
        "stderr": None if None in errors else math.fsum(errors) / len(errors),
        "n": len(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "status": "ok",
        "reason": None,
        "record": "",
    }


def draw(data: FigureData) -> Figure:
    """One panel per model."""
    from mobie.figures import style

    return style.panel_per_model(data, _draw_model)


def _draw_model(axes: Axes, rows: Sequence[Any]) -> None:
    from mobie.figures import style

    points = [row for row in rows if row["series"] not in (MEAN, GRAND)]
    missing = [row for row in points if row["y"] is None]
    if len(missing) == len(points):
        style.hole(axes, style.reason(missing[0]))
        return
    means, (grand,) = ([row for row in rows if row["series"] == name] for name in (MEAN, GRAND))
    sizes = sorted({row["x"] for row in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.7)
    if grand["y"] is not None:
        _draw_reference(axes, grand, sizes[-1] * 1.45)
    seeds = list(dict.fromkeys(row["series"] for row in points))
    for number, (seed, colour) in enumerate(zip(seeds, style.PALETTE * len(seeds), strict=False)):
        how = style.Style(colour, "o^sDvPX"[number % 7])
        aside = 1.04 ** (number - (len(seeds) - 1) / 2)  # so that markers of seeds do not hide each other
        own = [dict(row) | {"x": row["x"] * aside, "stderr": None} for row in points if row["series"] == seed]
        style.line(axes, own, how, label=seed, linewidth=0.9)
    axes.errorbar(
        sizes,
        [math.nan if row["y"] is None else row["y"] for row in means],
        [row.get("spread") or 0 for row in means],
        **{"color": style.BLACK, "label": MEAN, "capsize": 2, "linewidth": 1.6, "marker": "_", "markersize": 7},
        zorder=4,
    )
    axes.set_xlabel("calibration sequences")
    axes.set_ylabel("perplexity")
    holes = [next(row for row in missing if row["series"] == seed) for seed in {row["series"]: 0 for row in missing}]
    style.legend(axes, holes)


def _draw_reference(axes: Axes, grand: Any, x: float) -> None:
    """The paper's range around the mean of all, and how sure that mean is."""
    from mobie.figures import style

    low, high = (grand["y"] * (1 + sign * BAND / 100) for sign in (-1, 1))
    axes.axhspan(low, high, color=style.PALE, zorder=0.5, label=f"±{BAND:g} % (paper)")
    axes.axhline(grand["y"], color=style.GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    if grand["stderr"] is not None:
        style.interval(axes, x, grand["y"], grand["stderr"], color=style.GREY)
        axes.plot([], [], color=style.GREY, marker="|", linestyle="none", markersize=9, label="windows, ±2 std. errors")
    axes.text(
        0.02,
        0.97,
        f"largest deviation from the mean: {grand['deviation']:.1f} %",
        transform=axes.transAxes,
        va="top",
        size=style.SMALL,
    )
    reach = max(grand["y"] * max(grand["deviation"], BAND) / 100, style.STDERRS * (grand["stderr"] or 0))
    axes.set_ylim(grand["y"] - 1.15 * reach, grand["y"] + 1.4 * reach)
