"""Figure 3: which experts a text's tokens go to, before and after binarization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, facts, hole, record_hole
from mobie.results import Model, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("mobie", "arb-llm")
FULL_PRECISION = "full precision"
KEPT, NEW, LOST = "as in full precision", "new after binarization", "lost by binarization"
STATES = (KEPT, NEW, LOST)
WIDEST_LETTER = 0x24F  # the end of the Latin letters; the font has those


def collect(results: Results) -> FigureData:
    """Every assignment of the first tokens of a text to experts of the middle MoE layer."""
    models = results.models("fig3")
    text = results.protocol.routing.text
    return FigureData(
        "fig3",
        results.suite_name,
        f"tokens and their experts before and after binarization, text {text}",
        f"The first tokens of the first window of `{text}` (x) and the experts that the router of the middle MoE layer "
        "gives them (y): in full precision, and after binarization with the assignments that changed in colour. The "
        "paper shows OLMoE on C4 and does not say which binarization. Share changed: of the (token, slot) pairs shown, "
        "those whose expert the full-precision model does not use for the token; they are few and of one text, so the "
        "share is an illustration: Figure 7 and Table 2 have the expert shift of the whole sample.",
        tuple(row for model in models for row in _model(results, model)),
        (*facts(results, models), f"text {text}"),
    )


def _model(results: Results, model: Model) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        name = results.method(method).label
        keys: dict[str, Any] = {"model": model.label, "series": name, "config": method, "panel": name}
        gap = record_hole(results, model, method, "routing", "similarity", **keys)
        if gap is not None:
            rows.append(gap)
            continue
        found = results.details(model, method, "routing").get("map")
        if found is None:
            rows.append(hole("missing", "the record has no map of tokens", **keys))
            continue
        where = results.path(model, method, "routing").relative_to(results.layout.root).as_posix()
        keys |= {"layer": found["layer"], "status": "ok", "reason": None, "record": where}
        reference = {**keys, "panel": FULL_PRECISION, "series": FULL_PRECISION, "config": "fp16"}
        if not any(row["panel"] == FULL_PRECISION for row in rows):  # one map: both methods are held against the same
            rows += _assignments(found["tokens"], found["reference"], found["reference"], reference)
        rows += _assignments(found["tokens"], found["reference"], found["quantized"], keys)
    return rows


def _assignments(
    tokens: list[str], reference: list[list[int]], quantized: list[list[int]], keys: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per token and expert: kept, new, or lost."""
    rows = []
    for index, (token, before, after) in enumerate(zip(tokens, reference, quantized, strict=True)):
        for expert in sorted({*before, *after}):
            state = LOST if expert not in after else KEPT if expert in before else NEW
            rows.append(keys | {"x": index, "y": expert, "state": state, "token": _shown(token)})
    return rows


def _shown(token: str) -> str:
    """A token's text as it can be printed."""
    text = "".join(c if c.isprintable() and ord(c) <= WIDEST_LETTER else "·" for c in token.strip())
    return text or "␣"


def changed(rows: list[Any]) -> float:
    """Share of the assignments after binarization that are new."""
    states = [row["state"] for row in rows]
    return states.count(NEW) / (states.count(NEW) + states.count(KEPT))


def draw(data: FigureData) -> Figure:
    """Full precision above the binarized models; tokens' texts under the lowest panel."""
    from mobie.figures import style

    models = list(dict.fromkeys(row["model"] for row in data.rows))
    panels = [(m, p) for m in models for p in _panels(data.select(model=m))]
    experts = max([15, *(row["y"] for row in data.rows if row["status"] == "ok")]) + 1
    height = min(2.2, 0.35 + 0.075 * experts)
    figure = style.new_figure(style.FULL, 0.6 + len(panels) * height)
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    lowest = None
    for axes, (model, panel) in zip(grid, panels, strict=True):
        rows = data.select(model=model, panel=panel)
        if rows[0]["status"] != "ok":
            axes.set_title(f"{model}, {panel}", loc="left")
            style.hole(axes, style.reason(rows[0]))
            continue
        _map(axes, rows, experts)
        axes.set_xticks([])
        told = f"{model}, layer {rows[0]['layer']}, {panel}"
        axes.set_title(told if panel == FULL_PRECISION else f"{told}: {100 * changed(rows):.1f} % changed", loc="left")
        lowest = (axes, rows)
    if lowest is not None:
        axes, rows = lowest
        tokens = {row["x"]: row["token"] for row in rows}
        axes.set_xticks(list(tokens), list(tokens.values()), rotation=90, parse_math=False)
        _legend(figure)
    return figure


def _panels(rows: list[Any]) -> list[str]:
    """Full precision first, then the methods in order."""
    return sorted(dict.fromkeys(row["panel"] for row in rows), key=lambda panel: panel != FULL_PRECISION)


def _colors() -> dict[str, str]:
    from mobie.figures import style

    return {KEPT: "#555555", NEW: style.VERMILION, LOST: "#A9D3F0"}


def _map(axes: Axes, rows: list[Any], experts: int) -> None:
    """Coloured places in a grid of experts (up) and tokens (right)."""
    from matplotlib.colors import ListedColormap

    tokens = max(row["x"] for row in rows) + 1
    grid = [[0] * tokens for _ in range(experts)]
    for row in rows:
        grid[row["y"]][row["x"]] = 1 + STATES.index(row["state"])
    colors = ListedColormap(["white", *_colors().values()])
    axes.imshow(grid, cmap=colors, vmin=0, vmax=len(STATES), origin="lower", aspect="auto", interpolation="nearest")
    axes.vlines([x + 0.5 for x in range(tokens - 1)], -0.5, experts - 0.5, color="white", linewidth=0.6)
    axes.hlines([y + 0.5 for y in range(experts - 1)], -0.5, tokens - 0.5, color="white", linewidth=0.6)
    axes.set_ylabel("Expert")
    axes.grid(visible=False)


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, label=state) for state, color in _colors().items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
