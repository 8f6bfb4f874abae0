"""May a model's results be compared with the paper's numbers: what the protocol gate found, for whoever shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mobie.paper.baseline import printed_baseline
from mobie.records import Record
from mobie.results import Model, Results

REFERENCE = "fp16"
KIND = "gate"
State = Literal["yes", "no", "unknown", "not checked"]
WORDS: dict[State, str] = {
    "yes": "comparable with the paper's numbers",
    "no": "not comparable with the paper's numbers",
    "unknown": "not known whether comparable with the paper's numbers",
    "not checked": "not checked whether comparable with the paper's numbers",
}
#: tables whose values hang on the protocols that the gate tries, and kinds of records that they are of
TABLES = ("table1", "table2", "table4", "table5", "table7", "table10")
KINDS = frozenset({"perplexity", "tasks", "shift"})


@dataclass(frozen=True)
class Comparability:
    """What the gate says of a model. state: `not checked` where it has not run, or failed."""

    state: State
    reason: str

    @property
    def sentence(self) -> str:
        return f"{WORDS[self.state]}: {self.reason}"


NOTHING_PRINTED = Comparability("unknown", "the paper prints no full-precision row of it that the gate could try")


def comparability(results: Results, model: Model) -> Comparability:
    """What the gate says of a model of a suite. Raises `DataError` for a damaged record."""
    if model.absent is not None:
        return Comparability("not checked", model.absent)
    if not has_gate(model.config.label if model.config else None):
        return NOTHING_PRINTED
    return of_record(results.record(model, REFERENCE, KIND))


def has_gate(label: str | None) -> bool:
    """Whether a model has a gate, by its name in the paper: those have one of which the paper prints something to try.

    One that is not the paper's (None) has one too, which shows its values and compares nothing.
    """
    return label is None or bool(printed_baseline(label))


def of_record(record: Record | None) -> Comparability:
    """What a gate's record says; None: there is none."""
    if record is None:
        return Comparability("not checked", "the job of the protocol gate has not run")
    if not record.ok:
        return Comparability("not checked", f"the protocol gate: {record.status}: {record.reason}")
    return Comparability(record.details["comparable"], record.details["why"])


def gated_models(results: Results) -> list[Model]:
    """Models of a suite that have a gate: those of `TABLES`, each once."""
    models = {model.name: model for table in TABLES for model in results.models(table)}
    return [model for model in models.values() if model.config is not None and has_gate(model.config.label)]
