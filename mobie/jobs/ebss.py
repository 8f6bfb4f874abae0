"""Calibration text that a model writes itself (MoEQuant's EBSS), and how evenly it uses the experts.

The model is the one under test in full precision: the checkpoint of the method `fp16`, which every suite has. So every
architecture is read by the same code, and a model larger than the GPU is placed as it is for scoring.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobie.config import Calibration
from mobie.data.self_sampled import SELF_SAMPLED, SelfSampling
from mobie.errors import ConfigError, DataError, unknown_name
from mobie.jobs.attempt import attempt
from mobie.jobs.gate import gate_keys
from mobie.jobs.keys import Keys, model_hash
from mobie.jobs.score import REFERENCE, checkpoint_of, hole_of, load, make_record
from mobie.jobs.stale import self_sample_code, usage_code
from mobie.provenance import collect, digest, file_hash
from mobie.records import Measurement, Record, write_record

KIND = "expert_usage"
SAMPLES, SAMPLE_TOKENS = 4, 64  # of a set that a record shows as text


def ordinary_keys(keys: Keys) -> Keys:
    """The keys of full precision, whose checkpoint writes the text and whose own text it is compared with.

    Raises:
        ConfigError: that checkpoint is itself calibrated on text that the model writes.
    """
    reference = gate_keys(keys)
    text = reference.calibration_config.text
    if text in SELF_SAMPLED:
        raise ConfigError(
            f"calibration of {keys.model} and {REFERENCE}: got {text!r}, which {REFERENCE} would have to write first; "
            "expected a text of mobie/data/texts.py; set `calibration: {text: …}` of a method instead"
        )
    return reference


def settings_of(text: str) -> SelfSampling:
    """The settings that a name stands for. Raises `ConfigError`."""
    if text not in SELF_SAMPLED:
        raise ConfigError(unknown_name("self-sampled text", text, SELF_SAMPLED))
    return SELF_SAMPLED[text]


def _load(keys: Keys) -> tuple[Any, Any, str]:
    """Model and tokenizer in full precision and the hash of their checkpoint. Raises `DataError`."""
    reference = ordinary_keys(keys)
    hole = hole_of(reference, REFERENCE)
    if hole is not None:
        raise DataError(f"{keys.model}: no full-precision model to write text with ({hole}); run its job again")
    folder, manifest = checkpoint_of(reference, REFERENCE)
    return *load(folder, keys.protocol.routing.dtype), manifest


def self_sample_job(keys: Keys, calibration: Calibration, *, progress: bool) -> Path:
    """Let the model write the tokens of a calibration whose text is one of `SELF_SAMPLED`; returns their file.

    A run that was stopped goes on from the last finished batch.

    Raises:
        ConfigError, DataError, StorageError: wrong input, no full-precision checkpoint, disk that cannot be written.
    """
    from mobie.calibration.self_sampling import Batches, Vocabulary, beginnings, self_sample
    from mobie.calibration.tokens import SelfSampledOrigin, save_tokens, tokenizer_digest
    from mobie.models.base import Adapter

    settings, text = settings_of(calibration.text), calibration.text
    model, tokenizer, checkpoint = _load(keys)
    origin = SelfSampledOrigin(
        text=text,
        model_sha256=model_hash(keys),
        tokenizer_sha256=tokenizer_digest(tokenizer),
        seed=keys.seed,
        dtype=keys.protocol.routing.dtype,
        device=model.device.type,
        settings=asdict(settings),
    )
    vocabulary = Vocabulary.of(model, tokenizer)
    begin = beginnings(vocabulary, calibration.sequences, settings, keys.seed)
    where = (keys.suite, keys.model, text, calibration.sequences, calibration.length, keys.seed)
    parts = keys.layout.calibration_parts(*where)
    decides = [asdict(origin), checkpoint, self_sample_code(), calibration.sequences, calibration.length]
    batches = Batches(parts, digest(decides))
    adapter = Adapter(model.config.model_type)
    tokens = self_sample(model, adapter, vocabulary, begin, calibration.length, settings, batches, progress=progress)
    path = keys.layout.calibration(*where)
    save_tokens(path, tokens, origin)
    shutil.rmtree(parts, ignore_errors=True)
    with suppress(OSError):  # another job's batches
        parts.parent.rmdir()
    return path


def usage_job(keys: Keys) -> Record:
    """Write `expert_usage.json`: how the full-precision model uses its experts on a method's calibration tokens.

    Beside it stands the same for the model's ordinary text.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    from mobie.calibration.tokens import load_tokens

    reference = ordinary_keys(keys)
    files = {"own": keys.calibration, "ordinary": reference.calibration}
    sets = {name: load_tokens(path)[0] for name, path in files.items()}
    texts = {"own": keys.calibration_config.text, "ordinary": reference.calibration_config.text}
    model, tokenizer, checkpoint = _load(keys)
    outcome = attempt(lambda: _measure(model, tokenizer, sets), keys.record(KIND))
    measurements, details = outcome.value or ((), {"traceback": list(outcome.traceback)})
    record = make_record(
        keys,
        KIND,
        digest([keys.calibration_config.digest(), reference.calibration_config.digest(), keys.protocol.routing.dtype]),
        status=outcome.status,
        reason=outcome.reason,
        measurements=measurements,
        details=details | {"texts": texts},
        provenance=collect(
            {"full precision": checkpoint} | {f"calibration {name}": file_hash(path) for name, path in files.items()},
            usage_code(),
            keys.layout.root,
        ),
    )
    write_record(keys.record(KIND), record)
    return record


def _measure(model: Any, tokenizer: Any, sets: dict[str, Any]) -> tuple[tuple[Measurement, ...], dict[str, Any]]:
    from mobie.calibration.usage import expert_imbalance, read_text
    from mobie.models.base import Adapter

    adapter = Adapter(model.config.model_type)
    measurements, details = [], {}
    for name, tokens in sets.items():
        found = read_text(model, adapter, tokens)
        count = tokens.numel()
        measurements.append(Measurement(f"{name}.imbalance", expert_imbalance(found.uses, count).item(), None, count))
        for layer, uses in zip(found.layers, found.uses, strict=True):
            value = expert_imbalance(uses[None], count).item()
            measurements.append(Measurement(f"layer{layer}.{name}.imbalance", value, None, count))
        if found.perplexity is not None:
            measurements.append(Measurement(f"{name}.perplexity", found.perplexity, None, count - len(tokens)))
        details[name] = {
            "uses": found.uses.tolist(),
            "layers": found.layers,
            "tokens": count,
            "samples": [tokenizer.decode(row[:SAMPLE_TOKENS].tolist()) for row in tokens[:SAMPLES]],
        }
    return tuple(measurements), details
