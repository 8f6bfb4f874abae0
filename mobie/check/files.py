"""Reading files without trusting them: strict JSON, the header of a safetensors file, SHA-256 with a progress bar."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mobie import parsing

CHUNK = 1 << 20  # bytes hashed between two updates of the progress bar
BIG_FILE = 1 << 20  # bytes from which on `--quick` leaves a file's hash out
LARGEST_JSON = 1 << 28
LARGEST_HEADER = 100_000_000  # as in the safetensors library
SEAL = "sha256"  # entry of a record or stamp that holds the hash of all others
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}


class Damaged(Exception):
    """A file is not what its name says; the text says why."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def broken_seal(value: dict[str, Any]) -> str | None:
    """What is wrong with the hash that an object holds of its other entries; None where nothing is."""
    content = {key: entry for key, entry in value.items() if key != SEAL}
    if SEAL not in value:
        return f"no {SEAL} of its content"
    return (
        None
        if digest(content) == value[SEAL]
        else f"its content has the {SEAL} {digest(content)}, it says {value[SEAL]}"
    )


def parse_json(data: bytes) -> Any:
    """JSON in which a key stands once and every number is finite. Raises `Damaged`."""
    try:
        return parsing.parse_json(data)
    except ValueError as error:
        raise Damaged(f"not readable JSON ({error})") from error


def read_json(path: Path) -> Any:
    """A JSON file. Raises `Damaged`."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise Damaged(f"{path.stat().st_size} bytes of JSON, more than the {LARGEST_JSON} that are read")
        return parse_json(path.read_bytes())
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class TensorFile:
    """Header of a safetensors file: bytes and shape of each tensor, and the text metadata."""

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check a header: every tensor's bytes follow from its shape, lie one behind the other, and end the file.

    Raises:
        Damaged: the file is truncated, too long, or no safetensors file.
    """
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LARGEST_HEADER, total - 8):
                raise Damaged(f"not a safetensors file: a header of {length} bytes in a file of {total}")
            header = parse_json(file.read(length))
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error
    try:
        metadata = dict(header.pop("__metadata__", {}))
        entries = {name: (e["dtype"], tuple(e["shape"]), tuple(e["data_offsets"])) for name, e in header.items()}
        end = 0
        for name, (dtype, shape, (first, last)) in sorted(entries.items(), key=lambda item: item[1][2]):
            if first != end or last - first != math.prod(shape) * ITEM_BYTES[dtype]:
                raise Damaged(f"tensor {name}: bytes {first} to {last} are not those of {dtype} {list(shape)}")
            end = last
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"not a safetensors header ({type(error).__name__}: {error})") from error
    if end != total - 8 - length:
        raise Damaged(f"{total} bytes, expected {8 + length + end}: truncated or written over")
    shapes = {name: shape for name, (_, shape, _) in entries.items()}
    return TensorFile({name: last - first for name, (_, _, (first, last)) in entries.items()}, shapes, metadata)


class Hashes:
    """SHA-256 of files, each read once.

    quick: files of `BIG_FILE` bytes and more are not read; their hash is None.
    """

    def __init__(self, total: int, *, quick: bool, progress: bool) -> None:
        self.quick, self.left_out = quick, 0
        self._known: dict[Path, str | None] = {}
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="checking", disable=not progress, leave=False, smoothing=0
        )

    def sha256(self, path: Path) -> str | None:
        """Of a file that exists; None where it was left out. Raises `Damaged`."""
        if path not in self._known:
            self._known[path] = self._read(path)
        return self._known[path]

    def _read(self, path: Path) -> str | None:
        try:
            if self.quick and path.stat().st_size >= BIG_FILE:
                self.left_out += 1
                return None
            found = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    found.update(chunk)
                    self._bar.update(len(chunk))
        except OSError as error:
            raise Damaged(f"cannot be read ({error.strerror})") from error
        return found.hexdigest()

    def close(self) -> None:
        self._bar.close()


def total_size(paths: Iterable[Path]) -> int:
    """Bytes of the files that exist."""
    return sum(path.stat().st_size for path in paths if path.is_file())
