"""The verb `audit`."""

from __future__ import annotations

from pathlib import Path

import click

from mobie.errors import ConfigError


@click.command(name="audit", short_help="Check a paper's printed numbers against each other. Needs no model.")
@click.argument("folder", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option(
    "--save",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a .json, .md or .txt file instead of printing; may be given several times.",
)
def audit_command(folder: Path | None, as_json: bool, save: tuple[Path, ...]) -> None:
    """Check a paper's printed numbers against each other: averages, ranks, ratios, repeats, formulas, settings.

    FOLDER holds claims.yaml and the CSV files it names; without it, the paper of this suite is checked. Needs no
    model. What agrees is listed as well as what does not; a finding is not an error (exit status 0).

    \b
    python -m mobie audit
    python -m mobie audit --json
    python -m mobie audit path/to/another/paper --save audit.md
    """
    from mobie.paper.audit import audit, to_json, to_markdown, to_text
    from mobie.paths import PACKAGE
    from mobie.storage import write_text

    formats = {".json": to_json, ".md": to_markdown, ".txt": to_text}
    for path in save:
        if path.suffix not in formats:
            raise ConfigError(f"--save {path}: got suffix {path.suffix!r}, expected {', '.join(formats)}")
    report = audit(PACKAGE / "paper" if folder is None else folder)
    for path in save:
        write_text(path, formats[path.suffix](report))
        click.echo(path)
    if not save:
        click.echo((to_json if as_json else to_text)(report), nl=False)
