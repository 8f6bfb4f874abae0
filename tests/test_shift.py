"""Replayed routing against the library's own losses and against experts computed by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CONFIGS, experts_by_hand, inner_by_hand, make_model, random_tokens
from torch import Tensor, nn

from mobie.errors import DataError, UnsupportedError
from mobie.models.base import Adapter
from mobie.scoring.perplexity import PerplexityProtocol, perplexity
from mobie.scoring.shift import (
    CELLS,
    Decisions,
    ShiftProtocol,
    record_decisions,
    replay_decisions,
    routers,
    routing_weights,
    shift,
)

WINDOWS = random_tokens(6, 16)
REPLAYS = ("experts", "experts_and_weights")
#: every architecture, and the two ways to weight where an architecture has both
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: make_model(name)) for name in CONFIGS},
    "olmoe, normalised": lambda: make_model("olmoe", norm_topk_prob=True),
}


def protocol(replay: str = "experts", **changes: Any) -> ShiftProtocol:
    return ShiftProtocol(text="t", window=16, batch_size=4, replay=replay, **changes)


def perturbed(model: nn.Module, names: str = "", size: float = 0.15) -> nn.Module:
    """A copy with noise on the parameters whose names hold `names`."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if names in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return other


def library_perplexity(model: nn.Module) -> float:
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in WINDOWS]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("replay", REPLAYS)
@pytest.mark.parametrize("name", MODELS)
def test_own_routing_gives_plain_perplexities_and_replay_others(name: str, replay: str) -> None:
    model = MODELS[name]()
    quantized = perturbed(model)
    found = shift(lambda: model, lambda: quantized, WINDOWS, protocol(replay))
    values = {m.name: m for m in found.measurements}
    assert tuple(values) == CELLS == tuple(found.window_nll)
    own = {CELLS[0]: model, CELLS[3]: quantized}
    for cell, measured in values.items():
        losses = torch.tensor(found.window_nll[cell], dtype=torch.float64)
        assert measured.n == 6 * 15 and len(losses) == 6
        assert measured.value == pytest.approx(losses.mean().exp().item(), rel=1e-12)
        assert measured.stderr == pytest.approx((losses.mean().exp() * losses.std() / math.sqrt(6)).item(), rel=1e-9)
        if cell in own:
            plain = perplexity(own[cell], WINDOWS, PerplexityProtocol(text="t", window=16, batch_size=4))
            assert measured.value == plain.measurement.value
            assert measured.value == pytest.approx(library_perplexity(own[cell]), rel=1e-4)
    assert len({round(m.value, 6) for m in values.values()}) == 4, "a replay changed nothing"


@pytest.mark.parametrize("replay", REPLAYS)
def test_a_models_own_decisions_replayed_change_nothing(replay: str) -> None:
    model = make_model("mixtral")
    found = shift(lambda: model, lambda: model, WINDOWS, protocol(replay))
    assert len({m.value for m in found.measurements}) == 1


def test_models_that_differ_in_routers_only_swap_places_when_all_of_a_decision_is_replayed() -> None:
    model = make_model("qwen3_moe")
    quantized = perturbed(model, "mlp.gate.weight", 0.5)
    values = {
        m.name: m.value for m in shift(lambda: model, lambda: quantized, WINDOWS, protocol(REPLAYS[1])).measurements
    }
    assert values["full_weights.shifted_routing"] == values["quantized_weights.shifted_routing"]
    assert values["quantized_weights.full_routing"] == values["full_weights.full_routing"]
    assert values["full_weights.full_routing"] != values["quantized_weights.shifted_routing"]
    # with the experts only, their weights are still those of the running model's router
    values = {m.name: m.value for m in shift(lambda: model, lambda: quantized, WINDOWS, protocol()).measurements}
    assert values["quantized_weights.full_routing"] != values["full_weights.full_routing"]


def by_hand(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of experts, one token and one expert at a time, in float64."""
    own = experts_by_hand(experts)
    rows = []
    for x, ids, shares in zip(hidden.double(), chosen.tolist(), weights.double(), strict=True):
        total = torch.zeros_like(x)
        for e, share in zip(ids, shares, strict=True):
            gate, up = (own[name][e] @ x + own[f"{name}_bias"][e] for name in ("gate", "up"))
            total += share * (own["down"][e] @ inner_by_hand(experts, gate, up) + own["down_bias"][e])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("replay", REPLAYS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_compute_what_was_recorded(name: str, replay: str) -> None:
    model = MODELS[name]()
    quantized = perturbed(model)
    adapter = Adapter(model.config.model_type)
    recorded: dict[int, list[tuple[Tensor, Tensor]]] = {}
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def watch(layers: dict[int, list[tuple[Tensor, Tensor]]], index: int, *, inputs: bool) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
            pair = (given[0], output) if inputs else (given[1], given[2])  # hidden and result, or experts and weights
            layers.setdefault(index, []).append(pair)

        return hook

    for watched, target, inputs in ((model, recorded, False), (quantized, seen, True)):
        for index, block in enumerate(adapter.blocks(watched)):
            if adapter.experts_module(block) is not None:
                adapter.experts_module(block).register_forward_hook(watch(target, index, inputs=inputs))
    settings = protocol(replay)
    _, decisions = record_decisions(model, WINDOWS, settings)
    replay_decisions(quantized, WINDOWS, settings, decisions)

    assert len(seen) == len(decisions)
    normalises = name in ("mixtral", "gpt_oss") or getattr(model.config, "norm_topk_prob", False)
    for index, pairs in seen.items():
        block = adapter.blocks(quantized)[index]
        hidden, result = (torch.cat([pair[part] for pair in pairs]).flatten(0, -2) for part in (0, 1))
        chosen, weights = (torch.cat([pair[part] for pair in recorded[index]]) for part in (0, 1))
        if replay == "experts":
            router = adapter.moe_router(block)
            bias = router.bias.double() if name == "gpt_oss" else 0
            scores = (hidden.double() @ router.weight.double().T + bias).exp()
            weights = torch.stack([row[ids] / row.sum() for row, ids in zip(scores, chosen, strict=True)])
            if normalises:
                weights = weights / weights.sum(1, keepdim=True)
        expected = by_hand(adapter.experts_module(block), hidden, chosen, weights)
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_16_bits_own_decisions_replayed_change_nothing_either(name: str) -> None:
    model = MODELS[name]().bfloat16()
    model.set_experts_implementation("eager")  # torch's grouped product wants widths that are multiples of 8
    found = shift(lambda: model, lambda: model, WINDOWS, protocol(dtype="bfloat16"))
    assert len({m.value for m in found.measurements}) == 1


def test_decisions_do_not_hang_on_the_batches_of_recording() -> None:
    model = make_model("olmoe")
    quantized = perturbed(model)
    _, decisions = record_decisions(model, WINDOWS, protocol())
    values = [
        replay_decisions(quantized, WINDOWS, protocol().model_copy(update={"batch_size": size}), decisions)
        for size in (1, 4, 6)
    ]
    assert [v.measurement.value for v in values] == pytest.approx([values[0].measurement.value] * 3, rel=1e-5)
    assert decisions[0].experts.shape == (6 * 16, 3) and decisions[0].experts.dtype == torch.int16


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = make_model("olmoe")
    own, decisions = record_decisions(model, WINDOWS, protocol())
    bad = [Decisions(layer.experts[:, :, None], layer.weights) for layer in decisions]
    with pytest.raises(RuntimeError):
        replay_decisions(model, WINDOWS, protocol(), bad)
    assert not any(router._forward_hooks for router in routers(model))
    assert record_decisions(model, WINDOWS, protocol())[0] == own


def test_what_cannot_be_replayed_is_refused() -> None:
    model = make_model("olmoe")
    _, decisions = record_decisions(model, WINDOWS, protocol())
    with pytest.raises(DataError, match=r"2 routers for \[96\] tokens, expected 2 routers and 80 tokens"):
        replay_decisions(model, WINDOWS[:5], protocol(), decisions)
    with pytest.raises(DataError, match="1 routers"):
        replay_decisions(model, WINDOWS, protocol(), decisions[:1])
    dense = make_model("qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(UnsupportedError, match="has no router"):
        routers(dense)


def test_an_unknown_way_to_weight_experts_is_refused_where_weights_are_computed_anew() -> None:
    model = make_model("olmoe")
    for router in routers(model):  # as DeepSeek's routed_scaling_factor
        router.register_forward_hook(lambda _, __, output: (output[0], 2.5 * output[1], output[2]))
    own, decisions = record_decisions(model, WINDOWS, protocol())
    with pytest.raises(UnsupportedError, match="replay experts_and_weights"):
        replay_decisions(model, WINDOWS, protocol(), decisions)
    replayed = replay_decisions(model, WINDOWS, protocol("experts_and_weights"), decisions)
    assert replayed.measurement.value == own.measurement.value


def test_weights_of_a_hand_computed_token() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(3), math.log(4)]])  # probabilities 0.1, 0.2, 0.3, 0.4
    router, chosen = nn.Module(), torch.tensor([[0, 2]])
    router.norm_topk_prob = False
    torch.testing.assert_close(routing_weights(router, logits, chosen), torch.tensor([[0.1, 0.3]]))
    router.norm_topk_prob = True
    torch.testing.assert_close(routing_weights(router, logits, chosen), torch.tensor([[0.25, 0.75]]))
    assert protocol().digest() != protocol("experts_and_weights").digest()


def test_a_router_with_a_scaling_factor_is_replayed_with_it() -> None:
    """DeepSeek's large models multiply the weights by a factor; a replay of own decisions changes nothing."""
    model = make_model("deepseek_v2", routed_scaling_factor=2.5)
    found = shift(lambda: model, lambda: model, WINDOWS, protocol())
    assert len({round(m.value, 4) for m in found.measurements}) == 1
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    experts = logits.topk(3).indices
    expected = 2.5 * logits.softmax(-1).gather(1, experts)
    torch.testing.assert_close(routing_weights(routers(model)[0], logits, experts), expected)
