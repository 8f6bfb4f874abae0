"""Fuzz every parser of outside data: `python -m tests.reliability fuzz [--count N] [--seed S] [--only NAME]`.

Each input is made of a valid one by changes of bytes or of values. A parser must return, or raise a `MobieError`;
another exception, or no answer within some seconds, is a defect.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_cases import Case, cases
from fuzz_damage import damaged
from tqdm import tqdm

from mobie.check.files import Damaged
from mobie.config import default_layout
from mobie.errors import MobieError
from mobie.reliability import Finding, save_finding

SECONDS = 30.0  # for one input, on a busy machine; the slowest valid one takes a tenth of a second
MEMORY = 6 << 30  # bytes of address space beyond what the process has when it starts


class NoAnswer(BaseException):
    """A parser took too long; no parser can catch it by accident."""


@dataclass
class Tally:
    """What came of the inputs of one parser."""

    name: str
    accepted: int = 0
    refused: int = 0
    defects: list[str] = field(default_factory=list)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `NoAnswer` in this thread after so many seconds."""

    def stop(*_: object) -> None:
        raise NoAnswer

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_inputs(case: Case, count: int, seed: int, seconds: float = SECONDS, bar: tqdm | None = None) -> Tally:
    """Give a parser `count` damaged inputs; the same seed gives the same ones."""
    tally = Tally(case.name)
    for number in range(count):
        rng = random.Random(f"{seed}/{case.name}/{number}")
        data = damaged(rng.choice(case.seeds), case.form, rng)
        try:
            with time_limit(seconds):
                case.parse(data)
            tally.accepted += 1
        except (MobieError, Damaged):
            tally.refused += 1
        except NoAnswer:
            tally.defects.append(f"{case.name}, input {number}: no answer within {seconds} s")
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            tally.defects.append(f"{case.name}, input {number} (crc {zlib.crc32(data):08x}): {what[:200]}")
        if bar is not None:
            bar.update()
    return tally


def main(arguments: list[str]) -> int:
    """Fuzz, save the finding and return 0 where there was no defect, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="inputs for each parser  [default: 1000]")
    parser.add_argument("--seed", type=int, default=0, help="of all choices  [default: 0]")
    parser.add_argument("--only", default="", help="parsers whose name holds this; nothing is saved then")
    options = parser.parse_args(arguments)
    tallies = fuzz(options.count, options.seed, options.only)
    for tally in tallies:
        for line in tally.defects[:5]:
            print(line)
    defects = sum(len(tally.defects) for tally in tallies)
    tried = sum(tally.accepted + tally.refused + len(tally.defects) for tally in tallies)
    print(f"{tried} inputs to {len(tallies)} parsers, {defects} defects")
    if not options.only:
        save_finding(finding(tallies, tried, options.count, options.seed), default_layout())
    return 1 if defects else 0


def fuzz(count: int, seed: int, only: str) -> list[Tally]:
    """All parsers, within a limit of memory."""
    with tempfile.TemporaryDirectory(prefix="mobie-fuzz-") as folder:
        chosen = [case for case in cases(Path(folder) / "repository") if only in case.name]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
        try:
            with tqdm(total=count * len(chosen), desc="fuzzing", unit="input", disable=None) as bar:
                for case in chosen:
                    case.parse(case.seeds[0])  # so that no library is imported on the clock
                return [try_inputs(case, count, seed, bar=bar) for case in chosen]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def finding(tallies: list[Tally], tried: int, count: int, seed: int) -> Finding:
    """What the document shows."""
    rows = [(t.name, t.accepted + t.refused + len(t.defects), t.accepted, t.refused, len(t.defects)) for t in tallies]
    return Finding(
        name="fuzz",
        title=f"{tried} damaged inputs to {len(tallies)} parsers of outside data",
        command=f"python -m tests.reliability fuzz --count {count} --seed {seed}",
        columns=("parser", "inputs", "accepted", "refused", "other exceptions or no answer"),
        rows=tuple(rows),
        passed=not any(t.defects for t in tallies),
        notes=(
            f"An input is a valid one with bytes or values changed; refused: with an error that names its remedy. "
            f"No answer: none within {SECONDS:g} s. Address space was limited to {MEMORY >> 30} GiB beyond the start.",
            "A safetensors or Parquet file whose bytes are changed within a value is valid to its parser: what holds "
            "such a file is compared with its SHA-256 before it is used.",
        ),
    )
