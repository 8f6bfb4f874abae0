"""At least two hundred seeded faults: killed jobs, full disks, damaged files, no memory, no network, two jobs at once.

    python -m tests.reliability faults --count 200 --seed 0
    python -m tests.reliability faults --only 17              one of them again
    python -m tests.reliability faults --kind "flipped or cut: record" --count 20

All faults are done to a small repository made for it in a temporary folder, with a model of two blocks and a data
wheel of a few rows. Fault number N of seed S is always the same one, except for kills after a time and two jobs at
once, where the machine decides what is hit. Nothing may be lost, nothing damaged may be used, the next run has to end
with the bytes of the undisturbed one, and every failure has to name its cause: else the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from reliability.fault.judge import VERDICTS, Bad, Outcome
from reliability.fault.plan import PLAN, Entry, chosen
from tqdm import tqdm
from working_copy import working_copy

from mobie.config import default_layout
from mobie.reliability import Finding, command_of, save_finding

COLUMNS = ("fault", "tried", *VERDICTS)
NOTES = (
    "Same bytes: the next run of the job ends with the bytes of the undisturbed run (of records all but times and "
    "machine); files of other jobs are untouched to the time of their last change; no temporary file is left.",
    "Refused: exit status 2 and one message that names the file or the cause and says what to do, or a record with the "
    "status `oom`; after the remedy the same is required.",
    "Out of memory is torch's error of a GPU raised on a CPU, Python's own error, or a real limit on the process.",
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the harness."""
    kinds = "\n".join(f"  {name}" for name in dict.fromkeys(entry.kind for entry in PLAN))
    parser = argparse.ArgumentParser(
        prog=command_of("faults"),
        description=f"{__doc__}\nkinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=200, help="faults to do (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is left to chance (default: 0)")
    parser.add_argument("--kind", action="append", help="only faults of kinds that begin so; may be given again")
    parser.add_argument("--only", type=int, help="only the fault of this number, again")
    parser.add_argument("--quick", action="store_true", help="leave out the jobs that take long")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the faults (default: 1)")
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # the second half, in the copy of the sources
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Do the faults and save the finding; a part of them is told and not saved."""
    options = parse(arguments)
    if options.inside is not None:
        return inside(options)
    outcomes = collect(arguments, options.keep, options.jobs)
    shown = [
        f"{row[0]}: {', '.join(f'{n} {v}' for n, v in zip(row[1:], COLUMNS[1:], strict=True) if n)}"
        for row in rows_of(outcomes)
    ]
    print("\n".join(shown))
    bad = [outcome for outcome in outcomes if outcome["verdict"] in VERDICTS[2:]]
    for outcome in bad:
        print(
            f"fault {outcome['number']} of seed {options.seed}, {outcome['verdict']}: {outcome['what']}\n"
            f"  {outcome['detail']}"
        )
    if options.kind is None and options.only is None and not options.quick:
        command = f"{command_of('faults')} --count {options.count} --seed {options.seed}"
        title = f"{len(outcomes)} faults, {len(bad)} of them not survived"
        rows = tuple(tuple(row) for row in rows_of(outcomes))
        print(save_finding(Finding("faults", title, command, COLUMNS, rows, not bad, NOTES), default_layout()))
    return 1 if bad else 0


def rows_of(outcomes: list[dict]) -> list[list]:
    """A line for each kind of fault, and one for all."""
    kinds = dict.fromkeys(outcome["kind"] for outcome in outcomes)
    found = []
    for kind in [*kinds, "all"]:
        counts = Counter(o["verdict"] for o in outcomes if kind in (o["kind"], "all"))
        found.append([kind, sum(counts.values()), *(counts[verdict] for verdict in VERDICTS)])
    return found


def collect(arguments: list[str], keep: Path | None = None, jobs: int = 1) -> list[dict]:
    """Outcomes of the faults that `arguments` ask for, done by processes of their own in a copy of the sources."""
    with tempfile.TemporaryDirectory(prefix="mobie-faults-") as temporary:
        folder = (keep or Path(temporary)).resolve()
        processes = [_start(arguments, folder / str(part), part) for part in range(jobs)]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise RuntimeError(f"the harness itself broke down with status {statuses}")
        found = [json.loads((folder / str(part) / "outcomes.json").read_text()) for part in range(jobs)]
        return sorted((one for part in found for one in part), key=lambda one: one["number"])


def _start(arguments: list[str], folder: Path, part: int) -> subprocess.Popen[bytes]:
    """One process with its own copy of the sources, its own workshop and every so-manieth fault."""
    copy = working_copy(folder / "sources", resources=False)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (copy, copy / "tests"))),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HOME": str(folder / "cache"),
    }
    own = ["--inside", folder, "--part", str(part)]
    command = [sys.executable, "-m", "tests.reliability", "faults", *arguments, *own]
    return subprocess.Popen(command, cwd=copy, env=environment)


def inside(options: argparse.Namespace) -> int:
    """The second half: build the workshop, do the faults, write their outcomes."""
    from reliability.fault.network import Server
    from reliability.fault.preload import preload
    from reliability.fault.repository import MODEL, shrink_model
    from reliability.fault.workshop import JOBS, Workshop

    from mobie.paths import PACKAGE

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted is to be unmounted
    folder: Path = options.inside
    began = time.monotonic()
    with Server(folder) as server:  # before anything heavy is in the memory that it copies
        preload()
        shrink_model(PACKAGE / "assets" / MODEL)
        jobs = tuple(one for one in JOBS if not (options.quick and one.slow))
        workshop = Workshop(folder / "runs", server, jobs)
        workshop.build()
        print(f"undisturbed run of {len(workshop.ended)} jobs made in {time.monotonic() - began:.0f} s", flush=True)
        entries = chosen(options.count, options.seed, quick=options.quick)
        wanted = [(n, e) for n, e in enumerate(entries) if options.only in (None, n)][options.part :: options.jobs]
        wanted = [(n, e) for n, e in wanted if options.kind is None or e.kind.startswith(tuple(options.kind))]
        outcomes = []
        for number, entry in tqdm(wanted, "faults", disable=None):
            outcome = judged(workshop, entry, options.seed, number)
            outcomes.append({"number": number, "kind": entry.kind, **asdict(outcome)})
            if outcome.bad or not sys.stderr.isatty():
                detail = f"\n     {outcome.detail}" if outcome.bad else ""
                print(f"{number:4} {outcome.verdict:16} {outcome.what}{detail}", flush=True)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    return 0


def judged(workshop: object, entry: Entry, seed: int, number: int) -> Outcome:
    """Do one fault; the number and the seed decide all that is left to chance."""
    try:
        return entry.do(workshop, random.Random(f"{seed}/{number}"))
    except Bad as bad:
        return Outcome(entry.name, bad.verdict, str(bad))
