"""Differences between two methods on the same windows: what the two have in common does not blur them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mobie.results import Cell, Model, Results


def log_ratio(
    results: Results,
    model: Model,
    method: str,
    reference: str,
    texts: Sequence[str],
    *,
    seed: int | None = None,
) -> Cell:
    """log(perplexity of `method` / perplexity of `reference`), averaged over texts.

    A perplexity is exp of a mean over windows, so the logarithm of the ratio is a mean of differences per window; its
    standard error is that of the mean over the same windows, texts taken as independent. A hole of either is a hole.
    """
    parts = [_one_text(results, model, method, reference, text, seed) for text in texts]
    hole = next((part for part in parts if part.value is None), None)
    if hole is not None:
        return hole
    error = math.sqrt(math.fsum(part.stderr**2 for part in parts)) / len(parts)
    value = math.fsum(part.value for part in parts) / len(parts)
    return Cell(value, error, sum(part.n for part in parts), record=parts[0].record)


def _one_text(results: Results, model: Model, method: str, reference: str, text: str, seed: int | None) -> Cell:
    name = f"{text}.perplexity"
    cells = [results.cell(model, m, "perplexity", name, seed=seed) for m in (method, reference)]
    hole = next((cell for cell in cells if cell.value is None), None)
    if hole is not None:
        return replace(hole, stderr=None, n=None)
    records = [results.record(model, m, "perplexity", seed) for m in (method, reference)]
    losses = [record.details.get("window_nll", {}).get(text) for record in records]
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
    return Cell(mean, error, n, record=cells[0].record)
