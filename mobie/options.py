"""What the verbs of the command line share: options that name a piece of work, and how a record is shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mobie.jobs.keys import Keys
    from mobie.records import Record

FILE = click.Path(path_type=Path, dir_okay=False)
SUITE = click.option("--suite", default="smoke", show_default=True, help="File in workflow/config/suites.")
MODEL = click.option("--model", help="File in workflow/config/models.  [default: the suite's first model]")
METHOD = click.option("--method", required=True, help="File in workflow/config/methods, or NAME+KEY=VALUE.")
SEED = click.option("--seed", type=click.IntRange(min=0), help="Of the calibration sample.  [default: the suite's]")
Decorated = Callable[..., Any]


class Verb(click.Command):
    """A command whose one-line help is shown whole."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(limit=200)


verb = partial(click.command, cls=Verb)


def keys_options(*, method: bool) -> Callable[[Decorated], Decorated]:
    """The options that name a piece of work."""

    def decorate(function: Decorated) -> Decorated:
        for option in (SEED, METHOD, MODEL, SUITE) if method else (SEED, MODEL, SUITE):
            function = option(function)
        return function

    return decorate


def checked_keys(suite: str, model: str | None, seed: int | None, method: str = "") -> Keys:
    """Check the names and fill in the suite's defaults. Raises `ConfigError`."""
    from mobie.config import default_layout, load_method, load_model_config, load_suite
    from mobie.jobs.keys import Keys

    layout = default_layout()
    config = load_suite(suite, layout)
    model = model or config.models[0]
    load_model_config(model, layout)
    if method:
        load_method(method, layout)
    return Keys(layout, suite, model, config.seed if seed is None else seed, method)


def show_record(record: Record) -> None:
    """Print what a job found."""
    outcome = record.status if record.reason is None else f"{record.status}: {record.reason}"
    click.echo(f"{record.kind} of {record.model} with {record.method}, seed {record.seed}: {outcome}")
    for m in record.measurements:
        error = "" if m.stderr is None else f" ± {m.stderr:.4f}"
        click.echo(f"  {m.name:32} {m.value:.4f}{error}  (n = {m.n})")
