"""Bringing a repository to a folder, from the hub or a mirror, so that only the right bytes stay; and locking it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mobie.errors import DataError
from mobie.fetching import hub, mirror
from mobie.fetching.files import git_blob, hash_files
from mobie.fetching.repository import Repository
from mobie.lock import LockedFile, LockedRepository, refuse_difference
from mobie.storage import storage_errors


@dataclass(frozen=True)
class Arrived:
    """What lies in the folder now: the commit, None where a mirror does not tell it, and SHA-256 by path."""

    revision: str | None
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """Where to fetch from, and what it must be."""

    mirror: Path | None = None
    locked: LockedRepository | None = None
    lock_path: Path = Path("lock.json")  # for messages


def bring(repository: Repository, folder: Path, origin: Origin, *, link: bool = False) -> Arrived:
    """Make `folder` hold the wanted files of a repository and nothing else.

    Files that are there and are what the lock says stay; where all are, nothing is asked of hub or mirror. `link`:
    files of a mirror are linked to, not copied.

    Raises:
        DataError: hub or mirror lack something or refuse, or a file is not what it must be; it is removed, others stay.
        StorageError: the disk is too small, full or read-only.
    """
    if folder.is_symlink():
        raise DataError(
            f"{folder}: a link, expected a folder that `fetch` alone writes to: what is no file of the repository is "
            "removed from it; remove the link, and name the folder that it leads to as a mirror (`--mirror`)"
        )
    if origin.locked is None:
        arrived = _bring_unlocked(repository, folder, origin, link=link)
    else:
        arrived = _bring_locked(repository, folder, origin, origin.locked, link=link)
    _remove_others(folder, arrived.hashes)
    return arrived


def _bring_locked(
    repository: Repository, folder: Path, origin: Origin, locked: LockedRepository, *, link: bool
) -> Arrived:
    sized = [name for name, file in locked.files.items() if _has_size(folder / name, file.bytes)]
    hashes = hash_files({name: folder / name for name in sized}, repository.name)
    missing = sorted(name for name, expected in locked.hashes.items() if hashes.get(name) != expected)
    if missing and origin.mirror is not None:
        source = mirror.check_repository(repository, origin.mirror, locked)
        _from_mirror(repository, {name: source / name for name in missing}, folder, link=link)
    elif missing:
        listing = hub.list_repository(repository, locked.revision)
        _compare_listing(repository, listing, origin, locked)
        hub.download(repository, listing, missing, folder)
    hashes |= hash_files({name: folder / name for name in missing}, repository.name)
    for name in missing:
        if hashes[name] != locked.files[name].sha256:
            (folder / name).unlink()
            raise refuse_difference(
                repository, name, f"sha256 {hashes[name]}", f"sha256 {locked.files[name].sha256}", origin.lock_path
            )
    return Arrived(locked.revision, {name: hashes[name] for name in sorted(locked.files)})


def _compare_listing(repository: Repository, listing: hub.Listing, origin: Origin, locked: LockedRepository) -> None:
    """Refuse a repository that the hub itself says is not the locked one, before anything is downloaded."""
    for name, file in sorted(locked.files.items()):
        remote = listing.files.get(name)
        expected = f"{file.bytes} bytes with sha256 {file.sha256}"
        if remote is None:
            raise refuse_difference(repository, name, f"no such file at {listing.revision}", expected, origin.lock_path)
        if remote.bytes != file.bytes or remote.sha256 not in (None, file.sha256):
            got = f"{remote.bytes} bytes with sha256 {remote.sha256 or 'unknown'}"
            raise refuse_difference(repository, name, got, expected, origin.lock_path)


def _bring_unlocked(repository: Repository, folder: Path, origin: Origin, *, link: bool) -> Arrived:
    if origin.mirror is not None:
        source = mirror.check_repository(repository, origin.mirror, None)
        files = mirror.mirrored_files(repository, source)
        _from_mirror(repository, files, folder, link=link)
        hashes = hash_files({name: folder / name for name in files}, repository.name)
        return Arrived(mirror.mirrored_revision(repository, source, files), hashes)
    listing = hub.list_repository(repository)
    sized = [name for name, file in listing.files.items() if _has_size(folder / name, file.bytes)]
    hashes = hash_files({name: folder / name for name in sized}, repository.name)
    hashes = {name: sha for name, sha in hashes.items() if _is_remote(folder / name, sha, listing.files[name])}
    missing = [name for name in listing.files if name not in hashes]
    hub.download(repository, listing, missing, folder)
    for name, sha in hash_files({name: folder / name for name in missing}, repository.name).items():
        if not _is_remote(folder / name, sha, listing.files[name]):
            (folder / name).unlink()
            expected = listing.files[name].sha256 or f"{listing.files[name].blob} of git"
            raise DataError(
                f"{repository.label}: {name}: got sha256 {sha}, expected the hash {expected} as the hub says; it was "
                f"damaged on its way and was removed: {hub.KEPT}"
            )
        hashes[name] = sha
    return Arrived(listing.revision, {name: hashes[name] for name in sorted(hashes)})


def _has_size(path: Path, expected: int) -> bool:
    return path.is_file() and path.stat().st_size == expected


def _is_remote(path: Path, sha256: str, remote: hub.RemoteFile) -> bool:
    """Whether a file is the hub's, by the hash that the hub tells of it."""
    return git_blob(path) == remote.blob if remote.sha256 is None else sha256 == remote.sha256


def _from_mirror(repository: Repository, files: Mapping[str, Path], folder: Path, *, link: bool) -> None:
    if not link:
        hub.check_space(folder, sum(path.stat().st_size for path in files.values()), repository)
    mirror.place(files, folder, link=link)


def _remove_others(folder: Path, names: Collection[str]) -> None:
    """Remove what is no file of the repository: notes of the hub's client, files of another revision."""
    with storage_errors(folder):
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in names:
                path.unlink()


def resolve(repository: Repository, mirror_path: Path | None) -> LockedRepository:
    """What the hub, or a mirror, has of a repository now, with the hash of every file.

    The hub tells the SHA-256 of large files; small ones are downloaded, compared with git's hash and hashed.

    Raises:
        DataError, StorageError: as for `bring`.
    """
    if mirror_path is not None:
        source = mirror.check_repository(repository, mirror_path, None)
        files = mirror.mirrored_files(repository, source)
        hashes = hash_files(files, repository.name)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        revision = mirror.mirrored_revision(repository, source, files)
        if repository.commit is not None and revision not in (None, repository.commit):
            raise DataError(
                f"{repository.label}: the mirror has revision {revision} ({source}), expected {repository.commit} as "
                "configured; put that revision there, or change the configuration"
            )
    else:
        listing = hub.list_repository(repository)
        revision, sizes = listing.revision, {name: file.bytes for name, file in listing.files.items()}
        hashes = {name: file.sha256 for name, file in listing.files.items() if file.sha256 is not None}
        hashes |= _small_hashes(repository, listing)
    return LockedRepository(
        repo=repository.repo,
        revision=revision,
        files={name: LockedFile(sha256=hashes[name], bytes=sizes[name]) for name in sorted(sizes)},
    )


def _small_hashes(repository: Repository, listing: hub.Listing) -> dict[str, str]:
    """SHA-256 of the files of which the hub knows git's hash only."""
    names = [name for name, file in listing.files.items() if file.sha256 is None]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        hub.download(repository, listing, names, folder)
        for name in names:
            if not _is_remote(folder / name, "", listing.files[name]):
                raise DataError(f"{repository.label}: {name} was damaged on its way; run the same command again")
        return hash_files({name: folder / name for name in names}, repository.name)


def warn_unpinned(repository: Repository, revision: str | None, lock_path: Path) -> None:
    """Say in the log that what was fetched may be something else tomorrow, unless the configuration names a commit."""
    if repository.commit is None:
        print(
            f"warning: {repository.label}: revision not pinned, got {revision or 'an unknown one'}; pin it with "
            f"`python -m mobie lock {repository.name}` ({lock_path})",
            file=sys.stderr,
            flush=True,
        )
