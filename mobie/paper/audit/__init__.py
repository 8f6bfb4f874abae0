"""What a paper's own numbers say about each other, from CSV and YAML alone: no model, no torch.

The checks know no paper: what the columns mean, which statements are made and which settings are given stands in the
`claims.yaml` of the paper's folder (see `document.py`).
"""

from __future__ import annotations

from pathlib import Path

from mobie.paper.audit.entries import check_averages, check_chance, check_fractions, check_reference
from mobie.paper.audit.formulas import check_formulas
from mobie.paper.audit.report import ClaimResult, Finding, Report, to_json, to_markdown, to_text
from mobie.paper.audit.rows import check_repeats, check_same_rows
from mobie.paper.audit.statements import check_settings, judge_claims
from mobie.paper.audit.tables import Paper

__all__ = ["ClaimResult", "Finding", "Report", "audit", "to_json", "to_markdown", "to_text"]

CHECKS = (
    check_averages,
    check_same_rows,
    check_repeats,
    check_formulas,
    check_settings,
    check_fractions,
    check_chance,
    check_reference,
)


def audit(folder: Path) -> Report:
    """Check the tables and statements in a paper's folder.

    Raises:
        ConfigError: `claims.yaml` is missing or wrong, or refers to what is not there.
        DataError: a table is missing or damaged.
    """
    paper = Paper(folder)
    findings = [finding for check in CHECKS for finding in check(paper)]
    statements, claims = judge_claims(paper)
    about = paper.document.paper
    return Report(about.title, about.source, (*findings, *statements), tuple(claims))
