"""Times and memory of a run: CUDA events on a GPU, so that no step waits for the host; the wall clock on a CPU."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of the last prefill and of the decode steps since.

    prefill_seconds: from the prompt on the host to the logits of the first new token: the time to first token, but for
                     choosing it, which is part of the first step.
    step_seconds:    per decode step (choose a token for every row, run the model on it).
    """

    batch: int
    prompt_tokens: int
    prefill_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def decode_seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding; 0 before the first step."""
        return self.batch * len(self.step_seconds) / self.decode_seconds if self.step_seconds else 0.0

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """New tokens of all rows per second, the prefill's time included."""
        return self.batch * len(self.step_seconds) / (self.prefill_seconds + self.decode_seconds)


class Clock(Protocol):
    """Marks of one run; what lies between two neighbours is one interval."""

    def mark(self) -> None: ...

    def wait(self) -> None:
        """Return when the work before the last mark is done."""

    def intervals(self) -> list[float]:
        """Seconds between neighbouring marks."""


class HostClock:
    """Wall clock, for work that is done when the call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def wait(self) -> None:
        pass

    def intervals(self) -> list[float]:
        return [after - before for before, after in zip(self._marks[:-1], self._marks[1:], strict=True)]


class DeviceClock:
    """CUDA events on the current stream."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def wait(self) -> None:
        if self._marks:
            self._marks[-1].synchronize()

    def intervals(self) -> list[float]:
        self.wait()
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def make_clock(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else HostClock()


def start_peak_memory(device: torch.device) -> None:
    """Count the device's peak from now on (for the whole process: PyTorch keeps one counter per GPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: GPU tensors since `start_peak_memory`; on a CPU the whole process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kibibytes on Linux
