"""BiLLM and ARB-LLM: fits against closed forms and enumeration, searches and the whole skeleton against plain loops.

At the end MoBiE's parts as plug-ins: NGES's factors against loops, and where they are stored.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobie.config import load_method
from mobie.errors import ConfigError, DataError
from mobie.methods.arb import ARB, fit_row_column, nearest_signs, refine_means, refine_on_inputs
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.methods.billm import BiLLM
from mobie.methods.binary_common import BinaryMethod
from mobie.methods.binary_fit import Binarization, Fit, fit_means
from mobie.methods.split_search import Split, border_errors
from mobie.packing.binary import BinaryMatrix

Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(out: int, n: int, seed: int = 0) -> Tensor:
    return normal(out, n, seed=seed + 1000) > 0.3


def exact(fit: Fit) -> Tensor:
    """Values of a fit without rounding of its scales, element by element."""
    order, out, n = fit.signs.shape
    dense = torch.zeros(out, n, dtype=torch.float64)
    for i, j in itertools.product(range(out), range(n)):
        g = 0 if fit.second_group is None else int(fit.second_group[i, j])
        dense[i, j] = 0 if fit.mean is None else fit.mean[g, i]
        for k in range(order):
            column = 1 if fit.column_scale is None else fit.column_scale[k, g, j]
            dense[i, j] += fit.row_scale[k, g, i] * column * fit.signs[k, i, j]
    return dense


def error(fit: Fit, weights: Tensor) -> float:
    return (weights - exact(fit)).square().sum().item()


# --- the closed-form fit


def reference_fit(weights: Array, groups: list[Array], order: int) -> Array:
    """Residual binarization with means, one row and group at a time."""
    dense = np.zeros_like(weights)
    for row, (values, *masks) in enumerate(zip(weights, *groups, strict=True)):
        for mask in masks:
            left = values[mask].copy()
            for _ in range(order if mask.any() else 0):
                mu = left.mean()
                step = mu + np.abs(left - mu).mean() * np.where(left - mu >= 0, 1, -1)
                dense[row, mask] += step
                left -= step
    return dense


def both_sides(mask: Tensor | Array) -> list[Array]:
    upper = np.asarray(mask)
    return [~upper, upper]


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


def reference_row_column(weights: Array, groups: list[Array], order: int, iterations: int) -> Array:
    """ARB-RC of each group by itself, every sum a loop over its members."""
    dense = np.zeros_like(weights)
    for mask in groups:
        rows, columns, signs = [], [], []
        left = np.where(mask, weights, 0)
        for _ in range(order):
            row = np.array([np.abs(v[m]).mean() if m.any() else 0 for v, m in zip(left, mask, strict=True)])
            column = np.zeros(weights.shape[1])
            for j in range(weights.shape[1]):
                ratios = [abs(left[i, j]) / row[i] for i in range(len(row)) if mask[i, j] and row[i] > 0]
                column[j] = np.mean(ratios) if ratios else 0
            rows.append(row)
            columns.append(column)
            signs.append(np.where(left >= 0, 1, -1))
            left = np.where(mask, left - np.outer(row, column) * signs[-1], 0)
        for _ in range(iterations):
            for k in range(order):
                target = weights.copy()
                for other in range(order):
                    if other != k:
                        target -= np.outer(rows[other], columns[other]) * signs[other]
                basis = columns[k] * signs[k] * mask
                norm = (basis**2).sum(1)
                rows[k] = np.divide((target * basis).sum(1), norm, out=np.zeros(len(norm)), where=norm > 0)
                basis = rows[k][:, None] * signs[k] * mask
                norm = (basis**2).sum(0)
                columns[k] = np.divide((target * basis).sum(0), norm, out=np.zeros(len(norm)), where=norm > 0)
            if order == 2:
                first, second = (np.outer(r, c) for r, c in zip(rows, columns, strict=True))
                pairs = list(itertools.product((-1, 1), repeat=2))
                nearest = np.argmin([np.abs(weights - a * first - b * second) for a, b in pairs], axis=0)
                signs = [np.array([pair[k] for pair in pairs])[nearest] for k in (0, 1)]
        product = sum(np.outer(r, c) * b for r, c, b in zip(rows, columns, signs, strict=True))
        dense[mask] = product[mask]
    return dense


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


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    mix = torch.eye(columns, dtype=torch.float64) + 0.1 * normal(columns, columns, seed=seed + 50)
    return normal(tokens, columns, seed=seed) @ mix.T


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


# --- searches


def reference_error(values: Array, upper: Array, order: int) -> float:
    return ((values - reference_fit(values, both_sides(upper), order)) ** 2).sum()


def reference_split(values: Array, saliency: Array, bitmap: bool, most: int = 49) -> tuple[Array, Array]:
    """The searches, one candidate after the other."""
    columns = values.shape[1]
    ranking = np.argsort(-saliency.sum(0), kind="stable")
    best = (np.inf, None)
    for count in range(1, min(most, columns) + 1):
        salient = np.isin(np.arange(columns), ranking[:count])
        best = min(best, (reference_error(values, np.broadcast_to(salient, values.shape), 2), count))
    salient = np.isin(np.arange(columns), ranking[: best[1]])
    upper = np.zeros(values.shape, dtype=bool)
    parts = [(~salient, np.abs(np.where(salient, 0, values)), 1)]
    if bitmap:
        parts.append((salient, np.abs(values[:, salient][values[:, salient] != 0]), 2))
    for part, pool, order in parts:
        own, least = values[:, part], np.inf
        for border in np.quantile(pool, np.linspace(0.1, 0.9, 81)):
            candidate = np.abs(own) >= border
            if reference_error(own, candidate, order) < least:
                least = reference_error(own, candidate, order)
                upper[:, part] = candidate
    return salient, upper


@pytest.mark.parametrize("search_on", ["saliency", "weights"])
@pytest.mark.parametrize(("out", "columns"), [(5, 12), (9, 60), (1, 30)])
def test_searches_choose_what_loops_choose(search_on: str, out: int, columns: int) -> None:
    for seed in range(2):
        weights = normal(out, columns, seed=seed)
        saliency = (weights / (0.5 + normal(columns, seed=seed + 9).abs())).square()
        split = ARB(search_on=search_on).split_block(weights, saliency)
        values = saliency if search_on == "saliency" else weights
        salient, upper = reference_split(values.numpy(), saliency.numpy(), bitmap=True)
        assert np.array_equal(split.salient.numpy(), salient)
        assert np.array_equal(split.second_group.numpy(), upper)


def test_searches_in_float32_choose_a_least_error() -> None:
    weights = normal(12, 128, seed=1)
    saliency = weights.square() * normal(128, seed=2).exp()
    split = BiLLM().split_block(weights.float(), saliency.float())
    salient, upper = reference_split(saliency.numpy(), saliency.numpy(), bitmap=False)
    assert 1 <= split.salient.sum() <= 49
    chosen, best = (np.broadcast_to(np.asarray(mask), weights.shape) for mask in (split.salient, salient))
    assert reference_error(saliency.numpy(), chosen, 2) <= reference_error(saliency.numpy(), best, 2) * (1 + 1e-5)
    rest = saliency.numpy()[:, ~salient]
    chosen, best = split.second_group.numpy()[:, ~salient], upper[:, ~salient]
    assert reference_error(rest, chosen, 1) <= reference_error(rest, best, 1) * (1 + 1e-5)


def test_border_errors_equal_loops_with_ties_and_zeros() -> None:
    values = torch.round(normal(6, 20, seed=7) * 2)  # many equal values, of both signs
    borders = torch.tensor([0.0, 0.5, 1.0, 2.0, 2.5, 99.0], dtype=torch.float64)
    expected = [reference_error(values.numpy(), (values.abs() >= b).numpy(), 1) for b in borders]
    torch.testing.assert_close(border_errors(values, borders), torch.tensor(expected, dtype=torch.float64))


# --- the whole method


def reference_quantize(weight: Array, hessian: Array, method: BinaryMethod, guided: Array | None = None) -> Array:
    """The skeleton with explicit inverses, in float64, scales not rounded."""

    def upper_factor(h: Array) -> tuple[Array, Array]:
        h, dead = h.copy(), np.diag(h) == 0
        h[dead, dead] = 1
        h += method.percdamp * np.diag(h).mean() * np.eye(len(h))
        return np.linalg.cholesky(np.linalg.inv(h)).T, dead

    def denominator(factor: Array) -> Array:
        return np.diag(factor.T @ factor) if method.saliency_rule == "inverse_diagonal" else np.diag(factor)

    factor, dead = upper_factor(hessian)
    left = np.where(dead, 0, weight)
    out, columns = weight.shape
    if guided is None:
        d = np.broadcast_to(denominator(factor), weight.shape)
    else:
        runs = np.array_split(np.arange(out), len(guided))
        per_run = [denominator(upper_factor(h)[0]) for h in guided]
        d = np.concatenate([np.tile(row, (len(run), 1)) for row, run in zip(per_run, runs, strict=True)])
    bitmap = isinstance(method, ARB) and method.column_group_bitmap
    dense = np.zeros_like(weight)
    for start in range(0, columns, method.block_size):
        stop = min(start + method.block_size, columns)
        block, saliency = left[:, start:stop].copy(), (left[:, start:stop] / d[:, start:stop]) ** 2
        values = saliency if method.search_on == "saliency" else block
        salient, second = reference_split(values, saliency, bitmap, method.max_salient)
        for part, order in ((~salient, 1), (salient, 2)):
            own = block[:, part]
            one = order == 2 and not bitmap
            groups = [np.ones(own.shape, dtype=bool)] if one else both_sides(second[:, part])
            if isinstance(method, BiLLM):
                dense[:, start:stop][:, part] = reference_fit(own, groups, order)
            else:
                dense[:, start:stop][:, part] = reference_row_column(own, groups, order, method.iterations)
        lost = block - dense[:, start:stop]
        square, behind = factor[start:stop, start:stop], factor[start:stop, stop:]
        if method.feedback == "diagonal":
            left[:, stop:] -= lost / np.diag(square) @ behind
        elif method.feedback == "triangular":
            left[:, stop:] -= lost @ np.linalg.inv(square) @ behind
    return dense


def example(out: int = 10, columns: int = 48, seed: int = 0) -> tuple[Tensor, LinearStats]:
    inputs = correlated(150, columns, seed)
    inputs[:, 5] = 0
    token_weights = normal(150, 3, seed=seed + 7).square()
    return normal(out, columns, seed=seed + 1).float(), LinearStats.from_inputs(inputs, token_weights)


SETTINGS = [
    {},
    {"saliency_rule": "inverse_diagonal"},
    {"saliency_source": "guided"},
    {"search_on": "weights"},
    {"feedback": "triangular"},
    {"feedback": "none"},
    {"max_salient": 2, "percdamp": 0.1},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values())) or "default")
@pytest.mark.parametrize("cls", [BiLLM, ARB])
def test_method_equals_loops(cls: type[BinaryMethod], setting: dict[str, object]) -> None:
    method = cls(block_size=16, **setting)
    weight, stats = example()
    guided = stats.guided.double().numpy() if method.needs_gradients else None
    expected = reference_quantize(weight.double().numpy(), stats.hessian.double().numpy(), method, guided)
    packed = method.quantize_linear(weight, stats)
    # scales are stored with 11 bits, the weights are of size one; rounding may carry one of 480 weights over a border
    differences = np.abs(packed.dequantize().numpy() - expected)
    assert (differences > 4e-3).sum() <= 1


def test_feedback_hands_on_the_error_of_what_is_stored() -> None:
    """The second block, as the method sees it, follows from the first as it is dequantized, float16 scales and all."""
    seen = []

    class Spy(BiLLM):
        def fit_block(self, weights: Tensor, split: Split, gram: Tensor) -> tuple[Fit, Fit]:
            seen.append(weights.double().clone())
            return super().fit_block(weights, split, gram)

    weight, stats = example()
    dense = Spy(block_size=24).quantize_linear(weight, stats).dequantize().double()
    hessian = stats.hessian.double().clone()
    hessian[5, 5] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    expected = weight[:, 24:] - (seen[0] - dense[:, :24]) / factor.diagonal()[:24] @ factor[:24, 24:]
    torch.testing.assert_close(seen[1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [BiLLM, ARB])
@pytest.mark.parametrize("feedback", ["diagonal", "triangular"])
def test_identity_hessian_feeds_nothing_back(cls: type[BinaryMethod], feedback: str) -> None:
    weight, stats = normal(7, 40).float(), replace(example(columns=40)[1], hessian=torch.eye(40))
    with_feedback = cls(block_size=16, feedback=feedback).quantize_linear(weight, stats).dequantize()
    assert torch.equal(with_feedback, cls(block_size=16, feedback="none").quantize_linear(weight, stats).dequantize())


def output_error(method: BinaryMethod, weight: Tensor, inputs: Tensor) -> float:
    dense = method.quantize_linear(weight.float(), LinearStats.from_inputs(inputs)).dequantize()
    return ((inputs @ (weight - dense).T).norm() / (inputs @ weight.T).norm()).item()


@pytest.mark.parametrize("cls", [BiLLM, ARB])
def test_feedback_lowers_the_output_error_on_correlated_inputs(cls: type[BinaryMethod]) -> None:
    errors = {
        feedback: np.mean(
            [
                output_error(cls(block_size=16, feedback=feedback), normal(24, 64, seed=s), correlated(600, 64, s))
                for s in range(3)
            ]
        )
        for feedback in ("none", "diagonal", "triangular")
    }
    assert errors["diagonal"] < 0.97 * errors["none"]
    assert errors["triangular"] < errors["diagonal"]


def test_arb_error_is_at_most_billms_on_the_same_split() -> None:
    for seed in range(4):
        weights, gram = normal(12, 32, seed=seed), torch.eye(32)
        split = BiLLM().split_block(weights, weights.square())
        plain, extra = BiLLM().fit_block(weights, split, gram)
        refined = ARB(refinement="arb", column_group_bitmap=False).fit_block(weights, split, gram)
        assert error(refined[0], weights[:, ~split.salient]) <= error(plain, weights[:, ~split.salient])
        assert error(refined[1], weights[:, split.salient]) <= error(extra, weights[:, split.salient])


def test_guided_saliency_uses_each_groups_own_hessian() -> None:
    """Columns that matter to the loss become salient; equal Hessians give what the local one gives."""
    weight, stats = example(out=8, columns=32)
    same = replace(stats, guided=stats.hessian.expand(3, -1, -1))
    local = BiLLM().quantize_linear(weight, stats)
    assert torch.equal(BiLLM(saliency_source="guided").quantize_linear(weight, same).dequantize(), local.dequantize())
    loud = torch.ones(32)
    loud[[3, 19]] = 1e4
    method = BiLLM(saliency_source="guided", max_salient=2)
    chosen = method.quantize_linear(weight, replace(stats, guided=torch.diag(loud).expand(2, -1, -1)))
    assert chosen.salient.tolist() == [3, 19]


def test_guided_saliency_without_gradients_is_refused() -> None:
    weight, stats = example()
    method = BiLLM(saliency_source="guided")
    assert method.needs_gradients and method.gradient_groups == 4
    assert not BiLLM().needs_gradients
    with pytest.raises(DataError, match="guided"):
        method.quantize_linear(weight, replace(stats, guided=None))


METHODS = [BiLLM(), *(ARB(refinement=r, column_group_bitmap=b) for r in ("arb", "arb-x", "arb-rc") for b in (0, 1))]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "refinement", "billm") + str(m.splits_salient))
def test_same_bytes_again_and_inputs_untouched(method: BinaryMethod) -> None:
    weight, stats = example(out=6, columns=150)
    before = (weight.clone(), stats.hessian.clone())
    first, second = (method.quantize_linear(weight, stats) for _ in range(2))
    assert torch.equal(weight, before[0]) and torch.equal(stats.hessian, before[1])
    assert first.header() == second.header()
    for name, tensor in first.tensors().items():
        assert tensor.numpy().tobytes() == second.tensors()[name].numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    out=st.integers(1, 9),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([1, 7, 16, 128]),
    kind=st.sampled_from(["normal", "zero", "constant", "zero row", "one value", "tiny", "huge"]),
    tokens=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_values(
    method: BinaryMethod, out: int, columns: int, block_size: int, kind: str, tokens: int, seed: int
) -> None:
    weight = normal(out, columns, seed=seed).float()
    weight = {
        "normal": weight,
        "zero": torch.zeros_like(weight),
        "constant": torch.full_like(weight, 0.25),
        "zero row": weight * (torch.arange(out) > 0)[:, None],
        "one value": weight * (torch.arange(columns) == columns // 2),
        "tiny": weight * 1e-12,
        "huge": weight * 1e6,
    }[kind]
    inputs = normal(max(tokens, 1), columns, seed=seed + 1) * (tokens > 0)
    packed = replace(method, block_size=block_size).quantize_linear(weight, LinearStats.from_inputs(inputs))
    dense = packed.dequantize()
    assert dense.shape == (out, columns)
    assert dense.isfinite().all()
    assert 1 < packed.paper_bits() <= 2
    per_block = torch.bincount(packed.salient.long() // block_size, minlength=-(-columns // block_size))
    assert per_block.min() >= 1 and per_block.max() <= 49
    rebuilt = type(packed).from_tensors(packed.header(), packed.tensors())
    assert torch.equal(rebuilt.dequantize(), dense)
    if kind == "zero" or tokens == 0:
        assert not dense.any()
    if kind == "constant" and tokens > 0:
        # exact where no error was fed back; a dead column never occurs with these inputs
        first = dense[:, :block_size]
        torch.testing.assert_close(first, weight[:, :block_size], rtol=1e-3, atol=0)


# --- NGES as a plug-in


def bank_example(out: int = 10, columns: int = 40, experts: int = 2) -> tuple[ExpertBank, BankStats]:
    """Experts with inputs of their own, one of them with a column that is never used; pooled inputs of a third kind."""
    weights, stats = zip(*(example(out, columns, seed) for seed in range(experts)), strict=True)
    strengths = torch.logspace(0, -2, columns, dtype=torch.float64)
    pooled = LinearStats.from_inputs(correlated(300, columns, seed=77) * strengths)
    return ExpertBank({"up": torch.stack(weights)}, (("up",),)), BankStats({"up": list(stats)}, {"up": pooled})


def experts_of(method: BinaryMethod, bank: ExpertBank, stats: BankStats) -> list[BinaryMatrix]:
    return list(method.quantize_experts(bank, stats)["up"].experts)


def reference_projector(gram: Array, energy: float) -> Array:
    """Eigenvectors behind the first index, from the second on, where the tail is at most `energy` of what is before."""
    vectors, values, _ = np.linalg.svd(gram)
    for start in range(1, len(values)):
        if values[start:].sum() <= energy * values[1:start].sum():
            return vectors[:, start:] @ vectors[:, start:].T
    return np.zeros_like(gram)


def reference_factors(weight: Array, binary: Array, projector: Array, ridge: float, passes: int) -> tuple[Array, Array]:
    """Eqs. 49 and 50, one factor after the other."""
    target = weight - (weight - binary) @ projector
    row, column = np.ones(len(weight)), np.ones(weight.shape[1])
    for _ in range(passes):
        for i in range(len(row)):
            basis = binary[i] * column
            row[i] = (basis @ target[i] + ridge) / (basis @ basis + ridge)
        for j in range(len(column)):
            basis = binary[:, j] * row
            column[j] = (basis @ target[:, j] + ridge) / (basis @ basis + ridge)
    return row, column


PLUGGED = [BiLLM(nges=True), *(ARB(refinement=r, nges=True) for r in ("arb", "arb-x", "arb-rc"))]
BLOCKS = [16, 128]


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
@pytest.mark.parametrize("block_size", BLOCKS)
def test_nges_multiplies_rows_and_columns_by_the_factors_of_loops(method: BinaryMethod, block_size: int) -> None:
    bank, stats = bank_example()
    method = replace(method, block_size=block_size, tolerance=0.0)
    before = experts_of(replace(method, nges=False), bank, stats)
    projector = reference_projector(stats.pooled["up"].hessian.double().numpy(), 0.1)
    assert 0.1 < np.trace(projector) / len(projector) < 0.9
    moved = 0.0
    for e, packed in enumerate(experts_of(method, bank, stats)):
        weight, binary = bank.projections["up"][e].double().numpy(), before[e].dequantize().double().numpy()
        weight = np.where(stats.experts["up"][e].hessian.diagonal() == 0, 0, weight)
        row, column = reference_factors(weight, binary, projector, 0.2, 15)
        moved = max(moved, abs(row - 1).max(), abs(column - 1).max())
        # three numbers of 11 bits are multiplied, before and after
        np.testing.assert_allclose(packed.dequantize().numpy(), row[:, None] * binary * column, rtol=4e-3, atol=2e-3)
    assert moved > 0.05


def test_factors_multiply_means_too_by_hand() -> None:
    """mu = 1, alpha = 2 on columns 0 and 2: 3 and -1; column 1: 4 + 1 + 0.5. β_r = 2, β_c = (0.5, 10, 3)."""
    rest = Fit(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[1.0]]))
    salient = Fit(torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[1.0]], [[0.5]]]), torch.tensor([[4.0]]))
    binarization = Binarization(torch.tensor([False, True, False]), (rest,), (salient,))
    assert binarization.dense().tolist() == [[3.0, 5.5, -1.0]]
    packed = binarization.pack(128, (torch.tensor([2.0]), torch.tensor([0.5, 10.0, 3.0])))
    assert packed.dequantize().tolist() == [[3.0, 110.0, -6.0]]
    assert packed.column_factor.tolist() == [0.5, 10.0, 3.0]


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
def test_with_all_of_space_for_the_error_factors_stay_one(method: BinaryMethod) -> None:
    bank, stats = bank_example()
    weight, own = bank.projections["up"][0], stats.experts["up"][0]
    packed = method._suppress_shift({"up": weight[None]}, [{"up": own}], torch.eye(40))[0]["up"]
    plain = method.quantize_linear(weight, own).dequantize()
    torch.testing.assert_close(packed.dequantize(), plain, rtol=1e-3, atol=1e-6)
    if packed.column_factor is not None:
        assert packed.column_factor.eq(1).all()


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
def test_what_is_stored_lowers_the_error_outside_the_null_space(method: BinaryMethod) -> None:
    """Eq. 12 with its ridge falls from pass to pass, so its first part ends below where it began."""
    bank, stats = bank_example(out=24)
    weight, own = bank.projections["up"][1], stats.experts["up"][1]
    weight = weight.masked_fill(own.hessian.diagonal() == 0, 0).double()
    projector = torch.from_numpy(reference_projector(stats.pooled["up"].hessian.double().numpy(), 0.1))
    binary = method.quantize_linear(weight.float(), own).dequantize().double()
    target = weight - (weight - binary) @ projector

    def first_part(passes: int) -> float:
        chosen = replace(method, nges_iterations=passes, tolerance=0.0)
        packed = experts_of(chosen, bank, stats)[1]
        return (target - packed.dequantize().double()).square().sum().item()

    errors = [(target - binary).square().sum().item(), first_part(1), first_part(15)]
    assert errors[1] < 0.999 * errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-3)


def test_the_ridge_holds_the_factors_at_one() -> None:
    bank, stats = bank_example()
    free, held = (experts_of(BiLLM(nges=True, regularization=r), bank, stats)[0] for r in (0.2, 1e6))
    assert (held.column_factor - 1).abs().max() < 1e-3 < 0.02 < (free.column_factor - 1).abs().max()


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
def test_factors_are_stored_and_counted(method: BinaryMethod, tmp_path: Path) -> None:
    bank, stats = bank_example()
    before = method_bytes(replace(method, nges=False), bank, stats)
    after = method_bytes(method, bank, stats)
    own_scales = getattr(method, "refinement", "") == "arb-rc"
    assert after - before == (0 if own_scales else 2 * 2 * 40)  # two experts, 16 bits a column
    for packed in experts_of(method, bank, stats):
        save_file(packed.tensors(), tmp_path / "m.safetensors")
        again = BinaryMatrix.from_tensors(packed.header(), load_file(tmp_path / "m.safetensors"))
        assert torch.equal(again.dequantize(), packed.dequantize())


def method_bytes(method: BinaryMethod, bank: ExpertBank, stats: BankStats) -> int:
    """Bytes of the bank's ledger, which must be those of its tensors."""
    packed = method.quantize_experts(bank, stats)["up"]
    counted = sum(item.bytes for item in packed.ledger(0.5).items)
    assert counted == sum(tensor.nbytes for tensor in packed.tensors().values())
    return counted


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "refinement", "billm") + str(m.splits_salient))
def test_without_nges_and_outside_experts_nothing_changes(method: BinaryMethod) -> None:
    """Experts are then a loop over Linears, and Linears that are no experts are never modulated, as in MoBiE."""
    bank, stats = bank_example()
    for weight, own, packed in zip(
        bank.projections["up"], stats.experts["up"], experts_of(method, bank, stats), strict=True
    ):
        for linear in (method, replace(method, nges=True)):
            expected = linear.quantize_linear(weight, own).tensors()
            assert packed.tensors().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in packed.tensors().items())
        assert "column_factor" not in packed.tensors()


def test_a_column_factor_that_does_not_fit_is_refused() -> None:
    bank, stats = bank_example()
    matrix = experts_of(BiLLM(), bank, stats)[0]
    parts = (matrix.size, matrix.block_size, matrix.salient, matrix.plain, matrix.extra, False)
    with pytest.raises(ValueError, match="column_factor"):
        BinaryMatrix.build(*parts, torch.ones(39))
    with pytest.raises(ValueError, match="finite"):
        BinaryMatrix.build(*parts, torch.full((40,), torch.nan))


# --- configurations


def test_configs_name_these_methods() -> None:
    names = [f"{kind}{suffix}" for kind in ("arb", "arb-x", "arb-rc") for suffix in ("", "-cgb")]
    for name in names:
        method = load_method(name).build()
        assert isinstance(method, ARB)
        assert method.refinement == name.removesuffix("-cgb")
        assert method.column_group_bitmap == name.endswith("-cgb")
    assert load_method("arb-llm").build() == load_method("arb-rc-cgb").build() == ARB()
    assert load_method("billm").build() == BiLLM()
    assert [load_method(n).paper is not None for n in ("arb-llm", "billm", *names)] == [True, True] + [False] * 6


@pytest.mark.parametrize("backbone", ["billm", "arb-llm"])
def test_plug_in_configs_change_nothing_else(backbone: str) -> None:
    """Section B.4.7: "without altering any other quantization settings"."""
    plain, glas, both = (load_method(backbone + suffix) for suffix in ("", "-glas", "-glas-nges"))
    assert glas.build() == replace(plain.build(), saliency_source="guided")
    assert both.build() == replace(plain.build(), saliency_source="guided", nges=True)
    assert [glas.label, both.label] == [f"{plain.label} + GLAS", f"{plain.label} + GLAS + NGES"]
    assert glas.paper is None and both.paper is None


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((BiLLM, {option: 0}) for option in ("block_size", "max_salient", "nges_iterations", "regularization")),
        *((ARB, {option: -1}) for option in ("percdamp", "iterations", "null_space_energy")),
    ],
)
def test_impossible_options_are_refused(cls: type[BinaryMethod], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        cls(**options)
