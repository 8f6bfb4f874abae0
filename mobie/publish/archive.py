"""The zip file: the same files give the same bytes; nothing is taken out of it that its manifest does not vouch for."""

from __future__ import annotations

import hashlib
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobie.errors import DataError
from mobie.publish.manifest import NAME, Manifest, read_manifest
from mobie.storage import atomic_write, make_folder, storage_errors, write_text

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that the format knows
MODE = 0o100644 << 16
UNIX = 3
MANIFEST_LIMIT = 64 << 20  # bytes; a manifest has about 200 for each file
CHUNK = 1 << 20
AGAIN = "get the archive again, or pack it again with `python -m mobie publish`"
#: what zipfile raises for bytes that are no archive, depending on where they are damaged
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, struct.error, OverflowError)


def write_archive(path: Path, folder: Path, manifest: Manifest) -> None:
    """Pack the files that `manifest` lists, which lie under `folder`, and the manifest itself.

    Members are sorted and stand under one folder, `mobie-SUITE`; they have no times and no owners.

    Raises:
        StorageError: the system refused to write.
    """
    write_text(folder / NAME, manifest.text())
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in (NAME, *sorted(manifest.files)):
            member = zipfile.ZipInfo(f"mobie-{manifest.suite}/{name}", EPOCH)
            member.compress_type, member.create_system, member.external_attr = zipfile.ZIP_DEFLATED, UNIX, MODE
            member.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, archive.open(member, "w") as target:
                shutil.copyfileobj(source, target, CHUNK)


def unpack(path: Path, folder: Path) -> Manifest:
    """Write the manifest and every member but those that are built below `folder`; all are compared with the manifest.

    Built files are read and compared too. A member that is listed twice, not listed, missing, of another size or hash,
    or whose name leaves the folder is refused; what was written by then lies in `folder` only.

    Raises:
        DataError: the file is no such archive, or damaged.
        StorageError: the system refused to write.
    """
    with _opened(path) as archive:
        members = _members(archive, path)
        manifest = _manifest(archive, members.pop(NAME, None), path)
        surplus, missing = sorted(set(members) - set(manifest.files)), sorted(set(manifest.files) - set(members))
        if surplus or missing:
            told = [f"members without an entry in {NAME}: {_some(surplus)}"] if surplus else []
            told += [f"members that {NAME} lists and that are not there: {_some(missing)}"] if missing else []
            raise DataError(f"{path}: {'; '.join(told)}; {AGAIN}")
        for name, file in manifest.files.items():
            if members[name].file_size != file.bytes:
                raise DataError(f"{path}: {name} has {members[name].file_size} bytes, expected {file.bytes}; {AGAIN}")
            target = None if file.role == "built" else folder / name
            digest = _extract(archive, members[name], target)
            if digest != file.sha256:
                raise DataError(f"{path}: {name} has sha256 {digest}, expected {file.sha256}; {AGAIN}")
        write_text(folder / NAME, manifest.text())
    return manifest


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever zipfile says of a damaged one is a `DataError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such archive; pack one with `python -m mobie publish`") from error
    except DAMAGE as error:
        raise DataError(f"{path}: not a readable zip archive ({error}); {AGAIN}") from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Members by their names below the archive's one folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    tops = set()
    for member in archive.infolist():
        top, _, name = member.filename.partition("/")
        if name in found:
            raise DataError(f"{path}: two members are called {name!r}; {AGAIN}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: {name} is compressed in a way that no archive of this suite is; {AGAIN}")
        tops.add(top)
        found[name] = member
    if len(tops) > 1:
        raise DataError(f"{path}: got top folders {_some(sorted(tops))}, expected one; {AGAIN}")
    return found


def _manifest(archive: zipfile.ZipFile, member: zipfile.ZipInfo | None, path: Path) -> Manifest:
    if member is None:
        raise DataError(f"{path}: no {NAME} in it; expected an archive that `python -m mobie publish` wrote")
    if member.file_size > MANIFEST_LIMIT:
        raise DataError(f"{path}: {NAME} has {member.file_size} bytes, expected at most {MANIFEST_LIMIT}")
    return read_manifest(archive.read(member), f"{path}: {NAME}")


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path | None) -> str:
    """SHA-256 of a member, which is written to `target` where there is one."""
    sha256 = hashlib.sha256()
    with archive.open(member) as source:
        if target is None:
            for chunk in iter(lambda: source.read(CHUNK), b""):
                sha256.update(chunk)
            return sha256.hexdigest()
        make_folder(target.parent)
        with storage_errors(target), target.open("wb") as file:
            for chunk in iter(lambda: source.read(CHUNK), b""):
                sha256.update(chunk)
                file.write(chunk)
    return sha256.hexdigest()


def _some(names: list[str]) -> str:
    """At most three names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
