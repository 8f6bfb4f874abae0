"""How far a quantized model's routers decide as the full-precision model's do, layer by layer (appendix B.4.4).

With p = softmax(z) the routing probabilities of a token (eq. 51), the similarity of two models is the cosine of their
p (eq. 52), averaged over tokens (eq. 53). The expert-shift rate is the share of (token, slot) pairs whose expert is
not among the full-precision model's top-k of that token.

Both models read the same tokens, each with its own hidden states. They are recorded one after the other, so they need
not be in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mobie.errors import DataError, MeasurementError, UnsupportedError
from mobie.records import Measurement
from mobie.scoring.windows import WindowProtocol, require_fit

if TYPE_CHECKING:
    from torch import Tensor

#: tokens of Figure 3's map
MAP_TOKENS = 48


class RoutingProtocol(WindowProtocol):
    """Everything that decides a routing similarity; the fields are those of `WindowProtocol`."""


def routing(full_precision: Any, quantized: Any, windows: Tensor, protocol: RoutingProtocol) -> list[Measurement]:
    """Routing similarity and expert-shift rate between two models in memory; see `compare_routing`."""
    reference = record_routing(full_precision, windows, protocol)
    return compare_routing(reference, record_routing(quantized, windows, protocol), top_k(full_precision))


def top_k(model: Any) -> int:
    """Experts that a token uses."""
    return model.config.num_experts_per_tok


def record_routing(model: Any, windows: Tensor, protocol: RoutingProtocol) -> Tensor:
    """Router logits z of every MoE layer on token windows `(windows, window)`.

    Returns:
        `(layers, windows, window, experts)` float32 on the CPU.

    Raises:
        ConfigError: the model does not fit the protocol.
        UnsupportedError: the model gives no router logits.
    """
    import torch
    from tqdm import tqdm

    require_fit(model, protocol)
    batches = windows.split(protocol.batch_size)
    recorded = []
    with torch.inference_mode():
        for batch in tqdm(batches, desc="routing", unit="batch", disable=None, leave=False):
            # the base model: the language model head is not needed, nor the load-balancing loss that it would add
            output = model.base_model(input_ids=batch.to(model.device), use_cache=False, output_router_logits=True)
            logits = getattr(output, "router_logits", None)
            if not logits:
                raise UnsupportedError(f"{type(model).__name__} gives no router logits, expected a mixture of experts")
            recorded.append(torch.stack([z.float().cpu().unflatten(0, batch.shape) for z in map(_flat, logits)]))
    return torch.cat(recorded, dim=1)


def _flat(logits: Tensor) -> Tensor:
    """`(tokens, experts)`, whatever the leading dimensions."""
    return logits.flatten(0, -2)


def compare_routing(reference: Tensor, other: Tensor, top_k: int) -> list[Measurement]:
    """Compare two recordings `(layers, windows, window, experts)` made under one protocol.

    Returns, per MoE layer L in order, `layerL.similarity` and `layerL.expert_shift`, then `similarity` and
    `expert_shift` over all layers. `n` counts tokens, for shifts (token, slot) pairs. Tokens of a window depend on one
    another, so the standard errors are those of a mean over windows.

    Raises:
        DataError: the recordings differ in shape.
        MeasurementError: they hold values that are not finite.
    """
    if reference.shape != other.shape:
        raise DataError(
            f"router logits of shapes {tuple(reference.shape)} and {tuple(other.shape)}, expected equal ones; "
            "record both models under the same protocol"
        )
    if not (reference.isfinite().all() and other.isfinite().all()):
        raise MeasurementError(
            "router logits hold NaN or infinity, expected finite values; look at how the model was quantized"
        )
    similarity = token_similarity(reference, other).mean(dim=-1)  # (layers, windows)
    shift = token_shift(reference, other, top_k).mean(dim=-1)
    tokens = reference[0, ..., 0].numel()
    return [
        *_layer_means("similarity", similarity, tokens),
        *_layer_means("expert_shift", shift, tokens * top_k),
    ]


def token_similarity(reference: Tensor, other: Tensor) -> Tensor:
    """Cosine of routing probabilities (eq. 52), float64: `(…, experts)` logits → `(…)`; exactly 1 for equal logits."""
    p, q = reference.double().softmax(dim=-1), other.double().softmax(dim=-1)
    # one root of the product, not a product of roots: the root of an exact square is exact
    return (p * q).sum(dim=-1) / ((p * p).sum(dim=-1) * (q * q).sum(dim=-1)).sqrt()


def token_shift(reference: Tensor, other: Tensor, top_k: int) -> Tensor:
    """Share of a token's `top_k` experts that the reference does not use: `(…, experts)` logits → `(…)` float64."""
    chosen, wanted = (z.topk(top_k, dim=-1).indices for z in (other, reference))
    kept = (chosen[..., :, None] == wanted[..., None, :]).any(dim=-1)  # (…, slot)
    return 1 - kept.double().mean(dim=-1)


def routing_details(
    reference: Tensor, other: Tensor, top_k: int, windows: Tensor, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """What Figure 3 shows of two recordings `(layers, windows, window, experts)` on token windows `(windows, window)`.

    Returns JSON values:
        map: of the middle MoE layer (`layer`, counted from 0) and the first `MAP_TOKENS` tokens of the first window:
            their text (`tokens`), and each one's experts, largest logit first, in the `reference` and `quantized`.
        tokens_per_expert: `reference` and `quantized`, layer → expert → how many of all tokens use it.
    """
    layer = len(reference) // 2
    chosen = {"reference": reference.topk(top_k).indices, "quantized": other.topk(top_k).indices}
    tokens = [tokenizer.decode([token]) for token in windows[0, :MAP_TOKENS].tolist()]
    experts = reference.shape[-1]
    return {
        "map": {"layer": layer, "tokens": tokens}
        | {name: found[layer, 0, :MAP_TOKENS].tolist() for name, found in chosen.items()},
        "tokens_per_expert": {
            name: [layer_choice.flatten().bincount(minlength=experts).tolist() for layer_choice in found]
            for name, found in chosen.items()
        },
    }


def _layer_means(name: str, values: Tensor, n: int) -> Iterator[Measurement]:
    """Means over windows of `(layers, windows)`, layer by layer and over all layers."""
    layers, windows = values.shape
    rows = [(f"layer{layer}.{name}", row, n) for layer, row in enumerate(values)]
    for label, row, count in [*rows, (name, values.mean(dim=0), n * layers)]:
        error = row.std().item() / math.sqrt(windows) if windows > 1 else None
        yield Measurement(label, row.mean().item(), error, count)
