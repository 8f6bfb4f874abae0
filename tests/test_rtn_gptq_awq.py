"""Scalar methods against references written here in float64, closed forms, and cases worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from mobie.errors import ConfigError, DataError
from mobie.methods.awq import AWQ, channel_scale, clip, group_gram, round_trip, search_scale
from mobie.methods.base import METHODS, BankStats, ExpertBank, LinearStats, Method
from mobie.methods.fp16 import FP16
from mobie.methods.gptq import GPTQ, gptq
from mobie.methods.hessian import damp, inverse_cholesky
from mobie.methods.rtn import RTN
from mobie.packing.base import Packed
from mobie.packing.grid import Grid

CONFIGS = Path(__file__).parents[1] / "workflow" / "config" / "methods"
OWN = {"fp16", "rtn", "gptq", "awq"}
OWN_CONFIGS = sorted(p for p in CONFIGS.glob("*.yaml") if yaml.safe_load(p.read_text())["method"] in OWN)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * 0.05


def correlated_inputs(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Inputs whose channels share few directions, as activations do."""
    noise = torch.randn(tokens, width, generator=generator(seed))
    common = torch.randn(tokens, 4, generator=generator(seed + 1)) @ torch.randn(
        4, width, generator=generator(seed + 2)
    )
    return common + 0.5 * noise


def outlier_inputs(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Inputs of which two channels are 30 times as active as the others."""
    inputs = torch.randn(tokens, width, generator=generator(seed))
    inputs[:, [3, width // 2]] *= 30
    return inputs


def output_error(inputs: Tensor, weight: Tensor, packed: Packed) -> float:
    change = packed.dequantize() - weight
    return ((inputs @ change.T).norm() / (inputs @ weight.T).norm()).item()


def make_bank(experts: int = 4, width: int = 40, hidden: int = 24) -> tuple[ExpertBank, BankStats]:
    """A layer whose experts saw different numbers of tokens."""
    inputs = [outlier_inputs(30 + 20 * e, width, seed=10 * e) for e in range(experts)]
    middle = [correlated_inputs(30 + 20 * e, hidden, seed=10 * e + 5) for e in range(experts)]
    x = [LinearStats.from_inputs(t) for t in inputs]
    z = [LinearStats.from_inputs(t) for t in middle]
    pooled_x, pooled_z = LinearStats.from_inputs(torch.cat(inputs)), LinearStats.from_inputs(torch.cat(middle))
    projections = {
        "gate": random_weight(experts, hidden, width, seed=2),
        "up": random_weight(experts, hidden, width, seed=3),
        "down": random_weight(experts, width, hidden, seed=4),
    }
    stats = BankStats({"gate": x, "up": x, "down": z}, {"gate": pooled_x, "up": pooled_x, "down": pooled_z})
    return ExpertBank(projections, (("gate", "up"), ("down",))), stats


def asymmetric_grid(values: list[float], bits: int) -> tuple[float, int]:
    """Scale, rounded to float16, and zero point of one group."""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().item()
    return scale, min(round(-low / scale), 2**bits - 1)


def snap(value: float, scale: float, zero: int, bits: int) -> float:
    return (min(max(round(value / scale) + zero, 0), 2**bits - 1) - zero) * scale


# Hessians


def test_damp_by_hand() -> None:
    hessian = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    given = hessian.clone()
    damped, dead = damp(hessian, percdamp=0.1)
    assert dead.tolist() == [False, True, False]
    # the mean of the diagonal 2, 1 (dead), 3 is 2
    torch.testing.assert_close(damped, torch.tensor([[2.2, 0.0, 1.0], [0.0, 1.2, 0.0], [1.0, 0.0, 3.2]]))
    assert torch.equal(hessian, given)


def test_inverse_cholesky_is_the_factor_of_the_inverse() -> None:
    x = torch.randn(2, 3, 50, 20, generator=generator(0))
    hessian = damp(x.mT @ x)[0]
    factor = inverse_cholesky(hessian)
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [9, 20, 64])
def test_halving_wide_matrices_gives_the_same_factor(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, columns, generator=generator(1))
    hessian = damp(x.mT @ x)[0]
    direct = inverse_cholesky(hessian)
    monkeypatch.setattr("mobie.methods.hessian.DIRECT_WIDTH", 4)
    halved = inverse_cholesky(hessian)
    assert torch.equal(halved, halved.triu())
    torch.testing.assert_close(halved, direct, rtol=1e-6, atol=1e-9)
    with pytest.raises(DataError, match="not positive definite"):
        inverse_cholesky(hessian - 2 * torch.diag(torch.arange(columns) == columns - 1) * hessian)


@pytest.mark.parametrize("broken", [torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.full((2, 2), torch.nan)])
def test_indefinite_hessian_names_the_remedy(broken: Tensor) -> None:
    with pytest.raises(DataError, match=r"Hessian 2 of 2 \(width 2\) is not positive definite.*percdamp"):
        inverse_cholesky(torch.stack([torch.eye(2), broken]))


# GPTQ


def obq_reference(weight: Tensor, hessian: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Optimal brain quantization in column order: every step inverts the Hessian of the columns that are left.

    Frantar & Alistarh 2022, eq. 3: δ_F = -(w_j - q_j) / [H_F⁻¹]_jj · (H_F⁻¹)_:,j
    """
    result = torch.zeros_like(weight, dtype=torch.float64)
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian.double()[j:, j:]) for j in range(columns)]
    for i, row in enumerate(weight.double()):
        row = row.clone()
        scale, zero = asymmetric_grid(row.tolist(), bits)
        for j in range(columns):
            if group_size and j % group_size == 0:
                scale, zero = asymmetric_grid(row[j : j + group_size].tolist(), bits)
            result[i, j] = snap(row[j].item(), scale, zero, bits)
            row[j:] -= (row[j] - result[i, j]) / inverses[j][0, 0] * inverses[j][:, 0]
    return result


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group_size, block_size", [(None, 16), (None, 128), (8, 16), (20, 16), (12, 5), (64, 16)])
def test_gptq_equals_textbook_obq(bits: int, group_size: int | None, block_size: int) -> None:
    weight = random_weight(6, 40)
    stats = LinearStats.from_inputs(correlated_inputs(200, 40))
    packed = GPTQ(bits, group_size, block_size).quantize_linear(weight, stats)
    damped = stats.hessian.double() + 0.01 * stats.hessian.double().diagonal().mean() * torch.eye(40)
    expected = obq_reference(weight, damped, bits, group_size)
    torch.testing.assert_close(packed.dequantize().double(), expected, rtol=1e-5, atol=1e-6)


def test_gptq_first_step_by_hand() -> None:
    # grid 0, 1, 2, 3.  1.4 → 1, error 0.4.  [H⁻¹]₁₁ = 2/3, [H⁻¹]₁₂ = -1/3: the second column becomes
    # 2.4 - 0.4 / (2/3) · (-1/3) = 2.6 → 3, where round to nearest takes 2.  The third is alone.
    weight = torch.tensor([[1.4, 2.4, 3.0]])
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    codes, scale, zero = gptq(weight, inverse_cholesky(hessian), torch.zeros(3, dtype=torch.bool), bits=2)
    assert (scale.item(), zero.item()) == (1, 0)
    assert codes.tolist() == [[1, 3, 3]]
    stats = LinearStats(hessian, 3, torch.ones(3), torch.zeros(0, 3))
    assert RTN(2).quantize_linear(weight, stats).dequantize().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("group_size", [None, 16])
def test_gptq_with_identity_hessian_is_round_to_nearest(group_size: int | None) -> None:
    weight = random_weight(8, 40)
    stats = LinearStats(torch.eye(40), 40, torch.ones(40), torch.zeros(0, 40))
    ours = GPTQ(3, group_size, block_size=16).quantize_linear(weight, stats)
    assert torch.equal(ours.dequantize(), RTN(3, group_size).quantize_linear(weight, stats).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 32])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(bits: int, group_size: int | None) -> None:
    weight, inputs = random_weight(32, 96), correlated_inputs(400, 96)
    stats = LinearStats.from_inputs(inputs)
    ours = output_error(inputs, weight, GPTQ(bits, group_size).quantize_linear(weight, stats))
    assert ours < 0.7 * output_error(inputs, weight, RTN(bits, group_size).quantize_linear(weight, stats))


def test_gptq_block_size_changes_speed_only() -> None:
    weight, stats = random_weight(16, 96), LinearStats.from_inputs(correlated_inputs(300, 96))
    results = [GPTQ(3, None, size).quantize_linear(weight, stats).dequantize() for size in (1, 32, 96)]
    for other in results[1:]:
        assert (results[0] != other).float().mean() < 0.01  # a rounding tie may fall the other way


def test_gptq_ignores_dead_columns() -> None:
    weight, inputs = random_weight(8, 24), correlated_inputs(100, 24)
    inputs[:, 5] = 0
    calm = GPTQ(3).quantize_linear(weight, LinearStats.from_inputs(inputs)).dequantize()
    weight[:, 5] = 100  # would ruin the grid of every row
    wild = GPTQ(3).quantize_linear(weight, LinearStats.from_inputs(inputs)).dequantize()
    assert torch.equal(calm, wild)
    assert (wild[:, 5] == 0).all()


def test_gptq_takes_a_zero_hessian_for_dead_columns() -> None:
    stats = LinearStats(torch.zeros(24, 24), 0, torch.zeros(24), torch.zeros(0, 24))
    assert torch.count_nonzero(GPTQ(3).quantize_linear(random_weight(8, 24), stats).dequantize()) == 0


# AWQ


def test_channel_scale_by_hand() -> None:
    mean_abs = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert channel_scale(mean_abs, 0.0).tolist() == [1, 1, 1, 1]
    # ratio 0.5: 1, 2, 4, and 0 → 1e-4; divided by sqrt(4 · 1e-4) = 0.02
    torch.testing.assert_close(
        channel_scale(mean_abs, 0.5), torch.tensor([50.0, 100.0, 200.0, 0.005]), rtol=1e-3, atol=0
    )
    assert channel_scale(torch.full((4,), torch.nan), 0.7).tolist() == [1, 1, 1, 1]


def test_ratio_zero_is_round_to_nearest() -> None:
    weight = random_weight(8, 40)
    scale = channel_scale(torch.rand(40), 0.0)
    expected = RTN(3, 16).quantize_linear(weight, LinearStats.from_inputs(torch.ones(1, 40))).dequantize()
    assert torch.equal(round_trip(weight * scale, 3, 16) / scale, expected)


def rounded_reference(scaled: Tensor, bits: int, group_size: int) -> Tensor:
    """Round to nearest, group by group, float64."""
    result = torch.zeros_like(scaled, dtype=torch.float64)
    for i, row in enumerate(scaled.double().tolist()):
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            grid = asymmetric_grid(group, bits)
            result[i, start : start + len(group)] = torch.tensor([snap(v, *grid, bits) for v in group]).double()
    return result


def test_scale_search_equals_brute_force_on_outputs() -> None:
    weights = [random_weight(5, 30, seed=7), random_weight(3, 30, seed=8)]
    inputs = outlier_inputs(60, 30)
    stats = LinearStats.from_inputs(inputs)
    errors, scales = [], []
    for step in range(20):
        scale = inputs.abs().double().mean(0) ** (step / 20)
        scale = (scale / (scale.max() * scale.min()).sqrt()).half().double()
        changes = [rounded_reference(w.double() * scale, 3, 16) / scale - w.double() for w in weights]
        errors.append(sum((inputs.double() @ change.T).square().sum().item() for change in changes))
        scales.append(scale.float())
    best = min(range(20), key=errors.__getitem__)
    found = search_scale(weights, stats.hessian, stats.mean_abs, 3, 16)
    assert 0 < best < 19
    torch.testing.assert_close(found, scales[best], rtol=1e-3, atol=0)


def test_clip_search_equals_brute_force_on_outputs() -> None:
    weight = random_weight(6, 30, seed=9) ** 3  # long tails
    inputs = correlated_inputs(50, 30)
    weight[:, 4], inputs[:, 4] = 2 * weight[:, :12].abs().amax(dim=1), 0.0  # large and without effect: clip it most
    scale = torch.linspace(0.5, 2, 30).half().float()
    scaled = weight * scale
    found = clip(scaled, scale, group_gram(inputs, 12), 2, 12)
    ratios = set()
    for i in range(6):
        for start in range(0, 30, 12):
            part = slice(start, min(start + 12, 30))
            largest = scaled[i, part].abs().max()
            candidates = {}
            for step in range(10):
                limit = largest * (1 - step / 20)
                clipped = scaled[i : i + 1, part].clamp(-limit, limit)
                change = (rounded_reference(clipped, 2, 12) - scaled[i : i + 1, part].double()) / scale[part].double()
                candidates[step] = (inputs[:, part].double() @ change.T).square().sum().item()
            best = min(candidates, key=candidates.__getitem__)
            ratios.add(best)
            limit = largest * (1 - best / 20)
            torch.testing.assert_close(found[i, part], scaled[i, part].clamp(-limit, limit))
    assert len(ratios) > 3
    assert {0, 9} <= ratios  # both ends of the search are reached


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awq_beats_round_to_nearest_with_outlier_channels(bits: int) -> None:
    weight, inputs = random_weight(48, 256), outlier_inputs(400, 256)
    stats = LinearStats.from_inputs(inputs)
    ours = output_error(inputs, weight, AWQ(bits).quantize_linear(weight, stats))
    assert ours < 0.7 * output_error(inputs, weight, RTN(bits, 128).quantize_linear(weight, stats))


def test_awq_group_shares_one_scale_and_does_not_clip_queries_and_keys() -> None:
    weights = {name: random_weight(8, 40, seed=s) ** 3 for s, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    stats = LinearStats.from_inputs(outlier_inputs(80, 40))
    packed = AWQ(2, 16).quantize_group(weights, dict.fromkeys(weights, stats))
    scale = search_scale(list(weights.values()), stats.hessian, stats.mean_abs, 2, 16)
    for name, weight in weights.items():
        assert torch.equal(packed[name].column_scale.float(), scale)
        unclipped = round_trip(weight * scale, 2, 16) / scale
        assert torch.equal(packed[name].dequantize(), unclipped) == (name != "v_proj")


def test_awq_experts_share_the_scale_of_their_common_input() -> None:
    bank, stats = make_bank()
    packed = AWQ(3, 16).quantize_experts(bank, stats)
    shared = {tuple(e.column_scale.tolist()) for name in ("gate", "up") for e in packed[name].experts}
    assert len(shared) == 1
    assert len({tuple(e.column_scale.tolist()) for e in packed["down"].experts}) > 1

    mean_abs = stats.pooled["gate"].mean_abs
    errors = []
    for step in range(20):  # brute force over the experts, one after another
        scale = channel_scale(mean_abs, step / 20)
        changes = [
            (round_trip(w * scale, 3, 16) / scale - w, s.hessian)
            for name in ("gate", "up")
            for w, s in zip(bank.projections[name], stats.experts[name], strict=True)
        ]
        errors.append(sum(torch.trace(c @ h @ c.T).item() for c, h in changes))
    best = min(range(20), key=errors.__getitem__)
    assert shared == {tuple(channel_scale(mean_abs, best / 20).tolist())}


def test_awq_expert_without_tokens_stays_finite() -> None:
    bank, stats = make_bank()
    empty = LinearStats(torch.zeros(24, 24), 0, torch.full((24,), torch.nan), torch.zeros(0, 24))
    down = AWQ(3, 16).quantize_experts(
        bank, BankStats({**stats.experts, "down": [empty, *stats.experts["down"][1:]]}, stats.pooled)
    )["down"]
    expected = RTN(3, 16).quantize_linear(bank.projections["down"][0], empty).dequantize()
    assert torch.equal(down.experts[0].dequantize(), expected)


# all of them


def test_fp16_keeps_bfloat16_weights_bit_for_bit() -> None:
    bank, stats = make_bank()
    weights = {name: w.bfloat16().float() for name, w in bank.projections.items()}
    packed = FP16().quantize_experts(ExpertBank(weights, bank.same_input), stats)
    for name, weight in weights.items():
        assert torch.equal(packed[name].dequantize(), weight)
        assert packed[name].ledger().stored_bits == packed[name].paper_bits() == 16


@pytest.mark.parametrize("method", [RTN(3), GPTQ(3), GPTQ(2, 16, 8), AWQ(3, 16)], ids=str)
def test_bank_equals_loop_over_experts(method: Method) -> None:
    bank, stats = make_bank()
    packed = method.quantize_experts(bank, stats)["down"]  # each expert on its own, also for AWQ
    for expert, weight, own in zip(packed.experts, bank.projections["down"], stats.experts["down"], strict=True):
        alone = method.quantize_linear(weight, own)
        assert isinstance(expert, Grid)
        differs = expert.dequantize() != alone.dequantize()
        assert differs.float().mean() < 0.01  # products of a batch may sum in another order


@pytest.mark.parametrize("method", [RTN(2), GPTQ(2), GPTQ(2, 16), AWQ(2, 16), FP16()], ids=str)
def test_same_input_gives_the_same_bytes(method: Method) -> None:
    bank, stats = make_bank()
    first, second = (method.quantize_experts(bank, stats) for _ in range(2))
    for name in bank.projections:
        for key, tensor in first[name].tensors().items():
            assert torch.equal(tensor, second[name].tensors()[key])
            assert tensor.dtype == torch.bfloat16 or tensor.float().isfinite().all()


@pytest.mark.parametrize(
    "method, printed", [(RTN(3), 3), (RTN(3, 128), 3.25), (GPTQ(3), 3), (GPTQ(2, 128), 2.25), (AWQ(3), 3), (FP16(), 16)]
)
def test_paper_bits(method: Method, printed: float) -> None:
    stats = LinearStats.from_inputs(correlated_inputs(40, 16))
    assert method.quantize_linear(random_weight(4, 16), stats).paper_bits() == printed


@pytest.mark.parametrize(
    "name, options, complaint",
    [
        ("rtn", {"bits": 0}, "rtn: bits is 0; expected an integer from 1 to 8"),
        ("gptq", {"bits": 16}, "gptq: bits is 16"),
        ("gptq", {"bits": 3, "group_size": 0}, "gptq: group_size is 0"),
        ("gptq", {"bits": 3, "block_size": 0}, "gptq: block_size is 0"),
        ("gptq", {"bits": 3, "percdamp": -0.1}, "gptq: percdamp is -0.1"),
        ("gptq", {"bits": 3, "percdamp": "0.01"}, "gptq: percdamp is '0.01'"),
        ("awq", {"bits": 2.5}, "awq: bits is 2.5"),
    ],
)
def test_refuses_bad_options(name: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        METHODS[name](**options)


@pytest.mark.parametrize("path", OWN_CONFIGS, ids=lambda p: p.stem)
def test_configs_build_the_method_their_name_says(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"method", "options", "label", "paper", "description"}
    method = METHODS[config["method"]](**config["options"])
    if not isinstance(method, FP16):
        group = getattr(method, "group_size", None)
        suffix = f"-g{group}" if group and not isinstance(method, AWQ) else ""
        suffix += "-affinity" if method.token_weighting == "gate" else ""
        assert path.stem == f"{method.name}-w{method.bits}{suffix}"
