"""A local mirror: a folder with the downloads under the names that the hub, GitHub and the package index give them.

    MIRROR/OWNER/NAME/...                            a model or data set, as `hf download --local-dir` lays it out
    MIRROR/models--OWNER--NAME/snapshots/COMMIT/...  or the hub's own cache; `datasets--OWNER--NAME` of a data set
    MIRROR/OWNER/NAME/FILE                           a file of a GitHub repository
    MIRROR/NAME-VERSION-py3-none-any.whl             a wheel

Where a mirror is named, nothing is asked of the network. Files of models are not copied: they become hard links where
the mirror is on the same disk, else symbolic links. Data sets are small and are copied.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mobie.errors import ConfigError, DataError
from mobie.fetching.repository import Repository
from mobie.lock import LockedRepository
from mobie.storage import make_folder, storage_errors

if TYPE_CHECKING:
    from mobie.sources import Source

VARIABLE = "MOBIE_MIRROR"  # names the folder for the verbs that fetch
SHOWN = 5  # names of missing files in a message
INDEX = "model.safetensors.index.json"


def mirror_folder(name: str | Path | None) -> Path | None:
    """The mirror that a user named, as an absolute path; None where none is named. Raises `ConfigError`."""
    if not name:
        return None
    path = Path(name).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(
            f"mirror {path}: no such folder; create it, correct `mirror=`, or leave it out to use the hub"
        )
    return path


def _places(repository: Repository, mirror: Path) -> tuple[Path, Path]:
    """Where a repository may lie: as a plain folder, or in the hub's cache."""
    return mirror / repository.repo, mirror / f"{repository.kind}s--{repository.repo.replace('/', '--')}"


def find_repository(repository: Repository, mirror: Path, locked: LockedRepository | None) -> Path | None:
    """Folder of a repository's files in a mirror, at the locked or configured revision; None where there is none."""
    plain, cache = _places(repository, mirror)
    if plain.is_dir():
        return plain
    snapshots = cache / "snapshots"
    commit = (locked.revision if locked is not None else None) or repository.commit
    if commit is None:
        reference = cache / "refs" / (repository.revision or "main")
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
    folders = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    if commit is None and len(folders) == 1:
        return folders[0]
    return next((folder for folder in folders if folder.name == commit), None)


def mirrored_files(repository: Repository, folder: Path) -> dict[str, Path]:
    """The wanted files of a repository's folder by their names, without its client's notes. Raises `DataError`."""
    files = _all_files(folder)
    return {name: files[name] for name in repository.wanted(files)}


def _all_files(folder: Path) -> dict[str, Path]:
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in names.items() if name.split("/")[0] not in (".cache", ".git")}


def mirrored_revision(repository: Repository, folder: Path, names: Collection[str]) -> str | None:
    """Commit of a mirrored folder: its snapshot's name, or what the hub's client noted of every file; else None."""
    if folder.parent.name == "snapshots":
        return folder.name
    notes = [folder / ".cache" / "huggingface" / "download" / f"{name}.metadata" for name in names]
    if not all(note.is_file() for note in notes):
        return None
    commits = {note.read_text(encoding="utf-8").split("\n", 1)[0] for note in notes}
    return commits.pop() if len(commits) == 1 else None


def missing_files(repository: Repository, mirror: Path, locked: LockedRepository | None) -> list[Path]:
    """Files that a mirror lacks of a repository, by their existence alone.

    Of a repository that is not locked: a file for each pattern; of a model its configuration and the weights that its
    index lists.
    """
    folder = find_repository(repository, mirror, locked)
    if folder is None:
        return [mirror / repository.repo]
    if locked is not None:
        wanted = list(locked.files)
    elif repository.kind == "model":
        wanted = ["config.json", *_weight_files(folder)]
    else:
        wanted = list(repository.patterns) or ["*"]
    there = _all_files(folder)
    return [folder / name for name in wanted if name not in there and not fnmatch.filter(there, name)]


def _weight_files(folder: Path) -> list[str]:
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["*.safetensors"]


def lacks(label: str, missing: Collection[Path], mirror: Path, remedy: str) -> DataError:
    """The error for files that a mirror lacks."""
    names = [str(path) for path in missing]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return DataError(
        f"{label}: the mirror {mirror} lacks {', '.join(names[:SHOWN])}{more}; {remedy}, or leave out `mirror=` to "
        "fetch from the network"
    )


def check_repository(repository: Repository, mirror: Path, locked: LockedRepository | None) -> Path:
    """Folder of a repository in a mirror that has all of its files. Raises `DataError` naming those that it lacks."""
    missing = missing_files(repository, mirror, locked)
    folder = find_repository(repository, mirror, locked)
    if missing or folder is None:
        plain, cache = _places(repository, mirror)
        kind = " --repo-type dataset" if repository.kind == "dataset" else ""
        only = "".join(f" --include '{pattern}'" for pattern in repository.patterns)  # C4 whole is hundreds of GB
        revision = (locked.revision if locked is not None else None) or repository.revision
        at = f" --revision {revision}" if revision else ""
        raise lacks(
            repository.label,
            missing,
            mirror,
            f"looked in {plain} and {cache}/snapshots; put them there, where there is a network, with `hf download "
            f"{repository.repo}{kind}{at}{only} --local-dir {plain}`",
        )
    return folder


def mirrored_download(source: Source, mirror: Path) -> Path:
    """A wheel or a GitHub file in a mirror. Raises `DataError` where it lacks it."""
    path = download_path(source, mirror)
    if not path.is_file():
        raise lacks(f"{source.name} {source.version}", [path], mirror, "put the file there")
    return path


def download_path(source: Source, mirror: Path) -> Path:
    return mirror / source.reference / source.files[0] if source.kind == "github" else mirror / source.files[0]


def place(files: Mapping[str, Path], folder: Path, *, link: bool) -> None:
    """Put files of a mirror into `folder`: links to them, or copies. Raises `StorageError`."""
    for name, origin in files.items():
        target = folder / name
        make_folder(target.parent)
        with storage_errors(target):
            target.unlink(missing_ok=True)
            if link:
                _link(origin.resolve(), target)
            else:
                shutil.copyfile(origin, target)


def _link(origin: Path, target: Path) -> None:
    """A hard link, which stays whole when the mirror goes away; a symbolic one to another disk or user's file."""
    try:
        os.link(origin, target)
    except OSError:
        target.symlink_to(origin)
