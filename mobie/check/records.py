"""Is a record a record: its keys, its status, its place, and values that follow from the items it lists."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobie.check.files import SEAL, Damaged, broken_seal, read_json
from mobie.check.findings import Report

STATUSES = frozenset({"ok", "failed", "skipped", "oom", "timeout", "unsupported"})
TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "status": (str,),
    "reason": (str, type(None)),
    "suite": (str,),
    "model": (str,),
    "method": (str,),
    "seed": (int,),
    "protocol": (str,),
    "measurements": (list,),
    "details": (dict,),
    "provenance": (dict,),
}
MEASUREMENT = frozenset({"name", "value", "stderr", "n", "chance"})
PROVENANCE = ("inputs", "code", "versions", "host", "finished", "command", "git_commit")
SHA256 = re.compile(r"[0-9a-f]{64}")
#: last part of a measurement's name → the values it can have
RANGES = {
    "acc": (0.0, 1.0),
    "acc_norm": (0.0, 1.0),
    "exact_match": (0.0, 1.0),
    "similarity": (-1.0, 1.0),
    "expert_shift": (0.0, 1.0),
    "repetition": (0.0, 1.0),
    "perplexity": (1.0, math.inf),
    "bits_paper": (0.0, 32.0),
    "bits_codes": (0.0, 32.0),
    "bits_stored": (0.0, math.inf),
    "roofline_share": (0.0, math.inf),
    "tokens_per_second": (0.0, math.inf),
}
WITHOUT_VALUES = frozenset({"code_samples"})  # kinds that write files and measure nothing
RELATIVE, ABSOLUTE = 1e-6, 1e-9  # how far a value may be from the one computed here: another order of the same sum
RERUN = "delete the record and run its job again"


@dataclass(frozen=True)
class Stored:
    """A record as it lies on disk.

    values:    measurement name → (value, standard error, n, chance).
    published: one of another machine, committed.
    """

    path: Path
    raw: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Any]]
    published: bool

    @property
    def ok(self) -> bool:
        return self.raw["status"] == "ok"

    @property
    def kind(self) -> str:
        return str(self.raw["kind"])

    @property
    def model(self) -> str:
        return str(self.raw["model"])

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Name → hash of what the job read; empty where a record of a hole has no provenance."""
        return self.raw["provenance"].get("inputs", {})

    @property
    def details(self) -> Mapping[str, Any]:
        return self.raw["details"]


def record_paths(folder: Path, suite: str | None) -> list[Path]:
    """Files that stand where records stand: SUITE/MODEL/METHOD/sSEED/KIND.json, and below `published/`."""
    found = [*folder.glob("*/*/*/s*/*.json"), *folder.glob("published/*/*/*/s*/*.json")]
    return sorted(path for path in found if suite in (None, path.parts[-5]))


def load(path: Path, folder: Path, kinds: Sequence[str], report: Report) -> Stored | None:
    """Read a record and report what is wrong with it; None where nothing can be compared with it."""
    try:
        raw = read_json(path)
    except Damaged as damage:
        report.error(path, str(damage), "a record", RERUN)
        return None
    problem = _schema_problem(raw)
    if problem is not None:
        report.error(path, problem, "a record", RERUN)
        return None
    seal = broken_seal(raw)
    if seal is not None:
        report.error(path, seal, "a record as it was written", RERUN)
    published = path.relative_to(folder).parts[0] == "published"
    record = Stored(path, raw, {m["name"]: m for m in raw["measurements"]}, published)
    _check_place(record, kinds, report)
    _check_status(record, report)
    for measurement in raw["measurements"]:
        for problem in _implausible(measurement):
            report.error(path, f"{measurement['name']}: {problem}", "a measurement", RERUN)
    if record.ok:
        _check_provenance(record, report)
        for problem in _unlike_items(record):
            report.error(path, problem, "the value of the items that the record lists", RERUN)
    return record


def _schema_problem(raw: Any) -> str | None:
    """The first thing that makes a value no record."""
    if not isinstance(raw, dict):
        return f"got {type(raw).__name__}, not an object"
    unknown = set(raw) - {SEAL, *TYPES}
    if unknown or set(TYPES) - set(raw):
        return f"keys missing {sorted(set(TYPES) - set(raw))}, unknown {sorted(unknown)}"
    for key, types in TYPES.items():
        if not isinstance(raw[key], types) or isinstance(raw[key], bool):
            return f"{key} is {type(raw[key]).__name__}, not {' or '.join(kind.__name__ for kind in types)}"
    if raw["status"] not in STATUSES:
        return f"status {raw['status']!r} is none of {', '.join(sorted(STATUSES))}"
    names = []
    for measurement in raw["measurements"]:
        if not isinstance(measurement, dict) or set(measurement) != MEASUREMENT:
            return f"a measurement is not an object with the keys {', '.join(sorted(MEASUREMENT))}"
        if not isinstance(measurement["name"], str) or not _is_number(measurement["value"]):
            return f"measurement {measurement['name']!r}: the value {measurement['value']!r} is no number"
        names.append(measurement["name"])
    twice = {name for name in names if names.count(name) > 1}
    return f"measurements stand twice: {', '.join(sorted(twice))}" if twice else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_place(record: Stored, kinds: Sequence[str], report: Report) -> None:
    """The path says the same keys as the record."""
    suite, model, method, seed, file = record.path.parts[-5:]
    said = {"suite": suite, "model": model, "method": method, "seed": seed, "kind": file.removesuffix(".json")}
    for key, value in said.items():
        own = f"s{record.raw['seed']}" if key == "seed" else record.raw[key]
        if own != value:
            report.error(
                record.path, f"its {key} is {own!r}", f"{value!r} as in its path: it is another job's record", RERUN
            )
    if record.kind not in kinds:
        report.warning(record.path, f"kind {record.kind!r}", f"one of {', '.join(kinds)}", "it is read by nothing")


def _check_status(record: Stored, report: Report) -> None:
    """A value or a reason, never both."""
    reason, count = record.raw["reason"], len(record.raw["measurements"])
    if record.ok and (reason is not None or not (count or record.kind in WITHOUT_VALUES)):
        report.error(record.path, f"status ok with reason {reason!r} and {count} values", "values, no reason", RERUN)
    if not record.ok and (not reason or count):
        report.error(
            record.path,
            f"status {record.raw['status']} with reason {reason!r} and {count} values",
            "a reason, no value",
            RERUN,
        )


def _implausible(measurement: Mapping[str, Any]) -> Iterator[str]:
    """What a measurement cannot be."""
    name, value, error = measurement["name"], measurement["value"], measurement["stderr"]
    low, high = RANGES.get(name.rpartition(".")[2], (-math.inf, math.inf))
    if not low - ABSOLUTE <= value <= high + ABSOLUTE:
        yield f"value {value} outside {low} to {high}"
    if error is not None and not (_is_number(error) and error >= 0):
        yield f"standard error {error!r} is no number of 0 or more"
    n = measurement["n"]
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        yield f"n is {n!r}, not a whole number of 1 or more"
    chance = measurement["chance"]
    if chance is not None and not (_is_number(chance) and 0 <= chance <= 1):
        yield f"chance {chance!r} is no number from 0 to 1"


def _check_provenance(record: Stored, report: Report) -> None:
    """Where a value comes from."""
    provenance = record.raw["provenance"]
    missing = [key for key in PROVENANCE if key not in provenance]
    wrong = [key for key in ("inputs", "versions", "host") if not isinstance(provenance.get(key, {}), dict)]
    if missing or wrong:
        report.error(record.path, f"provenance lacks {', '.join(missing + wrong)}", "what made the values", RERUN)
        return
    for what, value in {"protocol": record.raw["protocol"], "provenance.code": provenance["code"]}.items():
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            report.error(record.path, f"{what} is {value!r}", "64 hexadecimal digits", RERUN)
    if not provenance["versions"].get("python"):
        report.error(record.path, "no version of Python", "versions of what decides values", RERUN)
    commit = provenance["git_commit"]
    if record.published and (not commit or str(commit).endswith("+")):
        report.note(record.path, f"published from the commit {commit}", "a commit without changes")


# --- values against the items they come from -------------------------------------------------------------------------


def _unlike_items(record: Stored) -> Iterator[str]:
    """Values that are not those of the items in the record's details; an entry of another form is one, too."""
    recompute = RECOMPUTED.get(record.kind)
    if recompute is None:
        return
    try:
        expected = recompute(record.details)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        yield f"its items cannot be read ({type(error).__name__}: {error})"
        return
    for name, sums in expected.items():
        found = record.values.get(name)
        if found is None:
            yield f"items of {name}, but no such value"
            continue
        for key, value in sums.items():
            if not same(found[key], value):
                yield f"{name}: {key} {found[key]}, its items give {value}"


def same(got: float | None, expected: float | None) -> bool:
    """Equal but for the order of a sum."""
    if got is None or expected is None:
        return got is expected
    return math.isclose(got, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error; None for a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _exponential(values: Sequence[float], sign: float) -> dict[str, Any]:
    """exp of a mean, with the standard error carried through."""
    mean, error = mean_and_error(values)
    value = math.exp(sign * mean)
    return {"value": value, "stderr": None if error is None else value * error}


def _perplexities(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{text}.perplexity": _exponential(losses, 1) | {"n": len(losses) * details["window_tokens"][text]}
        for text, losses in details["window_nll"].items()
    }


def _shifts(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: _exponential(losses, 1) for name, losses in details["window_nll"].items()}


def _answers(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, answers in details["answers"].items():
        if name.endswith(".perplexity"):
            found[name] = _exponential(answers, -1) | {"n": len(answers)}
        else:
            mean, error = mean_and_error(answers)
            found[name] = {"value": mean, "stderr": error, "n": len(answers)}
    return found


RECOMPUTED: dict[str, Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]] = {
    "perplexity": _perplexities,
    "gate": _perplexities,
    "shift": _shifts,
    "tasks": _answers,
    "hard": _answers,
}
