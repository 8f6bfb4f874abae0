"""What the report shows of a record: everything but what is long, and no path of the machine that made it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mobie.paths import Layout
from mobie.records import Record, read_record

#: details that are one value per item, token or matrix element: only their number is told
COUNTED = frozenset({"answers", "bytes_by_item", "items", "matrices", "samples", "statuses", "window_nll"})
MOST_ENTRIES, MOST_ITEMS, MOST_LETTERS = 24, 12, 500
LOG_LINES, LOG_BYTES = 20, 65536
TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
Tidy = Callable[[str], str]


def path_stripper(root: Path, home: Path) -> Tidy:
    """A function that makes paths under `root` relative and writes `~` for `home`, wherever they stand in a text.

    It is the same text, then, wherever the repository lies.
    """
    places: dict[str, str] = {}
    for folder, name in ((root, ""), (root.resolve(), ""), (home, "~"), (home.resolve(), "~")):
        if folder.is_absolute() and folder != Path(folder.anchor):
            places.setdefault(folder.as_posix(), name)
    if not places:
        return lambda text: text
    longest_first = sorted(places, key=lambda place: -len(place))
    pattern = re.compile(rf"(?<![\w.~/-])({'|'.join(map(re.escape, longest_first))})(/|(?![\w-]|\.\w))")

    def relative(match: re.Match[str]) -> str:
        name = places[match[1]]
        if name:
            return name + match[2]
        return "" if match[2] else "."

    return lambda text: pattern.sub(relative, text)


def tidied(value: Any, tidy: Tidy) -> Any:
    """A JSON value with `tidy` applied to every string in it."""
    if isinstance(value, str):
        return tidy(value)
    if isinstance(value, Mapping):
        return {tidy(str(key)): tidied(item, tidy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [tidied(item, tidy) for item in value]
    return value


def shortened(value: Any, key: str = "") -> Any:
    """Details of a record with what is long replaced by its count: `"200 values left out"`."""
    if isinstance(value, str):
        return value if len(value) <= MOST_LETTERS else f"{value[:MOST_LETTERS]} … ({len(value)} characters)"
    if isinstance(value, Mapping):
        if key in COUNTED or len(value) > MOST_ENTRIES:
            return _left_out(value)
        return {str(name): shortened(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if key == "traceback":  # of a failed job: at most 30 lines
            return [shortened(item) for item in value]
        if key in COUNTED or len(value) > MOST_ITEMS:
            return _left_out(value)
        return [shortened(item) for item in value]
    return value


def _left_out(value: Any) -> str:
    return f"{_leaves(value)} values left out"


def _leaves(value: Any) -> int:
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_leaves, value)) if isinstance(value, list | tuple) else 1


def log_tail(path: Path) -> list[str]:
    """The last lines of a job's log, without colours and overwritten progress bars; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in TERMINAL_CODES.sub("", text).split("\n"))
    return [line for line in lines if line.strip()][-LOG_LINES:]


def record_view(path: Path, layout: Layout, tidy: Tidy) -> dict[str, Any]:
    """JSON values of a record that was asked for, there or not. `path` lies in the layout's results.

    Raises:
        DataError: the record is damaged.
    """
    relative = path.relative_to(layout.root)
    suite, model, method, seed = relative.parts[-5:-1]  # the same of a published record, which lies one folder deeper
    log = layout.log(suite, model, method, seed, path.stem)
    view = {
        "path": relative.as_posix(),
        "kind": path.stem,
        "model": model,
        "method": method,
        "seed": seed.removeprefix("s"),
        "rerun": f"snakemake --cores 1 --force {shlex.quote(relative.as_posix())}",
        "log": log_tail(log),
        "log_path": log.relative_to(layout.root).as_posix(),
    }
    if path.exists():
        view |= _of_record(read_record(path))
        view["href"] = quote(path.relative_to(layout.report.parent).as_posix())
    else:
        view |= {"status": "missing", "reason": "its job has not run"}
    return tidied(view, tidy)


def _of_record(record: Record) -> dict[str, Any]:
    known = dict(record.provenance)
    return {
        "status": record.status,
        "reason": record.reason,
        "protocol": record.protocol,
        "measurements": [[m.name, m.value, m.stderr, m.n, m.chance] for m in record.measurements],
        "command": shlex.join(map(str, known.pop("command", ()))),
        "inputs": known.pop("inputs", {}),
        "versions": known.pop("versions", {}),
        "host": known.pop("host", {}),
        "git_commit": known.pop("git_commit", None),
        "provenance": known,
        "details": shortened(record.details),
    }
