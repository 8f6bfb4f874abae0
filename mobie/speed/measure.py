"""Timing one setting with one runner, and a list of settings: each gives a run, a JSON object with values or a reason.

A run's speed is that of the median step, its quartiles those of the steps. The share of the roofline is the bytes that
a step has to read, over its time, over the copy bandwidth of the same process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mobie.errors import MobieError
from mobie.jobs.attempt import is_out_of_memory
from mobie.speed.routers import NATURAL, routed
from mobie.speed.runners import DENSE, LABELS, OURS, PRIMARY, find_runner
from mobie.speed.runners.base import Runner, Timing
from mobie.speed.setting import Setting, SpeedProtocol, paper_setting
from mobie.speed.subject import Kind, Subject, mean
from mobie.speed.timing import Spread, copy_bandwidth

NEVER_RUN = "a plug-in that was never run by this project"


@dataclass(frozen=True)
class Planned:
    """One runner at one setting."""

    runner: str
    setting: Setting


def plan(protocol: SpeedProtocol, method: str, kind: Kind, *, sweep: bool) -> list[Planned]:
    """What is timed for the record of a method, the protocol's setting first, dense weights before packed ones.

    kind:  what the method's own weights are.
    sweep: every runner at every batch size and routing, whatever the method.
    """
    base = paper_setting(protocol)
    others = [replace(base, batch=batch) for batch in protocol.batches if batch != base.batch]
    others += [replace(base, router=router) for router in protocol.routers]
    if not sweep and method not in protocol.compared:
        return [Planned(PRIMARY[kind], base)]
    names = [name for name in LABELS if kind == "packed" or not name.startswith("binary")]
    found: list[Planned] = []
    for name in names:
        found += [Planned(name, base), *(Planned(name, other) for other in others if sweep or name in OURS)]
    return found


def measure_all(subject: Subject, planned: Sequence[Planned], *, progress: bool) -> list[dict[str, Any]]:
    """Every planned run, in order, after the copy bandwidth; what fails says why and the rest goes on."""
    from tqdm import tqdm

    bandwidth = copy_bandwidth(torch.device(subject.device))
    runs = []
    with tqdm(planned, "speed", unit="run", disable=not progress) as bar:
        for item in bar:
            runs.append(measure(subject, item, bandwidth))
            speed = runs[-1].get("tokens_per_second")
            bar.set_postfix_str(f"{item.runner}: " + (f"{speed['median']:.1f} tok/s" if speed else runs[-1]["status"]))
    return runs


def measure(subject: Subject, planned: Planned, bandwidth: Spread) -> dict[str, Any]:
    """One run as JSON values."""
    runner, setting = find_runner(planned.runner), planned.setting
    told = {
        "runner": planned.runner,
        "batch": setting.batch,
        "prefill": setting.prefill,
        "decode": setting.decode,
        "router": setting.router,
        "tried": runner.tried,
    }
    missing = runner.missing(subject)
    if missing is not None:
        reason = missing if runner.tried else f"{missing}; {NEVER_RUN}"
        return told | {"status": "absent", "reason": reason}
    if runner.weights == "own" and setting.router != NATURAL:
        return told | {"status": "unsupported", "reason": "its routers cannot be replaced"}
    try:
        return told | {"status": "ok", "reason": None} | _values(subject, runner, setting, bandwidth)
    except (MobieError, RuntimeError, ImportError, ValueError, NotImplementedError) as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        status = "oom" if is_out_of_memory(error) else "unsupported" if isinstance(error, MobieError) else "failed"
        subject.release()
        return told | {"status": status, "reason": text if runner.tried else f"{text} ({NEVER_RUN})"}


def _values(subject: Subject, runner: Runner, setting: Setting, bandwidth: Spread) -> dict[str, Any]:
    if runner.weights == "own":
        return _speeds(runner.time(subject, setting), setting)
    kind: Kind = runner.weights
    distinct = subject.distinct(kind, setting.batch, setting.router)
    model = subject.model(kind)
    with routed(model, setting.router):
        timing = runner.time(subject, setting)
    values = _speeds(timing, setting)
    needed = subject.account(kind).footprints[runner.int8_head].step(setting.batch, setting.mean_context, distinct)
    step = values["step_seconds"]["median"]
    return values | {
        "bytes_per_step": needed,
        "roofline_share": needed / step / bandwidth.median,
        "copy_bandwidth": bandwidth.as_dict(),
        "activated_bytes": subject.activated(kind, setting.batch).bytes,
        "distinct_experts": mean(distinct),
        "distinct_experts_by_layer": distinct,
    }


def _speeds(timing: Timing, setting: Setting) -> dict[str, Any]:
    """Speeds of new tokens, all rows together; with the prefill, a whole generation of `decode` tokens is counted."""
    step, first = Spread.of(timing.step_seconds), Spread.of(timing.prefill_seconds)
    whole = first.median + setting.decode * step.median
    return {
        "step_seconds": step.as_dict(),
        "tokens_per_second": step.rate(setting.batch).as_dict(),
        "tokens_per_second_stderr": _rate_stderr(step, setting.batch),
        "time_to_first_token": first.as_dict(),
        "tokens_per_second_with_prefill": setting.batch * setting.decode / whole,
        "peak_memory_bytes": timing.peak_memory_bytes,
        "weight_bytes": timing.weight_bytes,
        "notes": list(timing.notes),
    }


def _rate_stderr(step: Spread, batch: int) -> float | None:
    """Of `batch / median`, by the derivative."""
    return None if step.stderr is None else batch / step.median**2 * step.stderr


def ok_runs(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (run for run in runs if run["status"] == "ok")


def ratios(runs: Sequence[dict[str, Any]], baseline: str = DENSE) -> dict[str, float]:
    """Speed over that of a baseline at the same setting, both of this list: `runner b4 natural` → ratio."""

    def setting(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[key] for key in ("batch", "prefill", "decode", "router"))

    there = {setting(run): run["tokens_per_second"]["median"] for run in ok_runs(runs) if run["runner"] == baseline}
    return {
        f"{run['runner']} b{run['batch']} {run['router']}": run["tokens_per_second"]["median"] / there[setting(run)]
        for run in ok_runs(runs)
        if setting(run) in there
    }
