"""A bit width per Linear and expert: the same bytes as GPTQ of that width, and packing, counting, storing, loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expert_chunks import Watched, larger_layer, per_expert
from test_method_contract import EXPERTS, HIDDEN, WIDTH, assert_same, layer, stats

from mobie.errors import ConfigError
from mobie.methods.base import BankStats
from mobie.methods.gptq import GPTQ
from mobie.methods.mixed_bits import MixedGPTQ, Strategy
from mobie.packing.bank import PackedBank
from mobie.packing.checkpoint import BlockNames, PackedBlock, load_block, save_block
from mobie.try_method import round_trip

TWO, THREE, FOUR = Strategy(2, 128), Strategy(3, None), Strategy(4, 32)
MIXED = MixedGPTQ(experts={"gate": (TWO, FOUR, TWO) * 2, "up": (TWO, TWO, THREE) * 2, "down": (FOUR, THREE, TWO) * 2})


@settings(max_examples=8, deadline=None)
@given(bits=st.integers(1, 8), group_size=st.sampled_from([None, 32, 128]))
def test_equal_widths_give_the_bytes_of_gptq(bits: int, group_size: int | None) -> None:
    plain, one = GPTQ(bits, group_size), Strategy(bits, group_size)
    bank, statistics = layer(1)
    mixed = MixedGPTQ({"self_attn.q_proj": one}, dict.fromkeys(bank.projections, (one,) * EXPERTS))
    expected, found = plain.quantize_experts(bank, statistics), mixed.quantize_experts(bank, statistics)
    for name, packed in expected.items():
        assert_same(packed, found[name])
    weight, own = bank.projections["gate"][0], stats(HIDDEN, 1, 3)
    linear = plain.quantize_linear(weight, own)
    assert_same(linear, mixed.quantize_linear(weight, own))
    assert_same(linear, mixed.quantize_group({"q_proj": weight}, {"q_proj": own})["q_proj"])


def test_each_expert_has_the_bytes_of_gptq_at_its_width_for_any_chunks_and_devices() -> None:
    bank, statistics = larger_layer(1)
    packed = MIXED.quantize_experts(bank, statistics)
    for name, strategies in MIXED.experts.items():
        for expert, strategy in enumerate(strategies):
            plain = GPTQ(strategy.bits, strategy.group_size)
            assert_same(plain.quantize_experts(bank, statistics)[name].experts[expert], packed[name].experts[expert])
    one = MIXED.expert_bytes([bank.projections[name].shape[1:] for name in ("gate", "up")])
    for devices, chunk in (((), 1), ((torch.device("cpu"),) * 2, 4)):
        chunked = MIXED.quantize_experts(replace(bank, devices=devices, chunk_bytes=chunk * one), statistics)
        for name, part in packed.items():
            assert_same(part, chunked[name])


def test_statistics_are_asked_for_once_in_order_and_not_kept() -> None:
    bank, plain = larger_layer(1)
    watched = {name: Watched(own) for name, own in plain.experts.items()}
    budget = 2 * per_expert("gptq-w2-g128", bank, "gate", "up")
    MIXED.quantize_experts(replace(bank, chunk_bytes=budget), BankStats(watched, plain.pooled, plain.tokens))
    assert watched["gate"].asked == watched["down"].asked == list(range(2 * EXPERTS))
    assert watched["up"].asked == []
    assert watched["gate"].most_alive <= 2


def test_mixed_bank_is_counted_stored_and_loaded(tmp_path: Path) -> None:
    bank, statistics = larger_layer(1)
    packed = MIXED.quantize_experts(bank, statistics)
    gate = packed["gate"]
    assert round_trip(gate).dequantize().equal(gate.dequantize())
    ledger = gate.ledger()
    assert sum(item.bytes for item in ledger.items) == sum(tensor.nbytes for tensor in gate.tensors().values())
    assert ledger.code_bits == pytest.approx((4 * 2 + 2 * 4) / 6)  # HIDDEN is a multiple of 8: no padding
    assert ledger.paper_bits == pytest.approx((4 * 2.25 + 2 * 5) / 6)
    assert ledger.paper_bits == gate.paper_bits()
    path = tmp_path / "block.safetensors"
    save_block(path, PackedBlock({}, packed), "fingerprint", {}, BlockNames("model.layers.0.", "mlp.experts"))
    for name, part in load_block(path, verify=True).block.experts.items():
        assert isinstance(part, PackedBank)
        assert_same(packed[name], part)


def test_a_linear_without_a_width_and_an_ambiguous_name_are_refused() -> None:
    weight, own = torch.ones(WIDTH, HIDDEN), stats(HIDDEN, 1, 3)
    with pytest.raises(ConfigError, match=r"no bit width for the Linear 'k_proj'.*self_attn\.q_proj"):
        MixedGPTQ({"self_attn.q_proj": TWO}).quantize_group({"k_proj": weight}, {"k_proj": own})
    with pytest.raises(ConfigError, match=r"b\.gate_proj: .* ends in 'gate_proj'"):
        MixedGPTQ({"a.gate_proj": TWO, "b.gate_proj": FOUR})
    with pytest.raises(ConfigError, match="bits is 9"):
        Strategy(9)
