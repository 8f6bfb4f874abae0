"""Does the verdict of a protocol gate follow from its own values, and are those of the accuracies the scored ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mobie.check.findings import Report
from mobie.check.records import RERUN, Stored, same

PERPLEXITY = "wikitext2_ppl"


def check_gate(record: Stored, records: Mapping[Path, Stored], report: Report) -> None:
    """Report what in a gate's record does not follow; `records` holds all by their paths."""
    try:
        problems = [*_unlike_tasks(record, records), *_unlike_values(record), *_unlike_verdict(record)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems = [f"its comparisons cannot be read ({type(error).__name__}: {error})"]
    for problem in problems:
        report.error(record.path, problem, "what follows from its values", RERUN)


def _unlike_tasks(record: Stored, records: Mapping[Path, Stored]) -> Iterator[str]:
    """Accuracies that are not those of the zero-shot record beside it."""
    tasks = records.get(record.path.with_name("tasks.json"))
    for name, measurement in record.values.items():
        scored = tasks.values.get(name) if tasks is not None and tasks.ok else None
        if scored is not None and not same(measurement["value"], scored["value"]):
            yield f"{name} is {measurement['value']}, tasks.json has {scored['value']}"


def _unlike_values(record: Stored) -> Iterator[str]:
    """Comparisons that say another distance, or another answer, than their value and the printed one."""
    for comparison in record.details["comparisons"]:
        scale = 1.0 if comparison["column"] == PERPLEXITY else 100.0
        distance = record.values[comparison["name"]]["value"] * scale - float(comparison["printed"])
        reproduces = abs(distance) <= comparison["tolerance"]
        if not same(comparison["distance"], distance) or comparison["reproduces"] != reproduces:
            yield (
                f"{comparison['name']} is said to be off by {comparison['distance']}, reproducing "
                f"{comparison['reproduces']}; it is off by {distance}, reproducing {reproduces}"
            )


def _unlike_verdict(record: Stored) -> Iterator[str]:
    """A verdict that is not the one of the suite's own protocols."""
    own = {protocol["name"] for protocol in record.details["protocols"] if protocol["own"]}
    columns: dict[str, bool] = {}
    for comparison in record.details["comparisons"]:
        if comparison["name"] in own:
            column = comparison["column"]
            columns[column] = columns.get(column, False) or comparison["reproduces"]
    said = record.details["comparable"]
    possible = ("no",) if not all(columns.values()) else ("yes", "unknown") if columns else ("unknown",)
    if said not in possible:
        yield f"comparable is {said!r}, its comparisons give {' or '.join(possible)}"
