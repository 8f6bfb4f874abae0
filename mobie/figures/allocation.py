"""Who got how many bits, beside how often the router chooses whom: methods that share out one budget over a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, hole, record_hole
from mobie.jobs.methods import is_allocating
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARE, BITS = "share of routing choices", "bits per weight"
PANELS = (SHARE, BITS)
LABELS = {SHARE: "share of choices", BITS: "bits"}
NOBODY = "no method of the suite shares out bits"


def collect(results: Results) -> FigureData:
    """Mean bits of every expert and its share of its layer's routing choices, from the records of quantizing."""
    models = results.models("allocation")
    methods = [name for name in results.suite.methods if is_allocating(results.method(name).method)]
    return FigureData(
        "allocation",
        results.suite_name,
        "Bits of the experts, beside how often each is chosen",
        "Layers down, experts across, those that the router chooses most often first. Above: share of a layer's "
        "routing choices on the calibration text, full precision. Below: bits of the codes, mean over the expert's "
        "projections. Attention, shared experts and dense layers are not shown, but the average in the title counts "
        "them: bits per quantized weight that the method reached, of its budget.",
        tuple(row for model in models for row in _model(results, model, methods)),
        facts(results, models),
    )


def _model(results: Results, model: Model, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not methods:
        yield hole("absent", NOBODY, panel=BITS, model=model.label, series="", config="")
    for method in methods:
        keys = {"model": model.label, "series": results.method(method).label, "config": method}
        missing = record_hole(results, model, method, "quantize", "bits_codes", panel=BITS, **keys)
        if missing is not None:
            yield missing
            continue
        blocks = results.details(model, method, "quantize")["blocks"]
        where = results.path(model, method, "quantize").relative_to(results.layout.root).as_posix()
        found = [row for block in blocks for row in _block(block, keys | {"record": where})]
        yield from found or [hole("missing", "the record has no allocation", panel=BITS, **keys)]


def _block(block: Mapping[str, Any], keys: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Two rows per expert of a block; `x` is its rank by use, from 1."""
    experts = block.get("allocation", {}).get("experts", {})
    if not experts:
        return
    account = block["allocation"].get("account", {})
    tokens = block["survey"]["experts"]["tokens"]
    order = sorted(range(len(tokens)), key=lambda expert: (-tokens[expert], expert))
    for rank, expert in enumerate(order, 1):
        own = [chosen["bits"][expert] for chosen in experts.values()]
        widths = " ".join(f"{name} {bits}" for name, bits in zip(experts, own, strict=True))
        values = {SHARE: tokens[expert] / max(1, sum(tokens)), BITS: sum(own) / len(own)}
        for panel, value in values.items():
            known = {"x": rank, "y": value, "layer": block["block"], "expert": expert, "status": "ok", "reason": None}
            told = {"widths": widths, "reached": account.get("reached"), "budget": account.get("budget")}
            yield {"panel": panel, **keys, **known, **told}


def draw(data: FigureData) -> Figure:
    """Two lines per model, use above bits; a column per method. One scale of colours for all panels of a kind."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    methods = list(dict.fromkeys(row["config"] for row in data.rows))
    layers = {model: len({row.get("layer") for row in data.select(model=model)}) for model in models}
    heights = [max(1.1, min(2.6, 0.4 + 0.14 * layers[model])) for model in models for _ in PANELS]
    figure = style.new_figure(min(style.FULL, 1.2 + 2.8 * len(methods)), sum(heights) + 0.3)
    grid = figure.subplots(len(heights), len(methods), squeeze=False, height_ratios=heights)
    for line, axes in enumerate(grid):
        model, panel = models[line // len(PANELS)], PANELS[line % len(PANELS)]
        images = [_heat_map(own, data, model, config, panel) for own, config in zip(axes, methods, strict=True)]
        drawn = next((image for image in images if image is not None), None)
        if drawn is not None:
            bar = figure.colorbar(drawn, ax=list(axes), shrink=0.9, aspect=15, pad=0.01)
            bar.set_label(LABELS[panel])
            bar.outline.set_visible(False)
    return figure


def _limits(data: FigureData, panel: str) -> tuple[float, float]:
    """Ends of the scale of colours: no use and the most, or the smallest and the largest width of a projection."""
    known = [row for row in data.select(panel=panel) if row["y"] is not None]
    if panel == SHARE:
        return 0.0, max(row["y"] for row in known)
    widths = [float(word) for row in known for word in row["widths"].split()[1::2]]
    return min(widths), max(widths)


def _heat_map(axes: Axes, data: FigureData, model: str, config: str, panel: str) -> Any | None:
    """Layers down, experts across; the picture, or None for a hole."""
    import numpy as np

    from mobie.figures import style

    rows = data.select(model=model, config=config)
    if panel == SHARE:
        axes.set_title(f"{model}: {_title(rows[0])}" if config else model)
    values = [row for row in rows if row["panel"] == panel and row["y"] is not None]
    if not values:
        style.hole(axes, style.reason(next(row for row in rows if row["y"] is None)))
        return None
    layers = sorted({row["layer"] for row in values})
    matrix = np.full((len(layers), max(row["x"] for row in values)), np.nan)
    for row in values:
        matrix[layers.index(row["layer"]), row["x"] - 1] = row["y"]
    low, high = _limits(data, panel)
    image = axes.imshow(matrix, vmin=low, vmax=high, aspect="auto", interpolation="nearest", rasterized=True)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    every = max(1, -(-len(layers) // 8))
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_ylabel("layer")
    wide = matrix.shape[1]
    axes.set_xticks([0, wide - 1], ["1", str(wide)])
    if panel == BITS:
        axes.set_xlabel("experts of the layer, most chosen first")
    return image


def _title(row: Mapping[str, Any]) -> str:
    """The method, and the average that it reached of its budget."""
    if row.get("reached") is None:
        return str(row["series"])
    return f"{row['series']}\n{row['reached']:.3f} of {row['budget']:g} bits"
