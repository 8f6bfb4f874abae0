"""Files of a download: which kinds are wanted, and their hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from mobie.errors import DataError

CHUNK = 1 << 20  # bytes hashed between two updates of the progress bar
#: files that a data set or a model is made of; nothing that is run or unpickled when it is read
DATA_SUFFIXES = frozenset(
    {".arrow", ".csv", ".gz", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".yaml", ".zst"}
)
MODEL_SUFFIXES = frozenset({".jinja", ".json", ".model", ".safetensors", ".txt"})
PLAIN_FILES = frozenset({".gitattributes", "LICENSE"})
PLAIN_NAME = re.compile(r"(?!\.\.?$)[\w.+=@-]+", re.ASCII)
REFUSED = "look at the repository and correct its row in sources.csv, or the model's file"


def hash_files(files: Mapping[str, Path], title: str) -> dict[str, str]:
    """SHA-256 of each file by its name, with a progress bar on a terminal."""
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in files.values())
    found = {}
    # disable=None: a bar on a terminal, nothing in a log
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"checking {title}", disable=None, leave=False) as bar:
        for name, file in files.items():
            hashed = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    hashed.update(chunk)
                    bar.update(len(chunk))
            found[name] = hashed.hexdigest()
    return found


def git_blob(file: Path) -> str:
    """Git's name for a file's content, by which the hub knows small files."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_wanted_kind(name: str, suffixes: frozenset[str]) -> bool:
    """Whether a file is of a kind that is read as data."""
    path = Path(name)
    return path.suffix.lower() in suffixes or path.name in PLAIN_FILES


def check_name(name: str, suffixes: frozenset[str], where: str) -> None:
    """Refuse a file by its name, before it is brought here.

    Raises:
        DataError: an odd name, or a kind of file that could be run or unpickled.
    """
    if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")):
        raise DataError(f"{where}: got the name {name!r}, expected letters, digits and `._-+=@`; {REFUSED}")
    if not is_wanted_kind(name, suffixes):
        raise DataError(
            f"{where}: {name} is a file of the kind {Path(name).suffix!r}, expected one of "
            f"{', '.join(sorted(suffixes))}; {REFUSED}"
        )


def check_tree(folder: Path, suffixes: frozenset[str]) -> None:
    """Refuse a downloaded folder that holds more than plain files of known kinds.

    Raises:
        DataError: a link, a file that is no plain file, an odd name, or a kind of file that could be run or unpickled.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise DataError(f"{path}: a link or a special file, expected plain files only; it was refused: {REFUSED}")
        name = path.relative_to(folder).as_posix()
        check_name(name, suffixes | {""} if path.is_dir() else suffixes, str(path))
