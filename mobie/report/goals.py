"""What README.md says of the goals of our method: how many hold, and each with its two numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from mobie.goals import Judged, Verdict
from mobie.report.markdown import markdown_table

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
DIGITS = {"excess": 3, "unbeaten": 3, "routing": 4, "stored": 3}


def _place(judged: Judged) -> str:
    return f"{judged.model.label}, {judged.scope.label}"


def counts_table(judged: Sequence[Judged]) -> str:
    """Number of goals by verdict, for every model and scope."""
    rows = []
    for place in dict.fromkeys(map(_place, judged)):
        counts = Counter(one.verdict for one in judged if _place(one) == place)
        rows.append([place, *(str(counts[verdict]) for verdict in VERDICTS)])
    return markdown_table(["goals", *VERDICTS], rows)


def verdict_table(judged: Sequence[Judged]) -> str:
    """Goals by line, models and scopes by column: the verdict, our number and the other."""
    places = list(dict.fromkeys(map(_place, judged)))
    lines: dict[tuple[str, float | None], dict[str, str]] = {}
    for one in judged:
        lines.setdefault((one.goal.statement, one.budget), {})[_place(one)] = _entry(one)
    rows = [
        [statement if budget is None else f"{budget:g} bits: {statement}", *(found.get(place, "") for place in places)]
        for (statement, budget), found in lines.items()
    ]
    return markdown_table(["goal: ours against the other's", *places], rows)


def _entry(judged: Judged) -> str:
    if judged.verdict == "not measured":
        return judged.verdict
    digits = DIGITS[judged.goal.measure]
    verdict = judged.verdict if judged.verdict == "holds" else f"**{judged.verdict}**"
    values = [cell.value for cell in (judged.ours, judged.theirs)]
    return f"{verdict}: {' / '.join('–' if value is None else f'{value:.{digits}f}' for value in values)}"
