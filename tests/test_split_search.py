"""How BiLLM and ARB-LLM split a block: the searches against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from binary_references import normal, reference_error, reference_split

from mobie.methods.arb import ARB
from mobie.methods.billm import BiLLM
from mobie.methods.split_search import border_errors


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
