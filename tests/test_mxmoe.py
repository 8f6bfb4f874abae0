"""MxMoE: sensitivities against the library's own modules, allocations against all enumerated, budgets, placements."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import TOKENS, weight_files
from tiny import make_model, save_model
from torch import Tensor, nn

from mobie.calibration.lazy import Cache
from mobie.calibration.statistics import BlockStatistics
from mobie.calibration.store import ActivationStore, Memory
from mobie.calibration.stream import Stream, enter_first_block
from mobie.errors import ConfigError, UnsupportedError
from mobie.methods.allocation import LayerView
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.methods.gptq import GPTQ
from mobie.methods.mixed_bits import MixedGPTQ, Strategy
from mobie.methods.mxmoe import WEIGHT_ONLY, MxMoE
from mobie.models.base import ARCHITECTURES
from mobie.models.experts import write_projections
from mobie.models.weights import StreamedModel
from mobie.packing.checkpoint import block_path, load_block
from mobie.packing.dense import Dense16
from mobie.packing.grid import round_trip
from mobie.pipeline import batches_of, quantize
from mobie.survey import layer_view
from mobie.try_method import try_method

TWO, FOUR, WHOLE = Strategy(2, 128), Strategy(4, 128), Strategy(8, None)


@dataclass(frozen=True)
class Seen:
    """A surveyed block: its view, and what its experts' layer and its MLP were given and gave."""

    view: LayerView
    block: nn.Module
    experts: nn.Module
    arguments: tuple[Tensor, ...]
    hidden: Tensor


@cache
def model_folder(model_type: str, folder: Path) -> Path:
    return save_model(make_model(model_type), folder / model_type)


@torch.no_grad()
def seen(model_type: str, folder: Path) -> Iterator[Seen]:
    """Blocks with experts of a tiny model, one batch of tokens having passed; alive until the next is asked for."""
    streamed = StreamedModel(model_folder(model_type, folder))
    store = ActivationStore(folder, "job", Memory(1 << 30))
    stream = Stream(f"s-{model_type}", batches_of(TOKENS[:4]), store, streamed.device)
    with streamed.outside():
        stream.arguments = enter_first_block(streamed, batches_of(TOKENS[:4]), stream.put)
    for index in range(len(streamed.blocks)):
        with streamed.block(index) as block:
            experts = streamed.adapter.experts_module(block)
            shape = stream.shape(streamed.adapter.linear_groups(block), experts)
            statistics = BlockStatistics(shape, store, Cache(Memory(1 << 30)))
            given: list[tuple[Tensor, ...]] = []
            hidden: list[Tensor] = []
            if experts is not None:
                experts.register_forward_pre_hook(lambda _, args, into=given: into.append(args))
                block.mlp.register_forward_pre_hook(lambda _, args, into=hidden: into.append(args[0]))
            stream.observe(block, statistics, move=True)
            if experts is not None:
                view = layer_view(block, streamed.adapter, statistics)
                yield Seen(view, block, experts, given[0], hidden[0])


@torch.no_grad()
def library_change(block: Seen, name: str, expert: int, strategy: Strategy) -> float:
    """‖change‖ of the experts' output in float64, by the library's own module with one projection rounded."""
    assert block.view.bank is not None
    module = copy.deepcopy(block.experts).double()
    x, index, score = block.arguments[0].double(), block.arguments[1], block.arguments[2].double()
    before = module(x, index, score)
    weights = {key: value.clone() for key, value in block.view.bank.projections.items()}
    weights[name][expert] = round_trip(weights[name][expert], strategy.bits, strategy.group_size)
    write_projections(module, {key: value.double() for key, value in weights.items()})
    return float((module(x, index, score) - before).norm())


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_sensitivity_is_the_change_of_the_librarys_output(model_type: str, tmp_path: Path) -> None:
    method = MxMoE(strategies=(TWO, FOUR))
    for block in seen(model_type, tmp_path):
        found = method.survey(block.view)["experts"]
        for name, expert, (place, strategy) in itertools.product(
            ("gate", "up", "down"), range(len(found["tokens"])), enumerate(method.strategies)
        ):
            expected = library_change(block, name, expert, strategy)
            assert found["sensitivity"][name][expert][place] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "qwen2_moe"])
def test_sensitivity_of_a_shared_expert_is_the_change_of_the_layers_output(model_type: str, tmp_path: Path) -> None:
    for block in seen(model_type, tmp_path):
        linears = MxMoE(strategies=(TWO, FOUR)).survey(block.view)["linears"]
        shared = [name for name in linears if "shared_expert" in name]
        assert len(shared) == 3
        for name in shared:
            changed = copy.deepcopy(block.block.mlp).double()
            before = changed(block.hidden.double())
            with torch.no_grad():
                own = changed.get_parameter(f"{name.removeprefix('mlp.')}.weight")
                own.copy_(round_trip(own.float(), 2, 128))
            expected = float((changed(block.hidden.double()) - before).norm())
            assert linears[name]["sensitivity"][0] == pytest.approx(expected, rel=1e-3)


def test_sensitivity_of_another_linear_is_the_change_of_its_own_output() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 30, generator=generator), torch.randn(50, 30, generator=generator)
    view = LayerView({"mlp.gate_proj": weight}, {"mlp.gate_proj": LinearStats.from_inputs(x)})
    for method in (MxMoE(strategies=(TWO, FOUR)), MxMoE(strategies=(TWO, FOUR), sensitivity="gptq")):
        found = method.survey(view)["linears"]["mlp.gate_proj"]
        for strategy, value in zip(method.strategies, found["sensitivity"], strict=True):
            gptq = GPTQ(strategy.bits, strategy.group_size).quantize_linear(weight, LinearStats.from_inputs(x))
            rounded = round_trip(weight, strategy.bits, strategy.group_size)
            quantized = gptq.dequantize() if method.sensitivity == "gptq" else rounded
            assert value == pytest.approx(float((x @ (quantized - weight).T).norm()), rel=1e-3)


def one_expert(tokens: int, taken: list[int | None]) -> LayerView:
    """An expert E(x) = W x whose outputs are all alike, so that some of them say as much as all."""
    weight, x = torch.tensor([[[0.5, -1.0, 0.2]]]), torch.ones(tokens, 3)
    own = replace(LinearStats.from_inputs(torch.ones(1, 3)), tokens=tokens)
    stats = BankStats({"weight": [own]}, {"weight": own})

    def output(expert: int, weights: Any, most: int | None) -> Tensor:
        taken.append(most)
        return x[:most] @ weights.get("weight", weight[expert]).T

    return LayerView(bank=ExpertBank({"weight": weight}, (("weight",),)), bank_stats=stats, expert_output=output)


def test_norm_of_some_tokens_is_scaled_to_that_of_all() -> None:
    taken: list[int | None] = []
    method = MxMoE(strategies=(Strategy(1, None), TWO))
    whole, some = (replace(method, tokens=n).survey(one_expert(100, taken))["experts"] for n in (None, 25))
    assert whole["sensitivity"]["weight"][0] == pytest.approx(some["sensitivity"]["weight"][0], rel=1e-5)
    assert set(taken) == {None, 25}


def test_first_step_worked_by_hand() -> None:
    """W = (0.5, -1, 0.2), x = (1, 1, 1) four times.

    One bit: the grid {-1.5, 0} (span 1.5, zero point round(1/1.5) = 1) gives W' = (0, -1.5, 0), for -1 is nearer to
    -1.5 than to 0. The output goes from -0.3 to -1.5: four tokens change by 1.2 each, the norm is 2 · 1.2 = 2.4.
    Two bits: step 0.5, W' = (0.5, -1, 0), -0.5 for -0.3, norm 2 · 0.2 = 0.4.
    """
    method = MxMoE(strategies=(Strategy(1, None), Strategy(2, None)), budget=1.5)
    found = method.survey(one_expert(4, []))
    assert found["experts"]["sensitivity"]["weight"][0] == pytest.approx([2.4, 0.4], rel=1e-3)
    (narrow,) = method.allocate([found])
    assert narrow.options["experts"]["weight"]["bits"] == [1]  # two bits are more than 1.5
    (wide,) = replace(method, budget=2).allocate([found])
    assert wide.options["experts"]["weight"]["bits"] == [2]
    assert wide.options["account"]["sensitivity"] == pytest.approx(0.4, rel=1e-3)
    assert wide.options["account"]["reached"] == 2


def survey(
    costs: Sequence[Sequence[Sequence[float]]], shapes: Sequence[tuple[int, int]] = ((4, 8), (8, 4)), **linears: Any
) -> dict[str, Any]:
    """A finding: `costs` by projection (gate and up, down), expert and strategy."""
    up, down = shapes
    gate, below = costs
    half = [[cost / 2 for cost in row] for row in gate]
    experts = {
        "shapes": {"gate": list(up), "up": list(up), "down": list(down)},
        "tokens": [1] * len(gate),
        "alike": [["gate", "up"], ["down"]],
        "sensitivity": {"gate": half, "up": half, "down": [list(row) for row in below]},
    }
    return {"linears": linears, "experts": experts}


@st.composite
def models(draw: st.DrawFn) -> tuple[MxMoE, list[dict[str, Any]]]:
    """One or two layers of one or two experts, with two or three strategies, and a budget."""
    pool = [Strategy(1, 128), Strategy(2, 96), Strategy(2, None), Strategy(3, 128), Strategy(4, None)]
    chosen = draw(st.lists(st.sampled_from(pool), min_size=2, max_size=3, unique=True))
    cost = st.lists(st.integers(0, 9).map(float), min_size=len(chosen), max_size=len(chosen))
    experts = draw(st.integers(1, 2))
    bank = st.lists(cost, min_size=experts, max_size=experts)
    layers = draw(st.lists(st.tuples(bank, bank), min_size=1, max_size=2))
    method = MxMoE(
        strategies=tuple(chosen),
        budget=draw(st.sampled_from([1.3, 2, 2.25, 2.3, 3.1, 4])),
        scope=draw(st.sampled_from(["model", "layer"])),
        count=draw(st.sampled_from(["nominal", "codes"])),
    )
    return method, [survey(layer) for layer in layers]


def width(method: MxMoE, strategy: Strategy) -> Fraction:
    overhead = Fraction(32, strategy.group_size) if strategy.group_size and method.count == "nominal" else Fraction(0)
    return strategy.bits + overhead


def enumerated(method: MxMoE, surveys: Sequence[dict[str, Any]]) -> float | None:
    """Least sum of sensitivities over all allocations within the budget; gate and up of an expert together."""
    units = []
    for found in surveys:
        own = found["experts"]["sensitivity"]
        for expert in range(len(own["gate"])):
            units.append((64, [sum(pair) for pair in zip(own["gate"][expert], own["up"][expert], strict=True)]))
            units.append((32, own["down"][expert]))
    budget = Fraction(str(method.budget)) * sum(weights for weights, _ in units)
    best = None
    for choice in itertools.product(range(len(method.strategies)), repeat=len(units)):
        parts = list(zip(units, choice, strict=True))
        if sum(weights * width(method, method.strategies[s]) for (weights, _), s in parts) <= budget:
            cost = sum(costs[s] for (_, costs), s in parts)
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=60, deadline=None)
@given(models())
def test_allocation_is_the_best_of_all_and_within_the_budget(model: tuple[MxMoE, list[dict[str, Any]]]) -> None:
    method, surveys = model
    shares = [[found] for found in surveys] if method.scope == "layer" else [surveys]
    best = [enumerated(method, share) for share in shares]
    if any(cost is None for cost in best):
        with pytest.raises(UnsupportedError, match=re.escape(f"budget is {method.budget} bits per weight, but")):
            method.allocate(surveys)
        return
    blocks = method.allocate(surveys)
    account = blocks[0].options["account"]
    assert account["sensitivity"] == pytest.approx(sum(cost for cost in best if cost is not None))
    assert account["bound"] <= account["sensitivity"] + 1e-9
    bits, cost = Fraction(0), 0.0
    for block, found in zip(blocks, surveys, strict=True):
        assert isinstance(block, MixedGPTQ)
        assert block.experts["gate"] == block.experts["up"]
        for name, strategies in block.experts.items():
            for expert, strategy in enumerate(strategies):
                bits += prod(found["experts"]["shapes"][name]) * width(method, strategy)
                cost += found["experts"]["sensitivity"][name][expert][method.strategies.index(strategy)]
    weights = sum(96 * len(found["experts"]["tokens"]) for found in surveys)
    assert bits <= Fraction(str(method.budget)) * weights
    assert account["reached"] == float(bits / weights)
    assert cost == pytest.approx(account["sensitivity"])
    assert sum(entry["count"] for entry in account["units"]) == 2 * weights // 96
    assert [block.options for block in method.allocate(surveys)] == [block.options for block in blocks]


def test_budget_out_of_reach_is_refused_with_both_numbers() -> None:
    found = survey(([[3.0, 1.0]], [[3.0, 1.0]]))
    with pytest.raises(UnsupportedError, match=r"budget is 2\.2 bits per weight, but this model costs 2\.2500"):
        MxMoE(strategies=(TWO, FOUR), budget=2.2).allocate([found])
    with pytest.raises(UnsupportedError, match=r"but layer 1 costs 2\.2500"):
        MxMoE(strategies=(TWO, FOUR), budget=2.2, scope="layer").allocate([{"linears": {}}, found])
    assert MxMoE(strategies=(TWO, FOUR), budget=2.2, count="codes").allocate([found])


def test_experts_without_tokens_have_no_sensitivity_and_the_narrowest_width() -> None:
    found = MxMoE(budget=9).survey(one_expert(0, []))
    assert found["experts"]["sensitivity"]["weight"] == [[0.0] * len(WEIGHT_ONLY)]
    (block,) = MxMoE(budget=9).allocate([found])
    assert block.options["experts"]["weight"]["bits"] == [1]


def linear(*costs: float) -> dict[str, Any]:
    return {"shape": [4, 8]} | ({"sensitivity": list(costs)} if costs else {})


def test_fixed_linears_count_in_the_budget_and_those_in_16_bits_do_not() -> None:
    experts = ([[9.0, 1.0]], [[4.0, 0.0]])  # 96 weights; at 2 and 4 bits without groups
    two, four = Strategy(2, None), Strategy(4, None)
    method = MxMoE(strategies=(two, four), budget=4, dense_layers=Strategy(8, None))
    found = survey(experts, **{"self_attn.q_proj": linear(), "mlp.fc": linear()})
    # the fixed 32 weights cost 256 of 4 · 128 = 512 bits; of the 256 left, 96 · 2 = 192 are the least, 64 more pay
    # for down's step (64), but not for that of gate and up (128)
    (block,) = method.allocate([found])
    assert block.options["linears"] == {
        "self_attn.q_proj": None,
        "mlp.fc": {"bits": 8, "group_size": None},
    }
    assert [block.options["experts"][name]["bits"] for name in ("gate", "up", "down")] == [[2], [2], [4]]
    assert block.options["account"]["reached"] == 4
    (wider,) = replace(method, dense_layers="16bit").allocate([found])
    assert [wider.options["experts"][name]["bits"] for name in ("gate", "up", "down")] == [[4], [4], [4]]


def test_gate_and_up_of_a_shared_expert_are_alike_and_attention_may_be_allocated() -> None:
    names = [f"mlp.shared_expert.{role}" for role in ("gate_proj", "up_proj", "down_proj")]
    costs = dict(zip(names, (linear(9, 0), linear(1, 0), linear(4, 0)), strict=True))
    costs |= {"self_attn.q_proj": linear(2, 0), "self_attn.k_proj": linear(3, 0)}
    method = MxMoE(strategies=(Strategy(2, None), Strategy(4, None)), budget=3.2, attention="allocated")
    (block,) = method.allocate([{"linears": costs}])
    # five of 32 weights: 3.2 bits leave three steps; gate and up take two and save 10, down's saves 4
    bits = {name.rpartition(".")[2]: strategy["bits"] for name, strategy in block.options["linears"].items()}
    assert bits == {"gate_proj": 4, "up_proj": 4, "down_proj": 4, "q_proj": 2, "k_proj": 2}


def test_a_matrix_by_itself_gets_the_widest_strategy_that_fits() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(16, 256, generator=generator), torch.randn(64, 256, generator=generator)
    trial, _ = try_method("mxmoe", MxMoE(), weight, x)
    assert trial.bits["paper"] == 2.25
    trial, _ = try_method("mxmoe", MxMoE(budget=4.1), weight, x)
    assert trial.bits["paper"] == 4.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0; expected a positive number"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"strategies": ()}, "strategies are none"),
        ({"strategies": (TWO, TWO)}, "none of them twice"),
        ({"tokens": 0}, "tokens is 0; expected at least 1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"percdamp": -1.0}, "percdamp is -1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MxMoE(**options)


def test_model_is_stored_at_the_widths_of_its_record_twice_the_same(tmp_path: Path) -> None:
    folder, method = model_folder("qwen2_moe", tmp_path), MxMoE(budget=3.0)
    report = quantize(folder, method, TOKENS, tmp_path / "out", fingerprint="job")
    chosen = set()
    for index, entry in enumerate(report.blocks):
        allocation, found = entry["allocation"], entry["survey"]
        stored = load_block(block_path(tmp_path / "out", index)).block
        for name, bank in stored.experts.items():
            bits = [expert.bits for expert in bank.experts]
            assert bits == allocation["experts"][name]["bits"]
            chosen |= set(bits)
        assert isinstance(stored.linears["self_attn.q_proj"], Dense16)
        assert len(found["experts"]["sensitivity"]["down"][0]) == len(WEIGHT_ONLY)
        assert allocation["account"]["reached"] <= 3.0
    assert len(chosen) > 1  # widths differ
    parts = [report.components[name] for name in ("experts", "shared_experts")]
    mean = sum(part["paper"] * part["weights"] for part in parts) / sum(part["weights"] for part in parts)
    assert mean == pytest.approx(report.blocks[0]["allocation"]["account"]["reached"])
    quantize(folder, method, TOKENS, tmp_path / "again", fingerprint="job")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "again")
