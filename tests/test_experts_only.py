"""A method restricted to the experts: its own bytes there, 16 bits everywhere else."""

from __future__ import annotations

import pytest
import torch
from test_method_contract import HIDDEN, WIDTH, assert_same, layer, stats

from mobie.config import load_method
from mobie.errors import ConfigError
from mobie.jobs.stale import quantize_code
from mobie.methods.experts_only import INNER, ExpertsOnly
from mobie.packing.dense import Dense16
from mobie.provenance import import_closure


@pytest.mark.parametrize("config", ["billm", "arb-llm", "gptq-w2"])
def test_experts_have_the_bytes_of_the_method_itself(config: str) -> None:
    bank, statistics = layer(1)
    own = load_method(config).build().quantize_experts(bank, statistics)
    restricted = load_method(f"{config}-experts").build().quantize_experts(bank, statistics)
    assert own.keys() == restricted.keys()
    for name, packed in own.items():
        assert_same(packed, restricted[name])


def test_other_linears_stay_in_16_bits() -> None:
    weights = {name: torch.randn(WIDTH, HIDDEN) for name in ("q_proj", "k_proj")}
    packed = load_method("billm-experts").build().quantize_group(weights, dict.fromkeys(weights, stats(HIDDEN, 1, 0)))
    for name, weight in weights.items():
        assert isinstance(packed[name], Dense16)
        assert torch.equal(packed[name].dequantize(), weight.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "bilm"}, "billm"),
        ({"inner": "billm", "inner_options": {"block_siz": 64}}, "block_size"),
        ({"inner": "billm", "inner_options": {"block_size": 0}}, "block_size"),
        ({"inner": "arb", "inner_options": {"saliency_source": "guided"}}, "saliency_source"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertsOnly(**options)  # type: ignore[arg-type]


def test_a_change_of_an_inner_method_makes_results_stale() -> None:
    assert quantize_code("experts-only")
    closure = import_closure(["mobie.methods.experts_only"])
    assert {cls.__module__ for cls in INNER} <= set(closure)
