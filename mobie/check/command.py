"""The verb `check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command(name="check", short_help="Verify a results folder: schema, hashes, protocols, bits, tables.")
@click.argument(
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="results",
)
@click.option("--suite", help="Records, tables and figures of this suite only.  [default: all]")
@click.option("--quick", is_flag=True, help="Leave out the hashes of files of 1 MiB and more.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check_command(folder: Path, suite: str | None, quick: bool, as_json: bool) -> None:
    """Verify the results in FOLDER (default: results), without a model and apart from the code that made them.

    \b
    records      keys, status and reason, place, finite and possible values, standard errors from the listed items
    checkpoints  every shard against the manifest, the manifest against the record, bits from the stored bytes
    inputs       calibration, windows, mirror, wheels and models against the hashes that records name
    tables       rows measured under one protocol, with the same items and harness; values against their records
    figures      drawn values against the records

    One line per finding: an `error` (a number or a file cannot be trusted), a `warning` (to be looked at) or a `note`
    (rows of another commit, image or machine). Exit status: 0 no error, 1 errors, 2 wrong input.

    \b
    python -m mobie check results/
    python -m mobie check results/ --suite paper --quick
    python -m mobie check ~/unpacked/results --json
    """
    from mobie.check.run import Options, check

    report = check(folder, Options(suite, quick, progress=sys.stderr.isatty()))
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, sort_keys=True))
    else:
        for finding in report.ordered():
            click.echo(finding.line())
        click.echo(report.summary())
    if report.counts["error"]:
        raise SystemExit(1)
