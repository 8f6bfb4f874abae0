"""The fits of BiLLM and ARB-LLM against closed forms, enumeration and plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from binary_references import (
    Array,
    both_sides,
    correlated,
    error,
    exact,
    halves,
    normal,
    reference_fit,
    reference_row_column,
)

from mobie.methods.arb import ARB, fit_row_column, nearest_signs, refine_means, refine_on_inputs
from mobie.methods.binary_fit import Fit, fit_means
from mobie.methods.split_search import Split

# --- the closed-form fit


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_fit_is_mean_and_mean_absolute_deviation(order: int, grouped: bool) -> None:
    weights = normal(6, 11) + 0.3
    second = halves(6, 11) if grouped else None
    groups = both_sides(second) if grouped else [np.ones((6, 11), dtype=bool)]
    fit = fit_means(weights, second, order)
    np.testing.assert_allclose(exact(fit).numpy(), reference_fit(weights.numpy(), groups, order), atol=1e-12)


def test_fit_by_hand() -> None:
    fit = fit_means(torch.tensor([[1.0, 3.0, -2.0, 6.0]]), None, order=2)
    # mean 2; deviations -1 1 -4 4, mean size 2.5; left over 1.5 -1.5 -1.5 1.5: mean 0, mean size 1.5, nothing left
    assert fit.mean.tolist() == [[2.0]]
    assert fit.row_scale.flatten().tolist() == [2.5, 1.5]
    assert fit.signs.tolist() == [[[-1, 1, -1, 1]], [[1, -1, -1, 1]]]
    assert exact(fit).tolist() == [[1.0, 3.0, -2.0, 6.0]]


def test_first_order_is_least_squares() -> None:
    """No mean is better alone; for the mean, no scale with any signs is better."""
    row = normal(1, 7, seed=3)
    fit = fit_means(row, None, order=1)
    mu, best = fit.mean.item(), error(fit, row)
    spread_around_mean = (row - mu).square().sum()
    for shift in np.linspace(-1, 1, 81):
        assert (row - mu - shift).square().sum() >= spread_around_mean - 1e-12
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)), dtype=torch.float64)
    scales = torch.cat((torch.linspace(0, 3, 301, dtype=torch.float64), fit.row_scale.flatten()))
    scanned = (row - mu - scales[:, None, None] * signs).square().sum(-1).min()
    assert scanned.item() == pytest.approx(best, abs=1e-12)


# --- ARB


def test_first_pass_of_arb_by_hand() -> None:
    row = torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    start = fit_means(row, None, order=1)
    assert (start.mean.item(), start.row_scale.item()) == (1.0, 1.5)
    # residual 0.5 0.5 0.5 1.5: mean 1 + 0.75; then the scale is the mean of 1.75 1.75 1.75 2.25
    fit = refine_means(row, start, iterations=1)
    assert (fit.mean.item(), fit.row_scale.item()) == (1.75, 1.875)
    assert fit.signs.tolist() == [[[-1, -1, -1, 1]]]


def reference_arb(values: Array, iterations: int) -> Array:
    """First-order ARB of one row and group, as in the paper's Algorithm 1: the mean moves by the mean residual."""
    mu = values.mean()
    alpha = np.abs(values - mu).mean()
    signs = np.where(values - mu >= 0, 1, -1)
    for _ in range(iterations):
        mu += (values - (mu + alpha * signs)).mean()
        alpha = (signs * (values - mu)).sum() / (signs * signs).sum()
        signs = np.where(values - mu >= 0, 1, -1)
    return mu + alpha * signs


def reference_arb_second(values: Array, iterations: int) -> Array:
    """Second-order ARB of one row and group, the four combinations enumerated."""
    mu, scales, signs, left = 0.0, [], [], values.copy()
    for _ in range(2):
        centre = left.mean()
        scales.append(np.abs(left - centre).mean())
        signs.append(np.where(left - centre >= 0, 1, -1))
        mu += centre
        left = left - centre - scales[-1] * signs[-1]
    for _ in range(iterations):
        mu += (values - (mu + scales[0] * signs[0] + scales[1] * signs[1])).mean()
        scales[0] = (signs[0] * (values - mu - scales[1] * signs[1])).mean()
        scales[1] = (signs[1] * (values - mu - scales[0] * signs[0])).mean()
        for j, value in enumerate(values - mu):
            pairs = list(itertools.product((-1, 1), repeat=2))
            signs[0][j], signs[1][j] = min(pairs, key=lambda b: abs(value - b[0] * scales[0] - b[1] * scales[1]))
    return mu + scales[0] * signs[0] + scales[1] * signs[1]


@pytest.mark.parametrize("order", [1, 2])
def test_arb_equals_loops(order: int) -> None:
    weights, second = normal(5, 17, seed=2), halves(5, 17)
    fit = refine_means(weights, fit_means(weights, second, order), iterations=15)
    reference = reference_arb if order == 1 else reference_arb_second
    expected = np.zeros((5, 17))
    for row, mask in itertools.product(range(5), (0, 1)):
        members = second[row].numpy() == mask
        expected[row, members] = reference(weights[row].numpy()[members], 15)
    np.testing.assert_allclose(exact(fit).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_arb_error_never_grows_and_starts_at_the_closed_form(order: int, grouped: bool, seed: int) -> None:
    weights = normal(8, 23, seed=seed).exp()
    second = halves(8, 23, seed) if grouped else None
    start = fit_means(weights, second, order)
    errors = [error(refine_means(weights, start, iterations), weights) for iterations in range(16)]
    assert errors[0] == error(start, weights)
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_nearest_signs_equal_enumeration() -> None:
    target, first, second = normal(30, 40), normal(30, 1, seed=1), normal(30, 40, seed=2)
    chosen = nearest_signs(target, first, second)
    assert all(set(b.unique().tolist()) == {-1.0, 1.0} for b in chosen)
    distance = (target - chosen[0] * first - chosen[1] * second).abs()
    every = [(target - a * first - b * second).abs() for a, b in itertools.product((-1, 1), repeat=2)]
    torch.testing.assert_close(distance, torch.stack(every).amin(0), rtol=0, atol=1e-14)


# --- ARB-RC


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_row_column_equals_loops(order: int, grouped: bool) -> None:
    weights, second = normal(7, 12, seed=5), halves(7, 12)
    second[2] = False  # a row without any member of the second group
    weights[4] = 0
    groups = both_sides(second) if grouped else [np.ones((7, 12), dtype=bool)]
    fit = fit_row_column(weights, second if grouped else None, order, iterations=15)
    expected = reference_row_column(weights.numpy(), groups, order, 15)
    np.testing.assert_allclose(exact(fit).numpy(), expected, atol=1e-9)


def test_row_column_by_hand_and_exact_on_rank_one() -> None:
    fit = fit_row_column(torch.tensor([[1.0, -2.0], [3.0, 6.0]]), None, order=1, iterations=0)
    assert fit.row_scale.flatten().tolist() == [1.5, 4.5]
    assert fit.column_scale.flatten().tolist() == pytest.approx([2 / 3, 4 / 3])
    magnitudes = torch.outer(normal(6).abs(), normal(9, seed=1).abs())
    weights = magnitudes * torch.where(halves(6, 9), 1.0, -1.0)
    torch.testing.assert_close(exact(fit_row_column(weights, None, 1, 1)), weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_row_column_error_never_grows(order: int, seed: int) -> None:
    weights, second = normal(9, 14, seed=seed), halves(9, 14, seed)
    errors = [error(fit_row_column(weights, second, order, iterations), weights) for iterations in range(16)]
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


# --- ARB-X


def test_coefficients_reach_the_normal_equations() -> None:
    weights, terms = normal(4, 10), normal(3, 4, 10, seed=1)
    gram = correlated(40, 10).T @ correlated(40, 10)
    coupled, targets = torch.ones(3, 3, dtype=torch.bool), weights.expand(3, -1, -1)
    found = refine_on_inputs(terms, torch.zeros(3, 4, dtype=torch.float64), targets, gram, coupled, iterations=3000)
    for row in range(4):
        basis = terms[:, row]
        expected = torch.linalg.solve(basis @ gram @ basis.T, basis @ gram @ weights[row])
        torch.testing.assert_close(found[:, row], expected, atol=1e-8, rtol=1e-8)


def test_terms_that_no_input_sees_stay() -> None:
    """Inputs that are equal in both columns see nothing of a term of opposite signs, whatever rounding makes of it."""
    power = 0.1 * torch.ones(2, 2, dtype=torch.float32) + 1e-9
    terms = torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]]])
    start, coupled = torch.tensor([[0.5], [9.0]]), torch.ones(2, 2, dtype=torch.bool)
    found = refine_on_inputs(terms, start, torch.tensor([[1.0, 3.0]]).expand(2, -1, -1), power, coupled, 15)
    assert found.flatten().tolist() == pytest.approx([0.5, 2.0])
    power[0, 0] *= 1 + 1e-7
    found = refine_on_inputs(terms, start, torch.tensor([[1.0, 3.0]]).expand(2, -1, -1), power, coupled, 15)
    assert found.flatten().tolist() == pytest.approx([0.5, 2.0], abs=1e-4)
    assert start.flatten().tolist() == [0.5, 9.0]


@pytest.mark.parametrize("scope", ["group", "block"])
@pytest.mark.parametrize("bitmap", [False, True])
def test_arb_x_lowers_the_output_error_of_its_scope(scope: str, bitmap: bool) -> None:
    weights, inputs = normal(6, 16, seed=4), correlated(200, 16)
    gram = inputs.T @ inputs
    salient = torch.arange(16) % 4 == 1
    split = Split(salient, halves(6, 16))
    arb = ARB(refinement="arb", column_group_bitmap=bitmap).fit_block(weights, split, gram)
    label = torch.where(salient, 2 + (split.second_group if bitmap else 0), 0 + split.second_group)

    def output_error(fits: tuple[Fit, Fit]) -> float:
        left = weights.clone()
        left[:, ~salient] -= exact(fits[0])
        left[:, salient] -= exact(fits[1])
        parts = [left] if scope == "block" else [left * (label == g) for g in range(4)]
        return sum((part @ gram * part).sum().item() for part in parts)

    errors = [output_error(arb)]
    for iterations in range(1, 16):
        method = ARB(refinement="arb-x", column_group_bitmap=bitmap, iterations=iterations, x_scope=scope)
        errors.append(output_error(method._refine_x(weights, split, *arb, gram)))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


def test_arb_x_group_by_loops() -> None:
    """One group's mean and scales in turn, against S of its own columns only."""
    weights, inputs = normal(3, 8, seed=6), correlated(100, 8)
    gram = (inputs.T @ inputs).numpy()
    split = Split(torch.arange(8) < 3, halves(3, 8))
    options = {"column_group_bitmap": False, "iterations": 15}
    start = ARB(refinement="arb", **options).fit_block(weights, split, torch.from_numpy(gram))
    found = ARB(refinement="arb-x", **options).fit_block(weights, split, torch.from_numpy(gram))
    for row in range(3):
        mu, scales = start[1].mean[0, row].item(), start[1].row_scale[:, 0, row].numpy().copy()
        values, signs, square = weights[row, :3].numpy(), start[1].signs[:, row].numpy(), gram[:3, :3]
        for _ in range(15):
            one = np.ones(3)
            mu = one @ square @ (values - scales @ signs) / (one @ square @ one)
            for k in (0, 1):
                target = values - mu - scales[1 - k] * signs[1 - k]
                scales[k] = signs[k] @ square @ target / (signs[k] @ square @ signs[k])
        assert found[1].mean[0, row].item() == pytest.approx(mu, abs=1e-9)
        np.testing.assert_allclose(found[1].row_scale[:, 0, row].numpy(), scales, atol=1e-9)
