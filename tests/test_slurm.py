"""What the `slurm` profile submits for jobs of the paper suite, with the real plug-in and a stand-in for Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_stand_in import install, submissions

from mobie.jobs.cost import estimate
from mobie.jobs.keys import Keys
from mobie.paths import PACKAGE, Layout

MODEL, METHOD = "olmoe-1b-7b", "mobie"
RETRIES = 1  # the profile has more; each costs the test ten seconds


@pytest.fixture
def keys(repository: Layout) -> Keys:
    """Keys of a job of the paper suite whose inputs are there: stamps of a model and of calibration tokens."""
    keys = Keys(repository, "paper", MODEL, 0, METHOD)
    for path in (repository.hub_model_stamp(MODEL), keys.calibration):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return keys


def submitted(keys: Keys, kinds: tuple[str, ...], bin_folder: Path, *arguments: str) -> dict[str, list[dict]]:
    """Submit the jobs of some kinds through the profile until they are given up; calls of sbatch by rule."""
    calls = install(bin_folder)
    targets = [str(keys.record(kind).relative_to(keys.layout.root)) for kind in kinds]
    quick = ("--slurm-init-seconds-before-status-checks", "1")
    chosen = ("--workflow-profile", "slurm", *quick, "--config", "suite=paper", "--allowed-rules", *kinds)
    paths = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(PACKAGE.parent)}
    shown = subprocess.run(
        [sys.executable, "-m", "snakemake", *chosen, *arguments, "--", *targets],
        cwd=keys.layout.root,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shown.returncode != 0, "the stand-in lets every job fail"
    assert calls.is_file(), shown.stdout + shown.stderr
    found: dict[str, list[dict]] = {}
    for call in submissions(calls):
        found.setdefault(call["comment"].split("_")[1], []).append(call)
    return found


def test_a_job_of_the_paper_suite_is_submitted_as_the_cost_model_says(keys: Keys, tmp_path: Path) -> None:
    found = submitted(keys, ("quantize", "speed"), tmp_path / "bin", "--retries", str(RETRIES))
    assert set(found) == {"quantize", "speed"}
    for kind, calls in found.items():
        assert len(calls) == 1 + RETRIES
        for attempt, call in enumerate(calls, start=1):
            asked = estimate(kind, keys, attempt)
            assert (call["mem"], call["minutes"]) == (asked.mem_mb, asked.minutes)
            assert call["gpus"] == 1
            assert call["cpus_per_task"] == 1
            assert call["partition"] == "main"
            assert call["no_requeue"]
            assert call["exclusive"] == (kind == "speed")
            assert call["comment"] == f"rule_{kind}_wildcards_paper_{MODEL}_{METHOD}_0"
            assert Path(call["folder"]) == keys.layout.root
            assert call["output"].endswith("%j.log")
            command = shlex.split(call["wrap"])
            assert command[1:3] == ["-m", "snakemake"]
            target = f"{kind}:suite=paper,model={MODEL},method={METHOD},seed=0"
            assert command[command.index("--target-jobs") + 1] == target
            assert command[command.index("--attempt") + 1] == str(attempt)
            assert command[command.index("--executor") + 1] == "slurm-jobstep"
    for earlier, later in zip(found["quantize"], found["quantize"][1:], strict=False):
        assert later["mem"] > earlier["mem"] and later["minutes"] > earlier["minutes"]
    assert len({call["job_name"] for calls in found.values() for call in calls}) == 1, "status is asked by this name"


def test_a_job_of_the_smoke_suite_asks_for_no_gpu_and_a_partition_can_be_chosen(
    repository: Layout, tmp_path: Path
) -> None:
    keys = Keys(repository, "smoke", "nano-olmoe", 0, "rtn-w3")
    keys.calibration.parent.mkdir(parents=True)
    keys.calibration.write_text("{}")
    partition = ("--default-resources", "slurm_partition=short", "mem_mb=1000", "runtime=5", "--retries", "0")
    (call,) = submitted(keys, ("quantize",), tmp_path / "bin", *partition)["quantize"]
    assert call["gpus"] is None
    assert call["ntasks"] == 1
    assert call["partition"] == "short"
    assert call["mem"] == estimate("quantize", keys).mem_mb
