"""What a verdict says: the outcomes of comparisons, the words for them, and statements with their verdicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Test = Literal["holds", "within noise", "opposite"]
#: of one comparison; `shown`: there is a number, and nothing that it could be compared with on this model
Outcome = Literal["holds", "direction", "within noise", "opposite", "shown", "missing"]
Scope = Literal["paper", "nano"]

NOT_RUN, NOT_CHECKABLE = "not run", "not checkable"
VERDICTS: dict[Scope, dict[Outcome, str]] = {
    "paper": {
        "holds": "reproduced",
        "direction": "direction only",
        "within noise": "within noise",
        "opposite": "not reproduced",
    },
    "nano": {
        "holds": "direction only (nano model)",
        "direction": "direction only (nano model)",
        "within noise": "within noise (nano model)",
        "opposite": "not reproduced (nano model)",
    },
}
MEANING = {
    "reproduced": "on the paper's own model, the stated relation or value holds within the tolerance.",
    "direction only": "on the paper's own model the direction holds beyond noise; the stated magnitude does not, or is "
    "not measured.",
    "within noise": "on the paper's own model the interval of ours does not decide.",
    "not reproduced": "on the paper's own model ours is opposite beyond noise, or off the stated value by more than "
    "the tolerance where no direction is stated.",
    "direction only (nano model)": "the direction holds beyond noise on a model that is not the paper's. The magnitude "
    "is not compared. It says nothing about the paper's models.",
    "within noise (nano model)": "on a model that is not the paper's, the interval does not decide the direction.",
    "not reproduced (nano model)": "on a model that is not the paper's, the direction is opposite beyond noise. It "
    "says nothing about the paper's models.",
    NOT_RUN: "a record, a method or a model is missing; the reason says which.",
    NOT_CHECKABLE: "no measurement of this suite's models can confirm or refute it; the reason says why.",
}
WORDS: dict[Outcome, str] = {
    "holds": "holds beyond noise",
    "direction": "only the direction holds",
    "within noise": "within noise",
    "opposite": "opposite beyond noise",
    "shown": "a number without a comparison",
    "missing": "not run",
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    value, tolerance: ours and half its interval, in `unit`; None where it is missing.
    compared:         with what, in words.
    beside:           shown only; the verdict does not rest on it.
    basis, gaps:      what the tolerance rests on, and what it leaves out.
    gate:             why a model of the paper's has numbers that may not be compared with the printed ones; empty
                      where they may, or no protocol of the gate's decides them.
    """

    label: str
    model: str
    scope: Scope
    outcome: Outcome
    value: float | None
    tolerance: float | None
    unit: str
    digits: int
    compared: str
    beside: bool = False
    basis: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    reason: str = ""
    records: tuple[str, ...] = ()
    gate: str = ""

    @property
    def shown(self) -> str:
        """`−12.3 ± 1.2 %`."""
        if self.value is None:
            return "–"
        error = "" if not self.tolerance else f" ± {self.tolerance:.{self.digits}f}"
        return f"{self.value:.{self.digits}f}{error}{f' {self.unit}' if self.unit else ''}"


@dataclass(frozen=True)
class ClaimVerdict:
    """A statement with the verdict of the paper's own entries and of ours."""

    id: str
    where: tuple[str, ...]
    claim: str
    paper: str
    verdict: str
    reason: str
    cases: tuple[Case, ...] = ()
    proxy: str = ""
    note: str = ""

    @property
    def tolerance_source(self) -> str:
        """What the tolerances rest on, and what they leave out."""
        basis = sorted({word for case in self.cases for word in case.basis})
        gaps = sorted({word for case in self.cases for word in case.gaps})
        return "; ".join([*basis, *(f"not in it: {gap}" for gap in gaps)])

    @property
    def gate(self) -> str:
        """Which of its models have numbers that may not be compared with the paper's, and why; empty where none has."""
        return "; ".join(dict.fromkeys(case.gate for case in self.cases if case.gate))

    @property
    def records(self) -> tuple[str, ...]:
        """Records behind the values, in order."""
        return tuple(dict.fromkeys(record for case in self.cases for record in case.records))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {
            "tolerance_source": self.tolerance_source,
            "records": self.records,
            "gate": self.gate,
        }


@dataclass(frozen=True)
class Verdicts:
    """All statements, in the order of the paper's file.

    notes: what a reader must know about the suite and its texts.
    """

    suite: str
    notes: tuple[str, ...]
    title: str
    claims: tuple[ClaimVerdict, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Statements by our verdict, in the order of `MEANING`."""
        found = Counter(claim.verdict for claim in self.claims)
        return {verdict: found[verdict] for verdict in MEANING if found[verdict]}

    @property
    def paper_counts(self) -> dict[str, int]:
        """Statements by the verdict of the paper's own entries."""
        return dict(sorted(Counter(claim.paper for claim in self.claims).items()))

    def claim(self, name: str) -> ClaimVerdict:
        """The verdict on a statement."""
        return next(claim for claim in self.claims if claim.id == name)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "suite": self.suite,
            "notes": self.notes,
            "title": self.title,
            "meaning": MEANING,
            "counts": self.counts,
            "paper_counts": self.paper_counts,
            "claims": [claim.as_dict() for claim in self.claims],
        }
