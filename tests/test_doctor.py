"""`python -m mobie doctor`: findings and remedies, without secrets and without home folders."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobie.cli import main
from mobie.doctor import checks
from mobie.doctor.checks import Line
from mobie.paths import PACKAGE, Layout
from mobie.plan.machine import Gpu

TOKEN = "hf_" + "a1b2c3d4" * 4


def lines(check: object, layout: Layout) -> dict[str, Line]:
    return {line.topic: line for line in check(layout)}  # type: ignore[operator]


def requirements(layout: Layout, text: str) -> None:
    (layout.root / "requirements.txt").write_text(text)


def test_packages_are_compared_with_their_pins(repository: Layout) -> None:
    numpy = importlib.metadata.version("numpy")
    assert checks.pins(Layout(PACKAGE.parent))["torch"].count(".") == 2
    pinned = ("click==0.0.1", "nosuchcore==1.0", "lm-eval==9.9", "pytest==0.1", "mypy-nosuch==1")
    requirements(repository, "\n".join(["# a comment", f"numpy=={numpy}   # why", *pinned]))
    found = lines(checks.check_packages, repository)
    assert found["numpy"] == Line("numpy", "ok", numpy)
    assert found["click"].state == "warn" and found["click"].remedy == "pip install click==0.0.1"
    assert found["nosuchcore"].state == "fail" and "not installed" in found["nosuchcore"].text
    assert found["lm-eval"].state == "warn"
    assert found["pytest"].state == "warn"  # installed, and another version than the tests were written with
    assert "mypy-nosuch" not in found  # only development needs it


def test_an_optional_package_that_is_missing_says_what_needs_it(
    repository: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements(repository, "lm-eval==0.4.13\nevalplus==0.3.1\n")

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    found = lines(checks.check_packages, repository)
    assert {line.state for line in found.values()} == {"warn"}
    assert "score-tasks" in found["lm-eval"].text and "generate-code" in found["evalplus"].text


def test_a_card_that_torch_cannot_use_is_a_failure(repository: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_gpus", lambda: (Gpu("H100", 80 * 1024, "550.1"),))
    for build, states in (("2.13.0+cpu", ["ok", "fail"]), ("2.13.0+cu128", ["ok"]), (None, ["ok"])):
        monkeypatch.setattr(checks, "_torch_build", lambda build=build: build)
        assert [line.state for line in checks.check_gpu(repository)] == states
    monkeypatch.setattr(checks, "find_gpus", tuple)
    (none,) = checks.check_gpu(repository)
    assert none.state == "warn" and "plan" in none.remedy


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert checks._torch_build() == torch.__version__


def test_folders_that_cannot_be_written_fail(repository: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(repository.root / "triton"))
    assert lines(checks.check_caches, repository)["TRITON_CACHE_DIR"].state == "ok"
    monkeypatch.setattr(checks, "_writable", lambda folder: False)
    for check in (checks.check_caches, checks.check_disk):
        for line in check(repository):
            assert line.state == "fail" and line.remedy, line


def test_a_small_machine_is_warned_of(repository: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "memory_mb", lambda: 1000)
    (memory,) = checks.check_memory(repository)
    assert memory.state == "warn" and "4000 MiB" in memory.remedy
    monkeypatch.setattr(checks, "_processor_flags", lambda: {"sse2"})
    assert lines(checks.check_processor, repository)["processor"].state == "warn"


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({}, "ok"),
        ({"OMP_NUM_THREADS": "1"}, "ok"),
        ({"OMP_NUM_THREADS": "8"}, "warn"),
        ({"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "passive"}, "ok"),
    ],
)
def test_threads(repository: Layout, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], state: str) -> None:
    for name in (*checks.THREADS, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert lines(checks.check_threads, repository)["threads"].state == state


def test_images_and_the_container_program(repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    found = lines(checks.check_container, repository)
    assert found["apptainer"].state == "warn" and "get-apptainer" in found["apptainer"].remedy
    assert found["image code"].state == found["image mobie"].state == "warn"
    program.write_text("#!/bin/sh\necho apptainer version 1.4.5\n")
    program.chmod(0o755)
    containers = repository.root / "containers"
    containers.mkdir(exist_ok=True)
    (containers / "code.sif").touch()
    (containers / "mobie.sif").touch()
    (containers / "digests.json").write_text(json.dumps({"code": {"tree_sha256": "c0ffee" * 8}}))
    found = lines(checks.check_container, repository)
    assert found["apptainer"] == Line("apptainer", "ok", "apptainer version 1.4.5")
    assert found["image code"].state == "ok" and "c0ffee" in found["image code"].text
    assert found["image mobie"].state == "warn" and "digests.json" in found["image mobie"].text
    program.write_text("#!/bin/sh\nexit 3\n")
    assert lines(checks.check_container, repository)["apptainer"].state == "fail"


def test_a_mirror_must_be_a_folder(repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBIE_MIRROR", str(tmp_path / "nowhere"))
    assert lines(checks.check_mirror, repository)["mirror"].state == "fail"
    monkeypatch.setenv("MOBIE_MIRROR", str(tmp_path))
    assert lines(checks.check_mirror, repository)["mirror"].state == "ok"


def test_a_login_is_seen_and_never_shown(repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "someone"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_HOME", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert not checks.has_login(os.environ)
    stored = home / ".cache" / "huggingface" / "token"
    stored.write_text(TOKEN)
    assert checks.has_login(os.environ)
    stored.unlink()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(home / f"cache-{TOKEN}"))
    monkeypatch.setenv("MOBIE_MIRROR", f"https://user:{TOKEN}@example.org")
    shown = CliRunner().invoke(main, ["doctor"])
    assert "there is a token" in shown.stdout and "MOBIE_MIRROR is no folder" in shown.stdout
    assert shown.exit_code == 1
    for text in (shown.output, CliRunner().invoke(main, ["doctor", "--json"]).output):
        assert TOKEN not in text and str(home) not in text


def test_the_verb_runs_without_any_optional_part(repository: Layout, tmp_path: Path) -> None:
    for library in ("torch", "transformers", "triton", "lm_eval", "evalplus", "snakemake", "numpy", "pydantic_extra"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('not for a doctor')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    command = [sys.executable, "-m", "mobie", "doctor", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=repository.root)
    found = json.loads(shown.stdout)
    assert found["counts"] == {s: sum(line["state"] == s for line in found["lines"]) for s in ("ok", "warn", "fail")}
    assert shown.returncode == (1 if found["counts"]["fail"] else 0), shown.stderr
    for line in found["lines"]:
        assert line["state"] == "ok" or line["remedy"], line
