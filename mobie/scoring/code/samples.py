"""The file of generated programs: JSON lines that `evalplus.evaluate` and `evalplus.sanitize` read too.

    {"finished": true, "sample": 0, "solution": "def …", "task_id": "HumanEval/0"}

`solution` is the whole program; where the model continued the prompt, it begins with the prompt. A file holds one way
of generating, and every problem the same number of times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mobie.errors import DataError
from mobie.parsing import parse_json

REMEDY = "run `python -m mobie generate-code` again"


@dataclass(frozen=True)
class Program:
    """A program that a model wrote.

    sample:   its number among those of its problem.
    finished: whether it ended by itself, with an end-of-sequence token or one of evalplus's stop texts.
    """

    task_id: str
    sample: int
    solution: str
    finished: bool


TYPES = {"task_id": str, "sample": int, "solution": str, "finished": bool}


def to_lines(programs: Iterable[Program]) -> bytes:
    """Programs as JSON lines in ASCII."""
    return "".join(json.dumps(asdict(program), sort_keys=True) + "\n" for program in programs).encode("ascii")


def read_programs(path: Path, sha256: str, tasks: Sequence[str], count: int) -> list[Program]:
    """The programs of a file, `count` for each of `tasks`.

    Raises:
        DataError: the file is missing, is not the one with this hash, or does not hold these programs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise DataError(f"{path}: sha256 {got}, expected {sha256} as in its record; the file was changed; {REMEDY}")
    return parse_programs(data, path, tasks, count)


def parse_programs(data: bytes, path: Path, tasks: Sequence[str], count: int) -> list[Program]:
    """As `read_programs`, from the file's bytes; `path` is for messages."""
    programs = [_parse(line, f"{path}, line {number}") for number, line in enumerate(data.splitlines(), start=1)]
    got = [(program.task_id, program.sample) for program in programs]
    expected = [(task, sample) for task in tasks for sample in range(count)]
    if got != expected:
        missing = [f"{task} number {sample}" for task, sample in expected if (task, sample) not in set(got)]
        what = f"no program for {missing[0]}" if missing else "programs twice, in another order or for other problems"
        raise DataError(
            f"{path}: {what}; got {len(got)} programs, expected {count} for each of {len(tasks)} problems; {REMEDY}"
        )
    return programs


def _parse(line: bytes, where: str) -> Program:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({str(error)[:200]}); {REMEDY}") from error
    if not isinstance(value, dict) or {key: type(item) for key, item in value.items()} != TYPES:
        raise DataError(f"{where}: expected exactly the keys {', '.join(TYPES)} with values of their types; {REMEDY}")
    return Program(**value)
