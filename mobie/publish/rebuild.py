"""Build everything that an archive holds again, from its records alone, and compare it byte by byte."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mobie.errors import ConfigError, DataError, StorageError
from mobie.paths import Layout
from mobie.provenance import file_hash
from mobie.publish.archive import unpack
from mobie.publish.manifest import Manifest
from mobie.publish.targets import build_targets, builders_code
from mobie.storage import make_folder, storage_errors

Say = Callable[[str, dict[str, str]], None]


@dataclass(frozen=True)
class Rebuilt:
    """What was built again.

    outcomes:  file → `equal`, `different`, or `not in the archive`.
    packed_by: version and commit that the archive is of, and whether the code here is the same.
    """

    manifest: Manifest
    outcomes: dict[str, str]
    packed_by: str

    @property
    def differing(self) -> list[str]:
        return [name for name, outcome in self.outcomes.items() if outcome != "equal"]


def rebuild(archive: Path, folder: Path, say: Say = lambda *_: None) -> Rebuilt:
    """Unpack records and configuration into `folder`, which must not exist or be empty, and build all files there.

    `say` is told each target with its files and outcomes. `folder` is filled at the end, or not at all.

    Raises:
        DataError: the archive is damaged or not one of ours; a file that it holds is built by nothing here.
        StorageError: `folder` is in use, or the system refused to write.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder}: is there already and not an empty folder; name another one with --out")
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        layout = Layout(Path(name) / "archive")
        manifest = unpack(archive, make_folder(layout.root))
        try:
            outcomes = _compare(manifest, layout, say)
        except (ConfigError, DataError) as error:
            raise DataError(f"{error}\n{archive} was packed by {_packed_by(manifest)}; rebuild it with that") from error
        with storage_errors(folder):
            os.replace(layout.root, folder)
    return Rebuilt(manifest, outcomes, _packed_by(manifest))


def _packed_by(manifest: Manifest) -> str:
    same = "the code installed here" if builders_code() == manifest.builders else "other code than is installed here"
    return f"mobie {manifest.mobie}, commit {manifest.commit or 'unknown'} ({same})"


def _compare(manifest: Manifest, layout: Layout, say: Say) -> dict[str, str]:
    """Build all files and look up each hash in the manifest."""
    expected = {name: manifest.files[name].sha256 for name in manifest.names("built")}
    outcomes: dict[str, str] = {}
    for target, paths in build_targets(manifest.suite, layout):
        built = {path.relative_to(layout.root).as_posix(): file_hash(path) for path in paths}
        compared = {name: _outcome(digest, expected.pop(name, None)) for name, digest in built.items()}
        say(target, compared)
        outcomes |= compared
    if expected:
        raise DataError(f"nothing here builds {', '.join(sorted(expected))}, which the archive holds")
    return outcomes


def _outcome(digest: str, expected: str | None) -> str:
    if expected is None:
        return "not in the archive"
    return "equal" if digest == expected else "different"
