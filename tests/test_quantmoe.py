"""QuantMoE-Bench: who is promoted, by brute force and by invariants, and what a model then stores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapter_contract import statistics, statistics_of, tiny_blocks
from test_hf_loading import assert_as_dequantized
from test_method_contract import assert_same, layer
from tiny import make_model, random_tokens, save_model

from mobie.config import load_method
from mobie.errors import ConfigError, UnsupportedError
from mobie.methods.allocation import LayerView
from mobie.methods.gptq import GPTQ
from mobie.methods.quantmoe import QuantMoE, outlier_score
from mobie.models.base import ARCHITECTURES, Adapter
from mobie.packing.checkpoint import block_path, load_block
from mobie.pipeline import quantize

NAMES = ("gate", "up", "down")
SIZE = 8 * 16  # weights of a projection in the surveys made up here


def survey(tokens: Sequence[int], outliers: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """A block with attention of a tenth of the experts' weights; every projection is `(8, 16)`."""
    experts = len(tokens)
    return {
        "linears": {"self_attn.q_proj": [1, 3 * SIZE * experts // 10]},
        "experts": {
            "shapes": {name: [experts, 8, 16] for name in NAMES},
            "tokens": list(tokens),
            "outliers": dict(outliers or {name: [1.0] * experts for name in NAMES}),
        },
    }


def widths(method: QuantMoE, surveys: Sequence[dict[str, Any]]) -> list[dict[str, tuple[int, ...]]]:
    """Bits of every expert by projection, block by block."""
    return [
        {name: tuple(s.bits for s in own) for name, own in block.experts.items()} for block in method.allocate(surveys)
    ]


def account(method: QuantMoE, surveys: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return dict(method.allocate(surveys)[0].account)


tokens = st.lists(st.integers(0, 1000), min_size=10, max_size=10, unique=True)
budgets = st.integers(220, 390).map(lambda hundredths: hundredths / 100)


# ---- who is promoted -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(tokens=tokens, budget=budgets)
def test_of_all_sets_of_experts_within_the_budget_the_most_used_one_is_promoted(
    tokens: list[int], budget: float
) -> None:
    surveys = [survey(tokens)]
    (found,) = widths(QuantMoE(budget=budget, granularity="expert"), surveys)
    attention, expert = 4 * 3 * SIZE, 3 * SIZE  # ten experts: 4 bits times a tenth of their weights
    most = Fraction(str(budget)) * 11 * expert

    def cost(chosen: tuple[int, ...]) -> int:
        return attention + expert * (2 * (10 - len(chosen)) + 4 * len(chosen))

    sets = [chosen for n in range(11) for chosen in combinations(range(10), n) if cost(chosen) <= most]
    best = max(sets, key=lambda chosen: (len(chosen), sum(tokens[e] for e in chosen)))
    assert sum(tokens[e] for e in best) == max(sum(tokens[e] for e in chosen) for chosen in sets)
    for name in NAMES:
        assert found[name] == tuple(4 if e in best else 2 for e in range(10))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(tokens, min_size=1, max_size=3),
    budget=budgets,
    more=budgets,
    rule=st.sampled_from(["frequency", "outlier", "first_blocks", "random"]),
    granularity=st.sampled_from(["projection", "expert"]),
    scope=st.sampled_from(["model", "block"]),
)
def test_budget_is_met_from_below_and_more_of_it_takes_bits_from_nobody(
    blocks: list[list[int]], budget: float, more: float, rule: Any, granularity: Any, scope: Any
) -> None:
    budget, more = sorted((budget, more))
    outliers = {name: [1.0 + (7 * e + i) % 10 for e in range(10)] for i, name in enumerate(NAMES)}
    surveys = [survey(own, outliers) for own in blocks]
    method = QuantMoE(budget=budget, promote_by=rule, granularity=granularity, scope=scope)
    found = account(method, surveys)
    unit = (1 if granularity == "projection" else 3) * 2 / (33 * 10 * len(blocks) / 10)  # bits per weight that one adds
    assert found["reached"] <= budget
    assert found["reached"] > budget - unit - 1e-9 or found["promoted"] == found["units"]
    # counted anew from the widths
    before, after = widths(method, surveys), widths(replace(method, budget=more), surveys)
    bits = sum(sum(own) * SIZE for block in before for own in block.values()) + len(blocks) * 4 * 3 * SIZE
    assert found["reached"] == pytest.approx(bits / (len(blocks) * 33 * SIZE))
    for old, new in zip(before, after, strict=True):
        assert all(a <= b for name in NAMES for a, b in zip(old[name], new[name], strict=True))


@settings(max_examples=30, deadline=None)
@given(tokens=tokens, budget=budgets, order=st.permutations(range(10)), rule=st.sampled_from(["frequency", "outlier"]))
def test_experts_in_another_order_have_their_widths_in_that_order(
    tokens: list[int], budget: float, order: list[int], rule: Any
) -> None:
    method = QuantMoE(budget=budget, promote_by=rule)
    outliers = {name: [3.0 * e + i for e in range(10)] for i, name in enumerate(NAMES)}
    other = {name: [own[e] for e in order] for name, own in outliers.items()}
    (found,) = widths(method, [survey(tokens, outliers)])
    (moved,) = widths(method, [survey([tokens[e] for e in order], other)])
    for name in NAMES:
        assert moved[name] == tuple(found[name][e] for e in order)


def test_by_frequency_whole_experts_are_promoted_all_but_the_last_and_there_the_outliers_first() -> None:
    outliers = {"gate": [1.0] * 10, "up": [5.0] * 10, "down": [3.0] * 10}
    surveys = [survey([10, 90, 0, 0, 0, 0, 0, 0, 0, 0], outliers), survey([20, 0, 80, 0, 0, 0, 0, 0, 0, 0], outliers)]
    method = QuantMoE(budget=2.3)
    # 66 projections' worth of weights; 2.3 · 66 = 151.8; attention 24 and experts 120 leave 7.8, a projection takes 2
    first, second = widths(method, surveys)
    assert account(method, surveys)["promoted"] == 3
    assert [first[name][1] for name in NAMES] == [4, 4, 4]
    assert {name: [e for e, bits in enumerate(second[name]) if bits == 4] for name in NAMES} == dict.fromkeys(NAMES, [])
    second = widths(replace(method, budget=2.31), surveys)[1]  # 0.66 more: one projection
    assert {name: [e for e, bits in enumerate(second[name]) if bits == 4] for name in NAMES} == {
        **{"gate": [], "up": [2], "down": []}
    }


def promoted(method: QuantMoE, surveys: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(block, expert) of every promoted expert."""
    found = widths(method, surveys)
    return [(b, e) for b, block in enumerate(found) for e, bits in enumerate(block["gate"]) if bits == 4]


def test_other_rules_and_scopes() -> None:
    outliers = {name: [1.0] * 9 + [9.0] for name in NAMES}
    surveys = [survey([50, 0, 0, 0, 0, 0, 0, 0, 0, 1]), survey([60, 59, 0, 0, 0, 0, 0, 0, 0, 1], outliers)]
    one = QuantMoE(budget=2.32, granularity="expert")  # 66 · 2.32 - 144 = 9.1: one expert of 6 bits
    two = replace(one, budget=2.4)  # 14.4: two
    assert promoted(one, surveys) == [(0, 0)]  # 50 of its layer's 51 choices, the other 60 of 120
    assert promoted(two, surveys) == [(0, 0), (1, 0)]
    assert promoted(replace(one, promote_by="outlier"), surveys) == [(1, 9)]
    assert promoted(replace(two, promote_by="first_blocks"), surveys) == [(0, 0), (0, 9)]
    many = replace(one, budget=2.5)  # 21: three
    assert promoted(many, surveys) == [(0, 0), (1, 0), (1, 1)]
    crowded = [survey([50, 50, 0] + [0] * 7), survey([30, 30, 40] + [0] * 7)]
    assert promoted(two, crowded) == [(0, 0), (0, 1)]
    assert promoted(replace(two, scope="block"), crowded) == [(0, 0), (1, 2)]


def test_random_order_is_that_of_the_seed() -> None:
    surveys = [survey(range(10)), survey(range(10))]
    drawn = [promoted(QuantMoE(3.0, "random", "expert", seed=seed), surveys) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(own) for own in drawn}) == 3
    assert len({len(own) for own in drawn}) == 1


def test_equal_experts_go_by_their_place_in_the_model() -> None:
    surveys = [survey([0] * 10), survey([0] * 10)]
    assert promoted(QuantMoE(2.4, granularity="expert"), surveys) == [(0, 0), (0, 1)]


# ---- what counts -----------------------------------------------------------------------------------------------------


def test_budget_is_the_decimal_number_as_written() -> None:
    """Twenty experts and no attention: each promotion adds a tenth, three of them are 2.3 bits to the last digit."""
    surveys = [survey(range(20)) | {"linears": {}}]
    found = account(QuantMoE(budget=2.3, granularity="expert"), surveys)
    assert found == {"budget": 2.3, "reached": 2.3, "floor": 2.0, "ceiling": 4.0, "units": 20, "promoted": 3}


def test_group_overhead_counts_where_it_is_asked_for() -> None:
    surveys = [survey(range(10))]
    plain, counted = (account(QuantMoE(3.0, count_groups=groups), surveys) for groups in (False, True))
    assert counted["floor"] == pytest.approx(plain["floor"] + 32 / 128)
    assert counted["promoted"] < plain["promoted"]
    assert account(QuantMoE(3.0, count_groups=True, group_size=None), surveys) == account(
        QuantMoE(3.0, group_size=None), surveys
    )


def test_every_kind_of_linear_has_its_width() -> None:
    method = QuantMoE(3.0, attention_bits=5, shared_bits=6, dense_bits=7)
    dense = {"linears": {"self_attn.q_proj": [1, 8], "mlp.gate_proj": [1, 8]}}
    moe = survey(range(10)) | {"linears": {"linear_attn.out_proj": [1, 8], "mlp.shared_experts.up_proj": [1, 8]}}
    first, second = method.allocate([dense, moe])
    assert {name: s.bits for name, s in first.linears.items()} == {"self_attn.q_proj": 5, "mlp.gate_proj": 7}
    assert first.experts == {}
    assert {name: s.bits for name, s in second.linears.items()} == {
        "linear_attn.out_proj": 5,
        "mlp.shared_experts.up_proj": 6,
    }
    assert {s.group_size for s in second.linears.values()} == {128}


def test_budget_out_of_reach_is_refused_with_both_ends() -> None:
    surveys = [survey(range(10))]
    with pytest.raises(UnsupportedError, match=r"budget is 2\.1 bits .* 2\.1818 .* 4\.0000 .*raise the budget"):
        QuantMoE(2.1).allocate(surveys)
    with pytest.raises(UnsupportedError, match=r"budget is 4\.5 bits .* 4\.0000 .*lower the budget"):
        QuantMoE(4.5).allocate(surveys)
    assert account(QuantMoE(4.0), surveys)["promoted"] == 30
    floor = replace(QuantMoE(2.0), attention_bits=2)
    assert account(floor, surveys)["promoted"] == 0


def test_model_without_experts_has_nothing_to_share_out() -> None:
    (found,) = QuantMoE(2.3).allocate([{"linears": {"weight": [4, 8]}}])
    assert found.linears["weight"].bits == 4
    assert found.account["reached"] == 4.0 and found.account["units"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promoted_bits": 2}, r"promoted_bits is 2; expected more than expert_bits, 2"),
        ({"budget": 0}, r"budget is 0; expected a positive number"),
        ({"budget": float("nan")}, r"budget is nan"),
        ({"attention_bits": 9}, r"attention_bits: bits is 9; expected an integer from 1 to 8"),
        ({"group_size": 0}, r"group_size is 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantMoE(**options)


# ---- what is surveyed ------------------------------------------------------------------------------------------------


def test_outlier_score_is_the_largest_ratio_of_a_columns_greatest_to_its_mean_magnitude() -> None:
    weight = torch.tensor([[1.0, 0.0, -4.0], [-3.0, 0.0, 4.0]])
    assert outlier_score(weight).item() == 1.5  # 3 / 2; equal magnitudes give 1, zeros nothing
    assert outlier_score(torch.zeros(2, 3)).item() == 0
    bank = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(1))
    magnitude = np.abs(bank.double().numpy())
    expected = [(m.max(axis=0) / m.mean(axis=0)).max() for m in magnitude]
    assert outlier_score(bank).tolist() == pytest.approx(expected, rel=1e-6)


def view(block: Any, adapter: Adapter) -> LayerView:
    linears = {name: m.weight.detach() for group in adapter.linear_groups(block) for name, m in group.items()}
    stats = {name: statistics(weight.shape[1], 1, 0) for name, weight in linears.items()}
    bank = adapter.expert_bank(block)
    return LayerView(linears, stats, bank, None if bank is None else statistics_of(bank, 1))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_is_surveyed_and_shared_out(model_type: str) -> None:
    adapter, method = Adapter(model_type), QuantMoE(budget=3.9)
    blocks = tiny_blocks(model_type)
    surveys = [method.survey(view(block, adapter)) for block in blocks]
    assert json.loads(json.dumps(surveys)) == surveys
    made = method.allocate(surveys)
    total = bits = 0
    for block, own in zip(blocks, made, strict=True):
        bank = adapter.expert_bank(block)
        assert own.linears.keys() == {name for group in adapter.linear_groups(block) for name in group}
        assert own.experts.keys() == (set() if bank is None else set(bank.projections))
        total += sum(block.get_parameter(name).numel() for name in adapter.quantized_parameters(block, router=False))
        bits += sum(s.bits * block.get_parameter(f"{name}.weight").numel() for name, s in own.linears.items())
        for name, strategies in own.experts.items():
            bits += sum(s.bits * bank.projections[name][0].numel() for s in strategies)
    assert made[0].account["reached"] == pytest.approx(bits / total)
    assert 0 < made[0].account["promoted"] < made[0].account["units"]


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_first_step_by_hand() -> None:
    """Three experts that see 300 tokens each: of their nine equal projections the budget pays for one more bit pair."""
    bank, stats = layer(1)
    method = QuantMoE(budget=2.3).over(LayerView(bank=bank, bank_stats=stats))
    score, name = max((float(outlier_score(weight[0])), name) for name, weight in bank.projections.items())
    assert score > 1
    found = {n: [s.bits for s in own] for n, own in method.experts.items()}
    assert found == {n: [4 if n == name else 2, 2, 2] for n in bank.projections}
    packed = method.quantize_experts(bank, stats)
    for n, own in found.items():
        for expert, bits in enumerate(own):
            plain = GPTQ(bits, 128).quantize_experts(bank, stats)[n].experts[expert]
            assert torch.equal(packed[n].experts[expert].codes, plain.codes)
            assert packed[n].experts[expert].paper_bits() == pytest.approx((8 * 2 + 4) / 9)


@pytest.mark.parametrize("model_type", ["deepseek", "olmoe"])
def test_a_model_is_stored_with_its_widths_and_loads_in_the_library(model_type: str, tmp_path: Path) -> None:
    """DeepSeek: the first block is dense, the second has shared experts."""
    source = save_model(make_model(model_type), tmp_path / "source")
    method = load_method("quantmoe-2.3+budget=3.4+group_size=16").build()
    report = quantize(source, method, random_tokens(2, 12), tmp_path / "out", fingerprint="job")
    reached = report.blocks[0]["allocation"]["account"]["reached"]
    assert 3.2 < reached <= 3.4
    assert report.ledger.paper_bits == pytest.approx(reached)
    for index, entry in enumerate(report.blocks):
        stored, told = load_block(block_path(tmp_path / "out", index)).block, entry["allocation"]
        assert {name: part.bits for name, part in stored.linears.items()} == {
            name: own["bits"] for name, own in told["linears"].items()
        }
        for name, bank in stored.experts.items():
            assert [part.bits for part in bank.experts] == told["experts"][name]["bits"]
    widths = {
        bits for entry in report.blocks for own in entry["allocation"]["experts"].values() for bits in own["bits"]
    }
    assert widths == {2, 4}
    assert_as_dequantized(tmp_path / "out")


def test_everything_promoted_is_gptq_at_four_bits() -> None:
    bank, stats = layer(1)
    packed = QuantMoE(budget=4.0).over(LayerView(bank=bank, bank_stats=stats)).quantize_experts(bank, stats)
    for name, plain in GPTQ(4, 128).quantize_experts(bank, stats).items():
        for ours, theirs in zip(packed[name].experts, plain.experts, strict=True):
            assert_same(replace(ours, paper=theirs.paper), theirs)
