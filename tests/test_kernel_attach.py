"""Experts and whole models computed by kernels against the library's own forward on dequantized weights."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import random_experts
from test_method_contract import stats
from tiny import CONFIGS, EXPERTS, HIDDEN, TOP_K, WIDTH, make_model, random_tokens
from torch import Tensor, nn

from mobie.config import build_method, load_method
from mobie.errors import ConfigError, UnsupportedError
from mobie.hf.modules import PackedExperts, PackedLinear, PackedWeights, pack_model
from mobie.kernels import backend, twins
from mobie.kernels.attach import attach, attach_dense, detach
from mobie.kernels.experts import dense_forward, experts_forward, tile_size
from mobie.kernels.layout import DenseExperts, lay_out_experts
from mobie.methods.base import BankStats
from mobie.models.base import Adapter
from mobie.packing.bank import SymmetricRows, split_gate_up
from mobie.packing.base import Packed
from mobie.packing.checkpoint import PackedBlock
from mobie.provenance import import_closure

#: architectures whose experts the kernels compute: not GPT-OSS, with its biases and clamps
KERNEL_EXPERTS = [model_type for model_type in CONFIGS if model_type != "gpt_oss"]
#: architecture → classes of modules that the library goes on computing
LIBRARY_COMPUTES = {
    "gpt_oss": {"PackedGptOssExperts", "GptOssTopKRouter", "GptOssRMSNorm"},
    "qwen3_next": {"Qwen3NextRMSNorm"},  # it multiplies with 1 + weight
}
#: what experts' weights can look like
FORMS: dict[str, dict[str, Any]] = {
    "left": {},
    "right": {"side": "right"},
    "mixed sides": {"side": "left", "down_side": "right"},
    "mixed sides too": {"side": "right", "down_side": "left"},
    "fused": {"fused": True},
    "fused right": {"fused": True, "side": "right"},
    "no basis": {"basis": None},
    "16-bit basis": {"basis": 16},
    "4-bit basis": {"basis": 4},
    "truncated": {"rank": 11},
    "truncated right": {"rank": 11, "side": "right"},
    "no salient columns": {"most_salient": 0},
    "all columns salient": {"most_salient": 1000},
}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations in plain torch, whatever this machine could run."""
    monkeypatch.setenv(backend.VARIABLE, "torch")
    backend.say_once.cache_clear()
    backend._load.cache_clear()


@cache
def library_experts(model_type: str) -> nn.Module:
    adapter = Adapter(model_type)
    found = (adapter.experts_module(block) for block in adapter.blocks(make_model(model_type)))
    return next(module for module in found if module is not None)


def run_library(module: nn.Module, packed: dict[str, Packed], *inputs: Tensor) -> Tensor:
    """The library's own loop over experts, on dequantized weights in float64."""
    module = copy.deepcopy(module).double()
    module.config._experts_implementation = "eager"
    dense = split_gate_up({name: bank.dequantize(torch.float64) for name, bank in packed.items()})
    with torch.no_grad():
        module.gate_up_proj.copy_(torch.cat([dense["gate"], dense["up"]], dim=1))
        module.down_proj.copy_(dense["down"])
        hidden, index, weights = inputs
        return module(hidden.double(), index, weights.double())


def routed(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and weights of tokens; the last expert gets none, expert 0 at most one."""
    generator = torch.Generator().manual_seed(seed)
    rows = [1 + torch.randperm(EXPERTS - 2, generator=generator)[:TOP_K] for _ in range(tokens)]
    index = torch.stack(rows) if tokens else torch.zeros(0, TOP_K, dtype=torch.int64)
    if tokens:
        index[0, 0] = 0
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    return hidden, index, torch.rand(tokens, TOP_K, generator=generator)


def assert_near(found: Tensor, expected: Tensor, share: float) -> None:
    """Closer than `share` of the largest value."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_experts_of_every_form_are_the_librarys(form: str, tokens: int) -> None:
    packed = random_experts(EXPERTS, HIDDEN, WIDTH, **FORMS[form])
    layout = lay_out_experts(packed, "silu")
    inputs = routed(tokens)
    expected = run_library(library_experts("olmoe"), packed, *inputs)
    found = experts_forward(layout, *inputs, twins)
    assert_near(found, expected, 3e-6)
    half = experts_forward(layout, inputs[0].bfloat16(), *inputs[1:], twins)
    assert half.dtype == torch.bfloat16
    assert_near(half, expected, 3e-2)
    rounded = experts_forward(layout, *inputs, twins, "int8")
    assert_near(rounded, expected, 3e-2)
    assert not torch.equal(rounded, found)


@pytest.mark.parametrize("model_type", KERNEL_EXPERTS)
def test_experts_of_every_architecture_are_the_librarys(model_type: str) -> None:
    packed = random_experts(EXPERTS, HIDDEN, WIDTH)
    module, inputs = library_experts(model_type), routed(9)
    expected = run_library(module, packed, *inputs)
    assert_near(experts_forward(lay_out_experts(packed, "silu"), *inputs, twins), expected, 3e-6)
    dense = DenseExperts(module.gate_up_proj.detach(), module.down_proj.detach())
    with torch.no_grad():
        module.config._experts_implementation = "eager"
        assert_near(dense_forward(dense, *inputs, twins), module(*inputs), 3e-6)


@pytest.mark.parametrize("form", ["left", "right", "fused right", "no basis"])
def test_every_product_gets_the_activations_option(form: str) -> None:
    seen = []

    def recording(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any, activations: str, **options: Any) -> Tensor:
            seen.append(activations)
            return operation(*inputs, activations=activations, **options)

        return call

    recorded = {name: recording(getattr(twins, name)) for name in ("binary_grouped", "panel")}
    layout = lay_out_experts(random_experts(EXPERTS, HIDDEN, WIDTH, **FORMS[form]), "silu")
    experts_forward(layout, *routed(3), SimpleNamespace(**vars(twins) | recorded), "int8")
    assert seen == ["int8"] * (2 if form == "no basis" else 4)


def test_no_tokens_give_no_output() -> None:
    layout = lay_out_experts(random_experts(EXPERTS, HIDDEN, WIDTH), "silu")
    assert experts_forward(layout, *routed(0), twins).shape == (0, HIDDEN)
    weights = torch.zeros(EXPERTS, 2 * WIDTH, HIDDEN), torch.zeros(EXPERTS, HIDDEN, WIDTH)
    assert dense_forward(DenseExperts(*weights), *routed(0), twins).shape == (0, HIDDEN)


def test_tiles_grow_with_the_batch() -> None:
    assert [tile_size(tokens) for tokens in (1, 8, 9, 64, 65, 4096)] == [8, 8, 16, 16, 64, 64]


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mobie": ("mobie", {}),
    "mobie-right": ("mobie", {"shared_side": "right"}),
    "mobie-fused": ("mobie", {"joint_svd": "fused_gate_up", "other_linears": "mixed_order"}),
    "mobie-router": ("mobie", {"router": "binarized", "other_linears": "16bit"}),
}


def quantize_blocks(model: nn.Module, adapter: Adapter, method: Any) -> list[PackedBlock]:
    """Every block's weights packed by a method, from statistics of random inputs."""
    blocks = []
    for module in adapter.blocks(model):
        linears: dict[str, Packed] = {}
        for group in adapter.linear_groups(module):
            weights = {name: linear.weight.detach().float() for name, linear in group.items()}
            for name, weight in weights.items():
                shared = stats(weight.shape[1], method.gradient_groups, 0)
                linears |= {name: method.quantize_linear(weight, shared)}
        bank = adapter.expert_bank(module)
        experts: dict[str, Packed] = {}
        if bank is not None:
            widths = {name: weight.shape[2] for name, weight in bank.projections.items()}
            of = {n: [stats(w, method.gradient_groups, e) for e in range(EXPERTS)] for n, w in widths.items()}
            pooled = {name: own[0] for name, own in of.items()}
            experts = dict(method.quantize_experts(bank, BankStats(of, pooled)))
            if method.quantizes_router:
                router = adapter.router(module)
                packed = method.quantize_router(router.weight.detach().float(), stats(HIDDEN, 1, 0))
                linears[adapter.architecture.router] = packed
        blocks.append(PackedBlock(linears, experts))
    return blocks


@cache
def packed_blocks(model_type: str, method: str) -> list[PackedBlock]:
    name, options = METHODS.get(method, (method, {}))
    built = build_method(name, options) if method in METHODS else load_method(method).build()
    return quantize_blocks(make_model(model_type), Adapter(model_type), built)


def packed_model(model_type: str, method: str, **changes: Any) -> nn.Module:
    model = make_model(model_type, **changes)
    layers = model.config.num_hidden_layers
    pack_model(model, Adapter(model_type), packed_blocks(model_type, method)[:layers])
    model.config._experts_implementation = "eager"
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(random_tokens(2, 12).to(model.device)).logits


CASES = [(model_type, "mobie") for model_type in CONFIGS] + [("olmoe", method) for method in METHODS]
CASES += [("qwen2_moe", "mobie-fused")]  # a bank with a bias


@pytest.mark.parametrize("model_type, method", dict.fromkeys(CASES))
def test_attached_model_is_the_dequantized_model(model_type: str, method: str) -> None:
    model = packed_model(model_type, method)
    names, before = list(model.state_dict()), logits_of(model)
    report = attach(model, compute="kernels")
    assert report.operations == "torch"
    attached = logits_of(model)
    assert_near(attached, before, 2e-5)
    if model_type in KERNEL_EXPERTS:
        assert not torch.equal(attached, before)  # other arithmetic, so the kernels were really in use
    assert list(model.state_dict()) == names
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedExperts)}
    left = {name: type(model.get_submodule(name)).__name__ for names in report.fallbacks.values() for name in names}
    assert set(left.values()) == LIBRARY_COMPUTES.get(model_type, set())
    if method != "mobie-router":  # its attention is in 16 bits
        assert set(report.kernels) == set(packed) - set(left)
    assert any(name.endswith("experts") for name in report.kernels) == (model_type in KERNEL_EXPERTS)
    assert report.layout_bytes == sum(m.kernel.layout.nbytes for m in packed.values() if m.kernel is not None)
    assert not any(module._dense for module in packed.values() if module.kernel is not None)
    detach(model)
    assert torch.equal(logits_of(model), before)
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_attached_model_in_16_bits_is_near_the_dequantized_one_in_32(dtype: torch.dtype, most: float) -> None:
    exact = logits_of(packed_model("olmoe", "mobie"))
    model = packed_model("olmoe", "mobie").to(dtype)
    attach(model, compute="kernels")
    found = logits_of(model)
    assert found.dtype == dtype
    assert (found - exact).norm() < most * exact.norm()


@torch.no_grad()
def test_attached_model_computes_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter; a machine with a GPU has the test after this one")
    tokens = random_tokens(1, 3)
    model = packed_model("olmoe", "mobie", num_hidden_layers=1).half()
    expected = model(tokens).logits
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert attach(model, compute="kernels").operations == "triton"
    assert_near(model(tokens).logits, expected, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", CONFIGS)
def test_attached_model_computes_on_a_gpu(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE)
    exact = logits_of(packed_model(model_type, "mobie"))
    model = packed_model(model_type, "mobie").to("cuda", torch.bfloat16)
    before = logits_of(model)
    report = attach(model)
    assert (report.compute, report.operations) == ("kernels", "triton")
    with_kernel = [model.get_submodule(name) for name in report.kernels]
    stored = [module.get_buffer(name) for module in with_kernel for name in module.stored_names()]
    assert report.host_bytes == sum(tensor.nbytes for tensor in stored) > 0
    if model_type in KERNEL_EXPERTS:
        assert with_kernel == [m for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)]
    assert not any(tensor.is_cuda for tensor in stored)
    found = logits_of(model)
    assert (found.cpu().float() - exact).norm() < 0.03 * exact.norm()
    detach(model)
    assert torch.equal(logits_of(model), before)
    stored = [m.get_buffer(name) for m in model.modules() if isinstance(m, PackedWeights) for name in m.stored_names()]
    assert all(tensor.is_cuda for tensor in stored)


def test_every_packed_weight_goes_through_its_kernel() -> None:
    model = packed_model("olmoe", "mobie")
    report = attach(model, compute="kernels")
    calls = dict.fromkeys(report.kernels, 0)

    def counting(name: str, kernel: Any) -> Any:
        def call(*inputs: Tensor) -> Tensor:
            calls[name] += 1
            return kernel(*inputs)

        return call

    for name in report.kernels:
        module = model.get_submodule(name)
        module.kernel = counting(name, module.kernel)
    logits_of(model)
    assert calls and set(calls.values()) == {1}


def test_routers_and_norms_are_swapped_and_come_back() -> None:
    model = packed_model("olmoe", "mobie")
    report = attach(model, compute="kernels")
    kinds = {name: type(model.get_submodule(name)).__name__ for name in report.swapped}
    assert set(kinds.values()) == {"OlmoeTopKRouter", "OlmoeRMSNorm"}
    assert sum(kind == "OlmoeTopKRouter" for kind in kinds.values()) == 2
    assert sum(kind == "OlmoeRMSNorm" for kind in kinds.values()) == 2 * 4 + 1  # two of a block are for queries, keys
    detach(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any("_mobie_undo" in vars(module) for module in model.modules())


def test_deepseek_router_keeps_its_factor_and_refuses_groups() -> None:
    model = packed_model("deepseek_v2", "mobie")
    router = next(m for m in model.modules() if type(m).__name__ == "DeepseekV2TopkRouter")
    router.routed_scaling_factor = 2.5
    hidden = torch.randn(5, HIDDEN)
    wanted_logits, wanted_weights, wanted_index = router(hidden)
    attach(model, compute="kernels")
    logits, weights, index = router(hidden)
    torch.testing.assert_close(logits, wanted_logits)
    (index, order), (wanted_index, wanted_order) = (
        index.sort(),
        wanted_index.sort(),
    )  # the library leaves the order open
    assert torch.equal(index, wanted_index)
    torch.testing.assert_close(weights.gather(1, order), wanted_weights.gather(1, wanted_order))
    router.topk_method = "group_limited_greedy"
    report = attach(model, compute="kernels")
    assert any("group_limited_greedy" in reason for reason in report.fallbacks)


def test_unpack_and_cached_choose_what_is_kept() -> None:
    model = packed_model("olmoe", "mobie")
    packed = [m for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)]
    before = logits_of(model)
    assert attach(model).compute == "cached"  # what auto is on a CPU
    assert torch.equal(logits_of(model), before)
    assert all(module._dense for module in packed)
    detach(model)
    assert not any(module._dense or module.keep_dense for module in packed)
    attach(model, compute="cached")
    logits_of(model)
    assert attach(model, compute="unpack").operations == "library"
    assert torch.equal(logits_of(model), before)
    assert not any(module._dense for module in packed)


@pytest.mark.parametrize("room, expected", [(0.9, "kernels"), (1.3, "cached")])
def test_auto_on_a_cpu_keeps_dense_copies_where_they_fit(
    room: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model("olmoe", "mobie")
    replaced = [module for module in model.modules() if isinstance(module, PackedExperts | PackedLinear)]
    dense = 4 * sum(
        module.gate_up_proj.numel() + module.down_proj.numel()
        if isinstance(module, PackedExperts)
        else module.weight.numel()
        for module in replaced
    )
    monkeypatch.setattr("mobie.kernels.cpu.available_memory", lambda: int(room * dense))
    assert attach(model).compute == expected


def test_int8_activations_and_head() -> None:
    model = packed_model("olmoe", "mobie")
    exact = logits_of(model)
    attach(model, compute="kernels", activations="int8")
    rounded = logits_of(model)
    assert_near(rounded, exact, 0.2)
    attach(model, compute="kernels")
    plain = logits_of(model)
    assert (rounded - exact).abs().max() > 10 * (plain - exact).abs().max()
    report = attach(model, compute="kernels", int8_head=True)
    assert "lm_head" in report.swapped
    with torch.no_grad():
        hidden = model.model(random_tokens(2, 12)).last_hidden_state
    head = SymmetricRows.quantize(model.lm_head.weight.detach(), 8).dequantize()
    assert_near(logits_of(model), hidden @ head.T, 1e-6)
    detach(model)
    assert torch.equal(logits_of(model), exact)


def test_a_copy_of_an_attached_model_has_its_own_state() -> None:
    model = packed_model("olmoe", "mobie")
    before = logits_of(model)
    attach(model, compute="kernels")
    attached = logits_of(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert not logits_of(other).any()
    assert torch.equal(logits_of(model), attached)
    detach(other)
    assert torch.equal(logits_of(model), attached)
    detach(model)
    assert torch.equal(logits_of(model), before)


def warnings_of(records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records if record.name == "mobie"]


@pytest.mark.parametrize("method", ["rtn-w3", "pb-llm-10", "billm", "arb-rc"])
def test_methods_without_experts_kernel_fall_back_and_say_so_once(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = packed_model("olmoe", method)
    before = logits_of(model)
    report = attach(model, compute="kernels")
    assert_near(logits_of(model), before, 2e-5)
    assert len(warnings_of(caplog.records)) == len(report.fallbacks) > 0
    experts = {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert experts <= {name for names in report.fallbacks.values() for name in names}
    assert bool(report.kernels) == (method not in {"rtn-w3", "pb-llm-10"})  # binary Linears have one
    attach(packed_model("olmoe", method), compute="kernels")
    assert len(warnings_of(caplog.records)) == len(report.fallbacks)


def test_one_layer_without_kernel_is_computed_by_the_library() -> None:
    model = make_model("olmoe")
    blocks = [packed_blocks("olmoe", "mobie")[0], packed_blocks("olmoe", "rtn-w3")[1]]
    pack_model(model, Adapter("olmoe"), blocks)
    model.config._experts_implementation = "eager"
    before = logits_of(model)
    report = attach(model, compute="kernels")
    assert "model.layers.0.mlp.experts" in report.kernels
    assert "model.layers.1.mlp.experts" not in report.kernels
    assert_near(logits_of(model), before, 2e-5)


def test_unknown_routers_and_norms_stay(caplog: pytest.LogCaptureFixture) -> None:
    class StrangeRMSNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = packed_model("olmoe", "mobie")
    model.model.norm = StrangeRMSNorm()
    report = attach(model, compute="kernels")
    assert "model.norm" not in report.swapped
    assert ["model.norm"] in report.fallbacks.values()
    assert any("StrangeRMSNorm" in text for text in warnings_of(caplog.records))


def test_options_without_kernels_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = packed_model("olmoe", "mobie")
    before = logits_of(model)
    attach(model, compute="cached", activations="int8", int8_head=True)
    assert torch.equal(logits_of(model), before)
    assert len(warnings_of(caplog.records)) == 1


def test_bad_options_are_refused() -> None:
    model = packed_model("olmoe", "mobie")
    with pytest.raises(ConfigError, match="compute is 'fast'; expected one of auto, unpack"):
        attach(model, compute="fast")
    with pytest.raises(ConfigError, match="activations is 'fp8'"):
        attach(model, activations="fp8")


def test_a_model_that_was_moved_says_so() -> None:
    model = packed_model("olmoe", "mobie")
    attach(model, compute="kernels")
    layer = model.model.layers[0]
    with pytest.raises(UnsupportedError, match="attached on cpu, got a tensor on meta"):
        layer.self_attn.q_proj(torch.zeros(1, HIDDEN, device="meta"))
    with pytest.raises(UnsupportedError, match="attached on cpu"):
        layer.mlp.experts.kernel(*(value.to("meta") for value in routed(3)))


def test_attached_model_generates_the_same_tokens() -> None:
    model = packed_model("qwen2_moe", "mobie")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(random_tokens(2, 5), **settings)
    attach(model, compute="kernels")
    assert torch.equal(model.generate(random_tokens(2, 5), **settings), expected)


@pytest.mark.parametrize("model_type", KERNEL_EXPERTS)
def test_dense_model_in_our_kernels_is_the_librarys(model_type: str) -> None:
    model = make_model(model_type)
    model.config._experts_implementation = "eager"
    before = logits_of(model)
    report = attach_dense(model)
    assert report.kernels and report.swapped
    assert model.config._experts_implementation == "mobie-dense"
    found = logits_of(model)
    assert_near(found, before, 2e-5)
    detach(model)
    assert torch.equal(logits_of(model), before)


def test_dense_experts_of_another_kind_are_refused() -> None:
    model = make_model("olmoe")
    before = model.config._experts_implementation
    model.model.layers[1].mlp.experts.has_bias = True
    with pytest.raises(UnsupportedError, match=r"layers.1.*OlmoeExperts"):
        attach_dense(model)
    assert model.config._experts_implementation == before != "mobie-dense"  # what was done to layer 0 is undone
    with pytest.raises(UnsupportedError, match="OlmoeExperts"):
        attach_dense(make_model("olmoe", hidden_act="gelu"))
    with pytest.raises(UnsupportedError, match="GptOssExperts has transposed weights"):
        attach_dense(make_model("gpt_oss"))


def test_experts_with_biases_are_left_to_the_library_and_named() -> None:
    report = attach(packed_model("gpt_oss", "mobie"), compute="kernels")
    reason = next(reason for reason in report.fallbacks if "experts with biases" in reason)
    assert report.fallbacks[reason] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_backend_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.operations("cpu", torch.float32) is twins
    assert backend.operations("cpu", torch.float32, prefer="cuda") is twins  # the variable goes first
    assert backend.name_of(twins) == "torch"
    monkeypatch.setenv(backend.VARIABLE, "tritn")
    with pytest.raises(ConfigError, match=r"MOBIE_KERNELS: unknown kernels 'tritn'; did you mean triton"):
        backend.operations("cpu", torch.float32)
    monkeypatch.delenv(backend.VARIABLE)
    with pytest.raises(ConfigError, match="prefer: unknown kernels"):
        backend.operations("cpu", torch.float32, prefer="cuda")
    assert backend.operations("meta", torch.float32) is twins
    assert backend.operations("cpu", torch.float32, prefer="torch") is twins


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither Triton nor the C++ operators can be imported."""
    for name in ("triton", "cpp"):
        monkeypatch.setitem(sys.modules, backend.MODULES[name], None)
    monkeypatch.delenv(backend.VARIABLE)
    yield
    backend._load.cache_clear()


@pytest.mark.parametrize(
    "device, dtype, prefer, reason",
    [
        ("cuda", torch.bfloat16, None, "triton kernels are not used: they cannot be loaded"),
        ("cuda", torch.float32, None, "load the model with dtype=torch.bfloat16"),
        ("cpu", torch.float32, None, "cpp kernels are not used: they cannot be loaded"),
        ("cuda", torch.bfloat16, "cpp", "they need tensors on the CPU, got cuda"),
    ],
)
def test_backend_gives_way_to_plain_torch_with_one_message(
    device: str,
    dtype: torch.dtype,
    prefer: str | None,
    reason: str,
    missing: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        assert backend.operations(device, dtype, prefer) is twins
    assert len(warnings_of(caplog.records)) == 1
    assert reason in warnings_of(caplog.records)[0]


def test_triton_without_a_gpu_needs_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.operations("cpu", torch.bfloat16) is twins
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.operations("cpu", torch.bfloat16) is twins
    assert "TRITON_INTERPRET" in warnings_of(caplog.records)[0]


def test_kernels_stay_out_of_what_quantizing_imports() -> None:
    """An edit of a kernel must not make stored checkpoints stale."""
    apart = ("mobie.kernels", "mobie.runner", "mobie.speed")
    closure = import_closure(["mobie.pipeline", "mobie.packing.checkpoint", "mobie.jobs.quantize"])
    assert [module for module in closure if module.startswith(apart)] == []
    assert "mobie.kernels.twins" in import_closure(["mobie.kernels.attach"])
