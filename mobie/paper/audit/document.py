"""`claims.yaml`, typed: what the columns of a paper's tables mean, its statements and settings as small checks.

The folder of a paper holds `claims.yaml` and the CSV files it names. An entry of a table is referred to as
`TABLE/ROW/COLUMN`, the row by the values of the table's key columns in order, as many as make it unique:

    table2/OLMoE, MoBiE/avg7        one entry
    table2/*, MoBiE/avg7            a list: `*` stands for every value
    table2/OLMoE, MoBiE/*           a list: every score of the row that is no average

A check with `for_each` is made once for every combination of its values, put in where `{name}` stands.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mobie.errors import ConfigError, unknown_name
from mobie.parsing import parse_yaml

FILE = "claims.yaml"
Severity = Literal["info", "notice", "inconsistency"]
Relation = Literal["equals", "at_least", "at_most", "above", "below"]
Number = int | float


class Strict(BaseModel):
    """Immutable, no unknown keys, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Paper(Strict):
    """Which paper it is."""

    title: str
    source: str = ""


class Column(Strict):
    """What a column holds."""

    role: Literal["accuracy", "perplexity", "average", "bits", "number", "label"]
    better: Literal["higher", "lower"] | None = Field(default=None, description="direction of a score")
    decimals: int | None = Field(default=None, ge=0, description="decimals of every entry; null: those of its text")
    exact: bool = Field(default=False, description="entries are not rounded")
    items: PositiveInt | None = Field(default=None, description="items of the task, for accuracies in per cent")
    chance: Number | None = Field(default=None, description="per cent that guessing gives")
    parts: list[str] = Field(default=[], description="columns that an average is the mean of")


class Table(Strict):
    """A CSV file."""

    file: str
    where: str = Field(description="its name in the paper, e.g. Table 2")
    kind: Literal["results", "facts"] = "results"
    key: list[str] = Field(min_length=1, description="columns that together name a row")
    identity: list[str] = Field(default=[], description="columns that name what was measured; empty: the key")
    reference: dict[str, str] = Field(default={}, description="which rows are the full-precision reference")
    columns: dict[str, Column] = Field(default={}, description="columns that differ from the common ones")


class Reading(Strict):
    """One way to fill in what a formula leaves open."""

    name: str
    define: dict[str, str | Number] = Field(default={}, description="name → number or expression, in order")


class Formula(Strict):
    """Printed numbers that a formula of the paper gives from facts about each model."""

    name: str
    where: str
    expression: str
    facts: str = Field(description="table of the facts")
    join: str = Field(default="model", description="column that both tables have")
    define: dict[str, str | Number] = Field(default={}, description="common to all readings")
    readings: list[Reading] = Field(min_length=1)
    printed: list[str] = Field(min_length=1, description="references to the entries")
    explanations: list[str] = Field(default=[], description="innocent explanations of a difference")


class Place(Strict):
    """Where a setting is given: the value itself, or a reference to an entry."""

    where: str
    value: str | None = None
    entry: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Place:
        if (self.value is None) == (self.entry is None):
            raise ValueError("expected either `value` or `entry`")
        return self


class Setting(Strict):
    """Something that several places of the paper give."""

    name: str
    places: list[Place] = Field(min_length=2)
    severity: Severity = Field(default="notice", description="of a difference")
    explanations: list[str] = []


class Rank(Strict):
    """An order of entries in each column, within each group of rows."""

    table: str
    row: dict[str, list[str]] = Field(description="the rows that are said to be in this place")
    among: dict[str, list[str]] = Field(default={}, description="rows compared with; empty: all")
    excluding: dict[str, list[str]] = Field(default={}, description="rows left out")
    columns: list[str] = Field(default=[], description="empty: every column with a direction")
    group_by: list[str] = []
    place: PositiveInt = 1


class Covered(Strict):
    """Every value of some columns occurs in another one."""

    values: list[str] = Field(min_length=1, description="references with `*`")
    within: str


class Check(Strict):
    """One comparison: exactly one of `compute`, `same`, `rank` and `covered`."""

    name: str = Field(description="what is compared, or the reading of the statement")
    compute: str | None = Field(default=None, description="arithmetic over `values`")
    values: dict[str, str | Number] = Field(default={}, description="name → reference or number")
    relation: Relation = "equals"
    printed: str | None = Field(default=None, description="the paper's number, as printed")
    about: Number = Field(default=0, ge=0, description="what a word such as `about` allows beyond rounding")
    for_each: dict[str, list[str]] = {}
    same: list[str] = Field(default=[], description="references that must agree")
    rank: Rank | None = None
    covered: Covered | None = None
    assumes: str | None = Field(default=None, description="what the check supposes and the paper does not say")

    @model_validator(mode="after")
    def _one_kind(self) -> Check:
        kinds = [self.compute is not None, bool(self.same), self.rank is not None, self.covered is not None]
        if sum(kinds) != 1:
            raise ValueError("expected exactly one of `compute`, `same`, `rank` and `covered`")
        if (self.compute is None) != (self.printed is None):
            raise ValueError("`compute` and `printed` go together")
        return self


class Claim(Strict):
    """A statement about results, with the checks of the paper's own entries."""

    id: str
    where: list[str] = Field(min_length=1)
    claim: str = Field(description="the statement in our words")
    quote: str = Field(default="", description="a few words of the paper")
    checks: list[Check] = []
    require: Literal["all", "any"] = Field(default="all", description="`any`: the checks are readings of one statement")
    not_checkable: str | None = Field(default=None, description="why (the rest of) it cannot be checked from entries")
    severity: Severity = Field(default="inconsistency", description="of entries that contradict it")
    tolerance: str = Field(description="where the tolerance of a comparison with ours comes from")
    needs: list[str] = Field(min_length=1, description="what a suite has to measure for its own verdict")
    explanations: list[str] = []

    @model_validator(mode="after")
    def _has_verdict(self) -> Claim:
        if not self.checks and self.not_checkable is None:
            raise ValueError("expected `checks`, or `not_checkable` with the reason")
        return self


class Document(Strict):
    """The whole of `claims.yaml`."""

    paper: Paper
    names: dict[str, list[str]] = Field(default={}, description="name → other names of the same thing in the tables")
    columns: dict[str, Column] = Field(default={}, description="columns that tables have in common")
    tables: dict[str, Table]
    formulas: list[Formula] = []
    settings: list[Setting] = []
    claims: list[Claim] = []

    @model_validator(mode="after")
    def _unique(self) -> Document:
        for kind, names in (("claim", [c.id for c in self.claims]), ("setting", [s.name for s in self.settings])):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} {twice[0]!r} is there twice")
        return self


def load_document(folder: Path) -> Document:
    """Read and check `claims.yaml` of a paper's folder.

    Raises:
        ConfigError: missing, no YAML, or a key or value that is not expected; near names are suggested.
    """
    path = folder / FILE
    try:
        value = _parse_yaml(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path}: cannot be read ({reason}); expected the folder of a paper: {FILE} and the CSV files it names"
        ) from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: got {type(value).__name__}, expected keys {', '.join(Document.model_fields)}")
    try:
        return Document.model_validate(value)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from error


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _explain(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"])) or "file"
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        where = f" in {'.'.join(map(str, parents))}" if parents else ""
        return unknown_name(f"key{where}", str(key), _keys_at(Document, parents))
    if problem["type"] == "missing":
        return f"missing key {place!r}"
    got = "" if isinstance(problem["input"], Mapping) else f"; got {problem['input']!r}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}{got}"


def _keys_at(kind: type[BaseModel], steps: Iterable[str | int]) -> list[str]:
    """Keys of the model that lies at a path of keys, list positions and names inside `kind`."""
    annotation: Any = kind
    for step in steps:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = _inner(get_type_hints(annotation)[str(step)])
        else:  # a name in a mapping, or a position in a list
            annotation = _inner(get_args(annotation)[-1])
    return list(annotation.model_fields)


def _inner(annotation: Any) -> Any:
    """`X` of `X | None`, else the annotation itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
