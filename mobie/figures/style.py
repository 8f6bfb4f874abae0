"""How all figures look: sizes, colours, markers, holes and intervals. matplotlib is imported only where it draws.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any colour vision tell apart, and
darker ones of them where there are more methods; a method has its colour, its marker and its hatch in every figure, so
that none of the three is needed alone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobie.figures.figure import FigureData, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: inches at which figures are printed: across the page, and one of two columns
FULL, COLUMN = 6.8, 3.3
SMALL, NORMAL, LARGE = 7.0, 7.5, 8.5  # points
STDERRS = 2.0  # standard errors that an interval spans to either side
INTERVAL = "Intervals span two standard errors to either side."
DOTS = 200  # per inch of the PNG
PLACES = 5  # decimals of a panel's place, in parts of the figure: a hundredth of a point

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
DARK_ORANGE, DARK_VERMILION, DARK_PURPLE = "#8A5E00", "#8F3E00", "#7A3F63"
DARK_SKY, DARK_YELLOW, DARK_GREEN = "#1F6A94", "#7D7600", "#005A42"
GREY, PALE = "#6B6B6B", "#DCDCDC"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, BLACK)

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": LARGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "image.cmap": "cividis",
    "savefig.dpi": DOTS,
    "pdf.fonttype": 3,
    "svg.fonttype": "path",
    "svg.hashsalt": "mobie",
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    color: str
    marker: str
    hatch: str = ""


#: by the beginning of a method config's name; the longest that fits counts
METHODS = {
    "fp16": Style(BLACK, "s"),
    "billm": Style(ORANGE, "^", "///"),
    "arb": Style(GREEN, "D", "\\\\\\"),
    "mobie": Style(BLUE, "o"),
    "gptq": Style(VERMILION, "v", "..."),
    "awq": Style(PURPLE, "P", "xxx"),
    "rtn": Style(SKY, "X", "---"),
    "moequant": Style(DARK_VERMILION, ">", "oo"),
    "nowag": Style(DARK_YELLOW, "*", "**"),
    "quantmoe": Style(DARK_PURPLE, "p", "||"),
    "mxmoe": Style(DARK_SKY, "h", "OO"),
    "pb-llm": Style(DARK_ORANGE, "<", "\\\\//"),
    "obe": Style(DARK_GREEN, "8", "+++"),
}
OTHER = Style(GREY, "d", "++")  # of a method without an entry: figures of all methods number them besides


def method_style(name: str) -> Style:
    """Style of a method config or a variant of one; grey for one that has no style."""
    fits = [start for start in METHODS if name.startswith(start)]
    return METHODS[max(fits, key=len)] if fits else OTHER


def new_figure(width: float = FULL, height: float = 2.4) -> Figure:
    """A figure of a size in inches, without pyplot: no global state. Axes come from `figure.subplots`.

    Its layout makes room for labels, and for the title and the footer that `frame` adds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_per_model(data: FigureData, draw_model: Callable[[Axes, list[Row]], None]) -> Figure:
    """A panel for every model side by side, drawn from its rows by `draw_model(axes, rows)`."""
    models = list(dict.fromkeys(row["model"] for row in data.rows))
    figure = new_figure(FULL if len(models) > 1 else FULL * 0.75, 2.6)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False).flat, models, strict=True):
        draw_model(axes, data.select(model=model))
        axes.set_title(model)
    return figure


def frame(figure: Figure, data: FigureData) -> None:
    """Put the title above a figure and the footer below it."""
    width, height = figure.get_size_inches()
    title = textwrap.wrap(data.heading, _letters(width, LARGE))
    foot = textwrap.wrap(footer(data), _letters(width, SMALL))
    above, below = (_inches(len(lines), size) for lines, size in ((title, LARGE), (foot, SMALL)))
    figure.set_size_inches(width, height + above + below)
    height += above + below
    rest = (0.06 / width, below / height, 0.995 - 0.06 / width, 1 - (above + below) / height)
    figure.get_layout_engine().set(rect=rest)
    for _ in range(2):  # makes the layout; then anew with the tick labels that the panels' new sizes bring
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it stays: every format has the same
    for axes in figure.axes:  # the solver's last digits differ from run to run: it goes by addresses in memory
        axes.set_position([round(float(edge), PLACES) for edge in axes.get_position(original=True).bounds], "original")
    for each in figure.legends:  # the layout has left room for those "outside" the axes in the rest only
        each.set_bbox_to_anchor(rest, figure.transFigure)
    figure.text(0.04 / width, 1 - 0.03 / height, "\n".join(title), va="top", size=LARGE, weight="bold")
    figure.text(0.04 / width, 0.03 / height, "\n".join(foot), va="bottom", size=SMALL, color=GREY)


def footer(data: FigureData) -> str:
    """One line: suite, models, what limits the numbers, and a digest of the values drawn."""
    return " · ".join([f"suite {data.suite}", *data.facts, f"values {data.digest}"])


def _letters(inches: float, points: float) -> int:
    """Letters of DejaVu Sans that surely fit in a line: about 0.58 of the size is one of them wide."""
    return max(8, int((inches - 0.08) * 72 / (0.58 * points)))


def _inches(lines: int, points: float) -> float:
    """Height of lines of text with a little air."""
    return (lines * points * 1.25 + 4) / 72


def picture(figure: Figure, data: FigureData, suffix: str) -> bytes:
    """The figure as a file's bytes: `svg`, `pdf` or `png`. No time, no version, no random names in it."""
    import matplotlib

    metadata: dict[str, dict[str, str | None]] = {
        "svg": {"Date": None, "Creator": None, "Title": data.heading, "Description": data.caption},
        "pdf": {
            "CreationDate": None,
            "Creator": None,
            "Producer": None,
            "Title": data.heading,
            "Subject": data.caption,
        },
        "png": {"Software": None, "Title": data.heading},
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format=suffix, metadata=metadata[suffix], dpi=DOTS)
    return _numbered_clips(buffer.getvalue()) if suffix == "svg" else buffer.getvalue()


def _numbered_clips(svg: bytes) -> bytes:
    """Number the clip paths of an SVG in order: matplotlib names some by their address in memory."""
    names: dict[bytes, bytes] = {}

    def number(found: re.Match[bytes]) -> bytes:
        return found[1] + names.setdefault(found[2], b"clip%d" % len(names)) + found[3]

    return re.sub(rb'(url\(#|<clipPath id=")(p[0-9a-f]{10})(\)|")', number, svg)


def interval(
    axes: Axes, x: Any, y: float, stderr: float | None, *, color: str = BLACK, horizontal: bool = False
) -> None:
    """A bar of `STDERRS` standard errors to either side of a value; nothing where the error is not known."""
    if stderr is None:
        return
    error = {"xerr" if horizontal else "yerr": STDERRS * stderr}
    axes.errorbar(x, y, **error, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.8, capthick=0.8)


def line(axes: Axes, rows: Sequence[Any], style: Style, *, label: str, **how: Any) -> None:
    """A series of rows along `x` with markers and intervals; holes interrupt the line."""
    x = [row["x"] for row in rows]
    y = [float("nan") if row["y"] is None else row["y"] for row in rows]
    axes.plot(x, y, **({"color": style.color, "marker": style.marker, "label": label} | how))
    for row in rows:
        if row["y"] is not None:
            interval(axes, row["x"], row["y"], row.get("stderr"), color=how.get("color", style.color))


def paper_mark(axes: Axes, x: Any, y: Any, *, color: str = BLACK, **how: Any) -> None:
    """A hollow diamond: a value that the paper prints."""
    wanted = {"marker": "D", "markersize": 5, "markeredgecolor": color, "markerfacecolor": "white", "linestyle": "none"}
    axes.plot(x, y, **(wanted | {"zorder": 5, "markeredgewidth": 1.0} | how))


def paper_handle(label: str = "printed in the paper") -> Any:
    """The hollow diamond for a legend."""
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], marker="D", markersize=5, linestyle="none", markerfacecolor="white", markeredgecolor=BLACK, label=label
    )


def hole_handle(label: str) -> Any:
    """The hatched box for a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor="white", edgecolor=GREY, hatch="////", linewidth=0, label=label)


def bar(axes: Axes, x: float, row: Any, how: Style, *, width: float = 0.8, label: str | None = None) -> None:
    """A bar with its interval, or the hole in its place. Set the axis' limits before."""
    if row["y"] is None:
        hole(axes, reason(row), x=x, width=width)
        return
    axes.bar(x, row["y"], width, color=how.color, hatch=how.hatch, edgecolor="white", linewidth=0, label=label)
    interval(axes, x, row["y"], row.get("stderr"))


def hole(axes: Axes, text: str, *, x: float | None = None, width: float = 0.8, ticks: bool = False) -> None:
    """Show that something is missing, and why: a hatched box over the whole panel, or over one place on the x axis.

    text:  the reason, wrapped to the box and cut where it is too long; the CSV has it whole.
    x:     centre of the place in units of the axis; `width` in the same. Set the axis' limits before. A place's box is
           as high as the panel and its text stands upright.
    ticks: keep the axes' numbers: other things are drawn over the hole.
    """
    from matplotlib.patches import Rectangle

    size = axes.get_window_extent()  # before the layout is made: near enough to choose line breaks
    across, up = size.width / axes.figure.dpi, size.height / axes.figure.dpi
    if x is None:
        if not ticks:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
        centre, transform, corner, extent, rotation = 0.5, axes.transAxes, 0.0, 1.0, 0
        shown = fit(text, across, up)
    else:
        low, high = axes.get_xlim()
        centre, transform, corner, extent, rotation = x, axes.get_xaxis_transform(), x - width / 2, width, 90
        shown = fit(text, up, across * width / abs(high - low))
    axes.add_patch(
        Rectangle(
            (corner, 0.0),
            extent,
            1.0,
            transform=transform,
            facecolor="white",
            edgecolor=PALE,
            hatch="////",
            linewidth=0,
            zorder=1.5,
        )
    )
    axes.text(
        centre,
        0.5,
        shown,
        transform=transform,
        rotation=rotation,
        ha="center",
        va="center",
        size=SMALL,
        color=GREY,
        zorder=1.6,
        clip_on=True,
        parse_math=False,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def fit(text: str, length: float, depth: float) -> str:
    """Wrap a text to lines of `length` inches and cut it after as many as `depth` inches hold, at least one."""
    letters = _letters(0.92 * length, SMALL)
    lines = textwrap.wrap(" ".join(text.split()), letters)
    most = max(1, int(0.95 * depth * 72 / (1.25 * SMALL)))
    if len(lines) > most:
        last = lines[most - 1][: letters - 2].rstrip()
        lines = [*lines[: most - 1], f"{last} …"]
    return "\n".join(lines)


def reason(row: Any) -> str:
    """A hole's reason for `hole`: `absent: …`."""
    return f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]


def statement(axes: Axes, y: float, text: str) -> None:
    """A dashed line at a value that the paper's text states, with what it says."""
    axes.axhline(y, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1.2)
    axes.annotate(
        text,
        (0.01, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 1.5),
        textcoords="offset points",
        va="bottom",
        size=SMALL,
        color=GREY,
    )


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Name the x axis and give it whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("MoE layer (from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if layers:
        pad = 0.3 + 0.02 * (max(layers) - min(layers))  # so that no marker is cut
        axes.set_xlim(min(layers) - pad, max(layers) + pad)


def legend(axes: Axes, holes: Sequence[Any] = (), *, of: Axes | None = None, **how: Any) -> int:
    """A legend at the right of the axes; series without a value (`holes`) stand in it hatched, with their reason.

    of: whose series it lists, where they are not those of `axes`; it then stands inside `axes`.

    Returns:
        How many lines of text it has.
    """
    handles, labels = (of or axes).get_legend_handles_labels()
    for row in holes:
        text = textwrap.shorten(f"{row['series']}: {reason(row)}", 100, placeholder=" …")
        handles.append(hole_handle(text))
        labels.append(textwrap.fill(text, 24 if of is None else 30))
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    if handles:
        axes.legend(handles, labels, **((beside if of is None else {}) | how))
    return sum(label.count("\n") + 1 for label in labels)
