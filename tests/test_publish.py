"""Publishing a suite and building it again: same bytes, refusals, nothing outside the folder, nothing of torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import mobie
from mobie.cli import main
from mobie.errors import ConfigError, DataError, MobieError, StorageError
from mobie.paths import PACKAGE, Layout
from mobie.publish import pack, targets
from mobie.publish.archive import unpack
from mobie.publish.manifest import NAME, check_name
from mobie.publish.rebuild import rebuild
from mobie.records import Measurement, Record, read_record, write_record
from mobie.report.build import report_records

SUITE = "tiny"
TOP = f"mobie-{SUITE}"
VALUE = ("fp16", "perplexity")  # the one record that has a value
#: all tables and figures take half a minute
DRAWN, TABLES = ("fig6",), ("table2", "table8")


def record_of(path: Path) -> Record:
    """A record for a path that was asked for: a value for one, a reason for all others."""
    model, method, seed = path.parts[-4:-1]
    record = Record(path.stem, "failed", "not tried here", SUITE, model, method, int(seed[1:]), "protocol")
    if (method, path.stem) != VALUE:
        return record
    return replace(record, status="ok", reason=None, measurements=(Measurement("wiki.perplexity", 41.25, 0.5, 64),))


def make_suite(root: Path) -> Layout:
    """A repository with every record of the suite, and a log with paths of this machine in it."""
    shutil.copytree(PACKAGE.parent / "workflow", root / "workflow")
    shutil.copy(PACKAGE.parent / "Snakefile", root)
    layout = Layout(root)
    for path in report_records(SUITE, layout):
        write_record(path, record_of(path))
    log = layout.log(SUITE, "nano-olmoe", "mobie", "s0", "tasks")
    log.parent.mkdir(parents=True)
    log.write_text(30 * "early line\n" + f"{root}/mobie/x.py: warned\nfrom {Path.home()}/cache\n")
    return layout


@pytest.fixture(scope="module", autouse=True)
def few_targets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "figures_of", lambda suite: DRAWN)
        patch.setattr(targets, "tables_of", lambda suite: TABLES)
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return make_suite(tmp_path_factory.mktemp("publish") / "repository")


@pytest.fixture(scope="module")
def packed(suite: Layout) -> pack.Packed:
    return pack.publish(SUITE, suite, suite.archive(SUITE, mobie.__version__))


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def changed(archive: Path, target: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """A copy of an archive whose members went through `change`."""
    found = members(archive)
    change(found)
    with zipfile.ZipFile(target, "w") as opened:
        for name, data in found.items():
            opened.writestr(name, data)
    return target


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_built_again_where_nothing_else_is(packed: pack.Packed, tmp_path: Path) -> None:
    """In a process that can import neither torch nor the workflow, in an empty folder."""
    light, here = tmp_path / "light", tmp_path / "here"
    here.mkdir()
    light.mkdir()
    for library in ("torch", "transformers", "datasets", "lm_eval", "snakemake", "triton"):
        (light / f"{library}.py").write_text(f"raise ImportError('{library} is not for tables')")
    program = (
        f"import mobie.publish.targets as t; t.figures_of, t.tables_of = lambda _: {DRAWN}, lambda _: {TABLES}; "
        "from mobie.cli import main; "
        f"main(['rebuild', {str(packed.path)!r}, '--out', 'out'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(light), str(PACKAGE.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "table2: 4 files equal" in done.stdout and "report: 1 files equal" in done.stdout
    assert "different" not in done.stdout
    archived = {name.partition("/")[2]: data for name, data in members(packed.path).items()}
    built = {name: (here / "out" / name).read_bytes() for name in files_below(here / "out")}
    assert built == archived
    assert "41.25" in built["results/table2.csv"].decode()


def test_the_same_records_give_the_same_bytes(suite: Layout, packed: pack.Packed, tmp_path: Path) -> None:
    again = pack.publish(SUITE, suite, tmp_path / "again.zip")
    assert again.path.read_bytes() == packed.path.read_bytes()


def test_all_that_the_workflow_builds_is_built() -> None:
    from mobie.figures import ALL_FIGURES
    from mobie.tables import ALL_TABLES

    built = {module.rpartition(".")[2] for module in targets.MODULES}
    assert built == {*ALL_TABLES, *ALL_FIGURES, "targets"}
    rules = (PACKAGE.parent / "workflow" / "rules" / "targets.smk").read_text()
    assert [line.split()[1][:-1] for line in rules.splitlines() if line.startswith("rule ")] == [
        "table",
        "figure",
        "claims",
        "report",
    ]


def test_the_manifest_lists_every_file_and_every_hole(suite: Layout, packed: pack.Packed) -> None:
    manifest = packed.manifest
    assert {f"{TOP}/{name}" for name in manifest.files} | {f"{TOP}/{NAME}"} == set(members(packed.path))
    assert manifest.mobie == mobie.__version__ and manifest.suite == SUITE and manifest.missing == ()
    assert {hole.reason for hole in manifest.holes} == {"not tried here"}
    asked = {path.relative_to(suite.root).as_posix() for path in report_records(SUITE, suite)}
    assert set(manifest.names("record")) == asked
    assert any(name.endswith("/fp16/s0/gate.json") for name in asked)
    assert manifest.records == {"ok": 1, "failed": len(asked) - 1}
    assert f"workflow/config/suites/{SUITE}.yaml" in manifest.files
    assert "workflow/config/suites/paper.yaml" not in manifest.files


def test_records_are_packed_as_they_are_and_logs_without_places(suite: Layout, packed: pack.Packed) -> None:
    found = members(packed.path)
    for name in packed.manifest.names("record"):
        assert found[f"{TOP}/{name}"] == (suite.root / name).read_bytes()
    log = found[f"{TOP}/logs/{SUITE}/nano-olmoe/mobie/s0/tasks.log"].decode()
    assert log.endswith("mobie/x.py: warned\nfrom ~/cache\n") and str(suite.root) not in log


def test_what_lies_beside_the_records_of_tables(suite: Layout, tmp_path: Path) -> None:
    """A record that no table asks for and the programs that a model wrote are packed, other files are not."""
    extra = suite.record(SUITE, "nano-olmoe", "rtn-w4", 3, "code_samples")
    write_record(extra, record_of(extra))
    programs = suite.code_samples(SUITE, "nano-olmoe", "rtn-w4", 3) / "mbpp.greedy.jsonl"
    stray = extra.with_name("notes.json")
    programs.parent.mkdir()
    for path in (programs, stray):
        path.write_text("{}\n")
    try:
        manifest = pack.publish(SUITE, suite, tmp_path / "more.zip").manifest
    finally:
        shutil.rmtree(extra.parent)
    roles = {name: file.role for name, file in manifest.files.items() if "/s3/" in name}
    names = [path.relative_to(suite.root).as_posix() for path in (extra, programs)]
    assert roles == dict(zip(names, ("record", "programs"), strict=True))


def test_an_incomplete_suite_is_refused_unless_partial(tmp_path: Path) -> None:
    layout = make_suite(tmp_path / "repository")
    gone = [layout.record(SUITE, "nano-olmoe", "mobie", 0, kind) for kind in ("tasks", "perplexity")]
    for path in gone:
        path.unlink()
    archive = tmp_path / "part.zip"
    with pytest.raises(
        DataError, match=r"incomplete: 2 of \d+ records(.|\n)*its log ends: from ~/cache(.|\n)*--partial"
    ):
        pack.publish(SUITE, layout, archive)
    assert not archive.exists()
    manifest = pack.publish(SUITE, layout, archive, partial=True).manifest
    reasons = {hole.path: hole.reason for hole in manifest.missing}
    assert reasons == {
        gone[0].relative_to(layout.root).as_posix(): "its job left no record; its log ends: from ~/cache",
        gone[1].relative_to(layout.root).as_posix(): "its job has not run",
    }
    assert not rebuild(archive, tmp_path / "out").differing


def test_tables_of_another_suite_on_disk_are_told_and_not_packed(suite: Layout, packed: pack.Packed) -> None:
    disk = suite.table("table2", "csv")
    disk.write_text("of another suite\n")
    try:
        again = pack.publish(SUITE, suite, packed.path.with_name("again.zip"))
    finally:
        disk.unlink()
    assert again.differing == ("results/table2.csv",)
    assert again.path.read_bytes() == packed.path.read_bytes()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    layout = make_suite(tmp_path / "repository")
    layout.record(SUITE, "nano-olmoe", "fp16", 0, "perplexity").write_text("{")
    with pytest.raises(DataError, match=r"fp16/s0/perplexity.json"):
        pack.publish(SUITE, layout, tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_the_verb_checks_first(suite: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(suite.root)
    record = suite.record(SUITE, "nano-olmoe", "fp16", 0, "perplexity")
    kept = record.read_bytes()
    shifted = json.loads(kept) | {"model": "another"}
    record.write_text(json.dumps(shifted))
    try:
        result = invoke("publish", "--suite", SUITE, "--out", str(tmp_path / "a.zip"))
    finally:
        record.write_bytes(kept)
    assert result.exit_code == 2 and "cannot be trusted" in result.stderr and "perplexity.json" in result.stderr
    assert not (tmp_path / "a.zip").exists()


def test_the_verbs_refuse_wrong_names(suite: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(suite.root)
    for arguments, told in (
        (("publish", "--suite", "tyni"), "did you mean tiny?"),
        (("publish", "--suite", SUITE, "--out", "a.tar.gz"), "expected .zip"),
        (("rebuild", str(tmp_path / "none.zip")), "no such archive"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and told in result.stderr, result.output


def test_files_that_come_out_differently_are_named(packed: pack.Packed, tmp_path: Path) -> None:
    """An archive whose table does not follow from its records, with a manifest that fits."""

    def forge(found: dict[str, bytes]) -> None:
        import hashlib

        manifest = json.loads(found[f"{TOP}/{NAME}"])
        data = found[f"{TOP}/results/table2.csv"] + b"more\n"
        manifest["files"]["results/table2.csv"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        found |= {f"{TOP}/results/table2.csv": data, f"{TOP}/{NAME}": json.dumps(manifest).encode()}

    archive = changed(packed.path, tmp_path / "forged.zip", forge)
    result = invoke("rebuild", str(archive))
    assert result.exit_code == 2 and "results/table2.csv" in result.stderr and "1 of" in result.stderr
    assert (tmp_path / "forged" / "results" / "table2.csv").exists()  # kept, to be looked at


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop(f"{TOP}/results/table2.csv"), "not there: 'results/table2.csv'"),
        (lambda m: m.pop(f"{TOP}/{NAME}"), f"no {NAME}"),
        (lambda m: m.update({f"{TOP}/results/more.csv": b""}), "without an entry in MANIFEST.json: 'results/more.csv'"),
        (lambda m: m.update({f"{TOP}/../../evil": b""}), "without an entry"),
        (lambda m: m.update({"/evil": b""}), "top folders"),
        (lambda m: m.update({"other/x": b""}), "top folders"),
        (lambda m: m.update({f"{TOP}/README.md": b"x"}), "README.md has 1 bytes"),
        (lambda m: m.update({f"{TOP}/README.md": m[f"{TOP}/README.md"][::-1]}), "README.md has sha256"),
        (lambda m: m.update({f"{TOP}/{NAME}": b"{"}), "not a manifest"),
        (lambda m: m.update({f"{TOP}/{NAME}": b"[" * 100000}), "not a manifest"),
        (lambda m: m.update({f"{TOP}/{NAME}": m[f"{TOP}/{NAME}"].replace(b'"format": 1', b'"format": 2')}), "format"),
        (lambda m: m.update({f"{TOP}/{NAME}": m[f"{TOP}/{NAME}"].replace(b'"README.md"', b'"../x"')}), "'../x'"),
    ],
)
def test_archives_that_do_not_fit_their_manifest_are_refused(
    packed: pack.Packed, tmp_path: Path, change: Callable[[dict[str, bytes]], Any], told: str
) -> None:
    archive = changed(packed.path, tmp_path / "a.zip", change)
    with pytest.raises(DataError) as refused:
        rebuild(archive, tmp_path / "here" / "out")
    assert told in str(refused.value)
    assert files_below(tmp_path) == {"a.zip"}


def test_a_member_that_stands_twice_is_refused(packed: pack.Packed, tmp_path: Path) -> None:
    archive = shutil.copy(packed.path, tmp_path / "a.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(f"{TOP}/README.md", "another")
    with pytest.raises(DataError, match="two members"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "results/../../x", "results\\..\\x", "C:/x", "results", "results/", "results//x", "./results/x", ""]
    + ["results/\x00x", "results/a\nb", "elsewhere/x", "MANIFEST.json", "."],
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="expected an archive"):
        check_name(name, "here")


@given(st.text(alphabet="ab./\\:~\x00 é", max_size=12))
def test_a_name_that_is_taken_stays_in_the_folder(name: str) -> None:
    for text in (name, f"results/{name}"):
        try:
            check_name(text, "here")
        except DataError:
            continue
        assert Path("/root/folder", text).resolve().is_relative_to("/root/folder")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_archive_is_refused_or_whole(packed: pack.Packed, data: st.DataObject) -> None:
    """Any byte changed or the end cut off: one message, or, where nothing that is read was hit, the same files."""
    good = packed.path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = good[:place] if data.draw(st.booleans()) else good[:place] + bytes([good[place] ^ 0x21]) + good[place + 1 :]
    folder = packed.path.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    archive = packed.path.with_name("damaged.zip")
    archive.write_bytes(bad)
    try:
        manifest = unpack(archive, folder)
    except MobieError:
        return
    assert manifest == packed.manifest


def test_a_folder_in_use_is_left_alone(packed: pack.Packed, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="--out"):
        rebuild(packed.path, tmp_path)
    assert files_below(tmp_path) == {"mine.txt"}


def test_an_unknown_suite_is_refused(suite: Layout, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        pack.publish("none", suite, tmp_path / "a.zip")


def test_a_published_record_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    layout = make_suite(tmp_path / "repository")
    own = layout.record(SUITE, "nano-olmoe", "mobie", 0, "speed")
    published = layout.published(SUITE, "nano-olmoe", "mobie", 0, "speed")
    published.parent.mkdir(parents=True)
    own.rename(published)
    manifest = pack.publish(SUITE, layout, tmp_path / "a.zip").manifest
    assert manifest.missing == ()
    assert published.relative_to(layout.root).as_posix() in manifest.names("record")
    assert read_record(published).status == "failed"
