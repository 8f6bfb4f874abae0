"""MoEQuant: affinity-guided Hessians from the library's own routers, the clipped symmetric grid, the router first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_capture import BATCH, LENGTH, SEQUENCES, Seen, close, inner_of, kept, run_observed, watch_plainly
from test_pipeline import Watched, weight_files
from tiny import EXPERTS, experts_by_hand, make_model, random_tokens, save_model
from torch import Tensor, nn

from mobie.calibration.observer import BlockShape
from mobie.calibration.statistics import Accumulator, BlockStatistics, CalibrationPolicy
from mobie.config import build_method, load_method
from mobie.errors import ConfigError, DataError
from mobie.methods.base import LinearStats
from mobie.methods.gptq import GPTQ, gptq
from mobie.methods.hessian import inverse_cholesky
from mobie.methods.moequant import MoEQuant, fit_clipped
from mobie.models.base import ARCHITECTURES, Adapter
from mobie.packing.base import FORMATS
from mobie.packing.checkpoint import load_model
from mobie.packing.grid import Grid, encode, nominal_bits, symmetric_zero
from mobie.pipeline import quantize
from mobie.try_method import try_method

TOKENS = random_tokens(9, 12)


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


# ---- the grid --------------------------------------------------------------------------------------------------------


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest point of the symmetric grid in float64, the definition written out."""
    top = 2 ** (bits - 1) - 1
    return (weight.double() / scale.double()).round().clamp(-top - 1, top) * scale.double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 7])
def test_symmetric_grid_is_its_closed_form_and_stores_no_zero(bits: int, group_size: int | None) -> None:
    weight = random_weight(6, 21)
    stats = LinearStats(torch.eye(21), 21, torch.ones(21), torch.zeros(0, 21))
    packed = MoEQuant(bits, group_size, max_shrink=0).quantize_linear(weight, stats)  # H = 1: nothing to make up for
    for start in range(0, 21, group_size or 21):
        part = weight[:, start : start + (group_size or 21)]
        scale = (part.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
        expected = rounded(part, scale, bits)
        close(packed.dequantize()[:, start : start + part.shape[1]], expected)
    groups = 1 if group_size is None else 3
    assert {name: tensor.nbytes for name, tensor in packed.tensors().items()} == {
        "codes": 6 * bits * 3,  # 21 columns are 3 bytes of each plane
        "scale": 6 * groups * 2,
    }
    assert sum(item.bytes for item in packed.ledger().items) == 6 * bits * 3 + 12 * groups
    assert packed.paper_bits() == (bits if group_size is None else bits + 16 / 7)
    again = FORMATS["grid"].from_tensors(packed.header(), packed.tensors())
    assert torch.equal(again.dequantize(), packed.dequantize())
    lost = {name: value for name, value in packed.header().items() if name != "symmetric"}
    with pytest.raises(TypeError, match="zero"):  # zero points of an asymmetric grid do not go unnoticed
        FORMATS["grid"].from_tensors(lost, packed.tensors())


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), group=st.one_of(st.none(), st.integers(1, 30)), seed=st.integers(0, 99))
def test_symmetric_form_is_that_of_equal_zero_points(bits: int, group: int | None, seed: int) -> None:
    weight = random_weight(5, 24, seed=seed)
    groups = -(-24 // (group or 24))
    scale = torch.full((5, groups), 0.03).half().float()
    zero = torch.full((5, groups), float(symmetric_zero(bits)))
    layout: dict[str, Any] = {"bits": bits, "group_size": group, "paper": nominal_bits(bits, group, symmetric=True)}
    codes = encode(weight, scale, zero, bits, group)
    with_zero, without = Grid.pack(codes, scale, zero, **layout), Grid.pack(codes, scale, None, **layout)
    assert torch.equal(with_zero.dequantize(), without.dequantize())
    stored = [sum(t.nbytes for t in packed.tensors().values()) for packed in (with_zero, without)]
    assert stored[0] - stored[1] == groups * bits  # five rows are one byte of each plane


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("steps", "max_shrink"), [(100, 0.8), (20, 0.5), (10, 0.0), (7, 1.0)])
def test_clip_search_equals_brute_force(bits: int, steps: int, max_shrink: float) -> None:
    weight = random_weight(2, 9, 40)
    weight[:, ::2, 3] *= 6  # outliers that are worth clipping
    scale, zero = fit_clipped(weight, bits, 2.4, steps, max_shrink)
    assert (zero == 2 ** (bits - 1)).all() and scale.shape == zero.shape == (2, 9, 1)
    top = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(-1, keepdim=True)
    tried = torch.stack([(1 - i / steps) * largest / top for i in range(max(1, round(max_shrink * steps)))])
    tried = tried.half().float()
    errors = torch.stack([(rounded(weight, s, bits) - weight).abs().pow(2.4).sum(-1, keepdim=True) for s in tried])
    chosen = (rounded(weight, scale, bits) - weight).abs().pow(2.4).sum(-1, keepdim=True)
    torch.testing.assert_close(chosen, errors.amin(0), rtol=1e-5, atol=0)
    assert (scale == tried).any(0).all()
    if max_shrink == 0.8:
        assert (scale[:, ::2] < tried[0, :, ::2]).all()


def test_clip_search_does_not_depend_on_what_else_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(3, 10, 33)
    whole = fit_clipped(weight, 2, 2.4, 100, 0.8)[0]
    assert torch.equal(torch.stack([fit_clipped(w, 2, 2.4, 100, 0.8)[0] for w in weight]), whole)
    monkeypatch.setitem(fit_clipped.__globals__["SEARCHED"], "cpu", 66)  # two rows at a time
    torch.testing.assert_close(fit_clipped(weight, 2, 2.4, 100, 0.8)[0], whole)


def test_zero_rows_and_huge_weights() -> None:
    scale, zero = fit_clipped(torch.zeros(2, 5), 2, 2.4, 100, 0.8)
    assert (scale > 0).all() and (zero == 2).all()
    with pytest.raises(DataError, match="weights reach 1e\\+06; expected finite values up to 6.55e\\+04"):
        fit_clipped(torch.full((2, 5), 1e6), 2, 2.4, 100, 0.8)


def test_first_step_by_hand() -> None:
    # grid -2, -1, 0, 1.  0.6 → 1, error -0.4.  [H⁻¹]₁₁ = 2/3, [H⁻¹]₁₂ = -1/3: the second column becomes
    # 0.6 + 0.4 / (2/3) · (-1/3) = 0.4 → 0, where round to nearest takes 1.  The third is alone.
    weight = torch.tensor([[0.6, 0.6, 1.0]])
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    method = MoEQuant(bits=2, max_shrink=0)
    codes, scale, zero = gptq(weight, inverse_cholesky(hessian), torch.zeros(3, dtype=torch.bool), 2, fit=method.fit)
    assert (scale.item(), zero.item()) == (1, 2)
    assert codes.tolist() == [[3, 2, 3]]
    stats = LinearStats(hessian, 3, torch.ones(3), torch.zeros(0, 3))
    assert MoEQuant(bits=2, max_shrink=0, percdamp=0).quantize_linear(weight, stats).dequantize().tolist() == [
        [1, 0, 1]
    ]


# ---- affinity-guided Hessians ----------------------------------------------------------------------------------------


def test_scores_weight_the_hessian_and_nothing_else() -> None:
    x = random_weight(30, 7)
    scores = torch.rand(30, generator=torch.Generator().manual_seed(1))
    plain, weighted, ones = (Accumulator(7, x.device) for _ in range(3))
    plain.add(x)
    weighted.add(x, scores)
    ones.add(x, torch.ones(30))
    assert torch.equal(ones.finish().hessian, plain.finish().hessian)  # score 1 for all: GPTQ's Hessian
    expected = sum(2 / 30 * s * torch.outer(row, row) for s, row in zip(scores.double(), x.double(), strict=True))
    close(weighted.finish().hessian, expected)
    for name in ("mean_abs", "sample"):
        assert torch.equal(getattr(weighted.finish(), name), getattr(plain.finish(), name))


def observe_gates(model: nn.Module, adapter: Adapter, ids: Tensor, index: int) -> BlockStatistics:
    block, batches = adapter.blocks(model)[index], ids.split(BATCH)
    shape = BlockShape(
        adapter.linear_groups(block),
        adapter.experts_module(block),
        len(ids),
        ids.shape[1],
        len(batches),
        adapter.shared_expert(block),
    )
    observer = BlockStatistics(shape, *kept())
    run_observed(model, batches, [observer])
    return observer


def watch_router(model: nn.Module, adapter: Adapter, ids: Tensor, index: int) -> tuple[Seen, Tensor, Tensor]:
    """What flows into a block, the scores `(tokens, k)` that its router gives, and what its experts give."""
    block = adapter.blocks(model)[index]
    found: list[Tensor] = []
    handles = [
        adapter.moe_router(block).register_forward_hook(lambda _, args, out: found.append(out[1])),
        adapter.experts_module(block).register_forward_hook(lambda _, args, out: found.append(out)),
    ]
    seen = watch_plainly(model, adapter, ids)[index]
    for handle in handles:
        handle.remove()
    return seen, found[0].double(), found[1].double()


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_expert_hessians_are_weighted_by_what_the_library_multiplies_outputs_by(model_type: str) -> None:
    model, adapter, ids = make_model(model_type), Adapter(model_type), random_tokens(SEQUENCES, LENGTH)
    seen, scores, output = watch_router(model, adapter, ids, 1)
    module = adapter.experts_module(adapter.blocks(model)[1])
    observer = observe_gates(model, adapter, ids, 1)
    stats, plain = observer.bank_stats("gate"), observer.bank_stats()
    own = experts_by_hand(module)
    total = torch.zeros_like(output)
    sums = {"gate": torch.zeros(()), "down": torch.zeros(())}
    for expert in range(EXPERTS):
        token, slot = torch.where(seen.top_k_index == expert)
        x, s = seen.hidden[token], scores[token, slot]
        y = inner_of(module, x, expert)
        total.index_add_(0, token, s[:, None] * (y @ own["down"][expert].T + own["down_bias"][expert]))
        for name, inputs in (("gate", x), ("up", x), ("down", y)):
            weighted = stats.experts[name][expert]
            assert weighted.tokens == len(token)
            close(weighted.hessian, 2 / len(token) * (s[:, None] * inputs).T @ inputs)
            unweighted = plain.experts[name][expert]
            close(unweighted.hessian, 2 / len(token) * inputs.T @ inputs)
            assert torch.equal(weighted.mean_abs, unweighted.mean_abs)
            if name in sums:
                sums[name] = sums[name] + 2 * (s[:, None] * inputs).T @ inputs
    close(total.float(), output)  # these are the scores that matter
    for name, gram in sums.items():
        close(stats.pooled[name].hessian, gram / seen.top_k_index.numel())
        assert torch.equal(stats.pooled[name].mean_gram, plain.pooled[name].mean_gram)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_shared_experts_take_their_sigmoid_gate_where_there_is_one(model_type: str) -> None:
    model, adapter, ids = make_model(model_type), Adapter(model_type), random_tokens(SEQUENCES, LENGTH)
    block = adapter.blocks(model)[1]
    seen = watch_plainly(model, adapter, ids)[1]
    observer = observe_gates(model, adapter, ids, 1)
    plain, weighted = observer.linear_stats(), observer.linear_stats("gate")
    gated = {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"}
    assert (adapter.shared_expert(block) is not None) == (model_type in {"qwen2_moe", "qwen3_next"})
    for name, own in weighted.items():
        x = seen.linears[name]
        close(plain[name].hessian, 2 / len(x) * x.T @ x)
        if name in gated:
            logit = seen.linears["mlp.shared_expert.gate_proj"] @ block.mlp.shared_expert_gate.weight.double().T
            close(own.hessian, 2 / len(x) * (x / (1 + torch.exp(-logit))).T @ x)
        else:
            assert torch.equal(own.hessian, plain[name].hessian)
    assert gated <= set(weighted) or model_type not in {"qwen2_moe", "qwen3_next"}


# ---- in the block loop -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("olmoe"), tmp_path_factory.mktemp("source"))


def run(
    source: Path, out: Path, policy: CalibrationPolicy | None = None, ids: Tensor = TOKENS, **options: Any
) -> tuple[Watched, Any]:
    watched = Watched(build_method("moequant", {"bits": 2, **options}))
    report = quantize(source, watched, ids, out, fingerprint="job", policy=policy or CalibrationPolicy())
    return watched, report


def scored(model: nn.Module, expert: int) -> tuple[Tensor, int]:
    """Gate's weighted Hessian of an expert in the first block of a model, and its tokens."""
    seen, scores, _ = watch_router(model, Adapter("olmoe"), TOKENS, 0)
    token, slot = torch.where(seen.top_k_index == expert)
    x, s = seen.hidden[token], scores[token, slot]
    return 2 / len(token) * (s[:, None] * x).T @ x, len(token)


@pytest.mark.parametrize("inputs", ["quantized_prefix", "full_precision"])
@pytest.mark.parametrize("router", ["first", "last", "kept"])
def test_experts_see_the_routes_and_scores_of_the_quantized_router(
    router: str, inputs: Any, source: Path, tmp_path: Path
) -> None:
    watched, report = run(source, tmp_path, CalibrationPolicy(inputs=inputs), router=router)
    model, original = make_model("olmoe"), make_model("olmoe")
    stored, _ = load_model(tmp_path)
    first, packed = model.model.layers[0].mlp.gate, stored.model.layers[0].mlp.gate
    assert len(watched.routers) == (0 if router == "kept" else 2)
    assert torch.equal(first.weight, packed.weight) == (router == "kept")
    with torch.no_grad():
        if router == "first":
            first.weight.copy_(packed.weight)
    tokens = report.blocks[0]["tokens_per_expert"]
    _, stats = watched.banks[0]
    for expert in range(EXPERTS):
        expected, count = scored(model, expert)
        assert tokens[expert] == count
        if count >= 2 * 32:  # does not borrow
            close(stats.experts["gate"][expert].hessian, expected)
    assert max(tokens) >= 64
    # what flows into the second block: as stored, or as it was
    before = original if inputs == "full_precision" else stored
    x = watch_plainly(before, Adapter("olmoe"), TOKENS)[1].linears["self_attn.q_proj"]
    close(watched.linear_stats[2]["q_proj"].hessian, 2 / len(x) * x.T @ x)


def test_recorded_errors_count_every_token_alike(source: Path, tmp_path: Path) -> None:
    ids = random_tokens(40, 12)
    watched, report = run(source, tmp_path, ids=ids, router="kept")
    model = make_model("olmoe")
    gate = experts_by_hand(model.model.layers[0].mlp.experts)["gate"]
    seen = watch_plainly(model, Adapter("olmoe"), ids)[0]
    assert report.blocks[0]["borrowed_statistics"]["gate"] == []
    errors = []
    for expert in range(EXPERTS):
        x, w = seen.hidden[seen.routed(expert)], gate[expert]
        q = watched.experts[0]["gate"].dequantize()[expert].double()
        errors.append(float((x @ (w - q).T).norm() / (x @ w.T).norm()))
    assert report.blocks[0]["output_error"]["experts.gate"] == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_weighting_and_the_policy_of_all_experts_exclude_each_other(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moequant: token_weighting 'gate' with the policy 'all_experts'.*'routed'"):
        run(source, tmp_path, CalibrationPolicy(experts="all_experts"))
    run(source, tmp_path, CalibrationPolicy(experts="all_experts"), token_weighting="none")


def test_affinity_is_an_option_of_gptq_and_changes_experts_alone(source: Path, tmp_path: Path) -> None:
    found = {}
    for weighting in ("none", "gate"):
        method = Watched(build_method("gptq", {"bits": 2, "token_weighting": weighting}))
        quantize(source, method, TOKENS, tmp_path / weighting, fingerprint="job")
        found[weighting] = method
    plain, weighted = found["none"], found["gate"]
    for name, packed in plain.linears[0].items():
        assert torch.equal(packed.dequantize(), weighted.linears[0][name].dequantize())
    for name, bank in plain.experts[0].items():
        assert not torch.equal(bank.dequantize(), weighted.experts[0][name].dequantize())
    assert weight_files(tmp_path / "none").keys() == weight_files(tmp_path / "gate").keys()


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 1}, "moequant: bits is 1; expected at least 2"),
        ({"norm": 0}, "moequant: norm is 0.0; expected a positive number"),
        ({"norm": float("nan")}, "norm"),
        ({"steps": 0}, "moequant: steps is 0; expected a positive integer"),
        ({"max_shrink": 1.5}, "moequant: max_shrink is 1.5; expected a share from 0 to 1"),
        ({"percdamp": -1}, "moequant: percdamp is -1.0; expected"),
        ({"router": "binarized"}, "router"),
        ({"token_weighting": "affinity"}, "token_weighting"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_method("moequant", {"bits": 2, **options})


def test_configs_have_every_option_and_the_papers_row() -> None:
    for bits in (2, 3):
        config = load_method(f"moequant-w{bits}")
        assert set(config.options) == set(MoEQuant(2).options)
        assert config.build() == MoEQuant(bits)
    assert load_method("gptq-w2-affinity").build() == GPTQ(2, token_weighting="gate")
    assert load_method("moequant-w2").paper.model_dump() == {"method": "MoEQuant", "bits": 2.0}
    assert load_method("moequant-w3").paper is None


def test_try_says_that_it_has_no_router() -> None:
    trial, _ = try_method("moequant-w2", MoEQuant(2), random_weight(2, 8, 16), random_weight(40, 16, seed=1))
    assert trial.notes == ("there is no router here: every token has score 1",)
    assert trial.bits["paper"] == 2
