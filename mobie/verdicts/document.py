"""`mobie/paper/ours.yaml`, typed: how each statement of `claims.yaml` is checked with a suite's own records.

A check computes one number from values of records, with an interval, and compares it with a relation:

    direction  what must hold on any model for the statement to hold in kind: `{above: 0}`
    stated     what the paper states of its own models: `{equals: "52.2"}`; compared on those models only

A check with `for_each` is made once for every combination of its values, put in where `{name}` stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from mobie.errors import ConfigError
from mobie.paper.audit.document import Document as PaperDocument
from mobie.paper.audit.document import Strict, load_document
from mobie.paper.audit.expressions import parse_entry
from mobie.parsing import parse_yaml
from mobie.paths import PACKAGE

FILE = PACKAGE / "paper" / "ours.yaml"
Number = int | float
#: a value has exactly one of these
SOURCES = ("perplexity", "accuracy", "bits", "minutes", "routing", "cka", "shift", "measure")


class Value(Strict):
    """One number of a run, or a list of them."""

    method: str | None = Field(default=None, description="method config, or a method of the paper that the suite lacks")
    sweep: Number | None = Field(default=None, description="MoBiE with this λ on the text `calibration`")
    sweep_without: Number | None = Field(default=None, description="a list: every λ of the sweep but this one")
    sizes: bool = Field(default=False, description="a list: MoBiE for every calibration size and seed of Figure 8")
    calibration: str | None = Field(default=None, description="text of a sweep: wikitext2, c4 or ptb")
    perplexity: str | None = Field(
        default=None, description="on wikitext2, c4 or ptb; `average`: the mean over the three"
    )
    accuracy: str | None = Field(default=None, description="a task or an average of the paper's tables, in per cent")
    above_chance: bool = Field(default=False, description="with `accuracy`: less what guessing gives")
    bits: Literal["paper", "codes", "stored"] | None = Field(default=None, description="a counting of bits per weight")
    component: str | None = Field(default=None, description="with `bits`: of these weights only, e.g. experts")
    minutes: bool = Field(default=False, description="CPU minutes of quantizing")
    routing: Literal["all", "deep"] | None = Field(
        default=None, description="a list: routing similarity by layer; `deep`: of the second half of the layers"
    )
    cka: Literal["before", "after", "after_binarized"] | None = Field(
        default=None, description="mean over layers and projections of the CKA of experts"
    )
    shift: str | None = Field(default=None, description="a perplexity of Table 1")
    measure: str | None = Field(default=None, description="any other measurement: KIND.NAME")

    @model_validator(mode="after")
    def _one_source(self) -> Value:
        given = [name for name in SOURCES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"got {given or 'none'}, expected exactly one of {', '.join(SOURCES)}")
        runs = [self.method is not None, self.sweep is not None, self.sweep_without is not None, self.sizes]
        if sum(runs) != 1:
            raise ValueError("expected exactly one of `method`, `sweep`, `sweep_without` and `sizes`")
        if self.method is None and self.perplexity is None:
            raise ValueError("`sweep`, `sweep_without` and `sizes` go with `perplexity`")
        if (self.calibration is not None) != (self.sweep is not None or self.sweep_without is not None):
            raise ValueError("`calibration` goes with `sweep` and `sweep_without`")
        return self


class Relation(Strict):
    """What is said of a number: exactly one of these."""

    above: Number | str | None = None
    below: Number | str | None = None
    at_least: Number | str | None = None
    at_most: Number | str | None = None
    equals: str | None = Field(default=None, description="as printed: its last digit says how it is rounded")
    not_above: Number | None = Field(default=None, description="above it by no more than the tolerance")
    place: PositiveInt | None = Field(default=None, description="a rank")
    about: Number = Field(default=0, ge=0, description="with `equals`: what a word such as `about` allows")

    @model_validator(mode="after")
    def _one(self) -> Relation:
        given = [name for name in type(self).model_fields if name != "about" and getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {', '.join(given) or 'nothing'}, expected exactly one relation")
        if self.about and self.equals is None:
            raise ValueError("`about` goes with `equals`")
        return self

    @cached_property
    def kind(self) -> str:
        """Name of the relation."""
        return next(name for name in type(self).model_fields if name != "about" and getattr(self, name) is not None)

    @cached_property
    def bound(self) -> float:
        """The number that is compared with."""
        return float(getattr(self, self.kind))

    @property
    def slack(self) -> float:
        """How far a printed number may lie from the one that was meant: its rounding and the word `about`."""
        return self.about + parse_entry(self.equals).half if self.equals is not None else 0.0

    def __str__(self) -> str:
        about = "about " if self.about else ""
        words = {"equals": f"{about}", "not_above": "not above ", "place": "place "}
        return f"{words.get(self.kind, self.kind.replace('_', ' ') + ' ')}{getattr(self, self.kind)}"


class Check(Strict):
    """One number, for each model of a target and each combination of `for_each`."""

    name: str = Field(description="what is compared, or the reading of the statement")
    models: str = Field(description="table or figure whose models it is said of, e.g. table2")
    only: list[str] = Field(default=[], description="of those models; a suite without the paper's models uses its own")
    pool: bool = Field(default=False, description="values become lists over the models; one number for all of them")
    compute: str = Field(description="arithmetic over `values`")
    values: dict[str, Value]
    for_each: dict[str, list[str]] = {}
    unit: str = ""
    digits: int = Field(default=2, ge=0)
    direction: Relation | None = None
    stated: Relation | None = None
    beside: bool = Field(default=False, description="shown; the verdict does not rest on it")
    any_model: bool = Field(default=False, description="`stated` holds of any model: no magnitude of the paper's")

    @model_validator(mode="after")
    def _compares(self) -> Check:
        if self.direction is None and self.stated is None:
            raise ValueError("expected `direction`, `stated` or both")
        return self


class Ours(Strict):
    """How one statement is checked, or why it is not."""

    checks: list[Check] = []
    require: Literal["all", "any"] = Field(default="all", description="`any`: the checks are readings of one statement")
    not_run: str | None = Field(default=None, description="what is missing to check it")
    not_checkable: str | None = Field(default=None, description="why no measurement can check it")
    proxy: str | None = Field(
        default=None, description="what is measured in its place; such a verdict is at most `direction only`"
    )
    note: str = Field(default="", description="how the checks read the statement")

    @model_validator(mode="after")
    def _has_verdict(self) -> Ours:
        if sum([bool(self.checks), self.not_run is not None, self.not_checkable is not None]) != 1:
            raise ValueError("expected exactly one of `checks`, `not_run` and `not_checkable`")
        return self


class Document(Strict):
    """The whole of `ours.yaml`."""

    claims: dict[str, Ours]


def load_ours() -> Document:
    """Read and check `ours.yaml`.

    Raises:
        ConfigError: no YAML, a key or value that is not expected, or not the statements of `claims.yaml`.
    """
    return _load(FILE)


@cache
def paper_document(folder: Path) -> PaperDocument:
    """`claims.yaml` of a folder, read once. Raises `ConfigError`."""
    return load_document(folder)


@cache
def _load(file: Path) -> Document:
    try:
        value = parse_yaml(file.read_text(encoding="utf-8"))
        value.pop("shared", None)  # anchors
        document = Document.model_validate(value)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {_explain(problem)}" for problem in error.errors())) from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    stated = [claim.id for claim in paper_document(file.parent).claims]
    missing, unknown = sorted(set(stated) - set(document.claims)), sorted(set(document.claims) - set(stated))
    if missing or unknown:
        raise ConfigError(
            f"{file}: no entry for {missing}, unknown entries {unknown}; expected one for each of claims.yaml"
        )
    return document


def _explain(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"])) or "file"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
