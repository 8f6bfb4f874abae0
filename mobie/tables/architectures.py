"""Shapes of mixture-of-experts models: the paper's from public configs, the embedded ones from their own."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from functools import cache

from mobie.config import ModelConfig
from mobie.paper.printed import same_model
from mobie.paths import PACKAGE, embedded_model
from mobie.results import Model


@dataclass(frozen=True)
class Architecture:
    """What decides a model's memory.

    model:          name.
    parameters:     number of weights.
    hidden:         width between the layers.
    intermediate:   width of one routed expert.
    routed_experts: of one layer; `top_k` of them read a token.
    shared_experts: of one layer, which read every token.
    dense_layers:   layers of `layers` without experts.
    """

    model: str
    parameters: int
    hidden: int
    intermediate: int
    routed_experts: int
    shared_experts: int
    top_k: int
    layers: int
    dense_layers: int
    vocabulary: int


@cache
def architectures() -> tuple[Architecture, ...]:
    """Models that the paper uses, in the order of `mobie/paper/architectures.csv`."""
    with (PACKAGE / "paper" / "architectures.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = [name for name in Architecture.__dataclass_fields__ if name != "model"]
    return tuple(Architecture(row["model"], **{name: int(row[name]) for name in numbers}) for row in rows)


def architecture(name: str) -> Architecture:
    """One of the paper's models by any of its names. Raises `KeyError` for a model it does not use."""
    for found in architectures():
        if same_model(found.model, name):
            return found
    raise KeyError(name)


def embedded_architecture(model: Model) -> Architecture | None:
    """The shape of a model that ships in the package; None for another."""
    if model.config is None or model.config.source != "embedded":
        return None
    return replace(_embedded(model.config), model=model.label)


def architecture_of(config: ModelConfig) -> Architecture | None:
    """The shape of a model from files alone: of one that ships in the package or is the paper's; None for others."""
    if config.source == "embedded":
        return _embedded(config)
    label = config.label
    return None if label is None else next((a for a in architectures() if same_model(a.model, label)), None)


def _embedded(model: ModelConfig) -> Architecture:
    """From `config.json`: a shared expert counts as several of a routed one's width, as in the paper's Table 3."""
    config = json.loads((embedded_model(model.repo) / "config.json").read_text(encoding="utf-8"))
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    return Architecture(
        model.repo,
        model.parameters,
        config["hidden_size"],
        width,
        config["num_experts"],
        config.get("shared_expert_intermediate_size", 0) // width,
        config["num_experts_per_tok"],
        config["num_hidden_layers"],
        0,
        config["vocab_size"],
    )
