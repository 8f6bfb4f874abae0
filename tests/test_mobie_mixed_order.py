"""Mixed-order binarization: scales against their optimum, a singular pair; error feedback against least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobie.methods.hessian import inverse_cholesky
from mobie.methods.mobie.mixed_order import Plane, binarize, fit_scales, pack

EXPERTS, ROWS = 2, 9


def random_weight(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXPERTS, ROWS, columns, generator=generator) * torch.rand(columns, generator=generator)


def mask_of(columns: int, chosen: list[int]) -> Tensor:
    mask = torch.zeros(EXPERTS, columns, dtype=torch.bool)
    mask[:, chosen] = True
    return mask


def run(
    weight: Tensor,
    salient: Tensor,
    factor: Tensor | None = None,
    block_size: int = 128,
    iterations: int = 15,
    row_weights: Tensor | None = None,
) -> tuple[Plane, Plane]:
    return binarize(
        weight,
        salient,
        factor,
        feedback="triangular",
        block_size=block_size,
        row_weights=torch.ones(weight.shape[1]) if row_weights is None else row_weights,
        iterations=iterations,
        tolerance=0.0,
    )


def fitted(projected: Tensor, columns: Tensor, row_weights: Tensor, iterations: int) -> Tensor:
    row, column = fit_scales(projected, columns, row_weights, iterations, 0.0)
    return (row[..., None] * column[:, None]).double()


@pytest.mark.parametrize("seed", range(3))
def test_first_order_scales_are_the_global_optimum(seed: int) -> None:
    """With B = sign(V) the error of diag(r) B diag(c) is that of r cᵀ for |V|: the first singular pair is best."""
    magnitudes = random_weight(12, seed).abs()
    fit = fitted(magnitudes, mask_of(12, list(range(12))), torch.ones(ROWS), 100)
    u, s, v = torch.linalg.svd(magnitudes.double(), full_matrices=False)
    best = s[:, 0, None, None] * u[:, :, :1] @ v[:, :1]
    torch.testing.assert_close(fit, best, rtol=1e-4, atol=1e-5)


def test_fifteen_iterations_come_close_to_it() -> None:
    magnitudes = random_weight(40, seed=3).abs()
    fit = fitted(magnitudes, mask_of(40, list(range(40))), torch.ones(ROWS), 15)
    least = torch.linalg.svdvals(magnitudes.double())[:, 1:].square().sum()
    assert (magnitudes - fit).square().sum() <= least * (1 + 1e-6)


def test_weighted_rows_are_the_optimum_of_the_weighted_error() -> None:
    magnitudes = random_weight(12, seed=4).abs()
    weights = torch.logspace(1, -2, ROWS)
    fit = fitted(magnitudes, mask_of(12, list(range(12))), weights, 100)
    root = weights.double().sqrt()[:, None]
    least = torch.linalg.svdvals(root * magnitudes.double())[:, 1:].square().sum()
    torch.testing.assert_close((root * (magnitudes - fit)).square().sum(), least, rtol=1e-5, atol=0)
    plain = fitted(magnitudes, mask_of(12, list(range(12))), torch.ones(ROWS), 100)
    assert (root * (magnitudes - plain)).square().sum() > 1.001 * least


def test_error_never_rises_over_iterations() -> None:
    magnitudes = random_weight(20, seed=5).abs()
    everything = mask_of(20, list(range(20)))
    errors = [(magnitudes - fitted(magnitudes, everything, torch.ones(ROWS), n)).norm() for n in range(1, 10)]
    assert all(after <= before * (1 + 1e-6) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.999 * errors[0]


def test_sums_run_over_the_mask_only() -> None:
    projected = random_weight(10, seed=6).abs()
    inside = [1, 4, 5]
    row, column = fit_scales(projected, mask_of(10, inside), torch.ones(ROWS), 15, 0.0)
    alone = fit_scales(projected[..., inside], mask_of(3, [0, 1, 2]), torch.ones(ROWS), 15, 0.0)
    torch.testing.assert_close(row, alone[0])
    torch.testing.assert_close(column[:, inside], alone[1])
    assert not column[:, [0, 2, 3, 6, 7, 8, 9]].any()


def test_tolerance_stops_early_without_harm() -> None:
    projected = random_weight(30, seed=7).abs()
    everything = mask_of(30, list(range(30)))
    loose, exact = (fit_scales(projected, everything, torch.ones(ROWS), 500, t) for t in (1e-5, 0.0))
    one = fit_scales(projected, everything, torch.ones(ROWS), 500, 1e9)
    once = fit_scales(projected, everything, torch.ones(ROWS), 1, 0.0)
    for a, b, c, d in zip(loose, exact, one, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(c, d)


def test_first_two_half_steps_by_hand() -> None:
    """|V| = [[1 3], [2 2]], start c = 1: r = (2, 2), c = (6/8, 10/8), whose mean is one."""
    row, column = fit_scales(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]), torch.ones(1, 2) > 0, torch.ones(2), 1, 0.0)
    torch.testing.assert_close(row, torch.tensor([[2.0, 2.0]]))
    torch.testing.assert_close(column, torch.tensor([[0.75, 1.25]]))


@pytest.mark.parametrize("scale", [1.0, 4e-3, 1e-5])
def test_small_factors_fit_as_well(scale: float) -> None:
    """Float16 scales: entries of V are near (experts · in)^-1/2, some 4e-3 with 64 experts of 1024 inputs."""
    weight = random_weight(64, seed=8)
    salient = mask_of(64, [0, 9])
    first, second = run(scale * weight, salient, block_size=32)
    reference = run(weight, salient, block_size=32)
    error = (scale * weight - first.dense(32) - second.dense(32)).norm() / (scale * weight).norm()
    expected = (weight - reference[0].dense(32) - reference[1].dense(32)).norm() / weight.norm()
    assert error <= 1.01 * expected


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_column_scales_average_one(scale: float) -> None:
    projected = scale * random_weight(30, seed=20).abs()
    inside = [0, 4, 9, 21]
    _, column = fit_scales(projected, mask_of(30, inside), torch.ones(ROWS), 15, 0.0)
    torch.testing.assert_close(column[:, inside].mean(1), torch.ones(EXPERTS))


def test_second_order_binarizes_the_residual_on_salient_columns_only() -> None:
    weight = random_weight(16, seed=9)
    chosen = [2, 3, 11]
    first, second = run(weight, mask_of(16, chosen))
    others = [j for j in range(16) if j not in chosen]
    assert torch.equal(first.signs, torch.where(weight >= 0, 1.0, -1.0))
    assert not second.dense(128)[..., others].any()
    plain = run(weight, mask_of(16, []))[0]
    assert torch.equal(first.dense(128), plain.dense(128))  # the first order does not know of the second
    residual = (weight - first.dense(128))[..., chosen]
    assert torch.equal(second.signs[..., chosen], torch.where(residual >= 0, 1.0, -1.0))
    u, s, v = torch.linalg.svd(residual.abs().double(), full_matrices=False)
    best = s[:, 0, None, None] * u[:, :, :1] @ v[:, :1]
    left = (residual - second.dense(128)[..., chosen]).double().norm()
    torch.testing.assert_close(left, (residual.abs() - best).norm(), rtol=1e-3, atol=0)
    assert left < 0.8 * residual.norm()


@pytest.mark.parametrize("chosen", [[], [5], list(range(20))])
def test_any_number_of_salient_columns(chosen: list[int]) -> None:
    weight = random_weight(20, seed=10)
    salient = mask_of(20, chosen)
    first, second = run(weight, salient, block_size=8)
    for matrix, a, b in zip(pack(first, second, salient, 8), first.dense(8), second.dense(8), strict=True):
        torch.testing.assert_close(matrix.dequantize(), a + b, rtol=1e-6, atol=1e-7)
        assert (matrix.extra is None) == (not chosen)
        assert matrix.paper_bits() == 1 + len(chosen) / 20
    assert first.row.shape == second.row.shape == (EXPERTS, ROWS, 3)


def test_packed_scales_are_float16() -> None:
    weight = random_weight(20, seed=11)
    salient = mask_of(20, [1, 2])
    first, second = run(weight, salient, block_size=8)
    matrix = pack(first, second, salient, 8)[1]
    block = torch.arange(20) // 8
    expected = torch.zeros(ROWS, 20)
    for plane in (first, second):
        row, column = plane.row[1].half().float(), plane.column[1].half().float()
        expected += row[:, block] * column * plane.signs[1]
    torch.testing.assert_close(matrix.dequantize(), expected, rtol=1e-6, atol=1e-7)


def test_zero_is_positive() -> None:
    first, _ = run(torch.zeros(EXPERTS, ROWS, 4), mask_of(4, [0]))
    assert (first.signs == 1).all()
    assert not first.dense(128).any()


def test_whole_matrix_is_one_block() -> None:
    weight = random_weight(40, seed=12)
    first, second = run(weight, mask_of(40, [0, 1]), block_size=40)
    assert first.row.shape == (EXPERTS, ROWS, 1)
    wide = run(weight, mask_of(40, [0, 1]), block_size=1000)
    assert torch.equal(first.signs, wide[0].signs) and torch.equal(first.row, wide[0].row)
    least = torch.linalg.svdvals(weight.abs().double())[:, 1:].square().sum()
    torch.testing.assert_close((weight - first.dense(40)).double().square().sum(), least, rtol=1e-4, atol=0)


def test_blocks_are_fitted_on_their_own_without_feedback() -> None:
    weight = random_weight(20, seed=13)
    first, second = run(weight, mask_of(20, [3, 17]), block_size=8)
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        part = slice(start, stop)
        salient = mask_of(20, [3, 17])[:, part]
        own = run(weight[..., part].clone(), salient)
        for plane, alone in zip((first, second), own, strict=True):
            torch.testing.assert_close(plane.dense(8)[..., part], alone.dense(128), rtol=1e-3, atol=1e-6)


def test_diagonal_hessian_hands_nothing_on() -> None:
    weight = random_weight(24, seed=14)
    hessian = torch.diag_embed(torch.rand(EXPERTS, 24, generator=torch.Generator().manual_seed(1)) + 0.1)
    fed = run(weight, mask_of(24, [4]), inverse_cholesky(hessian), block_size=8)
    alone = run(weight, mask_of(24, [4]), None, block_size=8)
    for a, b in zip(fed, alone, strict=True):
        assert torch.equal(a.dense(8), b.dense(8))


def test_feedback_minimises_the_output_error() -> None:
    """Three blocks: what the third binarizes is the least-squares answer on X to the errors of the first two."""
    generator = torch.Generator().manual_seed(15)
    columns, block = 24, 8
    weight = random_weight(columns, seed=15)
    x = torch.randn(EXPERTS, 100, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    factor = inverse_cholesky(2 / 100 * x.mT @ x)
    salient = mask_of(columns, [0, 12, 20])
    first, second = run(weight, salient, factor, block_size=block)
    quantized = (first.dense(block) + second.dense(block)).double()
    for start in (8, 16):
        behind = slice(start, None)
        error = weight.double()[..., :start] - quantized[..., :start]  # (experts, rows, start)
        output = x.double()[..., :start] @ error.mT
        change = torch.linalg.lstsq(x.double()[..., behind], -output).solution.mT  # of the error behind
        target = (weight.double()[..., behind] - change)[..., :block].float()
        own = run(target, salient[:, start : start + block])
        expected = own[0].dense(128) + own[1].dense(128)
        here = quantized[..., start : start + block].float()
        torch.testing.assert_close(here, expected, rtol=2e-3, atol=2e-4)


def test_feedback_equals_the_block_formula() -> None:
    """E_b (H⁻¹_bb)⁻¹ H⁻¹_b,later with the inverse formed in float64."""
    generator = torch.Generator().manual_seed(16)
    weight = random_weight(12, seed=16)
    x = torch.randn(EXPERTS, 60, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    hessian = 2 / 60 * x.mT @ x
    first, _ = run(weight, mask_of(12, []), inverse_cholesky(hessian), block_size=6)
    inverse = torch.linalg.inv(hessian.double())
    error = weight[..., :6].double() - first.dense(6)[..., :6].double()
    handed = error @ torch.linalg.inv(inverse[:, :6, :6]) @ inverse[:, :6, 6:]
    own, _ = run((weight[..., 6:].double() - handed).float(), mask_of(6, []))
    torch.testing.assert_close(first.dense(6)[..., 6:], own.dense(128), rtol=2e-3, atol=2e-4)
    assert handed.norm() > 0.1 * error.norm()


def test_feedback_lowers_the_output_error() -> None:
    generator = torch.Generator().manual_seed(17)
    weight = random_weight(64, seed=17)
    x = torch.randn(EXPERTS, 300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    factor = inverse_cholesky(2 / 300 * x.mT @ x)
    errors = []
    for used in (factor, None):
        first, second = run(weight, mask_of(64, [3]), used, block_size=16)
        errors.append((x @ (weight - first.dense(16) - second.dense(16)).mT).norm())
    assert errors[0] < 0.9 * errors[1]


def test_modulated_plane_is_a_product_of_vectors() -> None:
    generator = torch.Generator().manual_seed(18)
    first, _ = run(random_weight(20, seed=18), mask_of(20, []), block_size=8)
    row, column = torch.rand(EXPERTS, ROWS, generator=generator), torch.rand(EXPERTS, 20, generator=generator)
    expected = row[..., None] * first.dense(8) * column[:, None]
    torch.testing.assert_close(first.scaled(row, column).dense(8), expected, rtol=2e-3, atol=1e-6)


def test_input_is_left_as_it_is() -> None:
    weight = random_weight(16, seed=19)
    before = weight.clone()
    hessian = torch.eye(16).expand(EXPERTS, 16, 16) + 0.5
    run(weight, mask_of(16, [1]), inverse_cholesky(hessian), block_size=8)
    assert torch.equal(weight, before)
