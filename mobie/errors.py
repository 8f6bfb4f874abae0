"""The exception tree: a `MobieError` is the user's to mend and is printed without a traceback; all else is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MobieError(Exception):
    """Base of every error that names what was wrong, what was got, what was expected, and the remedy."""


class ConfigError(MobieError):
    """A configuration file or option has an unknown key, name or value."""


class DataError(MobieError):
    """An input file is missing, damaged, of the wrong shape, or holds values that cannot be used."""


class StorageError(MobieError):
    """A result could not be written: disk full, folder read-only, or file changed under us."""


class MeasurementError(MobieError):
    """A score is not a number (a broken quantized model); recorded as status `failed`, not raised to the user."""


class UnsupportedError(MobieError):
    """A method does not apply to this model or input; recorded as status `unsupported`, not as a failure."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not registered, with the near ones: `unknown method 'gtpq-w3'; did you mean …`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"
