"""Null-space Guided Expert-shift Suppression: closed forms against a numerical minimiser, and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from mobie.methods.mobie.nges import null_space_projector, suppress_shift

LAMBDA = 0.2


def problem(seed: int = 0, rows: int = 5, columns: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its binarization with one scale per row, and the projector of anisotropic inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, rows, columns, generator=generator)
    binarized = weight.sign() * weight.abs().mean(2, keepdim=True)
    x = torch.randn(50, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return weight, binarized, null_space_projector(x.T @ x)


def objective(row: np.ndarray, column: np.ndarray, weight: Tensor, binarized: Tensor, p: Tensor, ridge: float) -> float:
    """Eq. 12 as it is printed, in float64."""
    w, b, projector = (t.double().numpy().squeeze() for t in (weight, binarized, p))
    fit = np.diag(row) @ b @ np.diag(column)
    error = (w - b) @ projector - (w - fit)
    return float((error**2).sum() + ridge * (((row - 1) ** 2).sum() + ((column - 1) ** 2).sum()))


@pytest.mark.parametrize("ridge", [0.01, LAMBDA, 5.0])
def test_each_update_is_the_minimum_for_the_other_fixed(ridge: float) -> None:
    weight, binarized, p = problem()
    row, column = (factor[0].double().numpy() for factor in suppress_shift(weight, binarized, p, ridge, 1, 0.0))
    ones_row, ones_column = np.ones(5), np.ones(7)
    best_row = minimize(lambda r: objective(r, ones_column, weight, binarized, p, ridge), ones_row, tol=1e-12)
    np.testing.assert_allclose(row, best_row.x, rtol=0, atol=1e-5)
    best_column = minimize(lambda c: objective(row, c, weight, binarized, p, ridge), ones_column, tol=1e-12)
    np.testing.assert_allclose(column, best_column.x, rtol=0, atol=1e-5)


def test_objective_falls_with_every_iteration() -> None:
    weight, binarized, p = problem(seed=1)
    values = [objective(np.ones(5), np.ones(7), weight, binarized, p, LAMBDA)]
    for iterations in range(1, 12):
        row, column = suppress_shift(weight, binarized, p, LAMBDA, iterations, 0.0)
        values.append(objective(row[0].numpy(), column[0].numpy(), weight, binarized, p, LAMBDA))
    assert values[1] < 0.99 * values[0]
    assert all(after <= before * (1 + 1e-6) for before, after in zip(values, values[1:], strict=False))


def test_first_step_by_hand() -> None:
    """W = [2 -3], Ŵ = [1 -1], P keeps the second input, λ = 1: Δ = [2 -1].

    β_r = (2 + 1 + 1) / (1 + 1 + 1) = 4/3;  β_c = (4/3·2 + 1, 4/3 + 1) / ((4/3)² + 1) = (33/25, 21/25).
    """
    weight, binarized = torch.tensor([[[2.0, -3.0]]]), torch.tensor([[[1.0, -1.0]]])
    row, column = suppress_shift(weight, binarized, torch.diag(torch.tensor([0.0, 1.0])), 1.0, 1, 0.0)
    torch.testing.assert_close(row, torch.tensor([[4 / 3]]))
    torch.testing.assert_close(column, torch.tensor([[33 / 25, 21 / 25]]))


def test_identity_projector_is_a_fixed_point() -> None:
    weight, binarized, _ = problem(seed=2)
    for factor in suppress_shift(weight, binarized, torch.eye(7), LAMBDA, 15, 1e-5):
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=0, atol=1e-6)


def test_no_null_space_and_no_ridge_is_one_more_scale_fit() -> None:
    """From bare signs the factors become the best row and column scales: the first singular pair of |W|."""
    weight, _, _ = problem(seed=3)
    signs = weight.sign()
    row, column = suppress_shift(weight, signs, torch.zeros(7, 7), 1e-9, 300, 0.0)
    fitted = row[..., None] * signs * column[:, None]
    sigma = torch.linalg.svdvals(weight[0].abs().double())
    error = (weight - fitted).double().square().sum()
    torch.testing.assert_close(error, sigma[1:].square().sum(), rtol=1e-5, atol=0)


def test_converged_scales_without_null_space_stay() -> None:
    weight, _, _ = problem(seed=4)
    u, s, v = torch.linalg.svd(weight[0].abs().double())
    best = (s[0] * torch.outer(u[:, 0], v[0])).float()[None] * weight.sign()
    for factor in suppress_shift(weight, best, torch.zeros(7, 7), LAMBDA, 15, 1e-5):
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=0, atol=1e-5)


def test_strong_ridge_keeps_ones() -> None:
    for factor in suppress_shift(*problem(seed=5), 1e6, 15, 1e-5):
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=0, atol=1e-4)


def test_rows_and_columns_of_zeros_keep_finite_factors() -> None:
    weight, binarized, p = problem(seed=6)
    weight[:, 1], binarized[:, 1] = 0, 0
    weight[..., 3], binarized[..., 3] = 0, 0
    row, column = suppress_shift(weight, binarized, p, LAMBDA, 15, 1e-5)
    assert row.isfinite().all() and column.isfinite().all()
    torch.testing.assert_close(row[0, 1], torch.tensor(1.0), rtol=0, atol=1e-6)


def test_error_on_strong_directions_falls() -> None:
    """What NGES is for: the error that inputs outside the null space see gets smaller."""
    weight, binarized, p = problem(seed=7)
    row, column = suppress_shift(weight, binarized, p, LAMBDA, 15, 1e-5)
    seen = torch.eye(7) - p
    before = ((weight - binarized) @ seen).norm()
    modulated = row[..., None] * binarized * column[:, None]
    assert (modulated - (weight - (weight - binarized) @ p)).norm() < before


def test_experts_are_independent() -> None:
    cases = [problem(seed=s) for s in (8, 9)]
    p = cases[0][2]
    together = suppress_shift(*(torch.cat([c[i] for c in cases]) for i in range(2)), p, LAMBDA, 4, 0.0)
    for e, (weight, binarized, _) in enumerate(cases):
        alone = suppress_shift(weight, binarized, p, LAMBDA, 4, 0.0)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[e], theirs[0], rtol=1e-5, atol=1e-6)


ENERGIES = torch.tensor([0.5, 100.0, 1.0, 0.2, 10.0])  # falling: 100 | 10, 1, 0.5, 0.2; tail/head: 1.7/10, 0.7/11


@pytest.mark.parametrize(
    ("ratio", "weak"), [(0.1, [1, 0, 0, 1, 0]), (0.2, [1, 0, 1, 1, 0]), (0.01, [0] * 5), (0.02, [0, 0, 0, 1, 0])]
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_projector_of_a_diagonal_gram_matrix(ratio: float, weak: list[int], scale: float) -> None:
    projector = null_space_projector(torch.diag(ENERGIES) * scale, ratio)
    torch.testing.assert_close(projector, torch.diag(torch.tensor(weak, dtype=torch.float32)), rtol=0, atol=1e-7)


def test_projector_is_one_of_the_weak_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(10)
    q = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    gram = q @ torch.diag(ENERGIES.double()) @ q.T
    projector = null_space_projector(gram.float())
    assert torch.equal(projector, projector.T)
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-6)
    expected = q[:, [0, 3]] @ q[:, [0, 3]].T
    torch.testing.assert_close(projector.double(), expected, rtol=0, atol=1e-4)


def test_projector_at_the_edges() -> None:
    assert not null_space_projector(torch.eye(4)).any()  # 2/1, 1/2: never small enough
    assert not null_space_projector(torch.ones(1, 1)).any()
    rank_one = torch.outer(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(null_space_projector(rank_one), torch.eye(3) - rank_one / 3, rtol=0, atol=1e-6)
