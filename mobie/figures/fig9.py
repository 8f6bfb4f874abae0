"""Figure 9: average perplexity by λ of NGES, calibrated on WikiText-2 or what stands in for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, point
from mobie.paired import log_ratio
from mobie.paper.printed import printed_rows
from mobie.results import Model, Results
from mobie.tables.table10 import PAPERS_CHOICE, PAPERS_MODEL, average_perplexity, sweep_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = "wikitext2"  # the paper's name of the calibration text
PAPER = "paper"
COLUMNS = 2  # panels beside each other


def collect(results: Results) -> FigureData:
    """Average perplexities of the sweep, with errors of their differences to the paper's λ; the paper's Table 10."""
    models = results.models("fig9")
    texts = results.protocol.texts
    return FigureData(
        "fig9",
        results.suite_name,
        "average perplexity by the regularization λ",
        f"Perplexity averaged over {', '.join(f'`{text}`' for text in texts)}, MoBiE calibrated on "
        f"`{results.suite.sweep.texts[TEXT]}`. Bars: two standard errors, to either side, of the difference to "
        f"λ = {PAPERS_CHOICE:g} (filled): of the mean difference in log perplexity over the same windows, carried to "
        "perplexity. A bar that reaches the dashed line says that this λ cannot be told from the paper's choice. "
        f"Hollow diamonds: the paper's Table 10 for {PAPERS_MODEL} calibrated on WikiText-2; it prints no error. "
        f"`log_ratio` in the CSV: mean log perplexity less that of λ = {PAPERS_CHOICE:g}.",
        (*(row for model in models for row in _model_rows(results, model)), *_paper_rows()),
        facts(results, models),
    )


def _model_rows(results: Results, model: Model) -> list[dict[str, Any]]:
    reference = sweep_method(results, PAPERS_CHOICE, TEXT)
    rows = []
    for value in results.suite.sweep.regularization:
        method = sweep_method(results, value, TEXT)
        row = point(
            average_perplexity(results, model, method),
            panel=model.label,
            model=model.label,
            series="MoBiE",
            config=method,
            x=value,
        )
        ratio = log_ratio(results, model, method, reference, results.protocol.texts)
        known = row["y"] is not None and ratio.value is not None
        error = row["y"] * ratio.stderr if known and method != reference else None
        rows.append(row | {"stderr": error, "log_ratio": ratio.value, "log_ratio_stderr": ratio.stderr})
    return rows


def _paper_rows() -> list[dict[str, Any]]:
    """The paper's averages for its calibration on WikiText-2."""
    panel = f"{PAPERS_MODEL}, the paper's Table 10"
    return [
        {"panel": panel, "model": PAPERS_MODEL, "series": PAPER, "x": float(row["lambda"])}
        | {"y": float(row["avg_ppl"]), "paper": float(row["avg_ppl"])}
        | {"status": "ok", "reason": None, "record": ""}
        for row in printed_rows("table10")
        if row["calibration"] == TEXT
    ]


def draw(data: FigureData) -> Figure:
    """One panel per model, and one with the paper's values."""
    from mobie.figures import style

    panels = list(dict.fromkeys(row["panel"] for row in data.rows))
    lines = -(-len(panels) // COLUMNS)
    figure = style.new_figure(style.FULL, 2.2 * lines)
    grid = figure.subplots(lines, COLUMNS, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, data.select(panel=panel))
        axes.set_title(panel)
    for axes in list(grid)[len(panels) :]:
        axes.axis("off")
    return figure


def _draw_panel(axes: Axes, rows: list[Any]) -> None:
    from mobie.figures import style

    known = [row for row in rows if row["y"] is not None]
    if not known:
        style.hole(axes, style.reason(rows[0]))
        return
    x = [row["x"] for row in rows]
    axes.set_xticks(x)
    step = min(b - a for a, b in zip(x, x[1:], strict=False)) if len(x) > 1 else 1.0
    axes.set_xlim(min(x) - step / 2, max(x) + step / 2)
    axes.set_xlabel("λ")
    axes.set_ylabel("average perplexity")
    if rows[0]["series"] == PAPER:
        axes.plot(x, [row["y"] for row in rows], color=style.GREY, linewidth=0.8)
        style.paper_mark(axes, x, [row["y"] for row in rows])
        return
    how = style.method_style("mobie")
    style.line(axes, rows, how, label="MoBiE", markerfacecolor="white")
    for row in known:
        if row["x"] == PAPERS_CHOICE:
            axes.plot(row["x"], row["y"], marker=how.marker, color=how.color, zorder=4)
            axes.axhline(row["y"], color=style.GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.2)
    for row in rows:
        if row["y"] is None:
            style.hole(axes, style.reason(row), x=row["x"], width=0.8 * step)
