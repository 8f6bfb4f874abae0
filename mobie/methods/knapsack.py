"""One option for every unit, at the least total cost, within a capacity: the multiple-choice knapsack problem.

    minimise  Σ_u Σ_s c_us x_us    with  Σ_s x_us = 1 for every u,   Σ_u Σ_s w_us x_us ≤ W,   x_us ∈ {0, 1}

The integer program is HiGHS's (`scipy.optimize.milp`). It is given the options only that an optimum can use: with a
price λ ≥ 0 on size, Σ_u min_s (c_us + λ w_us) - λ W is a lower bound of the optimum, a choice that fits is an upper
one, and an option whose cost at that price exceeds its unit's least by more than the difference is in no optimum. Of
tens of thousands of units that leaves a few hundred to decide on, with the same optimum. Nothing depends on the clock:
the solver stops at the optimum, or after a number of nodes.

The difference is first bridged with a few options only: a better choice makes it smaller, and with it what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALVINGS = 100  # of the interval of prices: to the last bit of a float64
NODES = 100_000  # of the solver's search tree, at most
CORE = (200, 2000)  # options that are tried first, beyond the cheapest of every unit

Costs = NDArray[np.float64]
Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    options: of every unit, the index of its option.
    cost, size: in total.
    bound: that no choice which fits can be cheaper than.
    price: that another unit of capacity is worth at the bound (λ).
    """

    options: tuple[int, ...]
    cost: float
    size: int
    bound: float
    price: float


def choose(costs: Costs, sizes: Sizes, capacity: int, nodes: int = NODES) -> Choice | None:
    """The cheapest choice that fits; None where nothing fits.

    An option that another option of its unit matches or betters in both cost and size is never taken, so that equal
    costs mean the smaller size, and equal sizes too the one that stands first.

    Args:
        costs: `(units, options)`, finite.
        sizes: `(units, options)`, not negative.
        nodes: after which the search ends with the best choice so far.
    """
    if int(sizes.min(axis=1).sum()) > capacity:
        return None
    allowed = ~_dominated(costs, sizes)
    price = _price(costs, sizes, allowed, capacity)
    priced = np.where(allowed, costs + price * sizes, np.inf)
    least = priced.min(axis=1)
    bound = float(least.sum() - price * capacity)
    best = _at_price(costs, sizes, allowed, price)
    reduced = priced - least[:, None]
    slack = 1e-9 * abs(bound)  # of sums in float64
    tried = slack
    for width in (*(_smallest(reduced, len(costs) + count) for count in CORE), np.inf):
        gap = _total(costs, best) - bound
        if gap <= tried:
            break  # whatever a better choice could use was tried
        tried = min(width, gap) + slack
        best, finished = _improve(costs / gap, sizes, reduced <= tried, capacity, best, nodes)
        if not finished:
            break  # a larger search would not either
    cost = _total(costs, best)
    return Choice(tuple(best.tolist()), cost, int(_total(sizes, best)), min(bound, cost), price)


def _total(values: Costs | Sizes, options: NDArray[np.int64]) -> float:
    return values[np.arange(len(values)), options].sum().item()


def _dominated(costs: Costs, sizes: Sizes) -> NDArray[np.bool_]:
    """Options `(units, options)` that another of the same unit matches or betters."""
    dominated = np.zeros(costs.shape, dtype=bool)
    for option in range(costs.shape[1]):
        for other in range(costs.shape[1]):
            if other == option:
                continue
            as_good = (costs[:, other] <= costs[:, option]) & (sizes[:, other] <= sizes[:, option])
            better = (costs[:, other] < costs[:, option]) | (sizes[:, other] < sizes[:, option]) | (other < option)
            dominated[:, option] |= as_good & better
    return dominated


def _at_price(costs: Costs, sizes: Sizes, allowed: NDArray[np.bool_], price: float) -> NDArray[np.int64]:
    """The cheapest option of every unit where size costs `price`; of equal ones the smallest."""
    priced = np.where(allowed, costs + price * sizes, np.inf)
    ties = priced == priced.min(axis=1, keepdims=True)
    return np.where(ties, sizes, np.iinfo(np.int64).max).argmin(axis=1)


def _price(costs: Costs, sizes: Sizes, allowed: NDArray[np.bool_], capacity: int) -> float:
    """The least price, to a float's precision, at which every unit's cheapest option together fit."""
    low, high = 0.0, float(costs.max() - costs.min()) + 1.0  # at which one size less is worth any cost
    if _total(sizes, _at_price(costs, sizes, allowed, low)) <= capacity:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _total(sizes, _at_price(costs, sizes, allowed, middle)) <= capacity:
            high = middle
        else:
            low = middle
    return high


def _smallest(values: Costs, count: int) -> float:
    """The `count`-th smallest of the values, the largest where they are fewer."""
    flat = np.sort(values[np.isfinite(values)])
    return float(flat[min(count, len(flat)) - 1])


def _improve(
    costs: Costs, sizes: Sizes, core: NDArray[np.bool_], capacity: int, best: NDArray[np.int64], nodes: int
) -> tuple[NDArray[np.int64], bool]:
    """The best choice of options in the core, or `best` where none is cheaper; whether the search came to its end."""
    free = np.flatnonzero(core.sum(axis=1) > 1)
    found = core.argmax(axis=1)  # of the units that are not free, the only option
    fixed = int(_total(sizes, found)) - int(_total(sizes[free], found[free]))
    solved, finished = _solve(costs[free], sizes[free], core[free], capacity - fixed, nodes)
    if solved is not None:
        found[free] = solved
        if _total(sizes, found) <= capacity and _total(costs, found) < _total(costs, best):
            return found, finished
    return best, finished


def _solve(
    costs: Costs, sizes: Sizes, allowed: NDArray[np.bool_], capacity: int, nodes: int
) -> tuple[NDArray[np.int64] | None, bool]:
    """The options of an integer program over the allowed ones, if any were found, and whether they are its optimum."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    unit, option = np.nonzero(allowed)
    count = len(unit)
    one_each = csr_array((np.ones(count), (unit, np.arange(count))), shape=(len(costs), count))
    size = csr_array(sizes[unit, option].astype(np.float64)[None])
    least = np.where(allowed, costs, np.inf).min(axis=1)  # taken off, so that the solver's tolerance is of differences
    result = milp(
        costs[unit, option] - least[unit],
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, capacity)],
        options={"mip_rel_gap": 0, "node_limit": nodes},
    )
    if result.x is None:
        return None, False
    taken = np.zeros(allowed.shape)
    taken[unit, option] = result.x
    return taken.argmax(axis=1), result.status == 0
