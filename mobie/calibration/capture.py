"""The experts of a layer at work, told to an observer.

Experts are fused, so what flows between their projections never passes a module boundary: an experts function
registered with transformers (`ALL_EXPERTS_FUNCTIONS`) computes the library's eager loop and reports on the way. It is
where the loss gradients at the experts' outputs are seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mobie.models.experts import expert_count, join_outputs, project, split_outputs

EXPERTS_FUNCTION = "mobie_observed"


class ExpertsObserver(Protocol):
    """What the observed experts function tells: outputs of one expert's projections, and whose they are."""

    def outputs(self, projection: str, expert: int, z: Tensor, token: Tensor, slot: Tensor) -> None: ...


def observed_experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of one layer, expert by expert, as the library's eager function, reporting to `module.mobie_observer`.

    hidden `(tokens, hidden)`, top_k_index and top_k_weights `(tokens, k)` → `(tokens, hidden)`.
    """
    observer: ExpertsObserver = module.mobie_observer
    result = torch.zeros_like(hidden)
    for expert in range(expert_count(module)):
        slot, token = torch.where((top_k_index == expert).T)  # the library's order: rounding may depend on it
        if not len(token):
            continue
        x = hidden[token]
        gate, up = split_outputs(module, project(module, "gate_up_proj", expert, x))
        inner = module._apply_gate(join_outputs(module, gate, up))  # joined again so that both halves see gradients
        z = project(module, "down_proj", expert, inner)
        for projection, output in (("gate", gate), ("up", up), ("down", z)):
            observer.outputs(projection, expert, output, token, slot)
        result.index_add_(0, token, (z * top_k_weights[token, slot, None]).to(result.dtype))
    return result


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, observed_experts_forward)


@contextmanager
def observe_experts(observers: Mapping[nn.Module, ExpertsObserver], config: Any) -> Iterator[None]:
    """Route the experts modules in `observers` through the observed function while the context lasts."""
    before = config._experts_implementation
    config._experts_implementation = EXPERTS_FUNCTION
    for module, observer in observers.items():
        module.mobie_observer = observer
    try:
        yield
    finally:
        config._experts_implementation = before
        for module in observers:
            del module.mobie_observer
