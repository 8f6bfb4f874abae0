"""One option per unit within a capacity: every choice enumerated, the linear relaxation, ties, and true size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mobie.methods.knapsack import Choice, choose


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Up to five units of up to four options, whole costs (many ties) or not, and a capacity."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    count = shape[0] * shape[1]
    cost = draw(st.sampled_from([st.integers(0, 4).map(float), st.floats(0, 1e3, width=32)]))
    costs = np.array(draw(st.lists(cost, min_size=count, max_size=count))).reshape(shape)
    sizes = np.array(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)), dtype=np.int64).reshape(shape)
    return costs, sizes, draw(st.integers(0, 9 * shape[0]))


def enumerated(costs: np.ndarray, sizes: np.ndarray, capacity: int) -> float | None:
    """Least cost over all choices that fit."""
    units = np.arange(len(costs))
    choices = [np.array(c) for c in itertools.product(range(costs.shape[1]), repeat=len(costs))]
    return min((costs[units, c].sum() for c in choices if sizes[units, c].sum() <= capacity), default=None)


def relaxed(costs: np.ndarray, sizes: np.ndarray, capacity: int) -> float:
    """Optimum of the linear relaxation."""
    one_each = np.kron(np.eye(len(costs)), np.ones(costs.shape[1]))
    found = linprog(
        costs.ravel(), sizes.ravel()[None], [capacity], one_each, np.ones(len(costs)), bounds=(0, 1), method="highs"
    )
    return float(found.fun)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_optimum_is_that_of_all_choices_enumerated(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    costs, sizes, capacity = problem
    best, found = enumerated(*problem), choose(*problem)
    if best is None or found is None:
        assert best is None and found is None
        return
    units, options = np.arange(len(costs)), np.array(found.options)
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.cost == pytest.approx(costs[units, options].sum())
    assert found.size == sizes[units, options].sum() <= capacity
    assert found.bound <= found.cost
    assert found.bound == pytest.approx(relaxed(*problem), rel=1e-6, abs=1e-6)
    for unit, option in zip(units, options, strict=True):  # what costs as little is not larger
        assert all(sizes[unit, option] <= sizes[unit][costs[unit] <= costs[unit, option]])
    assert choose(*problem) == found


def test_worked_by_hand() -> None:
    costs = np.array([[9.0, 4.0, 0.0], [5.0, 3.0, 0.0]])
    sizes = np.array([[1, 2, 4], [1, 2, 4]])
    # 5: (4, 1) costs 0 + 5, (1, 4) costs 9 + 0, (2, 2) costs 4 + 3 and leaves one over
    found = choose(costs, sizes, 5)
    assert found is not None and found.options == (2, 0) and (found.cost, found.size) == (5.0, 5)
    # at a price of 2, sizes 2 and 4 of the first unit cost 8 both, 1 and 2 of the second 7: 8 + 7 - 2 · 5 is the bound
    assert (found.bound, found.price) == (pytest.approx(5.0), pytest.approx(2.0))
    narrow = choose(costs, sizes, 2)
    assert narrow == Choice((0, 0), 14.0, 2, pytest.approx(14.0), pytest.approx(5.0))
    assert choose(costs, sizes, 1) is None
    free = choose(costs, sizes, 8)
    assert free is not None and free.options == (2, 2) and (free.cost, free.bound, free.price) == (0.0, 0.0, 0.0)


def test_equal_options_go_to_the_smallest_and_then_the_first() -> None:
    costs, sizes = np.zeros((3, 3)), np.array([[5, 2, 2], [1, 1, 1], [3, 2, 1]])
    found = choose(costs, sizes, 100)
    assert found is not None and found.options == (1, 0, 2)


def true_size(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """48 layers of 128 experts, gate with up and down, six strategies: 73 728 options."""
    random = np.random.default_rng(seed)
    units = 48 * 128 * 2
    base = np.exp(random.normal(0, 1.5, (units, 1)))
    costs = base * [1, 0.45, 0.2, 0.13, 0.1, 0.006] * np.exp(random.normal(0, 0.1, (units, 6)))
    return costs, np.tile([[10, 18, 26, 32, 34, 64], [5, 9, 13, 16, 17, 32]], (units // 2, 1))


def test_true_size_reaches_its_bound_whatever_the_clock() -> None:
    costs, sizes = true_size(0)
    capacity = 9 * len(sizes) * 3 // 2 + 100  # 2.25 bits per weight, and a little
    found = choose(costs, sizes, capacity)
    assert found is not None and found.size <= capacity
    assert found.cost - found.bound < 1e-6 * found.cost
    assert choose(costs, sizes, capacity) == found


def test_search_that_may_not_branch_still_gives_a_choice_that_fits() -> None:
    costs, sizes = true_size(1)
    capacity = 9 * len(sizes) * 3 // 2 + 101
    best, hurried = choose(costs, sizes, capacity), choose(costs, sizes, capacity, nodes=0)
    assert best is not None and hurried is not None
    assert hurried.size <= capacity and best.cost <= hurried.cost
    assert hurried.bound == best.bound
