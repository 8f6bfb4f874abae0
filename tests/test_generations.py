"""Greedy continuations against a loop without a cache, and the repetition measure by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, make_model, tokenizer

from mobie.config import read_yaml
from mobie.errors import ConfigError
from mobie.paths import PACKAGE
from mobie.scoring.generations import (
    GenerationsProtocol,
    Prompt,
    generations,
    greedy,
    read_prompts,
    repetition,
    stop_tokens,
)

PROMPTS = [Prompt(model="A", prompt="w3 w7 w11"), Prompt(model="B", prompt="w40 w2")]
PROTOCOL = GenerationsProtocol(max_new_tokens=10)


def argmax_loop(model: Any, ids: list[int], steps: int, stops: set[int]) -> list[int]:
    """The whole sequence is read anew for every token."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) - start < steps and (len(ids) == start or ids[-1] not in stops):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("name", CONFIGS)
def test_continuations_are_those_of_an_argmax_loop(name: str) -> None:
    model = make_model(name)
    measurements, samples = generations(model, tokenizer(), PROMPTS, PROTOCOL)
    assert [(s.id, s.model, s.prompt) for s in samples] == [("prompt-1", "A", "w3 w7 w11"), ("prompt-2", "B", "w40 w2")]
    for sample in samples:
        ids = tokenizer()(sample.prompt)["input_ids"]
        expected = argmax_loop(model, ids, 10, {1})
        assert sample.finished == (expected[-1] == 1)
        expected = [token for token in expected if token != 1]
        assert sample.text == tokenizer().decode(expected, skip_special_tokens=True)
        assert sample.tokens == len(expected)
    tokens = next(m for m in measurements if m.name == "tokens")
    assert tokens.value == np.mean([s.tokens for s in samples]) and tokens.n == 2
    assert (measurements, samples) == generations(model, tokenizer(), PROMPTS, PROTOCOL)


def test_a_stop_token_ends_a_continuation_and_is_not_in_it() -> None:
    model = make_model("olmoe")
    free = argmax_loop(model, tokenizer()("w3 w7 w11")["input_ids"], 10, {1})
    stop = free[4]
    end = free.index(stop)
    model.generation_config.eos_token_id = [1, stop]
    assert stop_tokens(model, tokenizer()) == {1, stop}
    _, (sample,) = generations(model, tokenizer(), PROMPTS[:1], PROTOCOL)
    assert sample.finished and sample.tokens == end and f"w{stop}" not in sample.text.split()
    _, (short,) = generations(model, tokenizer(), PROMPTS[:1], GenerationsProtocol(max_new_tokens=1))
    assert short.tokens == 1 and not short.finished and short.repetition is None


def test_sampling_settings_of_a_model_are_not_followed() -> None:
    model = make_model("olmoe")
    expected = generations(model, tokenizer(), PROMPTS, PROTOCOL)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 9.0
    assert generations(model, tokenizer(), PROMPTS, PROTOCOL) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_without_such_settings_the_librarys_generate_agrees(name: str) -> None:
    model, ids = make_model(name), torch.tensor([[3, 7, 11]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert greedy(model, [3, 7, 11], 20, frozenset({1})) == expected[0, 3:].tolist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0),
        ([7] * 13, 9 / 10),
        ([1, 2] * 4, 3 / 5),  # 1212 and 2121, then 1212, 2121, 1212 again
        (list(range(20)), 0),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_repetition_by_hand(tokens: list[int], expected: float | None) -> None:
    assert repetition(tokens) == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.integers(0, 2), min_size=4, max_size=40))
def test_repetition_counts_4_grams_that_occurred_before(tokens: list[int]) -> None:
    grams = [tokens[i : i + 4] for i in range(len(tokens) - 3)]
    again = sum(gram in grams[:index] for index, gram in enumerate(grams))
    assert repetition(tokens) == pytest.approx(again / len(grams))


def test_the_mean_repetition_leaves_out_what_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = iter([[5] * 8, [6, 7, 1], [2, 3, 4, 5, 6]])
    monkeypatch.setattr("mobie.scoring.generations.greedy", lambda *_: next(outputs))
    prompts = [*PROMPTS, PROMPTS[0]]
    measurements, samples = generations(make_model("olmoe"), tokenizer(), prompts, PROTOCOL)
    assert [(s.tokens, s.finished, s.repetition) for s in samples] == [(8, False, 0.8), (2, True, None), (5, False, 0)]
    repeated, tokens = measurements
    assert (repeated.name, repeated.value, repeated.n) == ("repetition", 0.4, 2)
    assert repeated.stderr == pytest.approx(np.std([0.8, 0], ddof=1) / math.sqrt(2))
    assert (tokens.value, tokens.n) == (5, 3) and tokens.stderr == pytest.approx(
        np.std([8, 2, 5], ddof=1) / math.sqrt(3)
    )


def test_a_prompt_that_exceeds_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt-1: . tokens and 126 new ones exceed the model's context of 128; use"):
        generations(make_model("olmoe"), tokenizer(), PROMPTS, GenerationsProtocol(max_new_tokens=126))
    with pytest.raises(ConfigError, match="float32, the protocol says bfloat16"):
        generations(make_model("olmoe"), tokenizer(), PROMPTS, GenerationsProtocol(dtype="bfloat16"))


def test_the_papers_prompts_are_read_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    raw = read_yaml(PACKAGE / "paper" / "prompts.yaml")["prompts"]
    assert [p.model_dump() for p in read_prompts()] == raw and len(raw) == 4
    path = tmp_path / "prompts.yaml"
    for text in ("[]", "prompts: 3", "prompts: [{model: a}]", "methods: []"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no prompts"):
            read_prompts(path)
