"""Running something that may fail without breaking the workflow: an error becomes a hole with a status and a reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mobie.errors import MeasurementError, MobieError, UnsupportedError
from mobie.records import Status
from mobie.redaction import redact
from mobie.storage import no_memory, storage_error

TRACEBACK_LINES = 30
#: how torch's CPU allocator, C++ and a thread that cannot start say that there is no memory left
NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "can't start new thread")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """A value, or the status and reason of its absence with the end of the traceback."""

    value: Value | None
    status: Status = "ok"
    reason: str | None = None
    traceback: tuple[str, ...] = ()


def attempt(action: Callable[[], Value], writes: Path) -> Outcome[Value]:
    """Call `action`, which writes under `writes`.

    Unsupported cases, lack of memory and defects of a method become an outcome. The user's mistakes and the disk's
    (`MobieError`, `OSError`) are raised: they are to be mended, not recorded.
    """
    try:
        return Outcome(action())
    except UnsupportedError as error:
        return Outcome(None, "unsupported", redact(str(error)))
    except MeasurementError as error:
        return Outcome(None, "failed", redact(str(error)))
    except MobieError:
        raise
    except OSError as error:
        if not is_out_of_memory(error):
            raise storage_error(Path(error.filename or writes), error) from error
        return _failed(error)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> Outcome[Value]:
    """A defect or a lack of memory as an outcome."""
    tail = redact(traceback.format_exc()).splitlines()[-TRACEBACK_LINES:]
    status: Status = "oom" if is_out_of_memory(error) else "failed"
    return Outcome(None, status, redact(f"{type(error).__name__}: {error}").strip().splitlines()[0], tuple(tail))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no memory left; torch's CPU allocator says so in a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY):
        return True
    return isinstance(error, OSError) and no_memory(error)
