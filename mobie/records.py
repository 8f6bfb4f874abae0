"""The record: one JSON file per job, the only thing that tables, figures, claims and the report read.

A record says what ran, the values with their standard errors and counts or a status with its reason, and where it came
from. Values are fractions, never per cent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mobie.errors import DataError
from mobie.storage import write_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Status = Literal["ok", "failed", "skipped", "oom", "timeout", "unsupported"]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class Measurement:
    """One value: `stderr` and `n` say how sure it is, `chance` what a coin would score (None: no such thing)."""

    name: str
    value: float
    stderr: float | None
    n: int
    chance: float | None = None


@dataclass(frozen=True)
class Record:
    """What one job found.

    kind:       what was done: quantize, perplexity, tasks, … (`mobie.results.KINDS`).
    status:     `ok`, or why there is no value; `reason` then says it in a sentence.
    protocol:   digest of the protocol the values were measured under.
    details:    JSON values that no table needs in order to be built (the traceback's end, bytes by item, …).
    provenance: hashes of inputs and code, versions, host, time.
    """

    kind: str
    status: Status
    reason: str | None
    suite: str
    model: str
    method: str
    seed: int
    protocol: str
    measurements: tuple[Measurement, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def measurement(self, name: str) -> Measurement | None:
        """The measurement called `name`, or None."""
        return next((m for m in self.measurements if m.name == name), None)


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all. Raises `StorageError`."""
    write_json(path, asdict(record))


def read_record(path: Path) -> Record:
    """Read and check a record.

    Raises:
        DataError: the file is missing, no JSON, or not a record of this version.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such record; make it with `snakemake --cores all {path}`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error}); delete it and run its job again") from error
    from pydantic import ValidationError

    try:
        unknown = set(raw) - set(Record.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        return _adapter().validate_python(raw)
    except (ValidationError, ValueError, TypeError) as error:
        problem = _first_problem(error)
        raise DataError(f"{path}: not a record ({problem}); delete it and run its job again") from error


@cache
def _adapter() -> TypeAdapter[Record]:
    """The check of a record; building it takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _first_problem(error: Exception) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
