"""Programs that a model wrote: judged as evalplus judges them, and held where they can hurt nothing.

What needs Apptainer and containers/code.sif is skipped where they are not; the rest runs everywhere.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile_programs import BENIGN, HARMLESS, NAMES, PROBLEM, lay_bait
from hypothesis import given
from hypothesis import strategies as st

from mobie.errors import DataError, UnsupportedError
from mobie.paths import PACKAGE, Layout
from mobie.sandbox import Limits, Runtime, Sample, Verdict, find_runtime, run_samples
from mobie.sandbox.driver import decode, encode
from mobie.sandbox.judge import verdict
from mobie.sandbox.process import run_limited
from mobie.sandbox.runtime import Container, Plain, Reply

REPOSITORY = Layout(PACKAGE.parent)
SMALL = Limits(seconds=20.0, memory_mb=768)


def problem(entry_point: str, solution: str, base: list[Any], plus: list[Any], atol: float = 0) -> dict[str, Any]:
    """A row in evalplus's form; the prompt is the function's first line."""
    prompt, body = solution.split("\n", 1)
    return {
        "task_id": f"Own/{entry_point}",
        "prompt": f"{prompt}\n",
        "canonical_solution": body,
        "entry_point": entry_point,
        "base_input": base,
        "plus_input": plus,
        "contract": "",
        "atol": atol,
    }


ADD = problem("add", BENIGN, [[1, 2], [3, 4]], [[-1, 1], [10**30, 1]])
MEAN = problem("mean", "def mean(xs):\n    return sum(xs) / len(xs)\n", [[[1, 2]]], [[[0.1, 0.2, 0.4]]], 1e-6)
PAIRS = problem("pairs", "def pairs(xs):\n    return set(zip(xs, xs[1:]))\n", [[(1, 2, 3)]], [[(4, 5)], [()]])
#: too many numbers to carry into the container of every sample
MANY = problem("many", "def many(n):\n    return list(range(n))\n", [[3]], [[1_100_000]])
#: evalplus compares this function's outputs as sets
COMMON = problem(
    "similar_elements", "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n", [[(1, 2), (2, 1)]], []
)
#: data set, problem, program, (base, plus)
JUDGED = [
    ("humaneval", ADD, BENIGN, ("pass", "pass")),
    ("humaneval", ADD, "def add(a, b):\n    return a - b\n", ("fail", "fail")),
    ("humaneval", ADD, "def add(a, b):\n    return abs(a) + b\n", ("pass", "fail")),
    ("humaneval", ADD, "def sub(a, b):\n    return a - b\n", ("fail", "fail")),
    ("humaneval", ADD, "def add(a, b):\n    import os\n    os._exit(0)\n", ("timeout", "timeout")),
    ("humaneval", MEAN, "def mean(xs):\n    return sum(xs) / len(xs) + 1e-9\n", ("pass", "pass")),
    ("humaneval", MEAN, "def mean(xs):\n    return sum(xs) / len(xs) + 1e-3\n", ("fail", "fail")),
    ("humaneval", MANY, "def many(n):\n    return [*range(n)]\n", ("pass", "pass")),
    ("humaneval", MANY, "def many(n):\n    return list(range(min(n, 1_099_999)))\n", ("pass", "fail")),
    ("mbpp", PAIRS, "def pairs(xs):\n    return {(a, b) for a, b in zip(xs, xs[1:])}\n", ("pass", "pass")),
    ("mbpp", PAIRS, "def pairs(xs):\n    return list(zip(xs, xs[1:]))\n", ("fail", "fail")),
    ("mbpp", COMMON, "def similar_elements(a, b):\n    return [x for x in b if x in a]\n", ("pass", None)),
]


@pytest.fixture(scope="session")
def container() -> Runtime:
    """The real container, where there is one."""
    try:
        return find_runtime(unsandboxed=False, layout=REPOSITORY)
    except UnsupportedError as error:
        pytest.skip(f"no container here: {error}")


@pytest.fixture(scope="session")
def plain() -> Runtime:
    pytest.importorskip("evalplus")
    return find_runtime(unsandboxed=True, layout=REPOSITORY)


def judged(runtime: Runtime, dataset: str) -> dict[str, tuple[str | None, str | None]]:
    """Verdicts on the programs of JUDGED, by program."""
    chosen = [(row, program) for name, row, program, _ in JUDGED if name == dataset]
    problems = {row["task_id"]: row for row, _ in chosen}
    samples = [Sample(row["task_id"], index, program) for index, (row, program) in enumerate(chosen)]
    verdicts = run_samples(problems, samples, Limits(), runtime, dataset, workers=2)
    assert [v.index for v in verdicts] == list(range(len(chosen)))
    return {sample.solution: (v.base, v.plus) for sample, v in zip(samples, verdicts, strict=True)}


def by_evalplus(dataset: str, row: dict[str, Any], program: str) -> tuple[str | None, str | None]:
    """The verdicts of evalplus itself, run here."""
    from evalplus.eval import untrusted_check
    from evalplus.gen.util import trusted_exec

    found: list[str | None] = []
    for tests in ("base_input", "plus_input"):
        solution = row["prompt"] + row["canonical_solution"]
        expected, seconds = trusted_exec(solution, row[tests], row["entry_point"], record_time=True)
        arguments = (dataset, program, row[tests], row["entry_point"], expected, row["atol"], seconds)
        found.append(untrusted_check(*arguments, fast_check=True)[0] if row[tests] else None)
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["container", "plain"])
@pytest.mark.parametrize("dataset", ["humaneval", "mbpp"])
def test_verdicts_are_those_of_evalplus(kind: str, dataset: str, request: pytest.FixtureRequest) -> None:
    """Canonical, equivalent and broken programs, tuples and sets, a tolerance, one of evalplus's own comparisons."""
    found = judged(request.getfixturevalue(kind), dataset)
    assert found == {program: expected for name, _, program, expected in JUDGED if name == dataset}


def test_evalplus_itself_says_the_same() -> None:
    pytest.importorskip("evalplus")
    for dataset, row, program, expected in JUDGED:
        assert by_evalplus(dataset, row, program) == expected, program


def hostile(runtime: Runtime, programs: Mapping[str, str], limits: Limits = SMALL) -> dict[str, Verdict]:
    """Verdicts on programs by name, in one run, with a right program before, among and after them."""
    named = [("benign", BENIGN)]
    for name, program in programs.items():
        named += [(name, program), *([("benign", BENIGN)] if len(named) % 12 == 0 else [])]
    named += [("benign", BENIGN)]
    samples = [Sample(PROBLEM["task_id"], index, program) for index, (_, program) in enumerate(named)]
    verdicts = run_samples({PROBLEM["task_id"]: PROBLEM}, samples, limits, runtime, "humaneval", workers=4)
    for (name, _), found in zip(named, verdicts, strict=True):
        assert name != "benign" or found.base == "pass", found
    return {name: found for (name, _), found in zip(named, verdicts, strict=True)}


@pytest.fixture(scope="module")
def attacked(
    container: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Verdict], list[str], float]:
    """Every hostile program run once in the container: verdicts, harm done to this machine, seconds."""
    folder = tmp_path_factory.mktemp("bait")
    folder.chmod(0o777)  # anyone who gets here could write
    began = time.monotonic()
    with lay_bait(folder) as bait:
        verdicts = hostile(container, bait.programs())
        harm = bait.harm()
    return verdicts, harm, time.monotonic() - began


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_program_is_a_failed_sample(name: str, attacked: tuple[dict[str, Verdict], list[str], float]) -> None:
    """It would pass if its attack had worked."""
    verdicts, _, _ = attacked
    assert verdicts[name].base in ("fail", "timeout", "killed"), verdicts[name]
    assert verdicts[name].detail


def test_hostile_programs_leave_nothing(attacked: tuple[dict[str, Verdict], list[str], float]) -> None:
    """No file, no connection, no process; none ran longer than its limit allows."""
    _, harm, seconds = attacked
    assert harm == []
    assert [child.name() for child in psutil.Process().children(recursive=True) if "apptainer" in child.name()] == []
    assert seconds < 300


def test_limits_hold_for_all_processes_together(container: Runtime, tmp_path: Path) -> None:
    """And the verdict says which was passed. Ten calls, so that evalplus itself would wait twelve seconds."""
    row = PROBLEM | {"base_input": PROBLEM["base_input"] * 10}
    expected = {
        "fill the temporary folder": ("killed", "base: over the limit of 64 file_mb"),
        "memory hog in many processes": ("killed", "base: over the limit of 768 memory_mb"),
        "stop the parent": ("timeout", "base: over the limit of 10.0 seconds"),
    }
    with lay_bait(tmp_path) as bait:
        samples = [Sample(row["task_id"], index, bait.programs()[name]) for index, name in enumerate(expected)]
    limits = Limits(seconds=10.0, memory_mb=768)
    verdicts = run_samples({row["task_id"]: row}, samples, limits, container, "humaneval", workers=3)
    assert [(found.base, found.detail) for found in verdicts] == list(expected.values())


@pytest.mark.parametrize("name", ["read outside", "write outside", "open a socket", "connect to the host"])
def test_the_attacks_work_where_nothing_holds_them(name: str, plain: Runtime, tmp_path: Path) -> None:
    """So a verdict of the container that is not `pass` means something; and the record says that nothing held them."""
    with lay_bait(tmp_path) as bait:
        assert hostile(plain, {name: bait.programs()[name]})[name].base == "pass"
        assert bool(bait.harm()) == (name in ("write outside", "connect to the host"))
    assert plain.describe()["kind"] == "none"


def test_unsandboxed_limits(plain: Runtime, tmp_path: Path) -> None:
    """Without a container limits still end what does not end, and nothing is left of it."""
    before = set(psutil.pids())
    with lay_bait(tmp_path) as bait:
        programs = bait.programs()
        verdicts = hostile(plain, {name: programs[name] for name in HARMLESS})
    assert {name: found.base for name, found in verdicts.items() if found.base == "pass"} == {"benign": "pass"}
    left = [process for process in psutil.process_iter(["pid", "ppid"]) if process.info["ppid"] == os.getpid()]
    assert [process.pid for process in left if process.pid not in before] == []


def test_unsandboxed_time_limit(plain: Runtime) -> None:
    """The sample's own seconds, where evalplus would wait longer."""
    program = "import time\ntime.sleep(1000)\n"
    began = time.monotonic()
    assert hostile(plain, {"sleeps": program}, Limits(seconds=1.5))["sleeps"].base == "timeout"
    assert time.monotonic() - began < 60


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(st.integers() | st.tuples(st.text(), st.booleans()), max_size=3)
        | st.frozensets(st.integers(), max_size=3)
        | st.dictionaries(st.text(), st.integers()).map(Counter)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


def typed(value: Any) -> Any:
    """A value with the types of all that is in it, for comparing; sets have no order, and nan equals nothing."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(typed, value))
    if isinstance(value, (list, tuple)):
        return kind, tuple(map(typed, value))
    return kind, repr(value)


@given(VALUES)
def test_values_cross_the_border_with_their_types(value: object) -> None:
    assert typed(decode(json.loads(json.dumps(encode(value))))) == typed(value)


def test_integers_of_any_length_cross_the_border() -> None:
    """Python refuses to write more than 4300 digits; some problems have them."""
    assert decode(json.loads(json.dumps(encode([3**20000, -(3**20000)])))) == [3**20000, -(3**20000)]


def test_values_without_a_form_are_refused() -> None:
    with pytest.raises(TypeError, match="a value of type object; expected numbers"):
        encode([object()])
    with pytest.raises(ValueError, match="unknown type 'code'"):
        decode({"code": "import os"})


def test_without_apptainer_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing and the remedy: the program, the image, or a container that starts."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UnsupportedError, match="run only in a container: apptainer .*containers/get-apptainer.*unsandboxed"
    ):
        find_runtime(unsandboxed=False, layout=Layout(tmp_path))
    fake_apptainer(tmp_path, "import sys; sys.exit('FATAL: no user namespaces')")
    with pytest.raises(UnsupportedError, match="code.sif is not there; build it with `containers/build code`"):
        find_runtime(unsandboxed=False, layout=Layout(tmp_path))
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / "code.sif").touch()
    with pytest.raises(
        UnsupportedError, match="none starts from .*\n.*FATAL: no user namespaces\n.*cannot be unpacked"
    ):
        find_runtime(unsandboxed=False, layout=Layout(tmp_path))


def fake_apptainer(folder: Path, program: str) -> Path:
    """A stand-in that is a Python program."""
    path = folder / "apptainer"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("own_user", [True, False])
def test_arguments_of_a_container(own_user: bool) -> None:
    """Nothing of the host is bound or passed, whatever else is asked for."""
    command = Container("apptainer", Path("code.sif"), own_user, True, {}).command(Limits(memory_mb=1000, processes=4))
    image = command.index("code.sif")
    options, inside = command[:image], command[image + 1 :]
    assert {"--containall", "--cleanenv", "--no-home", "--no-privs", "--no-init", "--pid", "--ipc"} <= set(options)
    assert options[options.index("--network") + 1] == "none"
    assert not {"--bind", "--mount", "--home", "--nv", "--writable", "--writable-tmpfs", "--env"} & set(options)
    assert options[options.index("--memory") + 1] == "1320M"
    assert ("--userns" in options) is not own_user
    assert any(option.startswith("uid:") for option in options) is own_user
    assert inside[:2] == ["/usr/bin/env", "-i"]


def test_containers_of_root_have_different_users() -> None:
    """The limit on processes counts a user's."""
    container = Container("apptainer", Path("code.sif"), True, False, {})
    assert len({tuple(container.command(Limits())) for _ in range(5)}) == 5


def test_the_environment_stays_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what Apptainer would take as an order to bind a folder."""
    monkeypatch.setenv("APPTAINER_BIND", "/")
    monkeypatch.setenv("APPTAINERENV_TOKEN", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = fake_apptainer(tmp_path, "import json, os; print(json.dumps(dict(os.environ)))")
    container = Container(str(program), Path("code.sif"), False, False, {})
    [seen] = container.run({"work": "probe"}, SMALL, threading.Event()).messages
    assert "PATH" in seen
    assert not {"APPTAINER_BIND", "APPTAINERENV_TOKEN", "HF_TOKEN"} & seen.keys()


def limited(script: str, request: bytes = b"", **options: Any) -> tuple[bytes, str | None]:
    """Output of a Python program under `run_limited`, and the limit that ended it."""
    options = {"seconds": 30.0, "output_bytes": 1 << 16, "stop": threading.Event()} | options
    finished = run_limited([sys.executable, "-c", script], request, {}, Path("/"), **options)
    return finished.output, finished.limit


def ends(process: int) -> bool:
    """Whether a process that was killed is gone within some seconds; on a busy machine a signal takes its time."""
    deadline = time.monotonic() + 10
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_process_is_bounded(tmp_path: Path) -> None:
    """By bytes, by seconds, by us; and what it started ends with it."""
    assert limited("print(input())", b"hello") == (b"hello\n", None)
    output, limit = limited("while True: print('x' * 1000)", output_bytes=5000)
    assert (len(output), limit) == (5000, "output_bytes")
    children = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid, flush=True)"
    )
    output, limit = limited(f"{children}\nsys.stdin.read(); subprocess.run(['sleep', '1000'])", seconds=2.0)
    assert limit == "seconds"
    assert ends(int(output))
    stop = threading.Event()
    stop.set()
    assert limited("import time; time.sleep(1000)", stop=stop)[1] == "stopped"


def said(tests: str, status: str) -> dict[str, Any]:
    return {"tests": tests, "status": status, "passed": 1, "of": 2}


@pytest.mark.parametrize(
    ("reply", "expected", "detail"),
    [
        (Reply([said("base", "pass"), said("plus", "pass")], "worker", ""), ("pass", "pass"), ""),
        (Reply([said("base", "pass")], "seconds", ""), ("pass", "timeout"), "plus: over the limit of 20.0 seconds"),
        (
            Reply([said("base", "fail")], "worker", ""),
            ("fail", "killed"),
            "base: fail after 1 of 2 tests; plus: the che",
        ),
        (Reply([], None, "x"), ("killed", "killed"), "base: the container ended without a word"),
        (Reply([said("base", "great")], "worker", ""), ("killed", "killed"), "base: the checker was killed"),
        (Reply([said("base", "fail"), said("base", "pass")], "worker", ""), ("fail", "killed"), "base: fail"),
        (
            Reply([{"error": "KeyError: 99"}], "worker", ""),
            ("killed", "killed"),
            "base: the checker failed: KeyError: 99",
        ),
    ],
)
def test_what_the_driver_says_is_read_strictly(reply: Reply, expected: tuple[str, str], detail: str) -> None:
    found = verdict(ADD, Sample(ADD["task_id"], 3, ""), reply, SMALL)
    assert (found.task_id, found.index, found.base, found.plus) == ("Own/add", 3, *expected)
    assert found.detail.startswith(detail) and bool(found.detail) == bool(detail)


def test_problems_that_cannot_be_judged(plain: Runtime) -> None:
    """A sample of no problem, and a canonical solution that does not run, stop the run with its name."""
    with pytest.raises(DataError, match="samples of Own/none, but none of the 1 problems"):
        run_samples({"Own/add": ADD}, [Sample("Own/none", 0, BENIGN)], SMALL, plain, "humaneval")
    broken = ADD | {"canonical_solution": "    return c\n"}
    with pytest.raises(DataError, match="Own/add: the canonical solution does not run: NameError"):
        run_samples({"Own/add": broken}, [Sample("Own/add", 0, BENIGN)], SMALL, plain, "humaneval")


def test_progress_is_told_of_every_verdict(plain: Runtime) -> None:
    seen: list[Verdict] = []
    samples = [Sample("Own/add", index, BENIGN) for index in range(3)]
    verdicts = run_samples({"Own/add": ADD}, samples, Limits(), plain, "humaneval", seen.append, workers=2)
    assert sorted(seen, key=lambda v: v.index) == verdicts
    assert isinstance(plain, Plain)
