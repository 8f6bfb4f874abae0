"""Self-sampled calibration text: the search against all sequences enumerated and the library's own beam search, uses of
experts against the library's router logits, and what a killed run leaves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, EXPERTS, TOP_K, VOCABULARY, make_model, random_tokens, tokenizer
from torch import Tensor

from mobie.calibration import self_sampling
from mobie.calibration.self_sampling import Batches, Beginnings, Search, Vocabulary, beginnings, self_sample
from mobie.calibration.tokens import SelfSampledOrigin, TokensOrigin, load_tokens, save_tokens
from mobie.calibration.usage import RouteWatch, expert_imbalance, read_text
from mobie.cli import main
from mobie.config import Calibration
from mobie.data.self_sampled import EBSS, SELF_SAMPLED, SelfSampling
from mobie.data.texts import TEXTS
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.jobs import needs
from mobie.jobs.ebss import ordinary_keys
from mobie.jobs.keys import Keys
from mobie.models.base import Adapter
from mobie.paths import PACKAGE, Layout
from mobie.plan.graph import Graph

MODEL_TYPES = sorted(CONFIGS)
SMALL = 5  # tokens of a vocabulary whose sequences are enumerated
WORDS = Vocabulary(SMALL, tuple(range(SMALL)), ())
PLAIN = SelfSampling(prefix=(1, 1), beams=3)


@cache
def model_of(model_type: str, vocabulary: int = VOCABULARY, seed: int = 0) -> Any:
    return make_model(model_type, seed, vocab_size=vocabulary)


def write(model: Any, begin: Beginnings, length: int, settings: SelfSampling, folder: Path, **how: Any) -> Tensor:
    vocabulary = how.pop("vocabulary", None) or Vocabulary.of(model, tokenizer())
    adapter = Adapter(model.config.model_type)
    return self_sample(model, adapter, vocabulary, begin, length, settings, Batches(folder, "f"), **how)


def starts(*first: int, lengths: int = 1) -> Beginnings:
    return Beginnings(torch.tensor(first), torch.full((len(first),), lengths))


def router_uses(model: Any, tokens: Tensor) -> Tensor:
    """Uses `(layers, experts)` counted from the library's own router logits, as its top k."""
    with torch.no_grad():
        logits = model.base_model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    chosen = [z.flatten(0, -2).topk(TOP_K).indices for z in logits]
    return torch.stack([one.flatten().bincount(minlength=EXPERTS) for one in chosen])


# --- the score and the search -----------------------------------------------------------------------------------------


def scores_by_hand(model: Any, sequences: list[tuple[int, ...]], settings: SelfSampling) -> list[float]:
    """Equation 13 of whole sequences: σ is that of all tokens but the last."""
    ids = torch.tensor(sequences)
    tokens = ids.shape[1] - 1
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.double().log_softmax(dim=-1)
        base = model.base_model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
    layers = [z.view(len(ids), tokens, EXPERTS).topk(TOP_K).indices for z in base.router_logits]
    found = []
    for index, sequence in enumerate(sequences):
        score = -sum(log_p[index, i, sequence[i + 1]].item() for i in range(tokens)) / len(sequence)
        for layer in layers if settings.tau is not None else ():
            used = layer[index].flatten().tolist()
            shares = [used.count(expert) / tokens for expert in range(EXPERTS)]
            mean = sum(shares) / EXPERTS
            sigma = math.sqrt(sum((share - mean) ** 2 for share in shares) / (EXPERTS - 1))
            score += sigma / len(layers) / settings.tau
        found.append(score)
    return found


@pytest.mark.parametrize("tau", [None, 1.2, 0.02])
def test_a_beam_that_is_wide_enough_finds_the_best_of_all_sequences(tau: float | None, tmp_path: Path) -> None:
    """Among 5 tokens, 4 places and 125 beams nothing is pruned before the last step."""
    model, settings = model_of("olmoe", SMALL), dataclasses.replace(PLAIN, beams=SMALL**3, tau=tau)
    found = write(model, starts(2, 4), 4, settings, tmp_path, vocabulary=WORDS)
    for first, row in zip((2, 4), found.tolist(), strict=True):
        every = [(first, *rest) for rest in itertools.product(range(SMALL), repeat=3)]
        scores = scores_by_hand(model, every, settings)
        assert tuple(row) == every[scores.index(min(scores))]


def test_balance_changes_what_is_written_and_a_small_tau_makes_it_more_balanced(tmp_path: Path) -> None:
    model = model_of("olmoe")
    sigma = {}
    for tau in (None, 1.2, 0.02):
        settings = dataclasses.replace(PLAIN, beams=8, tau=tau)
        rows = write(model, starts(*range(2, 14)), 10, settings, tmp_path / str(tau))
        each = [expert_imbalance(read_text(model, Adapter("olmoe"), row[None, :-1]).uses, 9).item() for row in rows]
        sigma[tau] = sum(each) / len(each)
    assert sigma[0.02] < 0.9 * sigma[None]
    assert sigma[0.02] < sigma[1.2] <= sigma[None]


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_likelihood_alone_is_the_librarys_beam_search(model_type: str, tmp_path: Path) -> None:
    model, width, length = model_of(model_type), 4, 10
    settings = SelfSampling(tau=None, beams=width, prefix=(1, 1), ends="banned")
    begin = starts(5, 17, 30)
    banned = Vocabulary.of(model, tokenizer()).banned(settings).nonzero().flatten().tolist()
    got = write(model, begin, length, settings, tmp_path)
    for first, row in zip(begin.first, got, strict=True):
        expected = model.generate(
            first[None, None],
            num_beams=width,
            do_sample=False,
            max_new_tokens=length - 1,
            suppress_tokens=banned,
            eos_token_id=None,
            pad_token_id=0,
            attention_mask=torch.ones(1, 1, dtype=torch.int64),
        )
        assert row.tolist() == expected[0].tolist()


def test_one_step_worked_by_hand() -> None:
    """Two beams of two tokens; eq. 13 gives 2.0, 2.5 and 1.8, 2.8 (twice), so the second beam's first token wins."""
    settings = SelfSampling(tau=0.5, beams=2, prefix=(1, 1))
    search = Search(torch.tensor([0]), torch.tensor([1]), torch.zeros(3, dtype=torch.bool), 3, settings)
    search.tokens[0, :, 1] = torch.tensor([1, 2])
    search.likelihood, search.written = torch.tensor([[-3.0, -2.0]], dtype=torch.float64), 2
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    sigma = torch.tensor([0.3, 0.1], dtype=torch.float64)
    scores = [
        [(3.0 - math.log(0.5)) / 3 + 0.6, (3.0 - math.log(0.3)) / 3 + 0.6],
        [(2.0 - math.log(0.8)) / 3 + 0.2, (2.0 - math.log(0.1)) / 3 + 0.2],
    ]
    assert scores[1][0] < scores[1][1] < min(scores[0])
    parents = search.extend(p.log(), sigma)
    assert parents.tolist() == [1, 1]
    assert search.tokens[0, 0].tolist() == [0, 2, 2] and search.tokens[0, 1, :2].tolist() == [0, 2]
    assert -search.likelihood[0, 0].item() / 3 + 0.2 == pytest.approx(scores[1][0], rel=1e-6)


def test_the_beginning_goes_on_with_the_likeliest_token_up_to_its_length(tmp_path: Path) -> None:
    model, settings = model_of("olmoe"), dataclasses.replace(PLAIN, tau=0.02, beams=4)
    begin = Beginnings(torch.tensor([3, 9, 20]), torch.tensor([6, 1, 8]))
    rows = write(model, begin, 8, settings, tmp_path)
    banned = Vocabulary.of(model, tokenizer()).banned(settings)
    for first, length, row in zip(begin.first, begin.lengths.tolist(), rows, strict=True):
        greedy = [int(first)]
        while len(greedy) < length:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([greedy])).logits[0, -1]
            greedy.append(int(logits.masked_fill(banned, float("-inf")).argmax()))
        assert row[:length].tolist() == greedy


@pytest.mark.parametrize("ends", ["kept", "banned"])
def test_special_tokens_are_not_written_and_an_end_only_where_it_may(ends: Any, tmp_path: Path) -> None:
    model = model_of("olmoe")
    with torch.no_grad():
        bias = torch.zeros(VOCABULARY)
        bias[:2] = 50.0  # padding and the end of text are what the model likes best
        handle = model.lm_head.register_forward_hook(lambda _, args, output: output + bias)
    settings = dataclasses.replace(PLAIN, ends=ends)
    rows = write(model, starts(5, 6), 8, settings, tmp_path)[:, 1:]
    handle.remove()
    assert not (rows == 0).any()
    assert (rows == 1).any() == (ends == "kept")


# --- uses of experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_writes_and_its_uses_are_those_of_a_plain_reading(model_type: str, tmp_path: Path) -> None:
    """The search counts uses step by step, with a cache and changing beams; the reading counts them in one pass."""
    model, adapter, length = model_of(model_type), Adapter(model_type), 9
    settings = SelfSampling(beams=3, cached=2 * 3 * length, prefix=(2, 3))
    begin = beginnings(Vocabulary.of(model, tokenizer()), 3, settings, seed=1)
    batches = Batches(tmp_path, "f")
    tokens = self_sample(model, adapter, Vocabulary.of(model, tokenizer()), begin, length, settings, batches)
    assert tokens.shape == (3, length) and tokens[:, 0].tolist() == begin.first.tolist()
    read = read_text(model, adapter, tokens[:, :-1])
    counted = sum(batches.load(index)[1] for index in (0, 1))
    assert torch.equal(counted, read.uses)
    assert read.layers == [i for i, b in enumerate(adapter.blocks(model)) if adapter.experts_module(b) is not None]
    assert (read.uses.sum(dim=-1) == TOP_K * 3 * (length - 1)).all()


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "qwen2_moe", "gpt_oss"])
def test_uses_are_those_of_the_librarys_router_logits(model_type: str) -> None:
    model, tokens = model_of(model_type), random_tokens(5, 12)
    read = read_text(model, Adapter(model_type), tokens)
    assert torch.equal(read.uses, router_uses(model, tokens))
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert read.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_a_model_without_experts_is_refused() -> None:
    model = make_model("qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(UnsupportedError, match="dense block"):
        RouteWatch(Adapter("qwen3_moe"), model)


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(1, 60))
def test_imbalance_is_equations_3_and_4(uses: list[list[int]], tokens: int) -> None:
    counted = torch.tensor(uses)
    by_hand = []
    for layer in uses:
        shares = [use / tokens for use in layer]
        mean = sum(shares) / 3
        by_hand.append(math.sqrt(sum((share - mean) ** 2 for share in shares) / 2))
    assert expert_imbalance(counted, tokens).item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-12)
    if counted.sum(dim=-1).min() > 0:  # shares of uses sum to 1: the same but for the scale of each layer
        scaled = [value * tokens / sum(layer) for value, layer in zip(by_hand, uses, strict=True)]
        assert expert_imbalance(counted, tokens, "share").item() == pytest.approx(sum(scaled) / len(scaled), abs=1e-9)


def test_balance_of_the_set_looks_at_the_batches_before(tmp_path: Path) -> None:
    model, begin = model_of("olmoe"), starts(*range(2, 10))
    settings = dataclasses.replace(PLAIN, tau=0.02, beams=6, cached=2 * 6 * 10)
    alone = write(model, begin, 10, settings, tmp_path / "sequence")
    together = write(model, begin, 10, dataclasses.replace(settings, scope="set"), tmp_path / "set")
    assert torch.equal(alone[:2], together[:2])  # nothing is before the first batch
    assert not torch.equal(alone, together)
    sigma = [
        expert_imbalance(read_text(model, Adapter("olmoe"), rows).uses, rows.numel()).item()
        for rows in (alone, together)
    ]
    assert sigma[1] < sigma[0]


# --- beginnings, settings and errors ----------------------------------------------------------------------------------


@given(st.integers(1, 46), st.integers(0, 5))
def test_every_sequence_begins_with_another_ordinary_token(sequences: int, seed: int) -> None:
    vocabulary = Vocabulary(VOCABULARY, tuple(range(2, VOCABULARY)), (1,))
    settings = SelfSampling()
    begin = beginnings(vocabulary, sequences, settings, seed)
    assert len(set(begin.first.tolist())) == sequences and begin.first.min() >= 2
    assert ((begin.lengths >= 3) & (begin.lengths <= 6)).all()
    again = beginnings(vocabulary, sequences, settings, seed)
    assert torch.equal(begin.first, again.first) and torch.equal(begin.lengths, again.lengths)


def test_too_small_a_vocabulary_no_sequence_and_too_long_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 self-sampled sequences .* has 5 .* use 5"):
        beginnings(WORDS, 6, PLAIN, 0)
    with pytest.raises(ConfigError, match="got 0 self-sampled sequences"):
        beginnings(WORDS, 0, PLAIN, 0)
    for length in (0, 129):
        with pytest.raises(ConfigError, match=f"sequences of {length} tokens, expected 1 to 128"):
            write(model_of("olmoe"), starts(2), length, PLAIN, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({"tau": 0.0}, {"tau": -1.0}, {"tau": math.inf}, {"beams": 0}, {"cached": 0}, {"prefix": (0, 3)}),
        *({"prefix": (5, 3)}, {"frequency": "tokens"}, {"scope": "all"}, {"ends": "no"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=f"{name}: got .*expected"):
        SelfSampling(**change)


def test_the_defaults_are_the_papers_and_names_are_no_texts() -> None:
    assert (SELF_SAMPLED[EBSS].tau, SELF_SAMPLED[EBSS].beams) == (1.2, 4)
    assert len(set(SELF_SAMPLED.values())) == len(SELF_SAMPLED)
    assert [SELF_SAMPLED[EBSS].batch(length) for length in (256, 2048, 10**6)] == [32, 4, 1]
    assert not set(SELF_SAMPLED) & set(TEXTS)


def test_a_beam_of_one_token_and_a_sequence_of_one_token_work(tmp_path: Path) -> None:
    model = model_of("olmoe", SMALL)
    one = write(model, starts(3), 6, dataclasses.replace(PLAIN, beams=1), tmp_path / "greedy", vocabulary=WORDS)
    greedy = model.generate(torch.tensor([[3]]), do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert one.tolist() == greedy.tolist()
    assert write(model, starts(3, 1), 1, PLAIN, tmp_path / "first", vocabulary=WORDS).tolist() == [[3], [1]]


# --- files and runs that stop -----------------------------------------------------------------------------------------


def test_batches_of_another_job_and_damaged_ones_are_made_anew(tmp_path: Path) -> None:
    model, begin, pairs = model_of("olmoe"), starts(2, 3, 4, 5), dataclasses.replace(PLAIN, cached=2 * 3 * 6)
    expected = write(model, begin, 6, pairs, tmp_path)
    batches = Batches(tmp_path, "f")
    assert batches.load(0) is not None and batches.load(2) is None
    assert Batches(tmp_path, "other").load(0) is None
    whole = (tmp_path / "00001.safetensors").read_bytes()
    (tmp_path / "00001.safetensors").write_bytes(whole[:-3] + b"abc")
    (tmp_path / "00000.safetensors").write_bytes(whole)  # another batch of the same job
    assert batches.load(0) is None and batches.load(1) is None
    assert torch.equal(write(model, begin, 6, pairs, tmp_path), expected)
    assert (tmp_path / "00001.safetensors").read_bytes() == whole


@pytest.mark.parametrize("scope", ["sequence", "set"])
def test_a_run_that_stops_goes_on_with_the_next_batch(
    scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, begin, settings = model_of("olmoe"), starts(*range(2, 10)), dataclasses.replace(PLAIN, scope=scope)
    settings = dataclasses.replace(settings, cached=2 * 3 * 8)
    expected = write(model, begin, 8, settings, tmp_path / "whole")
    real, calls = self_sampling.write_batch, []

    def counted(*args: Any, **how: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(self_sampling, "write_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        write(model, begin, 8, settings, tmp_path / "stopped")
    again = write(model, begin, 8, settings, tmp_path / "stopped")
    assert len(calls) == 3 + 2  # the third again, and the fourth
    assert torch.equal(again, expected)


def test_origins_of_both_kinds_come_back(tmp_path: Path) -> None:
    own = SelfSampledOrigin("ebss", "m", "t", 3, "float32", "cpu", {"tau": 1.2, "prefix": [3, 6]})
    for origin in (own, TokensOrigin("wiki", "a", "b", 0)):
        path = tmp_path / f"{origin.text}.safetensors"
        save_tokens(path, torch.arange(6).view(2, 3), origin)
        tokens, found = load_tokens(path)
        assert found == origin and tokens.tolist() == [[0, 1, 2], [3, 4, 5]]


# --- the jobs ---------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def quantized(repository: Layout) -> Layout:
    """A repository with the embedded model's checkpoint in full precision and four short ordinary sequences."""
    path = repository.config_file("models", "nano-olmoe")
    text = path.read_text()
    path.write_text(text.replace("sequences: 128", "sequences: 6").replace("length: 256", "length: 12"))
    assert path.read_text() != text
    keys = Keys(repository, "smoke", "nano-olmoe", 0, "fp16")
    save_tokens(keys.calibration, torch.randint(1, 4096, (6, 12)), TokensOrigin("wiki-calibration", "a", "b", 0))
    result = run("quantize", "--method", "fp16")
    assert result.exit_code == 0, result.output
    return repository


def test_the_jobs_write_tokens_and_a_record_that_follows_from_them(quantized: Layout) -> None:
    keys = Keys(quantized, "smoke", "nano-olmoe", 0, "fp16+calibration.text=ebss")
    assert run("self-sample").exit_code == 0
    assert not quantized.calibration_parts("smoke", "nano-olmoe", "ebss", 6, 12, 0).exists()
    tokens, origin = load_tokens(keys.calibration)
    assert tokens.shape == (6, 12) and tokens.max() < 4096
    assert origin.text == "ebss" and origin.settings == {**dataclasses.asdict(SelfSampling()), "prefix": [3, 6]}
    before = keys.calibration.read_bytes()
    keys.calibration.unlink()
    assert run("self-sample").exit_code == 0 and keys.calibration.read_bytes() == before
    result = run("expert-usage", "--method", keys.method)
    assert result.exit_code == 0, result.output
    record = json.loads(keys.record("expert_usage").read_text())
    values = {m["name"]: m["value"] for m in record["measurements"]}
    for side in ("own", "ordinary"):
        uses = torch.tensor(record["details"][side]["uses"])
        assert uses.shape == (4, 16) and (uses.sum(dim=-1) == 4 * 72).all()
        assert values[f"{side}.imbalance"] == pytest.approx(expert_imbalance(uses, 72).item())
        layers = [values[f"layer{layer}.{side}.imbalance"] for layer in range(4)]
        assert values[f"{side}.imbalance"] == pytest.approx(sum(layers) / 4)
    assert values["own.perplexity"] < values["ordinary.perplexity"]
    assert record["details"]["texts"] == {"own": "ebss", "ordinary": "wiki-calibration"}
    assert run("quantize", "--method", "rtn-w3+calibration.text=ebss").exit_code == 0


def test_a_killed_run_ends_with_the_same_bytes(quantized: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed for good after the first of two batches, and started again."""
    monkeypatch.setitem(SELF_SAMPLED, EBSS, SelfSampling(cached=768))
    code = (
        "import os, signal\n"
        "from mobie.data.self_sampled import SELF_SAMPLED, SelfSampling\n"
        "SELF_SAMPLED['ebss'] = SelfSampling(cached=768)\n"
        "from mobie.calibration.self_sampling import Batches\n"
        "from mobie.cli import main\n"
        "real = Batches.save\n"
        "def save(self, index, *parts):\n"
        "    real(self, index, *parts)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Batches.save = save\n"
        "main(['self-sample', '--sequences', '20'])\n"
    )
    keys = Keys(quantized, "smoke", "nano-olmoe", 0)
    path = keys.calibration_file(Calibration(text="ebss", sequences=20, length=12))
    assert run("self-sample", "--sequences", "20").exit_code == 0
    whole = path.read_bytes()
    path.unlink()
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not path.exists()
    parts = quantized.calibration_parts("smoke", "nano-olmoe", "ebss", 20, 12, 0)
    assert [part.name for part in parts.iterdir()] == ["00000.safetensors"]
    assert run("self-sample", "--sequences", "20").exit_code == 0
    assert path.read_bytes() == whole and not parts.exists()


def test_mistakes_are_one_message(repository: Layout) -> None:
    for arguments, message in (
        (("self-sample", "--text", "ebs"), "did you mean ebss"),
        (("calibrate", "--text", "ebss"), "python -m mobie self-sample --text ebss"),
        (("self-sample",), "quantize.json"),
        (("expert-usage", "--method", "fp16+calibration.text=ebss"), "no such calibration set"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output, result.output


def test_the_model_that_writes_cannot_be_calibrated_on_what_it_writes(repository: Layout) -> None:
    path = repository.config_file("methods", "fp16")
    path.write_text(path.read_text() + "calibration: {text: ebss}\n")
    with pytest.raises(ConfigError, match="would have to write first"):
        ordinary_keys(Keys(repository, "smoke", "nano-olmoe", 0, "gptq-w2"))


def test_an_unusable_full_precision_checkpoint_is_told(quantized: Layout) -> None:
    from mobie.records import read_record, write_record

    path = quantized.record("smoke", "nano-olmoe", "fp16", 0, "quantize")
    write_record(path, dataclasses.replace(read_record(path), status="oom", reason="no memory", measurements=()))
    result = run("self-sample")
    assert result.exit_code == 2 and "no memory" in result.output
    with pytest.raises(DataError, match="no such calibration set"):
        load_tokens(Keys(quantized, "smoke", "nano-olmoe", 0, "fp16+calibration.text=ebss").calibration)


@pytest.mark.parametrize("suite", ["smoke", "paper"])
def test_the_plan_writes_a_text_once_and_reads_the_others(repository: Layout, suite: str) -> None:
    model = "nano-olmoe" if suite == "smoke" else "olmoe-1b-7b"
    methods = ("gptq-w2+calibration.text=ebss", "gptq-w3+calibration.text=ebss", "gptq-w3+calibration.text=ebss-set")
    records = [Keys(repository, suite, model, 1, method).record("quantize") for method in methods]
    records.append(Keys(repository, suite, model, 1, methods[0]).record("expert_usage"))
    targets = [path.relative_to(repository.root).as_posix() for path in records]
    jobs = [job.rule.name for job in Graph(repository, suite).jobs(targets)]
    # of the ordinary text: for the checkpoint that writes, which is the suite's, not the seed's
    assert {name: jobs.count(name) for name in ("self_sample", "calibrate", "quantize", "expert_usage")} == {
        "self_sample": 2,
        "calibrate": 1,
        "quantize": 4,
        "expert_usage": 1,
    }


def test_the_two_rules_share_the_names_of_texts_out() -> None:
    import re

    read, written = re.compile(rf"(?!{needs.WRITTEN}-n)[^/]+-n4"), re.compile(f"{needs.WRITTEN}-n4")
    for name in TEXTS:
        assert read.fullmatch(f"{name}-n4") and not written.fullmatch(f"{name}-n4")
    for name in SELF_SAMPLED:
        assert written.fullmatch(f"{name}-n4") and not read.fullmatch(f"{name}-n4")
