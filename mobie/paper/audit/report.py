"""What an audit found, and how it is shown: text, JSON, Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mobie.paper.audit.document import Severity

Outcome = Literal["agrees", "differs", "not checkable"]
Verdict = Literal["supported by the entries", "contradicted by the paper's own entries", "not checkable"]

HEADINGS: dict[str, str] = {
    "inconsistency": "Inconsistencies",
    "notice": "Notices",
    "info": "For information",
    "agrees": "What agrees",
}
ABOUT = (
    "Every finding is arithmetic over the printed entries, within their rounding. It says what the entries give and "
    "what is printed; it does not say which of them is meant, nor why they differ."
)


@dataclass(frozen=True)
class Finding:
    """One comparison.

    entries:      what was compared, as printed, with its place.
    arithmetic:   how the compared value comes from the entries.
    sentence:     the outcome in neutral words.
    explanations: innocent explanations of a difference.
    """

    check: str
    where: str
    outcome: Outcome
    severity: Severity
    sentence: str
    entries: tuple[str, ...] = ()
    arithmetic: str = ""
    explanations: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        return "agrees" if self.outcome == "agrees" and self.severity == "info" else self.severity


@dataclass(frozen=True)
class ClaimResult:
    """A statement of the paper, and what the paper's own entries say about it."""

    id: str
    where: tuple[str, ...]
    claim: str
    quote: str
    verdict: Verdict
    reading: str  # which reading holds where another does not, else empty
    reason: str
    tolerance: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything an audit found, in the order of the checks."""

    title: str
    source: str
    findings: tuple[Finding, ...]
    claims: tuple[ClaimResult, ...]

    def of(self, section: str) -> list[Finding]:
        """Findings of a section: a severity, or `agrees`."""
        return [finding for finding in self.findings if finding.section == section]

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by section."""
        return {section: len(self.of(section)) for section in HEADINGS}

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of claims by verdict."""
        return dict(sorted(Counter(claim.verdict for claim in self.claims).items()))

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            "about": ABOUT,
            "title": self.title,
            "source": self.source,
            "counts": self.counts,
            "verdicts": self.verdicts,
            "findings": [{**asdict(finding), "section": finding.section} for finding in self.findings],
            "claims": [asdict(claim) for claim in self.claims],
        }


def to_json(report: Report) -> str:
    """One JSON object, keys sorted."""
    return json.dumps(report.as_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def to_text(report: Report) -> str:
    """For a terminal: what differs first, with entries and arithmetic; what agrees in one line each."""
    lines = [report.title, _counts(report), "", ABOUT]
    told: set[tuple[str, ...]] = set()
    for section, heading in HEADINGS.items():
        found = report.of(section)
        if found:
            lines += ["", f"== {heading} ({len(found)})", ""]
        for finding in found:
            lines.append(f"* {finding.where}: {finding.sentence}")
            if section != "agrees":
                lines += [f"    {name}: {text}" for name, text in _details(finding, told)]
    if report.claims:
        lines += ["", f"== Statements ({len(report.claims)})", ""]
        lines += [f"* {claim.id}: {claim.verdict}{_why(claim)}" for claim in report.claims]
    return "\n".join(lines) + "\n"


def _why(claim: ClaimResult) -> str:
    """The reading, or the reason where no finding above has told it."""
    told = claim.reason if claim.verdict == "not checkable" else claim.reading
    return f" ({told})" if told else ""


def _counts(report: Report) -> str:
    counts = report.counts
    found = ", ".join(
        f"{count} {HEADINGS[section].lower()}" for section, count in counts.items() if section != "agrees"
    )
    claims = "; ".join(f"{count} {verdict}" for verdict, count in report.verdicts.items())
    return f"{found}; {counts['agrees']} checks agree. {len(report.claims)} statements: {claims or 'none declared'}."


def to_markdown(report: Report) -> str:
    """To read beside the tables."""
    lines = [f"# Audit of the printed entries: {report.title}", "", _counts(report), "", ABOUT]
    told: set[tuple[str, ...]] = set()
    for section, heading in HEADINGS.items():
        found = report.of(section)
        if found:
            lines += ["", f"## {heading}", ""]
        for finding in found:
            lines.append(f"- **{_escape(finding.where)}** ({finding.check}): {_escape(finding.sentence)}")
            if section != "agrees":
                lines += [f"  - {name}: {_escape(text)}" for name, text in _details(finding, told)]
    if report.claims:
        lines += ["", "## Statements", "", "| id | where | statement | the paper's own entries | values |"]
        lines += ["|---|---|---|---|---|"]
        lines += [_row([c.id, ", ".join(c.where), c.claim, _verdict(c), c.reason]) for c in report.claims]
    return "\n".join(lines) + "\n"


def _verdict(claim: ClaimResult) -> str:
    return f"{claim.verdict} ({claim.reading})" if claim.reading else claim.verdict


def _details(finding: Finding, told: set[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Name and text of what stands behind a finding; a list of explanations is told once."""
    if finding.arithmetic:
        yield "arithmetic", finding.arithmetic
    if finding.entries:
        yield "entries", "; ".join(finding.entries)
    if finding.explanations and finding.explanations not in told:
        told.add(finding.explanations)
        yield "possible explanations", "; ".join(finding.explanations)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("*", "\\*").replace("<", "&lt;")
