"""Draws of a number: what it would be had other windows, items or calibration seeds been taken.

A number is an array whose last axis holds the value itself first and `RESAMPLES` draws of it after that, so arithmetic
on values is arithmetic on their draws. Numbers of the same windows or items share their resamples and numbers of the
same run share their calibration draw: what two methods have in common cancels in a difference, as in a paired test.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
BLOCK = 250  # resamples that are multiplied at once

Draws = np.ndarray  # (…, 1 + RESAMPLES) float64


def exact(value: float) -> Draws:
    """Draws of a number that is known exactly."""
    return np.full(1 + RESAMPLES, float(value))


class Sampler:
    """Resamples by key: the same key gives the same ones, whoever asks and in whatever order."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], np.ndarray] = {}
        self._means: dict[tuple[str, bytes], Draws] = {}

    def mean(self, key: str, values: Sequence[float]) -> Draws:
        """Mean of `values` (units,) and its bootstrap means, units being drawn with replacement."""
        numbers = np.asarray(values, dtype=np.float64)
        found = (key, hashlib.sha256(numbers.tobytes()).digest())
        if found not in self._means:
            counts = self._resamples(key, len(numbers))
            blocks = [counts[i : i + BLOCK].astype(np.float64) @ numbers for i in range(0, RESAMPLES, BLOCK)]
            self._means[found] = np.concatenate([[numbers.mean()], np.concatenate(blocks) / len(numbers)])
        return self._means[found]

    def noise(self, key: str) -> Draws:
        """0 and then standard normal draws."""
        return np.concatenate([[0.0], _generator(f"noise {key}").standard_normal(RESAMPLES)])

    def _resamples(self, key: str, units: int) -> np.ndarray:
        """How often each unit occurs in each resample: `(RESAMPLES, units)` uint8."""
        if (key, units) not in self._counts:
            generator = _generator(f"units {key}")
            rows = [
                np.bincount(generator.integers(0, units, units), minlength=units).astype(np.uint8)
                for _ in range(RESAMPLES)
            ]
            self._counts[key, units] = np.stack(rows)
        return self._counts[key, units]


def _generator(purpose: str) -> np.random.Generator:
    word = hashlib.sha256(f"{SEED} {purpose}".encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(word, "big"))


def half_width(draws: Draws, comparisons: int = 1) -> float:
    """Half the interval of a number: its standard error times the normal quantile of `CONFIDENCE`.

    comparisons: the error rate is divided by their number (Bonferroni), where one of many is looked for.
    """
    if np.ptp(draws) == 0:  # exact; a standard deviation of equal numbers is not quite zero
        return 0.0
    tail = (1 - CONFIDENCE) / 2 / comparisons
    return float(draws[1:].std(ddof=1)) * NormalDist().inv_cdf(1 - tail)


def seed_error(spread: float, seeds: int, *, mean: bool, against_one_run: bool) -> float:
    """Standard deviation of the calibration draw of a number, such that its normal interval is Student's.

    spread: standard deviation over seeds (ddof 1); seeds: how many, at least 2.
    mean:   the number is the mean over them, else that of one of them.
    against_one_run: it is compared with a number that was itself measured with one seed (the paper's).
    """
    from scipy.special import stdtrit

    variance = spread**2 * ((1 / seeds if mean else 1.0) + (1.0 if against_one_run else 0.0))
    student = float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2))
    return math.sqrt(variance) * student / NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
