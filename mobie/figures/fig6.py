"""Figure 6: how alike the routers decide before and after binarization, layer by layer (eq. 53)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, point
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("fp16", "billm", "arb-llm", "mobie")
STATEMENTS = (  # (value, what section 5.3 says of it)
    (0.8, "paper: BiLLM, ARB-LLM fall below 0.8 in deeper layers"),
    (0.9, "paper: MoBiE stays at 0.9 or above"),
)
LABELS = {"similarity": "Routing similarity", "expert_shift": "Expert shift"}
READING = (
    "Routing similarity of a layer: the cosine of the router's probabilities of the quantized and the full-precision "
    "model, averaged over the tokens of {text} (eq. 52, 53); the full-precision model has 1 by definition."
)


def collect(results: Results) -> FigureData:
    """Routing similarity by layer of the binary methods. The paper's curves are not printed as numbers."""
    models = results.models("fig6")
    rows = [row for model in models for row in layer_rows(results, model, "similarity")]
    rows += [
        {"panel": model.label, "model": model.label, "series": text, "x": None, "y": value, "paper": value}
        | {"status": "ok", "reason": None, "record": ""}
        for model in models
        for value, text in STATEMENTS
    ]
    return FigureData(
        "fig6",
        results.suite_name,
        "routing similarity to the full-precision model",
        f"{reading(results)} Dashed: what the paper's text states for OLMoE.",
        tuple(rows),
        facts(results, models),
    )


def reading(results: Results) -> str:
    """What the values are, for a caption."""
    from mobie.figures.style import INTERVAL

    protocol = results.protocol.routing
    text = f"{protocol.windows} windows of `{protocol.text}`" if protocol.windows else f"`{protocol.text}`"
    return f"{READING.format(text=text)} {INTERVAL}"


def layer_rows(results: Results, model: Model, name: str) -> list[dict[str, Any]]:
    """`name` (`similarity`, `expert_shift`) of every layer, by method; one hole for a method that has no record."""
    rows = []
    for method in METHODS:
        keys = {"panel": LABELS[name], "model": model.label, "series": results.method(method).label, "config": method}
        record = results.record(model, method, "routing")
        layers = 0
        while record is not None and record.measurement(f"layer{layers}.{name}") is not None:
            layers += 1
        first = results.cell(model, method, "routing", f"layer0.{name}")
        rows += [
            point(results.cell(model, method, "routing", f"layer{layer}.{name}"), x=layer, **keys)
            for layer in range(layers)
        ] or [point(first, x=None, **keys)]
    return rows


def draw(data: FigureData) -> Figure:
    """One panel per model."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    figure = style.new_figure(style.FULL if len(models) > 1 else style.FULL * 0.7, 2.5)
    panels = list(figure.subplots(1, len(models), squeeze=False).flat)
    for axes, model in zip(panels, models, strict=True):
        draw_layers(axes, data.select(model=model, panel=LABELS["similarity"]), legend=axes is panels[-1])
        for row in data.rows:
            if row["model"] == model and row.get("paper") is not None:
                style.statement(axes, row["y"], row["series"])
        axes.set_title(model)
        axes.set_ylabel(LABELS["similarity"])
    return figure


def draw_layers(axes: Axes, rows: list[Any], *, legend: bool) -> None:
    """One line per method; a method without values stands in the legend with its reason."""
    from mobie.figures import style

    holes = []
    for method in METHODS:
        own = [row for row in rows if row["config"] == method]
        values = [row for row in own if row["y"] is not None]
        if values:
            style.line(axes, values, style.method_style(method), label=own[0]["series"], linewidth=1.0)
        else:
            holes += own
    if len(holes) == len(METHODS):
        style.hole(axes, "; ".join(dict.fromkeys(style.reason(row) for row in holes)))
        return
    style.layer_axis(axes, [row["x"] for row in rows if row["x"] is not None])
    if legend:
        style.legend(axes, holes)
