"""MoBiE as a whole: exact cases, the account of bits, every configuration, and what happens at the edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mobie.calibration.pooling import pool_channels
from mobie.config import config_names, load_method
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.methods.arb import ARB
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.methods.mobie import MoBiE
from mobie.methods.mobie.cejd import joint_svd
from mobie.packing.bank import GATE_UP, PackedBank
from mobie.packing.base import Packed
from mobie.packing.dense import Dense16
from mobie.paths import PACKAGE, Layout

LAYOUT = Layout(PACKAGE.parent)
CONFIGS = [name for name in config_names("methods", LAYOUT) if name == "mobie" or name.startswith("mobie-")]
VARIANTS = [name for name in CONFIGS if name != "mobie"]

EXPERTS, HIDDEN, INNER = 4, 160, 40
SEQUENCES, LENGTH = 12, 20
SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}


def mixed(**options: object) -> MoBiE:
    """MoBiE whose other Linears are binarized like the expert factors."""
    return MoBiE(**{"other_linears": "mixed_order"} | options)


def correlated(rows: int, features: int, generator: torch.Generator) -> Tensor:
    mixing = torch.randn(features, features, generator=generator) * torch.logspace(0, -1, features)
    return torch.randn(rows, features, generator=generator) @ mixing + 0.3


def gradient_weights(method: MoBiE, gradient: Tensor, basis: Tensor | None) -> Tensor | None:
    if not method.needs_gradients:
        return None
    return pool_channels(gradient if basis is None else gradient @ basis, method.gradient_groups)


def layer(method: MoBiE, seed: int = 0) -> tuple[ExpertBank, BankStats]:
    """Random experts, and statistics of random inputs and output gradients as the method wants them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = SEQUENCES * LENGTH
    shared = {shape: torch.randn(shape, generator=generator) for shape in set(SHAPES.values())}
    bank = ExpertBank(
        {n: (shared[s] + torch.randn(EXPERTS, *s, generator=generator)) * 0.05 for n, s in SHAPES.items()},
        (("gate", "up"), ("down",)),
        active=1,
    )
    bases = method.gradient_bases(bank)
    inputs = {width: correlated(tokens, width, generator) for width in (HIDDEN, INNER)}
    experts: dict[str, list[LinearStats]] = {}
    pooled: dict[str, LinearStats] = {}
    for name, (out, width) in SHAPES.items():
        x = inputs[width]
        means = x.view(SEQUENCES, LENGTH, width).mean(1)
        pooled[name] = replace(LinearStats.from_inputs(x), mean_gram=2 / SEQUENCES * means.T @ means)
        experts[name] = []
        for e in range(EXPERTS):
            gradient = (
                torch.randn(tokens, out, generator=generator) * torch.rand(tokens, 1, generator=generator).square()
            )
            routed = slice(40 * e, 40 * e + 160)
            weights = gradient_weights(method, gradient, bases[name])
            experts[name].append(LinearStats.from_inputs(x[routed], None if weights is None else weights[routed]))
    return bank, BankStats(experts, pooled)


def linear(method: MoBiE, out: int, width: int, seed: int = 0, tokens: int = 200) -> tuple[Tensor, LinearStats]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * 0.05
    x = correlated(tokens, width, generator)
    weights = gradient_weights(method, torch.randn(tokens, out, generator=generator), None)
    return weight, LinearStats.from_inputs(x, weights)


def run(method: MoBiE) -> dict[str, PackedBank]:
    return method.quantize_experts(*layer(method))


def output_error(weight: Tensor, quantized: Tensor, stats: LinearStats) -> float:
    h = stats.hessian.double()
    difference, original = (weight - quantized).double(), weight.double()
    return float((((difference @ h) * difference).sum() / ((original @ h) * original).sum()).sqrt())


def same_tensors(a: Packed, b: Packed) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.header() == b.header() and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    )


# exact cases


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("glas", [True, False])
def test_nothing_is_lost_when_experts_are_binary_in_the_latent(side: str, glas: bool) -> None:
    """U, V from Hadamard matrices: the factors are ±1/8, UΣ is exact in float16, every later step must keep it."""
    u, sigma, v = hadamard(16) / 4, torch.arange(16.0, 0, -1), hadamard(64)[:16] / 8
    bank = torch.stack(((u * sigma) @ v).split(32, dim=1))  # two experts (16, 32)
    bank = bank if side == "left" else bank.mT.contiguous()
    method = mixed(shared_side=side, basis_bits=16, block_size=16, gradient_groups=2, glas=glas)
    x = correlated(100, bank.shape[2], torch.Generator().manual_seed(0))
    stats = [LinearStats.from_inputs(x, torch.ones(100, 2))] * 2
    packed = method.quantize_experts(ExpertBank({"w": bank}, (("w",),)), BankStats({"w": stats}, {"w": stats[0]}))["w"]
    torch.testing.assert_close(packed.dequantize(), bank, rtol=0, atol=1e-5)
    eight_bits = replace(method, basis_bits=8)
    rounded = eight_bits.quantize_experts(ExpertBank({"w": bank}, (("w",),)), BankStats({"w": stats}, {"w": stats[0]}))[
        "w"
    ]
    torch.testing.assert_close(rounded.dequantize(), bank, rtol=0, atol=16 / 4 / 127 / 2 * 16 / 8 * 1.01)


def test_bank_of_zeros_stays_zero() -> None:
    method = mixed()
    bank, stats = layer(method)
    nothing = ExpertBank({n: torch.zeros_like(w) for n, w in bank.projections.items()}, bank.same_input)
    for packed in method.quantize_experts(nothing, stats).values():
        assert not packed.dequantize().any()


def test_result_is_basis_times_experts() -> None:
    method = mixed()
    bank, stats = layer(method)
    for name, packed in method.quantize_experts(bank, stats).items():
        assert packed.shape == tuple(bank.projections[name].shape)
        factors = torch.stack([expert.dequantize() for expert in packed.experts])
        torch.testing.assert_close(packed.dequantize(), packed.basis.dequantize() @ factors, rtol=1e-5, atol=1e-6)
        full, _ = joint_svd(bank.projections[name], "left")
        step = full.abs().amax(1, keepdim=True) / 127
        assert ((packed.basis.dequantize() - full).abs() <= 0.51 * step).all()


def test_second_order_columns_are_those_of_highest_saliency() -> None:
    """Independent of the implementation's factorisation: explicit inverses of the guided Hessians, float64."""
    method = mixed(joint_svd="off", nges=False, salient_share=0.1)
    bank, stats = layer(method)
    packed = method.quantize_experts(bank, stats)["down"]
    for weight, own, matrix in zip(bank.projections["down"], stats.experts["down"], packed.experts, strict=True):
        scores = torch.zeros(INNER, dtype=torch.float64)
        for hessian, rows in zip(own.guided.double(), weight.double().split(HIDDEN // 4), strict=True):
            damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(INNER, dtype=torch.float64)
            scores += (rows.square() / torch.linalg.inv(damped).diagonal().square()).sum(0)
        assert matrix.salient.tolist() == sorted(scores.argsort(descending=True)[:4].tolist())


def test_energy_weighted_rows_are_the_least_squares_of_the_weights() -> None:
    """‖W - Ŵ‖² = Σ_j σ_j² ‖V_j - V̂_j‖² for an orthonormal U: the optimum is the first singular pair of σ|V|."""
    options = {"scope": "matrix", "nges": False, "basis_bits": 16, "salient_share": 0.0, "iterations": 200}
    for weighting in ("sigma2", "uniform"):
        method = mixed(row_weighting=weighting, **options)
        bank, stats = layer(method)
        for name, packed in method.quantize_experts(bank, stats).items():
            basis, factors = joint_svd(bank.projections[name], "left")
            scaled = basis.double().norm(dim=0)[:, None] * factors.double().abs()
            least = torch.linalg.svdvals(scaled)[:, 1:].square().sum()
            ratio = (bank.projections[name] - packed.dequantize()).double().square().sum() / least
            assert ratio == pytest.approx(1, abs=1e-4) if weighting == "sigma2" else ratio > 1.0005


def test_basis_on_the_right_means_latent_inputs() -> None:
    """Its experts are binarized as any matrices would be whose inputs are `x (S Vᵀ)ᵀ`."""
    generator = torch.Generator().manual_seed(6)
    bank = torch.randn(2, 20, 30, generator=generator)
    x = correlated(200, 30, generator)
    weights = torch.rand(200, 4, generator=generator)
    basis, factors = joint_svd(bank, "right")
    packed = []
    for method, matrices, inputs in ((mixed(shared_side="right"), bank, x), (mixed(), factors, x @ basis.T)):
        method = method if matrices is bank else replace(method, joint_svd="off")
        method = replace(method, block_size=10, regularization=0.01)
        stats = [LinearStats.from_inputs(inputs, w) for w in (weights, weights.flip(0))]
        statistics = BankStats({"w": stats}, {"w": LinearStats.from_inputs(inputs)})
        packed.append(method.quantize_experts(ExpertBank({"w": matrices}, (("w",),)), statistics)["w"])
    for ours, theirs in zip(*(bank.experts for bank in packed), strict=True):
        assert torch.equal(ours.salient, theirs.salient)
        torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=1e-2, atol=1e-4)


# gradients


def test_gradient_bases_give_the_gradient_at_the_latent() -> None:
    method = mixed()
    bank, _ = layer(method)
    basis = method.gradient_bases(bank)["gate"].double()
    _, factors = joint_svd(bank.projections["gate"], "left")
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    latent = (x @ factors[0].double().T).requires_grad_()
    output = latent @ basis.T
    output.retain_grad()
    torch.testing.assert_close(output, x @ bank.projections["gate"][0].double().T, rtol=1e-4, atol=1e-5)
    output.sin().sum().backward()
    torch.testing.assert_close(output.grad @ basis, latent.grad)


@pytest.mark.parametrize(
    "options", [{"joint_svd": "off"}, {"gradient_at": "output"}, {"shared_side": "right"}], ids=lambda o: next(iter(o))
)
def test_gradient_at_the_output_needs_no_basis(options: dict[str, str]) -> None:
    method = mixed(**options)
    assert method.gradient_bases(layer(method)[0]) == {"gate": None, "up": None, "down": None}


def test_gradient_bases_follow_side_rank_and_fusion() -> None:
    bank, _ = layer(mixed())
    fewest = mixed(shared_side="fewest_bytes").gradient_bases(bank)
    assert fewest["down"] is None and fewest["gate"].shape == (INNER, INNER)
    assert mixed(rank=7).gradient_bases(bank)["down"].shape == (HIDDEN, 7)
    fused = mixed(joint_svd="fused_gate_up").gradient_bases(bank)
    assert torch.equal(fused["gate"], fused["up"])
    joint = torch.cat((bank.projections["gate"], bank.projections["up"]))
    assert torch.equal(fused["gate"], joint_svd(joint, "left")[0])


def test_only_glas_needs_gradients() -> None:
    assert mixed().needs_gradients and not mixed(glas=False).needs_gradients


def test_equal_gradients_give_the_local_result() -> None:
    results = []
    for glas in (True, False):
        method = mixed(joint_svd="off", glas=glas)
        weight, stats = linear(mixed(glas=False), 24, 160)
        guided = stats.hessian.expand(4, -1, -1).contiguous()
        results.append(method.quantize_linear(weight, replace(stats, guided=guided)))
    assert same_tensors(*results)


# account


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [None, 10])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_paper_bits_are_those_of_section_b_2_3(side: str, rank: int | None, bits: int) -> None:
    """Eq. 44, (r / kI) B_h + (r / O) B_b, O and I exchanged for a basis on the right; B_b = 2s + (1 - s)."""
    method = mixed(shared_side=side, rank=rank, basis_bits=bits, glas=False)
    active = 2
    for name, packed in run(method).items():
        out, width = SHAPES[name]
        shared, own = (out, width) if side == "left" else (width, out)
        r = min(rank or shared, shared)
        columns = width if side == "left" else r
        binary = 1 + round(0.05 * columns) / columns
        expected = r / (active * own) * bits + r / shared * binary
        assert packed.ledger(active / EXPERTS).paper_bits == pytest.approx(expected, rel=1e-6)


def test_no_basis_means_no_shared_bits() -> None:
    packed = run(mixed(joint_svd="off", glas=False))["gate"]
    assert packed.basis is None
    assert packed.ledger(0.5).paper_bits == pytest.approx(1 + 8 / 160)


def test_fused_projections_share_one_basis() -> None:
    method = mixed(joint_svd="fused_gate_up")
    packed = run(method)
    assert set(packed) == {GATE_UP, "down"}
    assert packed[GATE_UP].shape == (2 * EXPERTS, INNER, HIDDEN)


# the same, again


def test_same_inputs_give_the_same_bytes() -> None:
    first, second = (run(mixed()) for _ in range(2))
    assert all(same_tensors(first[name], second[name]) for name in first)


def test_experts_without_a_joint_basis_are_independent() -> None:
    method = mixed(joint_svd="off", nges=False, tolerance=0.0)
    bank, stats = layer(method)
    together = method.quantize_experts(bank, stats)
    for name, packed in together.items():
        alone = [method.quantize_linear(w, s) for w, s in zip(bank.projections[name], stats.experts[name], strict=True)]
        for ours, theirs in zip(packed.experts, alone, strict=True):
            assert torch.equal(ours.salient, theirs.salient)
            torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=1e-2, atol=1e-4)


# edges


@pytest.mark.parametrize("width", [1, 9, 100, 128, 129, 200, 256])
def test_any_width(width: int) -> None:
    method = mixed()
    weight, stats = linear(method, 12, width)
    packed = method.quantize_linear(weight, stats)
    assert packed.shape == (12, width)
    assert len(packed.salient) == round(0.05 * width)
    assert packed.plain.row_scale.shape[-1] == -(-width // 128)
    assert 0 < output_error(weight, packed.dequantize(), stats) < 0.75


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_gradient_groups(rows: int) -> None:
    method = mixed()
    weight, stats = linear(method, rows, 30)
    assert method.quantize_linear(weight, replace(stats, guided=stats.hessian.expand(4, 30, 30))).shape == (rows, 30)


@pytest.mark.parametrize("joint_svd", ["separate", "off"])
def test_dead_columns_become_zero_in_the_latent(joint_svd: str) -> None:
    method = mixed(joint_svd=joint_svd, gradient_groups=1)
    generator = torch.Generator().manual_seed(2)
    bank = torch.randn(2, 20, 150, generator=generator)
    x = correlated(300, 150, generator)
    dead = [0, 70, 149]
    x[:, dead] = 0
    stats = [LinearStats.from_inputs(x, torch.ones(300, 1))] * 2
    packed = method.quantize_experts(ExpertBank({"w": bank}, (("w",),)), BankStats({"w": stats}, {"w": stats[0]}))["w"]
    dense = packed.dequantize()
    assert not dense[..., dead].any()
    alive = torch.ones(150, dtype=torch.bool)
    alive[dead] = False
    assert (dense[..., alive].abs().amax(1) > 0).all()
    assert all(not set(expert.salient.tolist()) & set(dead) for expert in packed.experts)


def test_one_dead_column_leaves_the_choice_of_salient_columns_alone() -> None:
    """Small loss gradients beside a dead column, whose place on the diagonal of the Hessian is filled up."""
    method = mixed(joint_svd="off", nges=False, salient_share=0.2)
    weight, stats = linear(method, 16, 40)
    alive = method.quantize_linear(weight, replace(stats, guided=1e-8 * stats.guided)).salient
    wider = torch.nn.functional.pad(weight, (0, 1), value=1.0)
    padded = LinearStats(
        torch.nn.functional.pad(stats.hessian, (0, 1, 0, 1)),
        stats.tokens,
        torch.nn.functional.pad(stats.mean_abs, (0, 1)),
        torch.nn.functional.pad(stats.sample, (0, 1)),
        torch.nn.functional.pad(1e-8 * stats.guided, (0, 1, 0, 1)),
    )
    assert torch.equal(method.quantize_linear(wider, padded).salient, alive)


def test_expert_without_inputs_becomes_zero() -> None:
    method = mixed(joint_svd="off", glas=False)
    bank, stats = layer(method)
    nothing = LinearStats.from_inputs(torch.zeros(4, INNER))
    experts = {**stats.experts, "down": [nothing, *stats.experts["down"][1:]]}
    dense = method.quantize_experts(bank, BankStats(experts, stats.pooled))["down"].dequantize()
    assert not dense[0].any() and dense[1:].isfinite().all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_column_or_every_column_salient(share: float) -> None:
    method = mixed(salient_share=share)
    weight, stats = linear(method, 12, 140)
    packed = method.quantize_linear(weight, stats)
    assert len(packed.salient) == round(share * 140)
    assert (packed.extra is None) == (share == 0)
    assert packed.paper_bits() == 1 + share


def test_more_salient_columns_lower_the_error() -> None:
    errors = []
    for share in (0.0, 0.25, 1.0):
        method = mixed(salient_share=share)
        weight, stats = linear(method, 32, 140)
        errors.append(output_error(weight, method.quantize_linear(weight, stats).dequantize(), stats))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"salient_share": 1.5}, "salient_share"),
        ({"rank": 0}, "rank"),
        ({"regularization": 0.0}, "regularization"),
        ({"block_size": 0}, "block_size"),
        ({"nges_target": "router"}, "router"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        mixed(**options)


def test_glas_without_gradients_is_refused() -> None:
    weight, stats = linear(mixed(glas=False), 8, 20)
    with pytest.raises(DataError, match="1 of 1 matrices have no Hessian weighted by loss gradients"):
        mixed().quantize_linear(weight, stats)


def test_means_of_sequences_need_sequences() -> None:
    method = mixed(null_space="position_mean")
    bank, stats = layer(method)
    pooled = {name: replace(s, mean_gram=None) for name, s in stats.pooled.items()}
    with pytest.raises(UnsupportedError, match="position_mean"):
        method.quantize_experts(bank, BankStats(stats.experts, pooled))


# NGES and the router


def test_nges_acts_where_it_is_aimed() -> None:
    def dense(method: MoBiE) -> Tensor:
        return run(method)["gate"].dequantize()

    weight, stats = linear(mixed(glas=False), EXPERTS, HIDDEN)

    def router(method: MoBiE) -> Tensor:
        return method.quantize_router(weight, stats).dequantize()

    both = mixed(router="binarized")
    router_only = mixed(router="binarized", nges_target="router")
    off = mixed(router="binarized", nges=False)
    assert torch.equal(dense(router_only), dense(off)) and not torch.equal(dense(both), dense(off))
    assert torch.equal(router(both), router(router_only)) and not torch.equal(router(both), router(off))
    assert both.quantizes_router and not mixed().quantizes_router


def test_nges_modulates_the_sum_of_both_orders() -> None:
    """Eqs. 48 to 50 in a loop in float64, on what the method stores without NGES."""
    options = {"joint_svd": "off", "glas": False, "salient_share": 0.2, "regularization": 0.05, "tolerance": 0.0}
    plain, modulated = (mixed(nges=nges, **options) for nges in (False, True))
    bank, stats = layer(plain)
    binarized = plain.quantize_experts(bank, stats)["down"].dequantize().double()
    values, vectors = torch.linalg.eigh(stats.pooled["down"].hessian.double())
    energy = values[:-1].flip(0)  # falling, without the first
    first = next(i for i in range(1, INNER) if energy[i:].sum() <= 0.1 * energy[:i].sum())
    null = vectors.flip(1)[:, 1 + first :]
    weight = bank.projections["down"].double()
    target = weight - (weight - binarized) @ null @ null.T
    row, column = torch.ones(EXPERTS, HIDDEN, 1).double(), torch.ones(EXPERTS, 1, INNER).double()
    for _ in range(15):
        part = binarized * column
        row = ((part * target).sum(2, keepdim=True) + 0.05) / (part.square().sum(2, keepdim=True) + 0.05)
        part = binarized * row
        column = ((part * target).sum(1, keepdim=True) + 0.05) / (part.square().sum(1, keepdim=True) + 0.05)
    result = modulated.quantize_experts(bank, stats)["down"].dequantize().double()
    expected = row * binarized * column
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-4)  # scales of either order are in float16
    assert (expected - binarized).norm() > 0.02 * binarized.norm()


def test_nges_lowers_the_error_that_strong_inputs_see() -> None:
    """The part of the error outside the null space, over all experts, where it is meant to shrink."""
    errors = []
    for nges in (True, False):
        method = mixed(joint_svd="off", nges=nges, regularization=0.01)
        bank, stats = layer(method)
        dense = method.quantize_experts(bank, stats)["gate"].dequantize()
        values, vectors = torch.linalg.eigh(stats.pooled["gate"].hessian.double())
        energy = values[:-1].flip(0)  # without the first
        tail = torch.stack([energy[i:].sum() / max(energy[:i].sum(), 1e-30) for i in range(len(energy))])
        strong = 1 + int((tail <= 0.1).nonzero()[0])
        seen = vectors.flip(1)[:, :strong]
        errors.append(((bank.projections["gate"] - dense).double() @ seen).norm().item())
    assert errors[0] < errors[1]


# configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_names_only_what_differs(name: str) -> None:
    config = load_method(name, LAYOUT)
    method = config.build()
    default = MoBiE()
    assert isinstance(method, MoBiE)
    assert all(getattr(method, option) != getattr(default, option) for option in config.options)
    assert bool(config.options) == (name != "mobie")
    assert config.description.endswith(".") and (config.paper is not None) == (name == "mobie")


def test_configurations_are_told_apart() -> None:
    configs = [load_method(name, LAYOUT) for name in CONFIGS]
    assert len({c.label for c in configs}) == len({c.build() for c in configs}) == len(configs)


def test_rows_of_the_ablation_table() -> None:
    parts = {}
    for name in ("mobie-none", "mobie-cejd", "mobie-glas", "mobie-nges", "mobie-cejd-glas", "mobie"):
        method = load_method(name, LAYOUT).build()
        parts[name] = (method.joint_svd != "off", method.glas, method.nges)
        assert replace(method, joint_svd="separate", glas=True, nges=True) == MoBiE()
    assert list(parts.values()) == [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, True, False),
        (True, True, True),
    ]


@pytest.fixture(scope="module")
def default_result() -> dict[str, Tensor]:
    return everything(MoBiE())


def everything(method: MoBiE) -> dict[str, Tensor]:
    """Dequantized experts, one Linear and the router (in 16 bits where it is not binarized)."""
    dense = {name: packed.dequantize() for name, packed in run(method).items()}
    if GATE_UP in dense:
        dense["gate"], dense["up"] = dense.pop(GATE_UP).chunk(2)
    weight, stats = linear(method, 24, HIDDEN, seed=3)
    dense["linear"] = method.quantize_linear(weight, stats).dequantize()
    weight, stats = linear(method, EXPERTS, HIDDEN, seed=4)
    packed = method.quantize_router(weight, stats) if method.quantizes_router else Dense16(weight.bfloat16())
    dense["router"] = packed.dequantize()
    return dense


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_changes_the_result(name: str, default_result: dict[str, Tensor]) -> None:
    method = load_method(name, LAYOUT).build()
    result = everything(method)
    bank, stats = layer(method)
    for projection, weight in bank.projections.items():
        errors = [
            output_error(w, q, s) for w, q, s in zip(weight, result[projection], stats.experts[projection], strict=True)
        ]
        assert max(errors) < 0.75
    assert result.keys() == default_result.keys()
    assert any(not torch.equal(result[part], default_result[part]) for part in result)


def test_sixteen_bit_linears_are_kept() -> None:
    method = MoBiE(other_linears="16bit")
    weight, stats = linear(method, 8, 20)
    packed = method.quantize_linear(weight, stats)
    assert isinstance(packed, Dense16)
    assert torch.equal(packed.weight, weight.bfloat16())


def test_misspelt_option_is_refused(repository: Layout) -> None:
    """A misspelt option in a copy of a file is refused with the near name."""
    path: Path = repository.config / "methods" / "mobie-u4.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("basis_bits", "basis_bit"), encoding="utf-8")
    with pytest.raises(ConfigError, match="basis_bits"):
        load_method("mobie-u4", repository).build()


@pytest.mark.parametrize("glas", [True, False])
def test_other_linears_are_arb_rc_with_this_saliency(glas: bool) -> None:
    method = MoBiE(glas=glas, gradient_groups=2, feedback="triangular")
    weight, stats = linear(method, 24, 160)
    packed = method.quantize_linear(weight, stats)
    reference = ARB(
        column_group_bitmap=False,
        saliency_rule="inverse_diagonal",
        saliency_source="guided" if glas else "local",
        gradient_groups=2,
        feedback="triangular",
    ).quantize_linear(weight, stats)
    assert packed.header() == reference.header()
    assert all(torch.equal(tensor, reference.tensors()[name]) for name, tensor in packed.tensors().items())
    assert not packed.extra_is_residual and packed.plain.bitmap is not None and packed.extra.bitmap is None
