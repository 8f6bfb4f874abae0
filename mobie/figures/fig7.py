"""Figure 7: routing similarity layer by layer on a second model; beside it the share of experts that shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobie.figures.fig6 import LABELS, draw_layers, layer_rows, reading
from mobie.figures.figure import FigureData, facts
from mobie.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHIFT = (
    "Expert shift of a layer: the share of a token's top-k experts that the full-precision model does not use for it; "
    "the paper does not show it by layer."
)


def collect(results: Results) -> FigureData:
    """Routing similarity and expert shift by layer."""
    models = results.models("fig7")
    rows = [row for model in models for name in LABELS for row in layer_rows(results, model, name)]
    same = [model.name for model in models] == [model.name for model in results.models("fig6")]
    repeated = " The suite has one model for Figures 6 and 7: the similarities are those of Figure 6." if same else ""
    return FigureData(
        "fig7",
        results.suite_name,
        "routing similarity and expert shift by layer",
        f"{reading(results)} {SHIFT}{repeated}",
        tuple(rows),
        (*facts(results, models), *(["the model of Figure 6"] if same else [])),
    )


def draw(data: FigureData) -> Figure:
    """One row of panels per model: similarity left, shift right."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    figure = style.new_figure(style.FULL, 2.3 * len(models))
    for line, model in zip(figure.subplots(len(models), 2, squeeze=False), models, strict=True):
        for axes, label in zip(line, LABELS.values(), strict=True):
            draw_layers(axes, data.select(model=model, panel=label), legend=axes is line[-1])
            axes.set_ylabel(label)
            axes.set_title(model)
    return figure
