"""The verdicts as files: claims.csv, claims.md, claims.json. Nothing in them depends on time or place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mobie.paths import Layout
from mobie.storage import write_text
from mobie.tables.table import csv_text
from mobie.verdicts.sampling import CONFIDENCE, RESAMPLES
from mobie.verdicts.verdict import MEANING, NOT_CHECKABLE, NOT_RUN, WORDS, Case, ClaimVerdict, Verdicts

COLUMNS = (
    "id",
    "where",
    "claim",
    "paper",
    "ours",
    "values",
    "tolerance",
    "tolerance_source",
    "gate",
    "reason",
    "records",
)
LONG_TABLE = 12  # rows; a longer table is folded
INTERVALS = (
    f"Ours is a value ± half its {100 * CONFIDENCE:.0f} % interval, from {RESAMPLES} bootstrap resamples of windows or "
    "items, the same ones for both sides of a comparison; where calibration seeds were run, their spread is added in "
    "quadrature with Student's quantile. A comparison *holds beyond noise*, is *within noise*, or is *opposite beyond "
    "noise*; accuracies that are all at chance level decide nothing. A statement that needs all of its comparisons is "
    "refuted by one that is opposite at the error rate divided by their number, undecided by one within noise, and "
    "otherwise `not run` where one is missing. The column of the paper is the audit's: arithmetic over its own entries."
)


def write_claims(verdicts: Verdicts, layout: Layout) -> list[Path]:
    """Write claims.csv, claims.md and claims.json. Raises `StorageError`."""
    files = {"csv": to_csv(verdicts), "md": to_markdown(verdicts), "json": to_json(verdicts)}
    paths = [layout.table("claims", suffix) for suffix in files]
    for path, text in zip(paths, files.values(), strict=True):
        write_text(path, text)
    return paths


def to_json(verdicts: Verdicts) -> str:
    """One JSON object, keys sorted."""
    return json.dumps(verdicts.as_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def to_csv(verdicts: Verdicts) -> str:
    """One line per statement."""
    return csv_text(COLUMNS, [_line(claim) for claim in verdicts.claims])


def _line(claim: ClaimVerdict) -> dict[str, str]:
    there = [case for case in claim.cases if case.value is not None]
    return {
        "id": claim.id,
        "where": ", ".join(claim.where),
        "claim": claim.claim,
        "paper": claim.paper,
        "ours": claim.verdict,
        "values": "; ".join(f"{case.label} [{case.model}]: {case.shown}" for case in there),
        "tolerance": "; ".join(f"{case.tolerance:.{case.digits}f}" for case in there),
        "tolerance_source": claim.tolerance_source,
        "gate": claim.gate,
        "reason": claim.reason,
        "records": " ".join(claim.records),
    }


def to_markdown(verdicts: Verdicts) -> str:
    """Counts, one table, then a section per statement."""
    used = {verdict: text for verdict, text in MEANING.items() if verdict in verdicts.counts}
    lines = [
        f"# Verdicts on the {len(verdicts.claims)} statements of the paper, suite `{verdicts.suite}`",
        "",
        " ".join([f"{verdicts.title}.", *verdicts.notes]),
        "",
        *_count_table("the paper's own entries", verdicts.paper_counts),
        *_count_table("ours", verdicts.counts),
        *(f"- **{verdict}**: {text}" for verdict, text in used.items()),
        "",
        INTERVALS,
        "",
        "## All statements",
        "",
        "| id | where | statement | the paper's own entries | ours |",
        "|:--|:--|:--|:--|:--|",
        *(_row(f"[{c.id}](#{c.id})", ", ".join(c.where), c.claim, c.paper, c.verdict) for c in verdicts.claims),
        "",
        "## One by one",
    ]
    for claim in verdicts.claims:
        lines += ["", *_section(claim)]
    return "\n".join(lines) + "\n"


def _count_table(heading: str, counts: Mapping[str, int]) -> list[str]:
    return [f"| {heading} | statements |", "|:--|--:|", *(_row(name, str(n)) for name, n in counts.items()), ""]


def _section(claim: ClaimVerdict) -> list[str]:
    lines = [f"### {claim.id}", "", f"{escape(claim.claim)} ({', '.join(claim.where)})", ""]
    lines += [f"- the paper's own entries: {claim.paper}", f"- ours: **{claim.verdict}**. {escape(claim.reason)}"]
    if claim.note:
        lines.append(f"- how it is read: {escape(claim.note)}")
    if claim.gate:
        lines.append(f"- protocol gate: {escape(claim.gate)}")
    if claim.tolerance_source:
        lines.append(f"- tolerance: {escape(claim.tolerance_source)}")
    if claim.verdict != NOT_CHECKABLE or claim.records:
        lines += _values(claim)
    if claim.records:
        lines += ["", "<details><summary>Records</summary>", "", *(f"- `{r}`" for r in claim.records), "", "</details>"]
    return lines


def _values(claim: ClaimVerdict) -> list[str]:
    if not claim.cases or (claim.verdict == NOT_RUN and all(case.value is None for case in claim.cases)):
        return []
    rows = [
        _row(_label(case), case.model, case.shown, case.compared, WORDS[case.outcome] + _because(case.reason))
        for case in claim.cases
    ]
    table = ["| comparison | model | ours | compared with | outcome |", "|:--|:--|--:|:--|:--|", *rows]
    if len(rows) <= LONG_TABLE:
        return ["", *table]
    return ["", f"<details><summary>{len(rows)} comparisons</summary>", "", *table, "", "</details>"]


def _label(case: Case) -> str:
    return case.label + (" (beside: not part of the verdict)" if case.beside else "")


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(escape(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def escape(text: str) -> str:
    """Text of a record or a paper in Markdown."""
    return text.replace("*", "\\*").replace("<", "&lt;")
