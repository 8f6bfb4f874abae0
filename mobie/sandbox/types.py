"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "timeout", "killed"]
Dataset = Literal["humaneval", "mbpp"]


@dataclass(frozen=True)
class Limits:
    """What one sample may use. The first two defaults are evalplus's own limits, so that verdicts are its verdicts.

    Attributes:
        seconds: wall clock of one sample, base and plus tests together; then its container is killed.
            Twice evalplus's 62 seconds, and the start of the container.
        memory_mb: memory of the whole sample: the address space of each process, and the sum of what they hold.
        processes: processes and threads alive at once, the program's own included.
        output_bytes: what may come out of a container before it is killed.
        file_mb: size of the private temporary folder.
    """

    seconds: float = 150.0
    memory_mb: int = 4096
    processes: int = 16
    output_bytes: int = 1 << 20
    file_mb: int = 64


@dataclass(frozen=True)
class Sample:
    """One program for one problem: `solution` is the whole file, `index` counts the samples of a problem."""

    task_id: str
    index: int
    solution: str


@dataclass(frozen=True)
class Verdict:
    """What became of a sample.

    `base` and `plus` are evalplus's words for the two sets of tests, each judged on its own ("plus" in evalplus's score
    needs both); None where the problem has no such tests; `killed` where the container ended without a verdict.
    `detail` says why in a few words, and is empty where everything passed.
    """

    task_id: str
    index: int
    base: Status | None
    plus: Status | None
    detail: str
