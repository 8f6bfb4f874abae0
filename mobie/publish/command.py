"""The verbs `publish` and `rebuild`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mobie.determinism import set_environment
from mobie.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mobie.paths import Layout
    from mobie.publish.pack import Packed
    from mobie.publish.rebuild import Rebuilt

ARCHIVE = click.Path(path_type=Path, dir_okay=False)


@click.command(name="publish", short_help="Pack records, tables and figures of a suite into one archive.")
@click.option("--suite", default="smoke", show_default=True, help="File in workflow/config/suites.")
@click.option("--out", type=ARCHIVE, help="[default: results/mobie-SUITE-VERSION.zip]")
@click.option("--partial", is_flag=True, help="Pack a suite of which records are missing, and say which.")
def publish_command(suite: str, out: Path | None, partial: bool) -> None:
    """Pack a suite into one zip archive with a manifest: records, configuration, tables, figures, verdicts, report.

    Everything that is made of records is made anew from the packed ones, so the archive is whole in itself. The same
    records give the same bytes. Results are checked first, as by `python -m mobie check`.

    \b
    python -m mobie publish
    python -m mobie publish --suite paper --partial --out paper-so-far.zip
    """
    set_environment()
    import mobie
    from mobie.config import default_layout, load_suite
    from mobie.provenance import file_hash
    from mobie.publish.pack import publish

    layout = default_layout()
    load_suite(suite, layout)
    path = layout.archive(suite, mobie.__version__) if out is None else out
    if path.suffix != ".zip":
        raise ConfigError(f"--out {path}: got suffix {path.suffix!r}, expected .zip")
    _check(suite, layout)
    _tell(publish(suite, layout, path, partial=partial))
    click.echo(f"sha256 {file_hash(path)}")


def _check(suite: str, layout: Layout) -> None:
    """Refuse results that the checker finds errors in. Raises `DataError`."""
    from mobie.check.run import Options, check

    report = check(layout.report.parent, Options(suite, progress=sys.stderr.isatty()))
    errors = [finding.line() for finding in report.ordered() if finding.level == "error"]
    if errors:
        more = f"\n  and {len(errors) - 5} more: `python -m mobie check --suite {suite}`" if len(errors) > 5 else ""
        raise DataError(f"the results of suite {suite!r} cannot be trusted:\n  " + "\n  ".join(errors[:5]) + more)
    click.echo(report.summary())


def _tell(packed: Packed) -> None:
    manifest = packed.manifest
    roles = Counter(file.role for file in manifest.files.values())
    records = ", ".join(f"{count} {status}" for status, count in sorted(manifest.records.items()))
    click.echo(f"{packed.path}: {packed.path.stat().st_size:,} bytes")
    click.echo(f"{roles['record']} records ({records}), {roles['built']} files built from them")
    for hole in (*manifest.missing, *manifest.holes):
        click.echo(f"{hole.status}: {hole.path}: {' '.join(hole.reason.split())}")
    if manifest.commit is None or manifest.commit.endswith("+"):
        changed = "the clone has changes that are not committed" if manifest.commit else "this is no clone"
        click.echo(f"note: {changed}, so the commit in the manifest does not say which code this is", err=True)
    if packed.differing:
        told = ", ".join(packed.differing[:3]) + (", …" if len(packed.differing) > 3 else "")
        click.echo(
            f"note: {len(packed.differing)} files on disk are not what these records give ({told}): another suite's "
            "or old; the archive holds what the records give",
            err=True,
        )


@click.command(name="rebuild", short_help="Make all tables and figures of an archive again, and compare them.")
@click.argument("archive", type=ARCHIVE)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="[default: ARCHIVE without .zip]")
def rebuild_command(archive: Path, out: Path | None) -> None:
    """Make every table, figure, verdict and the report again from the records in ARCHIVE, and compare byte by byte.

    Needs no model, no GPU, no network and nothing of the machine that packed it. A damaged archive is refused. Exit
    status 2 where a file differs; the files are kept then.

    \b
    python -m mobie rebuild results/mobie-smoke-0.3.0.zip
    python -m mobie rebuild paper.zip --out paper
    """
    set_environment()
    from mobie.publish.rebuild import rebuild

    folder = archive.with_suffix("") if out is None else out
    done = rebuild(archive, folder, say=_line)
    if done.differing:
        raise DataError(_different(done, folder))
    click.echo(f"{folder}: all {len(done.outcomes)} files are equal to the archive's, byte by byte")


def _line(target: str, outcomes: dict[str, str]) -> None:
    for outcome, count in Counter(outcomes.values()).items():
        click.echo(f"{target}: {count} files {outcome}")


def _different(done: Rebuilt, folder: Path) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in done.manifest.versions.items())
    named = ", ".join(done.differing[:5]) + (" …" if len(done.differing) > 5 else "")
    return (
        f"{len(done.differing)} of {len(done.outcomes)} files are not the archive's: {named}; "
        f"it was packed by {done.packed_by}, with {libraries}. What was built here is in {folder}."
    )
