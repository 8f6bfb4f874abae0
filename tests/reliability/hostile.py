"""Hostile programs in the sandbox, many times, in a random order and mixed with programs that are right.

Every program gives the right answer only if its attack worked. After each round this machine is looked at: the secrets,
the folders and the port laid out for the programs, the processes, the temporary folders.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from hostile_programs import BENIGN, NAMES, PROBLEM, lay_bait
from tqdm import tqdm

from mobie.paths import Layout, find_root
from mobie.reliability import Finding, save_finding
from mobie.sandbox import Limits, Runtime, Sample, Verdict, find_runtime, run_samples

BENIGN_NAME = "(right programs, among them)"
LIMITS = Limits(seconds=20.0, memory_mb=768)


@dataclass
class Tally:
    """What came of one program: verdicts, and the reasons that the sandbox gave."""

    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        self.verdicts[str(verdict.base)] += 1
        self.reasons[verdict.detail.removeprefix("base: ")] += 1


def one_round(runtime: Runtime, choice: random.Random, tally: dict[str, Tally], workers: int, bar: tqdm) -> list[str]:
    """Run every program once, shuffled, a right one after every third; returns the harm done, in words."""
    with tempfile.TemporaryDirectory(prefix="mobie-bait-") as folder, lay_bait(Path(folder)) as bait:
        Path(folder).chmod(0o777)  # anyone who got here could write
        before = temporary_names()
        programs = list(bait.programs().items()) + [(BENIGN_NAME, BENIGN)] * (len(NAMES) // 3)
        choice.shuffle(programs)
        samples = [Sample(PROBLEM["task_id"], index, program) for index, (_, program) in enumerate(programs)]
        problems = {PROBLEM["task_id"]: PROBLEM}
        told = lambda _: bar.update()  # noqa: E731
        verdicts = run_samples(problems, samples, LIMITS, runtime, "humaneval", told, workers)
        for (name, _), verdict in zip(programs, verdicts, strict=True):
            tally[name].add(verdict)
        harm = bait.harm()
        harm += [f"{name} was written" for name in sorted(temporary_names() - before)]
        harm += [f"process {child.pid} ({child.name()})" for child in psutil.Process().children(recursive=True)]
    return harm


def temporary_names() -> set[str]:
    """Files in this machine's temporary folders with the names that the programs give theirs: numbers, mostly."""
    paths = [path for folder in ("/tmp", "/var/tmp", "/dev/shm") for path in Path(folder).iterdir()]
    return {str(path) for path in paths if path.name.isdigit() or path.name.startswith("written-by-")}


def wrong(tally: dict[str, Tally]) -> list[str]:
    """Hostile programs that passed, right ones that did not."""
    found = [f"{name} passed" for name, counted in tally.items() if name != BENIGN_NAME and counted.verdicts["pass"]]
    failed = sum(tally[BENIGN_NAME].verdicts.values()) - tally[BENIGN_NAME].verdicts["pass"]
    return found + ([f"{failed} right programs did not pass"] if failed else [])


def finding(tally: dict[str, Tally], harm: list[str], rounds: int, seed: int, runtime: Runtime) -> Finding:
    """The table: one row for each program."""
    rows = []
    for name in (*NAMES, BENIGN_NAME):
        verdicts = ", ".join(f"{verdict} {count}" for verdict, count in tally[name].verdicts.most_common())
        reason = tally[name].reasons.most_common(1)[0][0]
        rows.append((name, sum(tally[name].verdicts.values()), verdicts, reason))
    hostile = sum(sum(counted.verdicts.values()) for name, counted in tally.items() if name != BENIGN_NAME)
    facts = runtime.describe()
    kept = {"own id": "a user id of its own", "namespace": "a user namespace"}.get(str(facts.get("user")), "nothing")
    problems = wrong(tally) + harm
    notes = (
        "A program gives the right answer only if its attack worked: none may pass, and right programs beside it must.",
        "Looked at after each round: secret files in the home and in a temporary folder, files written there, "
        "connections to a listening port, processes left. "
        + ("Found: " + "; ".join(problems) if problems else "Nothing."),
        f"Runtime: {facts['kind']}, kept apart by {kept}; control groups: {'yes' if facts.get('cgroups') else 'no'}; "
        f"limits: {LIMITS.seconds:.0f} s, {LIMITS.memory_mb} MB, {LIMITS.processes} processes, {LIMITS.file_mb} MB of "
        "files.",
        "Not prevented: evalplus compares outputs in the program's own process, so a program written against evalplus "
        "itself (one that returns an object equal to everything) gets its verdict, though nothing else.",
    )
    return Finding(
        "hostile",
        f"{len(NAMES)} hostile programs, {hostile} runs",
        f"python -m tests.reliability hostile --rounds {rounds} --seed {seed}",
        ("program", "runs", "verdicts", "most frequent reason"),
        tuple(rows),
        not problems,
        notes,
    )


def main(arguments: list[str]) -> int:
    """Run the rounds, save the finding; 0 when nothing happened that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability hostile", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times that every program is run (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--workers", type=int, default=4, help="containers at once (default 4)")
    options = parser.parse_args(arguments)
    layout = Layout(find_root())
    runtime = find_runtime(unsandboxed=False, layout=layout)
    choice = random.Random(options.seed)
    tally = {name: Tally() for name in (*NAMES, BENIGN_NAME)}
    harm: list[str] = []
    with tqdm(total=options.rounds * (len(NAMES) + len(NAMES) // 3), unit="program") as bar:
        for _ in range(options.rounds):
            harm += one_round(runtime, choice, tally, options.workers, bar)
    found = finding(tally, harm, options.rounds, options.seed, runtime)
    path = save_finding(found, layout)
    print(f"{found.title}: {'nothing else happened' if found.passed else '; '.join(wrong(tally) + harm)}\n{path}")
    return 0 if found.passed else 1
