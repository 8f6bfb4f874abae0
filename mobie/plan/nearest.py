"""What a machine cannot run of a plan, and the nearest thing that it can."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mobie.errors import ConfigError
from mobie.jobs.cost import DEFAULT, Allowance
from mobie.jobs.fetch import missing_in_mirror
from mobie.paths import Layout
from mobie.plan.budget import Budget, Sum, budget
from mobie.plan.graph import Graph
from mobie.plan.machine import Machine

SMALLER_SUITES = ("smoke", "tiny")


@dataclass(frozen=True)
class Offer:
    """Something that the machine can run instead: the command, and what it leaves out."""

    command: str
    leaves_out: str


def problems(found: Budget, machine: Machine) -> list[str]:
    """Why a machine cannot run a plan, one sentence each; empty where it can."""
    reasons = _memory_problems(found.total, machine)
    disk = found.all_disk
    if machine.disk_mb is not None and disk.total > machine.disk_mb:
        reasons.append(
            f"disk: {_gib(disk.total)} to write (downloads {_gib(disk.downloads)}, checkpoints "
            f"{_gib(disk.checkpoints)}, gradients {_gib(disk.gradients)}, at work {_gib(disk.work)}), "
            f"{_gib(machine.disk_mb)} free"
        )
    return reasons


def mirror_problems(found: Budget, mirror: Path | None, layout: Layout) -> list[str]:
    """Downloads that a local mirror lacks, in one sentence; by existence alone."""
    if mirror is None:
        return []
    lacking = [download.name for download in found.downloads if missing_in_mirror([download.name], mirror, layout)]
    return [f"mirror: it lacks files of {', '.join(lacking)}"] if lacking else []


def _memory_problems(total: Sum, machine: Machine) -> list[str]:
    reasons = []
    if total.gpu_mb and not machine.gpus:
        reasons.append(f"GPU: {total.gpu_job} needs one with {_gib(total.gpu_mb)}, there is none")
    elif total.gpu_mb > machine.gpu_mb:
        reasons.append(
            f"GPU memory: {total.gpu_job} needs {_gib(total.gpu_mb)}, the largest card has {_gib(machine.gpu_mb)}"
        )
    if machine.ram_mb is not None and total.host_mb > machine.ram_mb:
        reasons.append(f"memory: {total.host_job} needs {_gib(total.host_mb)}, there are {_gib(machine.ram_mb)}")
    return reasons


def _gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"


def nearest(
    graph: Graph, targets: Iterable[str], found: Budget, machine: Machine, allowance: Allowance = DEFAULT
) -> list[Offer]:
    """What the machine can run in place of a plan that it cannot, nearest first: fewer models, then a smaller suite."""
    targets = list(targets)
    offers = []
    fewer = _fewer_models(graph, targets, found, machine, allowance)
    if fewer:
        left_out = ", ".join(sorted(set(found.models) - set(fewer)))
        offers.append(Offer(command(targets, graph.suite, fewer), f"holes in place of {left_out}"))
    for suite in SMALLER_SUITES:
        if suite == graph.suite or offers:
            continue
        smaller = _budget_of(Graph(graph.layout, suite), targets, allowance)
        if smaller is not None and not problems(smaller, machine):
            offers.append(Offer(command(targets, suite), f"the models and the protocol of the suite {suite}"))
    return offers


def _budget_of(graph: Graph, targets: list[str], allowance: Allowance) -> Budget | None:
    """What targets take in another suite; None where it has no such target."""
    suites = {target.split("/")[1] for target in targets if target.startswith("results/") and target.count("/") > 1}
    if suites - {graph.suite}:
        return None
    try:
        return budget(graph.jobs(targets), graph.layout, allowance=allowance)
    except ConfigError:
        return None


def _fewer_models(
    graph: Graph, targets: list[str], found: Budget, machine: Machine, allowance: Allowance
) -> tuple[str, ...]:
    """The models whose jobs fit, without the largest ones if the disk is too small for all; empty: none fits."""
    fitting = [name for name, total in found.models.items() if not _memory_problems(total, machine)]
    fitting.sort(key=lambda name: found.disk[name].total)
    while fitting:
        smaller = _budget_of(Graph(graph.layout, graph.suite, tuple(fitting)), targets, allowance)
        if smaller is not None and not problems(smaller, machine):
            return tuple(name for name in found.models if name in fitting)
        fitting.pop()
    return ()


def command(targets: Iterable[str], suite: str, models: tuple[str, ...] | None = None) -> str:
    """The call of Snakemake that makes targets."""
    chosen = f" models={','.join(models)}" if models else ""
    return f"snakemake --cores all --config suite={suite}{chosen} -- {' '.join(targets)}"


def layout_targets(targets: Iterable[str], layout: Layout) -> list[str]:
    """Targets relative to the repository, as the workflow names them; `./results/x` and whole paths are taken too."""
    found = []
    for target in targets:
        path = (layout.root / target).resolve()
        inside = "/" in target and path.is_relative_to(layout.root.resolve())
        found.append(path.relative_to(layout.root.resolve()).as_posix() if inside else target)
    return found
