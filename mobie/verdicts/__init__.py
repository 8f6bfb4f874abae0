"""A verdict on every statement of the paper, from a suite's own records; the audit's stands beside it.

document.py     ours.yaml, typed: which numbers a statement is checked with
sources.py      those numbers, read from records, with their draws
sampling.py     bootstrap and calibration draws
arithmetic.py   arithmetic over draws
comparisons.py  one check: its numbers against what is stated, and the outcome
verdict.py      outcomes and verdicts: their words, and what holds them
judge.py        from outcomes to the verdict on a statement
write.py        claims.csv, claims.md, claims.json
"""

from mobie.verdicts.judge import judge, verdict_records
from mobie.verdicts.verdict import MEANING, ClaimVerdict, Verdicts
from mobie.verdicts.write import to_markdown, write_claims

__all__ = ["MEANING", "ClaimVerdict", "Verdicts", "judge", "to_markdown", "verdict_records", "write_claims"]
