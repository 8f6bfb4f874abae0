"""What a suite has found, read from its records, and from nothing else.

A target (a table, a figure, the verdicts) asks `Results` for cells. Asked as a *plan*, `Results` reads nothing and
remembers which records were asked for: so the workflow knows a target's inputs from the code that builds the target,
and there is no second list to keep in step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mobie.config import (
    MethodConfig,
    ModelConfig,
    ProtocolConfig,
    load_method,
    load_model_config,
    load_protocol,
    load_suite,
)
from mobie.errors import DataError
from mobie.paths import Layout
from mobie.records import Record, read_record

CHANCE_STDERRS = 2.0
#: kinds of records that a rule makes
KINDS = (
    *("quantize", "perplexity", "tasks", "routing", "shift", "cka", "generations", "hard", "code_samples", "code"),
    *("speed", "gate", "expert_usage"),
)
#: kinds whose committed records stand in where a suite has none, or a skipped one: they need a machine with a GPU
PUBLISHED = ("speed",)


@dataclass(frozen=True)
class Cell:
    """One value in the unit it is shown in, or a hole (`value` None) with its status and reason.

    status: `ok`, a record's status, `missing` (its job has not run) or `absent` (the suite lacks the model or method).
    record: path of the record it comes from, relative to the repository; empty for what is computed without one.
    """

    value: float | None
    stderr: float | None = None
    n: int | None = None
    chance: float | None = None
    status: str = "ok"
    reason: str | None = None
    record: str = ""

    @property
    def at_chance(self) -> bool:
        """Whether the value is not above chance by more than two standard errors."""
        if self.value is None or self.chance is None or self.stderr is None:
            return False
        return self.value - self.chance <= CHANCE_STDERRS * self.stderr


def is_published(cell: Cell) -> bool:
    """Whether a value comes from a committed record of another machine."""
    return cell.record.startswith("results/published/")


def average(cells: Sequence[Cell]) -> Cell:
    """Unweighted mean of cells, a hole unless all are there.

    The standard error is propagated as if they were independent. The two LAMBADA tasks share passages, so that of the
    seven zero-shot tasks is a little too small.
    """
    hole = next((cell for cell in cells if cell.value is None), None)
    if hole is not None:
        return replace(hole, stderr=None, n=None, chance=None)
    values = [cell.value for cell in cells if cell.value is not None]
    errors, chances, counts = ([getattr(c, name) for c in cells] for name in ("stderr", "chance", "n"))
    return Cell(
        math.fsum(values) / len(values),
        None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(cells),
        None if None in counts else sum(counts),
        None if None in chances else math.fsum(chances) / len(cells),
        record=cells[0].record,
    )


@dataclass(frozen=True)
class Model:
    """A model of a target: a config of the suite, or one of the paper's that the suite does not have.

    name:  of the config; the paper's name for an absent one.
    label: what tables call it: the paper's name where it is in the paper.
    """

    name: str
    label: str
    config: ModelConfig | None
    absent: str | None = None

    @property
    def in_paper(self) -> bool:
        return self.config is None or self.config.label is not None


class Results:
    """Cells and records of a suite.

    plan:  read nothing; every cell is then a hole, and `asked` lists the records.
    asked: paths of all records that were asked for, in order.
    """

    def __init__(self, suite: str, layout: Layout, *, plan: bool = False) -> None:
        self.suite_name, self.layout, self.plan = suite, layout, plan
        self.suite = load_suite(suite, layout)
        self.asked: dict[Path, None] = {}
        self._records: dict[Path, Record | None] = {}

    @cached_property
    def protocol(self) -> ProtocolConfig:
        return load_protocol(self.suite.protocol, self.layout)

    def models(self, target: str) -> list[Model]:
        """Models of a table or figure, in order."""
        found = []
        for name in self.suite.models_of(target):
            if name in self.suite.absent_models:
                found.append(Model(name, name, None, self.suite.absent_models[name]))
            else:
                config = self.suite.applied_to(load_model_config(name, self.layout))
                found.append(Model(name, config.label or name, config))
        return found

    def method(self, name: str) -> MethodConfig:
        """A method config or a variant of one."""
        return load_method(name, self.layout)

    def record(self, model: Model, method: str, kind: str, seed: int | None = None) -> Record | None:
        """The record of a job, or a published one in its place; None where it has not run (or in a plan).

        Raises:
            DataError: the record is damaged.
        """
        return self._found(model, method, kind, seed)[1]

    def details(self, model: Model, method: str, kind: str, seed: int | None = None) -> Mapping[str, Any]:
        """Details of a record that a cell, or the lack of a hole, has shown to be there. Raises `DataError`."""
        record = self.record(model, method, kind, seed)
        if record is None:
            raise DataError(
                f"{self.path(model, method, kind, seed)}: no such record, and something is to be read from it"
            )
        return record.details

    def _found(self, model: Model, method: str, kind: str, seed: int | None) -> tuple[Path, Record | None]:
        """Where a record lies that is read, and the record."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind of record {kind!r}")
        path = self.path(model, method, kind, seed)
        if model.absent is not None:
            return path, None
        record = self._read(path)
        if kind not in PUBLISHED:
            return path, record
        published = self.published(self.suite_name, model.name, method, kind, seed)
        if published is not None and (record is None or record.status == "skipped"):
            return published
        return path, record

    def published(
        self, suite: str, model: str, method: str, kind: str, seed: int | None = None
    ) -> tuple[Path, Record | None] | None:
        """A committed record of any suite and its path, or None where there is none; in a plan without the record."""
        path = self.layout.published(suite, model, method, self.suite.seed if seed is None else seed, kind)
        return (path, self._read(path)) if path.exists() else None

    def _read(self, path: Path) -> Record | None:
        self.asked[path] = None
        if self.plan:
            return None
        if path not in self._records:
            self._records[path] = read_record(path) if path.exists() else None
        return self._records[path]

    def path(self, model: Model, method: str, kind: str, seed: int | None = None) -> Path:
        """Where the record of a job lies."""
        seed = self.suite.seed if seed is None else seed
        return self.layout.record(self.suite_name, model.name, method, seed, kind)

    def cell(
        self, model: Model, method: str, kind: str, name: str, *, seed: int | None = None, scale: float = 1.0
    ) -> Cell:
        """A measurement of a record, times `scale`; a hole says why there is none.

        A record may say in `details["holes"]` why it lacks a task: `{task: reason}`, a task being the part of `name`
        before the first dot.
        """
        if model.absent is not None:
            return Cell(None, status="absent", reason=model.absent)
        path, record = self._found(model, method, kind, seed)
        where = path.relative_to(self.layout.root).as_posix()
        if record is None:
            return Cell(None, status="missing", reason="its job has not run", record=where)
        if not record.ok:
            return Cell(None, status=record.status, reason=record.reason, record=where)
        found = record.measurement(name)
        if found is None:
            reason = record.details.get("holes", {}).get(name.partition(".")[0])
            if reason is not None:
                return Cell(None, status="unsupported", reason=reason, record=where)
            return Cell(None, status="missing", reason=f"the record has no {name}", record=where)

        def scaled(value: float | None) -> float | None:
            return None if value is None else value * scale

        return Cell(found.value * scale, scaled(found.stderr), found.n, scaled(found.chance), record=where)
