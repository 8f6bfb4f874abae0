"""The verb `doctor`."""

from __future__ import annotations

import json
import os

import click

from mobie.determinism import read_locally
from mobie.options import verb

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@verb(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def doctor_command(as_json: bool) -> None:
    """Examine this machine and environment: versions, devices, memory, disk, caches, containers, login, mirror.

    One line per finding: `ok`, `warn` (something the suite can do without, or that slows it down) or `fail`, with the
    remedy. Nothing is imported that may be missing, and no token or home folder is shown. What a target needs beside
    that, `python -m mobie plan TARGET` says.

    Exit status: 0 nothing failed, 1 something did.

    \b
    python -m mobie doctor
    python -m mobie doctor --json
    """
    from mobie.config import default_layout
    from mobie.doctor.checks import examine, has_login

    login = has_login(os.environ)
    read_locally()
    lines = examine(default_layout(), login)
    counts = {state: sum(line.state == state for line in lines) for state in COLOURS}
    if as_json:
        value = {"lines": [line.as_dict() for line in lines], "counts": counts}
        click.echo(json.dumps(value, indent=2, sort_keys=True))
    else:
        width = max(len(line.topic) for line in lines)
        for line in lines:
            state = click.style(f"{line.state:5}", fg=COLOURS[line.state])
            click.echo(f"{state}{line.topic:{width}}  {line.text}")
            if line.remedy:
                click.echo(f"{'':{5 + width}}  → {line.remedy}")
        click.echo(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["fail"]:
        raise SystemExit(1)
