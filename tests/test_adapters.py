"""Adapters against the library's own models: every architecture of the registry, shrunken."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, EXPERTS, HIDDEN, TOP_K, WIDTH, experts_by_hand, inner_by_hand, make_model

from mobie.errors import DataError, UnsupportedError
from mobie.models.base import ARCHITECTURES, Adapter, require_finite
from mobie.packing.bank import GATE_UP

MODEL_TYPES = sorted(ARCHITECTURES)
#: matrices that stay in 16 bits: routers, the gate of a shared expert, biases of experts, what steers linear attention
KEPT = {
    "mlp.gate.weight",
    "mlp.router.weight",
    "mlp.shared_expert_gate.weight",
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down_proj_bias",
    "linear_attn.in_proj_ba.weight",
    "linear_attn.conv1d.weight",
}


def test_every_architecture_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_read_write_read_is_bit_identical(model_type: str) -> None:
    model, target = make_model(model_type, seed=0), make_model(model_type, seed=1)
    adapter = Adapter(model_type)
    for source_block, target_block in zip(adapter.blocks(model), adapter.blocks(target), strict=True):
        bank = adapter.expert_bank(source_block)
        if bank is None:
            continue
        before = {n: p.clone() for n, p in target_block.named_parameters()}
        adapter.write_experts(target_block, bank.projections)
        for name, parameter in target_block.named_parameters():
            written = name.endswith(("experts.gate_up_proj", "experts.down_proj"))  # not the biases
            assert torch.equal(parameter, source_block.get_parameter(name) if written else before[name]), name
        again = adapter.expert_bank(target_block)
        assert all(torch.equal(again.projections[n], w) for n, w in bank.projections.items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bank_has_experts_out_in_shapes_and_top_k(model_type: str) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    bank = adapter.expert_bank(adapter.blocks(model)[1])
    assert {n: tuple(w.shape) for n, w in bank.projections.items()} == {
        "gate": (EXPERTS, WIDTH, HIDDEN),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }
    assert bank.active == TOP_K
    assert all(w.dtype == torch.float32 for w in bank.projections.values())
    assert adapter.router(adapter.blocks(model)[1]).weight.shape == (EXPERTS, HIDDEN)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gate_up_and_down_compute_the_librarys_expert(model_type: str) -> None:
    """Gate and up are not swapped, down is not transposed: one expert by hand against the library's module."""
    model = make_model(model_type)
    adapter = Adapter(model_type)
    block = adapter.blocks(model)[1]
    bank = adapter.expert_bank(block)
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = adapter.experts_module(block)(x, torch.full((7, 1), 4), torch.ones(7, 1)).double()
    own = experts_by_hand(adapter.experts_module(block))  # for its biases, which the bank leaves where they are
    gate, up = (x.double() @ bank.projections[n][4].double().T + own[f"{n}_bias"][4] for n in ("gate", "up"))
    inner = inner_by_hand(adapter.experts_module(block), gate, up)
    expected = inner @ bank.projections["down"][4].double().T + own["down_bias"][4]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_weight_matrices_of_a_block_are_quantized_or_known_to_be_kept(model_type: str) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    for block in adapter.blocks(model):
        matrices = {n for n, p in block.named_parameters() if p.ndim > 1}
        kept = {n for n in matrices if n in KEPT}
        assert adapter.quantized_parameters(block, router=False) == matrices - kept
        router = {f"{adapter.architecture.router}.weight"} & matrices
        assert adapter.quantized_parameters(block, router=True) == (matrices - kept) | router


def test_dense_block_has_no_bank_and_its_mlp_is_linears() -> None:
    model = make_model("qwen3_moe")
    adapter = Adapter("qwen3_moe")
    dense, sparse = adapter.blocks(model)
    assert adapter.expert_bank(dense) is None
    assert adapter.router(dense) is None
    assert [sorted(g) for g in adapter.linear_groups(dense)][2:] == [
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert len(adapter.linear_groups(sparse)) == 2  # the router `mlp.gate` is no dense `gate_proj`


def test_blocks_with_linear_and_with_full_attention_have_their_own_linears() -> None:
    adapter = Adapter("qwen3_next")
    linear, full = adapter.blocks(make_model("qwen3_next"))
    shared = [["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], ["mlp.shared_expert.down_proj"]]
    assert [sorted(g) for g in adapter.linear_groups(linear)] == [
        ["linear_attn.in_proj_qkvz"],
        ["linear_attn.out_proj"],
        *shared,
    ]
    attention = [["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    assert [sorted(g) for g in adapter.linear_groups(full)] == [*attention, *shared]


def test_experts_with_alternating_rows_are_written_back_as_they_alternate() -> None:
    """GPT-OSS: `gate_up_proj[e, i, 2r]` is the gate's `(r, i)`, `[e, i, 2r + 1]` the one of up."""
    model = make_model("gpt_oss")
    adapter = Adapter("gpt_oss")
    block = adapter.blocks(model)[0]
    shape = (EXPERTS, WIDTH, HIDDEN)
    code = torch.arange(EXPERTS * WIDTH * HIDDEN).float().reshape(shape)
    down = torch.arange(EXPERTS * WIDTH * HIDDEN).float().reshape(EXPERTS, HIDDEN, WIDTH)
    adapter.write_experts(block, {"gate": code, "up": -code, "down": down})
    fused = block.mlp.experts.gate_up_proj
    assert fused[2, 5, 2 * 7] == code[2, 7, 5] and fused[2, 5, 2 * 7 + 1] == -code[2, 7, 5]
    assert block.mlp.experts.down_proj[2, 7, 5] == down[2, 5, 7]


def test_shared_expert_linears_share_their_input() -> None:
    adapter = Adapter("qwen2_moe")
    groups = [sorted(g) for g in adapter.linear_groups(adapter.blocks(make_model("qwen2_moe"))[0])]
    assert groups[2:] == [
        ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
        ["mlp.shared_expert.down_proj"],
    ]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_block_prefix_names_the_state_dict(model_type: str) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    state = model.state_dict()
    for index, block in enumerate(adapter.blocks(model)):
        for name in adapter.quantized_parameters(block, router=True):
            assert adapter.block_prefix(index) + name in state


def test_gate_up_stored_as_one_bank_is_split_gate_first() -> None:
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    block = adapter.blocks(model)[0]
    bank = adapter.expert_bank(block)
    before = block.mlp.experts.gate_up_proj.clone()
    together = torch.cat([bank.projections["gate"], bank.projections["up"]])
    block.mlp.experts.gate_up_proj.data.zero_()
    adapter.write_experts(block, {GATE_UP: together, "down": bank.projections["down"]})
    assert torch.equal(block.mlp.experts.gate_up_proj, before)


def test_unknown_architecture_names_the_near_ones() -> None:
    with pytest.raises(UnsupportedError, match="'qwen3-moe'.*did you mean.*qwen3_moe"):
        Adapter("qwen3-moe")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_refused_with_its_name_and_count(value: float) -> None:
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    block = adapter.blocks(model)[0]
    with torch.no_grad():
        block.mlp.experts.down_proj[2, 3, :2] = value
    with pytest.raises(DataError, match=rf"experts\.down: 2 of {EXPERTS * HIDDEN * WIDTH} values.*expected finite"):
        adapter.expert_bank(block)
    require_finite("weight", torch.ones(3))  # and a finite one passes
