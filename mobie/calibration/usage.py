"""Which experts tokens use: read from the library's experts modules while the model runs.

u_le = uses of expert e in layer l / tokens          (eq. 4 of arXiv 2505.03804; a layer's sum is k)
σ_l  = standard deviation of u_l1 … u_lE, by E - 1   (eq. 4)
σ    = mean of σ_l over the layers with experts      (eq. 3)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobie.data.self_sampled import Frequency
from mobie.models.base import Adapter
from mobie.models.experts import expert_count

BATCH_TOKENS = 2048  # of a text that is only read


class RouteWatch:
    """The experts that the tokens of the latest forward pass were sent to, layer by layer."""

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        """Raises UnsupportedError for a model without experts."""
        blocks = adapter.blocks(model)
        self.layers = [index for index, block in enumerate(blocks) if adapter.experts_module(block) is not None]
        if not self.layers:
            adapter.moe_router(blocks[0])  # raises
        self._modules = {index: adapter.experts_module(blocks[index]) for index in self.layers}
        self.experts = max(expert_count(module) for module in self._modules.values() if module is not None)
        self._routes: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks."""

        def take(index: int, args: tuple[Tensor, ...]) -> None:
            self._routes[index] = args[1]

        handles = [
            module.register_forward_pre_hook(lambda _, args, index=index: take(index, args))
            for index, module in self._modules.items()
            if module is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def uses_by_row(self, device: torch.device) -> Tensor:
        """Uses `(layers, tokens, experts)` int64 of every token of the latest pass."""
        routes = [self._routes[index].to(device) for index in self.layers]
        return torch.stack([nn.functional.one_hot(route, self.experts).sum(dim=-2) for route in routes])

    def uses(self) -> Tensor:
        """Uses `(layers, experts)` int64 of all tokens of the latest pass, on the CPU."""
        routes = [self._routes[index].cpu() for index in self.layers]
        return torch.stack([route.flatten().bincount(minlength=self.experts) for route in routes])


def expert_imbalance(uses: Tensor, tokens: int, frequency: Frequency = "per_token") -> Tensor:
    """σ of eqs. 3 and 4: uses `(layers, …, experts)` among so many tokens → `(…)` float64."""
    counted = uses.double()
    shares = counted / (tokens if frequency == "per_token" else counted.sum(dim=-1, keepdim=True))
    return shares.std(dim=-1, correction=1).mean(dim=0)


@dataclass(frozen=True)
class ReadText:
    """How a model reads token sequences.

    layers: blocks with experts. uses: `(layers, experts)` int64. perplexity: None for sequences of one token.
    """

    layers: list[int]
    uses: Tensor
    perplexity: float | None


@torch.inference_mode()
def read_text(model: Any, adapter: Adapter, tokens: Tensor) -> ReadText:
    """Uses of the experts by token sequences `(sequences, length)`, and their perplexity, each sequence by itself.

    Raises:
        UnsupportedError: a model without experts.
    """
    watch = RouteWatch(adapter, model)
    uses = torch.zeros(len(watch.layers), watch.experts, dtype=torch.int64)
    nll = 0.0
    with watch.watching():
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:].to(logits.device)
            nll += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            uses += watch.uses()
    predicted = tokens.numel() - len(tokens)
    return ReadText(watch.layers, uses, math.exp(nll / predicted) if predicted else None)
