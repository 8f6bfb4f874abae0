"""The hub: which files a repository has, bringing them here, and what to do about its refusals."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobie.errors import DataError, MobieError, StorageError
from mobie.fetching.repository import Repository
from mobie.redaction import redact
from mobie.storage import REMEDIES, error_number, make_folder, storage_error

DOWNLOADS = 8  # files at once
KEPT = "run the same command again, finished files are kept"


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file: SHA-256 of a large one, git's name for the content of any."""

    bytes: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class Listing:
    """The wanted files of a repository at a commit."""

    revision: str
    files: Mapping[str, RemoteFile]


def list_repository(repository: Repository, revision: str | None = None) -> Listing:
    """Ask the hub for the wanted files at `revision`, else at the configured revision or the newest.

    Raises:
        DataError: the hub cannot be read or refuses, or nothing is wanted of what it has.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = {}
    with hub_errors(repository):
        api = HfApi()
        api.auth_check(repository.repo, repo_type=repository.kind)  # a gated repository shows its list, not its files
        commit = revision or repository.commit
        if commit is None:
            commit = api.repo_info(repository.repo, repo_type=repository.kind, revision=repository.revision).sha
            assert commit is not None  # of a single repository the hub always tells it
        for folder, recursive in repository.listings():
            for entry in api.list_repo_tree(
                repository.repo, folder or None, recursive=recursive, revision=commit, repo_type=repository.kind
            ):
                if isinstance(entry, RepoFile):
                    large = entry.lfs.sha256 if entry.lfs is not None else None
                    found[entry.path] = RemoteFile(entry.size, large, entry.blob_id)
    return Listing(commit, {name: found[name] for name in repository.wanted(found)})


def download(repository: Repository, listing: Listing, names: Collection[str], folder: Path) -> None:
    """Bring files of a repository to `folder`, the smallest first.

    Where the connection breaks, the client itself goes on a few times; after that, the file starts again with the next
    call.

    Raises:
        DataError: the hub cannot be read or refuses; finished files stay.
        StorageError: the disk is too small, or full.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    sizes = {name: listing.files[name].bytes for name in names}
    check_space(folder, sum(sizes.values()), repository)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with hub_errors(repository, folder), ThreadPoolExecutor(DOWNLOADS) as pool:
        running = {
            pool.submit(
                api.hf_hub_download,
                repository.repo,
                name,
                repo_type=repository.kind,
                revision=listing.revision,
                local_dir=folder,
            ): name
            for name in sorted(sizes, key=sizes.__getitem__)  # the smallest first: a refusal comes at once
        }
        try:
            for number, finished in enumerate(as_completed(running), start=1):
                finished.result()
                name = running[finished]
                print(f"{number} of {len(running)}: {name}, {sizes[name]} bytes", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check_space(folder: Path, needed: int, repository: Repository) -> None:
    """Refuse a download that the disk has no room for. Raises `StorageError`."""
    free = shutil.disk_usage(make_folder(folder)).free
    if needed > free:
        raise StorageError(
            f"{repository.label}: needs {needed / 1e9:.2f} GB more, and the disk of {folder} has {free / 1e9:.2f} GB "
            f"free; free {(needed - free) / 1e9:.2f} GB, or make `resources` a link to a folder on a larger disk; "
            "nothing was downloaded"
        )


@contextmanager
def hub_errors(repository: Repository, folder: Path | None = None) -> Iterator[None]:
    """Turn what the hub's client raises inside the block into an error that says what to do.

    Raises:
        DataError, StorageError: instead of the client's errors.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except MobieError:
        raise
    except Exception as error:  # the client raises errors of several libraries, and TypeError for a wrong answer
        if folder is not None and error_number(error) in REMEDIES:
            raise storage_error(folder, error) from error
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # the client looked for a copy of its own after what really went wrong
        raise DataError(
            f"{repository.label}: the hub could not be read ({first_line(error)}); {_remedy(repository, error)}"
        ) from error


def _remedy(repository: Repository, error: Exception) -> str:
    """What the user can do about an error of the hub's client."""
    from huggingface_hub import errors, get_token
    from huggingface_hub.constants import ENDPOINT

    page = f"{ENDPOINT}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.repo}"
    configured = "`repo` and `revision` of the model's file" if repository.kind == "model" else "its row in sources.csv"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the repository is gated: accept its terms at {page}, log in as the same user with `hf auth login` (or "
            f"set HF_TOKEN), and {KEPT}"
        )
    lock = f"look at {page}, correct {configured}, or run `python -m mobie lock {repository.name}`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no such revision: {lock}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the repository has no such file: {lock}"
    if isinstance(error, errors.RepositoryNotFoundError):
        login = "its token may not see it" if get_token() else "log in with `hf auth login` if it is private"
        return f"there is no such repository, or you may not see it: look at {page}, correct {configured}, or {login}"
    if status == 401:
        return "the token is wrong or has expired: log in anew with `hf auth login`, or correct or unset HF_TOKEN"
    if status == 403:
        return f"the token may not read it: permit it to read {page}, or log in with another by `hf auth login`"
    return f"check the network and HF_HUB_OFFLINE, or use a mirror (`--config mirror=DIR`); {KEPT}"


def first_line(error: Exception) -> str:
    """Kind and first line of an error of the hub's client, without tokens and signatures."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return redact(f"{type(error).__name__}: {lines[0]}")
