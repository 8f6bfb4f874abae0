"""Seeded ways to damage data from outside: its bytes, its text, and its values in the form that it has."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import yaml

from mobie.provenance import digest
from mobie.storage import SEAL

Form = str  # a key of `STRUCTURED`, or "bytes" or "text"

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**63), 0.0, -0.5, 1e308, 1e-308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "../../etc/passwd",
        "/etc/passwd",
        "\x00",
        "\ud800",
        "a" * 5000,
        "<script>",
        "{0}",
        "%s",
        "é\u202e",
        "1e999",
    ),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, [1, "a", None], "nan", "2023-99-99", "0" * 64),
)
TEXTS = (
    *(
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-",
        b"null",
        b"{",
        b"[",
        b'"',
        b"\x00",
        b"\xff\xfe",
        b"\\ud800",
        b"\\u0000",
        b",",
    ),
    *(
        b"\n",
        b"\r",
        b"&a *a",
        b"!!python/name:os.system",
        b"<<: *x",
        b"9" * 400,
        b"[" * 3000,
        b'{"a":' * 2000,
        b"..",
        b"+=",
    ),
)


def damaged(seed: bytes, form: Form, rng: random.Random) -> bytes:
    """One input made of a valid one; now and then bytes that never were one."""
    choice = rng.random()
    if choice < 0.03:
        return rng.randbytes(rng.randrange(200))
    if choice < 0.05:
        return rng.choice(TEXTS) * rng.randrange(1, 4)
    if choice < 0.6 and form in STRUCTURED:
        try:
            return STRUCTURED[form](seed, rng)
        except (ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError, struct.error, OverflowError):
            pass  # this change cannot be written in that form
    return damaged_bytes(seed, rng)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at, end = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        end = min(end, at + 64)
        match rng.randrange(6):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:end]
            case 2:
                out[at:at] = rng.choice(TEXTS)
            case 3:
                out[at:at] = out[at:end]
            case 4:
                del out[at:]
            case _:
                out[at:end] = rng.randbytes(end - at)
    return bytes(out)


def changed_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one odd thing somewhere inside; a key may go, come, or get another's value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {str(rng.choice(ODD)): rng.choice(ODD)}
            case 2:
                return value | {key: value[rng.choice(list(value))]}
            case _:
                return value | {key: changed_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, *value]
            case _:
                return [*value[:at], changed_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def _json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(changed_value(json.loads(data), rng)).encode()


def _sealed(data: bytes, rng: random.Random) -> bytes:
    """A JSON object with the hash of its other entries, right again after the change, nearly always."""
    value = changed_value({k: v for k, v in json.loads(data).items() if k != SEAL}, rng)
    if isinstance(value, dict) and rng.random() < 0.95:
        value[SEAL] = digest(value)
    return json.dumps(value).encode()


def _lines(data: bytes, rng: random.Random) -> bytes:
    """JSON lines, one of them changed."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[:at], _json(lines[at], rng), *lines[at + 1 :]]) + b"\n"


def _yaml(data: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(changed_value(yaml.safe_load(data), rng), allow_unicode=True).encode()


def _csv(data: bytes, rng: random.Random) -> bytes:
    rows = [line.split(b",") for line in data.split(b"\n")]
    for _ in range(rng.randrange(1, 4)):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = str(rng.choice(ODD)).encode("utf-8", "replace")
    return b"\n".join(b",".join(row) for row in rows)


def _tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, or the JSON in its metadata, is changed; its length is right again."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if metadata and rng.random() < 0.7:
        key = rng.choice(list(metadata))
        metadata[key] = json.dumps(changed_value(json.loads(metadata[key]), rng))
    else:
        header = changed_value(header, rng)
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data[8 + length :]


def _zip(data: bytes, rng: random.Random) -> bytes:
    """A zip file in which one member is damaged, renamed or gone, and the archive is whole."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                match rng.randrange(4):
                    case 0:
                        continue
                    case 1:
                        name = f"../{name}"
                    case 2 if name.endswith(".gz"):
                        content = _gzip(content, rng)
                    case _:
                        content = damaged_bytes(content, rng)
            new.writestr(name, content)
    return out.getvalue()


def _gzip(data: bytes, rng: random.Random) -> bytes:
    """Packed JSON lines, changed inside."""
    return gzip.compress(_lines(gzip.decompress(data), rng))


STRUCTURED: dict[Form, Callable[[bytes, random.Random], bytes]] = {
    "json": _json,
    "sealed": _sealed,
    "lines": _lines,
    "yaml": _yaml,
    "csv": _csv,
    "tensors": _tensors,
    "zip": _zip,
    "gzip": _gzip,
}
