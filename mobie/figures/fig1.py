"""Figure 1: average zero-shot accuracy of every model in full precision and binarized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, hole, point
from mobie.paper.printed import printed, printed_rows
from mobie.results import Model, Results, average
from mobie.tables.table2 import AVERAGE, TASK_METRICS, task_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = {"fp16": "Baseline", "billm": "BiLLM", "arb-llm": "ARB-LLM", "mobie": "MoBiE"}  # config → the paper's name
PAPER_TABLES = ("table2", "table7")  # where the paper prints the averages
OURS, PAPERS = "measured", "the paper's printed values"
SIMILAR = "FP16 models of similar size"
NOT_NAMED = "the paper's text does not name the models that its Figure 1 compares with"
NOT_PRINTED = "not printed in a table"


def collect(results: Results) -> FigureData:
    """Mean accuracy over the seven zero-shot tasks, and the means that the paper prints in Tables 2 and 7."""
    from mobie.figures.style import INTERVAL

    models = results.models("fig1")
    rows = [_measured(results, model, method) for model in models for method in METHODS]
    rows.append(hole("absent", NOT_NAMED, panel=OURS, series=SIMILAR))
    if any(not model.in_paper for model in models):
        rows += _papers()
    return FigureData(
        "fig1",
        results.suite_name,
        "average zero-shot accuracy",
        f"Mean accuracy over {', '.join(TASK_METRICS)}, in per cent. {INTERVAL} Dashed: chance. Hollow diamonds: the "
        "averages that the paper prints in Tables 2 and 7 for its own models; it prints none of BiLLM and ARB-LLM for "
        "Qwen1.5-MoE and Mixtral.",
        tuple(rows),
        facts(results, models),
    )


def accuracy(results: Results, model: Model, method: str) -> Any:
    """Mean accuracy over the seven tasks in per cent, a cell."""
    return average(list(task_cells(results, model, method, tuple(TASK_METRICS)).values()))


def _measured(results: Results, model: Model, method: str) -> dict[str, Any]:
    """Our average, with the paper's where the model is the paper's and the average is printed."""
    cell = accuracy(results, model, method)
    entries = [printed(table, model.label, method=METHODS[method]) for table in PAPER_TABLES if model.in_paper]
    paper = next((found[AVERAGE] for found in entries if found), None)
    keys = {"panel": OURS, "model": model.label, "series": METHODS[method], "config": method}
    return point(cell, x=model.label, paper=paper, **keys)


def _papers() -> Iterator[dict[str, Any]]:
    """The paper's averages for its own models, in the tables' order."""
    for table in PAPER_TABLES:
        for model in dict.fromkeys(row["model"] for row in printed_rows(table)):
            for config, method in METHODS.items():
                keys = {"panel": PAPERS, "model": model, "series": method, "config": config, "x": model}
                value = printed(table, model, method=method).get(AVERAGE)
                if value is None:
                    yield hole("absent", NOT_PRINTED, **keys)
                else:
                    yield {**keys, "y": value, "paper": value, "status": "ok", "reason": None, "record": ""}


def draw(data: FigureData) -> Figure:
    """Groups of bars by model; beside them the paper's values where the models are not the paper's."""
    from mobie.figures import style

    panels = list(dict.fromkeys(row["panel"] for row in data.rows))
    groups = {panel: _by_model(data.select(panel=panel)) for panel in panels}
    figure = style.new_figure(style.FULL, 2.7)
    widths = [max(1.6, len(groups[panel])) for panel in panels]
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
    tops = [
        value + 2 * (row.get("stderr") or 0) for row in data.rows for value in (row["y"], row.get("paper")) if value
    ]
    for each, panel in zip(axes, panels, strict=True):
        each.set_ylim(0, max([50, *tops]) * 1.05)
        _draw_groups(each, groups[panel], bars=panel == OURS)
        each.set_title(panel if len(panels) > 1 else "")
    axes[0].set_ylabel("Average accuracy (%)")
    _legend(figure, data)
    return figure


def _by_model(rows: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        if "model" in row:
            found.setdefault(row["model"], []).append(row)
    return found


def _draw_groups(axes: Axes, groups: dict[str, list[Any]], *, bars: bool) -> None:
    from mobie.figures import style

    width = 0.84 / len(METHODS)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    chances = [row["chance"] for rows in groups.values() for row in rows if row.get("chance") is not None]
    if chances:
        axes.axhline(chances[0], color=style.GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=3)
    for group, rows in enumerate(groups.values()):
        for slot, row in enumerate(rows):
            x = group + (slot - (len(rows) - 1) / 2) * width
            if bars or row["y"] is None:
                style.bar(axes, x, row, style.method_style(row["config"]), width=0.92 * width)
            if row.get("paper") is not None:
                color = style.BLACK if bars else style.method_style(row["config"]).color
                style.paper_mark(axes, x + (0.3 * width if bars else 0), row["paper"], color=color)


def _legend(figure: Figure, data: FigureData) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from mobie.figures import style

    handles = []
    for config, name in METHODS.items():
        how = style.method_style(config)
        handles.append(Patch(facecolor=how.color, hatch=how.hatch, edgecolor="white", linewidth=0, label=name))
    if any(row.get("paper") is not None for row in data.rows):
        handles.append(style.paper_handle())
    if any(row.get("chance") is not None for row in data.rows):
        handles.append(Line2D([], [], color=style.GREY, linestyle=(0, (4, 3)), linewidth=0.8, label="chance"))
    (similar,) = data.select(series=SIMILAR)
    text = f"{SIMILAR}: {style.reason(similar)}"
    handles.append(style.hole_handle(text))
    figure.legend(handles=handles[:-1], loc="outside upper center", ncols=len(handles) - 1)
    figure.legend(handles=handles[-1:], loc="outside lower left")
