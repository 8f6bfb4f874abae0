"""Input statistics against float64 sums over a plain forward of the library's model with hooks of our own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny import EXPERTS, TOP_K, SilentObserver, experts_by_hand, inner_by_hand, make_model, random_tokens
from torch import Tensor, nn

from mobie.calibration.capture import observe_experts
from mobie.calibration.guided import GuidedHessians, TokenWeights
from mobie.calibration.lazy import Cache
from mobie.calibration.observer import BlockShape
from mobie.calibration.pooling import SAMPLE_ROWS, pool
from mobie.calibration.statistics import BlockStatistics, blend_with_pool
from mobie.calibration.store import ActivationStore, Memory
from mobie.methods.base import BankStats, LinearStats
from mobie.models.base import ARCHITECTURES, Adapter

MODEL_TYPES = sorted(ARCHITECTURES)
SEQUENCES, LENGTH, BATCH = 5, 11, 2  # three batches, the last with one sequence


@dataclass
class Seen:
    """What passed one block: inputs of its Linears and of its experts `(tokens, …)`, and the router's choice."""

    linears: dict[str, Tensor]
    hidden: Tensor | None = None
    top_k_index: Tensor | None = None

    def routed(self, expert: int) -> Tensor:
        """Tokens that go to an expert, ascending."""
        return (self.top_k_index == expert).any(1).nonzero().flatten()


def watch_plainly(model: nn.Module, adapter: Adapter, ids: Tensor) -> list[Seen]:
    """One forward of the library's eager model; nothing of the capture module takes part."""
    model.set_experts_implementation("eager")
    seen, handles = [], []
    for block in adapter.blocks(model):
        own = Seen({})
        seen.append(own)
        modules = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}

        def linear(_: nn.Module, args: tuple, own: Seen, name: str) -> None:
            own.linears[name] = args[0].flatten(0, -2).double()

        def experts(_: nn.Module, args: tuple, own: Seen) -> None:
            own.hidden, own.top_k_index = args[0].double(), args[1]

        for name, module in modules.items():
            handles.append(
                module.register_forward_pre_hook(lambda m, a, own=own, name=name, f=linear: f(m, a, own, name))
            )
        if adapter.experts_module(block) is not None:
            handles.append(
                adapter.experts_module(block).register_forward_pre_hook(lambda m, a, own=own, f=experts: f(m, a, own))
            )
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def observe_model(
    model: nn.Module, adapter: Adapter, ids: Tensor, *, all_experts: bool = False, router: bool = False
) -> list[BlockStatistics]:
    """The statistics of all blocks, gathered while batches pass the whole model."""
    blocks = adapter.blocks(model)
    batches = ids.split(BATCH)
    observers = []
    for block in blocks:
        groups = list(adapter.linear_groups(block))
        if router:
            groups.append({"mlp.gate": adapter.router(block)})
        shape = BlockShape(groups, adapter.experts_module(block), len(ids), ids.shape[1], len(batches))
        observers.append(BlockStatistics(shape, *kept(), everyone=all_experts))
    run_observed(model, batches, observers)
    return observers


def kept() -> tuple[ActivationStore, Cache]:
    """Room for an observer: plenty of memory, no files."""
    memory = Memory(1 << 30)
    return ActivationStore(Path(), "test", memory), Cache(memory)


@torch.no_grad()
def run_observed(model: nn.Module, batches: tuple[Tensor, ...], observers: list) -> None:
    model.set_experts_implementation("eager")
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching())
        for batch in batches:
            model(batch, use_cache=False)
            for observer in observers:
                observer.next_batch(batch.numel())


def inner_of(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    """Input of an expert's down projection in float64."""
    own = experts_by_hand(module)
    gate, up = (x @ own[name][expert].T + own[f"{name}_bias"][expert] for name in ("gate", "up"))
    return inner_by_hand(module, gate, up)


def hessian(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def mean_gram(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for q in range(sequences):
        rows = x[sequence == q]
        if len(rows):
            m = rows.mean(0)
            total += 2 / sequences * torch.outer(m, m)
    return total


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to float32 sums, relative to the largest entry."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5 * scale)


# ---- the observed experts function -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("length", [1, 7, 16, 33])
def test_observed_experts_give_the_librarys_eager_output_bit_for_bit(model_type: str, length: int) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    ids = random_tokens(3, length)
    model.set_experts_implementation("eager")
    experts = [adapter.experts_module(b) for b in adapter.blocks(model)]
    with torch.no_grad():
        expected = model(ids).logits
        with observe_experts({e: SilentObserver() for e in experts if e is not None}, model.config):
            observed = model(ids).logits
        after = model(ids).logits
    assert torch.equal(observed, expected)
    assert torch.equal(after, expected)


def test_observation_ends_with_the_context_even_after_an_error() -> None:
    model = make_model("olmoe")
    before = model.config._experts_implementation
    module = model.model.layers[0].mlp.experts
    with pytest.raises(RuntimeError, match="stop"), observe_experts({module: SilentObserver()}, model.config):
        raise RuntimeError("stop")
    assert model.config._experts_implementation == before
    assert not hasattr(module, "mobie_observer")


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_linear_statistics_equal_those_of_a_plain_forward(model_type: str) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    ids = random_tokens(SEQUENCES, LENGTH)
    sequence = torch.arange(ids.numel()) // LENGTH
    expected = watch_plainly(model, adapter, ids)
    for block, seen, observer in zip(adapter.blocks(model), expected, observe_model(model, adapter, ids), strict=True):
        stats = observer.linear_stats()
        assert set(stats) == {n for group in adapter.linear_groups(block) for n in group}
        for name, own in stats.items():
            x = seen.linears[name]
            assert own.tokens == ids.numel()
            close(own.hessian, hessian(x))
            close(own.mean_abs, x.abs().mean(0))
            close(own.mean_gram, mean_gram(x, sequence, SEQUENCES))
            assert_rows_of(own.sample, x)
            assert len(own.sample) == ids.numel()


def assert_rows_of(sample: Tensor, x: Tensor) -> None:
    distance = torch.cdist(sample.double(), x).min(1).values
    assert float(distance.max()) < 1e-4


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_expert_statistics_equal_those_of_a_plain_forward(model_type: str) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    ids = random_tokens(SEQUENCES, LENGTH)
    block, index = adapter.blocks(model)[1], 1
    seen = watch_plainly(model, adapter, ids)[index]
    stats = observe_model(model, adapter, ids)[index].bank_stats()
    module = adapter.experts_module(block)
    assert sum(s.tokens for s in stats.experts["gate"]) == ids.numel() * TOP_K
    rows, inner, owner = [], [], []
    for expert in range(EXPERTS):
        token = seen.routed(expert)
        x = seen.hidden[token]
        y = inner_of(module, x, expert)
        for name, inputs in (("gate", x), ("up", x), ("down", y)):
            own = stats.experts[name][expert]
            assert own.tokens == len(token)
            close(own.hessian, hessian(inputs))
            close(own.mean_abs, inputs.abs().mean(0))
            assert_rows_of(own.sample, inputs)
        rows.append(x)
        inner.append(y)
        owner.append(token // LENGTH)
    for name, parts in (("gate", rows), ("up", rows), ("down", inner)):
        union = torch.cat(parts)
        pooled = stats.pooled[name]
        assert pooled.tokens == len(union)
        close(pooled.hessian, hessian(union))
        close(pooled.mean_abs, union.abs().mean(0))
        close(pooled.mean_gram, mean_gram(union, torch.cat(owner), SEQUENCES))
        assert_rows_of(pooled.sample, union)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_all_experts_policy_shows_every_token_to_every_expert(model_type: str) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    ids = random_tokens(SEQUENCES, LENGTH)
    seen = watch_plainly(model, adapter, ids)[0]
    stats = observe_model(model, adapter, ids, all_experts=True)[0].bank_stats()
    module = adapter.experts_module(adapter.blocks(model)[0])
    for expert in range(EXPERTS):
        inner = inner_of(module, seen.hidden, expert)
        for name, x in (("gate", seen.hidden), ("up", seen.hidden), ("down", inner)):
            own = stats.experts[name][expert]
            assert own.tokens == ids.numel()
            close(own.hessian, hessian(x))
            close(own.mean_abs, x.abs().mean(0))


def test_router_is_watched_like_a_linear() -> None:
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    ids = random_tokens(SEQUENCES, LENGTH)
    seen = watch_plainly(model, adapter, ids)[0]
    stats = observe_model(model, adapter, ids, router=True)[0].linear_stats()["mlp.gate"]
    assert stats.tokens == ids.numel()
    close(stats.hessian, hessian(seen.hidden))


def test_sample_is_bounded_and_taken_from_every_batch() -> None:
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    ids = random_tokens(8, 90)
    seen = watch_plainly(model, adapter, ids)[0]
    sample = observe_model(model, adapter, ids)[0].linear_stats()["self_attn.q_proj"].sample
    assert len(sample) == SAMPLE_ROWS
    x = seen.linears["self_attn.q_proj"]
    per_batch = x.split(BATCH * 90)
    for i, rows in enumerate(sample.split(SAMPLE_ROWS // len(per_batch))):
        assert_rows_of(rows, per_batch[i])


# ---- pooling and blending --------------------------------------------------------------------------------------------


def test_pool_is_the_statistics_of_the_union_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 6, generator=generator) for n in (9, 1, 30)]
    pooled = pool([LinearStats.from_inputs(p) for p in parts] + [no_tokens(6)])
    union = torch.cat(parts).double()
    assert pooled.tokens == 40
    close(pooled.hessian, hessian(union))
    close(pooled.mean_abs, union.abs().mean(0))


def no_tokens(features: int) -> LinearStats:
    return LinearStats(torch.zeros(features, features), 0, torch.zeros(features), torch.zeros(0, features))


def test_blend_borrows_below_twice_the_width_and_leaves_the_others_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    width = 6

    def stats(n: int) -> LinearStats:
        if n == 0:
            return replace(no_tokens(width), guided=torch.zeros(2, width, width))
        weights = torch.rand(n, 2, generator=generator)
        return LinearStats.from_inputs(torch.randn(n, width, generator=generator), weights)

    experts = [stats(n) for n in (0, 1, 11, 12, 40)]
    pooled = replace(stats(64), mean_gram=torch.eye(width))
    blended, borrowed = blend_with_pool(BankStats({"gate": experts}, {"gate": pooled}))
    assert borrowed == {"gate": [0, 1, 2]}
    assert blended.experts["gate"][3] is experts[3]
    assert blended.experts["gate"][4] is experts[4]
    assert blended.pooled["gate"] is pooled
    for own, got, t in zip(experts, blended.experts["gate"], (0, 1 / 12, 11 / 12), strict=False):
        assert got.tokens == own.tokens  # as they are, before blending
        for field in ("hessian", "mean_abs", "guided"):
            a, b = getattr(own, field).double(), getattr(pooled, field).double()
            close(getattr(got, field), t * a + (1 - t) * b)
        assert torch.equal(got.sample[: own.tokens], own.sample)
        assert torch.equal(got.sample[own.tokens :], pooled.sample)


# ---- guided Hessians -------------------------------------------------------------------------------------------------


def random_token_weights(adapter: Adapter, block: nn.Module, seen: Seen, groups: int) -> TokenWeights:
    generator = torch.Generator().manual_seed(3)
    tokens = len(seen.hidden)
    names = [n for group in adapter.linear_groups(block) for n in group]
    return TokenWeights(
        {n: torch.rand(tokens, groups, generator=generator) for n in names},
        {n: torch.rand(tokens, TOP_K, groups, generator=generator) for n in ("gate", "up", "down")},
        seen.top_k_index.clone(),
    )


def brute_force(x: Tensor, weights: Tensor, n: int) -> Tensor:
    """`2/n Σ_t w_tg x_t x_tᵀ`, token by token."""
    total = torch.zeros(weights.shape[1], x.shape[1], x.shape[1], dtype=torch.float64)
    for row, w in zip(x, weights.double(), strict=True):
        total += 2 / n * w[:, None, None] * torch.outer(row, row)
    return total


@pytest.mark.parametrize("mismatched", [0, 4])
def test_guided_hessians_equal_sums_over_tokens(mismatched: int) -> None:
    groups = 3
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    ids = random_tokens(SEQUENCES, LENGTH)
    block = adapter.blocks(model)[0]
    seen = watch_plainly(model, adapter, ids)[0]
    weights = random_token_weights(adapter, block, seen, groups)
    # as if the gradient pass had sent these tokens' first slot to nobody: their pair has no gradient
    weights.top_k_index[5 : 5 + mismatched, 0] = -1
    batches = ids.split(BATCH)
    module = adapter.experts_module(block)
    shape = BlockShape(adapter.linear_groups(block), module, SEQUENCES, LENGTH, len(batches))
    guided = GuidedHessians(shape, weights, *kept())
    run_observed(model, batches, [guided])

    result = guided.result()
    assert result.unmatched == mismatched
    for name, got in result.linears.items():
        close(got, brute_force(seen.linears[name], weights.linears[name], ids.numel()))
    for name, per_expert in result.experts.items():
        pooled = result.pooled[name]
        union = torch.zeros_like(pooled, dtype=torch.float64)
        for expert in range(EXPERTS):
            token = seen.routed(expert)
            slot = (seen.top_k_index[token] == expert).int().argmax(1)
            w = weights.experts[name][token, slot].clone()
            w[(slot == 0) & (token >= 5) & (token < 5 + mismatched)] = 0
            x = seen.hidden[token]
            x = inner_of(module, x, expert) if name == "down" else x
            expected = brute_force(x, w, len(token))
            close(per_expert[expert], expected)
            union += expected * len(token)
        close(pooled, union / (ids.numel() * TOP_K))


def test_guided_hessian_of_unit_weights_is_the_hessian() -> None:
    model = make_model("qwen2_moe")
    adapter = Adapter("qwen2_moe")
    ids = random_tokens(SEQUENCES, LENGTH)
    block = adapter.blocks(model)[0]
    seen = watch_plainly(model, adapter, ids)[0]
    random = random_token_weights(adapter, block, seen, 1)
    ones = TokenWeights(
        {n: torch.ones_like(w) for n, w in random.linears.items()},
        {n: torch.ones_like(w) for n, w in random.experts.items()},
        random.top_k_index,
    )
    batches = ids.split(BATCH)
    shape = BlockShape(adapter.linear_groups(block), adapter.experts_module(block), SEQUENCES, LENGTH, len(batches))
    guided = GuidedHessians(shape, ones, *kept())
    run_observed(model, batches, [guided])
    statistics = observe_model(model, adapter, ids)[0]
    result = guided.result()
    for name, stats in statistics.linear_stats().items():
        close(result.linears[name][0], stats.hessian.double())
    bank = statistics.bank_stats()
    for name, per_expert in result.experts.items():
        close(result.pooled[name][0], bank.pooled[name].hessian.double())
        for got, stats in zip(per_expert, bank.experts[name], strict=True):
            close(got[0], stats.hessian.double())
