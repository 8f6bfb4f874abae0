"""A throw-away repository for tests that read configuration and write results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mobie.paths import PACKAGE, Layout

ROOT = PACKAGE.parent


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A copy of the configuration, the rules and the Snakefile; the current folder while the test runs."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "workflow", root / "workflow")
    shutil.copy(ROOT / "Snakefile", root)
    (root / "profiles").symlink_to("workflow/profiles")
    monkeypatch.chdir(root)
    return Layout(root)
