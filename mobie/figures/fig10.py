"""Figures 10 and 11: GLAS and NGES plugged into another binary method. This one: BiLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, point
from mobie.figures.style import INTERVAL
from mobie.paired import log_ratio
from mobie.results import Cell, Model, Results
from mobie.tables.table2 import text_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLUG_INS = {"": "", "-glas": "+ GLAS", "-glas-nges": "+ GLAS + NGES"}  # end of the config's name → label
PERPLEXITY, CHANGE = "perplexity", "change"
STRENGTH = (0.35, 0.65, 1.0)  # of the backbone's colour, as parts are added
HATCHES = ("", "///", "xxx")


def collect(results: Results) -> FigureData:
    """Perplexities with BiLLM as the backbone."""
    return collect_plug_ins(results, "fig10", "billm")


def collect_plug_ins(results: Results, name: str, backbone: str) -> FigureData:
    """Perplexity of a backbone, with GLAS, and with GLAS and NGES, and the paired change against the backbone."""
    models = results.models(name)
    label = results.method(backbone).label
    rows = [
        row
        for model in models
        for text in results.protocol.texts
        for end in PLUG_INS
        for row in _rows(results, model, text, backbone, end)
    ]
    return FigureData(
        name,
        results.suite_name,
        f"GLAS and NGES plugged into {label}",
        f"Left: perplexity of {label}, with GLAS, and with GLAS and NGES. Right: change against {label} in per cent, "
        "below zero is better; from the mean difference in log perplexity over the same windows, so what the two have "
        f"in common does not blur it. {INTERVAL}",
        tuple(rows),
        facts(results, models),
    )


def _rows(results: Results, model: Model, text: str, backbone: str, end: str) -> list[dict[str, Any]]:
    """The perplexity, and for a plug-in its change."""
    label = results.method(backbone).label
    method = backbone + end
    keys = {
        "model": model.label,
        "series": f"{label} {PLUG_INS[end]}".strip(),
        "config": method,
        "x": text,
    }
    rows = [point(text_perplexity(results, model, method, text), panel=PERPLEXITY, **keys)]
    if end:
        rows.append(point(per_cent(log_ratio(results, model, method, backbone, [text])), panel=CHANGE, **keys))
    return rows


def per_cent(ratio: Cell) -> Cell:
    """A log ratio as a change in per cent, its standard error carried along (delta method)."""
    if ratio.value is None or ratio.stderr is None:
        return ratio
    factor = math.exp(ratio.value)
    return Cell(100 * (factor - 1), 100 * factor * ratio.stderr, ratio.n, record=ratio.record)


def draw(data: FigureData) -> Figure:
    """One line of panels per model: perplexities left, changes right."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    labels = list(dict.fromkeys(row["series"] for row in data.rows))
    styles = dict(zip(labels, _styles(data.rows[0]["config"]), strict=True))
    figure = style.new_figure(style.FULL, 0.3 + 2.2 * len(models))
    panels = figure.subplots(len(models), 2, squeeze=False)
    for (left, right), model in zip(panels, models, strict=True):
        _draw_bars(left, data.select(model=model, panel=PERPLEXITY), styles)
        _draw_changes(right, data.select(model=model, panel=CHANGE), styles)
        left.set_title(f"{model}: perplexity")
        right.set_title(f"{model}: change against {labels[0]}, %")
    handles = [_handle(label, how) for label, how in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _handle(label: str, how: Any) -> Any:
    """A bar for the legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=how.color, hatch=how.hatch, edgecolor="white", linewidth=0, label=label)


def _styles(backbone: str) -> list[Any]:
    """The backbone's colour, stronger with every part that is added."""
    from matplotlib.colors import to_hex, to_rgb

    from mobie.figures import style

    own = style.method_style(backbone)
    tints = [to_hex([1 - s * (1 - part) for part in to_rgb(own.color)]) for s in STRENGTH]
    return [style.Style(tint, own.marker, hatch) for tint, hatch in zip(tints, HATCHES, strict=True)]


def _places(axes: Axes, rows: list[Any]) -> dict[str, int]:
    """Texts along the x axis."""
    texts = {text: place for place, text in enumerate(dict.fromkeys(row["x"] for row in rows))}
    axes.set_xticks(list(texts.values()), list(texts))
    axes.set_xlim(-0.5, len(texts) - 0.5)
    axes.tick_params(axis="x", length=0)
    return texts


def _slots(styles: Sequence[str]) -> tuple[dict[str, float], float]:
    """Distance of each series from the middle of its text's place, and the width that it has."""
    width = 0.8 / len(styles)
    return {label: (number - (len(styles) - 1) / 2) * width for number, label in enumerate(styles)}, 0.92 * width


def _draw_bars(axes: Axes, rows: list[Any], styles: dict[str, Any]) -> None:
    from mobie.figures import style

    if all(row["y"] is None for row in rows):
        style.hole(axes, style.reason(rows[0]))
        return
    texts, (slots, width) = _places(axes, rows), _slots(list(styles))
    for row in rows:
        label = row["series"]
        style.bar(axes, texts[row["x"]] + slots[label], row, styles[label], width=width)


def _draw_changes(axes: Axes, rows: list[Any], styles: dict[str, Any]) -> None:
    from mobie.figures import style

    if all(row["y"] is None for row in rows):
        style.hole(axes, style.reason(rows[0]))
        return
    texts, (slots, width) = _places(axes, rows), _slots(list(styles)[1:])
    axes.axhline(0, color=style.BLACK, linewidth=0.7, zorder=1.2)
    axes.set_xlim(-0.5, len(texts) - 0.3)  # room for the last label
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for row in rows:
        x, how = texts[row["x"]] + slots[row["series"]], styles[row["series"]]
        if row["y"] is None:
            style.hole(axes, style.reason(row), x=x, width=width)
            continue
        style.interval(axes, x, row["y"], row["stderr"])
        axes.plot(x, row["y"], how.marker, color=how.color, markeredgecolor=style.BLACK, markeredgewidth=0.5)
        text = f"{row['y']:+.1f}".replace("-", "−")
        where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "size": style.SMALL}
        axes.annotate(text, (x, row["y"]), bbox=paper, **where)
