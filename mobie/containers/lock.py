"""Locks of Python packages: versions and hashes of every file of each version that an index has, and no address.

uv resolves them from the indexes and folders that pip is configured with here, so that a CPU build of torch in a folder
of this machine is locked as such. pip, which installs, refuses a file with any other hash.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mobie.containers.images import PLATFORM, PYTHON, Image
from mobie.containers.pip_settings import pip_settings
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.storage import write_text

_ENTRY = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)")


@dataclass(frozen=True)
class Locked:
    """One package: its version, and the hashes of the files that may be installed."""

    name: str
    version: str
    sha256: frozenset[str]


def normal_name(name: str) -> str:
    """A package's name as indexes compare it: `rouge_score` and `Rouge-Score` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, Locked]:
    """Locked packages by normal name. Raises `DataError` with the entry that is not a pin with hashes."""
    if not path.is_file():
        raise DataError(f"{path}: no such lock; make it with `containers/lock {path.stem}`")
    lines = re.sub(r"\s*\\\n\s*", " ", path.read_text(encoding="utf-8")).splitlines()
    found = {}
    for line in lines:
        if line.startswith("#"):
            continue
        match = _ENTRY.fullmatch(line)
        if match is None:
            raise DataError(f"{path}: {line[:80]!r} is not `name==version --hash=sha256:…`; make the lock again")
        name = normal_name(match["name"])
        found[name] = Locked(name, match["version"], frozenset(re.findall("[0-9a-f]{64}", match["hashes"])))
    return found


def _sources(variant: str) -> list[str]:
    """Options that let uv see what pip sees; for `cuda` only the main index, which has that build of torch."""
    settings = pip_settings()
    options = ["--index-strategy", "unsafe-best-match"]  # as pip: the newest version, wherever it is
    names = {"index-url": "--default-index"}
    if variant != "cuda":
        names |= {"extra-index-url": "--index", "find-links": "--find-links"}
    for name, option in names.items():
        for word in settings.get(name, "").split():
            options += [option, word]
    return options


def _resolve(image: Image, root: Path) -> str:
    """Lines of a lock. Raises `DataError` with uv's own words."""
    uv = shutil.which("uv")
    if uv is None:
        raise UnsupportedError("uv, which resolves the locks, is not on PATH; `pip install uv`")
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config", "--generate-hashes"]
    command += ["--python-version", f"{PYTHON[0]}.{PYTHON[1]}", "--python-platform", PLATFORM]
    command += [*_sources(image.lock), *([] if image.whole else ["--no-deps"]), image.requirements]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"uv cannot resolve {image.requirements}:\n{done.stderr.strip()}")
    return done.stdout


def make_lock(image: Image, root: Path) -> Path:
    """Resolve an image's requirements and write its lock.

    Raises:
        ConfigError: the torch that was found is not of the image's kind; the old lock is left as it was.
        DataError: the requirements cannot be resolved.
        UnsupportedError: there is no uv.
    """
    text = _resolve(image, root)
    torch = re.search(r"^torch==(\S+)", text, re.MULTILINE)
    if image.lock == "cpu" and torch is not None and not torch[1].endswith("+cpu"):
        raise ConfigError(
            f"pip is configured to find torch {torch[1]}, which is not a CPU build; name a folder or an index that has "
            "one: `PIP_FIND_LINKS=FOLDER containers/lock cpu` or PIP_EXTRA_INDEX_URL"
        )
    path = image.lock_file(root)
    write_text(
        path, f"# Python {PYTHON[0]}.{PYTHON[1]}: `containers/lock {image.lock}`, from {image.requirements}\n{text}"
    )
    return path
