"""Let a stored checkpoint write programs, and judge them.

Two jobs, since only the first needs a GPU and only the second may start a container.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mobie.containers.images import IMAGES, read_digests
from mobie.data.problems import DatasetName, Row, problems_digest, read_problems
from mobie.errors import DataError, UnsupportedError
from mobie.hf.card import refresh_cards
from mobie.jobs.attempt import attempt
from mobie.jobs.keys import Keys, checked_source, find_source
from mobie.jobs.score import Scores, checkpoint_of, hole_of, load, make_record
from mobie.jobs.stale import code_code, code_samples_code
from mobie.paths import Layout
from mobie.provenance import collect, digest, file_hash
from mobie.records import Measurement, Record, read_record, write_record
from mobie.sandbox import Runtime, find_runtime
from mobie.scoring.code.protocol import CodeProtocol
from mobie.scoring.code.samples import Program, read_programs, to_lines
from mobie.scoring.code.score import NO_PLUS, score_programs
from mobie.scoring.protocol import require_version
from mobie.scoring.tasks import draw_items
from mobie.sources import Source
from mobie.storage import storage_errors, write_bytes

Problems = dict[DatasetName, dict[str, Row]]  # data set → task → row


def code_sources(keys: Keys) -> tuple[Source, ...]:
    """Rows of `sources.csv` that hold a suite's programming problems. Raises `ConfigError`."""
    names = dict.fromkeys(part.source for part in keys.protocol.code.datasets)
    return tuple(find_source(name, keys.layout) for name in names)


def chosen_problems(keys: Keys) -> tuple[Problems, dict[str, list[int]]]:
    """The problems that a protocol chooses, and their numbers in their sets.

    Raises:
        DataError: a source is missing, damaged or holds other things.
    """
    protocol = keys.protocol.code
    problems: Problems = {}
    items: dict[str, list[int]] = {}
    for part in protocol.datasets:
        rows = list(read_problems(checked_source(part.source, keys.layout), part.name).values())
        items[part.name] = draw_items(f"code/{part.name}", len(rows), part.limit, protocol.sample_seed)
        problems[part.name] = {rows[item]["task_id"]: rows[item] for item in items[part.name]}
    return problems, items


def sandbox_state(layout: Layout, unsandboxed: bool) -> str:
    """What programs would run in now: a change of it makes verdicts stale. Looks at files alone and starts nothing."""
    if unsandboxed:
        return "unsandboxed"
    image = IMAGES["code"].sif(layout.root)
    if shutil.which("apptainer") is None or not image.is_file():
        return "none"
    return digest(read_digests(layout.root).get("code") or image.stat().st_size)


# --- programs ---------------------------------------------------------------------------------------------------------


def generate_job(keys: Keys) -> Record:
    """Write the programs of a checkpoint and then their record, `code_samples.json`.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    protocol = keys.protocol.code
    kind, protocol_digest = "code_samples", protocol.generation_digest()
    blocker = hole_of(keys, keys.method)
    if blocker is not None:
        record = make_record(keys, kind, protocol_digest, status="skipped", reason=blocker)
    else:
        require_version("evalplus", protocol.evalplus)
        folder, manifest = checkpoint_of(keys, keys.method)
        problems, _ = chosen_problems(keys)
        outcome = attempt(lambda: _generate(keys, folder, problems), keys.record(kind))
        inputs = {f"problems {name}": problems_digest(rows) for name, rows in problems.items()}
        record = make_record(
            keys,
            kind,
            protocol_digest,
            status=outcome.status,
            reason=outcome.reason,
            details=(outcome.value or Scores((), {"traceback": list(outcome.traceback)})).details,
            provenance=collect(inputs | {"checkpoint": manifest}, code_samples_code(), keys.layout.root),
        )
    write_record(keys.record(kind), record)
    return record


def _generate(keys: Keys, folder: Path, problems: Problems) -> Scores:
    from mobie.scoring.code.generate import generate

    protocol, chat = keys.protocol.code, keys.model_config.chat
    model, tokenizer = load(folder, protocol.dtype)
    target = keys.layout.code_samples(keys.suite, keys.model, keys.method, keys.seed)
    files, cut, unfinished = {}, {}, {}
    total = sum(protocol.modes.values()) * sum(map(len, problems.values()))
    with tqdm(total=total, unit="program", desc="writing programs", disable=None, leave=False) as bar:
        for name, rows in problems.items():
            programs, cut[name] = generate(model, tokenizer, rows, name, protocol, chat, bar.update)
            for mode, written in programs.items():
                path = target / f"{name}.{mode}.jsonl"
                with storage_errors(path):
                    write_bytes(path, to_lines(written))
                files[f"{name}.{mode}"] = {"file": path.name, "sha256": file_hash(path), "programs": len(written)}
                unfinished[f"{name}.{mode}"] = sum(not program.finished for program in written)
    details = {"files": files, "cut_prompts": cut, "unfinished": unfinished}
    return Scores((), details | {"prompt": "chat template" if chat else "completion"})


# --- verdicts ---------------------------------------------------------------------------------------------------------


def score_job(keys: Keys, unsandboxed: bool = False) -> Record:
    """Judge the programs of a checkpoint and write `code.json`.

    Where there are no programs, or nothing to run them in, the record is `skipped` and says what to do.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    protocol = keys.protocol.code
    kind, skip = "code", partial(make_record, keys, "code", protocol.digest(), status="skipped")
    samples = read_record(keys.record("code_samples"))
    if not samples.ok:
        record = skip(reason=f"writing programs with {keys.method}: {samples.status}: {samples.reason}")
    else:
        try:
            record = _judged(keys, protocol, samples, find_runtime(unsandboxed, keys.layout))
        except UnsupportedError as error:
            record = skip(reason=str(error), provenance=collect({}, code_code(), keys.layout.root))
    write_record(keys.record(kind), record)
    refresh_cards(keys)
    return record


def _judged(keys: Keys, protocol: CodeProtocol, samples: Record, runtime: Runtime) -> Record:
    require_version("evalplus", protocol.evalplus)
    problems, items = chosen_problems(keys)
    programs = _stored_programs(keys, protocol, samples, problems)
    outcome = attempt(lambda: _judge(protocol, problems, items, programs, runtime), keys.record("code"))
    scores = outcome.value or Scores((), {"traceback": list(outcome.traceback)})
    assert all(math.isfinite(m.value) for m in scores.measurements)
    details = {"runtime": runtime.describe(), "prompt": samples.details["prompt"]}
    inputs = dict(samples.provenance["inputs"]) | {
        f"programs {name}": file["sha256"] for name, file in samples.details["files"].items()
    }
    return make_record(
        keys,
        "code",
        protocol.digest(),
        status=outcome.status,
        reason=outcome.reason,
        measurements=tuple(scores.measurements),
        details=scores.details | details,
        provenance=collect(inputs, code_code(), keys.layout.root),
    )


def _stored_programs(
    keys: Keys, protocol: CodeProtocol, samples: Record, problems: Problems
) -> dict[str, dict[str, list[Program]]]:
    """Programs by data set and mode, all checked. Raises `DataError`."""
    path = keys.record("code_samples")
    expected = {f"problems {name}": problems_digest(rows) for name, rows in problems.items()}
    got = {name: samples.provenance.get("inputs", {}).get(name) for name in expected}
    if samples.protocol != protocol.generation_digest() or got != expected:
        raise DataError(
            f"{path}: its programs were written under another protocol or for other problems than the suite has now; "
            "run `python -m mobie generate-code` again"
        )
    folder = keys.layout.code_samples(keys.suite, keys.model, keys.method, keys.seed)
    files = samples.details.get("files", {})
    wanted = {f"{name}.{mode}" for name in problems for mode in protocol.modes}
    if set(files) != wanted:
        raise DataError(
            f"{path}: lists the files {', '.join(sorted(files))}, expected {', '.join(sorted(wanted))}; "
            "run `python -m mobie generate-code` again"
        )
    return {
        name: {
            mode: read_programs(folder / f"{name}.{mode}.jsonl", files[f"{name}.{mode}"]["sha256"], list(rows), count)
            for mode, count in protocol.modes.items()
        }
        for name, rows in problems.items()
    }


def _judge(
    protocol: CodeProtocol,
    problems: Problems,
    items: Mapping[str, list[int]],
    programs: Mapping[str, Mapping[str, list[Program]]],
    runtime: Runtime,
) -> Scores:
    measurements: list[Measurement] = []
    answers: dict[str, Any] = {}
    statuses: dict[str, Any] = {}
    outcomes: dict[str, Any] = {}
    holes: dict[str, str] = {}
    unsanitized: dict[str, int] = {}
    with tqdm(total=0, unit="program", desc="running programs", disable=None, leave=False) as bar:

        def more(count: int) -> None:
            bar.total = (bar.total or 0) + count
            bar.refresh()

        for name, rows in problems.items():
            found = score_programs(name, rows, programs[name], protocol, runtime, lambda _: bar.update(), more)
            measurements += found.measurements
            answers |= found.answers
            statuses[name], outcomes[name] = found.statuses, found.outcomes
            unsanitized[name] = found.unsanitized
            if not any(row["plus_input"] for row in rows.values()):
                holes[f"{name}_plus"] = NO_PLUS
    details = {"answers": answers, "items": dict(items), "statuses": statuses, "outcomes": outcomes, "holes": holes}
    return Scores(measurements, details | {"unsanitized": unsanitized})
