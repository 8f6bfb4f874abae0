"""Figure 4: the method as a diagram, drawn by code; it needs no record.

The composition is ours; what it says is Section 4 and Algorithm 1 of the paper, by equation number. One unit of the
canvas is a hundredth of an inch, its origin the lower left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from mobie.figures import style
from mobie.figures.figure import FigureData
from mobie.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 100 * style.FULL, 506.0
LEFT, BAND, CENTRE = 112.0, 136.0, 442.0  # where a stage begins after its name, its height, where stages are linked
BANDS = (364.0, 208.0, 52.0)  # lower edges of the three stages
INK, FAINT, REST, PAPER = "#222222", "#6b6b6b", "#c9c9c9", "#ffffff"
#: colour of a stage, and of its paper
STAGES = ((style.BLUE, "#eef5fa"), (style.VERMILION, "#fdf3ec"), (style.GREEN, "#ecf7f3"))
NAMES = (
    ("CEJD", "Cross-Expert\nJoint\nDecomposition"),
    ("GLAS", "Global\nLoss-Aligned\nSaliency"),
    ("NGES", "Null-Space\nGuided Expert-\nShift Suppression"),
)
EXPERTS = (r"W^{(1)}", r"W^{(2)}", r"\cdots", r"W^{(n)}")
FACTORS = (r"V^{(1)\top}", r"V^{(2)\top}", r"\cdots", r"V^{(n)\top}")
SMALL, BODY, HEAD = style.SMALL, 7.6, 10.0  # points

#: stage, what it does, the paper's equations: what the diagram says, for the CSV
STEPS = (
    (
        "CEJD",
        "the experts of a layer are concatenated and factored once: UΣ is shared, each V is its expert's own",
        "4",
    ),
    ("CEJD", "UΣ is kept in 8 bits, the V go on to be binarized", "4"),
    ("GLAS", "squared loss gradients weight the inputs: a guided Hessian per output channel", "5, 6, 7, 8"),
    ("GLAS", "saliency of a weight; its mean over a column is cut at the 95th percentile", "9"),
    ("GLAS", "first order for every column, a second order for the residual of the salient ones", "45, 46"),
    ("NGES", "projector P on the directions that inputs hardly use", "10"),
    ("NGES", "vectors β for rows and columns, in turn and in closed form, so that scales do what P would", "12, 13"),
    ("NGES", "β is multiplied into the scales: nothing more is stored", "11"),
)


def collect(results: Results) -> FigureData:
    """The steps of the method; no record is read."""
    rows = [
        {"panel": stage, "series": "step", "x": number, "text": text, "equations": equations, "y": None}
        | {"status": "ok", "reason": None}
        for number, (stage, text, equations) in enumerate(STEPS, 1)
    ]
    return FigureData(
        "fig4",
        results.suite_name,
        "the method in three stages",
        "MoBiE in three stages. CEJD: joint SVD of all experts of a layer, one basis that they share in 8 bits and a "
        "binarized factor for each expert. GLAS: saliency from loss-weighted Hessians decides which columns get a "
        "second order. NGES: the error is to lie where inputs hardly reach; row and column vectors imitate that "
        "projection and are multiplied into the scales. Numbers in parentheses are the paper's equations. Lines, "
        "bars and cells are drawings, not measurements.",
        tuple(rows),
        ("a diagram: it holds no measurement",),
    )


def draw(data: FigureData) -> Figure:
    """The diagram: a band for each stage, and below them what is stored."""
    figure = style.new_figure(height=HEIGHT / 100)
    figure.get_layout_engine().set(w_pad=0, h_pad=0, wspace=0, hspace=0)
    axes = figure.subplots()
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    for number in range(len(STAGES)):
        _band(axes, number)
    _draw_cejd(axes, BANDS[0], STAGES[0][0])
    _draw_glas(axes, BANDS[1], STAGES[1][0])
    _draw_nges(axes, BANDS[2], STAGES[2][0])
    _hand_over(axes, CENTRE, BANDS[0], r"$V^{(i)}$", STAGES[0][0])
    _hand_over(axes, CENTRE, BANDS[1], r"$\hat V^{(i)}$ with its scales $\alpha^{r},\,\alpha^{c}$", STAGES[1][0])
    _draw_stored(axes)
    return figure


# --- the three stages ------------------------------------------------------------------------------------------------


def _draw_cejd(axes: Axes, bottom: float, colour: str) -> None:
    block, low, high = 42.0, bottom + 40, 50.0
    middle = low + high / 2
    _text(axes, LEFT + 16 + 2 * block, bottom + 110, "experts of a layer, concatenated", weight="bold")
    for index, name in enumerate(EXPERTS):
        x = LEFT + 16 + index * block
        _matrix(axes, x, low, block - 2, high, 6, 5, _shades(colour, index))
        _label(axes, x + block / 2 - 1, middle, name)
    _text(axes, LEFT + 8, middle, r"$O$", size=SMALL)
    _text(axes, LEFT + 16 + 2 * block, low - 12, r"$nI$", size=SMALL)
    _arrow(axes, (LEFT + 188, middle), (LEFT + 236, middle), colour)
    _text(axes, LEFT + 210, middle + 12, "joint SVD")
    _text(axes, LEFT + 210, middle - 11, "(4)")

    basis, x = 50.0, LEFT + 246
    _matrix(axes, x, low, basis, high, 6, 6, _shades(colour, 2))
    _label(axes, x + basis / 2, middle, r"U\Sigma")
    _text(axes, x + basis / 2, bottom + 110, "shared:\n8 bits", weight="bold")
    _text(axes, x + basis + 10, middle, r"$\times$", size=HEAD)
    start, width = x + basis + 20, 58.0
    for index, name in enumerate(FACTORS):
        left = start + index * width
        _signs(axes, left, low, width - 3, high, 6, 8, colour, offset=index)
        _label(axes, left + width / 2 - 1.5, middle, name)
    _text(axes, start + 2 * width, bottom + 110, "one per expert: to be binarized", weight="bold")
    _text(axes, x + basis / 2, low - 12, r"rank $r=\min(O,\,nI)$", size=SMALL, colour=FAINT)


def _draw_glas(axes: Axes, bottom: float, colour: str) -> None:
    upper, lower = bottom + 78, bottom + 14
    _box(axes, LEFT + 2, bottom + 104, 88, 24, "inputs $X$", INK)
    _box(axes, LEFT + 2, bottom + 60, 88, 38, "loss gradients\n" r"$\partial\ell/\partial Z$", INK)
    for y in (bottom + 116, bottom + 86):
        _arrow(axes, (LEFT + 90, y), (LEFT + 104, y), INK)
    hessian = (
        r"$H_{\mathrm{global},j}=\sum_i\left(\frac{\partial\ell}{\partial Z_{ij}}\right)^{2}X_{i:}^{\top}X_{i:}$  (8)"
    )
    saliency = r"$s_{ij}=w_{ij}^{2}\,/\,[(H_{\mathrm{global},j}^{-1})_{ii}]^{2}$   (9)"
    _box(axes, LEFT + 105, upper, 158, 50, hessian, colour)
    _arrow(axes, (LEFT + 184, upper), (LEFT + 184, lower + 44), colour)
    _box(axes, LEFT + 105, lower, 158, 43, saliency, colour, size=BODY + 0.6)
    _arrow(axes, (LEFT + 263, lower + 22), (LEFT + 276, lower + 22), colour)
    _columns_by_saliency(axes, LEFT + 298, bottom + 12, 122, colour)
    _arrow(axes, (LEFT + 423, bottom + 92), (LEFT + 438, bottom + 98), FAINT)
    _arrow(axes, (LEFT + 423, bottom + 48), (LEFT + 438, bottom + 42), colour)
    _box(axes, LEFT + 439, bottom + 74, 124, 54, "", FAINT)
    _lines(
        axes,
        LEFT + 501,
        bottom + 118,
        ("every column:", "first order (45, 46)", r"$\alpha^{r}\cdot\mathrm{Sign}(V)\cdot\alpha^{c}$"),
        17,
        size=SMALL,
    )
    _box(axes, LEFT + 439, bottom + 12, 124, 54, "", colour)
    _lines(
        axes,
        LEFT + 501,
        bottom + 56,
        ("salient columns: also", "a second order, of the", "residual (B.3.3)"),
        17,
        size=SMALL,
    )


def _columns_by_saliency(axes: Axes, x: float, y: float, width: float, colour: str) -> None:
    """Bars of column saliency with the threshold, over the columns that they rank."""
    from matplotlib.patches import Rectangle

    heights = (0.18, 0.3, 0.12, 0.24, 0.86, 0.2, 0.34, 0.15, 0.27, 0.95, 0.22, 0.16, 0.3, 0.2)
    threshold, step, tall, base = 0.6, width / len(heights), 58.0, y + 34
    for index, height in enumerate(heights):
        shade = colour if height > threshold else REST
        left = x + index * step
        axes.add_patch(Rectangle((left + 1.2, base), step - 2.4, tall * height, facecolor=shade, lw=0))
        _signs(axes, left + 0.5, y, step - 1, 29, 5, 1, colour if height > threshold else FAINT, offset=index)
    axes.plot([x - 3, x + width], [base + tall * threshold] * 2, color=INK, lw=0.8, ls=(0, (4, 3)))
    _text(axes, x - 8, base + tall * threshold, r"$\tau$")
    _text(axes, x - 9, y + 14, r"$V^{(i)}$", size=SMALL)
    _text(axes, x + width / 2, base + tall + 12, r"column saliency $s_j=\frac{1}{n}\sum_i s_{ij}$")


def _draw_nges(axes: Axes, bottom: float, colour: str) -> None:
    _box(axes, LEFT + 2, bottom + 104, 88, 24, "inputs $X$", INK)
    _arrow(axes, (LEFT + 46, bottom + 104), (LEFT + 46, bottom + 86), INK)
    _spectrum(axes, LEFT + 2, bottom + 12, 92, 66, colour)
    _arrow(axes, (LEFT + 97, bottom + 44), (LEFT + 109, bottom + 44), colour)
    _box(axes, LEFT + 110, bottom + 12, 76, 72, "", colour)
    _lines(axes, LEFT + 148, bottom + 72, ("null-space", "projector", r"$P=U_1U_1^{\top}$", "(10)"), 16)
    _arrow(axes, (LEFT + 186, bottom + 44), (LEFT + 198, bottom + 44), colour)
    _box(axes, LEFT + 199, bottom + 12, 172, 102, "", colour)
    fit = (
        r"target $\Delta=W-(W-\hat W)\,P$",
        r"$\min_{\beta}\;\Vert\Delta-\beta^{r}\hat W\beta^{c}\Vert_F^2$",
        r"$+\,\lambda(\Vert\beta^{r}-1\Vert^{2}+\Vert\beta^{c}-1\Vert^{2})$  (12)",
        r"$\beta^{r},\,\beta^{c}$ in turn, closed form  (13)",
    )
    _lines(axes, LEFT + 285, bottom + 99, fit, 24)
    _arrow(axes, (LEFT + 371, bottom + 62), (LEFT + 384, bottom + 62), colour)
    _text(axes, LEFT + 474, bottom + 117, "fused into the scales  (11)", weight="bold")
    _text(axes, LEFT + 474, bottom + 101, "nothing more is stored", size=SMALL, colour=FAINT)
    _fused(axes, LEFT + 386, bottom + 36, colour)


def _spectrum(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Falling singular values with the near-zero ones set apart."""
    from matplotlib.patches import Rectangle

    values = (1, 0.72, 0.53, 0.4, 0.31, 0.24, 0.18, 0.14, 0.05, 0.04, 0.035, 0.03)
    step, base = width / len(values), y + 12
    for index, value in enumerate(values):
        shade = colour if value < 0.1 else REST
        axes.add_patch(Rectangle((x + index * step, base), step - 1.5, (height - 14) * value, facecolor=shade, lw=0))
    axes.plot([x - 1, x + width], [base, base], color=INK, lw=0.7)
    _text(axes, x + 10 * step, base + 11, r"$U_1$", colour=colour)
    _text(axes, x + 0.62 * width, base + 42, r"SVD of $XX^{\top}$")
    _text(axes, x + width / 2, y + 3, "singular values", size=SMALL, colour=FAINT)


def _fused(axes: Axes, x: float, y: float, colour: str) -> None:
    """Row scales, signs and column scales, as they are stored (eq. 11)."""
    rows, columns, cell = 6, 7, 8.6
    high, wide = rows * cell, columns * cell
    middle, below = y + high / 2, y - 12
    _text(axes, x + 13, middle, r"$\hat V^{(i)}=$")
    row = x + 33
    _matrix(axes, row, y, cell, high, rows, 1, _shades(colour, 3))
    _text(axes, row + cell / 2, below, r"$\alpha^{r}\odot\beta^{r}$")
    _text(axes, row + cell + 7, middle, r"$\cdot$", size=HEAD)
    signs = row + cell + 14
    _signs(axes, signs, y, wide, high, rows, columns, colour, offset=1)
    _text(axes, signs + wide / 2 + 2, below, r"$\mathrm{Sign}(V^{(i)})$")
    _text(axes, signs + wide + 7, middle, r"$\cdot$", size=HEAD)
    _matrix(axes, signs + wide + 13, middle - cell / 2, 32, cell, 1, 6, _shades(colour, 1))
    _text(axes, signs + wide + 31, below, r"$\alpha^{c}\odot\beta^{c}$")


def _draw_stored(axes: Axes) -> None:
    """What a layer stores in the end."""
    _text(axes, 10, 17, "stored per layer", align="left", weight="bold")
    parts = (
        (132, r"basis $U\Sigma$: 8 bits, shared"),
        (194, r"signs of $V^{(i)}$: 1 bit, salient columns 2"),
        (224, r"scales $\alpha\odot\beta$ by row and column: 16 bits"),
    )
    left = LEFT + 2
    for (width, text), (colour, _) in zip(parts, STAGES, strict=True):
        _box(axes, left, 4, width, 27, text, colour, size=SMALL)
        left += width + 7


# --- what they are drawn with ----------------------------------------------------------------------------------------


def _band(axes: Axes, number: int) -> None:
    """A stage's paper with its name."""
    from matplotlib.patches import FancyBboxPatch

    (colour, paper), (name, title), bottom = STAGES[number], NAMES[number], BANDS[number]
    shape = "round,pad=0,rounding_size=8"
    axes.add_patch(FancyBboxPatch((2, bottom), WIDTH - 4, BAND, shape, fc=paper, ec=colour, lw=1))
    _text(axes, 10, bottom + 96, f"{number + 1}  {name}", size=HEAD, weight="bold", colour=colour, align="left")
    _text(axes, 10, bottom + 60, title, align="left", size=SMALL)


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, *, size: float = BODY
) -> None:
    """A rounded box with centred text; `(x, y)` is its lower left corner."""
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=5"
    axes.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=PAPER, ec=colour, lw=0.9, zorder=2))
    _text(axes, x + width / 2, y + height / 2, text, size=size)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    how = {"arrowstyle": "-|>,head_length=0.3,head_width=0.16", "color": colour, "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=how, zorder=3)


def _hand_over(axes: Axes, x: float, y: float, label: str, colour: str) -> None:
    """A thick arrow from one stage to the next; `y` is the upper stage's lower edge."""
    from matplotlib.patches import FancyArrowPatch

    shape = "simple,head_length=7,head_width=12,tail_width=5"
    arrow = FancyArrowPatch((x, y + 8), (x, y - 27), arrowstyle=shape, facecolor=colour, edgecolor=PAPER, lw=0.8)
    arrow.set_zorder(6)
    axes.add_patch(arrow)
    _text(axes, x + 12, y - 10, label, align="left")


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = BODY,
    align: str = "center",
    weight: str = "normal",
    colour: str = INK,
) -> None:
    how = {"ha": align, "va": "center", "weight": weight, "color": colour, "zorder": 7, "linespacing": 1.35}
    axes.text(x, y, text, fontsize=size, in_layout=False, **how)


def _lines(axes: Axes, x: float, top: float, lines: Sequence[str], step: float, *, size: float = BODY) -> None:
    """Lines at equal distances, `top` the middle of the first: with formulas in them, matplotlib's own are uneven."""
    for index, text in enumerate(lines):
        _text(axes, x, top - index * step, text, size=size)


def _label(axes: Axes, x: float, y: float, formula: str) -> None:
    """A formula on a matrix, readable on its cells."""
    paper = {"boxstyle": "round,pad=0.15", "fc": PAPER, "ec": "none", "alpha": 0.9}
    axes.text(
        x, y, f"${formula}$", fontsize=BODY, ha="center", va="center", color=INK, bbox=paper, zorder=5, in_layout=False
    )


def _pattern(row: int, column: int, offset: int) -> int:
    """A number 0 … 10 that looks irregular, the same in every run."""
    return Random(f"figure 4, {row}, {column}, {offset}").randrange(11)


def _shades(colour: str, offset: int) -> Callable[[int, int], object]:
    """Tints of a colour by cell: what stands for values of many bits."""
    from matplotlib.colors import to_rgb

    def shade(row: int, column: int) -> tuple[float, ...]:
        strength = 0.2 + 0.07 * _pattern(row, column, offset)
        return tuple(1 - strength * (1 - part) for part in to_rgb(colour))

    return shade


def _matrix(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    rows: int,
    columns: int,
    shade: Callable[[int, int], object],
) -> None:
    """Cells in the colours that `shade(row, column)` gives, and a frame."""
    from matplotlib.patches import Rectangle

    across, up = width / columns, height / rows
    for row in range(rows):
        for column in range(columns):
            corner = (x + column * across, y + row * up)
            axes.add_patch(Rectangle(corner, across, up, facecolor=shade(row, column), lw=0))
    axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=INK, lw=0.5))


def _signs(
    axes: Axes, x: float, y: float, width: float, height: float, rows: int, columns: int, colour: str, *, offset: int
) -> None:
    """Cells of two kinds: what stands for signs."""

    def shade(row: int, column: int) -> object:
        return colour if _pattern(row, column, offset) < 5 else PAPER

    _matrix(axes, x, y, width, height, rows, columns, shade)
