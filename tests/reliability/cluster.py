"""The tiny suite on a real Slurm of one node: the same bytes as without it, also when a job is killed in the middle.

Needs Debian's packages slurm-wlm and munge. Nothing is written outside a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from no_network import without_network
from reliability.slurm import Cluster, Job, running_cluster
from tqdm import tqdm
from working_copy import copy_environment, snakemake, working_copy

from mobie.config import default_layout
from mobie.jobs.cost import estimate
from mobie.jobs.keys import Keys
from mobie.paths import Layout
from mobie.records import stable
from mobie.reliability import Finding, save_finding

COMMAND = "python -m tests.reliability cluster"
SUITE = ("--config", "suite=tiny")
TARGET = ("--", "results/table2.csv")
PROFILE = ("--workflow-profile", "slurm", "--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10")
METHOD = "mobie"
COMMENT = f"rule_quantize_wildcards_tiny_nano-olmoe_{METHOD}_0"
PAPER_MODEL = "olmoe-1b-7b"
Row = tuple[str, str, bool]


def main(arguments: list[str]) -> int:
    """Run all steps and save the finding; 0 when every one passed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mobie-cluster-") as name:
        folder = Path(name)
        (folder / "slurm").mkdir()
        with running_cluster(folder / "slurm") as cluster:
            rows, version = run(folder, cluster), cluster.version
    passed = all(ok for _, _, ok in rows)
    finding = Finding(
        name="cluster",
        title="The tiny suite through the profile `slurm` on a real one-node Slurm",
        command=COMMAND,
        columns=("step", "seen", "passed"),
        rows=tuple(rows),
        passed=passed,
        notes=(
            f"{version}, one node, without an accounting database: status comes from squeue.",
            "The node declares a GPU and more memory than the machine has, so that a job of the paper suite is "
            "accepted; none of it runs.",
            "Not run: several nodes, a network file system, accounting, cgroups that enforce the memory asked for.",
        ),
    )
    print(save_finding(finding, default_layout()))
    return 0 if passed else 1


def run(folder: Path, cluster: Cluster) -> list[Row]:
    """All steps; a line is printed after each."""
    here, there = working_copy(folder / "here"), working_copy(folder / "there")
    for copy in (here, there):
        Layout(copy).mirror_stamp.unlink(missing_ok=True)  # laid out by a job of the run itself
    rows: list[Row] = []

    def add(step: str, seen: str, passed: bool) -> None:
        rows.append((step, seen, passed))
        print(f"{'ok  ' if passed else 'FAIL'} {step}: {seen}", flush=True)

    with ThreadPoolExecutor() as pool:
        local = pool.submit(run_locally, here)
        code, killed = run_and_kill(there, cluster)
        shown = local.result()
    how = "no network" if without_network() else "the network could not be taken away here"
    add(f"suite run without a cluster, {how}", _end(shown.stdout + shown.stderr), shown.returncode == 0)
    jobs = cluster.jobs()
    add("suite run through sbatch", f"{len(jobs)} jobs: {_states(jobs)}; exit status {code}", code == 0)
    attempts = [job for job in jobs if job.comment == COMMENT]
    keys = Keys(Layout(there), "tiny", "nano-olmoe", 0, METHOD)
    asked = [(job.mem_mb, job.minutes) for job in attempts]
    expected = [(found.mem_mb, found.minutes) for found in (estimate("quantize", keys, n) for n in (1, 2))]
    states = [job.state for job in attempts]
    add(
        "job killed with scancel after its first block, then submitted again with more",
        f"job {killed}; states {', '.join(states)}; MiB and minutes asked for {asked}",
        killed is not None and states == ["CANCELLED", "COMPLETED"] and asked == expected,
    )
    add("same tables", *compare_tables(here, there))
    add("same records but for time, host and commit", *compare_records(here, there))
    add("job of the paper suite, by sbatch --test-only", *paper_job(folder / "there", cluster))
    return rows


def run_locally(copy: Path) -> subprocess.CompletedProcess[str]:
    """Run the suite here, without a network where the machine lets a process leave it: all downloads are there."""
    command = [*(without_network() or ()), sys.executable, "-m", "snakemake", "--cores", "1", *SUITE, *TARGET]
    return subprocess.run(command, cwd=copy, env=copy_environment(copy), capture_output=True, text=True)


def run_and_kill(copy: Path, cluster: Cluster) -> tuple[int, str | None]:
    """Run the suite through the profile, and kill the first job that has finished a block; exit status, killed job."""
    checkpoint = Layout(copy).checkpoint("tiny", "nano-olmoe", METHOD, 0)
    killed = None
    environment = copy_environment(copy, cluster.environment)
    command = [sys.executable, "-m", "snakemake", *PROFILE, *SUITE, *TARGET]
    with (copy / "cluster.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=log)
    with tqdm(desc="jobs", disable=not sys.stderr.isatty()) as bar:
        while process.poll() is None:
            if killed is None and any(checkpoint.glob("*.safetensors")):
                killed = next((job.number for job in cluster.jobs() if job.comment == COMMENT), None)
                cluster.command("scancel", str(killed))
            time.sleep(0.2 if killed is None else 2)
            bar.update(sum(job.state == "COMPLETED" for job in cluster.jobs()) - bar.n)
    if process.returncode:
        print((copy / "cluster.log").read_text()[-3000:], file=sys.stderr)
    return process.returncode, killed


def compare_tables(here: Path, there: Path) -> tuple[str, bool]:
    """Whether Table 2 has the same bytes in all its forms."""
    names = [f"results/table2.{suffix}" for suffix in ("csv", "md", "tex", "long.csv")]
    same = [(here / name).read_bytes() == (there / name).read_bytes() for name in names]
    return f"{sum(same)} of {len(names)} files are byte-identical", all(same)


def compare_records(here: Path, there: Path) -> tuple[str, bool]:
    """Whether all records are the same but for the fields that differ between any two runs."""
    paths = sorted(path.relative_to(here) for path in (here / "results" / "tiny").glob("*/*/s*/*.json"))
    same = [stable(json.loads((here / p).read_text())) == stable(json.loads((there / p).read_text())) for p in paths]
    return f"{sum(same)} of {len(paths)} records", bool(paths) and all(same)


def paper_job(copy: Path, cluster: Cluster) -> tuple[str, bool]:
    """Have the real sbatch look at a job of the paper suite, without queueing it."""
    keys = Keys(Layout(copy), "paper", PAPER_MODEL, 0, METHOD)
    for path in (keys.layout.hub_model_stamp(PAPER_MODEL), keys.calibration):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    said = cluster.folder / "test-only.log"
    stand_in = cluster.folder / "bin" / "sbatch"
    real = cluster.command("which", "sbatch").strip()
    stand_in.write_text(f'#!/bin/sh\n{real} --test-only "$@" >> "{said}" 2>&1\nexit 1\n')
    stand_in.chmod(0o755)
    target = str(keys.record("quantize").relative_to(copy))
    chosen = ("--retries", "0", "--config", "suite=paper", "--allowed-rules", "quantize", "--", target)
    snakemake(copy, *PROFILE, *chosen, environment=cluster.environment)
    stand_in.unlink()
    answer = said.read_text().strip() if said.exists() else "sbatch was not called"
    return answer, "to start at" in answer


def _states(jobs: list[Job]) -> str:
    counts = {state: sum(job.state == state for job in jobs) for state in sorted({job.state for job in jobs})}
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _end(text: str) -> str:
    """The line in which Snakemake counts its steps."""
    return next((line for line in reversed(text.splitlines()) if "steps (" in line), text.strip()[-200:])
