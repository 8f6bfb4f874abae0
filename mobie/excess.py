"""Excess loss over full precision, bits stored, and what both come to over calibration seeds.

    excess(text, seed) = mean over windows of (loss of the quantized model - loss in full precision)    [nats per token]
    interval           = t(0.975, n - 1) · s / √n    over the n calibration seeds, s their standard deviation

Seeds change the calibration sample alone: windows and the full-precision model are the same, so nothing else is in s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mobie.config import Beyond, Scope
from mobie.errors import ConfigError
from mobie.paired import log_ratio
from mobie.results import Cell, Model, Results

REFERENCE = "fp16"
CONFIDENCE = 0.95
ONE_SEED = "calibrated with one seed: no interval"


def comparison(results: Results) -> Beyond:
    """What a suite compares per stored bit. Raises `ConfigError` where it compares nothing."""
    if results.suite.beyond is None:
        raise ConfigError(
            f"suite {results.suite_name!r} has no comparison per stored bit, expected one with the key `beyond`; "
            "use --suite beyond (of Snakemake: --config suite=beyond)"
        )
    return results.suite.beyond


def rows_of(results: Results, scope: Scope) -> tuple[str, ...]:
    """Method configs of a scope, our own last."""
    rows = results.suite.methods if scope.rows is None else scope.rows
    others = [name for name in rows if name != REFERENCE and name not in scope.dial]
    return (*others, *scope.dial)


def seeds_of(results: Results, method: str) -> tuple[int, ...]:
    """Calibration seeds of a row: the sweep's, or the suite's own for one that is calibrated once."""
    return (results.suite.seed,) if method in comparison(results).once else results.suite.sweep.seeds


def budget_of(results: Results, method: str) -> float:
    """Stored bits per weight that a row of the dial was given. Raises `ConfigError` where it has no such option."""
    budget = results.method(method).options.get("budget")
    if not isinstance(budget, int | float):
        raise ConfigError(f"method {method}: a row of the dial with budget {budget!r}, expected a number of bits")
    return float(budget)


def name_of(results: Results, method: str) -> str:
    """What a row is called: its label, of a row of a dial with the budget."""
    label = results.method(method).label
    dials = [name for scope in comparison(results).scopes.values() for name in scope.dial]
    return f"{label}, {budget_of(results, method):g} bits" if method in dials else label


def stored_bits(results: Results, model: Model, method: str, component: str | None) -> Cell:
    """Bits stored per quantized weight, every byte counted, or per weight of one component; of the suite's seed."""
    whole = results.cell(model, method, "quantize", "bits_stored")
    if component is None or whole.value is None:
        return whole
    found = results.details(model, method, "quantize").get("bits_by_component", {}).get(component)
    if found is None:
        return Cell(None, status="missing", reason=f"the record has no bits of {component}", record=whole.record)
    return replace(whole, value=found["stored"], n=found["weights"])


def excess(results: Results, model: Model, method: str, texts: Sequence[str]) -> Cell:
    """Excess loss, averaged over texts and seeds; its standard error and n are over seeds."""
    runs = [log_ratio(results, model, method, REFERENCE, texts, seed=seed) for seed in seeds_of(results, method)]
    return over_seeds(runs)


def first_hole(cells: Sequence[Cell]) -> Cell | None:
    """The first of the cells that has no value, with its reason alone; None where all have one."""
    return next((replace(cell, stderr=None, n=None) for cell in cells if cell.value is None), None)


def over_seeds(cells: Sequence[Cell]) -> Cell:
    """Mean of cells that differ by their seed, a hole unless all are there; no standard error where there is one."""
    hole = first_hole(cells)
    if hole is not None:
        return hole
    values = [cell.value for cell in cells if cell.value is not None]
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Cell(mean, None, 1, record=cells[0].record)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Cell(mean, deviation / math.sqrt(n), n, record=cells[0].record)


def half_width(cell: Cell) -> float | None:
    """Half of the t-interval around a mean of `over_seeds`; None where there is none."""
    if cell.stderr is None or cell.n is None or cell.n < 2:
        return None
    from scipy.special import stdtrit  # here: a plan has no values

    return float(stdtrit(cell.n - 1, (1 + CONFIDENCE) / 2)) * cell.stderr


def interval(cell: Cell) -> Cell:
    """The half-width of a mean's interval as a value of its own; a hole where the mean is one or has one seed."""
    if cell.value is None:
        return cell
    half = half_width(cell)
    if half is None:
        return Cell(None, status="absent", reason=ONE_SEED, record=cell.record)
    return Cell(half, None, cell.n, record=cell.record)


def difference(results: Results, model: Model, method: str, other: str, texts: Sequence[str]) -> tuple[Cell, float]:
    """Loss of `method` less that of `other`, averaged over texts and the seeds of both, and the reach of its interval.

    Runs of one seed share their calibration sample and are compared with each other. With one seed in common the
    interval is that of the windows: two standard errors. It is infinite where the difference is a hole.
    """
    shared = [seed for seed in seeds_of(results, method) if seed in seeds_of(results, other)]
    cells = [log_ratio(results, model, method, other, texts, seed=s, reference_seed=s) for s in shared]
    found = over_seeds(cells)
    if found.value is None:
        return found, math.inf
    half = half_width(found)
    if half is None:
        window = cells[0].stderr
        half = math.inf if window is None else 2 * window
    return found, half


def least_similarity(results: Results, model: Model, method: str, rival: str) -> tuple[Cell, Cell]:
    """Routing similarity of a method and of a rival in the layer where the method's is lowest against the rival's.

    Of the suite's seed, the only one whose routes are recorded.
    """
    found: list[tuple[Cell, Cell]] = []
    while True:
        name = f"layer{len(found)}.similarity"
        ours, theirs = (results.cell(model, run, "routing", name) for run in (method, rival))
        if ours.value is None or theirs.value is None:
            return min(found, key=lambda pair: less(*pair).value or 0.0, default=(ours, theirs))
        found.append((ours, theirs))


def less(ours: Cell, theirs: Cell) -> Cell:
    """Difference of two values; a hole of either is a hole."""
    if ours.value is None or theirs.value is None:
        return first_hole((ours, theirs)) or ours
    return Cell(ours.value - theirs.value, record=ours.record)


def ratio(ours: Cell, theirs: Cell) -> Cell:
    """Quotient of two means; a hole of either is a hole, and there is none of a method without excess."""
    if ours.value is None or theirs.value is None:
        return first_hole((ours, theirs)) or ours
    if theirs.value <= 0:
        return Cell(None, status="unsupported", reason="the other method loses nothing", record=theirs.record)
    return Cell(ours.value / theirs.value, record=ours.record)
