"""The embedded models: their training text holds nothing that is evaluated, recipes train, records are true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobie.config import config_names, load_model_config
from mobie.nano.corpus import (
    NGRAM_WORDS,
    SHORTEST_ITEM_WORDS,
    TRAIN_FORMATS,
    Corpus,
    Overlap,
    build_corpus,
    evaluated_items,
    words,
)
from mobie.nano.train import RECIPES, Recipe, batch, heldout_perplexity, make_optimizers, orthogonalize, pack, train
from mobie.paths import embedded_model
from mobie.provenance import file_hash
from mobie.sources import CHECKSUMS

TINY = Recipe(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=8,
    layers=2,
    heads=2,
    experts=4,
    top_k=2,
    sequence_length=16,
    batch_sequences=4,
    steps=6,
    warmup_steps=2,
)
TINY_SHARED = replace(TINY, architecture="qwen2_moe", shared_intermediate_size=12)
#: highest held-out perplexity with which a model is shipped; the second one saw two thirds of the tokens
USABLE = {"nano-olmoe": 30, "nano-qwen2-moe": 35}
SENTENCES = [f"The number {i} comes after {i - 1}, and before {i + 1}; nobody knows why." for i in range(1, 120)]
TINY_CORPUS = Corpus(SENTENCES[:100], SENTENCES[100:], {}, 0)


@pytest.fixture(scope="session")
def corpus(train_wheel: Path, eval_wheel: Path) -> Corpus:
    return build_corpus(train_wheel, eval_wheel)


def windows(document: str, length: int) -> set[str]:
    """Every run of `length` words, as text."""
    found = words(document)
    return {" ".join(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_no_evaluated_item_occurs_in_the_training_text(corpus: Corpus, eval_wheel: Path) -> None:
    # An item that occurs in a document brings its middle 13 words along (a shorter item: all of its words).
    probes: dict[int, dict[str, str]] = {}
    for task, item in evaluated_items(eval_wheel):
        found = words(item)
        length = min(len(found), NGRAM_WORDS)
        if length >= SHORTEST_ITEM_WORDS:
            start = (len(found) - length) // 2
            probes.setdefault(length, {})[" ".join(found[start : start + length])] = task
    assert sum(map(len, probes.values())) > 20_000
    for length, items in probes.items():
        for document in corpus.train:
            leaked = windows(document, length) & items.keys()
            assert not leaked, (leaked, document)


def test_every_training_task_is_there_and_leaks_were_dropped(corpus: Corpus) -> None:
    assert corpus.dropped.keys() == TRAIN_FORMATS.keys()
    assert corpus.dropped["boolq"] > 0  # several questions share one passage across the splits
    assert not set(corpus.train) & set(corpus.heldout)
    assert len(corpus.heldout) > 1000


def test_overlap_finds_a_shared_run_and_a_short_item() -> None:
    long_item = " ".join(f"w{i}" for i in range(20))
    overlap = Overlap([("a", long_item), ("b", "Which planet is the largest?"), ("c", "too short")])
    assert overlap.found_in("before " + " ".join(f"W{i}," for i in range(4, 17)) + " after")
    assert not overlap.found_in(" ".join(f"w{i}" for i in range(4, 16)))  # 12 words
    assert overlap.found_in("He asked: which planet is the LARGEST, and left.")
    assert not overlap.found_in("Which planet is large? too short")


def test_orthogonalize_evens_out_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 24, 40, generator=generator)
    for update in (stack, stack.mT):
        values = torch.linalg.svdvals(orthogonalize(update))
        assert values.min() > 0.6 and values.max() < 1.3  # the quintic's known range
    one = torch.randn(24, 40, generator=generator)
    u, _, vh = torch.linalg.svd(one, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(orthogonalize(one).flatten(), (u @ vh).flatten(), dim=0)
    assert cosine > 0.97


def test_learning_rate_warms_up_rests_and_falls_to_zero() -> None:
    recipe = replace(TINY, steps=100, warmup_steps=10, decay_fraction=0.5)
    scales = [recipe.lr_scale(step) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:51] == [1.0] * 42
    assert scales[75] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(0.02)


def test_an_epoch_shows_every_window_once() -> None:
    stream = np.arange(16 * 9 + 1, dtype=np.uint16)
    per_epoch = 8 // TINY.batch_sequences
    rows = torch.cat([batch(stream, TINY, step) for step in range(per_epoch)])
    assert rows.shape == (8, 17)
    starts = rows[:, 0]
    assert len(set(starts.tolist())) == 8
    assert len(set((starts % 16).tolist())) == 1  # one offset
    assert torch.equal(rows, starts[:, None] + torch.arange(17))


@pytest.mark.parametrize("recipe", [TINY, TINY_SHARED], ids=lambda recipe: recipe.architecture)
def test_every_weight_has_one_optimiser_and_muon_those_of_matrices(recipe: Recipe) -> None:
    model = AutoModelForCausalLM.from_config(recipe.model_config(0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adam = (
        [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        for optimizer in make_optimizers(model, recipe)
    )
    assert sorted(muon + adam) == sorted(names.values())
    inside = ("self_attn.", "mlp.experts.", "mlp.shared_expert.")
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and any(part in name for part in inside)
        assert (name in muon) == matrix, name
    assert any("shared_expert_gate" in name for name in adam) == (recipe is TINY_SHARED)


@pytest.mark.parametrize("recipe", [TINY, TINY_SHARED], ids=lambda recipe: recipe.architecture)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    torch.set_num_threads(1)
    whole = train(TINY_CORPUS, tmp_path / "whole", recipe, checkpoint_every=2)

    from mobie.nano.train import Run

    original = Run.train_step

    def interrupted(self: Run, tokens: torch.Tensor) -> float:
        if self.step == 3:
            raise KeyboardInterrupt
        return original(self, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(TINY_CORPUS, tmp_path / "resumed", recipe, checkpoint_every=2)
    resumed = train(TINY_CORPUS, tmp_path / "resumed", recipe, checkpoint_every=2)
    assert resumed["heldout_perplexity"] == whole["heldout_perplexity"]
    assert resumed["curve"][-1]["loss"] == whole["curve"][-1]["loss"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_every_embedded_model_has_a_recipe() -> None:
    embedded = [name for name in config_names("models") if load_model_config(name).source == "embedded"]
    assert embedded == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_files_are_those_that_their_checksums_name(name: str) -> None:
    folder = embedded_model(name)
    listed = dict(reversed(line.split("  ")) for line in (folder / CHECKSUMS).read_text().splitlines())
    assert listed == {path.name: file_hash(path) for path in folder.iterdir() if path.name != CHECKSUMS}
    size = (folder / "model.safetensors").stat().st_size
    assert 0 <= size - load_model_config(name).bytes < 2**16  # the header


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_model_is_what_its_record_says(corpus: Corpus, name: str) -> None:
    folder = embedded_model(name)
    record = json.loads((folder / "training.json").read_text())
    recipe = Recipe(**record["recipe"])
    assert recipe == RECIPES[name]  # the recipe in the repository is the one that made the weights
    assert record["train_tokens_seen"] == recipe.steps * recipe.batch_sequences * recipe.sequence_length
    assert record["curve"][-1]["step"] == recipe.steps
    assert record["documents"] == {"train": len(corpus.train), "heldout": len(corpus.heldout)}
    assert record["dropped"] == corpus.dropped
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.model_type == recipe.architecture
    wanted = AutoModelForCausalLM.from_config(recipe.model_config(tokenizer.eos_token_id))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == load_model_config(name).parameters
    stream = pack(corpus.heldout, tokenizer, recipe.seed)
    assert len(stream) == record["heldout_tokens"]
    measured = heldout_perplexity(model, stream, recipe.sequence_length, None)
    assert measured == pytest.approx(record["heldout_perplexity"], rel=1e-4)
    assert measured <= USABLE[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
