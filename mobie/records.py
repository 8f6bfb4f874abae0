"""The record: one JSON file per job, the only thing that tables, figures, claims and the report read.

A record says what ran, the values with their standard errors and counts or a status with its reason, and where it came
from. Values are fractions, never per cent.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mobie.errors import DataError
from mobie.parsing import parse_json
from mobie.storage import SEAL, unsealed, write_sealed

if TYPE_CHECKING:
    from pydantic import TypeAdapter

#: what differs between two runs of one job on one machine, and between machines: places in a record, dots between keys
VOLATILE = (
    *("provenance.finished", "provenance.host", "provenance.image", "provenance.git_commit", "provenance.command"),
    *("details.gradient_cpu_seconds", "details.gradients_shared", "details.blocks.cpu_seconds"),
    *("details.runs", "details.ratios", "details.block", "details.device", "details.software"),
)
#: measurements that do, of records of kind `speed`
VOLATILE_MEASUREMENTS = frozenset(
    {
        *("tokens_per_second", "tokens_per_second_with_prefill", "time_to_first_token"),
        *("roofline_share", "peak_memory_bytes"),
    }
)

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
    provenance: hashes of inputs and code, versions, host, image, settings, time.
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
    """Write a record with the hash of its content, whole or not at all. Raises `StorageError`."""
    write_sealed(path, asdict(record))


def read_record(path: Path) -> Record:
    """Read and check a record.

    Raises:
        DataError: the file is missing, no JSON, not a record of this version, or changed since it was written.
    """
    try:
        raw = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such record; make it with `snakemake --cores all {path}`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error}); delete it and run its job again") from error
    from pydantic import ValidationError

    try:
        if not isinstance(raw, dict):
            raise ValueError(f"got {type(raw).__name__}, expected an object")
        unknown = set(raw) - {SEAL, *Record.__dataclass_fields__}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        record = _adapter().validate_python({key: value for key, value in raw.items() if key != SEAL})
        unsealed(raw)
        return record
    except (ValidationError, ValueError, TypeError) as error:
        problem = first_problem(error)
        raise DataError(f"{path}: not a record ({problem}); delete it and run its job again") from error


def stable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as read from JSON, without what may differ between two runs of the same job: times, machine, command.

    What is left is equal wherever versions and settings are.
    """
    kept = copy.deepcopy(dict(record))
    kept.pop(SEAL, None)
    for place in VOLATILE:
        _remove(kept, place.split("."))
    kept["measurements"] = [m for m in kept["measurements"] if m["name"] not in VOLATILE_MEASUREMENTS]
    return kept


def _remove(value: Any, keys: Sequence[str]) -> None:
    """Remove what lies under `keys`, in every item of the lists on the way, where it is there at all."""
    if isinstance(value, list):
        for item in value:
            _remove(item, keys)
    elif isinstance(value, dict) and len(keys) == 1:
        value.pop(keys[0], None)
    elif isinstance(value, dict):
        _remove(value.get(keys[0]), keys[1:])


@cache
def _adapter() -> TypeAdapter[Record]:
    """The check of a record; building it takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def first_problem(error: Exception) -> str:
    """What a check of pydantic's, or another error, complains of first."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
