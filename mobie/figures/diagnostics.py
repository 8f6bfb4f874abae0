"""Where a binary method loses what it loses: for the author of a method, one page per model.

From the records of quantizing and of routing: output error by layer and projection, bits by component, how often an
expert is used, expert shift by layer, and how large the stored scales are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, hole, point, record_hole
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

REFERENCE = "fp16"
METHODS = ("billm", "arb-llm", "mobie")
ERROR, TOKENS, SHIFT, SCALES, BITS = "output error", "tokens per expert", "expert shift", "scales", "bits"
#: layers of a deep model whose expert loads are drawn: first, two between, last
LOADS = 4
EXPERTS = "experts."  # scales of these parts are drawn: attention has few weights
PREFIXES = ("experts.", "self_attn.", "linears.")  # of names in records, left out in the figure
ORDER = ("q", "k", "v", "o", "gate", "up", "down")  # of projections; others come last


def collect(results: Results) -> FigureData:
    """Details of quantizing and routing records of the binary methods, and of the full-precision model."""
    models = results.models("diagnostics")
    rows = [row for model in models for part in PARTS for row in part(results, model)]
    tokens = results.protocol.routing
    return FigureData(
        "diagnostics",
        results.suite_name,
        "Where the binary methods lose",
        "Output error: ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ on the calibration inputs, experts averaged. Bits: per weight of a "
        "component, signs and codes solid, scales, maps and indices hatched; diamonds: by the formula of the method's "
        "paper. "
        f"Tokens per expert: share of the top-k choices of `{tokens.text}` that go to an expert, experts sorted by "
        f"the full-precision model (grey); at most {LOADS} layers. Expert shift: share of a token's experts that "
        "full precision does not choose; intervals span two standard errors to either side. Scales of the experts: "
        "from the median (marker) to the 95th percentile of absolute values, one stroke per layer, first layer on top.",
        tuple(rows),
        facts(results, models),
    )


# --- what is drawn ----------------------------------------------------------------------------------------------------


def _keys(results: Results, model: Model, method: str, panel: str) -> dict[str, Any]:
    return {"panel": panel, "model": model.label, "series": results.method(method).label, "config": method}


def _blocks(results: Results, model: Model, method: str, panel: str) -> tuple[list[Any], dict[str, Any] | None]:
    """The blocks of a quantize record, or the hole it leaves."""
    keys = _keys(results, model, method, panel)
    missing = record_hole(results, model, method, "quantize", "bits_stored", **keys)
    if missing is not None:
        return [], missing
    return results.details(model, method, "quantize")["blocks"], None


def _known(y: float, **keys: Any) -> dict[str, Any]:
    return {"y": y, "status": "ok", "reason": None} | keys


def _lacking(what: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    return hole("missing", f"the record has no {what}: made by an older version", **keys)


def error_rows(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    """Relative output error by layer and projection."""
    for method in METHODS:
        keys = _keys(results, model, method, ERROR)
        blocks, missing = _blocks(results, model, method, ERROR)
        if missing is not None:
            yield missing
        for block in blocks:
            for name, error in block["output_error"].items():
                yield _known(error, x=block["block"], part=name, **keys)


def bits_rows(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    """Bits per weight by component: of codes, of all that is stored, and by the method's paper."""
    for method in METHODS:
        keys = _keys(results, model, method, BITS)
        _, missing = _blocks(results, model, method, BITS)
        if missing is not None:
            yield missing
            continue
        components = results.details(model, method, "quantize").get("bits_by_component")
        if not components:
            yield _lacking("bits by component", keys)
            continue
        for component, bits in components.items():
            for kind in ("codes", "stored", "paper"):
                yield _known(bits[kind], x=component, kind=kind, n=bits["weights"], **keys)


def token_rows(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    """Share of choices by expert in a few layers; `x` is the expert's rank in the full-precision model, from 1."""
    references: Any = None
    for method in METHODS:
        keys = _keys(results, model, method, TOKENS)
        missing = record_hole(results, model, method, "routing", "expert_shift", **keys)
        if missing is not None:
            yield missing
            continue
        counts = results.details(model, method, "routing").get("tokens_per_expert")
        if counts is None:
            yield _lacking("tokens per expert", keys)
            continue
        series = {}
        if references is None:
            references = counts["reference"]
            series[REFERENCE] = references
        series[method] = counts["quantized"]
        for name, layers in series.items():
            for layer in chosen_layers(len(references)):
                yield from _load_rows(_keys(results, model, name, TOKENS), layer, references[layer], layers[layer])


def _load_rows(
    keys: Mapping[str, Any], layer: int, reference: Sequence[int], counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    order = sorted(range(len(reference)), key=lambda expert: (-reference[expert], expert))
    total = sum(counts)
    for rank, expert in enumerate(order, 1):
        yield _known(counts[expert] / total, x=rank, n=total, layer=layer, expert=expert, **keys)


def chosen_layers(count: int) -> list[int]:
    """At most `LOADS` layers, evenly from the first to the last."""
    if count <= LOADS:
        return list(range(count))
    return [round(step * (count - 1) / (LOADS - 1)) for step in range(LOADS)]


def shift_rows(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    """Expert shift of every layer; one hole for a method that has none."""
    for method in METHODS:
        keys = _keys(results, model, method, SHIFT)
        first = results.cell(model, method, "routing", "layer0.expert_shift")
        layer = 0
        while first.value is not None:
            cell = results.cell(model, method, "routing", f"layer{layer}.expert_shift")
            if cell.value is None:
                break
            yield point(cell, x=layer, **keys)
            layer += 1
        if first.value is None:
            yield point(first, x=None, **keys)


def scale_rows(results: Results, model: Model) -> Iterator[dict[str, Any]]:
    """Median and 95th percentile of the experts' absolute scales by layer and part."""
    for method in METHODS:
        keys = _keys(results, model, method, SCALES)
        blocks, missing = _blocks(results, model, method, SCALES)
        if missing is not None:
            yield missing
            continue
        found = [
            _known(scales["median"], p95=scales["p95"], x=block["block"], part=part, n=scales["count"], **keys)
            for block in blocks
            for part, scales in block.get("scales", {}).items()
            if part.startswith(EXPERTS)
        ]
        yield from found or [_lacking("summary of scales", keys)]


PARTS = (error_rows, bits_rows, token_rows, shift_rows, scale_rows)


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(data: FigureData) -> Figure:
    """A page per model: errors, bits and shift, expert loads, scales."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    names = {row["part"] for row in data.rows if row["panel"] == SCALES and row["y"] is not None}
    heights = (1.75, 1.9, 1.7, 0.75 + 0.13 * max(8, len(names)))
    figure = style.new_figure(style.FULL, sum(heights) * len(models))
    pages = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for page, model in zip(pages, models, strict=True):
        parts = page.subfigures(len(heights), 1, height_ratios=heights)
        if len(models) > 1:
            page.suptitle(model, weight="bold")
        _draw_errors(parts[0], data.select(model=model, panel=ERROR))
        left, right = parts[1].subplots(1, 2)
        _draw_bits(left, data.select(model=model, panel=BITS))
        _draw_shift(right, data.select(model=model, panel=SHIFT))
        _draw_loads(parts[2], data.select(model=model, panel=TOKENS))
        _draw_scales(parts[3], data.select(model=model, panel=SCALES))
    return figure


def _short(name: str) -> str:
    """A part's name as it is written: without what all have in common."""
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name.replace("_proj", "")


def _place(part: str) -> int:
    return ORDER.index(_short(part)) if _short(part) in ORDER else len(ORDER)


def _own(rows: Sequence[Any], method: str) -> tuple[list[Any], list[Any]]:
    """A method's rows with values, and its holes."""
    own = [row for row in rows if row["config"] == method]
    return [row for row in own if row["y"] is not None], [row for row in own if row["y"] is None]


def _draw_errors(figure: SubFigure, rows: Sequence[Any]) -> None:
    """A heat map per method: projections down, layers across, one scale of colours."""
    import numpy as np

    from mobie.figures import style

    panels = figure.subplots(1, len(METHODS))
    known = [row for row in rows if row["y"] is not None]
    high = max((row["y"] for row in known), default=1.0)
    parts = sorted(dict.fromkeys(row["part"] for row in known), key=_place)
    layers = sorted({row["x"] for row in known})
    image = None
    for place, (axes, method) in enumerate(zip(panels, METHODS, strict=True)):
        values, holes = _own(rows, method)
        axes.set_title(_title(rows, method, "output error"))
        if not values:
            style.hole(axes, style.reason(holes[0]))
            continue
        grid = np.full((len(parts), len(layers)), np.nan)
        for row in values:
            grid[parts.index(row["part"]), layers.index(row["x"])] = row["y"]
        image = axes.imshow(grid, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
        axes.grid(visible=False)
        axes.set_yticks(range(len(parts)), [_short(part) for part in parts] if place == 0 else [""] * len(parts))
        _label_layers(axes, layers)
        if len(layers) <= 6:
            _write_values(axes, grid, high)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.9, aspect=15, pad=0.01)


def _label_layers(axes: Axes, layers: Sequence[int]) -> None:
    every = max(1, len(layers) // 6)
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")


def _write_values(axes: Axes, grid: Any, high: float) -> None:
    """Numbers on the cells, where there are few."""
    from mobie.figures import style

    for (row, column), value in _cells(grid):
        colour = style.BLACK if value > 0.55 * high else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=style.SMALL, color=colour)


def _cells(grid: Any) -> Iterator[tuple[tuple[int, int], float]]:
    import numpy as np

    return ((place, value) for place, value in np.ndenumerate(grid) if np.isfinite(value))


def _title(rows: Sequence[Any], method: str, what: str) -> str:
    label = next((row["series"] for row in rows if row["config"] == method), method)
    return f"{label}: {what}"


def _draw_bits(axes: Axes, rows: Sequence[Any]) -> None:
    """Bars by component and method: codes below, everything else above, the paper's bits marked."""
    from mobie.figures import style

    axes.set_title("bits per weight")
    components = list(dict.fromkeys(row["x"] for row in rows if row["y"] is not None))
    if not components:
        style.hole(axes, style.reason(rows[0]))
        return
    axes.set_xticks(range(len(components)), [component.replace("_", " ") for component in components])
    axes.set_xlim(-0.5, len(components) - 0.5)
    axes.tick_params(axis="x", length=0)
    width, missing = 0.8 / len(METHODS), []
    for number, method in enumerate(METHODS):
        values, holes = _own(rows, method)
        missing += holes[:1]
        how = style.method_style(method)
        found = {(row["x"], row["kind"]): row["y"] for row in values}
        for place, component in enumerate(components):
            if (component, "stored") not in found:
                continue
            x = place + (number - (len(METHODS) - 1) / 2) * width
            codes, stored, paper = (found[component, kind] for kind in ("codes", "stored", "paper"))
            label = values[0]["series"] if place == 0 else None
            axes.bar(x, codes, 0.9 * width, color=how.color, linewidth=0, label=label)
            side = {"color": how.color, "alpha": 0.45, "hatch": "////", "edgecolor": "white", "linewidth": 0}
            axes.bar(x, stored - codes, 0.9 * width, bottom=codes, **side)
            style.paper_mark(axes, x, paper, markersize=3.5)
    axes.bar(0, 0, color=style.GREY, label="signs, codes")
    axes.bar(0, 0, color=style.GREY, alpha=0.45, hatch="////", edgecolor="white", linewidth=0, label="all else stored")
    style.paper_mark(axes, [], [], markersize=3.5, label="paper's formula")
    style.legend(axes, missing)


def _draw_shift(axes: Axes, rows: Sequence[Any]) -> None:
    from mobie.figures import style

    axes.set_title("expert shift by layer")
    missing, layers = [], []
    for method in METHODS:
        values, holes = _own(rows, method)
        missing += holes[:1]
        layers += [row["x"] for row in values]
        if values:
            style.line(axes, values, style.method_style(method), label=values[0]["series"])
    if not layers:
        style.hole(axes, style.reason(missing[0]))
        return
    style.layer_axis(axes, layers)
    axes.set_ylim(bottom=0)
    style.legend(axes, missing)


def _draw_loads(figure: SubFigure, rows: Sequence[Any]) -> None:
    """Bars of the full-precision model, sorted; markers of the methods over the same experts."""
    import textwrap

    from mobie.figures import style

    layers = sorted({row["layer"] for row in rows if row["y"] is not None})
    if not layers:
        axes = figure.subplots()
        axes.set_title("tokens per expert")
        style.hole(axes, style.reason(rows[0]))
        return
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        own = [row for row in rows if row["y"] is not None and row["layer"] == layer]
        bars = [row for row in own if row["config"] == REFERENCE]
        label = bars[0]["series"]
        axes.bar([r["x"] for r in bars], [100 * r["y"] for r in bars], 0.9, color="#C8C8C8", linewidth=0, label=label)
        for method in METHODS:
            values, _ = _own(own, method)
            how = style.method_style(method)
            if values:
                places = [row["x"] for row in values], [100 * row["y"] for row in values]
                axes.plot(*places, how.marker, color=how.color, markersize=2.6, label=values[0]["series"])
        axes.axhline(100 / len(bars), color=style.GREY, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_title(f"layer {layer}: tokens per expert")
        axes.set_xlabel("experts, sorted")
        axes.set_xticks([])
    panels[0].set_ylabel("% of choices")
    handles, labels = panels[0].get_legend_handles_labels()
    holes = [row for row in rows if row["y"] is None]
    for row in holes:
        labels.append(textwrap.shorten(f"{row['series']}: {style.reason(row)}", 60, placeholder=" …"))
        handles.append(style.hole_handle(labels[-1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _draw_scales(figure: SubFigure, rows: Sequence[Any]) -> None:
    """For each part a stroke per layer from the median to the 95th percentile."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from mobie.figures import style

    panels = figure.subplots(1, len(METHODS))
    ends = [row[key] for row in rows if row["y"] for key in ("y", "p95")]
    for axes, method in zip(panels, METHODS, strict=True):
        values, holes = _own(rows, method)
        axes.set_title(_title(rows, method, "scales of experts"))
        if not values:
            style.hole(axes, style.reason(holes[0]))
            continue
        parts = list(dict.fromkeys(row["part"] for row in values))
        layers = sorted({row["x"] for row in values})
        how = style.method_style(method)
        step = 0.7 / max(1, len(layers) - 1)
        for row in values:
            y = parts.index(row["part"]) - 0.35 + layers.index(row["x"]) * step
            axes.plot([row["y"], row["p95"]], [y, y], color=how.color, linewidth=0.8, alpha=0.6)
            axes.plot(row["y"], y, "o", color=how.color, markersize=1.8)
        axes.set_yticks(range(len(parts)), [_scale_name(part) for part in parts])
        axes.set_ylim(len(parts) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.set_xlim(min(ends) / 1.3, max(ends) * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("absolute value")


def _scale_name(part: str) -> str:
    """`gate extra row` for `experts.gate.experts.extra.row_scale`."""
    return _short(part).replace("_scale", "").replace(".scale", "").replace(".", " ")
