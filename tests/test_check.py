"""A results folder made by tiny means passes the check; each kind of damage is found and named."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tiny import make_model, random_tokens, save_model

from mobie.check.files import Damaged, parse_json, read_tensor_file
from mobie.check.run import Options, check
from mobie.cli import main
from mobie.errors import DataError
from mobie.paths import Layout
from mobie.provenance import collect, digest, file_hash
from mobie.records import Measurement, Record, write_record
from mobie.results import Results
from mobie.storage import write_sealed

ROOT = Path(__file__).parents[1]
SUITE, MODEL = "little", "tiny-moe"
METHODS = ("fp16", "rtn-w3", "mobie")
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "lambada_openai", "lambada_standard", "piqa", "winogrande")
ITEMS = list(range(0, 40, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a finished suite: three methods quantized and scored for real, task answers made up."""
    root = tmp_path_factory.mktemp("finished") / "repository"
    shutil.copytree(ROOT / "workflow", root / "workflow")
    shutil.copy(ROOT / "Snakefile", root)
    (root / "paper_figures").mkdir()
    layout = Layout(root)
    _write_configuration(layout)
    _write_model(layout)
    _run_jobs(layout)
    _write_targets(layout)
    return root


def _write_configuration(layout: Layout) -> None:
    model = {
        "source": "hub",
        "repo": "nobody/tiny-moe",
        "label": None,
        "parameters": 1,
        "bytes": 1,
        "resources": {"mem_mb": 1000},
        "calibration": {"text": "wiki-calibration", "sequences": 4, "length": 32},
    }
    layout.config_file("models", MODEL).write_text(yaml.safe_dump(model))
    suite = yaml.safe_load(layout.config_file("suites", "tiny").read_text())
    suite |= {"models": [MODEL], "methods": list(METHODS)}
    suite.pop("calibration", None)
    layout.config_file("suites", SUITE).write_text(yaml.safe_dump(suite))


def _write_model(layout: Layout) -> None:
    folder = save_model(make_model("olmoe"), layout.hub_model(MODEL))
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    stamp = {"repo": "nobody/tiny-moe", "revision": "0" * 40, "files": files}
    write_sealed(layout.hub_model_stamp(MODEL), stamp)


def _run_jobs(layout: Layout) -> None:
    from mobie.calibration.tokens import TokensOrigin, save_tokens
    from mobie.jobs.data import source_identity, window_protocols, windows_path
    from mobie.jobs.keys import Keys
    from mobie.jobs.quantize import quantize_job
    from mobie.jobs.score import score_job
    from mobie.scoring.windows import WindowsOrigin, save_windows, tokenizer_files_digest

    keys = Keys(layout, SUITE, MODEL, 0)
    save_tokens(keys.calibration, random_tokens(4, 32), TokensOrigin("wiki-calibration", "t", "v", 0))
    for seed, part in enumerate(window_protocols(keys)):
        windows = random_tokens(part.windows, part.window, seed)
        tokenizer = tokenizer_files_digest(layout.hub_model(MODEL))
        origin = WindowsOrigin(
            part.text, "d" * 64, source_identity(part.text, layout), tokenizer, part.windows_digest()
        )
        save_windows(windows_path(keys, part), windows, origin)
    for number, method in enumerate(METHODS):
        keys = Keys(layout, SUITE, MODEL, 0, method)
        assert quantize_job(keys, progress=False).ok
        assert score_job(keys, "perplexity").ok
        assert score_job(keys, "routing").ok
        _write_tasks(keys, number)


def _write_tasks(keys: Any, number: int) -> None:
    """A record of tasks whose values follow from made-up answers."""
    from mobie.check.records import mean_and_error

    answers = {}
    for index, task in enumerate(TASKS):
        for metric in ("acc", "acc_norm") if task.startswith(("arc", "hella", "piqa")) else ("acc",):
            answers[f"{task}.{metric}"] = [float((i * 7 + index + number) % 3 == 0) for i in ITEMS]
    found = [Measurement(name, *mean_and_error(a), len(a), 0.25) for name, a in answers.items()]
    manifest = file_hash(keys.checkpoint / "manifest.json")
    record = Record(
        *("tasks", "ok", None, keys.suite, keys.model, keys.method, keys.seed),
        protocol=digest([keys.protocol.tasks.digest()]),
        measurements=tuple(found),
        details={"answers": answers, "items": dict.fromkeys(TASKS, ITEMS)},
        provenance=collect({"checkpoint": manifest, "group": "0" * 64}, "c" * 64, keys.layout.root),
    )
    write_record(keys.record("tasks"), record)


def _write_targets(layout: Layout) -> None:
    from mobie.figures import collect_figure
    from mobie.figures.figure import to_csv
    from mobie.tables import build_table
    from mobie.tables.table import write_table

    for name in ("table2", "table4"):
        write_table(build_table(name, Results(SUITE, layout)), layout)
    layout.figure("pareto", "csv").write_text(to_csv(collect_figure("pareto", Results(SUITE, layout))))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished results, to damage."""
    shutil.copytree(finished, tmp_path / "repository", copy_function=os.link)
    return tmp_path / "repository" / "results"


def run(folder: Path, method: str = "rtn-w3") -> Path:
    return folder / SUITE / MODEL / method / "s0"


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a new file: the old one may be a hard link to the fixture's."""
    path.unlink()
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change a JSON object; its hash of itself, where it has one, is put right unless `seal` is False."""
    value = json.loads(path.read_text())
    change(value)
    if seal and "sha256" in value:
        value["sha256"] = digest({key: entry for key, entry in value.items() if key != "sha256"})
    replace_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    replace_bytes(path, text.replace(old, new, 1).encode())


def flip(path: Path, place: float = 0.9) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    replace_bytes(path, bytes(data))


def set_value(record: dict[str, Any], name: str, **values: Any) -> None:
    next(m for m in record["measurements"] if m["name"] == name).update(values)


def cell(path: Path, **where: str) -> dict[str, str]:
    """A line of a long table."""
    return next(line for line in csv.DictReader(path.open()) if all(line[key] == value for key, value in where.items()))


def write_lock(root: Path) -> None:
    entry = {"repo": "nobody/tiny-moe", "revision": None, "files": {"config.json": {"sha256": "0" * 64, "bytes": 1}}}
    Layout(root).lock.write_text(json.dumps({"models": {MODEL: entry}}))


def edit_long(path: Path, change: dict[str, str], **where: str) -> None:
    lines = list(csv.DictReader(path.open()))
    next(line for line in lines if all(line[key] == value for key, value in where.items())).update(change)
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_bytes(path, text.getvalue().encode())


def test_a_finished_folder_is_clean(finished: Path) -> None:
    report = check(finished / "results", Options())
    assert [finding.line() for finding in report.findings if finding.level != "note"] == []
    assert report.seen["records"] == 4 * len(METHODS)
    assert report.seen["checkpoints"] == len(METHODS)
    assert (report.seen["tables"], report.seen["figures"]) == (2, 1)


def _swap(folder: Path) -> None:
    """The record of another method, which also says so."""
    replace_bytes(run(folder) / "perplexity.json", (run(folder, "mobie") / "perplexity.json").read_bytes())


def _swap_renamed(folder: Path) -> None:
    """The record of another method under this one's name."""
    edit(run(folder, "mobie") / "perplexity.json", lambda r: r.update(method="rtn-w3"))
    replace_bytes(run(folder) / "perplexity.json", (run(folder, "mobie") / "perplexity.json").read_bytes())


def _all_shards_of_another_method(folder: Path) -> None:
    for path in (run(folder, "mobie") / "checkpoint").iterdir():
        if path.name != "README.md":
            replace_bytes(run(folder) / "checkpoint" / path.name, path.read_bytes())


def _consistent_bytes(record: dict[str, Any]) -> None:
    """Fewer bytes in one item."""
    items = record["details"]["bytes_by_item"]
    items[sorted(items)[0]] -= 8


#: what is done to a folder → words that one of the errors must hold
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte in a shard": (
        lambda f: flip(run(f) / "checkpoint" / "block-001.safetensors"),
        r"checkpoint/block-001.safetensors: sha256 .* as in manifest.json",
    ),
    "deleted shard": (
        lambda f: (run(f) / "checkpoint" / "block-000.safetensors").unlink(),
        "checkpoint/block-000.safetensors: no such file",
    ),
    "truncated shard": (
        lambda f: replace_bytes(
            run(f) / "checkpoint" / "kept.safetensors",
            (run(f) / "checkpoint" / "kept.safetensors").read_bytes()[:-5],
        ),
        r"checkpoint/kept.safetensors: \d+ bytes; expected \d+",
    ),
    "flipped byte in the tokenizer": (
        lambda f: flip(run(f) / "checkpoint" / "tokenizer.json"),
        "checkpoint/tokenizer.json: sha256",
    ),
    "edited manifest": (
        lambda f: edit(run(f) / "checkpoint" / "manifest.json", lambda m: m.update(model_type="mixtral")),
        "checkpoint/manifest.json: sha256 .* as in quantize.json",
    ),
    "manifest with another folder's file": (
        lambda f: edit(
            run(f) / "checkpoint" / "manifest.json",
            lambda m: m["files"].update({"../quantize.json": {"bytes": 1, "sha256": "0" * 64}}),
        ),
        r"manifest.json: lists '../quantize.json'",
    ),
    "checkpoint of another method": (_all_shards_of_another_method, "have the fingerprint .* of different jobs"),
    "edited value": (
        lambda f: edit(run(f) / "perplexity.json", lambda r: set_value(r, "wiki.perplexity", value=12.5)),
        "perplexity.json: wiki.perplexity: value 12.5, its items give",
    ),
    "edited without its hash": (
        lambda f: edit(run(f) / "routing.json", lambda r: set_value(r, "similarity", n=7), seal=False),
        "routing.json: its content has the sha256 .*, it says",
    ),
    "edited stamp without its hash": (
        lambda f: edit(
            f.parent / "resources" / "models" / f"{MODEL}.json", lambda s: s.update(revision="2" * 40), seal=False
        ),
        "models/tiny-moe.json: its content has the sha256",
    ),
    "edited standard error": (
        lambda f: edit(run(f) / "tasks.json", lambda r: set_value(r, "piqa.acc", stderr=0.001)),
        "tasks.json: piqa.acc: stderr 0.001, its items give",
    ),
    "edited count": (
        lambda f: edit(run(f) / "tasks.json", lambda r: set_value(r, "piqa.acc", n=4000)),
        "tasks.json: piqa.acc: n 4000, its items give 20",
    ),
    "value out of range": (
        lambda f: edit(run(f) / "routing.json", lambda r: set_value(r, "similarity", value=1.5)),
        "similarity: value 1.5 outside -1.0 to 1.0",
    ),
    "not a number": (
        lambda f: edit(run(f) / "routing.json", lambda r: set_value(r, "similarity", value=float("nan"))),
        "routing.json: not readable JSON .*NaN is no finite number",
    ),
    "negative standard error": (
        lambda f: edit(run(f) / "routing.json", lambda r: set_value(r, "similarity", stderr=-1.0)),
        "similarity: standard error -1.0",
    ),
    "unknown key": (
        lambda f: edit(run(f) / "routing.json", lambda r: r.update(extra=1)),
        r"routing.json: keys missing \[\], unknown \['extra'\]",
    ),
    "unknown status": (
        lambda f: edit(run(f) / "routing.json", lambda r: r.update(status="fine")),
        "status 'fine' is none of",
    ),
    "a reason beside values": (
        lambda f: edit(run(f) / "routing.json", lambda r: r.update(reason="why")),
        "status ok with reason 'why'",
    ),
    "a failure with values": (
        lambda f: edit(run(f) / "routing.json", lambda r: r.update(status="failed", reason="because")),
        r"status failed with reason 'because' and \d+ values",
    ),
    "no provenance": (
        lambda f: edit(run(f) / "routing.json", lambda r: r.update(provenance={})),
        "routing.json: provenance lacks inputs",
    ),
    "truncated record": (
        lambda f: replace_bytes(run(f) / "tasks.json", (run(f) / "tasks.json").read_bytes()[:200]),
        "tasks.json: not readable JSON",
    ),
    "swapped record": (_swap, "perplexity.json: its method is 'mobie'; expected 'rtn-w3' as in its path"),
    "swapped and renamed record": (_swap_renamed, "its checkpoint had sha256"),
    "record under another seed": (
        lambda f: run(f).rename(run(f).parent / "s7"),
        "s7/perplexity.json: its seed is 's0'; expected 's7'",
    ),
    "another protocol in one row": (
        lambda f: edit(run(f) / "perplexity.json", lambda r: r.update(protocol="1" * 64)),
        "table2.long.csv: the protocol differs in perplexity: '1111.*rtn-w3/s0/perplexity.json",
    ),
    "another harness in one row": (
        lambda f: edit(run(f) / "tasks.json", lambda r: r["provenance"]["versions"].update({"lm-eval": "0.4.9"})),
        "lm-eval differs in tasks: '0.4.9'",
    ),
    "other items in one row": (
        lambda f: edit(run(f) / "tasks.json", lambda r: r["details"]["items"].update(piqa=[1, 2])),
        "the items of tiny-moe differs in tasks",
    ),
    "other data in one row": (
        lambda f: edit(run(f) / "tasks.json", lambda r: r["provenance"]["inputs"].update(group="f" * 64)),
        "group of tiny-moe differs in tasks",
    ),
    "wrong bits": (
        lambda f: edit(run(f) / "quantize.json", lambda r: set_value(r, "bits_paper", value=1.0)),
        r"bits_paper 1.0 over \d+ weights; expected 3",
    ),
    "wrong stored bits": (
        lambda f: edit(run(f, "mobie") / "quantize.json", lambda r: set_value(r, "bits_stored", value=1.0)),
        r"bits_stored 1.0 over \d+ weights",
    ),
    "wrong number of weights": (
        lambda f: edit(run(f) / "quantize.json", lambda r: set_value(r, "bits_codes", n=5)),
        r"bits_codes .* over 5 weights; expected",
    ),
    "wrong bytes of an item": (
        lambda f: edit(run(f) / "quantize.json", _consistent_bytes),
        "bytes_by_item: block0.* bytes as stored",
    ),
    "wrong file bytes": (
        lambda f: edit(run(f) / "quantize.json", lambda r: r["details"].update(file_bytes=1)),
        "file_bytes 1; expected",
    ),
    "options of another run": (
        lambda f: edit(run(f) / "quantize.json", lambda r: r["details"]["options"].update(bits=2)),
        "quantize.json: code, inputs, method and options have the fingerprint",
    ),
    "other calibration tokens": (
        lambda f: flip(next((f / SUITE / MODEL / "calibration").iterdir())),
        "quantize.json: no calibration set has sha256",
    ),
    "other windows": (
        lambda f: flip(next((f / SUITE / MODEL / "windows").glob("web-*"))),
        "perplexity.json: no windows of web have sha256",
    ),
    "truncated windows": (
        lambda f: replace_bytes(next((f / SUITE / MODEL / "windows").glob("web-*")), b"\x10"),
        "windows/web-.*: not a safetensors file",
    ),
    "other model file": (
        lambda f: flip(f.parent / "resources" / "models" / MODEL / "model.safetensors"),
        "models/tiny-moe/model.safetensors: sha256 .* as in tiny-moe.json",
    ),
    "other model": (
        lambda f: edit(f.parent / "resources" / "models" / f"{MODEL}.json", lambda s: s.update(revision="1" * 40)),
        "quantize.json: made from a model with digest",
    ),
    "table edited by hand": (
        lambda f: edit_text(
            f / "table2.csv", cell(f / "table2.long.csv", config="rtn-w3", column="piqa")["ours"][:-2], "99.99"
        ),
        "table2.csv: line .* from the records",
    ),
    "long table edited by hand": (
        lambda f: edit_long(f / "table2.long.csv", {"ours": "99.9900"}, config="rtn-w3", column="piqa"),
        r"table2.long.csv: line \d+, .*, piqa: says 99.9900 .* the record has",
    ),
    "average edited by hand": (
        lambda f: edit_long(f / "table2.long.csv", {"ours": "99.9900"}, config="rtn-w3", column="avg7"),
        "avg7: says 99.9900, its 7 columns have the mean",
    ),
    "Markdown table edited by hand": (
        lambda f: edit_text(
            f / "table2.md", cell(f / "table2.long.csv", config="mobie", column="bits_stored")["ours"][:-2], "1.00"
        ),
        "table2.md: line",
    ),
    "table of a record that is gone": (
        lambda f: (run(f) / "routing.json").unlink(),
        "routing_similarity: says|routing_similarity: .*, but its record .* is not there",
    ),
    "lock of other files than were fetched": (
        lambda f: write_lock(f.parent),
        "models/tiny-moe.json: lists other files than the lock",
    ),
    "figure edited by hand": (
        lambda f: edit_text(f.parent / "paper_figures" / "pareto.csv", ",16,", ",15,"),
        "paper_figures/pareto.csv: line",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(folder: Path, name: str) -> None:
    import re

    damage, words = DAMAGE[name]
    damage(folder)
    errors = [finding.line() for finding in check(folder, Options()).findings if finding.level == "error"]
    assert any(re.search(words, line) for line in errors), errors


def test_every_error_says_what_to_do(folder: Path) -> None:
    for name in ("flipped byte in a shard", "edited value", "another protocol in one row", "table edited by hand"):
        DAMAGE[name][0](folder)
    findings = check(folder, Options()).findings
    assert len(findings) >= 4
    assert all(finding.expected and finding.remedy for finding in findings if finding.level == "error")


def test_differences_of_commit_and_machine_are_notes(folder: Path) -> None:
    edit(run(folder) / "tasks.json", lambda r: r["provenance"].update(git_commit="f" * 40))
    edit(run(folder) / "tasks.json", lambda r: r["provenance"]["host"].update(torch_threads=9))
    report = check(folder, Options())
    lines = [finding.line() for finding in report.findings if finding.level == "note"]
    assert any("2 commits" in line for line in lines) and any("numbers of threads" in line for line in lines)
    assert report.counts["error"] == 0


def test_words_of_another_version_are_a_warning(folder: Path) -> None:
    edit_text(folder / "table2.md", "Accuracies", "The accuracies")
    (finding,) = [f for f in check(folder, Options()).findings if f.level != "note"]
    assert finding.level == "warning" and finding.file == "results/table2.md"


def test_records_of_an_older_configuration_are_a_warning(folder: Path) -> None:
    path = Layout(folder.parent).config_file("methods", "rtn-w3")
    edit_text(path, "bits: 3", "bits: 2")
    lines = [finding.line() for finding in check(folder, Options()).findings if finding.level == "warning"]
    assert any("rtn-w3/s0/quantize.json: made with the options" in line for line in lines), lines


def test_quick_leaves_out_big_files_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobie.check.files.BIG_FILE", 4000)
    flip(run(folder) / "checkpoint" / "block-001.safetensors")
    report = check(folder, Options(quick=True))
    assert report.counts["error"] == 0
    assert any("were not hashed" in finding.what for finding in report.findings)


def test_a_folder_of_records_alone_is_checked(folder: Path, tmp_path: Path) -> None:
    """Records and tables as somebody else gets them: no checkpoint, no configuration beside them."""
    elsewhere = tmp_path / "unpacked"
    shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("checkpoint", "windows", "calibration"))
    report = check(elsewhere, Options())
    lines = [finding.line() for finding in report.findings]
    assert any("bits are not compared with files" in line for line in lines)
    edit(run(elsewhere) / "tasks.json", lambda r: set_value(r, "piqa.acc", value=0.9))
    assert check(elsewhere, Options()).counts["error"] > 0


def test_only_the_suite_that_is_asked_for(folder: Path) -> None:
    shutil.copytree(folder / SUITE, folder / "other")
    assert check(folder, Options(suite=SUITE)).counts["error"] == 0
    assert check(folder, Options()).counts["error"] > 0


def test_exit_status_and_json(folder: Path) -> None:
    clean = CliRunner().invoke(main, ["check", str(folder)])
    assert (clean.exit_code, clean.output.splitlines()[-1].startswith("checked 12 records")) == (0, True)
    flip(run(folder) / "checkpoint" / "block-001.safetensors")
    damaged = CliRunner().invoke(main, ["check", str(folder), "--json"])
    found = json.loads(damaged.stdout)
    assert damaged.exit_code == 1
    assert found["counts"]["error"] == len([f for f in found["findings"] if f["level"] == "error"]) > 0


def test_wrong_input_is_told(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with pytest.raises(DataError, match="no record, expected files"):
        check(tmp_path / "results", Options())
    assert CliRunner().invoke(main, ["check", str(tmp_path / "results")]).exit_code == 2
    assert CliRunner().invoke(main, ["check", str(tmp_path / "nothing")]).exit_code == 2


@pytest.mark.parametrize("data", [b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000])
def test_strict_json_refuses(data: bytes) -> None:
    with pytest.raises(Damaged):
        parse_json(data)


def test_a_tensor_file_is_read_as_the_library_reads_it(finished: Path) -> None:
    from safetensors import safe_open

    path = run(finished / "results") / "checkpoint" / "block-000.safetensors"
    own = read_tensor_file(path)
    with safe_open(path, "np") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == own.shapes  # noqa: SIM118
        assert {name: file.get_tensor(name).nbytes for name in own.sizes} == own.sizes
        assert file.metadata() == own.metadata
