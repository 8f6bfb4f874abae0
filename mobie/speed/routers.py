"""Who reads which expert: the time of a step hangs on how many different experts its tokens choose.

A routing of its own is put in the place of a router's choice by a hook that returns a tensor made beforehand, so it
costs no kernel launch; the router itself still runs, and its weights are kept. An assignment is fixed for a number of
tokens, and different in every layer: a layer's weights are read once in a step, so which of them says nothing to a
cache.

    natural    the router's own choice
    balanced   every expert equally often, as far as tokens · k divides by the number of experts
    zipf       expert of rank r with odds 1/r, without replacement for the k of a token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mobie.errors import ConfigError, UnsupportedError, unknown_name
from mobie.models.base import Adapter

NATURAL, BALANCED, ZIPF = "natural", "balanced", "zipf"
ROUTERS = (NATURAL, BALANCED, ZIPF)
EXPONENT = 1.0  # of Zipf's law


def balanced(tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    """Experts `(tokens, top_k)` int64 in turns: counts differ by one at most, and no token has an expert twice."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    return order[torch.arange(tokens * top_k) % experts].view(tokens, top_k)


def zipf(tokens: int, experts: int, top_k: int, seed: int, exponent: float = EXPONENT) -> Tensor:
    """Experts `(tokens, top_k)` int64 drawn by Zipf's law, without replacement in a token (Gumbel's trick)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(experts, generator=generator)  # which expert has which rank
    odds = -exponent * torch.arange(1, experts + 1, dtype=torch.float64).log()
    uniform = torch.rand(tokens, experts, dtype=torch.float64, generator=generator).clamp_min_(1e-300)
    return order[(odds - (-uniform.log()).log()).topk(top_k, dim=1).indices]


DRAWS = {BALANCED: balanced, ZIPF: zipf}


class _Assigned:
    """A hook on a router: puts a fixed assignment for so many tokens in the place of its choice."""

    def __init__(self, kind: str, experts: int, seed: int) -> None:
        self._kind, self._experts, self._seed = kind, experts, seed
        self._made: dict[int, Tensor] = {}

    def __call__(self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, index = output
        tokens, top_k = index.shape
        if tokens not in self._made:  # made on the first call, before a graph is captured
            chosen = DRAWS[self._kind](tokens, self._experts, top_k, self._seed)
            self._made[tokens] = chosen.to(index.device, index.dtype)
        return logits, weights, self._made[tokens]


class _Count:
    """A hook on a router: how many different experts each call chose."""

    def __init__(self) -> None:
        self.distinct: list[int] = []

    def __call__(self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.distinct.append(len(output[2].unique()))


def model_routers(model: nn.Module) -> list[nn.Module]:
    """Routers of all MoE layers, in order. Raises `UnsupportedError` for a model without any."""
    adapter = Adapter(model.config.model_type)
    found = [adapter.router(block) for block in adapter.blocks(model)]
    routers = [router for router in found if router is not None]
    if not routers:
        raise UnsupportedError(f"{type(model).__name__} has no router, expected a mixture of experts")
    return routers


def layer_seed(seed: int, layer: int) -> int:
    """Seed of a layer's assignment."""
    return 1009 * seed + layer


def distinct_assigned(kind: str, layers: int, tokens: int, experts: int, top_k: int, seed: int = 0) -> list[float]:
    """Different experts of an assignment for so many tokens, by layer: what `routed` puts in the routers' place."""
    drawn = (DRAWS[kind](tokens, experts, top_k, layer_seed(seed, layer)) for layer in range(layers))
    return [float(len(index.unique())) for index in drawn]


@contextmanager
def routed(model: nn.Module, kind: str, seed: int = 0) -> Iterator[None]:
    """Inside, the model's routers choose as `kind` says. Raises `ConfigError` for an unknown kind."""
    if kind not in ROUTERS:
        raise ConfigError(unknown_name("router", kind, ROUTERS))
    handles = []
    if kind != NATURAL:
        experts = number_of_experts(model)
        handles = [
            router.register_forward_hook(_Assigned(kind, experts, layer_seed(seed, layer)))
            for layer, router in enumerate(model_routers(model))
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def number_of_experts(model: nn.Module) -> int:
    """Experts of a layer."""
    adapter = Adapter(model.config.model_type)
    module = next(m for block in adapter.blocks(model) if (m := adapter.experts_module(block)) is not None)
    return int(module.num_experts)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[_Count]]:
    """Inside, every router's choices are counted; one counter for each MoE layer. Waits for the device: not for timing.

    Enter it inside `routed`: hooks run in the order in which they were added.
    """
    counters = [_Count() for _ in model_routers(model)]
    handles = [
        router.register_forward_hook(counter) for router, counter in zip(model_routers(model), counters, strict=True)
    ]
    try:
        yield counters
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def distinct_experts(model: nn.Module, prompt: Tensor, steps: int) -> list[float]:
    """Mean number of different experts that a decode step reads, by MoE layer, over `steps` greedy steps.

    prompt: token ids `(batch, length)` on the model's device. Run with the routing that is to be counted.
    """
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    with counted(model) as counters:
        for _ in range(steps):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    if any(len(counter.distinct) != steps for counter in counters):
        raise UnsupportedError("a router was not called once in every step, expected it to be; its choice is not known")
    return [sum(counter.distinct) / steps for counter in counters]
