"""The decode runner against the library's generate and full forward; its graphs as recorded operations on the CPU."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from recorded_graph import RecordedGraph
from scipy import stats
from tiny import CONFIGS, VOCABULARY, make_model, random_tokens
from torch import Tensor, nn

from mobie.errors import ConfigError, DataError, MobieError, UnsupportedError
from mobie.kernels.backend import say_once
from mobie.runner import GREEDY, DecodeRunner, Sampling, Times
from mobie.runner import runner as runner_module
from mobie.runner.attention import GROUPED, register_attention
from mobie.runner.clock import HostClock
from mobie.runner.graph import capture_obstacle
from mobie.runner.sampling import choose_greedy, choose_sampled, uniforms

SEED = 5  # of weights with which greedy decoding does not settle on one token
PROMPT = 9
STEPS = 24
#: architectures that the runner serves at any context: not linear attention, nor windows beside full attention
SERVED = [model_type for model_type in CONFIGS if model_type not in ("qwen3_next", "gpt_oss")]
ALL_KINDS = [GREEDY, Sampling(1.0, seed=3), Sampling(0.8, 0.7, seed=3)]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def messages_come_again() -> None:
    """What is said once in a process is said once in a test."""
    say_once.cache_clear()


@lru_cache
def cached_model(model_type: str) -> nn.Module:
    """A model that no test changes."""
    return make_model(model_type, SEED)


def generated(model: nn.Module, tokens: Tensor, steps: int, **options: Any) -> Tensor:
    """What the library's `generate` adds to the prompts when it is greedy; without an end token unless one is given."""
    options = {"attention_mask": torch.ones_like(tokens), "eos_token_id": None} | options
    return model.generate(tokens, do_sample=False, max_new_tokens=steps, **options)[:, tokens.shape[1] :]


def started(model: nn.Module, tokens: Any, *, context: int = PROMPT + STEPS, **options: Any) -> DecodeRunner:
    """A runner that ignores end tokens, after its prefill."""
    chunk = options.pop("chunk", None)
    runner = DecodeRunner(model, batch=len(tokens), context=context, **({"eos": ()} | options))
    runner.prefill(tokens, chunk=chunk)
    return runner


# -- the same tokens and logits as the library


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model_type", SERVED)
def test_greedy_tokens_are_those_of_generate(model_type: str, batch: int) -> None:
    model, tokens = cached_model(model_type), random_tokens(batch, PROMPT)
    ours = started(model, tokens).decode(STEPS)
    assert torch.equal(ours, generated(model, tokens, STEPS))
    assert all(len(row.unique()) >= 4 for row in ours)  # else the comparison would show little


@pytest.mark.parametrize("model_type", SERVED)
def test_every_step_has_the_logits_of_a_full_forward(model_type: str) -> None:
    model, tokens = cached_model(model_type), random_tokens(3, PROMPT)
    runner = started(model, tokens)
    ours = [runner.logits]
    for _ in range(6):
        tokens = torch.cat([tokens, runner.decode(1)], dim=1)
        ours.append(runner.logits)
    with torch.no_grad():
        full = model(tokens).logits[:, PROMPT - 1 :]
    torch.testing.assert_close(torch.stack(ours, dim=1), full, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("model_type", SERVED)
def test_a_chunked_prefill_equals_one(model_type: str, chunk: int) -> None:
    model, tokens = cached_model(model_type), random_tokens(2, PROMPT)
    whole, chunked = started(model, tokens), started(model, tokens, chunk=chunk)
    torch.testing.assert_close(chunked.logits, whole.logits, **TOLERANCE)
    assert torch.equal(chunked.decode(8), whole.decode(8))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("model_type", SERVED)
def test_unequal_prompts_are_padded_on_the_left(model_type: str, chunk: int | None, attention: str) -> None:
    model = cached_model(model_type)
    if attention != "sdpa":
        model = make_model(model_type, SEED)
        model.set_attn_implementation(attention)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (2, 7, 9)]
    runner = started(model, prompts, chunk=chunk)
    together = runner.decode(10)
    for row, prompt in enumerate(prompts):
        alone = started(model, [prompt]).decode(10)
        assert torch.equal(together[row], alone[0])
    lengths = torch.tensor([[2], [7], [9]])
    mask = (torch.arange(9) >= 9 - lengths).long()
    padded = torch.stack([torch.tensor([0] * (9 - len(p)) + p) for p in prompts])
    assert torch.equal(together, generated(model, padded, 10, attention_mask=mask))


@pytest.mark.parametrize("model_type", SERVED)
def test_grouped_attention_is_the_library_s(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    model = make_model(model_type, SEED)
    heads = model.config.num_key_value_heads
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (4, PROMPT)]
    expected = started(model, prompts).decode(STEPS)
    plain = generated(model, random_tokens(2, PROMPT), 8)
    model.set_attn_implementation(GROUPED)
    seen, own = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append(key.shape[1])
        return own(query, key, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert torch.equal(started(model, prompts).decode(STEPS), expected)
    assert seen[-1] == heads  # no repeated keys in a decode step
    assert torch.equal(generated(model, random_tokens(2, PROMPT), 8), plain)


def test_sixteen_bits_and_eager_experts_are_served() -> None:
    model = make_model("qwen2_moe", SEED).to(torch.bfloat16)
    model.set_experts_implementation("eager")
    tokens = random_tokens(2, PROMPT)
    runner = started(model, tokens)
    ours = runner.decode(8)
    with torch.no_grad():
        full = model(torch.cat([tokens, ours], dim=1)).logits[:, -1].float()
    assert torch.nn.functional.cosine_similarity(runner.logits, full).min() > 0.999


def test_a_runner_can_be_filled_to_its_last_token() -> None:
    model, tokens = cached_model("olmoe"), random_tokens(2, PROMPT)
    runner = started(model, tokens, context=PROMPT + 4)
    assert torch.equal(runner.decode(4), generated(model, tokens, 4))
    with pytest.raises(DataError, match="decode at most 0, or make a DecodeRunner with context=14"):
        runner.decode(1)


def test_a_second_prefill_sees_nothing_of_the_first() -> None:
    model = cached_model("mixtral")
    runner = started(model, [[5] * 12, [7, 8]])
    runner.decode(10)
    tokens = random_tokens(2, 5, seed=1)
    logits = runner.prefill(tokens)
    fresh = started(model, tokens)
    torch.testing.assert_close(logits, fresh.logits, **TOLERANCE)
    assert torch.equal(runner.decode(12), fresh.decode(12))


@pytest.mark.parametrize("sampling", ALL_KINDS, ids=["greedy", "all", "nucleus"])
def test_decoding_in_pieces_equals_decoding_at_once(sampling: Sampling) -> None:
    model, tokens = cached_model("olmoe"), random_tokens(2, PROMPT)
    pieces = started(model, tokens)
    together = torch.cat([pieces.decode(n, sampling) for n in (1, 4, 7)], dim=1)
    assert torch.equal(together, started(model, tokens).decode(12, sampling))
    streamed = torch.stack([t.clone() for t in started(model, tokens).stream(12, sampling)], dim=1)
    assert torch.equal(together, streamed)


# -- graphs


@pytest.mark.parametrize("sampling", ALL_KINDS, ids=["greedy", "all", "nucleus"])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", SERVED)
def test_a_replayed_step_gives_the_same_tokens(model_type: str, experts: str, sampling: Sampling) -> None:
    model = cached_model(model_type)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (4, PROMPT)]
    before = model.config._experts_implementation
    model.set_experts_implementation(experts)
    try:
        graph = RecordedGraph()
        runner = started(model, prompts, capture=graph, context=PROMPT + 8)
        replayed, rest = runner.decode(5, sampling), runner.decode(3, sampling)
        called = started(model, prompts, context=PROMPT + 8).decode(8, sampling)
        assert torch.equal(torch.cat([replayed, rest], dim=1), called)
        assert (graph.captures, graph.replays) == (1, 8)
        runner.prefill(prompts[::-1])
        assert torch.equal(runner.decode(8, sampling), started(model, prompts[::-1]).decode(8, sampling))
        assert (graph.captures, graph.replays) == (1, 16)
    finally:
        model.set_experts_implementation(before)


def test_capturing_leaves_the_run_as_it_was_even_at_the_last_token() -> None:
    model, tokens = cached_model("olmoe"), random_tokens(2, PROMPT)
    expected = generated(model, tokens, 1)
    graph = RecordedGraph(warm_up_steps=5)
    # every warm-up step ends the first row
    runner = started(model, tokens, context=PROMPT + 1, capture=graph, eos=[expected[0, 0].item()], pad=0)
    assert expected[0, 0] != 0
    assert torch.equal(runner.decode(1), expected)
    assert runner.finished[0]


def test_router_logits_and_their_loss_are_not_computed() -> None:
    model, tokens = make_model("olmoe", SEED, output_router_logits=True), random_tokens(2, PROMPT)
    runner = started(model, tokens, capture=RecordedGraph(), graphs=True)
    assert torch.equal(runner.decode(8), generated(cached_model("olmoe"), tokens, 8))


def test_each_kind_of_sampling_has_its_graph() -> None:
    graph = RecordedGraph()
    runner = started(cached_model("olmoe"), random_tokens(1, PROMPT), capture=graph)
    for sampling in (GREEDY, Sampling(0.5), Sampling(2.0, seed=9), Sampling(1.0, 0.5), Sampling(1.0, 0.9), GREEDY):
        runner.decode(2, sampling)
    assert graph.captures == 3


def test_a_model_that_cannot_be_captured_is_decoded_step_by_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokens = make_model("olmoe", SEED), random_tokens(2, PROMPT)
    expected = generated(model, tokens, 8)
    model.set_experts_implementation("eager")
    assert torch.equal(started(model, tokens, capture=RecordedGraph()).decode(8), expected)
    started(model, tokens, capture=RecordedGraph())
    assert caplog.text.count("eager experts loop over the experts on the host") == 1
    with pytest.raises(UnsupportedError, match="grouped_mm"):
        started(model, tokens, capture=RecordedGraph(), graphs=True)
    # where it shows only when it is tried
    monkeypatch.setattr(runner_module, "capture_obstacle", lambda *_: None)
    caplog.clear()
    runner = started(model, tokens, capture=RecordedGraph(warm_up_steps=0))
    assert torch.equal(torch.cat([runner.decode(3), runner.decode(5)], dim=1), expected)
    assert caplog.text.count("the capture failed: operation not permitted when stream is capturing") == 1
    assert not runner.graphs
    with pytest.raises(UnsupportedError, match="use graphs=None"):
        started(model, tokens, capture=RecordedGraph(), graphs=True).decode(1)


def test_rotary_embeddings_that_look_at_the_host_are_no_graph() -> None:
    config = CONFIGS["olmoe"](rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    where = (torch.device("cpu"), torch.float32)
    assert "dynamic rotary" in capture_obstacle(config, *where)
    assert capture_obstacle(CONFIGS["olmoe"](), *where) is None


# -- sampling


def softmax64(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits.double() / temperature
    weights = (scaled - scaled.max()).exp()
    return weights / weights.sum()


def nucleus64(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Distribution over the nucleus, token by token."""
    probability = softmax64(logits, temperature).tolist()
    kept, total = [0.0] * len(probability), 0.0
    for token in sorted(range(len(probability)), key=lambda t: -probability[t]):
        if total >= top_p:
            break
        kept[token] = probability[token]
        total += probability[token]
    return torch.tensor(kept, dtype=torch.float64) / total


def draws(logits: Tensor, rows: int, temperature: float, top_p: float | None) -> Tensor:
    uniform = uniforms(11, rows, 1).T
    limit = None if top_p is None else torch.tensor(top_p, dtype=torch.float64)
    return choose_sampled(logits.expand(rows, -1), uniform, torch.tensor(temperature), limit)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.6, None), (2.5, None), (1.0, 0.75), (1.7, 0.9)])
def test_samples_follow_the_distribution(temperature: float, top_p: float | None) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, -3.0])
    expected = softmax64(logits, temperature) if top_p is None else nucleus64(logits, temperature, top_p)
    chosen = draws(logits, 4000, temperature, top_p)
    counts = torch.bincount(chosen, minlength=8).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() >= 3
    assert stats.chisquare(counts[possible].numpy(), 4000 * expected[possible].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.77, 0.999])
def test_the_nucleus_is_that_of_the_library(top_p: float) -> None:
    from transformers import TopPLogitsWarper

    logits = 2 * torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(4))
    kept = TopPLogitsWarper(top_p)(torch.zeros(20, 1), logits.clone()).isfinite()
    for row in range(20):
        ours = draws(logits[row], 500, 1.0, top_p)
        assert kept[row][ours].all()
        assert torch.equal(nucleus64(logits[row], 1.0, top_p) > 0, kept[row])  # the reference of these tests too


def test_the_inverse_distribution_function_is_exact_at_its_steps() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0]]).log()  # 1/4, 1/2, 1/4
    for uniform, token in ((1e-9, 0), (0.2499, 0), (0.2501, 1), (0.7499, 1), (0.7501, 2), (1 - 2**-33, 2)):
        chosen = choose_sampled(logits, torch.tensor([[uniform]], dtype=torch.float64), torch.ones(()), None)
        assert chosen.tolist() == [token]


def test_the_tail_of_a_large_vocabulary_is_not_lost_to_rounding() -> None:
    logits = torch.full((20, 1001), -20.0)  # the tail's tokens have 2e-9 each, below the rounding of sums near 1
    logits[:, 0] = 0
    tail = math.exp(-20) / (1 + 1000 * math.exp(-20))
    index = torch.arange(5, 1000, 50, dtype=torch.float64)
    uniform = 1 - (1000 - index + 0.5) * tail
    chosen = choose_sampled(logits, uniform[:, None], torch.ones(()), None)
    assert (chosen - index).abs().max() <= 1


def test_tokens_without_probability_are_never_chosen() -> None:
    logits = torch.full((2, 6), -math.inf)
    logits[:, 3] = 0
    extremes = torch.tensor([[2.0**-33], [1 - 2.0**-33]], dtype=torch.float64)
    for top_p in (None, torch.tensor(0.5, dtype=torch.float64)):
        assert choose_sampled(logits, extremes, torch.ones(()), top_p).tolist() == [3, 3]
    assert choose_greedy(logits).tolist() == [3, 3]


def test_a_small_temperature_is_greedy() -> None:
    model, tokens = cached_model("olmoe"), random_tokens(2, PROMPT)
    assert torch.equal(started(model, tokens).decode(12, Sampling(1e-4)), started(model, tokens).decode(12))


def test_uniform_numbers_are_of_seed_and_row_only() -> None:
    few, many = uniforms(7, 2, 5), uniforms(7, 3, 900)
    assert torch.equal(few, many[:5, :2])
    assert many.min() > 0 and many.max() < 1
    assert stats.kstest(many.flatten().numpy(), "uniform").pvalue > 1e-3
    assert len(many.unique()) > 2690
    assert not torch.equal(few, uniforms(8, 2, 5))


def test_equal_seeds_give_equal_runs_and_rows_do_not_meet() -> None:
    model = cached_model("qwen3_moe")
    same = random_tokens(1, PROMPT).expand(3, -1)
    first, again = (started(model, same).decode(STEPS, Sampling(1.0, 0.95, seed=2)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, started(model, same).decode(STEPS, Sampling(1.0, 0.95, seed=3)))
    assert len({tuple(row.tolist()) for row in first}) == 3  # equal prompts, own draws
    alone = started(model, same[:1]).decode(STEPS, Sampling(1.0, 0.95, seed=2))
    assert torch.equal(alone[0], first[0])


def test_the_runner_samples_from_its_logits() -> None:
    rows = 1000
    runner = started(cached_model("olmoe"), random_tokens(1, 4).expand(rows, -1), context=5)
    expected = rows * nucleus64(runner.logits[0], 1.5, 0.8)
    counts = torch.bincount(runner.decode(1, Sampling(1.5, 0.8, seed=1))[:, 0], minlength=VOCABULARY)
    likely = expected >= 5  # the chi-square test needs some of each
    pooled = [(counts[likely].double(), expected[likely]), (counts[~likely].sum()[None], expected[~likely].sum()[None])]
    observed, wanted = (torch.cat(part) for part in zip(*pooled, strict=True))
    assert stats.chisquare(observed[wanted > 0].numpy(), wanted[wanted > 0].numpy()).pvalue > 1e-3
    assert counts[expected == 0].sum() == 0


# -- the end of a row


def test_ended_rows_emit_padding_as_in_generate() -> None:
    model, tokens = cached_model("deepseek_v2"), random_tokens(3, PROMPT)
    free = generated(model, tokens, STEPS)
    eos = [free[0, 3].item(), free[1, 8].item(), free[2, 5].item()]
    expected = generated(model, tokens, STEPS, eos_token_id=eos, pad_token_id=0)
    assert expected.shape[1] < STEPS  # all rows end early, and not together
    runner = started(model, tokens, eos=eos, pad=0)
    stopped = runner.decode(STEPS, stop=True)
    assert torch.equal(stopped, expected)
    assert runner.finished.all()
    assert runner.decode(1, stop=True).shape == (3, 0)  # nothing but padding is left
    runner.prefill(tokens)
    assert not runner.finished.any()
    whole = runner.decode(STEPS)
    assert torch.equal(whole[:, : expected.shape[1]], expected)
    assert whole.shape[1] == STEPS and not whole[:, expected.shape[1] :].any()


def test_stopping_in_a_later_call_cuts_after_the_last_end() -> None:
    model, tokens = cached_model("deepseek_v2"), random_tokens(2, PROMPT)
    free = generated(model, tokens, STEPS)
    eos = [free[0, 1].item(), free[1, 9].item()]
    expected = generated(model, tokens, STEPS, eos_token_id=eos, pad_token_id=0)
    runner = started(model, tokens, eos=eos, pad=0)
    pieces = [runner.decode(4, stop=True), runner.decode(STEPS - 4, stop=True)]
    assert torch.equal(torch.cat(pieces, dim=1), expected)


def test_end_tokens_come_from_the_generation_settings() -> None:
    model, tokens = make_model("deepseek_v2", SEED), random_tokens(2, PROMPT)
    free = generated(model, tokens, STEPS)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = free[1, 6].item(), 2
    ours = started(model, tokens, eos=None).decode(STEPS, stop=True)
    assert torch.equal(ours, model.generate(tokens, do_sample=False, max_new_tokens=STEPS)[:, PROMPT:])
    assert ours[1, -1] == 2 or ours.shape[1] < STEPS


# -- times, memory, progress


def test_times_are_of_the_last_prefill_and_its_steps() -> None:
    runner = started(cached_model("olmoe"), random_tokens(2, PROMPT))
    runner.decode(3)
    runner.decode(4)
    times = runner.times
    assert len(times.step_seconds) == 7 and min(times.step_seconds) > 0
    assert times.prefill_seconds > 0 and times.prompt_tokens == PROMPT
    runner.prefill(random_tokens(2, 4))
    assert runner.times.step_seconds == () and runner.times.prompt_tokens == 4
    assert runner.times.tokens_per_second == 0


def test_rates_count_the_tokens_of_all_rows() -> None:
    times = Times(batch=4, prompt_tokens=10, prefill_seconds=1.0, step_seconds=(0.25, 0.5, 0.25))
    assert times.decode_seconds == 1.0
    assert times.tokens_per_second == 12
    assert times.tokens_per_second_with_prefill == 6


def test_memory_is_counted() -> None:
    runner = DecodeRunner(cached_model("olmoe"), batch=3, context=20)
    assert runner.cache_bytes == 0
    runner.prefill(random_tokens(3, 4))
    layers, heads, slots, head_size = 2, 2, 32, 8
    assert runner.cache_bytes == 2 * layers * 3 * heads * slots * head_size * 4
    assert runner.peak_memory_bytes > 50_000_000  # this process has loaded PyTorch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_tokens_per_second_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = started(cached_model("olmoe"), random_tokens(2, PROMPT))
    for screen, progress, shown in ((Terminal(), True, True), (io.StringIO(), True, False), (Terminal(), False, False)):
        monkeypatch.setattr("sys.stderr", screen)
        runner.decode(6, progress=progress)
        assert ("tok/s" in screen.getvalue()) == shown
    assert "12/12" not in screen.getvalue()


def test_progress_waits_for_the_steps_that_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for = []
    monkeypatch.setattr(HostClock, "wait", lambda self: waited_for.append(len(self.intervals())))
    monkeypatch.setattr("sys.stderr", Terminal())
    runner = started(cached_model("olmoe"), random_tokens(2, PROMPT))
    runner.decode(2)
    assert waited_for == []
    runner.decode(18, progress=True)
    assert waited_for == [8, 16, 18]


# -- torch.compile


def test_a_step_can_be_traced_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **o: compiler(function, backend="eager", **o))
    model, tokens = cached_model("olmoe"), random_tokens(2, PROMPT)
    runner = started(model, tokens, compile=True)
    assert torch.equal(runner.decode(6), generated(model, tokens, 6))
    assert runner._decode_logits != runner._logits  # it did not fall back


def test_a_compiler_that_fails_is_left_out_with_one_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_function: Any, **_options: Any) -> Any:
        def fail(*_: Any) -> Tensor:
            raise NotImplementedError("no compiler for this operation\nmore lines")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    model, tokens = cached_model("olmoe"), random_tokens(2, PROMPT)
    runner = started(model, tokens, compile=True)
    assert torch.equal(torch.cat([runner.decode(3), runner.decode(3)], dim=1), generated(model, tokens, 6))
    assert [record.getMessage() for record in caplog.records] == [
        "decoding without torch.compile, which failed: no compiler for this operation"
    ]


# -- bad input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[2, 3], [4, 5], [6, 7]], "3 prompts, but the runner's cache has 2 rows; make a DecodeRunner with batch=3"),
        ([[2, 3]], "1 prompts, .* batch=1"),
        ([[2, 3], []], "prompt 1 is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), "prompt 0 is empty"),
        (torch.zeros(2, 21, dtype=torch.int64), "prompt of 21 tokens exceeds the context of 20"),
        ([[2, 3], [4, VOCABULARY]], "prompt 1: token id 48 is no whole number in 0 … 47"),
        ([[2, 3], [4, -1]], "token id -1"),
        (torch.zeros(2, 3), "token id 0.0 is no whole number"),
        ([2, 3], "flat list"),
        (torch.zeros(4, dtype=torch.int64), r"shape \(4,\), expected \(batch, length\)"),
    ],
)
def test_wrong_prompts_are_refused(prompts: Any, message: str) -> None:
    runner = DecodeRunner(cached_model("olmoe"), batch=2, context=20)
    with pytest.raises(DataError, match=message):
        runner.prefill(prompts)
    with pytest.raises(DataError, match="decode before prefill"):
        runner.decode(1)


def test_a_prefill_that_failed_leaves_nothing_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("olmoe", SEED)
    runner = started(model, random_tokens(1, PROMPT))

    def out_of_memory(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(model, "forward", out_of_memory)
        runner.prefill(random_tokens(1, PROMPT))
    with pytest.raises(DataError, match="decode before prefill"):
        runner.decode(1)


def test_wrong_steps_and_chunks_are_refused() -> None:
    runner = started(cached_model("olmoe"), random_tokens(1, PROMPT), context=20)
    with pytest.raises(DataError, match="9 tokens and 12 more exceed the context of 20; decode at most 11"):
        runner.decode(12)
    with pytest.raises(DataError, match="0 decode steps"):
        runner.decode(0)
    with pytest.raises(DataError, match="chunk of 0 tokens"):
        runner.prefill(random_tokens(1, PROMPT), chunk=0)
    with pytest.raises(DataError, match="times before prefill"):
        _ = DecodeRunner(cached_model("olmoe"), batch=1, context=20).times


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1)]
)
def test_wrong_sampling_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} {value}, expected"):
        Sampling(**{name: value})


def _training() -> nn.Module:
    return make_model("olmoe").train()


def _without_values() -> nn.Module:
    return make_model("olmoe").to("meta")


def _on_two_devices() -> nn.Module:
    model = make_model("olmoe")
    model.lm_head.to("meta")
    return model


def _windowed() -> nn.Module:
    return make_model("mixtral", sliding_window=16)


def _layered_windows() -> nn.Module:
    return make_model("qwen2_moe", use_sliding_window=True, sliding_window=16, max_window_layers=2)


def _linear_attention() -> nn.Module:
    return make_model("qwen3_next")


def _flexible() -> nn.Module:
    model = make_model("olmoe")
    model.config._attn_implementation = "flex_attention"
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_training, {}, "training mode; call model.eval"),
        (_without_values, {}, "load its weights first"),
        (_on_two_devices, {}, "without values"),
        (_windowed, {}, "context 20 exceeds the attention window of 16"),
        (_layered_windows, {}, "context 20 exceeds the attention window of 16"),
        (lambda: make_model("gpt_oss"), {}, "context 20 exceeds the attention window of 4"),
        (_linear_attention, {}, "layers of kind linear_attention: the runner knows attention layers only"),
        (_flexible, {}, "'flex_attention', expected one of sdpa, eager"),
        (lambda: cached_model("olmoe"), {"context": 129}, "context 129 exceeds the model's 128 positions"),
        (lambda: cached_model("olmoe"), {"batch": 0}, "batch 0"),
        (lambda: cached_model("olmoe"), {"graphs": True}, "the model is on cpu; move it with model.to"),
    ],
)
def test_models_that_cannot_be_run_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        DecodeRunner(make(), **({"batch": 1, "context": 20} | options))


def test_attention_with_sinks_is_not_computed_without_them() -> None:
    register_attention()
    model = make_model("gpt_oss", sliding_window=64)
    model.set_attn_implementation(GROUPED)
    with pytest.raises(UnsupportedError, match="attention with sinks as 'mobie-grouped'.*'eager'"):
        started(model, random_tokens(2, PROMPT))


def test_a_window_as_long_as_the_context_is_full_attention() -> None:
    for model in (_windowed(), _layered_windows(), make_model("gpt_oss", sliding_window=16)):
        tokens = random_tokens(2, 6)
        ours = started(model, tokens, context=16).decode(10)
        assert torch.equal(ours, generated(model, tokens, 10))


def test_a_model_that_was_moved_is_refused() -> None:
    model = make_model("olmoe")
    runner = DecodeRunner(model, batch=1, context=20)
    model.to("meta")
    with pytest.raises(MobieError, match="load its weights first"):
        runner.prefill([[1, 2]])


# -- experts of this project


def test_dense_and_packed_experts_use_the_same_runner(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mobie.hf.modules import pack_model
    from mobie.kernels.attach import attach, attach_dense
    from mobie.methods.mobie import MoBiE
    from mobie.models.base import Adapter
    from mobie.speed.random_weights import RandomTensors, random_block

    monkeypatch.setenv("MOBIE_KERNELS", "torch")
    model, tokens = make_model("olmoe", SEED), random_tokens(2, PROMPT)
    attach_dense(model)
    runner = started(model, tokens, capture=RecordedGraph())
    assert "torch twins" in caplog.text and not runner.graphs
    assert torch.equal(runner.decode(8), generated(cached_model("olmoe"), tokens, 8))

    packed, adapter = make_model("olmoe", SEED), Adapter("olmoe")
    tensors = RandomTensors("cpu", 0)
    pack_model(packed, adapter, [random_block(adapter, b, MoBiE(), tensors) for b in adapter.blocks(packed)])
    attach(packed, compute="unpack")
    expected = generated(packed, tokens, 8)
    attach(packed, compute="kernels")
    assert packed.config._experts_implementation == "mobie"
    assert torch.equal(started(packed, tokens).decode(8), expected)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", ALL_KINDS, ids=["greedy", "all", "nucleus"])
@pytest.mark.parametrize("model_type", SERVED)
def test_a_cuda_graph_gives_the_tokens_of_plain_steps(model_type: str, sampling: Sampling, dtype: torch.dtype) -> None:
    model = make_model(model_type, SEED).to("cuda", dtype)
    model.set_experts_implementation("batched_mm")  # grouped_mm needs rows of 16 bytes, which these experts have not
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (4, PROMPT)]
    plain = started(model, prompts, graphs=False).decode(STEPS, sampling)
    runner = started(model, prompts, graphs=True)
    assert torch.equal(torch.cat([runner.decode(1, sampling), runner.decode(STEPS - 1, sampling)], dim=1), plain)
    runner.prefill(prompts)
    assert torch.equal(runner.decode(STEPS, sampling), plain)
    assert len(runner.times.step_seconds) == STEPS and min(runner.times.step_seconds) > 0
    assert runner.peak_memory_bytes > runner.cache_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", ALL_KINDS, ids=["greedy", "all", "nucleus"])
@pytest.mark.parametrize("model_type", SERVED)
def test_a_step_never_waits_for_the_device(model_type: str, sampling: Sampling) -> None:
    model = make_model(model_type, SEED).to("cuda")
    model.set_experts_implementation("batched_mm")
    runner = started(model, random_tokens(2, PROMPT), graphs=False)
    step = runner._ready_step(sampling)
    runner._prepare(sampling)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_failed_cuda_capture_leaves_a_usable_runner(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner_module, "capture_obstacle", lambda *_: None)
    model, tokens = make_model("olmoe", SEED).to("cuda"), random_tokens(2, PROMPT)
    model.set_experts_implementation("eager")
    plain = started(model, tokens, graphs=False).decode(STEPS)
    assert torch.equal(started(model, tokens).decode(STEPS), plain)
    assert "the capture failed" in caplog.text


@pytest.mark.gpu
def test_a_compiled_step_can_be_captured() -> None:
    model, tokens = make_model("olmoe", SEED).to("cuda"), random_tokens(2, PROMPT)
    model.set_experts_implementation("batched_mm")
    compiled = started(model, tokens, compile=True)
    assert torch.equal(compiled.decode(STEPS), started(model, tokens, graphs=False).decode(STEPS))
