"""The operations in plain torch against float64, pair by pair, from the decoded matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    exact_bank,
    exact_panel,
    exact_signs,
    random_experts,
    random_matrix,
    random_plane_experts,
    random_planes,
)
from torch import Tensor

from mobie.kernels.layout import BinaryBank, BinaryTensors, Panel, lay_out_experts, lay_out_linear, one_group
from mobie.kernels.twins import (
    binary_grouped,
    binary_linear,
    dense_grouped,
    group_pairs,
    panel,
    quantize_groups,
    reduce_pairs,
    rms_norm,
    route,
    swiglu,
)
from mobie.packing.bank import SymmetricRows

#: relative error of one rounding to the type, with room for sums in float32
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_near(found: Tensor, expected: np.ndarray, tolerance: float | None = None) -> None:
    """Within a rounding of the dtype, as a share of the largest value."""
    assert tuple(found.shape) == expected.shape
    share = TOLERANCE[found.dtype] if tolerance is None else tolerance
    np.testing.assert_allclose(exact(found), expected, rtol=0, atol=share * max(np.abs(expected).max(), 1e-30))


def random_index(tokens: int, k: int, experts: int, seed: int = 0) -> Tensor:
    """`(tokens, k)` different experts per token; the last expert never."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts - 1, generator=generator)[:k] for _ in range(tokens)])


def bank_of(columns: int, rows: int, *, most_salient: int = 20, block_size: int = 128) -> BinaryBank:
    packed = random_experts(5, columns, rows, basis=None, most_salient=most_salient, block_size=block_size)
    return lay_out_experts(packed, "silu").gate_up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, rows, block_size", [(300, 37, 128), (128, 8, 128), (20, 3, 128), (520, 9, 256)])
@pytest.mark.parametrize("tokens, k", [(1, 2), (9, 3)])
def test_binary_grouped(dtype: torch.dtype, columns: int, rows: int, block_size: int, tokens: int, k: int) -> None:
    bank = bank_of(columns, rows, block_size=block_size)
    index = random_index(tokens, k, 5)
    x = noise(tokens, columns, dtype=dtype)
    groups = group_pairs(index, 5, 4)
    found = binary_grouped(bank, x, groups, pairs=tokens * k, pairs_per_row=k)
    weight = exact_bank(bank)
    expected = np.stack([weight[e] @ exact(x)[p // k] for p, e in enumerate(index.flatten().tolist())])
    assert found.dtype == dtype
    assert_near(found, expected)


@pytest.mark.parametrize("most_salient", [0, 300])
def test_binary_grouped_without_and_with_only_salient_columns(most_salient: int) -> None:
    bank = bank_of(300, 5, most_salient=most_salient)
    index = random_index(4, 2, 5)
    x = noise(4, 300)
    found = binary_grouped(bank, x, group_pairs(index, 5, 16), pairs=8, pairs_per_row=2)
    weight = exact_bank(bank)
    assert_near(found, np.stack([weight[e] @ exact(x)[p // 2] for p, e in enumerate(index.flatten().tolist())]))


def test_binary_grouped_with_an_input_per_part_and_per_pair() -> None:
    bank = bank_of(140, 6)
    index = random_index(5, 2, 5)
    x = noise(10, 2, 140)
    found = binary_grouped(bank, x, group_pairs(index, 5, 2), pairs=10, pairs_per_row=1)
    weight = exact_bank(bank)
    expected = [np.einsum("prj,pj->pr", weight[e], exact(x)[p]) for p, e in enumerate(index.flatten().tolist())]
    assert_near(found, np.stack(expected))


def rounded(vector: np.ndarray) -> np.ndarray:
    """A vector after symmetric int8 rounding in groups of 128, element by element."""
    out = np.zeros_like(vector)
    for start in range(0, len(vector), 128):
        group = vector[start : start + 128].astype(np.float32)
        largest = np.abs(group).max()
        if largest:
            codes = np.rint(group * np.float32(np.float32(127) / largest))
            out[start : start + 128] = codes * np.float64(np.float32(largest / np.float32(127)))
    return out


def test_binary_grouped_int8_rounds_scaled_inputs_and_nothing_else() -> None:
    bank = bank_of(300, 7)
    index = random_index(6, 2, 5)
    x = noise(6, 300) * torch.logspace(-2, 2, 300)
    found = binary_grouped(bank, x, group_pairs(index, 5, 4), pairs=12, pairs_per_row=2, activations="int8")
    whole = exact_bank(bank)
    plain = exact_signs(bank.signs)[..., :300] * exact(bank.row_scale)[..., np.arange(300) // 128]
    column = exact(bank.column_scale)[..., :300]
    for pair, e in enumerate(index.flatten().tolist()):
        vector = exact(x)[pair // 2]
        for part in range(2):
            unrounded = whole[e, part] @ vector
            folded = (vector.astype(np.float32) * column[e, part].astype(np.float32)).astype(np.float64)
            extra = unrounded - plain[e, part] @ folded
            expected = plain[e, part] @ rounded(folded) + extra
            np.testing.assert_allclose(exact(found)[pair, part], expected, rtol=1e-5, atol=1e-4)
            # half a step per column at most
            groups = [np.abs(folded[s : s + 128]).max() / 254 for s in range(0, 300, 128)]
            bound = np.abs(plain[e, part]) @ np.repeat(groups, 128)[:300]
            error = np.abs(exact(found)[pair, part] - unrounded)
            assert (error <= bound + 1e-3).all() and (error > 0).any()


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_int8_rounding_stays_within_half_a_step(columns: int, seed: int, size: float) -> None:
    x = noise(columns, seed=seed) * size
    x[::7] = 0
    codes, scale = quantize_groups(x)
    assert codes.shape == (-(-columns // 128), 128)
    assert (codes == codes.round()).all() and codes.abs().max() <= 127
    back = (codes * scale[:, None]).flatten()
    assert not back[columns:].any()
    step = scale.repeat_interleave(128)[:columns]
    assert ((back[:columns] - x).abs() <= step * 0.5001).all()
    assert (codes.abs().amax(1) == 127)[scale != 0].all()


def test_int8_rounding_of_zeros_and_of_ties() -> None:
    codes, scale = quantize_groups(torch.zeros(130))
    assert not codes.any() and not scale.any()
    codes, scale = quantize_groups(torch.tensor([1e-38, 0.0]))
    assert not codes.any() and scale.isfinite().all()  # not 0 · ∞
    codes, _ = quantize_groups(torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5]))
    assert codes[0, :5].tolist() == [127, 0, 2, 0, -2]  # half to even, as rounding instructions do


def panels() -> dict[str, Panel]:
    matrix = noise(2, 11, 300, seed=5)
    int8 = [lay_out_linear(SymmetricRows.quantize(part, 8)) for part in matrix]
    both = Panel(torch.cat([p.codes for p in int8]), torch.cat([p.scale for p in int8]))
    return {
        "int8": both,
        "float16": Panel(matrix.half()),
        "bfloat16": Panel(matrix.bfloat16()),
        "shared": Panel(both.codes[:1].expand(2, -1, -1), both.scale[:1].expand(2, -1)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "float16", "bfloat16", "shared"])
def test_panel(kind: str, dtype: torch.dtype) -> None:
    matrices = panels()[kind]
    x = noise(4, 2, 300, dtype=dtype)
    product = np.einsum("npj,prj->npr", exact(x), exact_panel(matrices))
    assert_near(panel(matrices, x), product)
    bias, residual = noise(22, seed=1, dtype=dtype), noise(4, 2, 11, seed=2, dtype=dtype)
    assert_near(panel(matrices, x, bias=bias), product + exact(bias).reshape(2, 11))
    assert_near(panel(matrices, x, residual=residual), product + exact(residual))


def test_panel_with_swiglu() -> None:
    x, gates, residual = noise(4, 2, 300), noise(4, seed=3), noise(4, 11, seed=4)
    product = np.einsum("npj,prj->npr", exact(x), exact_panel(panels()["int8"]))
    gate, up = product[:, 0], product[:, 1]
    expected = gate / (1 + np.exp(-gate)) * up
    assert_near(panel(panels()["int8"], x, epilogue="swiglu"), expected)
    weighted = panel(panels()["int8"], x, epilogue="swiglu", pair_weights=gates, residual=residual)
    assert_near(weighted, expected * exact(gates)[:, None] + exact(residual))


def test_panel_sums_pairs_before_it_multiplies() -> None:
    x = noise(12, 2, 300)
    summed = exact(x).reshape(4, 3, 2, 300).sum(1)
    assert_near(panel(panels()["int8"], x, reduce=3), np.einsum("npj,prj->npr", summed, exact_panel(panels()["int8"])))


@pytest.mark.parametrize("reduce", [1, 3])
def test_panel_int8_rounds_the_sum(reduce: int) -> None:
    matrices = panels()["int8"]
    x = noise(4 * reduce, 2, 300) * torch.logspace(-2, 2, 300)
    summed = x.reshape(4, reduce, 2, 300)
    total = summed[:, 0]
    for slot in range(1, reduce):
        total = total + summed[:, slot]
    inputs = np.stack([[rounded(part) for part in row] for row in exact(total)])
    found = panel(matrices, x, reduce=reduce, activations="int8")
    assert_near(found, np.einsum("npj,prj->npr", inputs, exact_panel(matrices)), 1e-5)
    dense = panels()["float16"]
    assert torch.equal(panel(dense, x, reduce=reduce, activations="int8"), panel(dense, x, reduce=reduce))


@pytest.mark.parametrize("normalize", [True, False])
def test_route_is_the_top_of_a_softmax(normalize: bool) -> None:
    hidden, weight, bias = noise(7, 30), noise(9, 30, seed=1), noise(9, seed=2)
    for shift in (None, bias):
        logits, weights, index = route(hidden, weight, 3, normalize=normalize, bias=shift)
        expected = exact(hidden) @ exact(weight).T + (0 if shift is None else exact(shift))
        assert_near(logits, expected)
        share = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
        order = np.argsort(-share, axis=1)[:, :3]
        best = np.take_along_axis(share, order, 1)
        np.testing.assert_array_equal(index.numpy(), order)
        assert_near(weights, best / best.sum(1, keepdims=True) if normalize else best, 1e-5)
    assert (logits.dtype, weights.dtype, index.dtype) == (torch.float32, torch.float32, torch.int64)
    assert route(hidden.bfloat16(), weight.bfloat16(), 3, normalize=True)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_the_librarys(dtype: torch.dtype) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

    library = OlmoeRMSNorm(30, eps=1e-3).to(dtype)
    library.weight.data = noise(30, seed=1, dtype=dtype)
    x, residual = noise(5, 30, dtype=dtype), noise(5, 30, seed=2, dtype=dtype)
    normed, total = rms_norm(x, library.weight, 1e-3, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, library(x + residual))
    normed, total = rms_norm(x, library.weight, 1e-3)
    assert torch.equal(total, x) and torch.equal(normed, library(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_reduce(dtype: torch.dtype) -> None:
    gate_up, weights = noise(6, 2, 5, dtype=dtype), noise(6, seed=1)
    gate, up = exact(gate_up)[:, 0], exact(gate_up)[:, 1]
    expected = gate / (1 + np.exp(-gate)) * up
    assert_near(swiglu(gate_up, None), expected)
    assert_near(swiglu(gate_up, weights), expected * exact(weights)[:, None])
    assert swiglu(gate_up, weights).dtype == dtype
    x = noise(6, 5, dtype=dtype)
    assert_near(reduce_pairs(x, 3), exact(x).reshape(2, 3, 5).sum(1))
    assert torch.equal(reduce_pairs(x, 1), x)


@pytest.mark.parametrize(
    "change",
    [
        {"residual": False},
        {"residual": False, "groups": 2, "mean": True, "extra_order": 2, "column_scale": False},  # BiLLM
        {"residual": False, "groups": 2, "extra_order": 2, "column_factor": True},  # ARB-RC with NGES
        {"groups": 2, "mean": True, "order": 2, "column_factor": True},
        {"residual": False, "block_size": 20},
        {"mean": True, "salient": 0},
        {"residual": False, "salient": 70},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_linear_is_the_stored_matrix(change: dict[str, Any], dtype: torch.dtype) -> None:
    options = {"salient": 9, "block_size": 32} | change
    packed = random_matrix(13, 70, options.pop("salient"), torch.Generator().manual_seed(1), **options)
    layout = lay_out_linear(packed)
    assert isinstance(layout, BinaryTensors)
    x, bias = noise(5, 70, dtype=dtype), noise(13, seed=3, dtype=dtype)
    product = exact(x) @ packed.dequantize().double().numpy().T
    assert_near(binary_linear(layout, x), product)
    assert_near(binary_linear(layout, x, bias), product + exact(bias))


def test_binary_bank_serves_a_linear() -> None:
    packed = random_matrix(13, 300, 9, torch.Generator().manual_seed(1))
    bank = lay_out_linear(packed)
    x = noise(21, 300)
    found = binary_grouped(bank, x, one_group(21, 16, "cpu"), pairs=21, pairs_per_row=1)
    assert_near(found[:, 0], exact(x) @ packed.dequantize().double().numpy().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", range(5))
def test_sign_planes_serve_a_linear(most: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(most)
    packed = random_planes(13, torch.randint(most + 1, (300,), generator=generator), generator)
    x = noise(21, 300, dtype=dtype)
    found = binary_grouped(lay_out_linear(packed), x, one_group(21, 16, "cpu"), pairs=21, pairs_per_row=1)
    assert_near(found[:, 0], exact(x) @ packed.dequantize().double().numpy().T)


@pytest.mark.parametrize("activations, tolerance", [("16bit", 2e-6), ("int8", 2e-2)])
def test_sign_planes_of_experts(activations: str, tolerance: float) -> None:
    """One expert without planes, one without tokens; with int8 only plane 0 is rounded."""
    packed = random_plane_experts(5, 300, 7)
    bank, index, x = lay_out_experts(packed, "silu").gate_up, random_index(9, 3, 5), noise(9, 300)
    found = binary_grouped(bank, x, group_pairs(index, 5, 4), pairs=27, pairs_per_row=3, activations=activations)
    dense = np.stack([packed[name].dequantize().double().numpy() for name in ("gate", "up")], axis=1)
    expected = np.stack([dense[e] @ exact(x)[p // 3] for p, e in enumerate(index.flatten().tolist())])
    assert (index == 0).any() and not expected[index.flatten().numpy() == 0].any()
    assert_near(found, expected, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_grouped(dtype: torch.dtype) -> None:
    weight, x, index = noise(5, 7, 30, dtype=dtype), noise(6, 30, seed=1, dtype=dtype), random_index(6, 2, 5)
    found = dense_grouped(weight, x, group_pairs(index, 5, 4), pairs=12, pairs_per_row=2)
    assert_near(found, np.stack([exact(weight)[e] @ exact(x)[p // 2] for p, e in enumerate(index.flatten().tolist())]))
