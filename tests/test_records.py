from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mobie import provenance
from mobie.errors import DataError, StorageError
from mobie.records import STATUSES, Measurement, Record, read_record, write_record
from mobie.storage import atomic_write, write_json, write_text

RECORD = Record(
    kind="tasks",
    status="ok",
    reason=None,
    suite="smoke",
    model="nano-olmoe",
    method="mobie",
    seed=0,
    protocol="abc",
    measurements=(Measurement("piqa.acc", 0.1 + 0.2, 0.01, 200, 0.5), Measurement("wiki.perplexity", 17.5, None, 3)),
    details={"items": {"piqa": [1, 5]}},
    provenance={"code": "def", "inputs": {}},
)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_record_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "tasks.json"
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    assert read_record(path).measurement("piqa.acc").value == 0.1 + 0.2
    assert read_record(path).measurement("piqa.acc_norm") is None


def test_a_record_is_canonical_json(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    write_record(path, RECORD)
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_can_be_recorded(tmp_path: Path, status: str) -> None:
    path = tmp_path / "r.json"
    write_record(path, Record("tasks", status, "why", "s", "m", "x", 0, ""))
    assert read_record(path).ok == (status == "ok")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"status": "fine"}, "status"),
        ({"seed": "zero"}, "seed"),
        ({"colour": "red"}, "colour"),
        ({"measurements": [{"name": "x", "value": "high", "stderr": None, "n": 1}]}, "measurements.0.value"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, change: dict[str, object], place: str) -> None:
    path = tmp_path / "tasks.json"
    write_record(path, RECORD)
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(DataError, match=place) as error:
        read_record(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", '{"kind": "tasks"', "[]", "{}", "\0"])
def test_a_truncated_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(DataError, match="tasks.json"):
        read_record(path)


def test_a_missing_record_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="snakemake"):
        read_record(tmp_path / "tasks.json")


def test_a_full_disk_leaves_the_old_record_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tasks.json"
    write_record(path, RECORD)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(StorageError, match=r"tasks\.json: could not be written .*free some space"):
        write_record(path, Record("tasks", "failed", "x", "s", "m", "x", 0, ""))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.json"]


def test_a_disk_that_fills_up_on_flushing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="x.txt"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("not a folder")
    with pytest.raises(StorageError, match="results.*move it away"):
        write_record(tmp_path / "results" / "smoke" / "tasks.json", RECORD)
    assert (tmp_path / "results").read_text() == "not a folder"


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="read-only.*remount"):
        write_record(tmp_path / "results" / "tasks.json", RECORD)


def test_an_error_number_hidden_in_a_librarys_message_gives_its_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="free some space"),
        atomic_write(tmp_path / "block.safetensors"),
    ):
        raise OSError("I/O error: No space left on device (os error 28)")


def test_another_error_while_writing_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []


def test_writers_of_one_file_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from mobie.storage import write_text
for _ in range(400):
    write_text(Path({str(tmp_path / "x")!r}), "whole" * 1000)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "whole" * 1000


def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(
            tmp_path / "r.json",
            Record("t", "ok", None, "s", "m", "x", 0, "", (Measurement("a", float("nan"), None, 1),)),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `mobie` with a chain a → sub.b → sub.c, and d beside it."""
    root = tmp_path / "mobie"
    (root / "sub").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "sub" / "__init__.py").write_text("")
    (root / "a.py").write_text('"""Doc."""\nfrom mobie.sub import b\nx = 1  # why\n')
    (root / "sub" / "b.py").write_text('def f():\n    """Doc."""\n    from mobie.sub.c import g\n    return g()\n')
    (root / "sub" / "c.py").write_text("import json\nimport mobie.records\n\n\ndef g():\n    return 1\n")
    (root / "records.py").write_text("y = 1\n")
    (root / "d.py").write_text("z = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", root)
    monkeypatch.setattr(provenance, "_parsed", provenance._parsed.__wrapped__)  # no cache: files change below
    return root


def test_the_code_hash_covers_what_is_imported_and_nothing_else(package: Path) -> None:
    before = provenance.code_hash(["mobie.a"])
    assert {"mobie.a", "mobie.sub.b", "mobie.sub.c"} <= set(provenance.import_closure(["mobie.a"]))
    (package / "d.py").write_text("z = 2\n")
    (package / "records.py").write_text("y = 2\n")  # carries values, computes none
    assert provenance.code_hash(["mobie.a"]) == before
    (package / "sub" / "c.py").write_text("def g():\n    return 2\n")
    assert provenance.code_hash(["mobie.a"]) != before


def test_comments_docstrings_and_layout_do_not_change_the_code_hash(package: Path) -> None:
    before = provenance.code_hash(["mobie.a"])
    (package / "a.py").write_text('"""Another text."""\n\n\nfrom mobie.sub import (\n    b,\n)\n\nx = (1)  # because\n')
    (package / "sub" / "b.py").write_text(
        "def f():\n    from mobie.sub.c import g\n\n    # no docstring\n    return g()\n"
    )
    assert provenance.code_hash(["mobie.a"]) == before
    (package / "a.py").write_text("from mobie.sub import b\nx = 2\n")
    assert provenance.code_hash(["mobie.a"]) != before


def test_what_a_method_says_for_plans_does_not_change_the_code_hash(package: Path) -> None:
    def changed(*facts: str) -> str:
        (package / "a.py").write_text("\n    ".join(["class A:", "x: ClassVar[int] = 1", *facts]) + "\n")
        return provenance.code_hash(["mobie.a"])

    before = changed()
    assert changed("seconds_per_weight: ClassVar[float] = 1e-7", "stored_bits: ClassVar[float] = 3.0") == before
    assert changed("guided_by: ClassVar[object] = None") != before


def test_a_root_that_does_not_exist_is_a_mistake(package: Path) -> None:
    with pytest.raises(ValueError, match="mobie.nothing"):
        provenance.code_hash(["mobie.nothing"])


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert provenance.file_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="missing"):
        provenance.file_hash(tmp_path / "missing")


def test_a_clone_gives_its_commit_and_another_folder_none(tmp_path: Path) -> None:
    assert provenance.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert provenance.git_commit(tmp_path) == head
    (tmp_path / "f").write_text("2")
    assert provenance.git_commit(tmp_path) == head + "+"
