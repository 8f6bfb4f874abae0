"""Which columns get how many sign planes, so that the loss suffers least within a budget of stored bytes.

A plane on a column of importance d takes away `(κ_q - κ_{q+1}) d` of the expected loss (κ: the distortion of q planes)
and costs `out` bits; a matrix with any plane also pays for its scales. With a price λ per bit, every column and every
matrix decides alone, and the least price at which all of them together fit is found by halving (`obe.md`).

Columns decide in runs of equal length, the most important first, so that whole bytes are filled and the findings of a
large model stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mobie.methods.plane_fit import DISTORTION
from mobie.packing.planes import stored_bytes

RUNS = 64  # of columns that decide together, at most
HALVINGS = 100  # of the interval of prices
DIGITS = 5  # significant ones of an importance


@dataclass(frozen=True)
class Candidate:
    """A matrix that takes part.

    size:       (out, in).
    importance: of each run of columns, falling: the sum of its columns' importances.
    """

    size: tuple[int, int]
    importance: NDArray[np.float64]

    @property
    def run(self) -> int:
        """Columns of a run; the last may have fewer."""
        return run_length(self.size[1])


def run_length(columns: int) -> int:
    """Columns that decide together: a multiple of 8."""
    return 8 * -(-columns // (8 * RUNS))


def summarize(importance: Tensor) -> list[float]:
    """Importances `(in,)` of columns as those of runs, falling, as short JSON values."""
    runs = importance.double().sort(descending=True).values.split(run_length(len(importance)))
    return [float(f"{run.sum().item():.{DIGITS}g}") for run in runs]


def plane_columns(candidate: Candidate, price: float, planes: int) -> tuple[int, ...]:
    """How many columns each plane covers where a bit costs `price`; empty where no plane is worth it."""
    out, columns = candidate.size
    gains = np.array([DISTORTION[q] - DISTORTION[q + 1] for q in range(planes)])
    widths = np.minimum(candidate.run, columns - candidate.run * np.arange(len(candidate.importance)))
    net = gains[:, None] * candidate.importance - price * out * widths  # (planes, runs)
    taken = net > 0
    worth = net[taken].sum() - price * 16 * out  # one float16 scale per row
    if worth <= 0:
        return ()
    counts = (taken * widths).sum(axis=1)
    return tuple(int(count) for count in counts if count)


def share_out(candidates: Sequence[Candidate], budget: int, planes: int) -> list[tuple[int, ...]]:
    """`plane_columns` of every candidate at the least price at which all fit in `budget` bytes.

    At that price a whole matrix may be next in turn and not fit; single runs then use what it would have used.
    """

    def at(price: float) -> list[tuple[int, ...]]:
        return [plane_columns(candidate, price, planes) for candidate in candidates]

    def taken(chosen: Sequence[tuple[int, ...]]) -> int:
        return sum(stored_bytes(c.size, own) for c, own in zip(candidates, chosen, strict=True))

    most = max((float(np.max(c.importance / c.run)) / c.size[0] for c in candidates), default=0.0)
    low, high = 0.0, most + 1.0  # no bit is worth that much
    if taken(at(low)) <= budget:
        return at(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if taken(at(middle)) <= budget else (middle, high)
    return _filled(candidates, at(high), budget - taken(at(high)), planes)


def _filled(
    candidates: Sequence[Candidate], chosen: list[tuple[int, ...]], spare: int, planes: int
) -> list[tuple[int, ...]]:
    """The choice with further runs for matrices that have planes, the best gain per bit first, while bytes are left."""
    waiting = {index: _next_runs(c, own, planes) for index, (c, own) in enumerate(zip(candidates, chosen, strict=True))}
    while fits := [
        (worth, -index, own) for index, runs in waiting.items() for worth, extra, own in runs if extra <= spare
    ]:
        _, negative, own = max(fits)  # of equal ones the first
        index, size = -negative, candidates[-negative].size
        spare -= stored_bytes(size, own) - stored_bytes(size, chosen[index])
        chosen[index] = own
        waiting[index] = _next_runs(candidates[index], own, planes)
    return chosen


def _next_runs(candidate: Candidate, chosen: tuple[int, ...], planes: int) -> list[tuple[float, int, tuple[int, ...]]]:
    """One more run on each plane that can have it: gain per bit, bytes, and the choice with it."""
    found = []
    size, before = candidate.size, stored_bytes(candidate.size, chosen)
    for plane in range(min(len(chosen) + 1, planes) if chosen else 0):
        covered = chosen[plane] if plane < len(chosen) else 0
        wider = min(covered + candidate.run, chosen[plane - 1] if plane else size[1])
        if wider > covered:
            own = (*chosen[:plane], wider, *chosen[plane + 1 :])
            gain = (DISTORTION[plane] - DISTORTION[plane + 1]) * candidate.importance[covered // candidate.run]
            extra = stored_bytes(size, own) - before
            found.append((float(gain) / extra, extra, own))
    return found
