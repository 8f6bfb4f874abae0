"""NoWag-VQ: k-means against brute force and by hand, the codebook of a bank, the format and its bytes."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_method_contract import assert_same, layer, stats

from mobie.config import load_method
from mobie.errors import ConfigError, DataError
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.methods.kmeans import draw, kmeans, means, nearest, seed_plus_plus, totals
from mobie.methods.nowag import NoWag, normalize
from mobie.packing.bank import PackedBank
from mobie.packing.base import FORMATS
from mobie.packing.vector import VectorCodes
from mobie.speed.footprint import bank_bytes


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(n: int, k: int, d: int, seed: int, zeros: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, weights, some of them 0 if wanted, and a codebook; float64."""
    g = generator(seed)
    vectors, codebook = (torch.randn(m, d, generator=g, dtype=torch.float64) for m in (n, k))
    weights = torch.rand(n, d, generator=g, dtype=torch.float64)
    return vectors, weights * (torch.rand(n, d, generator=g) > 0.4) if zeros else weights, codebook


def brute_distances(vectors: torch.Tensor, weights: torch.Tensor, codebook: torch.Tensor) -> list[list[float]]:
    """`Σ_i w_i (x_i - c_i)²`, number by number."""
    rows = zip(vectors.tolist(), weights.tolist(), strict=True)
    triples = [[(x, w, c) for c in codebook.tolist()] for x, w in rows]
    return [
        [sum(wi * (xi - ci) ** 2 for xi, wi, ci in zip(x, w, c, strict=True)) for x, w, c in row] for row in triples
    ]


# k-means


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 10), k=st.integers(1, 150), d=st.integers(1, 7), seed=st.integers(0, 999), zeros=st.booleans())
def test_nearest_is_the_least_of_all_distances(n: int, k: int, d: int, seed: int, zeros: bool) -> None:
    vectors, weights, codebook = problem(n, k, d, seed, zeros)
    found = nearest(vectors, weights, codebook)
    for distances, index in zip(brute_distances(vectors, weights, codebook), found.tolist(), strict=True):
        assert distances[index] == pytest.approx(min(distances), rel=1e-9, abs=1e-12)


def test_nearest_of_many_vectors_and_centroids_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, weights, codebook = problem(700, 65, 6, seed=1)
    whole = nearest(vectors, weights, codebook)
    assert torch.equal(whole, torch.tensor(brute_distances(vectors, weights, codebook)).argmin(1))
    monkeypatch.setattr("mobie.methods.kmeans.CHUNK_DISTANCES", {"cpu": 1000})
    assert torch.equal(nearest(vectors, weights, codebook), whole)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 12), d=st.integers(1, 6), seed=st.integers(0, 999), zeros=st.booleans())
def test_no_iteration_raises_the_objective(n: int, k: int, d: int, seed: int, zeros: bool) -> None:
    vectors, weights, codebook = problem(n, k, d, seed, zeros)
    errors = []
    for _ in range(6):
        error, sums = totals(vectors, weights, codebook)
        errors.append(error)
        codebook = means(sums, codebook)
    assert all(after <= before * (1 + 1e-12) + 1e-15 for before, after in zip(errors, errors[1:], strict=False))


def test_first_step_by_hand() -> None:
    # centroids (0, 0) and (4, 4); the vector (3, 0) weighs its coordinates 1 : 3
    #   to the first 1·9 + 3·0 = 9, to the second 1·1 + 3·16 = 49: the first, though 3 is nearer to 4
    # the first then has (3, 0) by (1, 3) and (1, 2) by (1, 1): (3 + 1) / 2 = 2 and (0 + 2) / 4 = 0.5
    vectors = torch.tensor([[3.0, 0.0], [1.0, 2.0], [5.0, 4.0]])
    weights = torch.tensor([[1.0, 3.0], [1.0, 1.0], [2.0, 0.0]])
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    assert nearest(vectors, weights, codebook).tolist() == [0, 0, 1]
    error, sums = totals(vectors, weights, codebook)
    assert error == 9 + (1 + 4) + 2
    assert sums.tolist() == [[2, 4, 4, 2], [2, 0, 10, 0]]
    assert means(sums, codebook).tolist() == [[2, 0.5], [5, 4]]  # no weight reaches the last coordinate: it stays


def test_best_of_all_starts_is_the_best_of_all_partitions() -> None:
    vectors, weights, _ = problem(7, 2, 2, seed=7)
    partitions = []
    for labels in product(range(2), repeat=7):
        sums = torch.zeros(2, 4, dtype=torch.float64)
        for label, x, w in zip(labels, vectors, weights, strict=True):
            sums[label] += torch.cat([w, w * x])
        centroids = means(sums, torch.zeros(2, 2, dtype=torch.float64))
        distances = brute_distances(vectors, weights, centroids)
        partitions.append(sum(row[label] for row, label in zip(distances, labels, strict=True)))

    def find(codebook: torch.Tensor) -> tuple[float, torch.Tensor]:
        return totals(vectors, weights, codebook)

    ends = [find(kmeans(find, vectors[list(pair)], 50, 0.0))[0] for pair in combinations(range(7), 2)]
    assert min(ends) == pytest.approx(min(partitions), rel=1e-12)
    assert max(ends) > min(ends) * 1.01  # a poor start is not made good: the check above says something


def test_kmeans_ends_when_the_objective_falls_no_more() -> None:
    vectors, weights, codebook = problem(40, 3, 2, seed=0)
    calls: list[float] = []

    def find(current: torch.Tensor) -> tuple[float, torch.Tensor]:
        error, sums = totals(vectors, weights, current)
        calls.append(error)
        return error, sums

    end = kmeans(find, codebook, 1000, 0.0)
    assert 2 < len(calls) < 100
    error, sums = totals(vectors, weights, end)
    assert torch.allclose(means(sums, end), end)
    calls.clear()
    kmeans(find, codebook, 1000, 0.9)  # no iteration lowers it to a tenth but perhaps the first
    assert len(calls) <= 3
    assert torch.equal(kmeans(find, codebook, 0, 0.0), codebook)


def test_seeding_takes_distinct_vectors_far_from_each_other() -> None:
    clusters = torch.randn(8, 6, generator=generator(0)) * 100
    vectors = clusters.repeat_interleave(50, 0) + 0.01 * torch.randn(400, 6, generator=generator(1))
    for seed in range(10):
        found = seed_plus_plus(vectors, torch.ones_like(vectors), 8, generator(seed))
        assert len(torch.cdist(found, clusters).argmin(1).unique()) == 8  # one of each cluster
    vectors = torch.randn(400, 6, generator=generator(2))
    many = seed_plus_plus(vectors, torch.ones_like(vectors), 300, generator(0))  # several draws a round
    assert len(many) == 300 and len(many.unique(dim=0)) == 300
    repeated = torch.ones(20, 6)
    assert seed_plus_plus(repeated, repeated, 4, generator(0)).tolist() == [[1.0] * 6] * 4


def test_draws_are_distinct_in_order_and_those_of_the_seed() -> None:
    values = torch.zeros(100, 2)
    found = draw(values, 30, generator(3))
    assert len(found.unique()) == 30 and torch.equal(found, found.sort().values)
    assert torch.equal(found, draw(values, 30, generator(3)))
    assert not torch.equal(found, draw(values, 30, generator(4)))
    assert torch.equal(draw(values, 100, generator(0)), torch.arange(100))


# normalization


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator(seed))


def test_columns_then_rows_have_unit_norm_but_for_float16() -> None:
    normalized, column, row = normalize(random_weight(30, 50) * torch.rand(50).add(0.1))
    assert torch.allclose(normalized.norm(dim=1), torch.ones(30), rtol=2e-3)
    assert torch.allclose((normalized * row[:, None]).norm(dim=0), torch.ones(50), rtol=2e-3)
    for norm in (column, row):
        assert torch.equal(norm.half().float(), norm)


@pytest.mark.parametrize("codebook_bits", [3, 12])
def test_scaling_a_column_scales_the_result(codebook_bits: int) -> None:
    weight, own = random_weight(24, 40), stats(40, 1, 0)
    method = NoWag(codebook_bits=codebook_bits)
    factor = 2.0 ** torch.arange(-4, 4).repeat(5)  # powers of two: exact in float16
    before, after = (method.quantize_linear(w, own).dequantize() for w in (weight, weight * factor))
    assert torch.equal(before * factor, after)


def test_scaling_the_matrix_or_the_inputs() -> None:
    weight, own = random_weight(24, 40), stats(40, 1, 0)
    method = NoWag(codebook_bits=4)
    expected = method.quantize_linear(weight, own).dequantize()
    assert torch.equal(method.quantize_linear(4 * weight, own).dequantize(), 4 * expected)
    louder = LinearStats(1024 * own.hessian, own.tokens, own.mean_abs, own.sample)
    assert torch.equal(method.quantize_linear(weight, louder).dequantize(), expected)


def test_dead_rows_and_columns_stay_zero_and_others_as_they_are() -> None:
    weight, own = random_weight(20, 42), stats(42, 1, 0)
    weight[3], weight[:, 7] = 0, 0
    dense = NoWag(codebook_bits=12).quantize_linear(weight, own).dequantize()
    assert (dense[3] == 0).all() and (dense[:, 7] == 0).all()
    assert torch.allclose(dense, weight, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_without_norm_are_refused(value: float) -> None:
    weight = random_weight(4, 12)
    weight[1, 2] = value
    with pytest.raises(DataError, match="norms of a weight matrix are not finite"):
        NoWag().quantize_linear(weight, stats(12, 1, 0))


# the method


def test_as_many_vectors_as_centroids_are_kept_to_float16() -> None:
    """240 vectors, 40 of them different, on 256 centroids, and on 64."""
    pattern = random_weight(40, 6)
    weight = pattern.repeat(1, 6)  # its columns repeat, so its normalized vectors do, too
    own = LinearStats.from_inputs(random_weight(200, 36, 1))
    for bits, start in ((8, "kmeans++"), (6, "kmeans++")):
        packed = NoWag(codebook_bits=bits, initialization=start, sample_vectors=None).quantize_linear(weight, own)
        assert len(packed.codebook) <= 40
        assert torch.allclose(packed.dequantize(), weight, rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["inputs", "outputs"])
def test_every_stored_code_is_the_best_of_the_stored_codebook(weighting: str) -> None:
    weight, own = random_weight(16, 40), stats(40, 1, 2)
    packed = NoWag(codebook_bits=4, weighting=weighting).quantize_linear(weight, own)
    normalized, column, row = (part.double() for part in normalize(weight))
    mean_square = own.hessian.diagonal().double() * (column**2 if weighting == "outputs" else 1)
    stored = packed.dequantize().double() / row[:, None] / column
    codebook = packed.codebook.double()
    for start in range(0, 40, 6):
        part = slice(start, min(start + 6, 40))
        distances = normalized[:, None, part] - codebook[:, : part.stop - start]
        best = (distances.square() * mean_square[part]).sum(-1).min(1).values
        found = ((normalized - stored)[:, part].square() * mean_square[part]).sum(1)
        assert torch.allclose(found, best, rtol=1e-4)


def test_weighting_by_outputs_lowers_their_error() -> None:
    """To be exact, the part of the output error that the diagonal of H has."""
    weight = random_weight(64, 96) * torch.rand(96, generator=generator(1)).add(0.05) ** 2
    own = stats(96, 1, 3)
    errors = {}
    for weighting in ("inputs", "outputs"):
        packed = NoWag(codebook_bits=5, weighting=weighting, iterations=30).quantize_linear(weight, own)
        errors[weighting] = float(((packed.dequantize() - weight).square() * own.hessian.diagonal()).sum())
    assert errors["outputs"] < 0.97 * errors["inputs"]


def test_more_iterations_over_all_vectors_lower_the_error() -> None:
    weight, own = random_weight(128, 96), stats(96, 1, 0)
    normalized, column, row = normalize(weight)
    errors = []
    for iterations in (0, 1, 20):
        method = NoWag(codebook_bits=5, sample_vectors=64, sample_iterations=1, iterations=iterations)
        difference = method.quantize_linear(weight, own).dequantize() / row[:, None] / column - normalized
        errors.append(float((difference.square() * own.hessian.diagonal()).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_the_two_starts_and_the_seed_are_told_apart_and_repeatable() -> None:
    weight, own = random_weight(40, 60), stats(60, 1, 0)
    options = [{}, {"initialization": "random"}, {"seed": 1}]
    dense = [NoWag(codebook_bits=4, **o).quantize_linear(weight, own).dequantize() for o in options]
    assert not any(torch.equal(a, b) for a, b in combinations(dense, 2))
    for option, before in zip(options, dense, strict=True):
        again = NoWag(codebook_bits=4, **option).quantize_linear(weight, own)
        assert torch.equal(again.dequantize(), before)


def test_inputs_that_no_token_reaches_weigh_alike() -> None:
    weight, blank = random_weight(30, 36), torch.zeros(36, 36)
    method = NoWag(codebook_bits=4)

    def dense(hessian: torch.Tensor) -> torch.Tensor:
        own = LinearStats(hessian, 0, torch.zeros(36), torch.zeros(0, 36))
        return method.quantize_linear(weight, own).dequantize()

    assert torch.equal(dense(blank), dense(torch.eye(36)))
    part = torch.eye(36)
    part[:12, :12] = 0  # two vectors of a row are not seen by any token; their nearest centroids serve them
    unseen = (dense(part) - weight)[:, :12].square().sum() / weight[:, :12].square().sum()
    assert unseen < 0.9


def test_matrix_scope_is_a_loop_over_experts() -> None:
    bank, statistics = layer(1)
    method = NoWag(codebook_bits=4)
    for name, packed in method.quantize_experts(bank, statistics).items():
        assert isinstance(packed, PackedBank)
        for expert, weight, own in zip(packed.experts, bank.projections[name], statistics.experts[name], strict=True):
            assert_same(expert, method.quantize_linear(weight, own))


def test_bank_of_one_expert_has_the_codebook_of_its_matrix() -> None:
    weight, own = random_weight(40, 36), stats(36, 1, 0)
    bank = ExpertBank({"w": weight[None]}, (("w",),))
    shared = NoWag(codebook_bits=4, codebook="bank").quantize_experts(bank, BankStats({"w": [own]}, {"w": own}))["w"]
    alone = NoWag(codebook_bits=4).quantize_linear(weight, own)
    assert shared.shape == (1, 40, 36)
    for name, tensor in alone.tensors().items():
        assert torch.equal(shared.tensors()[name].view(tensor.shape), tensor), name


def test_shared_codebook_is_stored_once_and_fits_all_experts() -> None:
    bank, statistics = layer(1)
    method = NoWag(codebook_bits=4, codebook="bank", iterations=5)
    packed = method.quantize_experts(bank, statistics)["down"]
    assert isinstance(packed, VectorCodes)
    assert packed.shape == tuple(bank.projections["down"].shape)
    assert packed.codebook.shape == (16, 6)
    for e, weight in enumerate(bank.projections["down"]):  # the norms are the expert's own, its codes the best
        normalized, column, row = normalize(weight)
        assert torch.equal(packed.column_norm[e].float(), column) and torch.equal(packed.row_norm[e].float(), row)
        stored = packed.dequantize()[e] / row[:, None] / column
        mean_square = statistics.experts["down"][e].hessian.diagonal()
        for start in range(0, 36, 6):
            part = slice(start, start + 6)
            distances = normalized[:, None, part] - packed.codebook.float()
            best = (distances.square() * mean_square[part]).sum(-1).min(1).values
            found = ((normalized - stored)[:, part].square() * mean_square[part]).sum(1)
            assert torch.allclose(found, best, rtol=1e-3)
    own_codebooks = NoWag(codebook_bits=4).quantize_experts(bank, statistics)["down"]
    assert packed.ledger().stored_bits < own_codebooks.ledger().stored_bits


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"codebook_bits": 0}, "codebook_bits is 0; expected 1 to 16"),
        ({"codebook_bits": 17}, "codebook_bits is 17; expected 1 to 16"),
        ({"dimension": 0}, "dimension is 0; expected 1 or more"),
        ({"iterations": -1}, "iterations is -1; expected 0 or more"),
        ({"sample_iterations": -1}, "sample_iterations is -1; expected 0 or more"),
        ({"tolerance": 1.0}, "tolerance is 1.0; expected 0 or more and less than 1"),
        ({"sample_vectors": 4095}, "sample_vectors is 4095; expected at least the 4096 vectors of a codebook"),
    ],
)
def test_refuses_bad_options(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"nowag: {complaint}"):
        NoWag(**options)


def test_configs_are_the_paper_s_and_differ_in_the_codebook() -> None:
    published, shared = load_method("nowag").build(), load_method("nowag-shared-codebook").build()
    assert (published.dimension, published.centroids, published.codebook) == (6, 4096, "matrix")
    assert (shared.dimension, shared.centroids, shared.codebook) == (6, 4096, "bank")


# the format


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    dimension=st.integers(1, 7),
    centroids=st.integers(1, 700),
    experts=st.one_of(st.none(), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_stored_form_is_exact_and_counted(
    rows: int, columns: int, dimension: int, centroids: int, experts: int | None, seed: int
) -> None:
    g, lead = generator(seed), [] if experts is None else [experts]
    codebook = torch.randn(centroids, dimension, generator=g).half().float()
    per_row = math.ceil(columns / dimension)
    codes = torch.randint(centroids, (*lead, rows, per_row), generator=g)
    column, row = (torch.rand(*lead, size, generator=g).add(0.5).half().float() for size in (columns, rows))
    packed = VectorCodes.pack(codes, codebook, column, row)

    dense = codebook[codes].flatten(-2)[..., :columns] * row[..., None] * column[..., None, :]
    assert torch.equal(packed.dequantize(), dense)
    again = FORMATS["vector"].from_tensors(packed.header(), packed.tensors())
    assert torch.equal(again.dequantize(), dense)
    assert again.shape == tuple(dense.shape)

    bits = max(1, math.ceil(math.log2(centroids)))
    matrices = experts or 1
    expected = {
        "codes": matrices * bits * math.ceil(rows * per_row / 8),
        "codebook": 2 * centroids * dimension,
        "column_norm": 2 * matrices * columns,
        "row_norm": 2 * matrices * rows,
    }
    ledger = packed.ledger()
    assert {item.name: item.bytes for item in ledger.items} == expected
    assert {item.name for item in ledger.items if item.kind == "code"} == {"codes"}
    assert set(packed.scales()) == {"column_norm", "row_norm"}


def test_bits_of_a_matrix_and_of_a_bank() -> None:
    """A matrix of Llama-2 7B, 2.03 by the paper's count; and of OLMoE, 8 of 64 experts at work."""
    rows, columns, per_row = 4096, 4096, 683
    packed = VectorCodes(
        torch.zeros(12, rows * per_row // 8, dtype=torch.uint8),
        torch.zeros(4096, 6, dtype=torch.float16),
        torch.zeros(columns, dtype=torch.float16),
        torch.zeros(rows, dtype=torch.float16),
    )
    weights = rows * columns
    expected = 12 * per_row / columns + 16 * 4096 * 6 / weights + 16 * (rows + columns) / weights
    assert packed.paper_bits() == pytest.approx(expected, rel=1e-12)
    assert round(expected, 2) == 2.03
    assert packed.ledger().stored_bits == pytest.approx(expected, rel=1e-12)

    rows, columns, per_row = 1024, 2048, 342
    bank = VectorCodes(
        torch.zeros(64, 12, rows * per_row // 8, dtype=torch.uint8),
        torch.zeros(4096, 6, dtype=torch.float16),
        torch.zeros(64, columns, dtype=torch.float16),
        torch.zeros(64, rows, dtype=torch.float16),
    )
    own = 12 * per_row / columns + 16 * (rows + columns) / (rows * columns)
    codebook = 16 * 4096 * 6 / (rows * columns)  # per expert that shares it
    assert bank.ledger(8 / 64).paper_bits == pytest.approx(own + codebook / 8, rel=1e-12)
    assert bank.ledger(8 / 64).stored_bits == pytest.approx(own + codebook / 64, rel=1e-12)
    assert bank.ledger(8 / 64).active_weights == 8 * rows * columns
    shared, each = bank_bytes(bank, 64)  # what decoding one token reads
    assert shared == 2 * 4096 * 6 and len(set(each)) == 1
    assert shared + sum(each) == sum(item.bytes for item in bank.ledger().items)
