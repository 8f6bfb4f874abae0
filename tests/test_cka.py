"""Linear CKA against closed forms and the definition by centred kernels (HSIC), in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobie.errors import MeasurementError, UnsupportedError
from mobie.methods.mobie.cejd import joint_svd
from mobie.packing.bank import GATE_UP, PackedBank
from mobie.packing.checkpoint import PackedBlock
from mobie.packing.dense import Dense16
from mobie.scoring.cka import CkaProtocol, chance_level, cka, cka_matrix

EXPERTS, WIDTH, HIDDEN = 4, 6, 10
PROJECTIONS = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
SAMPLES = ("residual", "inputs", "outputs")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with HSIC(K, L) = tr(K H L H), H = I - 1/n."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    k, m = (a.astype(np.float64) @ a.astype(np.float64).T for a in (x, y))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ centring @ b @ centring))

    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


# ---------------------------------------------------------------- the matrix


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4, 9), (2, 300, 7)])  # the last one in several slabs
def test_against_the_definition(shape: tuple[int, ...]) -> None:
    bank = gaussian(*shape) + 0.7  # far from centred
    got = cka_matrix(bank)
    for i in range(shape[0]):
        for j in range(shape[0]):
            assert got[i, j].item() == pytest.approx(by_definition(bank[i].numpy(), bank[j].numpy()), abs=1e-10)


def test_of_single_features_it_is_the_squared_correlation() -> None:
    bank = gaussian(2, 20, 1) + 3
    expected = np.corrcoef(bank[0, :, 0].double(), bank[1, :, 0].double())[0, 1] ** 2
    assert cka_matrix(bank)[0, 1].item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(3, 12), features=st.integers(1, 12), scale=st.floats(0.01, 100))
def test_rotating_reordering_scaling_and_shifting_features_changes_nothing(
    seed: int, samples: int, features: int, scale: float
) -> None:
    x, y = gaussian(2, samples, features, seed=seed).double()
    rotation, _ = torch.linalg.qr(gaussian(features, features, seed=seed + 1).double())
    order = torch.randperm(features, generator=torch.Generator().manual_seed(seed))
    shifted = scale * x + gaussian(features, seed=seed + 2)
    got = cka_matrix(torch.stack([x, x @ rotation, x[:, order], shifted, y]))
    torch.testing.assert_close(got[:4, :4], torch.ones(4, 4, dtype=torch.float64))
    torch.testing.assert_close(got[:4, 4], got[4, 0].expand(4))
    assert -1e-12 <= got[4, 0] <= 1 + 1e-12
    torch.testing.assert_close(got, got.T)


def test_reordering_the_samples_of_one_matrix_does_change_it() -> None:
    x = gaussian(12, 3)
    assert cka_matrix(torch.stack([x, x.flip(0)]))[0, 1] < 0.9


@pytest.mark.parametrize(("samples", "features"), [(60, 30), (30, 60), (100, 10)])
def test_independent_gaussians_come_to_the_chance_level(samples: int, features: int) -> None:
    got = cka_matrix(gaussian(24, samples, features))
    pairs = got[torch.ones_like(got).triu(1).bool()]
    assert pairs.mean().item() == pytest.approx(chance_level(samples, features), abs=0.006)


# ---------------------------------------------------------------- blocks


def packed(weight: Tensor, side: str) -> PackedBank:
    """A joint decomposition stored in 16 bits instead of one."""
    basis, factors = joint_svd(weight, side)
    return PackedBank(tuple(Dense16(v.half()) for v in factors), Dense16(basis.half()), side)


def blocks(
    layers: int = 2, side: str = "left", fused: bool = False
) -> tuple[list[tuple[PackedBlock, PackedBlock]], list[dict[str, Tensor]]]:
    """Full-precision and decomposed blocks behind a dense one, and their weights."""
    found, weights = [(PackedBlock({}, {}), PackedBlock({}, {}))], []
    for layer in range(layers):
        own = {
            name: gaussian(EXPERTS, *shape, seed=10 * layer + number).half().float()
            for number, (name, shape) in enumerate(PROJECTIONS.items())
        }
        reference = {n: PackedBank(tuple(Dense16(e.half()) for e in w)) for n, w in own.items()}
        if fused:
            both = torch.cat([own["gate"], own["up"]])
            decomposed = {GATE_UP: packed(both, side), "down": packed(own["down"], side)}
        else:
            decomposed = {n: packed(w, side) for n, w in own.items()}
        found.append((PackedBlock({}, reference), PackedBlock({}, decomposed)))
        weights.append(own)
    return found, weights


def exact_factors(weight: np.ndarray, side: str) -> np.ndarray:
    """V_e by numpy's SVD of the experts side by side (eq. 4), or one above the other.

    A singular vector's sign is a convention; it is that of the largest entry on the basis' side being positive.
    """
    if side == "right":
        return exact_factors(weight.transpose(0, 2, 1), "left").transpose(0, 2, 1)
    u, _, v = np.linalg.svd(np.concatenate(list(weight), axis=1), full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    return np.stack(np.split(signs[:, None] * v, len(weight), axis=1))


def mean_pair(bank: np.ndarray, rows: bool) -> tuple[float, float]:
    features = bank if rows else bank.transpose(0, 2, 1)
    pairs = [by_definition(features[i], features[j]) for i in range(len(bank)) for j in range(i)]
    return float(np.mean(pairs)), float(np.std(pairs))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_against_brute_force(side: str, samples: str) -> None:
    pairs, weights = blocks(side=side)
    got = cka(pairs, CkaProtocol(samples=samples))
    values = {m.name: m for m in got.measurements}
    assert len(values) == 2 * 3 * 3 + 3 * 3 + 3 and set(got.spread) == set(values)
    for layer, own in enumerate(weights):
        for projection, weight in own.items():
            rows = {"residual": projection == "down", "inputs": False, "outputs": True}[samples]
            banks = {"before": weight.double().numpy(), "after": exact_factors(weight.double().numpy(), side)}
            for stage, bank in banks.items():
                name = f"layer{layer}.{projection}.{stage}"
                mean, spread = mean_pair(bank, rows)
                assert values[name].value == pytest.approx(mean, abs=1e-5)
                assert got.spread[name] == pytest.approx(spread, abs=1e-5)
                assert (values[name].n, values[name].stderr) == (EXPERTS * (EXPERTS - 1) // 2, None)
            stored = values[f"layer{layer}.{projection}.after_binarized"].value
            exact = values[f"layer{layer}.{projection}.after"].value
            assert stored != exact and stored == pytest.approx(exact, abs=2e-3)  # 16 bits here
            n, p = weight.shape[1:] if rows else weight.shape[:0:-1]
            assert values[f"layer{layer}.{projection}.before"].chance == pytest.approx(p / (n + p))
    for stage in ("before", "after", "after_binarized"):
        parts = [m for name, m in values.items() if name.startswith("layer") and name.endswith(f".{stage}")]
        assert values[stage].value == pytest.approx(np.mean([m.value for m in parts])) and values[stage].n == 36
        assert values[stage].chance == pytest.approx(np.mean([m.chance for m in parts]))
        gates = [m.value for m in parts if ".gate." in m.name]
        assert values[f"gate.{stage}"].value == pytest.approx(np.mean(gates)) and values[f"gate.{stage}"].n == 12
    for other in SAMPLES:
        spans = {m.name: m.value for m in cka(pairs, CkaProtocol(samples=other)).measurements if "layer" not in m.name}
        assert got.readings[other] == spans


def test_gate_and_up_that_were_decomposed_together_are_told_apart() -> None:
    pairs, weights = blocks(layers=1, fused=True)
    values = {m.name: m.value for m in cka(pairs, CkaProtocol()).measurements}
    both = exact_factors(torch.cat([weights[0]["gate"], weights[0]["up"]]).double().numpy(), "left")
    for name, factors in (("gate", both[:EXPERTS]), ("up", both[EXPERTS:])):
        assert values[f"layer0.{name}.after"] == pytest.approx(mean_pair(factors, rows=False)[0], abs=1e-5)
        assert values[f"layer0.{name}.before"] == pytest.approx(
            mean_pair(weights[0][name].double().numpy(), rows=False)[0], abs=1e-9
        )


def test_a_truncated_basis_is_compared_with_exact_factors_of_its_rank() -> None:
    pairs, weights = blocks(layers=1)
    reference, quantized = pairs[1]
    basis, factors = joint_svd(weights[0]["gate"], "left", 3)
    cut = PackedBank(tuple(Dense16(v.half()) for v in factors), Dense16(basis.half()), "left")
    block = PackedBlock({}, dict(quantized.experts) | {"gate": cut})
    values = {m.name: m for m in cka([(reference, block)], CkaProtocol()).measurements}
    expected = mean_pair(exact_factors(weights[0]["gate"].double().numpy(), "left")[:, :3], rows=False)[0]
    assert values["layer0.gate.after"].value == pytest.approx(expected, abs=1e-5)
    assert values["layer0.gate.after"].chance == pytest.approx(3 / (HIDDEN + 3))


def test_the_order_of_an_experts_hidden_units_does_not_matter() -> None:
    pairs, weights = blocks(layers=1)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    for own, shuffle in ((weights[0]["gate"], lambda w: w[order]), (weights[0]["down"], lambda w: w[:, order])):
        own[1] = shuffle(own[1])
    reference = {n: PackedBank(tuple(Dense16(e.half()) for e in w)) for n, w in weights[0].items()}
    quantized = {n: packed(w, "left") for n, w in weights[0].items()}
    shuffled = [(PackedBlock({}, reference), PackedBlock({}, quantized))]
    before, after = (
        {m.name: m.value for m in cka(found, CkaProtocol()).measurements if m.name.endswith("before")}
        for found in (pairs, shuffled)
    )
    assert before == pytest.approx(after, abs=1e-12)
    inputs = [cka(found, CkaProtocol(samples="inputs")).measurements for found in (pairs, shuffled)]
    down = [next(m.value for m in found if m.name == "layer0.down.before") for found in inputs]
    assert abs(down[0] - down[1]) > 1e-4


def test_matrices_of_the_first_middle_and_last_layer_are_kept() -> None:
    pairs, weights = blocks(layers=4)
    got = cka(pairs, CkaProtocol())
    assert list(got.matrices) == ["layer0.gate", "layer2.gate", "layer3.gate"]
    kept = np.array(got.matrices["layer2.gate"]["before"])
    expected = cka_matrix(weights[2]["gate"].mT).numpy()
    assert np.abs(kept - expected).max() <= 0.5e-4 + 1e-12 and (kept == kept.round(4)).all()
    assert set(cka(blocks(layers=1)[0], CkaProtocol()).matrices) == {"layer0.gate"}


def test_what_has_no_such_similarity_says_why() -> None:
    pairs, weights = blocks(layers=1)
    reference, quantized = pairs[1]
    with pytest.raises(UnsupportedError, match="gate has no shared basis"):
        cka([(reference, reference)], CkaProtocol())
    with pytest.raises(UnsupportedError, match="no experts"):
        cka(pairs[:1], CkaProtocol())
    single = {n: PackedBank(p.experts[:1], p.basis, p.side) for n, p in quantized.experts.items()}
    one = {n: PackedBank(p.experts[:1]) for n, p in reference.experts.items()}
    with pytest.raises(UnsupportedError, match="1 expert, expected two"):
        cka([(PackedBlock({}, one), PackedBlock({}, single))], CkaProtocol())
    zero = Dense16(torch.zeros(WIDTH, HIDDEN).half())
    gate = quantized.experts["gate"]
    dead = PackedBank((gate.experts[0], zero, *gate.experts[2:]), gate.basis, gate.side)
    with pytest.raises(MeasurementError, match=r"layer0.gate.after_binarized: the matrices of experts \[1\]"):
        cka([(reference, PackedBlock({}, dict(quantized.experts) | {"gate": dead}))], CkaProtocol())
