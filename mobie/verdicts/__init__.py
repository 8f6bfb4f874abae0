"""A verdict on every statement of the paper, from a suite's own records; the audit's stands beside it.

document.py    ours.yaml, typed: which numbers a statement is checked with
sources.py     those numbers, read from records, with their draws
sampling.py    bootstrap and calibration draws
arithmetic.py  arithmetic over draws
judge.py       outcomes of comparisons, verdicts on statements
write.py       claims.csv, claims.md, claims.json
"""

from mobie.verdicts.judge import MEANING, ClaimVerdict, Verdicts, judge, verdict_records
from mobie.verdicts.write import to_markdown, write_claims

__all__ = ["MEANING", "ClaimVerdict", "Verdicts", "judge", "to_markdown", "verdict_records", "write_claims"]
