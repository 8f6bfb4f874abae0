"""A repository of the hub as the configuration names it, and which of its files are wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from mobie.errors import DataError
from mobie.fetching.files import DATA_SUFFIXES, MODEL_SUFFIXES, check_name, is_wanted_kind

if TYPE_CHECKING:
    from mobie.config import ModelConfig
    from mobie.sources import Source


@dataclass(frozen=True)
class Repository:
    """What is wanted of one repository."""

    name: str  # file in workflow/config/models, or row of sources.csv
    kind: Literal["model", "dataset"]
    repo: str  # OWNER/NAME
    revision: str | None  # commit or branch; None: the newest commit
    patterns: tuple[str, ...] = ()  # of the files that are wanted; empty: all of a known kind

    @property
    def label(self) -> str:
        """For messages: what the user calls it and what the hub calls it."""
        return f"{'model' if self.kind == 'model' else 'data set'} {self.name} ({self.repo})"

    @property
    def suffixes(self) -> frozenset[str]:
        """Kinds of files that it may hold."""
        return MODEL_SUFFIXES if self.kind == "model" else DATA_SUFFIXES

    @property
    def commit(self) -> str | None:
        """The configured commit; None where a branch or nothing is configured."""
        return self.revision if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision) else None

    @property
    def fetch_command(self) -> str:
        """Brings it here."""
        return f"python -m mobie fetch {'--model ' if self.kind == 'model' else ''}{self.name}"

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Those of a repository's files that are wanted.

        Of a model these are the files beside its configuration: folders of large repositories hold the same weights in
        other formats. Files of other kinds are passed over, unless the register asks for them by a pattern.

        Raises:
            DataError: nothing is wanted, or something that could be run or unpickled was asked for.
        """
        if self.kind == "model":
            found = [name for name in names if "/" not in name and is_wanted_kind(name, self.suffixes)]
        elif self.patterns:
            found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        else:
            found = [name for name in names if is_wanted_kind(name, self.suffixes)]
        if not found:
            wanted = " ".join(self.patterns) or ", ".join(sorted(self.suffixes))
            raise DataError(f"{self.label}: got no file of it, expected {wanted}; correct its row in sources.csv")
        for name in found:
            check_name(name, self.suffixes, self.label)
        return sorted(found)

    def listings(self) -> list[tuple[str, bool]]:
        """Folders of the repository to list, each with whether its subfolders count: C4 has tens of thousands of files.

        The folder of a pattern is what stands before its first wildcard.
        """
        if self.kind == "model":
            return [("", False)]
        found: dict[str, bool] = {}
        for pattern in self.patterns or ("*",):
            start = (
                pattern[: min(pattern.index(mark) for mark in "*?[" if mark in pattern)] if _wild(pattern) else pattern
            )
            folder = start.rpartition("/")[0]
            found[folder] = found.get(folder, False) or _wild(pattern)
        return sorted(found.items())


def _wild(pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[")


def model_repository(name: str, model: ModelConfig) -> Repository:
    """The repository of a model whose source is `hub`."""
    return Repository(name, "model", model.repo, model.revision)


def data_repository(source: Source) -> Repository:
    """The repository of a row of `sources.csv` whose kind is `hub`."""
    return Repository(source.name, "dataset", source.reference, source.revision, source.files)
