"""Perplexity by weights (full precision or quantized) and routing (full-precision or shifted), as in Table 1.

Every model first reads the windows on its own and the decisions of its routers are recorded. Then each model reads the
same windows with the other's decisions in the place of its own, token by token and layer by layer; hidden states, and
so everything else, are those of the running model. Two of the four perplexities are thus plain ones.

The paper does not say what is replayed; `ShiftProtocol.replay` names the two readings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mobie.errors import DataError, UnsupportedError
from mobie.records import Measurement
from mobie.scoring.perplexity import PerplexityProtocol, TextPerplexity, perplexity

if TYPE_CHECKING:
    from torch import Tensor, nn

Replay = Literal["experts", "experts_and_weights"]
#: loads a model
Load = Callable[[], Any]
#: the four rows of Table 1, in its order
CELLS = (
    "full_weights.full_routing",
    "full_weights.shifted_routing",
    "quantized_weights.full_routing",
    "quantized_weights.shifted_routing",
)


class ShiftProtocol(PerplexityProtocol):
    """Everything that decides the four perplexities; the other fields are those of `PerplexityProtocol`.

    replay: `experts`: a token goes to the recorded experts, and the running model's own router weights them: softmax
            over all experts of its logits, the recorded experts' entries, normalised where the architecture does. This
            is the default: the paper means by expert-shift that tokens are sent to other experts ("misrouting tokens
            to suboptimal experts", section 4.3), and sets it apart from numerical error.
            `experts_and_weights`: the recorded weights are used too, so that nothing of the running model's routing
            is left.
    """

    replay: Replay = "experts"


@dataclass(frozen=True)
class Decisions:
    """Of one router, for all tokens in the order they were read.

    experts: `(tokens, top_k)` int16, largest weight first.
    weights: `(tokens, top_k)`, what each expert's output is multiplied with.
    """

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Shift:
    """Perplexities of the four `CELLS`, and what they come from by cell: the mean losses of the windows, in nats."""

    measurements: list[Measurement]
    window_nll: dict[str, list[float]]


def shift(full_precision: Load, quantized: Load, windows: Tensor, protocol: ShiftProtocol) -> Shift:
    """Table 1 for one method on token windows `(windows, window)`; values, errors and counts are those of `perplexity`.

    One model is in memory at a time, so the full-precision model is loaded twice.

    Raises:
        ConfigError: a model does not fit the protocol.
        DataError: the models differ in their routers.
        MeasurementError: a loss is not finite.
        UnsupportedError: a model has no routers that are known, or weights its experts in an unknown way.
    """
    cells = {}
    model = full_precision()
    cells[CELLS[0]], reference = record_decisions(model, windows, protocol)
    del model
    model = quantized()
    cells[CELLS[3]], shifted = record_decisions(model, windows, protocol)
    cells[CELLS[2]] = replay_decisions(model, windows, protocol, reference)
    del model
    cells[CELLS[1]] = replay_decisions(full_precision(), windows, protocol, shifted)
    return Shift(
        [replace(cells[cell].measurement, name=cell) for cell in CELLS],
        {cell: list(cells[cell].window_nll) for cell in CELLS},
    )


def record_decisions(model: Any, windows: Tensor, protocol: ShiftProtocol) -> tuple[TextPerplexity, list[Decisions]]:
    """Perplexity of a model with its own routing, and the decisions of every MoE layer in order, on the CPU."""
    import torch

    own = routers(model)
    recorders = [_Recorder() for _ in own]
    with _hooked(own, recorders):
        found = perplexity(model, windows, protocol)
    return found, [Decisions(torch.cat(seen.experts), torch.cat(seen.weights)) for seen in recorders]


def replay_decisions(
    model: Any, windows: Tensor, protocol: ShiftProtocol, decisions: Sequence[Decisions]
) -> TextPerplexity:
    """Perplexity of a model with recorded decisions, of the same windows, in the place of its own.

    Raises:
        DataError: the decisions are of another number of layers or tokens.
    """
    own = routers(model)
    tokens = {len(layer.experts) for layer in decisions}
    if len(own) != len(decisions) or tokens != {windows.numel()}:
        raise DataError(
            f"decisions of {len(decisions)} routers for {sorted(tokens)} tokens, expected {len(own)} routers and "
            f"{windows.numel()} tokens; record both models on the same windows"
        )
    with _hooked(own, [_Replayer(layer, protocol.replay) for layer in decisions]):
        return perplexity(model, windows, protocol)


def routers(model: Any) -> list[nn.Module]:
    """Routers of all MoE layers in order; transformers' routers give logits, weights and experts `(tokens, …)`.

    Raises:
        UnsupportedError: the architecture is not registered, or the model has no MoE layer.
    """
    from mobie.models.base import Adapter

    adapter = Adapter(model.config.model_type)
    found = [router for block in adapter.blocks(model) if (router := adapter.router(block)) is not None]
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no router, expected a mixture of experts")
    return found


def routing_weights(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """Weights that a router gives to `experts (tokens, top_k)` by its `logits (tokens, experts)`: float32.

    The softmax goes over all experts. A router without `norm_topk_prob` (Mixtral's) always normalises, one with a
    `routed_scaling_factor` (DeepSeek's) multiplies by it instead.
    """
    weights = logits.float().softmax(dim=-1).gather(-1, experts)
    if hasattr(router, "routed_scaling_factor"):
        return weights * router.routed_scaling_factor
    return weights / weights.sum(dim=-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else weights


@contextmanager
def _hooked(modules: Sequence[nn.Module], hooks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """With a forward hook on each module."""
    handles = [module.register_forward_hook(hook) for module, hook in zip(modules, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """A forward hook on a router that keeps what it decides."""

    def __init__(self) -> None:
        self.experts: list[Tensor] = []
        self.weights: list[Tensor] = []

    def __call__(self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        import torch

        _, weights, experts = output
        self.experts.append(experts.to(torch.int16).cpu())
        self.weights.append(weights.cpu())


class _Replayer:
    """A forward hook on a router that puts recorded decisions in the place of its own, in the order of recording."""

    def __init__(self, decisions: Decisions, replay: Replay) -> None:
        self.decisions, self.replay, self.start = decisions, replay, 0

    def __call__(
        self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, own_weights, own_experts = output
        rows = slice(self.start, self.start + len(own_experts))
        self.start = rows.stop
        experts = self.decisions.experts[rows].to(own_experts)
        if self.replay == "experts_and_weights":
            return logits, self.decisions.weights[rows].to(own_weights), experts
        _require_known_rule(router, output)
        return logits, routing_weights(router, logits, experts).to(own_weights), experts


def _require_known_rule(router: nn.Module, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Check that `routing_weights` gives back a router's own weights for its own experts."""
    logits, weights, experts = output
    if not routing_weights(router, logits, experts).to(weights).allclose(weights, equal_nan=True):
        raise UnsupportedError(
            f"{type(router).__name__} does not weight its experts by their softmax probabilities, expected it to; "
            "replay experts_and_weights instead"
        )
