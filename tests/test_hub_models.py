"""A small random model of every architecture goes the way of the paper's models: mirror, lock, fetch, quantize, score.

The mirror is hub-shaped: a repository of weights in several files under the names that the hub's checkpoints have, and
a data set with the files of WikiText-2. Nothing else is made up: the verbs are those that the rules call.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from tiny import CONFIGS, VOCABULARY, make_model, tokenizer
from working_copy import mobie, snakemake, working_copy

from mobie.cli import main
from mobie.lock import load_lock
from mobie.paths import Layout
from mobie.records import Record, read_record

SUITE = "hub"
SOURCE = "wikitext"
TEXT, CALIBRATION = "wikitext2", "wikitext2-calibration"
WINDOW = 16


def model_name(model_type: str) -> str:
    return f"tiny-{model_type.replace('_', '-')}"


def write_mirror(mirror: Path, model_types: list[str]) -> Path:
    """Hub-shaped repositories: one model of each type in several files, and a data set."""
    for model_type in model_types:
        folder = mirror / "tiny" / model_type
        make_model(model_type).save_pretrained(folder, max_shard_size="20KB")
        tokenizer().save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
    data = mirror / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    data.mkdir(parents=True)
    for split, first in (("train", 2), ("test", 5)):
        words = [f"w{first + (i * i + first) % (VOCABULARY - 8)}" for i in range(4000)]
        lines = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
        pq.write_table(pa.table({"text": lines}), data / f"{split}-00000-of-00001.parquet")
    (data.parent / "README.md").write_text("---\n---\n")
    return mirror


def write_suite(layout: Layout, model_types: list[str]) -> None:
    """Configure the models and a suite of them, from the suite `tiny`."""
    example = yaml.safe_load(layout.config_file("models", "olmoe-1b-7b").read_text())
    for model_type in model_types:
        size = sum(parameter.numel() for parameter in make_model(model_type).parameters())
        changes = {"repo": f"tiny/{model_type}", "revision": None, "parameters": size, "bytes": 4 * size, "label": None}
        changes |= {"resources": {"mem_mb": 4000, "gpu": 0}}
        changes |= {"calibration": {"text": CALIBRATION, "sequences": 6, "length": WINDOW}}
        path = layout.config_file("models", model_name(model_type))
        path.write_text(yaml.safe_dump(example | changes))
    suite = yaml.safe_load(layout.config_file("suites", "tiny").read_text())
    suite |= {"protocol": SUITE, "models": [model_name(t) for t in model_types], "wikitext2_text": TEXT}
    suite["calibration"] = {"sequences": 6, "length": WINDOW}
    suite["sweep"]["texts"] = dict.fromkeys(suite["sweep"]["texts"], CALIBRATION)
    layout.config_file("suites", SUITE).write_text(yaml.safe_dump(suite))
    protocol = yaml.safe_load(layout.config_file("protocols", "tiny").read_text())
    protocol["perplexity"] = [protocol["perplexity"][0] | {"text": TEXT, "window": WINDOW}]
    protocol["gate"]["text"] = TEXT
    layout.config_file("protocols", SUITE).write_text(yaml.safe_dump(protocol))


def run(*arguments: str) -> str:
    """Run a verb in this process."""
    shown = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown.output


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_model_of_every_architecture_goes_from_the_mirror_to_a_perplexity(
    model_type: str, repository: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBIE_MIRROR", str(write_mirror(tmp_path / "mirror", [model_type])))
    write_suite(repository, [model_type])
    model = model_name(model_type)
    keys = ("--suite", SUITE, "--model", model)

    run("lock", model, SOURCE)
    locked = load_lock(repository).models[model]
    assert locked.repo == f"tiny/{model_type}" and "config.json" in locked.files
    run("fetch", SOURCE)
    run("fetch", "--model", model)
    run("calibrate", *keys)
    run("windows", *keys, "--text", TEXT)
    for method in ("fp16", "mobie"):
        run("quantize", *keys, "--method", method)
        run("score-perplexity", *keys, "--method", method)

    quantized, scored = (record_of(repository, model, "mobie", kind) for kind in ("quantize", "perplexity"))
    assert {m.name for m in quantized.measurements} == {"bits_paper", "bits_codes", "bits_stored"}
    (measured,) = [m for m in scored.measurements if m.name == f"{TEXT}.perplexity"]
    reference = record_of(repository, model, "fp16", "perplexity").measurements[0].value
    assert measured.value != reference
    assert abs(measured.value / reference - 1) < 1  # a binarized random model is still near a uniform guess


def record_of(layout: Layout, model: str, method: str, kind: str) -> Record:
    record = read_record(layout.record(SUITE, model, method, 0, kind))
    assert record.ok, (kind, record.status, record.reason, record.details.get("traceback"))
    return record


def test_the_workflow_takes_a_locked_model_from_the_mirror_and_makes_nothing_twice(tmp_path: Path) -> None:
    mirror = write_mirror(tmp_path / "mirror", ["olmoe"])
    copy = working_copy(tmp_path / "copy", resources=False)
    layout, model = Layout(copy), model_name("olmoe")
    write_suite(layout, ["olmoe"])
    assert mobie(copy, "lock", "--mirror", str(mirror), model, SOURCE).returncode == 0
    target = layout.record(SUITE, model, "mobie", 0, "perplexity")
    command = ["--cores", "2", "--config", f"suite={SUITE}", f"mirror={mirror}", "--", str(target.relative_to(copy))]

    shown = snakemake(copy, *command)
    assert shown.returncode == 0, shown.stderr
    assert "6 of 6 steps (100%) done" in shown.stderr
    assert record_of(layout, model, "mobie", "perplexity").measurements
    assert "not pinned" not in layout.log("fetch", "models", model).read_text()
    again = snakemake(copy, *command)
    assert "Nothing to be done" in again.stdout + again.stderr
