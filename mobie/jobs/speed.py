"""Time a model with a method's packed weights: record of kind `speed`.

A model whose published shape is known (`mobie.speed.architectures`) is made with random weights, which needs no
download: speed hangs on shapes and routing. Any other is read from its stored checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mobie.errors import ConfigError
from mobie.jobs.attempt import attempt
from mobie.jobs.data import read_windows, windows_path
from mobie.jobs.keys import Keys, model_folder, model_hash
from mobie.jobs.score import REFERENCE, Scores, checkpoint_of, hole_of, make_record
from mobie.jobs.stale import speed_code
from mobie.provenance import collect, digest
from mobie.records import Measurement, Record, Status
from mobie.speed.architectures import NAMES, load_shape
from mobie.speed.runners import PRIMARY
from mobie.speed.setting import SpeedProtocol

if TYPE_CHECKING:
    from pathlib import Path

    from mobie.scoring.perplexity import PerplexityProtocol
    from mobie.speed.subject import Subject

KIND = "speed"
Weights = Literal["random", "stored"]
#: values of the primary run that a record holds as measurements; times and speeds come with their spread
TIMED = ("tokens_per_second", "time_to_first_token")
PLAIN = (
    *("tokens_per_second_with_prefill", "peak_memory_bytes", "weight_bytes", "activated_bytes"),
    *("bytes_per_step", "roofline_share", "distinct_experts"),
)
#: measurements that hang on the machine
TIMINGS = ("tokens_per_second", "tokens_per_second_with_prefill", "time_to_first_token", "roofline_share")
CPU_NO_VERDICT = "timed on a CPU, which says nothing about the speed on a graphics card that the paper states"


@dataclass(frozen=True)
class Options:
    """What a hand run may change; the default is what the protocol says.

    weights: None: random where the model's shape is known, else stored.
    device:  None: a GPU where there is one.
    sweep:   every runner at every batch size and routing.
    """

    weights: Weights | None = None
    device: str | None = None
    sweep: bool = False


def weights_of(model: str, chosen: Weights | None = None) -> Weights:
    """Which weights a model is timed with."""
    if chosen == "random" and model not in NAMES:
        raise ConfigError(f"no published shape of {model}; expected one of {', '.join(NAMES)}, or --weights stored")
    return chosen or ("random" if model in NAMES else "stored")


def quality_protocol(keys: Keys) -> PerplexityProtocol | None:
    """Windows on which int8 activations are scored: one of the perplexity protocols; None: not scored.

    Raises:
        ConfigError: the protocol names a text without perplexity.
    """
    text = keys.protocol.speed.quality_text
    if text is None or keys.method not in keys.protocol.speed.compared or weights_of(keys.model) == "random":
        return None
    found = next((part for part in keys.protocol.perplexity if part.text == text), None)
    if found is None:
        raise ConfigError(f"speed: quality_text is {text!r}, expected one of {', '.join(keys.protocol.texts)} or null")
    return found


def speed_inputs(keys: Keys) -> list[Path]:
    """Files that a speed record is made from: nothing for random weights."""
    if weights_of(keys.model) == "random":
        return []
    found = [keys.record("quantize")]
    protocol = quality_protocol(keys)
    return found if protocol is None else [*found, windows_path(keys, protocol)]


def gpu_command(suite: str, model: str, method: str) -> str:
    """What to run on a machine with a GPU."""
    return f"python -m mobie speed --suite {suite} --model {model} --method {method}"


def speed_job(
    keys: Keys, protocol: SpeedProtocol | None = None, options: Options = Options(), *, progress: bool = False
) -> Record:
    """Measure, and give back the record; `write_record` is the caller's.

    A model of published shape is not timed without a GPU, unless a device is asked for: the record is then `skipped`
    and says which command measures it.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or files that are not there.
    """
    protocol = protocol or keys.protocol.speed
    weights = weights_of(keys.model, options.weights)
    blocker = hole_of(keys, keys.method) if weights == "stored" else _no_gpu(keys, options)
    if blocker is not None:
        return _record(keys, protocol, status="skipped", reason=blocker)
    inputs: dict[str, str] = {}
    subject = _subject(keys, protocol, options, weights, inputs)
    outcome = attempt(lambda: _measure(keys, protocol, options, subject, inputs, progress), keys.record(KIND))
    scores = outcome.value or Scores((), {"traceback": list(outcome.traceback)})
    status, reason = outcome.status, outcome.reason
    if outcome.value is not None:
        status, reason = _outcome_of(scores)
    return _record(
        keys,
        protocol,
        status=status,
        reason=reason,
        measurements=tuple(scores.measurements),
        details=scores.details,
        provenance=collect(inputs, speed_code(), keys.layout.root),
    )


def change_protocol(
    protocol: SpeedProtocol,
    *,
    batch: int | None = None,
    prefill: int | None = None,
    decode: int | None = None,
    router: str | None = None,
) -> SpeedProtocol:
    """A protocol with a hand run's numbers; one that names a batch or a routing is of that alone."""
    values = {"batch": batch, "prefill": prefill, "decode": decode, "router": router}
    changes: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if batch is not None or router is not None:
        changes |= {"batches": (), "routers": ()}
    return protocol.model_validate(protocol.model_dump() | changes)


def speed_lines(record: Record) -> list[str]:
    """All runs of a record, one a line."""
    lines = []
    for run in record.details.get("runs", ()):
        place = f"  {run['runner']:20} batch {run['batch']:3} {run['router']:9}"
        if run["status"] != "ok":
            lines.append(f"{place} {run['status']}: {run['reason']}")
            continue
        speed, first = run["tokens_per_second"], run["time_to_first_token"]
        share = run.get("roofline_share")
        lines.append(
            f"{place} {speed['median']:10.1f} tok/s  quartiles {speed['lower']:.1f} to {speed['upper']:.1f}"
            f"  first token {first['median']:.3f} s" + ("" if share is None else f"  roofline {100 * share:.1f} %")
        )
    return lines


def _record(keys: Keys, protocol: SpeedProtocol, **values: Any) -> Record:
    return make_record(keys, KIND, digest([protocol.digest()]), **values)


def _no_gpu(keys: Keys, options: Options) -> str | None:
    """Why a model of published shape is not timed here."""
    import torch

    if options.device is not None or torch.cuda.is_available():
        return None
    command = gpu_command(keys.suite, keys.model, keys.method)
    return f"needs a CUDA GPU, this machine has none; measure it on one with `{command}`"


def _subject(
    keys: Keys, protocol: SpeedProtocol, options: Options, weights: Weights, inputs: dict[str, str]
) -> Subject:
    """The model to time; hashes of what it is made of go into `inputs`."""
    import torch

    from mobie.speed.subject import RandomSubject, StoredSubject

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA GPU here; use --device cpu, or a machine with one")
    how = {"device": device, "dtype": getattr(torch, protocol.dtype)}
    if weights == "random":
        shape = load_shape(keys.model)
        inputs["shape"] = digest(shape.config)
        return RandomSubject(keys.model, shape.build(), keys.method_config.build(), seed=keys.seed, **how)
    inputs["model"] = model_hash(keys)
    checkpoint = None
    if keys.method != REFERENCE:
        checkpoint, inputs["checkpoint"] = checkpoint_of(keys, keys.method)
    return StoredSubject(keys.model, model_folder(keys), checkpoint, **how)


def _measure(
    keys: Keys,
    protocol: SpeedProtocol,
    options: Options,
    subject: Subject,
    inputs: dict[str, str],
    progress: bool,
) -> Scores:
    from mobie.speed.measure import measure_all, plan, ratios
    from mobie.speed.runners import GROUPED

    kind: Literal["dense", "packed"] = "dense" if keys.method == REFERENCE else "packed"
    planned = plan(protocol, keys.method, kind, sweep=options.sweep)
    runs = measure_all(subject, planned, progress=progress)
    details = {
        "weights": subject.weights,
        "device": device_name(subject.device),
        "software": _software(subject.device),
        "runs": runs,
        "ratios": {name: ratios(runs, name) for name in ("dense", GROUPED)},
    }
    if subject.device == "cpu":
        details["no_verdict"] = dict.fromkeys(TIMINGS, CPU_NO_VERDICT)
    compared = keys.method in protocol.compared
    if compared and subject.device == "cuda":
        details["block"] = _block(keys, subject)
    if (windows_protocol := quality_protocol(keys)) is not None and subject.weights == "stored":
        details["quality"] = _quality(keys, protocol, windows_protocol, inputs)
    main = next(run for run in runs if run["runner"] == PRIMARY[kind])  # the first one is at the paper's setting
    details["primary"] = {key: main[key] for key in ("runner", "batch", "router", "status", "reason")}
    measurements = _measurements(main) if main["status"] == "ok" else [_activated(subject, kind, main["batch"])]
    return Scores([*measurements, *_bits(subject.account(kind))], details)


def _outcome_of(scores: Scores) -> tuple[Status, str | None]:
    """Status and reason of a record: those of its primary run; the others are kept beside it."""
    primary = scores.details["primary"]
    if primary["status"] == "ok":
        return "ok", None
    return primary["status"], f"{primary['runner']} at batch {primary['batch']}: {primary['reason']}"


def _measurements(run: Mapping[str, Any]) -> list[Measurement]:
    """Measurements of a run."""
    found = []
    for name in TIMED:
        value = run[name]
        stderr = run.get(f"{name}_stderr")
        found.append(Measurement(name, value["median"], stderr, value["n"]))
    steps = run["step_seconds"]["n"]
    found += [Measurement(name, float(run[name]), None, steps) for name in PLAIN if run[name] is not None]
    return [m for m in found if math.isfinite(m.value)]


def _activated(subject: Subject, kind: Literal["dense", "packed"], batch: int) -> Measurement:
    """Bytes of the weights that a step uses: what is known of a model that no kernel reads."""
    return Measurement("activated_bytes", subject.activated(kind, batch).bytes, None, 1)


def _bits(account: Any) -> Sequence[Measurement]:
    """Bits per packed weight, as in a record of quantizing; 16 for dense weights."""
    ledger = account.ledger
    if ledger is None:
        return [Measurement(f"bits_{name}", 16.0, None, 1) for name in ("paper", "stored")]
    values = {"paper": ledger.paper_bits, "stored": ledger.stored_bits}
    return [Measurement(f"bits_{name}", value, None, ledger.weights) for name, value in values.items()]


def _block(keys: Keys, subject: Subject) -> list[dict[str, Any]]:
    from mobie.speed.block import block_times

    subject.release()
    method = keys.method_config.build()
    return block_times(subject.config, method, device=subject.device, dtype=subject.dtype)


def _quality(
    keys: Keys, protocol: SpeedProtocol, windows_protocol: PerplexityProtocol, inputs: dict[str, str]
) -> dict[str, Any]:
    """Perplexity with int8 activations and head, in the dtype of the suite's perplexity."""
    import torch

    from mobie.speed.quality import quality
    from mobie.speed.subject import StoredSubject

    folder, _ = checkpoint_of(keys, keys.method)
    windows, hashes = read_windows(keys, windows_protocol, folder)
    inputs |= hashes
    count = min(protocol.quality_windows, len(windows))
    chosen = windows[torch.arange(count) * len(windows) // count]
    dtype = getattr(torch, windows_protocol.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = StoredSubject(keys.model, model_folder(keys), folder, device=device, dtype=dtype)
    return quality(stored.model("packed"), chosen) | {"text": windows_protocol.text}


def _software(device: str) -> dict[str, str]:
    """What else decides a GPU's speed: versions of CUDA and Triton."""
    import importlib.metadata

    import torch

    if device == "cpu":
        return {}
    return {"cuda": str(torch.version.cuda), "triton": importlib.metadata.version("triton")}


def device_name(device: str) -> str:
    """The GPU's own name, or the processor's."""
    import platform
    from pathlib import Path

    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
