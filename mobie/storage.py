"""Writing files so that a reader sees the old file or the new one, whole, and a full disk harms nothing finished."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mobie.errors import StorageError

#: what the operating system says → what the user can do about it
REMEDIES = {
    errno.ENOSPC: "free some space on this disk, then run the same command again",
    errno.EDQUOT: "free some of your quota on this disk, then run the same command again",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f unlimited`), then run the same command again",
    errno.EROFS: "the file system is read-only: remount it writable, or work in a copy of the repository",
    errno.EACCES: "give yourself write permission to the folder, then run the same command again",
    errno.EPERM: "give yourself write permission to the folder, then run the same command again",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, then run the same command again",
    errno.EEXIST: "a file stands where a folder is needed: move it away, then run the same command again",
}


def error_number(error: Exception) -> int | None:
    """The system's error number; libraries that wrap the error leave it in their text, `(os error 28)`."""
    found = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) if found is None else int(found[1])


def no_memory(error: Exception) -> bool:
    """Whether the system refused for lack of memory, not of disk."""
    number = getattr(error, "errno", None)
    return number == errno.ENOMEM or f"os error {errno.ENOMEM})" in str(error)


def storage_error(path: Path, error: Exception) -> StorageError:
    """The user's version of an error of the system met while writing `path`."""
    remedy = REMEDIES.get(error_number(error) or 0, "check the disk and the folder, then run the same command again")
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"{path}: could not be written ({reason}); finished files are as they were; {remedy}")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StorageError` that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def make_folder(path: Path) -> Path:
    """Create `path` and its parents where missing. Raises `StorageError`."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on leaving, it is flushed to disk and renamed to `path`.

    Parents are made. When anything goes wrong what was written is removed and `path` is as it was. What a killed
    process left of an earlier attempt is removed.

    Raises:
        StorageError: the system refused to write.
    """
    make_folder(path.parent)
    with storage_errors(path):
        remove_abandoned(path.parent, path.name)
        with _held_folder(path.with_name(f".{path.name}.{os.getpid()}.tmp")) as folder:
            temporary = folder / path.name
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)


@contextmanager
def _held_folder(folder: Path) -> Iterator[Path]:
    """Make a folder and lock it, so that others can tell it from one that a killed process left; gone afterwards.

    A folder and not the file: libraries put another file in the place of the one they are told to write.
    """
    descriptor = None
    while descriptor is None:
        folder.mkdir(exist_ok=True)
        descriptor = _hold(folder, wait=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _hold(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder until its descriptor, which is returned, is closed.

    None where another process holds it (and `wait` is False), or has removed it or made it anew before it was locked.
    """
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:  # held by another process; or a file system without locks, where nothing is taken for abandoned
            locked = wait
        with suppress(FileNotFoundError):
            if locked and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)
    return None


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove temporary folders in `folder` that no living process holds: of the file `name`, or of any."""
    form = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+\.tmp")
    for found in os.listdir(folder):
        if form.fullmatch(found):
            with suppress(OSError):
                descriptor = _hold(folder / found, wait=False)
                if descriptor is not None:
                    shutil.rmtree(folder / found, ignore_errors=True)
                    os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises `StorageError`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as it is, whole or not at all. Raises `StorageError`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, keys sorted, with a final newline, whole or not at all. Raises `StorageError`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


SEAL = "sha256"


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object and the SHA-256 of its content, whole or not at all. Raises `StorageError`."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as a reader sees it: keys are texts, tuples lists
    write_json(path, plain | {SEAL: _digest(plain)})


def unsealed(value: Any) -> dict[str, Any]:
    """The object that `write_sealed` wrote, from its JSON value. Raises `ValueError` where it was changed since."""
    if not isinstance(value, dict) or SEAL not in value:
        raise ValueError(f"no {SEAL} of its content: it is damaged, or an earlier version wrote it")
    plain = {key: one for key, one in value.items() if key != SEAL}
    if _digest(plain) != value[SEAL]:
        raise ValueError(f"its content has the {SEAL} {_digest(plain)}, expected {value[SEAL]} as written in it")
    return plain
