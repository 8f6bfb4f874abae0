"""From programs to pass@k: sanitized by evalplus, judged in the sandbox, counted here.

Names of measurements: `humaneval.pass@1` is the greedy program after evalplus's sanitizer, on the base tests, which are
those of the original data set; `humaneval.raw.pass@1` is the program as it was written; `humaneval_plus.…` needs base
*and* plus tests; `humaneval.sampled.pass@k` is of programs that were drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mobie.data.problems import DatasetName, Row
from mobie.records import Measurement
from mobie.sandbox import Limits, Runtime, Sample, Verdict, run_samples
from mobie.scoring.code.protocol import CodeProtocol
from mobie.scoring.code.samples import Program
from mobie.scoring.generations import mean_measurement

FORMS = ("sanitized", "raw")
#: evalplus's sanitizer parses every range of lines: 5 seconds for this many that repeat themselves, 100 for 380
MOST_LINES = 150
NO_PLUS = "the source has the base tests only, without the inputs that evalplus adds"


@dataclass(frozen=True)
class CodeScores:
    """What one set of problems gives.

    answers:  measurement → one value per problem: 0 or 1 for one program, else the estimate of pass@k.
    statuses: `greedy.sanitized` … → task → what became of its programs: `pass`, `fail`, `timeout`, `killed`, and
              `pass/fail` where the base tests passed and the plus tests did not.
    outcomes: how many distinct programs came to which end.
    unsanitized: how many programs were too long for the sanitizer.
    """

    measurements: list[Measurement]
    answers: dict[str, list[float]]
    statuses: dict[str, dict[str, list[str]]]
    outcomes: dict[str, int]
    unsanitized: int


def sanitized(solution: str, entry_point: str) -> str:
    """The program after evalplus's sanitizer; as it was where that gives up, or where it has more than `MOST_LINES`."""
    from evalplus.sanitize import sanitize

    if is_too_long(solution):
        return solution
    try:
        return sanitize(solution, entry_point)
    except (ValueError, RecursionError, MemoryError):  # null characters, half a character, thousands of brackets
        return solution


def is_too_long(solution: str) -> bool:
    """Whether a program is not sanitized because of its lines; `CodeScores.unsanitized` counts them."""
    return solution.count("\n") > MOST_LINES


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k programs passes, drawn without replacement from `samples` of which `correct` pass.

    1 - C(n-c, k) / C(n, k): the unbiased estimate of Chen et al. (2021).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def score_programs(
    dataset: DatasetName,
    problems: Mapping[str, Row],
    programs: Mapping[str, Sequence[Program]],
    protocol: CodeProtocol,
    runtime: Runtime,
    progress: Callable[[Verdict], object] | None = None,
    count: Callable[[int], object] = lambda _: None,
) -> CodeScores:
    """Judge the programs of one set of problems, by mode.

    `count` is told how many distinct programs will run, `progress` each verdict. Raises as `mobie.sandbox.run_samples`.
    """
    texts: dict[str, dict[str, list[str]]] = {
        f"{mode}.{form}": {task: [] for task in problems} for mode in protocol.modes for form in FORMS
    }  # variant → task → programs
    for mode in protocol.modes:
        for program in programs[mode]:
            clean = sanitized(program.solution, problems[program.task_id]["entry_point"])
            texts[f"{mode}.sanitized"][program.task_id].append(clean)
            texts[f"{mode}.raw"][program.task_id].append(program.solution)
    distinct = dict.fromkeys(
        (task, text) for tasks in texts.values() for task, written in tasks.items() for text in written
    )
    samples = [Sample(task, number, text) for number, (task, text) in enumerate(distinct)]
    count(len(samples))
    limits = Limits(**protocol.limits.model_dump())
    verdicts = run_samples(problems, samples, limits, runtime, dataset, progress=progress)
    judged = {(sample.task_id, sample.solution): verdict for sample, verdict in zip(samples, verdicts, strict=True)}
    found = {
        variant: {task: [judged[task, text] for text in written] for task, written in tasks.items()}
        for variant, tasks in texts.items()
    }
    unsanitized = sum(is_too_long(program.solution) for written in programs.values() for program in written)
    return _scores(dataset, found, protocol, any(row["plus_input"] for row in problems.values()), unsanitized)


def _scores(
    dataset: str,
    found: Mapping[str, Mapping[str, Sequence[Verdict]]],
    protocol: CodeProtocol,
    has_plus: bool,
    unsanitized: int,
) -> CodeScores:
    scores = CodeScores([], {}, {}, {}, unsanitized)
    for variant, tasks in found.items():
        mode, form = variant.split(".")
        middle = "".join(f".{word}" for word in (mode, form) if word not in ("greedy", "sanitized"))
        for name, passes in ((dataset, _base), (f"{dataset}_plus", _plus)) if has_plus else ((dataset, _base),):
            for k in (1,) if mode == "greedy" else protocol.k:
                values = [pass_at_k(len(vs), sum(map(passes, vs)), k) for vs in tasks.values()]
                mean = mean_measurement(f"{name}{middle}.pass@{k}", values)
                scores.measurements.append(replace(mean, chance=0.0))  # no program passes by guessing
                scores.answers[f"{name}{middle}.pass@{k}"] = values
        scores.statuses[variant] = {task: [_word(v) for v in vs] for task, vs in tasks.items()}
    words = {(v.task_id, v.index): _word(v) for tasks in found.values() for vs in tasks.values() for v in vs}
    scores.outcomes.update(sorted(Counter(words.values()).items()))
    return scores


def _base(verdict: Verdict) -> bool:
    return verdict.base == "pass"


def _plus(verdict: Verdict) -> bool:
    """A problem to which evalplus adds no input is judged by its base tests."""
    return verdict.base == "pass" and verdict.plus in ("pass", None)


def _word(verdict: Verdict) -> str:
    base = verdict.base or "no tests"
    return base if verdict.plus in (None, verdict.base) else f"{base}/{verdict.plus}"
