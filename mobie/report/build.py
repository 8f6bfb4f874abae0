"""The report: one HTML file with every verdict, table, figure and record of a suite. No model, no network, no torch.

It reads records, logs of jobs and the drawn figures, and nothing that depends on the time or place of building: the
same files give the same bytes. The page's parts lie in `templates/` and are put into the one file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobie.comparable import comparability, gated_models
from mobie.config import config_names, load_suite
from mobie.figures import collect_figure, figure_records, figures_of
from mobie.figures.figure import FigureData, to_csv
from mobie.figures.seal import read_svg
from mobie.paper.audit import audit
from mobie.paper.audit.report import ABOUT, HEADINGS
from mobie.paths import PACKAGE, Layout
from mobie.report.cells import table_view
from mobie.report.claims import claim_about
from mobie.report.record_view import Tidy, path_stripper, record_view
from mobie.report.svg import inline_svg
from mobie.results import Results
from mobie.storage import write_text
from mobie.tables import build_table, table_records, tables_of
from mobie.verdicts import MEANING, judge, verdict_records
from mobie.verdicts.write import INTERVALS

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = PACKAGE / "report" / "templates"
#: the figure that stands at the head of the page
FRONT_FIGURE = "pareto"
FILES = ("svg", "pdf", "png", "csv")


@dataclass(frozen=True)
class FigureView:
    """A figure of the report.

    svg:     its drawing as an element; None where it is not drawn.
    stale:   the CSV beside the drawing does not hold the values that the records have now, e.g. another suite's.
    links:   names and addresses of its files.
    command: how to draw it.
    """

    data: FigureData
    svg: str | None
    stale: bool
    links: tuple[tuple[str, str], ...]
    command: str


def report_records(suite: str, layout: Layout) -> list[Path]:
    """The records that the report of a suite reads: those of its tables, figures and verdicts."""
    config = load_suite(suite, layout)
    found = [path for name in tables_of(config) for path in table_records(name, suite, layout)]
    found += [path for name in figures_of(config) for path in figure_records(name, suite, layout)]
    return list(dict.fromkeys([*found, *verdict_records(suite, layout)]))


def write_report(suite: str, layout: Layout, tidy: Tidy | None = None) -> Path:
    """Write `results/report.html`; returns its path. `tidy` as in `build_report`.

    Raises:
        ConfigError: no such suite.
        DataError: a record or a figure is damaged.
        StorageError: the system refused to write.
    """
    write_text(layout.report, build_report(suite, layout, tidy))
    return layout.report


def build_report(suite: str, layout: Layout, tidy: Tidy | None = None) -> str:
    """The page as text; whatever is missing is a hole with its reason. Raises `ConfigError`, `DataError`.

    `tidy` is applied to every text; by default it makes paths of this repository and of the home folder short.
    """
    results = Results(suite, layout)
    tidy = tidy or path_stripper(layout.root.resolve(), Path.home())
    verdicts = judge(results)
    shown = [results, *comparisons(suite, layout)]
    tables = [table_view(build_table(name, one), tidy) for one in shown for name in tables_of(one.suite)]
    figures = {name: figure_view(collect_figure(name, one), layout) for one in shown for name in figures_of(one.suite)}
    records = [record_view(path, layout, tidy) for path in sorted(path for one in shown for path in one.asked)]
    return (
        environment(tidy)
        .get_template("report.html")
        .render(
            suite=suite,
            description=results.suite.description,
            warnings=suite_warnings(results),
            verdicts=verdicts,
            meaning=MEANING,
            intervals=INTERVALS,
            claim_about=lambda claim: claim_about(claim, tidy),
            front=figures.pop(FRONT_FIGURE, None),
            tables=tables,
            figures=figures,
            audit=audit(PACKAGE / "paper"),
            audit_about=ABOUT,
            audit_headings=HEADINGS,
            records=records,
            statuses=dict(sorted(Counter(record["status"] for record in records).items())),
        )
    )


def comparisons(suite: str, layout: Layout) -> Iterator[Results]:
    """Other suites that compare per stored bit and have records: a suite's page shows their tables and figures too."""
    for name in config_names("suites", layout):
        config = load_suite(name, layout)
        if name != suite and config.beyond is not None:
            asked = [path for table in tables_of(config) for path in table_records(table, name, layout)]
            if any(path.exists() for path in asked):
                yield Results(name, layout)


def suite_warnings(results: Results) -> list[str]:
    """What a reader must know before any number: which models these are, and how small the samples."""
    targets = (*tables_of(results.suite), *figures_of(results.suite))
    models = {model.name: model for name in targets for model in results.models(name)}
    found = [
        f"**{model.label}**: {model.config.notes}" for model in models.values() if model.config and model.config.notes
    ]
    others = [model.label for model in models.values() if not model.in_paper]
    if others:
        found.insert(0, f"Not the paper's models ({', '.join(others)}): direction only, not a verdict on its numbers.")
    limit = results.protocol.tasks.limit
    if limit is not None:
        found.append(f"At most {limit} items of every task are scored.")
    found += [
        f"**{model.label}** is {told.sentence}."
        for model in gated_models(results)
        if model.in_paper and (told := comparability(results, model)).state != "yes"
    ]
    return found


def figure_view(data: FigureData, layout: Layout) -> FigureView:
    """A figure with its drawing, where that was made. Raises `DataError` where it is no SVG."""
    path = layout.figure(data.name, "svg")
    svg = None
    if path.exists():
        svg = inline_svg(read_svg(path).decode(), f"{data.name}-drawing", f"{data.heading}. {data.caption}")
    files = {suffix: layout.figure(data.name, suffix) for suffix in FILES}
    links = tuple(
        (suffix.upper(), Path(os.path.relpath(file, layout.report.parent)).as_posix())
        for suffix, file in files.items()
        if file.exists()
    )
    values = files["csv"].read_bytes() if files["csv"].exists() else None
    stale = svg is not None and values != to_csv(data).encode()
    suite = "" if data.suite == "smoke" else f" --config suite={data.suite}"
    command = f"snakemake --cores 1 {path.relative_to(layout.root).as_posix()}{suite}"
    return FigureView(data, svg, stale, links, command)


def environment(tidy: Tidy) -> Environment:
    """Templates with everything escaped, and `tidy` applied to every text that is put in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def finalize(value: Any) -> Any:
        return tidy(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def asset(name: str) -> Markup:
        return Markup((TEMPLATES / name).read_text(encoding="utf-8"))

    def marked(text: str) -> Markup:
        """Markdown's `**strong**` and `` `code` ``, the two that notes of tables use."""
        html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(tidy(text))))
        return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", html))

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    found.globals |= {"asset": asset}
    found.filters |= {"marked": marked, "slug": lambda text: re.sub(r"\W+", "-", text.lower()).strip("-")}
    return found
