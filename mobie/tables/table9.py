"""Table 9: harder tasks with instruction-tuned models."""

from __future__ import annotations

from mobie.results import Results
from mobie.tables.table import Table
from mobie.tables.table8 import hard_table

TASKS = ("mmlu", "gsm8k", "humaneval")


def build(results: Results) -> Table:
    """Read the records of the paper's rows: bits, harder tasks."""
    others = [model.label for model in results.models("table9") if not model.in_paper]
    notes = [f"{', '.join(others)} is not tuned to follow instructions; the paper's models are."] if others else []
    return hard_table("table9", results, "harder tasks with instruction-tuned models", TASKS, notes)
