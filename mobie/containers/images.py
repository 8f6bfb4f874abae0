"""The two images and what each is made of: a table of data that the build reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobie.errors import ConfigError, unknown_name
from mobie.storage import write_json

RELEASE = "bookworm"  # Debian 12, whose Python is 3.11
PYTHON = (3, 11)  # locks are resolved for it
PLATFORM = "x86_64-manylinux_2_36"  # and for this; 2.36 is the C library of the release
#: dates of files and passwords that the build writes; without it two builds would differ in their contents
SOURCE_DATE_EPOCH = 1763769600
IDENTITY = Path("usr/share/mobie/image.json")  # inside an image; written after its digest is known
VARIANTS = ("cpu", "cuda")


@dataclass(frozen=True)
class Image:
    """What one image is made of.

    name: its key in digests.json and in records
    file: of the built image and, with `.def`, of its definition, in containers/
    lock: Python packages with their hashes, in containers/locks/
    requirements: what the lock is resolved from, relative to the repository
    whole: the lock also holds all that the requirements need; else the requirements say everything
    debian: packages beside Debian's smallest root file system
    """

    name: str
    file: str
    lock: str
    requirements: str
    whole: bool
    debian: tuple[str, ...]

    def sif(self, root: Path) -> Path:
        return root / "containers" / f"{self.file}.sif"

    def definition(self, root: Path) -> Path:
        return root / "containers" / f"{self.file}.def"

    def lock_file(self, root: Path) -> Path:
        return root / "containers" / "locks" / f"{self.lock}.txt"

    def debian_file(self, root: Path) -> Path:
        """Debian packages of the last build, with their versions."""
        return root / "containers" / "locks" / f"debian-{self.file}.txt"


# gcc, g++ and the headers: Triton builds its launcher and the suite its CPU operators at their first use.
# git: a record names the commit of the clone that it was made in.
_SUITE = ("ca-certificates", "g++", "gcc", "git", "libc6-dev", "python3", "python3-dev", "python3-venv")

IMAGES = {
    image.name: image
    for image in (
        Image("mobie-cpu", "mobie", "cpu", "requirements.txt", True, _SUITE),
        Image("mobie-cuda", "mobie", "cuda", "requirements.txt", True, _SUITE),
        Image("code", "code", "code", "containers/code.in", False, ("python3", "python3-venv")),
    )
}


def chosen(names: tuple[str, ...], variant: str) -> list[Image]:
    """Images by the names of the command line: `mobie`, `code`, `all`. Raises `ConfigError` for any other."""
    found = {"mobie": [IMAGES[f"mobie-{variant}"]], "code": [IMAGES["code"]]}
    found["all"] = found["mobie"] + found["code"]
    for name in names:
        if name not in found:
            raise ConfigError(unknown_name("image", name, found))
    return list(dict.fromkeys(image for name in names for image in found[name]))


def digests_file(root: Path) -> Path:
    return root / "containers" / "digests.json"


def read_digests(root: Path) -> dict[str, Any]:
    """What the last build of each image gave; empty before the first."""
    path = digests_file(root)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_digests(root: Path, image: Image, values: dict[str, Any]) -> None:
    """Put one image's digests beside those of the others. Raises `StorageError`."""
    write_json(digests_file(root), read_digests(root) | {image.name: values})
