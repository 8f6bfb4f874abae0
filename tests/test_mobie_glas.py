"""Global Loss-Aligned Saliency against explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobie.methods.base import LinearStats
from mobie.methods.mobie.glas import saliency, salient_columns

EXPERTS, ROWS, IN, TOKENS, GROUPS = 3, 10, 16, 60, 4


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def correlated_inputs(generator: torch.Generator) -> Tensor:
    mixing = torch.randn(IN, IN, generator=generator) * torch.logspace(-1, 1, IN)
    return torch.randn(TOKENS, IN, generator=generator) @ mixing


def guided_by_loop(x: Tensor, gradients: Tensor) -> list[Tensor]:
    """Eq. 8 with the squared gradients averaged over 4 contiguous groups of channels, sizes 3, 3, 2, 2, in float64."""
    x, gradients = x.double(), gradients.double()
    hessians = []
    for channels in ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9]):
        total = torch.zeros(IN, IN, dtype=torch.float64)
        for token in range(TOKENS):
            weight = sum(float(gradients[token, c]) ** 2 for c in channels) / len(channels)
            total += weight * torch.outer(x[token], x[token])
        hessians.append(2 / TOKENS * total)
    return hessians


@pytest.mark.parametrize("rule", ["inverse_diagonal", "cholesky_diagonal"])
def test_equals_explicit_inverses_per_group(generator: torch.Generator, rule: str) -> None:
    weight = torch.randn(EXPERTS, ROWS, IN, generator=generator)
    hessians, expected = [], torch.zeros(EXPERTS, ROWS, IN, dtype=torch.float64)
    for e in range(EXPERTS):
        x = correlated_inputs(generator)
        gradients = torch.randn(TOKENS, ROWS, generator=generator) * torch.rand(TOKENS, 1, generator=generator)
        weights = torch.stack([g.square().mean(1) for g in gradients.split([3, 3, 2, 2], dim=1)], dim=1)
        hessians.append(LinearStats.from_inputs(x, weights).guided)
        row = 0
        for hessian, size in zip(guided_by_loop(x, gradients), (3, 3, 2, 2), strict=True):
            damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
            inverse = torch.linalg.inv(damped)
            upper = torch.linalg.cholesky(inverse).mH  # of the baselines: H⁻¹ = UᵀU
            divisor = inverse.diagonal() if rule == "inverse_diagonal" else upper.diagonal()
            for i in range(row, row + size):
                expected[e, i] = weight[e, i].double() ** 2 / divisor**2
            row += size
    torch.testing.assert_close(saliency(weight, torch.stack(hessians), rule).double(), expected, rtol=1e-3, atol=0)


def test_equal_gradients_give_the_local_saliency(generator: torch.Generator) -> None:
    weight = torch.randn(1, ROWS, IN, generator=generator)
    stats = LinearStats.from_inputs(correlated_inputs(generator), torch.ones(TOKENS, GROUPS))
    local = saliency(weight, [stats.hessian[None]])
    torch.testing.assert_close(saliency(weight, [stats.guided]), local, rtol=1e-4, atol=0)


def test_tokens_that_the_loss_minds_decide(generator: torch.Generator) -> None:
    """Two kinds of tokens use two halves of the inputs; the half whose tokens have gradients is salient."""
    x = torch.randn(TOKENS, IN, generator=generator)
    x[::2, : IN // 2] *= 0.1
    x[1::2, IN // 2 :] *= 0.1
    weight = torch.ones(1, ROWS, IN)
    for kind, half in ((0, range(IN // 2, IN)), (1, range(IN // 2))):
        gradients = torch.full((TOKENS, 1), 1e-4)
        gradients[kind::2] = 1.0
        scores = saliency(weight, [LinearStats.from_inputs(x, gradients).guided])
        assert salient_columns(scores, 0.5)[0].nonzero().flatten().tolist() == list(half)


@pytest.mark.parametrize("rule", ["inverse_diagonal", "cholesky_diagonal"])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3])
def test_choice_does_not_depend_on_the_scale_of_the_loss(generator: torch.Generator, rule: str, scale: float) -> None:
    """Also where a column is dead, whose place on the diagonal is filled up."""
    x = correlated_inputs(generator)
    x[:, 5] = 0
    weight = torch.randn(1, ROWS, IN, generator=generator)
    guided = LinearStats.from_inputs(x, torch.rand(TOKENS, GROUPS, generator=generator)).guided
    plain, scaled = (saliency(weight, [factor * guided], rule) for factor in (1.0, scale))
    assert not plain[..., 5].any() and not scaled[..., 5].any()
    power = 2 if rule == "inverse_diagonal" else 1
    torch.testing.assert_close(scaled, plain * scale**power, rtol=1e-3, atol=0)
    assert torch.equal(salient_columns(plain, 0.25), salient_columns(scaled, 0.25))


def test_expert_without_any_gradient_has_no_saliency() -> None:
    assert not saliency(torch.ones(1, 4, 6), [torch.zeros(2, 6, 6)]).any()


def test_fewer_rows_than_groups(generator: torch.Generator) -> None:
    weight = torch.randn(1, 2, IN, generator=generator)
    stats = LinearStats.from_inputs(correlated_inputs(generator), torch.rand(TOKENS, GROUPS, generator=generator))
    scores = saliency(weight, [stats.guided])
    first_two = saliency(weight, [stats.guided[:2]])
    assert scores.shape == (1, 2, IN)
    torch.testing.assert_close(scores, first_two)


def test_top_share_by_mean_over_rows(generator: torch.Generator) -> None:
    scores = torch.rand(EXPERTS, ROWS, 40, generator=generator)
    mask = salient_columns(scores, 0.2)
    for e in range(EXPERTS):
        means = [scores[e, :, j].double().mean().item() for j in range(40)]
        best = sorted(range(40), key=lambda j: means[j], reverse=True)[:8]
        assert mask[e].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize(("columns", "share", "count"), [(128, 0.05, 6), (256, 0.05, 13), (9, 0.05, 0), (7, 1.0, 7)])
def test_count_is_rounded_and_the_same_for_all_experts(columns: int, share: float, count: int) -> None:
    scores = torch.rand(EXPERTS, 3, columns, generator=torch.Generator().manual_seed(1))
    assert salient_columns(scores, share).sum(1).tolist() == [count] * EXPERTS
