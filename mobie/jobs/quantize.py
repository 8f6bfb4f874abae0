"""Quantize one model with one method, and write the record."""

from __future__ import annotations

from typing import Any

from mobie.config import build_method
from mobie.hf.card import refresh_card
from mobie.jobs.attempt import attempt
from mobie.jobs.keys import Keys, model_folder, model_hash, model_origin
from mobie.jobs.stale import gradient_code, quantize_code
from mobie.provenance import collect, digest, file_hash
from mobie.records import Measurement, Record, write_record
from mobie.resources import CPU, Resources

DEFAULT_RESOURCES = Resources()


def quantize_job(keys: Keys, resources: Resources = DEFAULT_RESOURCES, *, progress: bool) -> Record:
    """Write `checkpoint/` with its model card, and `quantize.json`.

    Blocks that an earlier run of the same job finished are kept.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    from mobie.calibration.shared import GradientCache
    from mobie.calibration.tokens import load_tokens
    from mobie.packing.checkpoint import MANIFEST
    from mobie.pipeline import quantize

    config = keys.method_config
    method = build_method(config.method, config.options)
    folder = model_folder(keys, weights=True)
    tokens, _ = load_tokens(keys.calibration)
    code = quantize_code(config.method)
    inputs = {"model": model_hash(keys), "calibration": file_hash(keys.calibration)}
    decides = inputs if resources.kind == CPU else inputs | {"device": resources.kind}
    fingerprint = digest({"code": code, "inputs": decides, "method": config.method, "options": config.options})

    cache = GradientCache(
        keys.layout.gradients(keys.suite, keys.model), digest({"code": gradient_code(), "inputs": decides})
    )

    outcome = attempt(
        lambda: quantize(
            folder,
            method,
            tokens,
            keys.checkpoint,
            fingerprint=fingerprint,
            gradient_cache=cache,
            resources=resources,
            progress=progress,
        ),
        keys.checkpoint,
    )
    measurements: tuple[Measurement, ...] = ()
    details: dict[str, Any] = {
        "options": config.options,
        "origin": model_origin(keys),
        "resources": resources.as_json(),
        "traceback": list(outcome.traceback),
    }
    if outcome.value is not None:
        report = outcome.value
        ledger = report.ledger
        bits = {"paper": ledger.paper_bits, "codes": ledger.code_bits, "stored": ledger.stored_bits}
        measurements = tuple(Measurement(f"bits_{kind}", value, None, ledger.weights) for kind, value in bits.items())
        details |= {
            "blocks": report.blocks,
            "bits_by_component": report.components,
            "bytes_by_item": {item.name: item.bytes for item in ledger.items},
            "file_bytes": report.file_bytes,
            "gradient_cpu_seconds": report.gradient_cpu_seconds,
            "gradients_shared": report.gradients_shared,
            "kept_bytes": report.kept_bytes,
            "manifest": file_hash(keys.checkpoint / MANIFEST),
        }
    record = Record(
        kind="quantize",
        status=outcome.status,
        reason=outcome.reason,
        suite=keys.suite,
        model=keys.model,
        method=keys.method,
        seed=keys.seed,
        protocol=keys.calibration_config.digest(),
        measurements=measurements,
        details=details,
        provenance=collect(inputs, code, keys.layout.root),
    )
    write_record(keys.record("quantize"), record)
    refresh_card(keys)
    return record
