"""Bring models and data to this machine as register and lock say, and write the lock."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from mobie.config import config_names, load_method, load_model_config, load_suite
from mobie.data.texts import TEXTS
from mobie.errors import ConfigError, DataError, MobieError, unknown_name
from mobie.fetching.bring import Origin, bring, resolve, warn_unpinned
from mobie.fetching.mirror import download_path, missing_files
from mobie.fetching.repository import Repository, data_repository, model_repository
from mobie.jobs.keys import Keys, find_source, model_lock, source_lock
from mobie.jobs.score import benchmark_sources, hard_sources
from mobie.lock import differences, load_lock, locked_entry, save_entry
from mobie.paths import Layout
from mobie.sources import HUB, MIRRORED, fetch, load_sources
from mobie.storage import make_folder, write_sealed


def fetch_source(name: str, layout: Layout, mirror: Path | None = None) -> Path:
    """Fetch a row of `sources.csv`, or check what is there. Raises `ConfigError`, `DataError`, `StorageError`."""
    source = find_source(name, layout)
    return fetch(source, layout.source(source), Origin(mirror, source_lock(source, layout), layout.lock))


def fetch_model(keys: Keys, mirror: Path | None = None) -> Path:
    """Fetch a hub model into `resources/models/` and write its stamp; what was fetched before is kept.

    Raises:
        ConfigError: the model ships in the package, or the lock is of another repository.
        DataError, StorageError: hub or mirror lack or refuse something, a file is another one, no room on the disk.
    """
    model = keys.model_config
    if model.source != "hub":
        raise ConfigError(f"model {keys.model}: ships in the package, expected a model whose source is `hub`")
    repository, locked = model_repository(keys.model, model), model_lock(keys)
    folder = make_folder(keys.layout.hub_model(keys.model))
    arrived = bring(repository, folder, Origin(mirror, locked, keys.layout.lock), link=True)
    if locked is None:
        warn_unpinned(repository, arrived.revision, keys.layout.lock)
    stamp = keys.layout.hub_model_stamp(keys.model)
    write_sealed(stamp, {"repo": model.repo, "revision": arrived.revision, "files": arrived.hashes})
    return stamp


def suite_repositories(suite: str, layout: Layout) -> list[Repository]:
    """Models and data sets of a suite that come from the hub. Raises `ConfigError`."""
    config = load_suite(suite, layout)
    models = {*config.models, *(name for names in config.targets.values() for name in names)} - {*config.absent_models}
    keys = Keys(layout, suite, config.models[0], config.seed)
    protocol = keys.protocol
    texts = {*protocol.texts, protocol.routing.text, protocol.shift.text, *config.sweep.texts.values()}
    texts |= {Keys(layout, suite, model, 0).calibration_config.text for model in models}
    texts |= {text for method in config.methods if (text := load_method(method, layout).calibration.text)}
    names = {source.name for source in (*benchmark_sources(keys), *hard_sources(keys))}
    names |= {TEXTS[text].source for text in texts if text in TEXTS}
    found = [repository_of(name, layout) for name in (*sorted(models), *sorted(names))]
    return [repository for repository in found if repository is not None]


def repository_of(name: str, layout: Layout) -> Repository | None:
    """The hub's repository behind a model or source; None where it does not come from the hub. Raises `ConfigError`."""
    models, sources = config_names("models", layout), load_sources(layout.sources)
    if name in models:
        model = load_model_config(name, layout)
        return model_repository(name, model) if model.source == "hub" else None
    if name in sources:
        return data_repository(sources[name]) if sources[name].kind == HUB else None
    raise ConfigError(unknown_name("model or source", name, [*models, *sources]))


def lock(names: Sequence[str], suite: str, layout: Layout, mirror: Path | None, *, check: bool) -> list[str]:
    """Resolve models and sources, those of a suite where none is named, and write each into the lock when it is known.

    With `check` nothing is written. Returns one line for each difference from the lock.

    Raises:
        ConfigError: a name is unknown or does not come from the hub.
        DataError: some could not be resolved; the others are in the lock.
    """
    from tqdm import tqdm

    repositories = [_lockable(name, layout) for name in names] or suite_repositories(suite, layout)
    changes, failures = [], []
    for repository in tqdm(repositories, desc="locking", unit="repository", disable=None):
        try:
            found = resolve(repository, mirror)
        except MobieError as error:
            failures.append(str(error))
            continue
        lock = load_lock(layout)
        entry = (lock.models if repository.kind == "model" else lock.data).get(repository.name)
        lines = differences(entry, found)
        if entry is not None and found.revision is None and not lines:
            found = entry  # a mirror that does not tell its revision: the locked one has these files
        changes += [f"{repository.name}: {line}" for line in lines]
        if not check and (lines or entry != found):
            save_entry(layout, repository, found)
        state = f"revision {found.revision or 'unknown'}, {len(found.files)} files, {found.bytes} bytes"
        print(f"{repository.label}: {state}{'' if lines else ', as locked'}", file=sys.stderr, flush=True)
    if failures:
        told = "\n".join([*(f"changed: {line}" for line in changes if not check), *failures])
        raise DataError(f"{len(failures)} of {len(repositories)} could not be resolved:\n{told}")
    return changes


def _lockable(name: str, layout: Layout) -> Repository:
    repository = repository_of(name, layout)
    if repository is None:
        raise ConfigError(
            f"{name}: got a model that ships in the package, or a file whose hash is in {layout.sources}; expected a "
            "model or data set from the hub: there is nothing to lock"
        )
    return repository


def missing_in_mirror(names: Collection[str], mirror: Path, layout: Layout) -> list[Path]:
    """Files that a mirror lacks of models and sources, by name: existence only, nothing is hashed.

    Raises:
        ConfigError: no such model or source, or a lock of something else.
    """
    found: list[Path] = []
    sources = load_sources(layout.sources)
    for name in names:
        repository = repository_of(name, layout)
        if repository is not None:
            found += missing_files(repository, mirror, locked_entry(repository, layout))
        elif name in sources and sources[name].kind in MIRRORED:
            path = download_path(sources[name], mirror)
            found += [] if path.is_file() else [path]
    return found
