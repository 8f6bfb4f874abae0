"""Writing files so that a reader sees the old file or the new one, whole, and a full disk harms nothing finished."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobie.errors import StorageError

#: what the operating system says → what the user can do about it
REMEDIES = {
    errno.ENOSPC: "free some space on this disk, then run the same command again",
    errno.EDQUOT: "free some of your quota on this disk, then run the same command again",
    errno.EROFS: "the file system is read-only: remount it writable, or work in a copy of the repository",
    errno.EACCES: "give yourself write permission to the folder, then run the same command again",
    errno.EPERM: "give yourself write permission to the folder, then run the same command again",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, then run the same command again",
    errno.EEXIST: "a file stands where a folder is needed: move it away, then run the same command again",
}


def _number(error: OSError) -> int | None:
    """The system's error number; libraries that wrap the error leave it in their text, `(os error 28)`."""
    found = re.search(r"os error (\d+)", str(error))
    return error.errno if found is None else int(found[1])


def storage_error(path: Path, error: OSError) -> StorageError:
    """The user's version of an `OSError` met while writing `path`."""
    remedy = REMEDIES.get(_number(error), "check the disk and the folder, then run the same command again")
    return StorageError(
        f"{path}: could not be written ({error.strerror or error}); finished files are as they were; {remedy}"
    )


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
    """Give a temporary path beside `path` to write to; on leaving, it is flushed to disk and renamed to `path`.

    Parents are made. When anything goes wrong the temporary file is removed and `path` is as it was.

    Raises:
        StorageError: the system refused to write.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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
