"""A hash at the end of a drawing, so that the report embeds a figure as it was drawn or not at all."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from mobie.errors import DataError

SEAL = re.compile(rb"<!-- sha256: ([0-9a-f]{64}) -->\n\Z")


def seal_svg(drawing: bytes) -> bytes:
    """The drawing with the SHA-256 of itself in a comment behind it."""
    return drawing + f"<!-- sha256: {hashlib.sha256(drawing).hexdigest()} -->\n".encode()


def read_svg(path: Path) -> bytes:
    """A sealed drawing. Raises `DataError` where it is not as it was drawn."""
    data = path.read_bytes()
    found = SEAL.search(data)
    if found is None or hashlib.sha256(data[: found.start()]).hexdigest().encode() != found[1]:
        raise DataError(
            f"{path}: the drawing is not as it was made (expected the sha256 of its content in its last line); "
            f"draw it again with `python -m mobie figure {path.stem}`"
        )
    return data
