"""The verb `plan`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mobie.options import verb

if TYPE_CHECKING:
    from mobie.jobs.cost import Allowance, Device

SUITE, MODELS, MIRROR, DEVICE, MEMORY = "suite", "models", "mirror", "device", "memory"
OTHERS = ("unsandboxed",)  # keys of the workflow that change nothing here
KEYS = (SUITE, MODELS, MIRROR, DEVICE, MEMORY, *OTHERS)
CANNOT = 3  # exit status: the machine cannot run it


@verb(name="plan")
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option(
    "--config", multiple=True, metavar="KEY=VALUE", help="As for Snakemake: suite=, models=, mirror=, device=, memory=."
)
@click.option("--machine", metavar="TEXT", help="Plan for another machine, e.g. gpu=1x24GB,ram=64GB,disk=500GB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def plan_command(targets: tuple[str, ...], config: tuple[str, ...], machine: str | None, as_json: bool) -> None:
    """Say what TARGET (default: all) needs before anything runs: jobs, hours, memory, disk, downloads, gated models.

    A target is a file that the workflow makes, or the name of a rule. Configuration files alone are read, which takes
    a second or two. A job is done when its files are there; whether its code changed since, `snakemake -n` says.

    Exit status: 0 this machine can run it, 3 it cannot (the message names the nearest thing that it can), 2 wrong
    input.

    \b
    python -m mobie plan
    python -m mobie plan results/table2.csv --config suite=paper
    python -m mobie plan --config suite=paper --config models=olmoe-1b-7b --machine gpu=1x24GB,ram=64GB,disk=500GB
    """
    from mobie.config import default_layout, load_suite
    from mobie.fetching.mirror import mirror_folder
    from mobie.jobs.needs import chosen_models
    from mobie.plan.budget import budget
    from mobie.plan.graph import Graph
    from mobie.plan.machine import parse_machine, this_machine
    from mobie.plan.nearest import layout_targets, mirror_problems, nearest, problems
    from mobie.plan.show import refusal, shown

    layout, values = default_layout(), _values(config)
    suite = values.get(SUITE, "smoke")
    wanted = layout_targets(targets or ("all",), layout)
    here = parse_machine(machine) if machine else this_machine(layout.root)
    graph = Graph(layout, suite, chosen_models(values.get(MODELS), layout))
    allowance = _allowance(values)
    found = budget(graph.jobs(wanted), layout, load_suite(suite, layout).methods, allowance)
    lacks = problems(found, here)
    offers = nearest(graph, wanted, found, here, allowance) if lacks else []
    mirror = mirror_folder(values.get(MIRROR) or os.environ.get("MOBIE_MIRROR"))
    reasons = lacks + mirror_problems(found, mirror, layout)
    if as_json:
        value = {
            "suite": suite,
            "targets": wanted,
            "total": found.total.as_dict(),
            "rules": {name: total.as_dict() for name, total in found.rules.items()},
            "models": {
                name: total.as_dict() | {"disk": found.disk[name].as_dict(), "quantize_core_hours": found.cores[name]}
                for name, total in found.models.items()
            },
            "disk": found.all_disk.as_dict(),
            "downloads": [asdict(download) for download in found.downloads],
            "gated": found.gated,
            "machine": {"gpus_mb": [g.mem_mb for g in here.gpus], "ram_mb": here.ram_mb, "disk_mb": here.disk_mb},
            "measured": {"cpu": True, "gpu": False},
            "fits": not reasons,
            "problems": reasons,
            "nearest": [{"command": offer.command, "leaves_out": offer.leaves_out} for offer in offers],
        }
        click.echo(json.dumps(value, indent=2, sort_keys=True))
    else:
        click.echo(shown(suite, wanted, found, here))
        if reasons:
            click.echo(refusal(here, reasons, offers), err=True)
    if reasons:
        raise SystemExit(CANNOT)


def _allowance(values: dict[str, str]) -> Allowance:
    """What `device=` and `memory=` give to quantizing. Raises `ConfigError` for a memory of another form."""
    from mobie.jobs.cost import Allowance
    from mobie.resources import AUTO, CPU, DEFAULT_MEMORY, parse_memory

    device = values.get(DEVICE) or os.environ.get("MOBIE_DEVICE") or AUTO
    memory = values.get(MEMORY) or os.environ.get("MOBIE_MEMORY") or DEFAULT_MEMORY
    chosen: Device | None = None if device == AUTO else "cpu" if device == CPU else "gpu"
    return Allowance(chosen, parse_memory(memory) / 2**20)


def _values(config: tuple[str, ...]) -> dict[str, str]:
    """The workflow's `KEY=VALUE`. Raises `ConfigError` for another form or an unknown key."""
    from mobie.errors import ConfigError, unknown_name

    values = {}
    for part in config:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--config {part}: expected KEY=VALUE, e.g. suite=paper")
        if key not in KEYS:
            raise ConfigError(f"--config: {unknown_name('key', key, KEYS)}")
        values[key] = value
    return values
