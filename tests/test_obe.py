"""OBE: closed forms against brute force, planes against all that could be chosen, the budget against stored bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_pipeline import TOKENS, weight_files
from tiny import make_model, save_model
from torch import Tensor

from mobie import pipeline
from mobie.errors import ConfigError, UnsupportedError
from mobie.methods.allocation import LayerView
from mobie.methods.base import LinearStats
from mobie.methods.hessian import damp, inverse_cholesky
from mobie.methods.obe import OBE, Allotment, column_importance, counts_of
from mobie.methods.plane_budget import Candidate, plane_columns, run_length, share_out, summarize
from mobie.methods.plane_fit import (
    DISTORTION,
    LEVELS,
    Planes,
    descend,
    feed_back,
    fit_planes,
    nearest_signs,
    output_error,
    refit,
    start,
)
from mobie.packing.checkpoint import block_path, load_block
from mobie.packing.dense import Dense16
from mobie.packing.planes import stored_bytes
from mobie.pipeline import quantize


def problem(seed: int, out: int, columns: int, experts: int = 1) -> tuple[Tensor, Tensor]:
    """Weights `(experts, out, in)` and damped Hessians of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, out, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(experts, columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(experts, 4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return weights, damp(2 / inputs.shape[1] * inputs.mT @ inputs)[0]


def every_sign(planes: int, columns: int) -> Tensor:
    """All signs of one row, `(2^(planes·columns), planes, columns)`."""
    flat = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=planes * columns)), dtype=torch.float64)
    return flat.view(-1, planes, columns)


# --- levels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", range(1, len(LEVELS) + 1))
def test_levels_leave_the_distortion_that_is_reckoned_with(planes: int) -> None:
    values = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)  # quantiles of a normal
    levels = torch.tensor(LEVELS[planes - 1], dtype=torch.float64)[:, None].expand(-1, len(values))
    _, reached = nearest_signs(values, levels)
    assert (values - reached).square().mean().item() == pytest.approx(DISTORTION[planes], rel=2e-3)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.integers(1, 4))
def test_signs_plane_by_plane_are_those_of_the_nearest_level(values: list[float], planes: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    levels = torch.tensor(LEVELS[planes - 1], dtype=torch.float64)
    signs, reached = nearest_signs(x, levels[:, None].expand(-1, len(x)))
    sums = every_sign(planes, 1)[..., 0] @ levels
    assert torch.allclose((x - reached).abs(), (x[:, None] - sums).abs().min(1).values)
    assert torch.equal((signs * levels[:, None]).sum(0), reached)


# --- fit ------------------------------------------------------------------------------------------------------------


def test_first_step_of_error_feedback_by_hand() -> None:
    """Two columns, one row of scale 1 and one plane.

    H = [[2, 1], [1, 1]], so H⁻¹ = [[1, -1], [-1, 2]] and U = [[1, -1], [0, 1]]. Column 0 has 0.4: its sign is +1, its
    error -0.6, and column 1 becomes 0.3 - (-0.6 / 1) · (-1) = -0.3, whose sign is not that of 0.3.
    """
    hessian = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    factor = inverse_cholesky(hessian)
    torch.testing.assert_close(factor, torch.tensor([[[1.0, -1.0], [0.0, 1.0]]]))
    ratio = torch.tensor([[[0.0], [1.0]]])
    signs = feed_back(
        torch.tensor([[[0.4, 0.3]]]), factor, torch.ones(1, 1), ratio, torch.ones(1, 2, dtype=torch.int64)
    )
    assert signs.flatten().tolist() == [1.0, -1.0]


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 1, 2, 1], [0, 1, 2, 2]])
def test_best_of_all_signs_is_seldom_missed_by_much(counts: list[int]) -> None:
    """Of one row all signs are tried, each with the best row scale for the fitted ratios."""
    ratios = []
    for seed in range(20):
        weights, hessian = problem(seed, 1, len(counts))
        own = torch.tensor([counts])
        fitted = fit_planes(weights, hessian, own, rounds=3, refits=True, feeds_back=True, sweeps=2)
        error = output_error(weights, fitted.dense(), hessian).item()
        per_column = fitted.ratio[0][own[0]].T  # (planes, in)
        values = (every_sign(len(per_column), len(counts)) * per_column).sum(1)  # rows to be scaled
        through = values @ hessian[0]
        gain = (through @ weights[0, 0]).square() / (through * values).sum(-1).clamp(min=1e-12)
        best = (weights[0, 0] @ hessian[0] @ weights[0, 0] - gain.max()).item()
        assert error >= best - 1e-9
        ratios.append((error - best) / output_error(weights, 0 * weights, hessian).item())
    assert np.median(ratios) < 0.05


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(2, 6), st.integers(1, 3))
def test_refit_is_where_no_scale_or_ratio_can_be_better(seed: int, out: int, columns: int, planes: int) -> None:
    weights, hessian = problem(seed, out, columns)
    counts = torch.randint(0, planes + 1, (1, columns), generator=torch.Generator().manual_seed(seed))
    scale, ratio = start(weights, counts, planes)
    signs = feed_back(weights, inverse_cholesky(hessian).double(), scale, ratio, counts)
    before = Planes(signs, scale, ratio, counts)
    after = refit(weights, hessian, before)
    error = output_error(weights, after.dense(), hessian).item()
    assert error <= output_error(weights, before.dense(), hessian).item() * (1 + 1e-9)
    scales = after.row_scale.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        output_error(weights, Planes(signs, scales, after.ratio, counts).dense(), hessian).sum(), scales
    )
    assert slope.abs().max() <= 1e-6 * output_error(weights, 0 * weights, hessian)  # row scales are exact at the end


def test_refit_of_one_row_and_plane_is_the_least_squares_quotient() -> None:
    weights, hessian = problem(3, 1, 5)
    counts = torch.ones(1, 5, dtype=torch.int64)
    scale, ratio = start(weights, counts, 1)
    signs = weights.sign()[None]
    fitted = refit(weights, hessian, Planes(signs, scale, ratio, counts))
    s, w, h = signs[0, 0, 0], weights[0, 0], hessian[0]
    expected = (s @ h @ w) / (s @ h @ s) * s
    torch.testing.assert_close(fitted.dense()[0, 0], expected)


def test_descent_ends_where_no_single_sign_lowers_the_error() -> None:
    weights, hessian = problem(5, 3, 6)
    counts = torch.tensor([[2, 1, 2, 0, 1, 2]])
    scale, ratio = start(weights, counts, 2)
    begun = Planes(nearest_signs(weights, scale.new_ones(2, 1, 1, 1))[0], scale, ratio, counts)
    ended = descend(weights, hessian, begun, sweeps=50)
    error = output_error(weights, ended.dense(), hessian)
    assert error < output_error(weights, begun.dense(), hessian)
    for q, i, j in itertools.product(range(2), range(3), range(6)):
        turned = ended.signs.clone()
        turned[q, 0, i, j] *= -1
        assert output_error(weights, Planes(turned, scale, ratio, counts).dense(), hessian) >= error - 1e-9


def test_descent_in_blocks_is_that_of_single_columns() -> None:
    """Over more columns than a block has: the slope that is carried along is the one of the result."""
    weights, hessian = problem(6, 2, 150)
    counts = torch.full((1, 150), 1)
    scale, ratio = start(weights, counts, 1)
    ended = descend(weights, hessian, Planes(weights.sign()[None], scale, ratio, counts), sweeps=30)
    error = output_error(weights, ended.dense(), hessian)
    for j in range(150):
        turned = ended.signs.clone()
        turned[0, 0, 0, j] *= -1
        assert output_error(weights, Planes(turned, scale, ratio, counts).dense(), hessian) >= error * (1 - 1e-9)


@pytest.mark.parametrize("part", ["feeds_back", "refits"])
def test_each_part_of_the_fit_lowers_the_output_error(part: str) -> None:
    weights, hessian = (x.float() for x in problem(7, 32, 48, experts=2))
    counts = torch.randint(0, 4, (2, 48), generator=torch.Generator().manual_seed(1))
    switches: dict[str, Any] = {"rounds": 2, "refits": True, "feeds_back": True, "sweeps": 0}
    whole = fit_planes(weights, hessian, counts, **switches)
    without = fit_planes(weights, hessian, counts, **switches | {part: False})
    better, worse = (output_error(weights, planes.dense(), hessian) for planes in (whole, without))
    assert (better < worse).all()
    pruned = (counts == 0)[:, None].expand_as(weights)
    assert (whole.dense()[pruned] == 0).all()


def test_more_rounds_are_never_worse_and_experts_do_not_see_each_other() -> None:
    weights, hessian = (x.float() for x in problem(8, 16, 24, experts=3))
    counts = torch.randint(0, 3, (3, 24), generator=torch.Generator().manual_seed(2))
    errors = []
    for rounds in (1, 2, 4):
        together = fit_planes(weights, hessian, counts, rounds=rounds, refits=True, feeds_back=True, sweeps=0)
        errors.append(output_error(weights, together.dense(), hessian))
        alone = fit_planes(
            weights[1:2], hessian[1:2], counts[1:2], rounds=rounds, refits=True, feeds_back=True, sweeps=0
        )
        torch.testing.assert_close(together.dense()[1], alone.dense()[0], rtol=0, atol=0)
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()


# --- who gets planes ------------------------------------------------------------------------------------------------


def test_importance_is_what_zeroing_a_column_adds() -> None:
    weights, hessian = problem(9, 4, 5)
    found = column_importance(weights, hessian)
    for j in range(5):
        without = weights.clone()
        without[..., j] = 0
        assert output_error(weights, without, hessian).item() == pytest.approx(found[0, j].item())


def test_columns_of_a_plane_are_the_most_important_ones() -> None:
    importance = torch.tensor([[1.0, 5.0, 3.0, 5.0], [4.0, 3.0, 2.0, 1.0]])
    counts = counts_of(importance, [Allotment(4, (3, 1)), Allotment(4, ())])
    assert counts.tolist() == [[0, 2, 1, 1], [0, 0, 0, 0]]  # of equal ones the first


def test_runs_hold_every_column_once() -> None:
    assert [run_length(columns) for columns in (8, 256, 512, 520, 2048)] == [8, 8, 8, 16, 32]
    assert summarize(torch.arange(20.0)) == [124.0, 60.0, 6.0]


def candidates_of(seed: int, sizes: Sequence[tuple[int, int]]) -> list[Candidate]:
    generator = np.random.default_rng(seed)
    found = []
    for out, columns in sizes:
        importance = torch.from_numpy(generator.lognormal(sigma=2, size=columns) * generator.lognormal(sigma=2))
        found.append(Candidate((out, columns), np.array(summarize(importance))))
    return found


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(1e-4, 10))
def test_at_a_price_no_other_planes_cost_less(seed: int, price: float) -> None:
    """Distortion plus priced bits, against every choice of nested runs."""
    (candidate,) = candidates_of(seed, [(16, 24)])
    runs = candidate.importance

    def cost(covered: Sequence[int]) -> float:  # runs of each plane
        left = sum(d * DISTORTION[sum(r < own for own in covered)] for r, d in enumerate(runs))
        return left + price * (16 * 8 * sum(covered) + (16 * 16 if any(covered) else 0))

    chosen = [columns // 8 for columns in plane_columns(candidate, price, 2)]
    best = min(cost((a, b)) for a in range(4) for b in range(a + 1))
    assert cost(chosen) <= best * (1 + 1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.4, 3.5))
@example(496, 0.578125)  # where the next matrix in turn does not fit
def test_shared_out_bytes_are_within_a_hundredth_below_the_budget(seed: int, bits: float) -> None:
    sizes = [(256, 256)] * 6 + [(128, 256), (256, 128)] * 12
    candidates = candidates_of(seed, sizes)
    budget = int(bits * sum(out * columns for out, columns in sizes) / 8)
    chosen = share_out(candidates, budget, len(LEVELS))
    taken = sum(stored_bytes(candidate.size, own) for candidate, own in zip(candidates, chosen, strict=True))
    assert 0.99 * budget <= taken <= budget
    assert all(list(own) == sorted(own, reverse=True) for own in chosen)


def test_matrix_that_nothing_reaches_gets_no_plane() -> None:
    useless, used = Candidate((8, 16), np.zeros(2)), Candidate((8, 16), np.ones(2))
    assert share_out([useless, used], 1000, 4) == [(), (16, 16, 16, 16)]
    assert share_out([useless, useless], 1000, 4) == [(), ()]


# --- the method -----------------------------------------------------------------------------------------------------


def test_importance_to_the_loss_counts_tokens_and_their_gradients() -> None:
    weight, inputs, squares = torch.randn(4, 8), torch.randn(10, 8), torch.rand(10, 1)
    view = LayerView({"q_proj": weight}, {"q_proj": LinearStats.from_inputs(inputs, squares)})
    found = OBE().survey(view)["linears"]["q_proj"]
    expected = [
        2 * (squares[:, 0] * (inputs[:, j, None] * weight[:, j]).square().sum(1)).sum().item() for j in range(8)
    ]
    assert found == {"size": [4, 8], "importance": [pytest.approx(sum(expected), rel=1e-4)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen2_moe"), tmp_path_factory.mktemp("obe") / "model")


@pytest.mark.parametrize("scope", ["model", "experts"])
def test_checkpoint_takes_the_bytes_that_were_shared_out(model: Path, tmp_path: Path, scope: str) -> None:
    report = quantize(model, OBE(budget=2.0, scope=scope), TOKENS, tmp_path / "out", fingerprint="job")
    stored = [load_block(block_path(tmp_path / "out", index)).block for index in range(len(report.blocks))]
    account = report.blocks[0]["allocation"]["account"]
    own = [p for block in stored for p in block.experts.values()]
    linears = [p for block in stored for p in block.linears.values()]
    if scope == "model":
        own += linears
    else:
        assert all(isinstance(packed, Dense16) for packed in linears)
    taken = sum(item.bytes for packed in own for item in packed.ledger().items)
    weights = sum(packed.ledger().weights for packed in own)
    assert 8 * taken / weights == pytest.approx(account["reached"]) and account["reached"] <= 2.0


def test_same_bytes_again_and_after_an_interruption(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    quantize(model, OBE(), TOKENS, tmp_path / "whole", fingerprint="job")
    calls = []

    def dies(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    original = pipeline.quantize_block
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_block", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, OBE(), TOKENS, tmp_path / "out", fingerprint="job")
    quantize(model, OBE(), TOKENS, tmp_path / "out", fingerprint="job")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0; expected a positive number"),
        ({"planes": 5}, "planes is 5; expected a whole number from 1 to 4"),
        ({"rounds": 0}, "rounds is 0; expected a whole number from 1"),
        ({"sign_sweeps": -1}, "sign_sweeps is -1"),
        ({"percdamp": -0.1}, "percdamp is -0.1; expected a number of at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OBE(**options)


def test_budget_beyond_all_planes_is_refused() -> None:
    weight = torch.randn(64, 64)
    view = LayerView({"q_proj": weight}, {"q_proj": LinearStats.from_inputs(torch.randn(99, 64), torch.ones(99, 1))})
    with pytest.raises(
        UnsupportedError, match=r"budget is 6.0 .* 4 planes for every column take 4\.\d+, expected no more"
    ):
        OBE(budget=6.0).over(view)
