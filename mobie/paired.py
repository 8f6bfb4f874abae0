"""Differences between two methods on the same windows: what the two have in common does not blur them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mobie.results import Cell, Model, Results


def log_ratio(
    results: Results,
    model: Model,
    method: str,
    reference: str,
    texts: Sequence[str],
    *,
    seed: int | None = None,
    reference_seed: int | None = None,
) -> Cell:
    """log(perplexity of `method` / perplexity of `reference`), averaged over texts.

    A perplexity is exp of a mean over windows, so the logarithm of the ratio is a mean of differences per window; its
    standard error is that of the mean over the same windows, texts taken as independent. A hole of either is a hole.

    Seeds are the suite's unless given; a reference that no calibration changes has that one alone.
    """
    runs = ((method, seed), (reference, reference_seed))
    parts = [_one_text(results, model, runs, text) for text in texts]
    known = [part for part in parts if not isinstance(part, Cell)]
    if len(known) < len(parts):
        return next(part for part in parts if isinstance(part, Cell))
    error = math.sqrt(math.fsum(part.stderr**2 for part in known)) / len(known)
    value = math.fsum(part.mean for part in known) / len(known)
    return Cell(value, error, sum(part.n for part in known), record=known[0].record)


@dataclass(frozen=True)
class _Paired:
    """Mean difference of the losses of two methods on one text's windows."""

    mean: float
    stderr: float
    n: int
    record: str


def _one_text(results: Results, model: Model, runs: Sequence[tuple[str, int | None]], text: str) -> _Paired | Cell:
    """The difference between two runs, each a method and a seed, or the hole that is in its place."""
    name = f"{text}.perplexity"
    cells = [results.cell(model, method, "perplexity", name, seed=seed) for method, seed in runs]
    hole = next((cell for cell in cells if cell.value is None), None)
    if hole is not None:
        return replace(hole, stderr=None, n=None)
    losses = [
        results.details(model, method, "perplexity", seed).get("window_nll", {}).get(text) for method, seed in runs
    ]
    if None in losses:
        reason = f"the record has no losses by window of {text}: it is of an older version; run its job again"
        return Cell(None, status="missing", reason=reason, record=cells[losses.index(None)].record)
    ours, theirs = losses
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return Cell(None, status="missing", reason=f"one window of {text}: no standard error", record=cells[0].record)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return _Paired(mean, error, n, cells[0].record)
