"""Whether two runs give the same bytes, and what threads and batches change.

The tiny suite runs in two copies of the repository: one job at a time with one hash seed, and two at a time, in another
order, with another hash seed. Every file that both made is compared: checkpoints, tokens, windows, gradients, tables
and figures byte by byte, records without what `mobie.records.stable` leaves out. Then MoBiE's and the full-precision
checkpoint are scored with other batches and threads, and quantized with two threads; these differences are measured
and stated, and are no fault.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from working_copy import ROOT, copy_environment, repository_files, snakemake, working_copy

from mobie.paths import Layout
from mobie.records import stable
from mobie.reliability import Finding, save_finding

SUITE, MODEL = "tiny", "nano-olmoe"
RUN = f"results/{SUITE}/{MODEL}"
#: a table and figures of each kind that three methods give, and the kinds of score that these do not read
TARGETS = (
    *("results/table2.csv", "results/table3.csv", "paper_figures/fig2.svg", "paper_figures/fig4.svg"),
    *(f"{RUN}/mobie/s0/{kind}.json" for kind in ("hard", "shift", "generations")),
)
#: made first in the second run: the last row's scores come there before those of the rows above
FIRST = (f"{RUN}/rtn-w3/s0/routing.json", f"{RUN}/mobie/s0/tasks.json")
#: folders of a model or a method that give their files their kind
PLACES = ("calibration", "windows", "gradients", "checkpoint")
COST = "cost.json"  # seconds, beside shared gradients
COLUMNS = ("compared", "with", "measured", "value")
METHODS = ("fp16", "mobie")
BATCHES = (1, 4)
THREADS = (1, 2)
SIZE = 1024


@dataclass
class Comparison:
    """Files of two runs: how many of each kind are equal, and which differ or are in one run only."""

    equal: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)


def kind_of(name: Path) -> str:
    """What a result file is."""
    place = next((part for part in name.parts if part in PLACES), None)
    if place == "checkpoint" and name.name == "README.md":
        return "model card"
    if place is None and f"/{SUITE}/" in f"/{name.as_posix()}" and name.suffix == ".json":
        return "record"
    return place or ("figure" if name.parts[0] == "paper_figures" else "table")


def content(path: Path, kind: str) -> bytes:
    """What of a file has to be the same in both runs."""
    if kind == "record":
        return json.dumps(stable(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
    if kind == "model card":  # it shows when its record was written
        return b"".join(line for line in path.read_bytes().splitlines(True) if not line.startswith(b"| finished |"))
    if kind == "gradients":  # the shared statistics carry the seconds that they cost
        return without_metadata(path.read_bytes())
    return path.read_bytes()


def without_metadata(data: bytes) -> bytes:
    """A safetensors file without what its header says beside names, types and places of tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + data[start:]


def result_files(folder: Path) -> set[Path]:
    """Files that a run made, relative to its folder, but for locks and what holds nothing but seconds."""
    files = [path for place in ("results", "paper_figures") for path in (folder / place).rglob("*") if path.is_file()]
    return {path.relative_to(folder) for path in files if path.name != COST and path.suffix != ".lock"} - set(
        repository_files()
    )


def compare(one: Path, other: Path) -> Comparison:
    """Compare everything under results/ and paper_figures/ of two copies."""
    found = Comparison()
    files = result_files(one), result_files(other)
    found.differing += [f"{name.as_posix()} (in one run only)" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        kind = kind_of(name)
        if content(one / name, kind) == content(other / name, kind):
            found.equal[kind] += 1
        else:
            found.differing.append(name.as_posix())
    return found


def order_of_jobs(folder: Path) -> list[str]:
    """Records of a run, in the order in which they were written."""
    records = [path for path in (folder / RUN).rglob("*.json") if kind_of(path.relative_to(folder)) == "record"]
    return [path.relative_to(folder).as_posix() for path in sorted(records, key=lambda path: path.stat().st_mtime_ns)]


class Progress:
    """Says what is done next and, from the time that the steps before took, about how long the rest takes."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._began = steps, 0, time.monotonic()

    def __call__(self, what: str) -> None:
        passed = time.monotonic() - self._began
        rest = "" if not self._done else f", about {passed / self._done * (self._steps - self._done) / 60:.0f} min left"
        print(f"[{self._done}/{self._steps}{rest}] {what}", file=sys.stderr, flush=True)
        self._done += 1


def run_suite(folder: Path, steps: Sequence[Sequence[str]], *, cores: int, hash_seed: int) -> None:
    """Run the tiny suite in a copy, one step's targets after the other's.

    Raises:
        RuntimeError: a job failed; the message has Snakemake's last lines.
    """
    environment = {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": str(cores)}
    for targets in steps:
        arguments = ["--cores", str(cores), "--config", f"suite={SUITE}", "--", *targets]
        done = snakemake(folder, *arguments, environment=environment)
        if done.returncode != 0:
            shown = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
            raise RuntimeError(f"{folder}: snakemake failed\n{shown}")


def child(folder: Path, *arguments: object) -> dict[str, Any]:
    """What `determinism_child.py` prints, run in a copy of the repository."""
    script = Path(__file__).with_name("determinism_child.py")
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=copy_environment(folder), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def scoring_rows(folder: Path, progress: Progress) -> list[tuple[str, str, str, float | str]]:
    """Logits and perplexity of stored checkpoints with other batches and threads, against batch 1 on one thread."""
    rows = []
    for method in METHODS:
        progress(f"{method}: batches and threads")
        for values in child(folder, "score", method, json.dumps(BATCHES), json.dumps(THREADS))["settings"]:
            here = f"batch {values['batch']}, {values['threads']} thread{'s' * (values['threads'] > 1)}"
            where = (f"{method}, batch 1, 1 thread", here)
            rows.append((*where, "largest difference of a logit", values["logit"]))
            rows.append((*where, "relative difference of the perplexity", values["perplexity"]))
    return rows


def quantizing_rows(folder: Path, progress: Progress) -> list[tuple[str, str, str, float | str]]:
    """MoBiE's checkpoint made on two threads against the one of the suite."""
    progress("mobie: quantized on two threads")
    found = child(folder, "quantize", "mobie", 2)
    where = ("mobie, quantized on 1 thread", "on 2 threads")
    return [
        (*where, "tensors that differ", f"{found['differing']} of {found['tensors']}"),
        (*where, "packed bytes that differ", f"{found['bytes']} of {found['all_bytes']}"),
        (*where, "largest difference of a logit", found["logit"]),
        (*where, "relative difference of the perplexity", found["perplexity"]),
    ]


def operation_rows(folder: Path, progress: Progress) -> list[tuple[str, str, str, float | str]]:
    """What quantizing is made of, on matrices larger than those of the small model, on two threads against one."""
    progress("matrix operations on two threads")
    found = child(folder, "operations", SIZE, 2)
    where = (f"{SIZE} × {SIZE} matrix, 1 thread", "2 threads")
    return [(*where, f"largest difference of the {name}, relative", value) for name, value in found.items()]


def identity_rows(found: Comparison) -> list[tuple[str, str, str, str]]:
    """What two runs share, one row for each kind of file."""
    where = ("1 job at a time", "2 at a time, in another order")
    rows = [(*where, f"{kind} files that are equal", str(count)) for kind, count in sorted(found.equal.items())]
    return [*rows, (*where, "files that differ", str(len(found.differing)))]


NOTES = (
    "Of records, times, machine, commit and command are left out; of model cards, the line with the time; of shared "
    "gradients, the seconds that they cost. The two runs have different hash seeds, and the second one asks for two "
    "threads in its environment.",
    "Differences by batch and threads are no fault: sums in another order round differently. Results are therefore "
    "made on one thread and with the protocol's batch size; both stand in the record.",
    "Not here: outside against inside a container (finding `container`); processors of another maker; a GPU, on which "
    "results are made with torch's deterministic algorithms where there is one and were not compared.",
)


def measure(one: Path, other: Path) -> Finding:
    """Run the suite in both copies, compare them, and measure what batches and threads change."""
    progress = Progress(4 + len(METHODS))
    progress("two runs beside each other: one job at a time, and two in another order")
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(run_suite, one, [TARGETS], cores=1, hash_seed=1),
            pool.submit(run_suite, other, [FIRST, TARGETS[::-1]], cores=2, hash_seed=2),
        ]
        for run in runs:
            run.result()
    progress("comparing")
    found = compare(one, other)
    reordered = order_of_jobs(one) != order_of_jobs(other)
    rows = [*identity_rows(found), *quantizing_rows(one, progress)]
    rows += [*operation_rows(one, progress), *scoring_rows(one, progress)]
    faults = [f"Differs: `{name}`." for name in found.differing]
    if not reordered:
        faults.append("The two runs had the same order of jobs, so that order was not tried.")
    return Finding(
        "determinism",
        f"Two runs of the suite `{SUITE}` in two orders of jobs: {sum(found.equal.values())} files are equal",
        "python -m tests.reliability determinism",
        COLUMNS,
        tuple(rows),
        not faults,
        (*NOTES, *faults),
    )


def main(arguments: list[str]) -> int:
    """Make two copies, measure, save the finding; 0 where the two runs agree."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability determinism", description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the two copies here; it must not exist")
    options = parser.parse_args(arguments)
    work = options.folder or Path(tempfile.mkdtemp(prefix="mobie-determinism-"))
    try:
        finding = measure(working_copy(work / "one"), working_copy(work / "other"))
    finally:
        if options.folder is None:
            shutil.rmtree(work, ignore_errors=True)
    print(save_finding(finding, Layout(ROOT)))
    print(finding.title, *finding.notes[len(NOTES) :], sep="\n")
    return 0 if finding.passed else 1
