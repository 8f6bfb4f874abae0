"""The lock: which revision and which bytes of the hub's repositories the suite is made from.

`workflow/config/lock.json` is written by `python -m mobie lock` and read by everything that fetches or reads:

    {"models": {NAME: {"repo", "revision", "files": {PATH: {"sha256", "bytes"}}}}, "data": {SOURCE: …}}

NAME is a file in workflow/config/models, SOURCE a row of sources.csv. A repository that is in it is fetched at that
revision, those files and no others, and a file with another hash is refused. What is not in it is fetched at the
configured revision, or the newest one, and said to be unpinned. `revision` is null where a mirror without its client's
notes was locked: the files' hashes pin the content then.

Wheels and GitHub files are not in it: sources.csv has their hashes.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt

from mobie.config import Strict, parse
from mobie.errors import ConfigError, DataError
from mobie.fetching.files import check_name
from mobie.fetching.repository import Repository
from mobie.parsing import parse_json
from mobie.paths import Layout
from mobie.storage import write_json


class LockedFile(Strict):
    """What a file must be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: NonNegativeInt


class LockedRepository(Strict):
    """What a repository must be."""

    repo: str
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    files: dict[str, LockedFile] = Field(min_length=1)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 by path."""
        return {name: file.sha256 for name, file in self.files.items()}


class Lock(Strict):
    """All locked repositories by their names in the configuration."""

    models: dict[str, LockedRepository] = Field(default_factory=dict)
    data: dict[str, LockedRepository] = Field(default_factory=dict)


def load_lock(layout: Layout) -> Lock:
    """The lock file; an empty lock where there is none. Raises `ConfigError` for a damaged one."""
    path = layout.lock
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        return Lock()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); restore it from the repository, or delete it and run "
            "`python -m mobie lock`"
        ) from error
    return parse(Lock, value, str(path))


def save_entry(layout: Layout, repository: Repository, entry: LockedRepository) -> None:
    """Put one repository into the lock file, which is read anew and written whole; other entries stay."""
    lock = load_lock(layout)
    section = "models" if repository.kind == "model" else "data"
    changed = lock.model_copy(update={section: getattr(lock, section) | {repository.name: entry}})
    write_json(layout.lock, changed.model_dump(mode="json"))


def locked_entry(repository: Repository, layout: Layout) -> LockedRepository | None:
    """What the lock says of a repository; None where it says nothing.

    Raises:
        ConfigError: the lock is damaged, or is of another repository, revision or kind of file than is configured.
    """
    lock = load_lock(layout)
    entry = (lock.models if repository.kind == "model" else lock.data).get(repository.name)
    if entry is None:
        return None
    again = f"look at what changed, then run `python -m mobie lock {repository.name}`"
    where = f"{layout.lock}: {repository.label}"
    if entry.repo != repository.repo:
        raise ConfigError(f"{where}: locked as {entry.repo}, expected {repository.repo} as configured; {again}")
    commit = repository.commit
    if commit is not None and entry.revision not in (None, commit):
        raise ConfigError(f"{where}: locked at revision {entry.revision}, expected {commit} as configured; {again}")
    for name in entry.files:
        check_name(name, repository.suffixes, where)
    return entry


def differences(old: LockedRepository | None, new: LockedRepository) -> list[str]:
    """What differs between two states of a repository, one line each; an unknown revision differs from none."""
    if old is None:
        return ["not locked yet"]
    found = []
    if old.repo != new.repo:
        found.append(f"repository {old.repo} → {new.repo}")
    if None not in (old.revision, new.revision) and old.revision != new.revision:
        found.append(f"revision {old.revision} → {new.revision}")
    for name in sorted(old.files.keys() | new.files.keys()):
        before, after = old.files.get(name), new.files.get(name)
        if before is None or after is None:
            found.append(f"{name}: {'new' if before is None else 'gone'}")
        elif before != after:
            found.append(f"{name}: {before.bytes} bytes {before.sha256} → {after.bytes} bytes {after.sha256}")
    return found


def refuse_difference(repository: Repository, name: str, got: str, expected: str, path: Path) -> DataError:
    """The error for a file that is not the locked one."""
    return DataError(
        f"{repository.label}: {name}: got {got}, expected {expected} as in {path}; the repository, the mirror or the "
        f"file changed: look at what it is, then take it with `python -m mobie lock {repository.name}`, or restore it"
    )


def download_bytes(name: str, layout: Layout) -> int | None:
    """Bytes of a model's or a data set's files, from the lock; None where it is not in it. Raises `ConfigError`."""
    lock = load_lock(layout)
    entry = lock.models.get(name) or lock.data.get(name)
    return None if entry is None else entry.bytes
