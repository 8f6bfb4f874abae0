"""How large a model is in every respect that memory and time hang on, from configuration files alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mobie.tables.architectures import architecture_of

if TYPE_CHECKING:
    from mobie.config import ModelConfig

#: of a hub model that is none of the paper's: nothing but its parameters is known before it is fetched
ASSUMED_LAYERS, ASSUMED_HIDDEN, ASSUMED_VOCABULARY = 24, 4096, 150_000
PROJECTIONS = 3  # gate, up, down of an expert
ATTENTION_LINEARS = 4  # query, key, value, output


@dataclass(frozen=True)
class Size:
    """Numbers of weights and widths.

    parameters: all weights. active: those that a token meets. block: of the largest decoder block.
    ends:       embeddings and head.
    hidden, width: between the layers; inside an expert.
    experts, top_k: of a layer; those that read a token. vocabulary: rows of the head.
    known:      the published shape, not a guess from the number of parameters.
    """

    parameters: int
    active: int
    block: int
    ends: int
    layers: int
    hidden: int
    width: int
    experts: int
    top_k: int
    vocabulary: int
    known: bool

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return PROJECTIONS * self.hidden * self.width


@cache
def size_of(model: ModelConfig) -> Size:
    """Sizes of a model; of an unknown shape those of a dense model with as many parameters, which asks for more."""
    shape = architecture_of(model)
    if shape is None:
        ends = 2 * ASSUMED_VOCABULARY * ASSUMED_HIDDEN
        block = max(model.parameters - ends, model.parameters // 2) // ASSUMED_LAYERS
        return Size(
            model.parameters,
            model.parameters,
            block,
            ends,
            ASSUMED_LAYERS,
            ASSUMED_HIDDEN,
            ASSUMED_HIDDEN,
            1,
            1,
            ASSUMED_VOCABULARY,
            known=False,
        )
    expert = PROJECTIONS * shape.hidden * shape.intermediate
    ends = 2 * shape.vocabulary * shape.hidden
    moe_layers = shape.layers - shape.dense_layers
    idle = moe_layers * (shape.routed_experts - shape.top_k) * expert
    experts = (shape.routed_experts + shape.shared_experts) * expert
    return Size(
        shape.parameters,
        shape.parameters - idle,
        max((shape.parameters - ends) // shape.layers, experts + ATTENTION_LINEARS * shape.hidden**2),
        min(ends, shape.parameters),
        shape.layers,
        shape.hidden,
        shape.intermediate,
        shape.routed_experts,
        shape.top_k,
        shape.vocabulary,
        known=True,
    )
