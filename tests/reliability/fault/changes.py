"""What changes between runs: a method's options, a protocol, a seed; and two workflows on one results folder."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from reliability.fault.children import Child, Ended, kill_self, run
from reliability.fault.judge import LOST, REFUSED, SAME, UNNAMED, USED, Bad, Fault, Outcome, require_named_refusal
from reliability.fault.repository import MODEL, SUITE
from reliability.fault.workshop import Job, Workshop, content, job, outputs

from mobie.paths import PACKAGE, Layout


def _edit(layout: Layout, folder: str, name: str, change: Callable[[dict], None]) -> None:
    path = layout.config_file(folder, name)
    value = yaml.safe_load(path.read_text())
    change(value)
    path.write_text(yaml.safe_dump(value))


def _bits(layout: Layout) -> None:
    _edit(layout, "methods", "rtn-w3", lambda value: value["options"].update(bits=2))


def _regularization(layout: Layout) -> None:
    _edit(layout, "methods", "mobie", lambda value: value["options"].update(regularization=0.7))


def _sequences(layout: Layout) -> None:
    _edit(layout, "suites", SUITE, lambda value: value.update(calibration={"sequences": 3, "length": 32}))


def _windows(layout: Layout) -> None:
    def change(value: dict) -> None:
        for part in value["perplexity"]:
            part["window"] = 24

    _edit(layout, "protocols", SUITE, change)


def _seed(layout: Layout) -> None:
    _edit(layout, "suites", SUITE, lambda value: value.update(seed=1))


#: what is changed → the change, the jobs that it makes stale in the order of their inputs
CHANGES: dict[str, tuple[Callable[[Layout], None], tuple[str, ...]]] = {
    "bits of rtn-w3": (_bits, ("quantize rtn-w3",)),
    "an option of mobie": (_regularization, ("quantize mobie", "score-perplexity")),
    "calibration sequences": (_sequences, ("calibrate", "quantize mobie", "score-perplexity")),
    "windows of the protocol": (_windows, ("windows", "score-perplexity")),
    "the suite's seed": (_seed, ("calibrate", "quantize mobie", "score-perplexity")),
}


def changed(workshop: Workshop, chance: random.Random, what: str) -> Outcome:
    """Change a configuration over finished results, kill the first stale job, score what is half new, run again.

    The end is to be as if the changed configuration had been the first; a half-new checkpoint is not scored; a change
    back gives the old bytes.
    """
    change, names = CHANGES[what]
    jobs = [job(name) for name in names]
    expected = _from_nothing(workshop, change, jobs)
    root = workshop.copy()
    change(Layout(root))
    stale = next(one for one in jobs if one.name.startswith(("quantize", "windows")))
    for one in jobs[: jobs.index(stale)]:
        _require_done(run(Child(root, one.arguments)), one)
    at = chance.randint(1, max(1, workshop.ended[stale.name].events))
    ended = run(Child(root, stale.arguments, at=at, strike=kill_self))
    told = "killed" if ended.killed else "done"
    if ended.killed and jobs[-1] is not stale:
        told += _score_half(root, jobs[-1], expected)
    for one in jobs[jobs.index(stale) :]:
        _require_done(run(Child(root, one.arguments)), one)
    got = _contents(root, jobs)
    different = [name for name in expected if got.get(name) != expected[name]]
    if different:
        raise Bad(USED, f"{what} changed, {stale.name} killed at file event {at}: {different} differ from a new run")
    return Outcome(f"{what} changed, {stale.name} {told} at file event {at}", SAME)


def _from_nothing(workshop: Workshop, change: Callable[[Layout], None], jobs: list[Job]) -> dict[str, str]:
    """Contents of the jobs' outputs where the changed configuration is the first."""
    root = workshop.copy(without=jobs)
    change(Layout(root))
    for one in jobs:
        _require_done(run(Child(root, one.arguments)), one)
    return _contents(root, jobs)


def _contents(root: Path, jobs: list[Job]) -> dict[str, str]:
    files = {path for one in jobs for path in outputs(root, one)}
    return {path.relative_to(root).as_posix(): content(path) for path in sorted(files)}


def _require_done(ended: Ended, one: Job) -> None:
    if ended.status != 0:
        raise Bad(LOST, f"{one.name}: status {ended.status}: {ended.output[-1500:]}")


def _score_half(root: Path, score: Job, expected: dict[str, str]) -> str:
    """Score while the checkpoint is half old, half new: refused, or all of it still old or already new."""
    ended = run(Child(root, score.arguments))
    if ended.status != 0:
        require_named_refusal(ended)
        return ", scoring it refused,"
    name = score.outputs[0]
    base = root.parent / "base" / name
    if content(root / name) not in (expected[name], content(base)):
        raise Bad(USED, f"{score.name} of a half-new checkpoint is neither the old value nor the new one")
    return ", scored whole,"


TARGET = f"results/{SUITE}/{MODEL}/rtn-w3/s0/quantize.json"


def _snakemake(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", f"suite={SUITE}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_for_lock(root: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list((root / ".snakemake" / "locks").glob("*")):
        time.sleep(0.05)


def second_workflow(workshop: Workshop, chance: random.Random) -> Outcome:
    """A second workflow on the folder of a running one is refused and says so; the first ends well."""
    root = workshop.copy(without=[job("quantize rtn-w3")])
    first = _snakemake(root, "--", TARGET)
    _wait_for_lock(root, first)
    second = _snakemake(root, "--", TARGET)
    output, _ = second.communicate(timeout=300)
    first_output, _ = first.communicate(timeout=600)
    if first.returncode != 0:
        raise Bad(LOST, f"the first workflow fails: {first_output[-1500:]}")
    if second.returncode != 0 and "lock" not in output.lower():
        raise Bad(UNNAMED, f"the second workflow does not name the lock: {output[-1500:]}")
    _require_target(workshop, root)
    return Outcome("a second workflow on the folder of a running one", REFUSED if second.returncode else SAME)


def killed_workflow(workshop: Workshop, chance: random.Random) -> Outcome:
    """A workflow killed with its jobs leaves a lock: the next one names `--unlock`, and ends well after it."""
    root = workshop.copy(without=[job("quantize rtn-w3")])
    first = _snakemake(root, "--", TARGET)
    _wait_for_lock(root, first)
    time.sleep(chance.uniform(0, 6))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = _snakemake(root, "--", TARGET)
    output, _ = second.communicate(timeout=600)
    if second.returncode != 0 and "--unlock" not in output:
        raise Bad(UNNAMED, f"the next workflow does not name the remedy: {output[-1500:]}")
    if second.returncode != 0:
        _snakemake(root, "--unlock").communicate(timeout=300)
        third = _snakemake(root, "--", TARGET)
        output, _ = third.communicate(timeout=600)
        if third.returncode != 0:
            raise Bad(LOST, f"after --unlock the workflow fails: {output[-1500:]}")
    _require_target(workshop, root)
    return Outcome("a workflow killed with its jobs", REFUSED if second.returncode else SAME)


def _require_target(workshop: Workshop, root: Path) -> None:
    names = [path.relative_to(workshop.base).as_posix() for path in outputs(workshop.base, job("quantize rtn-w3"))]
    differences = workshop.differences(root, names)
    if differences:
        raise Bad(LOST, f"after the workflow: {differences}")


WORKFLOWS: dict[str, Fault] = {"second workflow": second_workflow, "killed workflow": killed_workflow}
