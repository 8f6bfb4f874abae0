"""How evenly text that a model wrote itself (MoEQuant's EBSS) uses the experts, beside the model's ordinary text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobie.config import method_spec
from mobie.data.self_sampled import EBSS
from mobie.figures.figure import FigureData, facts, record_hole
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME, KIND = "expert_usage", "expert_usage"
METHOD = method_spec("fp16", calibration__text=EBSS)  # full precision, shown the text
BY_LAYER, SORTED = "imbalance", "frequency"
OWN, ORDINARY = "own", "ordinary"  # as in the record


def collect(results: Results) -> FigureData:
    """Imbalance of every layer, and the sorted shares of the middle one, for both sets of calibration tokens."""
    models = results.models(NAME)
    return FigureData(
        NAME,
        results.suite_name,
        "Use of the experts by calibration text that the model wrote itself, and by ordinary text",
        "Left: imbalance σ of each layer with experts: the standard deviation, over its experts, of the share of "
        "tokens that use one (eqs. 3 and 4 of arXiv 2505.03804); 0 is perfect balance. Right: those shares in the "
        "middle layer, each text's experts in its own descending order; dashed: perfect balance. Both sets are read "
        "by the full-precision model. In the legend: the text's perplexity under the model, each sequence by itself; "
        "text of the model's own is likelier because it is chosen to be.",
        tuple(row for model in models for row in _model_rows(results, model)),
        facts(results, models),
    )


def _model_rows(results: Results, model: Model) -> list[dict[str, Any]]:
    keys: dict[str, Any] = {"panel": BY_LAYER, "model": model.label, "series": EBSS, "config": METHOD}
    gap = record_hole(results, model, METHOD, KIND, f"{OWN}.imbalance", **keys)
    if gap is not None:
        return [gap]
    return [row for name in (OWN, ORDINARY) for row in _set_rows(results, model, name)]


def _set_rows(results: Results, model: Model, name: str) -> list[dict[str, Any]]:
    """The rows of one set of tokens."""
    details = results.details(model, METHOD, KIND)
    found, label = details[name], details["texts"][name]
    perplexity = results.cell(model, METHOD, KIND, f"{name}.perplexity").value
    keys = {"model": model.label, "series": label, "config": METHOD, "set": name, "perplexity": perplexity}
    keys |= {"stderr": None, "n": found["tokens"], "status": "ok", "reason": None}
    keys |= {"record": results.path(model, METHOD, KIND).relative_to(results.layout.root).as_posix()}
    layers = found["layers"]
    rows = [
        keys
        | {
            "panel": BY_LAYER,
            "x": layer,
            "y": results.cell(model, METHOD, KIND, f"layer{layer}.{name}.imbalance").value,
        }
        for layer in layers
    ]
    middle = len(layers) // 2
    shares = sorted((uses / found["tokens"] for uses in found["uses"][middle]), reverse=True)
    return rows + [
        keys | {"panel": SORTED, "layer": layers[middle], "x": rank, "y": share}
        for rank, share in enumerate(shares, start=1)
    ]


def draw(data: FigureData) -> Figure:
    """One line of panels per model: imbalance by layer left, sorted shares right."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    figure = style.new_figure(style.FULL, 2.3 * len(models))
    for (left, right), model in zip(figure.subplots(len(models), 2, squeeze=False), models, strict=True):
        rows = data.select(model=model)
        left.set_title(model)
        if rows[0]["status"] != "ok":
            style.hole(left, style.reason(rows[0]))
            right.axis("off")
            continue
        _panel(left, data.select(model=model, panel=BY_LAYER), "layer", "imbalance σ")
        shares = data.select(model=model, panel=SORTED)
        _panel(right, shares, "experts, most used first", "share of tokens")
        right.set_title(f"layer {shares[0]['layer']}")
        even = [row["y"] for row in shares if row["set"] == OWN]
        right.axhline(sum(even) / len(even), color=style.GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.2)
        left.legend(loc="lower left")
    return figure


def _panel(axes: Axes, rows: list[Any], x: str, y: str) -> None:
    """Both sets of tokens; ordinary text is grey."""
    from mobie.figures import style

    for name, color, marker in ((ORDINARY, style.GREY, "s"), (OWN, style.VERMILION, "o")):
        points = [row for row in rows if row["set"] == name]
        perplexity = points[0]["perplexity"]
        told = "" if perplexity is None else f", perplexity {perplexity:.3g}"
        style.line(axes, points, style.Style(color, marker), label=f"{points[0]['series']}{told}", markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
