"""What a check found: one line each, with the file, what is there, what was expected, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """level: `error`: a number or file cannot be trusted; `warning`: it may be right and must be looked at; `note`."""

    level: Level
    file: str
    what: str
    expected: str = ""
    remedy: str = ""

    def line(self) -> str:
        """The finding for people."""
        told = [f"{self.level}: {self.file}: {self.what}"]
        told += [f"expected {self.expected}"] if self.expected else []
        told += [self.remedy] if self.remedy else []
        return " ".join("; ".join(told).split())


@dataclass
class Report:
    """Findings so far, in order, and what was looked at.

    root: folder that file names are given relative to.
    """

    root: Path
    findings: list[Finding] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def name(self, path: Path) -> str:
        """A path as it is shown."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def error(self, path: Path, what: str, expected: str = "", remedy: str = "") -> None:
        self._add("error", path, what, expected, remedy)

    def warning(self, path: Path, what: str, expected: str = "", remedy: str = "") -> None:
        self._add("warning", path, what, expected, remedy)

    def note(self, path: Path, what: str, expected: str = "", remedy: str = "") -> None:
        self._add("note", path, what, expected, remedy)

    def _add(self, level: Level, path: Path, what: str, expected: str, remedy: str) -> None:
        finding = Finding(level, self.name(path), what, expected, remedy)
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def counts(self) -> dict[Level, int]:
        """Findings by level."""
        return {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}

    def ordered(self) -> list[Finding]:
        """Errors first."""
        return sorted(self.findings, key=lambda finding: LEVELS.index(finding.level))

    def summary(self) -> str:
        """One line: what was looked at and what was found."""
        looked = ", ".join(f"{count:,} {what}" for what, count in self.seen.items())
        found = ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in self.counts.items())
        return f"checked {looked or 'nothing'}: {found}"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        findings = [asdict(finding) for finding in self.ordered()]
        return {"checked": dict(self.seen), "counts": self.counts, "findings": findings}
