"""A digest of a file tree: equal for two trees exactly when names, kinds, modes, link targets and contents are equal.

Owners and times are not in it: an image that a user builds without privileges has other owners, and every build other
times. The lines that are hashed, sorted by path:

    d 755 - usr/share
    f 644 9f86d081… usr/share/mobie/lock.txt
    l 777 python3 usr/bin/python
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from mobie.errors import DataError
from mobie.provenance import file_hash


def _entries(folder: Path) -> Iterator[Path]:
    """All paths below a folder, links not followed."""
    for entry in os.scandir(folder):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path))


def _line(path: Path, name: bytes) -> bytes:
    """One entry; the parts are separated by NUL, which no name and no link target holds."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        kind, value = b"l", os.fsencode(os.readlink(path))
    elif stat.S_ISDIR(mode):
        kind, value = b"d", b""
    elif stat.S_ISREG(mode):
        kind, value = b"f", file_hash(path).encode()
    else:
        raise DataError(f"{path}: neither file, folder nor link; an image has to be made of these only")
    return b"\0".join([kind, f"{stat.S_IMODE(mode):o}".encode(), value, name])


def tree_lines(root: Path, without: Collection[str] = ()) -> list[bytes]:
    """Sorted entries of a tree; `without`: paths relative to `root` that are left out with all below them.

    Raises:
        DataError: an entry cannot be read, or is a device, a pipe or a socket.
    """
    left_out = {os.fsencode(name) for name in without}
    lines = []
    for path in _entries(root):
        name = os.fsencode(path.relative_to(root))
        parts = name.split(b"/")
        if not any(b"/".join(parts[:n]) in left_out for n in range(1, len(parts) + 1)):
            lines.append((name, _line(path, name)))
    return [line for _, line in sorted(lines)]


def tree_digest(root: Path, without: Collection[str] = ()) -> str:
    """SHA-256 over `tree_lines`, each with a final NUL pair. Raises `DataError`."""
    found = hashlib.sha256()
    for line in tree_lines(root, without):
        found.update(line + b"\0\0")
    return found.hexdigest()
