"""The keys of a job, and what the configuration says for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobie.config import (
    Calibration,
    MethodConfig,
    ModelConfig,
    ProtocolConfig,
    SuiteConfig,
    load_method,
    load_model_config,
    load_protocol,
    load_suite,
)
from mobie.errors import ConfigError, DataError, unknown_name
from mobie.fetching.repository import data_repository, model_repository
from mobie.lock import LockedRepository, locked_entry
from mobie.parsing import parse_json
from mobie.paths import Layout, embedded_model
from mobie.provenance import digest, file_hash
from mobie.sources import CHECKSUMS, HUB, Source, fetch, is_locked, load_sources
from mobie.storage import unsealed, write_text


@dataclass(frozen=True)
class Keys:
    """Suite, model, method and seed: they name a job's files and its record."""

    layout: Layout
    suite: str
    model: str
    seed: int
    method: str = ""

    @property
    def suite_config(self) -> SuiteConfig:
        return load_suite(self.suite, self.layout)

    @property
    def model_config(self) -> ModelConfig:
        return load_model_config(self.model, self.layout)

    @property
    def method_config(self) -> MethodConfig:
        return load_method(self.method, self.layout)

    @property
    def protocol(self) -> ProtocolConfig:
        return load_protocol(self.suite_config.protocol, self.layout)

    @property
    def calibration_config(self) -> Calibration:
        """The model's calibration with the changes of the suite, then of the method."""
        calibration = self.suite_config.applied_to(self.model_config).calibration
        return self.method_config.calibration.apply(calibration) if self.method else calibration

    @property
    def calibration(self) -> Path:
        return self.calibration_file(self.calibration_config)

    def calibration_file(self, c: Calibration) -> Path:
        """Tokens drawn under a calibration with this seed."""
        return self.layout.calibration(self.suite, self.model, c.text, c.sequences, c.length, self.seed)

    @property
    def checkpoint(self) -> Path:
        return self.layout.checkpoint(self.suite, self.model, self.method, self.seed)

    def record(self, kind: str) -> Path:
        return self.layout.record(self.suite, self.model, self.method, self.seed, kind)


def model_files(name: str, model: ModelConfig, layout: Layout) -> list[Path]:
    """Files that stand for a model as inputs of a job: the shipped ones, or the stamp of a download."""
    if model.source == "hub":
        return [layout.hub_model_stamp(name)]
    return [embedded_model(model.repo) / file for file in ("config.json", "model.safetensors", "tokenizer.json")]


def write_checksums(folder: Path) -> Path:
    """List the files of an embedded model with their hashes, as `sha256sum --check` reads them."""
    files = sorted(file for file in folder.iterdir() if file.name != CHECKSUMS)
    path = folder / CHECKSUMS
    write_text(path, "".join(f"{file_hash(file)}  {file.name}\n" for file in files))
    return path


def model_stamp(keys: Keys) -> dict[str, Any]:
    """What was noted when a hub model was fetched: repo, revision, files. Raises `OSError`, `ValueError`."""
    return unsealed(parse_json(keys.layout.hub_model_stamp(keys.model).read_bytes()))


def model_lock(keys: Keys) -> LockedRepository | None:
    """What the lock says of a model; None of an embedded one. Raises `ConfigError`."""
    model = keys.model_config
    return locked_entry(model_repository(keys.model, model), keys.layout) if model.source == "hub" else None


def model_origin(keys: Keys) -> dict[str, Any]:
    """Where a model comes from, for a record; `pinned`: whether fetching it again must give the same."""
    model = keys.model_config
    if model.source != "hub":
        return {"repo": model.repo, "revision": None, "pinned": True}
    pinned = model_lock(keys) is not None or model_repository(keys.model, model).commit is not None
    return {"repo": model.repo, "revision": model_stamp(keys)["revision"], "pinned": pinned}


def _checksums(keys: Keys) -> tuple[Path, dict[str, str]]:
    """The file that says what the files of a model must be, and their hashes by name.

    Raises:
        DataError: it is missing or damaged.
    """
    model = keys.model_config
    if model.source == "hub":
        path = keys.layout.hub_model_stamp(keys.model)
        try:
            return path, model_stamp(keys)["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable stamp of a model ({error}); {_model_remedy(keys)}") from error
    path = embedded_model(model.repo) / CHECKSUMS
    try:
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        return path, {name: checksum for checksum, name in lines}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list of hashes ({error}); {_model_remedy(keys)}") from error


def _model_remedy(keys: Keys) -> str:
    if keys.model_config.source == "hub":
        return f"run `python -m mobie fetch --model {keys.model}`"
    train = f"python -m mobie train-nano --model {keys.model_config.repo} --install"
    return f"restore it from the repository, or make it with `{train}`"


def model_folder(keys: Keys, *, weights: bool = False) -> Path:
    """Folder of the full-precision model, compared with the hashes known of it; with its weights only if asked.

    Raises:
        DataError: a file is missing or damaged.
    """
    model = keys.model_config
    folder = keys.layout.hub_model(keys.model) if model.source == "hub" else embedded_model(model.repo)
    for file in model_files(keys.model, model, keys.layout):
        if not file.is_file():
            raise DataError(f"{file}: no such file; expected the model {keys.model}; {_model_remedy(keys)}")
    listed, checksums = _checksums(keys)
    locked = model_lock(keys)
    if locked is not None and checksums != locked.hashes:
        raise DataError(
            f"{folder}: got other files than {keys.layout.lock} has of {keys.model}, expected those; "
            f"{_model_remedy(keys)}"
        )
    for name, expected in checksums.items():
        if weights or not name.endswith(".safetensors"):
            if not (folder / name).is_file():
                raise DataError(f"{folder / name}: no such file, and {listed} lists it; {_model_remedy(keys)}")
            got = file_hash(folder / name)
            if got != expected:
                raise DataError(
                    f"{folder / name}: sha256 {got}, expected {expected} as in {listed.name}; {_model_remedy(keys)}"
                )
    return folder


def model_hash(keys: Keys) -> str:
    """Digest over the files of the full-precision model."""
    files = model_files(keys.model, keys.model_config, keys.layout)
    return digest({file.name: file_hash(file) for file in files})


def find_source(name: str, layout: Layout) -> Source:
    """A row of `sources.csv`. Raises `ConfigError`."""
    sources = load_sources(layout.sources)
    if name not in sources:
        raise ConfigError(f"{layout.sources}: {unknown_name('source', name, sources)}")
    return sources[name]


def source_version(source: Source, layout: Layout) -> str:
    """The register's version of a source; of a locked repository its revision, and the digest of its files' hashes."""
    locked = source_lock(source, layout)
    return source.version if locked is None else f"{locked.revision or 'locked'}:{digest(locked.hashes)}"


def source_lock(source: Source, layout: Layout) -> LockedRepository | None:
    """What the lock says of a source; None of one that is not from the hub. Raises `ConfigError`."""
    return locked_entry(data_repository(source), layout) if source.kind == HUB else None


def checked_source(name: str, layout: Layout) -> Path:
    """Path of a download that is there and is what register and lock say; a damaged one is removed.

    Raises:
        DataError: it is missing, damaged, or was fetched before the lock changed.
    """
    source = find_source(name, layout)
    path = layout.source(source)
    again = f"fetch it with `python -m mobie fetch {name}`"
    if not path.exists():
        raise DataError(f"{path}: no such file; {again}")
    if not is_locked(path, source_lock(source, layout)):
        raise DataError(f"{path}: got other files than {layout.lock} has of {name}, expected those; {again}")
    return fetch(source, path)
