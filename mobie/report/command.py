"""The verbs that build tables, figures, verdicts and documents from records: seconds, no model."""

from __future__ import annotations

import click

from mobie.determinism import set_environment
from mobie.options import SUITE, verb


@verb(name="table")
@click.argument("name")
@SUITE
def table_command(name: str, suite: str) -> None:
    """Build a table of a suite (table1 … table11, sensitivity, speed, gate) from the records that exist.

    The suite `beyond` has tables of its own: beyond, goals, ablation. What is missing is a hole with its reason. No
    model is needed.

    \b
    python -m mobie table table2
    python -m mobie table table10 --suite paper
    python -m mobie table goals --suite beyond
    """
    set_environment()
    from mobie.config import default_layout
    from mobie.results import Results
    from mobie.tables import build_table
    from mobie.tables.table import write_table

    layout = default_layout()
    for path in write_table(build_table(name, Results(suite, layout)), layout):
        click.echo(path)


@verb(name="figure")
@click.argument("name")
@SUITE
def figure_command(name: str, suite: str) -> None:
    """Draw a figure of a suite (fig1 … fig11, pareto, diagnostics, allocation) from the records that exist.

    The suite `beyond` has figures of its own: dial, calibration_size. What is missing is a visible hole with its
    reason. Needs no model.

    \b
    python -m mobie figure fig6
    python -m mobie figure pareto
    python -m mobie figure dial --suite beyond
    """
    set_environment()
    from mobie.config import default_layout
    from mobie.figures import write_figure
    from mobie.results import Results

    for path in write_figure(name, Results(suite, default_layout())):
        click.echo(path)


@verb(name="sensitivity")
@SUITE
def sensitivity_command(suite: str) -> None:
    """Rank the readings of the paper by how much they move the result.

    Reads the records of one run per reading; make them with `snakemake --cores all results/sensitivity.md`.

    \b
    python -m mobie sensitivity
    """
    set_environment()
    from mobie.config import default_layout
    from mobie.results import Results
    from mobie.tables import build_table
    from mobie.tables.table import to_markdown, write_table

    layout = default_layout()
    table = build_table("sensitivity", Results(suite, layout))
    write_table(table, layout)
    click.echo(to_markdown(table), nl=False)


@verb(name="claims")
@SUITE
def claims_command(suite: str) -> None:
    """Judge every statement of the paper with the records of a suite, beside the audit of the paper's own entries.

    Writes results/claims.csv, claims.md and claims.json. What has not run is `not run` with its reason.

    \b
    python -m mobie claims
    """
    set_environment()
    from mobie.config import default_layout
    from mobie.results import Results
    from mobie.verdicts import judge, write_claims

    layout = default_layout()
    verdicts = judge(Results(suite, layout))
    for path in write_claims(verdicts, layout):
        click.echo(path)
    click.echo("; ".join(f"{count} {verdict}" for verdict, count in verdicts.counts.items()))


@verb(name="report")
@SUITE
def report_command(suite: str) -> None:
    """Build results/report.html: verdicts, tables, figures and every record of a suite in one file.

    Reads the records, logs and drawn figures that exist; what is missing is a hole with its reason. Needs no model.

    \b
    python -m mobie report
    python -m mobie report --suite paper
    """
    set_environment()
    from mobie.config import default_layout
    from mobie.report.build import write_report

    click.echo(write_report(suite, default_layout()))


@verb(name="readme")
def readme_command() -> None:
    """Fill the generated parts of README.md from the results of the last run.

    \b
    python -m mobie readme
    """
    set_environment()
    from mobie.config import default_layout
    from mobie.report.readme import fill_readme

    click.echo(f"README.md: {', '.join(fill_readme(default_layout()))}")
