"""A table: were its rows measured alike, and does it say what its records say.

Values are compared twice: with the record's own measurement, cell by cell, and the whole file with the table as it is
built from the records now.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobie.check.findings import Report
from mobie.check.records import Stored
from mobie.errors import MobieError
from mobie.paths import Layout
from mobie.results import Results

LONG = ".long.csv"
#: versions that define what a score is; a difference inside a table is an error
DECIDING = ("lm-eval", "evalplus", "transformers", "tokenizers")
#: versions that move the last digits
NUMERIC = ("torch", "numpy", "scipy", "safetensors", "datasets")
#: column of a table → kind of record, pattern of the measurement's name, factor
DIRECT: tuple[tuple[str, str, str, float], ...] = (
    (r"bits", "quantize", "bits_paper", 1.0),
    (r"(bits_codes|bits_stored)", "quantize", r"{0}", 1.0),
    (
        r"(arc_easy|arc_challenge|hellaswag|lambada_openai|lambada_standard|piqa|winogrande)",
        *("tasks", r"{0}\.acc(_norm)?", 100.0),
    ),
    (r"(mmlu|mathqa|gsm8k)", "hard", r"{0}\..+", 100.0),
    (r"ppl_(.+)", "perplexity", r"{0}\.perplexity", 1.0),
    (r"wikitext2_ppl", "perplexity", r".+\.perplexity", 1.0),
    (r"[^/]+/(?!avg).+", "perplexity", r".+\.perplexity", 1.0),
    (r"routing_similarity", "routing", "similarity", 1.0),
    (r"expert_shift", "routing", "expert_shift", 1.0),
)
OWN_INPUTS = ("checkpoint", "reference", "programs ")  # inputs of a score that are a method's own
DIGITS = 4  # decimals in a long table
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:[eE][+-]?\d+)?")
Line = Mapping[str, str]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Lines of a table. Raises `OSError`, `ValueError` and `csv.Error` for what is none."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file, strict=True))
    if any(None in line or None in line.values() for line in lines):
        raise ValueError("lines of different length")
    return lines


def table_files(folder: Path, suite: str | None) -> dict[Path, list[dict[str, str]] | str]:
    """Long tables of a suite with their lines, or what is wrong with the file."""
    found: dict[Path, list[dict[str, str]] | str] = {}
    for path in sorted(folder.glob(f"*{LONG}")):
        try:
            lines = read_csv(path)
        except (OSError, ValueError, csv.Error) as error:
            found[path] = str(error)
            continue
        if lines and suite not in (None, lines[0].get("suite")):
            continue
        found[path] = lines
    return found


# --- were the rows measured alike ------------------------------------------------------------------------------------


def check_protocols(path: Path, read: Sequence[Stored], report: Report) -> None:
    """The records that a table reads, by kind: one protocol, one set of inputs, one harness; the rest is noted."""
    again = "score the rows again under one protocol: run the table's target with snakemake"
    for kind, group in _grouped(read, lambda r: r.kind).items():
        if kind == "quantize":
            _check_calibrations(path, group, report, again)
            continue
        if kind != "speed":  # the speed of a stored and of a published model are timed under suites of their own
            _differ(path, group, kind, "the protocol", lambda r: r.raw["protocol"], report.error, again)
            _check_scores(path, group, kind, report, again)
        for library in (*DECIDING, *NUMERIC):
            level = report.error if library in DECIDING and kind != "speed" else report.warning
            _differ(path, group, kind, library, lambda r, name=library: _version(r, name), level, again)
        _differ(path, group, kind, "the code that measured", lambda r: _known(r, "code"), report.warning, again)
    ok = [r for r in read if r.ok]
    for what, value in {
        "commits": lambda r: _known(r, "git_commit"),
        "container images": lambda r: _known(r, "image"),
        "numbers of threads": lambda r: r.raw["provenance"].get("host", {}).get("torch_threads"),
        "machines": lambda r: r.raw["provenance"].get("host", {}).get("platform"),
    }.items():
        found = sorted({str(value(r)) for r in ok})
        if len(found) > 1:
            report.note(path, f"records of {len(found)} {what}: {', '.join(found)}", "one")


def _check_scores(path: Path, group: list[Stored], kind: str, report: Report, again: str) -> None:
    """Scores of one model read the same windows, items and data."""
    for model, records in _grouped(group, lambda r: r.model).items():
        names = sorted({name for r in records for name in r.inputs if not name.startswith(OWN_INPUTS)})
        for name in names:
            have = [r for r in records if name in r.inputs]
            _differ(path, have, kind, f"{name} of {model}", lambda r, n=name: r.inputs[n], report.error, again)
        _differ(path, records, kind, f"the items of {model}", lambda r: r.details.get("items"), report.error, again)
        for seed, same_seed in _grouped(records, lambda r: r.raw["seed"]).items():
            what = f"the reference of {model}, seed {seed}"
            _differ(path, same_seed, kind, what, lambda r: r.inputs.get("reference"), report.error, again)


def _check_calibrations(path: Path, group: list[Stored], report: Report, again: str) -> None:
    """Rows of a model were made from the same model; those of one seed and one calibration read the same tokens."""
    for model, records in _grouped(group, lambda r: r.model).items():
        what = f"the weights of {model}"
        _differ(path, records, "quantize", what, lambda r: r.inputs.get("model"), report.error, again)
        for (seed, _), same_tokens in _grouped(records, lambda r: (r.raw["seed"], r.raw["protocol"])).items():
            what = f"the calibration tokens of {model}, seed {seed}"
            _differ(path, same_tokens, "quantize", what, lambda r: r.inputs.get("calibration"), report.error, again)
        for library in (*DECIDING[2:], *NUMERIC):
            _differ(
                path, records, "quantize", library, lambda r, name=library: _version(r, name), report.warning, again
            )


def _differ(
    path: Path,
    records: Iterable[Stored],
    kind: str,
    what: str,
    value: Callable[..., Any],
    level: Callable[..., None],
    again: str,
) -> None:
    """Report records that are ok and whose value is another than that of most."""
    by_value = _grouped([r for r in records if r.ok], lambda r: repr(value(r)))
    if len(by_value) < 2:
        return
    usual, *others = sorted(by_value.items(), key=lambda item: -len(item[1]))
    for shown, odd in others:
        places = ", ".join("/".join(r.path.parts[-4:]) for r in odd[:3]) + (", …" if len(odd) > 3 else "")
        level(path, f"{what} differs in {kind}: {_short(shown)} in {places}", f"{_short(usual[0])} as in most", again)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}…"


def _version(record: Stored, library: str) -> Any:
    return record.raw["provenance"].get("versions", {}).get(library)


def _known(record: Stored, key: str) -> Any:
    return record.raw["provenance"].get(key)


def _grouped(records: Iterable[Stored], key: Callable[[Stored], Any]) -> dict[Any, list[Stored]]:
    found: dict[Any, list[Stored]] = defaultdict(list)
    for record in records:
        found[key(record)].append(record)
    return found


# --- does it say what its records say --------------------------------------------------------------------------------


def check_values(path: Path, lines: Sequence[Line], records: Mapping[str, Stored], report: Report) -> None:
    """Each value of a long table against the record that it names, and averages against their row."""
    again = f"build the table again: `python -m mobie table {path.name.removesuffix(LONG)}`"
    row_values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for number, line in enumerate(lines, start=2):
        try:
            problem = _line_problem(line, records)
            place = tuple(line[key] for key in ("model", "section", "row", "config"))
            if problem is None and re.fullmatch(r"avg\d+", line["column"]) and line["ours"]:
                problem = _average_problem(line, row_values.pop(place, []))
            elif line["ours"] and _direct(line["column"], ("tasks", "hard")):
                row_values[place].append(float(line["ours"]))
        except (KeyError, ValueError) as error:
            problem = f"cannot be read ({error!r})"
        if problem is not None:
            where = f"line {number}, {line.get('row')}, {line.get('column')}"
            report.error(path, f"{where}: {problem}", "what its record says", again)


def _line_problem(line: Line, records: Mapping[str, Stored]) -> str | None:
    """What a line says that its record does not."""
    if not line["record"]:
        return None
    record = records.get(line["record"])
    if record is None:
        if line["status"] == "missing":
            return None
        return f"{line['ours'] or line['status']}, but its record {line['record']} is not there"
    if not record.ok:
        said = (line["ours"], line["status"], line["reason"])
        expected = ("", record.raw["status"], record.raw["reason"])
        return None if said == expected else f"says {said}, its record {expected}"
    if not line["ours"]:
        return None  # a hole of a record that is ok: it lacks this value, or a row beside it is a hole
    direct = _direct(line["column"], (record.kind,))
    if direct is None:
        return None
    pattern, scale = direct
    candidates = [m for name, m in record.values.items() if re.fullmatch(pattern, name)]
    if candidates and not any(_shows(line, m, scale) for m in candidates):
        return f"says {line['ours']} ± {line['stderr']} (n = {line['n']}), the record has {_told(candidates, scale)}"
    return None


def _direct(column: str, kinds: Sequence[str]) -> tuple[str, float] | None:
    """Pattern of the measurement that a column shows, and its factor; None where it shows something derived."""
    for columns, kind, pattern, scale in DIRECT:
        found = re.fullmatch(columns, column)
        if found and kind in kinds:
            return pattern.format(*map(re.escape, found.groups())), scale
    return None


def _shows(line: Line, measurement: Mapping[str, Any], scale: float) -> bool:
    """Whether a line is a measurement, rounded as lines are."""
    for key, name in (("ours", "value"), ("stderr", "stderr"), ("chance", "chance")):
        value = measurement[name]
        if (value is None) != (line[key] == ""):
            return False
        if value is not None and not _rounded(float(line[key]), value * scale):
            return False
    return line["n"] == str(measurement["n"])


def _rounded(shown: float, value: float) -> bool:
    return math.isclose(shown, value, rel_tol=1e-9, abs_tol=0.51 * 10**-DIGITS)


def _told(candidates: Sequence[Mapping[str, Any]], scale: float) -> str:
    return " or ".join(f"{scale * m['value']:.4f} (n = {m['n']})" for m in candidates[:3])


def _average_problem(line: Line, values: Sequence[float]) -> str | None:
    """What an average is not: the mean of the columns before it, where all of them are there."""
    count = int(line["column"].removeprefix("avg"))
    if len(values) != count:
        return None
    mean = math.fsum(values) / count
    if abs(float(line["ours"]) - mean) > 1.1 * 10**-DIGITS:
        return f"says {line['ours']}, its {count} columns have the mean {mean:.4f}"
    return None


def check_rebuilt(name: str, suite: str, layout: Layout, report: Report) -> list[Path]:
    """Compare the four files of a table with what its records give now; returns the records that it reads."""
    from mobie.tables import build_table
    from mobie.tables.table import WRITERS

    again = f"build the table again: `python -m mobie table {name}`"
    results = Results(suite, layout)
    try:
        table = build_table(name, results)
    except MobieError as error:
        report.error(layout.table(name, "csv"), f"cannot be built: {error}", "records that can be read")
        return list(results.asked)
    for suffix, writer in WRITERS.items():
        path = layout.table(name, suffix)
        if not path.is_file():
            report.note(path, "no such file", "beside the table's other files", again)
            continue
        compare_text(path, path.read_bytes().decode(errors="replace"), writer(table), again, report)
    return list(results.asked)


def compare_text(path: Path, got: str, expected: str, again: str, report: Report) -> None:
    """A file whose numbers differ from those of its records is wrong; one whose words differ is of other code."""
    if got == expected:
        return
    own, now = got.splitlines(), expected.splitlines()
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(own, now, strict=False), start=1) if a != b]
    for number, have, want in pairs:
        if NUMBER.findall(have) != NUMBER.findall(want):
            report.error(path, f"line {number} reads {_short(have)!r}", f"{_short(want)!r} from the records", again)
            return
    if len(own) != len(now):
        report.error(path, f"{len(own)} lines", f"{len(now)} from the records", again)
    else:
        where = f"line {pairs[0][0]} reads {_short(pairs[0][1])!r}" if pairs else "it ends otherwise"
        report.warning(path, f"the same numbers in other words: {where}", "the words of this version", again)
