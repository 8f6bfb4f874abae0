"""A seeded sample of the faults of `tests/reliability/faults.py`, and what the harness itself promises."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from reliability import faults
from reliability.fault.children import FileEvents
from reliability.fault.judge import REMEDY, SAME, Bad, require_named_refusal
from reliability.fault.kinds import hurt_bytes
from reliability.fault.plan import PLAN, chosen

from mobie.errors import DataError, StorageError
from mobie.figures.seal import read_svg, seal_svg
from mobie.jobs.attempt import is_out_of_memory
from mobie.paths import Layout
from mobie.sealed import load_sealed, save_sealed
from mobie.sources import CHECKSUMS, Source, verify
from mobie.storage import atomic_write, unsealed, write_json, write_sealed, write_text

SAMPLE = 20


@pytest.fixture(scope="module")
def outcomes() -> list[dict]:
    """A sample of faults that need no slow job, done for real."""
    return faults.collect(["--count", str(SAMPLE), "--seed", "1", "--quick"])


def test_nothing_is_lost_and_nothing_damaged_is_used(outcomes: list[dict]) -> None:
    assert len(outcomes) == SAMPLE
    bad = [outcome for outcome in outcomes if outcome["verdict"] in faults.VERDICTS[2:]]
    assert not bad, "\n".join(f"{one['number']}: {one['verdict']}: {one['what']}: {one['detail']}" for one in bad)
    assert len({outcome["kind"] for outcome in outcomes}) >= 8


def test_the_table_counts_every_fault_once(outcomes: list[dict]) -> None:
    *rows, total = faults.rows_of(outcomes)
    assert total[:2] == ["all", SAMPLE]
    assert sum(row[1] for row in rows) == SAMPLE == sum(total[2:])
    assert all(row[1] == sum(row[2:]) for row in rows)


def test_a_seed_and_a_number_say_which_fault_it_is() -> None:
    first, again, other = chosen(250, 0), chosen(250, 0), chosen(250, 1)
    assert first == again != other
    assert {entry.name for entry in first} == {entry.name for entry in PLAN}
    assert not any(entry.slow for entry in chosen(50, 0, quick=True))
    assert hurt_bytes(b"abcdef", random.Random("0/1")) == hurt_bytes(b"abcdef", random.Random("0/1"))


def test_hurt_bytes_are_never_the_whole() -> None:
    for number in range(200):
        hurt, how = hurt_bytes(b"whole and well", random.Random(number))
        assert hurt != b"whole and well" and how


@pytest.mark.parametrize(
    ("status", "output"),
    [
        (1, "Traceback (most recent call last):\nKeyError: 'x'"),
        (2, "Traceback (most recent call last):\nerror: run it again"),
        (2, "no message"),
        (2, "error: other.json: damaged; run the job again"),
        (2, "error: file.json: damaged"),
        (0, "error: file.json: damaged; run the job again"),
    ],
)
def test_a_failure_without_name_or_remedy_is_found(status: int, output: str) -> None:
    from reliability.fault.children import Ended

    with pytest.raises(Bad):
        require_named_refusal(Ended(status, None, output, 0, 0), "file.json")
    require_named_refusal(Ended(2, None, "error: file.json: damaged; run the job again", 0, 0), "file.json")
    assert REMEDY.search("free some space") and SAME in faults.VERDICTS


def test_file_events_are_counted_and_struck(tmp_path: Path) -> None:
    struck = []
    events = FileEvents(tmp_path, 2, struck.append)
    events._heard("open", (str(tmp_path / "a"), "r", os.O_RDONLY))
    events._heard("open", ("/elsewhere", "w", os.O_WRONLY))
    events._heard("open", (str(tmp_path / "a"), "w", os.O_WRONLY | os.O_CREAT))
    events._heard("os.rename", (str(tmp_path / "a"), str(tmp_path / "b"), -1, -1))
    assert events.count == 2 and struck == ["os.rename"]


# ---- what the harness made necessary ---------------------------------------------------------------------------------


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    code = (
        "import os, signal, sys; from pathlib import Path; from mobie.storage import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, path])
        assert len(list(tmp_path.iterdir())) == 1  # not one more for every kill
    with atomic_write(path) as temporary:
        temporary.write_text("ours")
        other = "import sys; from pathlib import Path; from mobie.storage import write_text\n"
        subprocess.run([sys.executable, "-c", f"{other}write_text(Path(sys.argv[1]), 'theirs')", path], check=True)
        assert temporary.read_text() == "ours" and path.read_text() == "theirs"
    assert path.read_text() == "ours"
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="free some space"):
        write_text(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_a_changed_value_breaks_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, {"value": 0.5, "by_size": {2: "a", 10: "b"}})
    import json

    raw = json.loads(path.read_text())
    assert unsealed(raw) == {"value": 0.5, "by_size": {"2": "a", "10": "b"}}
    for damaged in (raw | {"value": 0.7}, {"value": 0.5}, [], raw | {"sha256": "0" * 64}):
        with pytest.raises(ValueError, match="sha256"):
            unsealed(damaged)


def test_every_byte_of_sealed_tensors_counts(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "tokens.safetensors"
    save_sealed(path, {"tokens": torch.arange(12).reshape(3, 4)}, {"text": "wiki", "seed": 0})
    tokens, origin = load_sealed(path, "tokens")
    assert tokens.tolist()[1] == [4, 5, 6, 7] and origin == {"text": "wiki", "seed": 0}
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            again, origin = load_sealed(path, "tokens")
        except ValueError:
            continue
        assert torch.equal(again, tokens) and origin == {"text": "wiki", "seed": 0}, position


def test_a_changed_drawing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fig6.svg"
    path.write_bytes(seal_svg(b"<svg><text>0.5</text></svg>\n"))
    assert read_svg(path).startswith(b"<svg>")
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))
    with pytest.raises(DataError, match=r"fig6\.svg.*mobie figure fig6"):
        read_svg(path)


def test_a_folder_that_was_fetched_is_kept_as_it_was(tmp_path: Path) -> None:
    import hashlib

    source = Source("set", "hub", "a/b", "unpinned", (), None, None, "MIT", "tests")
    (tmp_path / "x.parquet").write_text("rows")
    verify(source, tmp_path)  # put there by hand: nothing is known of it
    (tmp_path / CHECKSUMS).write_text(f"{hashlib.sha256(b'rows').hexdigest()}  x.parquet\n")
    verify(source, tmp_path)
    (tmp_path / "x.parquet").write_text("sows")
    with pytest.raises(DataError, match=r"x\.parquet.*mobie fetch set"):
        verify(source, tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_memory_that_runs_out_in_any_verb_is_one_message(repository: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from mobie.cli import main

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mobie.tables.build_table", no_memory)
    result = CliRunner().invoke(main, ["table", "table2"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no memory left") and "run the same command again" in " ".join(
        result.stderr.split()
    )


def test_a_damaged_mirror_is_refused(tmp_path: Path) -> None:
    from mobie.data.mirror import check_mirror

    stamp, mirror = tmp_path / "mirror.json", tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "a.parquet").write_text("rows")
    import hashlib

    write_sealed(stamp, {"files": {"a.parquet": {"rows": 1, "sha256": hashlib.sha256(b"rows").hexdigest()}}})
    check_mirror(stamp, mirror)
    (mirror / "a.parquet").write_text("sows")
    with pytest.raises(DataError, match=r"a\.parquet.*mobie mirror"):
        check_mirror(stamp, mirror)
    write_json(stamp, {"files": {}})
    with pytest.raises(DataError, match=r"mirror\.json.*mobie mirror"):
        check_mirror(stamp, mirror)
