"""What an archive says of itself, typed, and which names its members may have."""

from __future__ import annotations

import json
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, StringConstraints

from mobie.config import Strict, parse
from mobie.errors import DataError

NAME = "MANIFEST.json"
#: what a file is: `programs` are what a model wrote for the code tasks; `built` ones are made of the others
Role = Literal["record", "programs", "configuration", "log", "guide", "built"]
FOLDERS = frozenset({"results", "paper_figures", "logs", "workflow"})
GUIDE = "README.md"
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class File(Strict):
    """A member of the archive."""

    sha256: Digest
    bytes: NonNegativeInt
    role: Role


class Hole(Strict):
    """A record that is not there, or is there without values."""

    path: str
    status: str
    reason: str


class Manifest(Strict):
    """What an archive holds.

    commit:   of the clone it was packed in, with `+` where files were changed; None outside a clone.
    builders: digest of the code that built tables, figures, verdicts and report.
    versions: of Python and of the libraries that were installed when it was packed.
    records:  number of records by status.
    missing:  records that the suite's tables, figures or verdicts ask for and that are not in the archive.
    holes:    records that say why they have no values.
    """

    format: Literal[1] = 1
    suite: str
    mobie: str
    commit: str | None
    builders: Digest
    versions: dict[str, str | None]
    records: dict[str, NonNegativeInt]
    missing: Annotated[tuple[Hole, ...], Field(strict=False)]
    holes: Annotated[tuple[Hole, ...], Field(strict=False)]
    files: dict[str, File]

    def names(self, *roles: Role) -> list[str]:
        """Files of these roles."""
        return [name for name, file in self.files.items() if file.role in roles]

    def text(self) -> str:
        """JSON, keys sorted."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def read_manifest(text: bytes, where: str) -> Manifest:
    """Check a manifest and the names in it. Raises `DataError`."""
    from mobie.errors import ConfigError

    try:
        found = parse(Manifest, json.loads(text), where)
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"{where}: not a manifest of this version ({error}); get the archive again") from error
    for name in found.files:
        check_name(name, where)
    return found


def check_name(name: str, where: str) -> None:
    """Refuse a name that could leave the folder it is unpacked to, or that no archive has. Raises `DataError`."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and not PureWindowsPath(name).drive
    inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
    known = name == GUIDE or (path.parts[:1] and path.parts[0] in FOLDERS and len(path.parts) > 1)
    if not (plain and inside and known):
        raise DataError(
            f"{where}: member {name!r} is not a path inside {', '.join(sorted(FOLDERS))}, or {GUIDE}; "
            "expected an archive that `python -m mobie publish` wrote"
        )
