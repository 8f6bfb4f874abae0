"""Figure 2: how alike the experts of a layer are before and after the joint decomposition (linear CKA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, point, record_hole
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD, PROJECTION = "mobie", "gate"
STAGES = {"before": "W", "after": "V", "after_binarized": "binarized V"}
WIDE = 0.15  # share of the figure's width that a panel needs for both numbers on one line
MEAN, LINE = "mean over pairs of experts", "expert"
Panel = tuple[str, int, str]  # model, layer, stage


def collect(results: Results) -> FigureData:
    """CKA matrices of the gate projections of the first, middle and last MoE layer, and their means over pairs."""
    models = results.models("fig2")
    rows: list[dict[str, Any]] = []
    arrays: dict[Panel, Any] = {}
    for model in models:
        found, matrices = _model(results, model)
        rows += found
        arrays |= matrices
    return FigureData(
        "fig2",
        results.suite_name,
        "similarity of experts before and after the joint decomposition",
        "Linear CKA between all pairs of experts of a layer, gate projection, of the first, middle and last MoE layer. "
        "Rows: the weights W; the factors V of the joint singular value decomposition; V as the checkpoint stores it. "
        f"Samples: `{results.protocol.cka.samples}` (the paper does not say which axis). Printed: the mean over pairs "
        "of different experts, and in brackets what independent Gaussian matrices of this shape would have; all pairs "
        "are taken, so the mean has no sampling error.",
        tuple(rows),
        facts(results, models),
        arrays,
    )


def _model(results: Results, model: Model) -> tuple[list[dict[str, Any]], dict[Panel, Any]]:
    """Rows of a model, and `(model, layer, stage)` → matrix."""
    hole = record_hole(results, model, METHOD, "cka", "before", model=model.label, series=MEAN, config=METHOD)
    if hole is not None:
        return [hole], {}
    rows: list[dict[str, Any]] = []
    arrays: dict[Panel, Any] = {}
    for name, stages in sorted(results.details(model, METHOD, "cka")["matrices"].items(), key=_layer):
        layer, projection = _layer((name, None)), name.partition(".")[2]
        if projection != PROJECTION:
            continue
        for stage, matrix in stages.items():
            keys = {"model": model.label, "config": METHOD, "layer": layer, "stage": stage}
            panel = f"layer {layer}, {STAGES[stage]}"
            cell = results.cell(model, METHOD, "cka", f"{name}.{stage}")
            rows.append(point(cell, panel=panel, series=MEAN, **keys))
            for expert, line in enumerate(matrix):
                others = [value for other, value in enumerate(line) if other != expert]
                keys |= {"x": expert, "y": sum(others) / len(others), "status": "ok", "reason": None}
                values = " ".join(f"{value:g}" for value in line)
                rows.append({"panel": panel, "series": LINE, **keys, "record": cell.record, "values": values})
            arrays[(model.label, layer, stage)] = matrix
    return rows, arrays


def _layer(entry: tuple[str, Any]) -> int:
    """Index in `layer3.gate`."""
    return int(entry[0].partition(".")[0].removeprefix("layer"))


def draw(data: FigureData) -> Figure:
    """A row per stage, a column per layer, the models beside one another; one scale of colours."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    layers = {model: sorted({layer for name, layer, _ in data.arrays if name == model}) for model in models}
    columns = [(model, layer) for model in models for layer in layers[model] or (None,)]
    widths = [3 if layer is None else 1 for _, layer in columns]
    size = min(1.45, (style.FULL - 1.2) / sum(widths))
    height = 3 * size + 0.9 if data.arrays else 1.5
    figure = style.new_figure(min(style.FULL, sum(widths) * (size + 0.1) + 1.2), height)
    grid = figure.add_gridspec(len(STAGES), len(columns), width_ratios=widths)
    panels: list[Axes] = []
    image = None
    for column, (model, layer) in enumerate(columns):
        if layer is None:
            axes = figure.add_subplot(grid[:, column])
            axes.set_title(model)
            style.hole(axes, style.reason(data.select(model=model)[0]))
            panels.append(axes)
            continue
        for line, stage in enumerate(STAGES):
            axes = figure.add_subplot(grid[line, column])
            (mean,) = data.select(model=model, layer=layer, stage=stage, series=MEAN)
            image = _heat_map(axes, data.arrays[(model, layer, stage)], mean)
            if line == 0:
                middle = layer == layers[model][len(layers[model]) // 2]
                axes.set_title(f"{model if middle else ''}\nlayer {layer}")
            if column == 0 or columns[column - 1][0] != model:
                axes.set_ylabel(STAGES[stage])
            panels.append(axes)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.7, aspect=30, pad=0.02)
        bar.set_label("linear CKA")
        bar.outline.set_visible(False)
    return figure


def _heat_map(axes: Axes, matrix: Any, mean: Any) -> Any:
    image = axes.imshow(matrix, vmin=0, vmax=1, interpolation="nearest", rasterized=True)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    told = [f"{mean['y']:.3f}", *([] if mean["chance"] is None else [f"({mean['chance']:.2f})"])]
    axes.set_xlabel((" " if axes.get_position().width > WIDE else "\n").join(told), labelpad=2)
    return image
