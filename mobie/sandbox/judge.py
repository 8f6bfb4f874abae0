"""From problems and samples to verdicts: expected outputs once per problem, then one container for each sample."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from mobie.errors import DataError
from mobie.sandbox.driver import encode
from mobie.sandbox.runtime import Reply, Runtime
from mobie.sandbox.types import Dataset, Limits, Sample, Status, Verdict

TESTS = ("base", "plus")
STATUSES: tuple[Status, ...] = ("pass", "fail", "timeout")
#: expected outputs come from canonical solutions, which are as long as their inputs make them
EXPECTED = Limits(seconds=600.0, output_bytes=1 << 28)

Problem = Mapping[str, Any]


def run_samples(
    problems: Mapping[str, Problem],
    samples: Sequence[Sample],
    limits: Limits,
    runtime: Runtime,
    dataset: Dataset,
    progress: Callable[[Verdict], object] | None = None,
    workers: int = 1,
) -> list[Verdict]:
    """Judge every sample as `evalplus.evaluate` does; verdicts stand in the order of `samples`.

    `problems` are rows by task as `evalplus.data.get_human_eval_plus` or `get_mbpp_plus` returns them (MBPP's inputs
    with their tuples, sets and complex numbers restored). Only problems that have a sample are executed. `progress` is
    called with each verdict as it is known, from this thread. `workers` containers run at once.

    What a program prints or does to other processes cannot make it pass. evalplus compares outputs in the program's own
    process, so one written against evalplus could; a model that was not trained to do so does not write one.

    Raises:
        DataError: a sample names a problem that is not there, or a canonical solution does not run.
    """
    unknown = sorted({sample.task_id for sample in samples} - problems.keys())
    if unknown:
        raise DataError(f"samples of {', '.join(unknown[:5])}, but none of the {len(problems)} problems has that name")
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            expected = {
                task: pool.submit(_expected, problems[task], runtime, dataset, stop)
                for task in dict.fromkeys(sample.task_id for sample in samples)
            }
            _report(expected.values(), None)
            outputs = {task: future.result() for task, future in expected.items()}
            verdicts = [
                pool.submit(_judge, problems[s.task_id], s, outputs[s.task_id], limits, runtime, dataset, stop)
                for s in samples
            ]
            _report(verdicts, progress)
            return [future.result() for future in verdicts]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _report(futures: Iterable[Future[Any]], progress: Callable[[Any], object] | None) -> None:
    """Wait for all, telling of each; the first that failed ends the wait."""
    for future in as_completed(futures):
        result = future.result()
        if progress is not None:
            progress(result)


def _request(problem: Problem, dataset: Dataset) -> dict[str, Any]:
    """What both kinds of work need. Raises DataError for inputs that have no form in JSON."""
    try:
        inputs = {tests: encode(problem[f"{tests}_input"]) for tests in TESTS}
    except TypeError as error:
        raise DataError(f"{problem['task_id']}: an input has {error}") from error
    canonical = problem["prompt"] + problem["canonical_solution"]
    return {"dataset": dataset, "entry_point": problem["entry_point"], "canonical": canonical, "inputs": inputs}


def _expected(problem: Problem, runtime: Runtime, dataset: Dataset, stop: threading.Event) -> dict[str, Any]:
    """Outputs of the canonical solution and their seconds, by set of tests; encoded, for nothing here looks at them."""
    reply = runtime.run({"work": "expect", **_request(problem, dataset)}, EXPECTED, stop)
    expected = {message["tests"]: message for message in reply.messages if "tests" in message}
    if reply.end != "worker" or expected.keys() != set(TESTS):
        said = [message["error"] for message in reply.messages if "error" in message]
        why = said[0] if said else f"ended by {reply.end or 'an unknown cause'} {reply.errors}".strip()
        raise DataError(f"{problem['task_id']}: the canonical solution does not run: {why}")
    return expected


def _judge(
    problem: Problem,
    sample: Sample,
    expected: Mapping[str, Any],
    limits: Limits,
    runtime: Runtime,
    dataset: Dataset,
    stop: threading.Event,
) -> Verdict:
    """Run one sample; where the expected outputs have to be computed again, it has more time."""
    again = sum(sum(part["seconds"]) for part in expected.values() if part["outputs"] is None)
    limits = replace(limits, seconds=limits.seconds + 3 * again)
    request = _request(problem, dataset) | {"work": "judge", "solution": sample.solution, "atol": problem["atol"]}
    return verdict(problem, sample, runtime.run(request | {"expected": expected}, limits, stop), limits)


def verdict(problem: Problem, sample: Sample, reply: Reply, limits: Limits) -> Verdict:
    """What the driver's messages say of a sample; where it could say nothing, the sample has failed."""
    said = {message["tests"]: message for message in reversed(reply.messages) if message.get("status") in STATUSES}
    silent: Status = "timeout" if reply.end == "seconds" else "killed"
    found = Verdict(sample.task_id, sample.index, None, None, "")
    details = []
    for tests in TESTS:
        if not problem[f"{tests}_input"]:
            continue
        status = said[tests]["status"] if tests in said else silent
        found = replace(found, base=status) if tests == "base" else replace(found, plus=status)
        if tests not in said:
            details.append(f"{tests}: {_cause(reply, limits)}")
        elif status != "pass":
            details.append(f"{tests}: {status} after {said[tests].get('passed')} of {said[tests].get('of')} tests")
    return replace(found, detail="; ".join(details))


def _cause(reply: Reply, limits: Limits) -> str:
    """Why there is no verdict."""
    errors = [str(message["error"]) for message in reply.messages if "error" in message]
    if errors:
        return f"the checker failed: {errors[0]}"
    if reply.end in vars(limits):
        return f"over the limit of {vars(limits)[reply.end]} {reply.end}"
    return "the checker was killed" if reply.end == "worker" else "the container ended without a word"
