"""The keys of a job, and what the configuration says for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
from mobie.paths import Layout, embedded_model
from mobie.provenance import digest, file_hash
from mobie.sources import Source, fetch, load_sources


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
        """The model's calibration with the method's changes."""
        calibration = self.model_config.calibration
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


def model_folder(keys: Keys) -> Path:
    """Folder of the full-precision model. Raises `DataError` where it is not there."""
    model = keys.model_config
    for file in model_files(keys.model, model, keys.layout):
        if not file.is_file():
            remedy = (
                f"run `python -m mobie fetch --model {keys.model}`"
                if model.source == "hub"
                else "restore it from the repository, or make it with `snakemake --cores all train_nano`"
            )
            raise DataError(f"{file}: no such file; expected the model {keys.model}; {remedy}")
    return keys.layout.hub_model(keys.model) if model.source == "hub" else embedded_model(model.repo)


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


def checked_source(name: str, layout: Layout) -> Path:
    """Path of a download that is there and is what the register says; a damaged one is removed.

    Raises:
        DataError: it is missing or damaged.
    """
    source = find_source(name, layout)
    path = layout.source(source)
    if not path.exists():
        raise DataError(f"{path}: no such file; fetch it with `python -m mobie fetch {name}`")
    return fetch(source, path)
