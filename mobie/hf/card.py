"""The model card of a checkpoint: README.md with what it is, how it was made, what it holds and what was measured.

The card reads records and configuration and nothing else. It is written by the quantize job and again after every
score, so it always tells what is known; it decides nothing and is no part of the manifest. A score of another
checkpoint (an older one in the same place) is not shown as this one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from mobie.comparable import KIND as GATE
from mobie.comparable import NOTHING_PRINTED, Comparability, has_gate, of_record
from mobie.config import MethodConfig, ModelConfig
from mobie.errors import MobieError
from mobie.jobs.keys import Keys
from mobie.paths import Layout
from mobie.provenance import file_hash
from mobie.records import Measurement, Record, read_record
from mobie.results import Cell
from mobie.storage import storage_errors, write_text

REFERENCE = "fp16"
CARD = "README.md"
MANIFEST = "manifest.json"
SCORES = ("perplexity", "tasks", "hard", "code")
#: kinds that a card misses where they are not measured; others appear once there is a record
EXPECTED = ("perplexity", "tasks")
TITLES = {"perplexity": "Perplexity", "tasks": "Zero-shot tasks", "hard": "Harder tasks", "code": "Programs"}
COMPONENTS = {
    "experts": "experts",
    "shared_experts": "shared experts",
    "attention": "attention",
    "router": "router",
    "other": "dense layers",
}
USE = """## Use

```python
import mobie  # makes the library know this format; nothing else is needed
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```

or, in a terminal: `python -m mobie chat path/to/this/folder`.

Without `import mobie` the library warns of an unknown quantization type and then refuses the folder, because the sizes
of its parameters do not fit ("You set `ignore_mismatched_sizes` to `False`"). Do not set that option: it would fill the
model with random weights. To keep a copy, copy the whole folder; every file but this one and
`generation_config.json` is compared with `manifest.json` when the model is loaded.
"""


def refresh_cards(keys: Keys) -> None:
    """Write the card of a checkpoint; if it is the model in 16 bits, also those of its seed that show its scores.

    Raises:
        ConfigError, DataError, StorageError: as `refresh_card`, for the checkpoint's own card.
    """
    refresh_card(keys)
    if keys.method != REFERENCE:
        return
    run = keys.record("quantize").parent
    for other in sorted(run.parent.parent.glob(f"*/{run.name}/quantize.json")):
        try:
            refresh_card(replace(keys, method=other.parent.parent.name))
        except MobieError:  # another method's trouble, which its own jobs report
            continue


def refresh_card(keys: Keys) -> Path | None:
    """Write the card of a checkpoint from the records that exist; None where there is no finished checkpoint.

    Jobs that score the same checkpoint at the same time wait for each other, so no score is left out.

    Raises:
        ConfigError, DataError: configuration or records that cannot be read.
        StorageError: the card cannot be written.
    """
    folder = keys.checkpoint
    if not (folder / MANIFEST).is_file() or not keys.record("quantize").is_file():
        return None
    lock = keys.record("quantize").with_name(".card.lock")
    with storage_errors(lock), FileLock(lock):
        record = read_record(keys.record("quantize"))
        if not record.ok or record.details["manifest"] != file_hash(folder / MANIFEST):
            return None
        write_text(folder / CARD, card(keys, record))
    return folder / CARD


def card(keys: Keys, record: Record) -> str:
    """Text of the card of the checkpoint that a quantize record tells of."""
    model, method = keys.model_config, keys.method_config
    sections = [
        _front_matter(keys, model, method),
        f"# {keys.model}, quantized with {method.label}\n",
        _introduction(keys, model, method),
        USE,
        _settings(keys, record, method),
        _ledger(model, record),
        _results(keys, record),
        _provenance(keys, record),
    ]
    return "\n".join(sections)


def _front_matter(keys: Keys, model: ModelConfig, method: MethodConfig) -> str:
    import yaml

    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "inference": False}
    if model.source == "hub":
        values |= {"base_model": model.repo, "base_model_relation": "quantized"}
    values["tags"] = list(dict.fromkeys(("mobie", "mixture-of-experts", "quantized", method.method)))
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _introduction(keys: Keys, model: ModelConfig, method: MethodConfig) -> str:
    revision = f", revision `{model.revision}`" if model.revision else ""
    origin = f"is `{model.repo}` from the hub{revision}" if model.source == "hub" else "ships with this suite"
    lines = [
        method.description,
        "",
        f"The original model {origin}; it has {model.parameters:,} weights. {model.notes}".rstrip(),
    ]
    if model.source == "hub":
        lines += ["", "The licence of the original model applies to this one."]
    return "\n".join(lines) + "\n"


def _settings(keys: Keys, record: Record, method: MethodConfig) -> str:
    options = method.build().options
    rows = [(f"`{name}`", f"`{value}`") for name, value in sorted(options.items())]
    calibration = keys.calibration_config
    rows += [
        ("calibration text", calibration.text),
        ("calibration windows", f"{calibration.sequences} of {calibration.length} tokens, seed {keys.seed}"),
    ]
    return f"## Method\n\n`{method.method}`, as in `workflow/config/methods`: `{keys.method}`.\n\n" + _table(
        ("setting", "value"), rows
    )


def _ledger(model: ModelConfig, record: Record) -> str:
    details = record.details
    bits = {measurement.name: measurement for measurement in record.measurements}
    totals = {kind: bits[f"bits_{kind}"].value for kind in ("paper", "codes", "stored")}
    weights = bits["bits_stored"].n
    rows = [
        (COMPONENTS.get(name, name), f"{own['weights']:,}", *_bits(own), f"{own['stored'] * own['weights'] / 8:,.0f}")
        for name, own in details["bits_by_component"].items()
    ]
    packed = sum(details["bytes_by_item"].values())
    rows.append(("all of these", f"{weights:,}", *_bits(totals), f"{packed:,}"))
    kept = details["kept_bytes"]
    rows.append(("kept in 16 bits", f"{kept // 2:,}", "16", "16", "16", f"{kept:,}"))
    files = details["file_bytes"]
    note = (
        f"The weight files are {files:,} bytes, {files / (packed + kept) - 1:.2%} more than what they hold; those of "
        f"the original model are {model.bytes:,}, {model.bytes / files:.2f} times as many. *Paper* is the formula of "
        "the method's paper, *codes* counts the quantized values alone, *stored* everything that is needed to decode "
        "them."
    )
    head = ("component", "weights", "bits, paper", "bits, codes", "bits, stored", "bytes")
    return f"## Bits\n\n{_table(head, rows)}\n{note}\n"


def _bits(values: Any) -> tuple[str, ...]:
    return tuple(f"{values[kind]:.3f}" for kind in ("paper", "codes", "stored"))


def _results(keys: Keys, record: Record) -> str:
    """The scores of this very checkpoint, beside those of the model in 16 bits."""
    parts = [
        f"## Results\n\nProtocol of the suite `{keys.suite}` (`{keys.suite_config.protocol}`): "
        f"{_comparability(keys).sentence}.\n"
    ]
    for kind in SCORES:
        path = keys.record(kind)
        if kind not in EXPECTED and not path.is_file():
            continue
        parts.append(f"### {TITLES[kind]}\n\n{_score(keys, kind, record.details['manifest'])}")
    return "\n".join(parts)


def _comparability(keys: Keys) -> Comparability:
    """What the protocol gate says of the model, whatever it was quantized with."""
    if not has_gate(keys.model_config.label):
        return NOTHING_PRINTED
    path = keys.layout.record(keys.suite, keys.model, REFERENCE, keys.suite_config.seed, GATE)
    return of_record(read_record(path) if path.is_file() else None)


def _score(keys: Keys, kind: str, manifest: str) -> str:
    found = _record_of(keys.record(kind), manifest)
    if found is None:
        path = Layout(Path()).record(keys.suite, keys.model, keys.method, keys.seed, kind).as_posix()
        return f"not measured yet: run `snakemake --cores all {path}`\n"
    if not found.ok:
        return f"{found.status}: {found.reason}\n"
    reference = _reference(keys, kind, found.protocol)
    shown = [m for m in found.measurements if kind == "perplexity" or not m.name.endswith(".perplexity")]
    if kind == "perplexity":
        rows = [(m.name.removesuffix(".perplexity"), _value(m), _of(reference, m.name), f"{m.n:,}") for m in shown]
        return _table(("text", "perplexity", "in 16 bits", "tokens"), rows)
    accuracies = [(m.name, _share(m), _of(reference, m.name), _chance(m), f"{m.n:,}") for m in shown]
    note = ""
    if any(_cell(m).at_chance for m in shown):
        note = "\nValues marked *at chance* are not above guessing by more than two standard errors.\n"
    return _table(("task", "accuracy", "in 16 bits", "chance", "items"), accuracies) + note


def _record_of(path: Path, manifest: str) -> Record | None:
    """The record at `path` if it scores the checkpoint with this manifest; what was skipped or failed read none."""
    if not path.is_file():
        return None
    record = read_record(path)
    read = record.provenance.get("inputs", {}).get("checkpoint")
    return record if read in (None, manifest) else None


def _reference(keys: Keys, kind: str, protocol: str) -> Record | None:
    """The same score of the model in 16 bits, if it was measured under the same protocol."""
    path = keys.layout.record(keys.suite, keys.model, REFERENCE, keys.seed, kind)
    if not path.is_file():
        return None
    record = read_record(path)
    return record if record.ok and record.protocol == protocol else None


def _of(reference: Record | None, name: str) -> str:
    found = None if reference is None else reference.measurement(name)
    if found is None:
        return "not measured"
    return _value(found) if name.endswith(".perplexity") else _share(found)


def _value(m: Measurement) -> str:
    return f"{m.value:.2f}" if m.stderr is None else f"{m.value:.2f} ± {m.stderr:.2f}"


def _share(m: Measurement) -> str:
    text = f"{m.value:.1%}" if m.stderr is None else f"{m.value:.1%} ± {m.stderr:.1%}"
    return f"{text} *at chance*" if _cell(m).at_chance else text


def _chance(m: Measurement) -> str:
    return "" if m.chance is None else f"{m.chance:.1%}"


def _cell(m: Measurement) -> Cell:
    return Cell(m.value, m.stderr, m.n, m.chance)


def _provenance(keys: Keys, record: Record) -> str:
    provenance = record.provenance
    rows = [
        ("made with", f"`{' '.join(provenance['command'])}`"),
        ("finished", provenance["finished"]),
        ("code", f"commit `{provenance['git_commit']}`, quantizing code `{provenance['code'][:16]}`"),
        *((f"{name} (sha256)", f"`{value[:16]}`") for name, value in sorted(provenance["inputs"].items())),
        ("manifest (sha256)", f"`{record.details['manifest'][:16]}`"),
        ("versions", ", ".join(f"{name} {v}" for name, v in sorted(provenance["versions"].items()) if v)),
    ]
    return f"## Provenance\n\n{_table(('', ''), rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '∣').replace('<', '&lt;') for cell in row)} |\n" for row in lines)
