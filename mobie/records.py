"""The record: one JSON file per job, the only thing that tables, figures, claims and the report read.

A record says what ran, the values with their standard errors and counts or a status with its reason, and where it came
from. Values are fractions, never per cent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One measured value: `stderr` and `n` say how sure it is, `chance` what a coin would score (None: no such thing)."""

    name: str
    value: float
    stderr: float | None
    n: int
    chance: float | None = None
