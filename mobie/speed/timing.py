"""Statistics of timings, and what the machine can do: its copy bandwidth, measured in the same process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: bytes that are copied at a time: far more than any cache holds
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
REPETITIONS = 20
#: of a normal sample, the quartiles are this many standard deviations apart
QUARTILE_RANGE = 1.349


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` values."""

    median: float
    lower: float
    upper: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation (inclusive); a single value is all three."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    @property
    def stderr(self) -> float | None:
        """Standard error of the median as that of a normal sample with these quartiles; None for a single value."""
        if self.n < 2:
            return None
        return math.sqrt(math.pi / 2) * (self.upper - self.lower) / QUARTILE_RANGE / math.sqrt(self.n)

    def rate(self, amount: float) -> Spread:
        """`amount` per value: of seconds, a speed."""
        return Spread(amount / self.median, amount / self.upper, amount / self.lower, self.n)

    def as_dict(self) -> dict[str, float | int]:
        """JSON values."""
        return asdict(self)


def timed(action: Callable[[], Any], device: torch.device, repetitions: int = REPETITIONS) -> list[float]:
    """Seconds of each of `repetitions` calls, after one that is not counted; CUDA events on a GPU."""
    from mobie.runner.clock import make_clock

    action()
    clock = make_clock(device)
    clock.mark()
    for _ in range(repetitions):
        action()
        clock.mark()
    return clock.intervals()


def copy_bandwidth(device: torch.device, repetitions: int = REPETITIONS) -> Spread:
    """Bytes per second, read and written ones together, of copying a large tensor on the device."""
    size = COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Spread.of(timed(lambda: target.copy_(source), device, repetitions)).rate(2 * size)
