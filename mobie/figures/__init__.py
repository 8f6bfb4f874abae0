"""The paper's figures and ours, one file each: records in, SVG, PDF, PNG and CSV out; seconds, no model.

A module has two functions. `collect(results: Results) -> FigureData` asks for records and never imports matplotlib.
`draw(data: FigureData) -> matplotlib.figure.Figure` draws what it got and reads nothing else; it runs inside the
project's style, and title and footer are put on by `render`, not by the figure. To add a figure is to add a file here
and its name to `FIGURES`.

`arrays` may hold what rows cannot; a figure's CSV has its rows only, so every drawn value must stand in a row.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mobie.config import SuiteConfig
from mobie.errors import ConfigError, unknown_name
from mobie.figures.figure import FigureData
from mobie.paths import Layout
from mobie.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (
    "fig1",
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "fig8",
    "fig9",
    "fig10",
    "fig11",
    "pareto",
    "diagnostics",
    "allocation",
    "expert_usage",
)
#: of suites with a comparison per stored bit, which have no others
BEYOND = ("dial", "calibration_size")
ALL_FIGURES = (*FIGURES, *BEYOND)


def figures_of(suite: SuiteConfig) -> tuple[str, ...]:
    """Figures that a suite consists of."""
    if suite.beyond is None:
        return FIGURES
    return tuple(name for name in BEYOND if name != "calibration_size" or suite.beyond.sizes)


def _module(name: str) -> ModuleType:
    if name not in ALL_FIGURES:
        raise ConfigError(unknown_name("figure", name, ALL_FIGURES))
    return importlib.import_module(f"mobie.figures.{name}")


def collect_figure(name: str, results: Results) -> FigureData:
    """What a figure shows, from the records of a suite.

    Raises:
        ConfigError: there is no such figure.
        DataError: a record is damaged.
    """
    return _module(name).collect(results)


def figure_records(name: str, suite: str, layout: Layout) -> list[Path]:
    """The records that a figure of a suite reads. Raises `ConfigError` for an unknown name."""
    plan = Results(suite, layout, plan=True)
    collect_figure(name, plan)
    return list(plan.asked)


def render(data: FigureData) -> Figure:
    """Draw a figure in the project's style, with its title above and its footer below."""
    import matplotlib

    from mobie.figures import style

    with matplotlib.rc_context(style.RC):
        figure = _module(data.name).draw(data)
        style.frame(figure, data)
    return figure


def write_figure(name: str, results: Results) -> list[Path]:
    """Write `paper_figures/NAME.{svg,pdf,png,csv}`; the same values give the same bytes. Returns the paths.

    Raises:
        ConfigError: there is no such figure.
        DataError: a record is damaged.
        StorageError: the system refused to write.
    """
    from mobie.figures.figure import to_csv
    from mobie.figures.seal import seal_svg
    from mobie.figures.style import picture
    from mobie.storage import write_bytes, write_text

    data = collect_figure(name, results)
    figure = render(data)
    paths = []
    for suffix in ("svg", "pdf", "png"):
        paths.append(results.layout.figure(name, suffix))
        drawn = picture(figure, data, suffix)
        write_bytes(paths[-1], seal_svg(drawn) if suffix == "svg" else drawn)
    paths.append(results.layout.figure(name, "csv"))
    write_text(paths[-1], to_csv(data))
    return paths
