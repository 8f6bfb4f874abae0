"""What a routing record keeps for Figure 3, against counting by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from tiny import CONFIGS, EXPERTS, TOP_K, make_model, random_tokens, tokenizer

from mobie.models.base import Adapter
from mobie.scoring.routing import MAP_TOKENS, RoutingProtocol, record_routing, routing_details, top_k


@pytest.mark.parametrize(("layers", "middle"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_map_and_counts_against_sorting(layers: int, middle: int) -> None:
    generator = torch.Generator().manual_seed(layers)
    reference, other = (torch.randn(layers, 2, 60, 5, generator=generator) for _ in range(2))
    windows = random_tokens(2, 60)
    got = routing_details(reference, other, 2, windows, tokenizer())
    assert got["map"]["layer"] == middle and len(got["map"]["tokens"]) == MAP_TOKENS == 48
    assert got["map"]["tokens"] == [f"w{token}" for token in windows[0, :48].tolist()]
    for name, recording in (("reference", reference), ("quantized", other)):
        rows = recording.tolist()
        chosen = [
            [sorted(range(5), key=lambda e: -z[e])[:2] for window in layer for z in window]  # noqa: B023
            for layer in rows
        ]
        assert got["map"][name] == chosen[middle][:48]
        for layer in range(layers):
            counts = Counter(expert for token in chosen[layer] for expert in token)
            assert got["tokens_per_expert"][name][layer] == [counts[expert] for expert in range(5)]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_of_every_architecture_are_those_its_router_decides_by(model_type: str) -> None:
    model, adapter = make_model(model_type), Adapter(model_type)
    windows, protocol = random_tokens(3, 20), RoutingProtocol(text="t", window=20, batch_size=3)
    found = [router for block in adapter.blocks(model) if (router := adapter.router(block)) is not None]
    used: dict[int, torch.Tensor] = {}
    for index, router in enumerate(found):
        router.register_forward_hook(lambda _, __, output, index=index: used.update({index: output[2]}))
    recording = record_routing(model, windows, protocol)
    assert recording.shape == (len(found), 3, 20, EXPERTS)
    for index, logits in enumerate(recording):
        chosen = logits.flatten(0, -2).topk(top_k(model)).indices
        assert torch.equal(chosen.sort(1).values, used[index].sort(1).values)


def test_the_map_holds_the_experts_that_the_model_uses() -> None:
    model = make_model("qwen3_moe")  # its first block is dense
    windows, protocol = random_tokens(3, 20), RoutingProtocol(text="t", window=20, batch_size=2)
    recording = record_routing(model, windows, protocol)
    used = []
    router = model.model.layers[1].mlp.gate
    router.register_forward_hook(lambda _, __, output: used.append(output[2]))
    with torch.no_grad():
        model(input_ids=windows)
    got = routing_details(recording, recording, top_k(model), windows, tokenizer())
    assert json.loads(json.dumps(got)) == got
    assert got["map"]["layer"] == 0 and len(got["map"]["tokens"]) == 20  # the window is shorter than the map
    assert got["map"]["reference"] == got["map"]["quantized"] == used[0][:20].tolist()
    counts = used[0].flatten().bincount(minlength=EXPERTS).tolist()
    assert got["tokens_per_expert"] == {"reference": [counts], "quantized": [counts]}
    assert sum(counts) == 3 * 20 * TOP_K
