"""What the jobs of a plan take, in all, by rule and by model; from the cost model (`mobie/jobs/cost.py`).

Hours, downloads and disk are of what is still to do; a job that is done costs nothing. Memory is the peak of one job,
since jobs with a model run one after the other on one GPU.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mobie.config import SPEC_MARK
from mobie.jobs import quantize_cost
from mobie.jobs.cost import DEFAULT, PROCESS_MB, Allowance, Need, expect
from mobie.jobs.keys import Keys
from mobie.jobs.size import size_of
from mobie.lock import download_bytes
from mobie.paths import Layout, embedded_model
from mobie.plan.graph import TRAINED, Job
from mobie.sources import Source

HOUR = 3600.0
FETCH_MODEL = "fetch_model"


@dataclass
class Sum:
    """Totals of some jobs: how many, how many of them are done, hours, peaks in MiB and the jobs that have them.

    whole_mb: of a GPU that holds every model at once; on a smaller one layers go to and fro.
    """

    jobs: int = 0
    done: int = 0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    gpu_mb: float = 0.0
    whole_mb: float = 0.0
    host_mb: float = 0.0
    gpu_job: str = ""
    host_job: str = ""

    def add(self, job: Job, need: Need | None) -> None:
        """Count a job."""
        self.jobs += 1
        self.done += job.done
        if need is None or job.done:
            return
        if need.gpu:
            self.gpu_hours += need.seconds / HOUR
        else:
            self.cpu_hours += need.seconds / HOUR
        self.whole_mb = max(self.whole_mb, need.whole_mb)
        if need.device_mb > self.gpu_mb:
            self.gpu_mb, self.gpu_job = need.device_mb, describe(job)
        if need.host_mb > self.host_mb:
            self.host_mb, self.host_job = need.host_mb, describe(job)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, rounded."""
        values = {"jobs": self.jobs, "done": self.done, "gpu_job": self.gpu_job, "host_job": self.host_job}
        hours = {"gpu_hours": round(self.gpu_hours, 3), "cpu_hours": round(self.cpu_hours, 3)}
        peaks = {name: round(getattr(self, name)) for name in ("gpu_mb", "whole_mb", "host_mb")}
        return values | hours | peaks


@dataclass(frozen=True)
class Download:
    """A download that is not here yet.

    bytes:  from the lock or the configuration; None where the size is not known before it is fetched.
    pinned: a second download must give the same bytes.
    """

    name: str
    bytes: int | None
    pinned: bool
    model: str | None = None
    gated: bool = False


@dataclass
class Disk:
    """MiB that the jobs still write: what stays, and the most that one job keeps while it runs."""

    downloads: float = 0.0
    checkpoints: float = 0.0
    gradients: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        return self.downloads + self.checkpoints + self.gradients + self.work

    def as_dict(self) -> dict[str, int]:
        parts = {name: getattr(self, name) for name in ("downloads", "checkpoints", "gradients", "work", "total")}
        return {f"{name}_mb": round(value) for name, value in parts.items()}


@dataclass
class Budget:
    """Totals of a plan, by rule and by model.

    cores: hours that quantizing a whole model takes on one processor core, by model and method.
    """

    total: Sum = field(default_factory=Sum)
    rules: dict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    models: dict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    downloads: list[Download] = field(default_factory=list)
    disk: dict[str, Disk] = field(default_factory=lambda: defaultdict(Disk))
    cores: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def all_disk(self) -> Disk:
        """Disk of everything; `work` is the largest, as one job writes it at a time."""
        parts = self.disk.values()
        known = sum((d.bytes or 0) for d in self.downloads) / 2**20
        checkpoints, gradients = (sum(getattr(part, name) for part in parts) for name in ("checkpoints", "gradients"))
        return Disk(known, checkpoints, gradients, max((part.work for part in parts), default=0.0))

    @property
    def gated(self) -> list[str]:
        """Models still to be fetched that the hub gates."""
        return [download.name for download in self.downloads if download.gated]

    @property
    def unknown_sizes(self) -> list[str]:
        return [download.name for download in self.downloads if download.bytes is None]

    @property
    def unpinned(self) -> list[str]:
        return [download.name for download in self.downloads if not download.pinned]


def describe(job: Job) -> str:
    """`quantize olmoe-1b-7b mobie`."""
    words = [job.rule.name, job.wildcards.get("model"), job.wildcards.get("method")]
    return " ".join(word for word in words if word)


def need_of(job: Job, allowance: Allowance = DEFAULT) -> Need | None:
    """What a job takes; None for one of seconds without a model. Training takes as long as it took."""
    if job.rule.name in TRAINED:
        record = json.loads((embedded_model(TRAINED[job.rule.name]) / "training.json").read_text(encoding="utf-8"))
        return Need(record["seconds"], False, 0.0, PROCESS_MB)
    return None if job.rule.kind is None or job.keys is None else expect(job.rule.kind, job.keys, allowance)


def budget(
    jobs: Iterable[Job], layout: Layout, shown_methods: Sequence[str] = (), allowance: Allowance = DEFAULT
) -> Budget:
    """Add up the jobs of a plan; hours on a core are given for the methods `shown_methods` alone."""
    found = Budget()
    gradients: set[tuple[object, ...]] = set()
    for job in jobs:
        need = need_of(job, allowance)
        found.total.add(job, need)
        found.rules[job.rule.name].add(job, need)
        if job.keys is not None:
            found.models[job.keys.model].add(job, need)
        if job.done:
            continue
        _add_download(found, job, layout)
        if need is not None and job.keys is not None:
            disk = found.disk[job.keys.model]
            disk.checkpoints += need.kept_mb
            disk.work = max(disk.work, need.work_mb)
            if job.rule.name == "quantize":
                disk.gradients += _gradients_mb(job.keys, gradients)
                _add_cores(found, job.keys, shown_methods)
    for download in found.downloads:
        if download.model is not None:
            found.disk[download.model].downloads += (download.bytes or 0) / 2**20
    return found


def _add_download(found: Budget, job: Job, layout: Layout) -> None:
    source: Source | None = job.source
    if source is not None:
        locked = download_bytes(source.name, layout)
        pinned = locked is not None or source.sha256 is not None
        found.downloads.append(Download(source.name, source.bytes if locked is None else locked, pinned))
    elif job.rule.name == FETCH_MODEL and job.keys is not None:
        name, model = job.keys.model, job.keys.model_config
        locked = download_bytes(name, layout)
        size = model.bytes if locked is None else locked
        found.downloads.append(Download(name, size, locked is not None, name, model.gated))


def _gradients_mb(keys: Keys, seen: set[tuple[object, ...]]) -> float:
    """Loss gradients that a job leaves for others; nothing where another job of the plan makes the same."""
    config = keys.method_config
    which = (keys.model, keys.calibration, quantize_cost.gradient_key(config))
    if which[-1] is None or which in seen:
        return 0.0
    seen.add(which)
    calibration = keys.calibration_config
    tokens = calibration.sequences * calibration.length
    return quantize_cost.gradient_bytes(config, size_of(keys.model_config), tokens) / 2**20


def _add_cores(found: Budget, keys: Keys, shown: Sequence[str]) -> None:
    if keys.method in shown and SPEC_MARK not in keys.method:
        hours = expect("quantize", keys, Allowance("cpu")).seconds / HOUR
        found.cores[keys.model][keys.method] = hours
