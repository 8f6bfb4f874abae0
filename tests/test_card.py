"""The model card: what it says is what records and configuration say, and it never shows another checkpoint's score."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mobie.calibration.tokens import TokensOrigin, save_tokens
from mobie.config import load_method
from mobie.hf import card as card_module
from mobie.hf.card import refresh_card, refresh_cards
from mobie.jobs.keys import Keys
from mobie.jobs.quantize import quantize_job
from mobie.paths import Layout
from mobie.records import Measurement, Record, read_record, write_record

METHOD = "gptq-w3"


@pytest.fixture
def keys(repository: Layout) -> Keys:
    return Keys(repository, "smoke", "nano-olmoe", 0, METHOD)


def finish(keys: Keys, manifest: str = "manifest") -> str:
    """A finished checkpoint with the record of its making, in numbers that nothing else gives."""
    keys.checkpoint.mkdir(parents=True, exist_ok=True)
    (keys.checkpoint / "manifest.json").write_text(manifest)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    bits = {"paper": 2.25, "codes": 1.5, "stored": 2.625}
    record = Record(
        kind="quantize",
        status="ok",
        reason=None,
        suite="smoke",
        model="nano-olmoe",
        method=keys.method,
        seed=0,
        protocol="p",
        measurements=tuple(Measurement(f"bits_{kind}", value, None, 8000) for kind, value in bits.items()),
        details={
            "bits_by_component": {"experts": {**bits, "weights": 8000}},
            "bytes_by_item": {"a": 2000, "b": 625},
            "kept_bytes": 1000,
            "file_bytes": 3650,
            "manifest": digest,
        },
        provenance={
            "command": ["python", "-m", "mobie", "quantize", "--method", keys.method],
            "finished": "2026-01-02T03:04:05+00:00",
            "git_commit": "c0ffee",
            "code": "d00d" * 16,
            "inputs": {"model": "beef" * 16},
            "versions": {"torch": "2.0", "absent": None},
        },
    )
    write_record(keys.record("quantize"), record)
    return digest


def score(keys: Keys, kind: str, checkpoint: str, *measurements: Measurement, **values: Any) -> None:
    record = Record(
        kind=kind,
        **({"status": "ok", "reason": None, "protocol": "p"} | values),
        suite="smoke",
        model="nano-olmoe",
        method=keys.method,
        seed=0,
        measurements=measurements,
        provenance={"inputs": {"checkpoint": checkpoint}} if measurements else {},
    )
    write_record(keys.record(kind), record)


def text_of(keys: Keys) -> str:
    path = refresh_card(keys)
    assert path == keys.checkpoint / "README.md"
    return path.read_text()


def row(text: str, first: str) -> list[str]:
    """Cells of the table row that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_front_matter_is_the_hubs(keys: Keys) -> None:
    finish(keys)
    text = text_of(keys)
    assert text.startswith("---\n")
    values = yaml.safe_load(text.split("---\n")[1])
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "text-generation"
    assert {"mobie", "gptq"} <= set(values["tags"])
    assert "base_model" not in values  # the embedded model is on no hub


def test_model_from_the_hub_is_named_with_its_licence(repository: Layout) -> None:
    keys = Keys(repository, "smoke", "olmoe-1b-7b", 0, METHOD)
    finish(keys)
    text = text_of(keys)
    values = yaml.safe_load(text.split("---\n")[1])
    assert values["base_model"] == "allenai/OLMoE-1B-7B-0125" and values["base_model_relation"] == "quantized"
    assert "licence of the original model applies" in text


def test_card_tells_bits_and_bytes_of_the_ledger(keys: Keys) -> None:
    finish(keys)
    text = text_of(keys)
    assert row(text, "experts") == ["experts", "8,000", "2.250", "1.500", "2.625", "2,625"]
    assert row(text, "all of these")[-1] == "2,625"
    assert row(text, "kept in 16 bits") == ["kept in 16 bits", "500", "16", "16", "16", "1,000"]
    assert "3,650 bytes, 0.69% more" in text  # 3650 / 3625
    assert f"{keys.model_config.bytes:,}" in text


def test_card_tells_every_setting_with_its_value(keys: Keys) -> None:
    finish(keys)
    text = text_of(keys)
    options = load_method(METHOD).build().options
    assert options["bits"] == 3
    for name, value in options.items():
        assert row(text, f"`{name}`")[1] == f"`{value}`"
    assert row(text, "calibration windows")[1] == "128 of 256 tokens, seed 0"


def test_card_tells_how_to_load_and_to_talk_and_what_the_model_is(keys: Keys) -> None:
    finish(keys)
    text = text_of(keys)
    for needed in ("import mobie", "AutoModelForCausalLM.from_pretrained(folder", "python -m mobie chat"):
        assert needed in text
    assert "random weights" in text
    assert "not one of the paper's models" in text  # the model's own notes
    assert row(text, "made with")[1] == f"`python -m mobie quantize --method {METHOD}`"
    assert row(text, "versions")[1] == "torch 2.0"


def test_what_is_not_measured_says_which_command_measures_it(keys: Keys) -> None:
    finish(keys)
    text = text_of(keys)
    for kind in ("perplexity", "tasks"):
        path = f"results/smoke/nano-olmoe/{METHOD}/s0/{kind}.json"
        assert f"not measured yet: run `snakemake --cores all {path}`" in text
    assert "Harder tasks" not in text


def test_scores_stand_beside_the_model_in_16_bits(keys: Keys) -> None:
    manifest = finish(keys)
    reference = Keys(keys.layout, "smoke", "nano-olmoe", 0, "fp16")
    score(keys, "perplexity", manifest, Measurement("wiki.perplexity", 56.789, 0.5, 16320))
    score(reference, "perplexity", "other", Measurement("wiki.perplexity", 32.1, 0.25, 16320))
    score(keys, "tasks", manifest, Measurement("piqa.acc", 0.625, 0.03, 200, 0.5))
    score(reference, "tasks", "other", Measurement("piqa.acc", 0.7, 0.03, 200, 0.5), protocol="another")
    text = text_of(keys)
    assert row(text, "wiki") == ["wiki", "56.79 ± 0.50", "32.10 ± 0.25", "16,320"]
    # measured under another protocol: not comparable
    assert row(text, "piqa.acc") == ["piqa.acc", "62.5% ± 3.0%", "not measured", "50.0%", "200"]
    assert "at chance" not in text


def test_score_in_16_bits_that_comes_later_reaches_every_card(keys: Keys) -> None:
    reference, damaged = (Keys(keys.layout, "smoke", "nano-olmoe", 0, name) for name in ("fp16", "billm"))
    score(keys, "perplexity", finish(keys), Measurement("wiki.perplexity", 56.789, 0.5, 16320))
    refresh_cards(keys)
    assert row((keys.checkpoint / "README.md").read_text(), "wiki")[2] == "not measured"
    finish(damaged)
    damaged.record("quantize").write_text("{")
    score(reference, "perplexity", finish(reference), Measurement("wiki.perplexity", 32.1, 0.25, 16320))
    refresh_cards(reference)
    assert row((keys.checkpoint / "README.md").read_text(), "wiki")[2] == "32.10 ± 0.25"
    assert (reference.checkpoint / "README.md").is_file()


def test_chance_level_is_named(keys: Keys) -> None:
    manifest = finish(keys)
    values = [Measurement("piqa.acc", 0.55, 0.03, 200, 0.5), Measurement("arc_easy.acc", 0.4, 0.03, 200, 0.25)]
    score(keys, "tasks", manifest, *values)
    text = text_of(keys)
    assert row(text, "piqa.acc")[1] == "55.0% ± 3.0% *at chance*"
    assert row(text, "arc_easy.acc")[1] == "40.0% ± 3.0%"
    assert "not above guessing" in text


def test_score_of_another_checkpoint_is_not_shown(keys: Keys) -> None:
    finish(keys)
    score(keys, "perplexity", "0" * 64, Measurement("wiki.perplexity", 56.789, 0.5, 16320))
    text = text_of(keys)
    assert "56.79" not in text and "perplexity.json`" in text


def test_score_that_failed_says_why(keys: Keys) -> None:
    finish(keys)
    score(keys, "perplexity", "", status="oom", reason="no memory left")
    assert "oom: no memory left" in text_of(keys)


def test_no_card_without_a_finished_checkpoint_or_for_another_one(keys: Keys) -> None:
    assert refresh_card(keys) is None
    finish(keys)
    (keys.checkpoint / "manifest.json").write_text("changed")
    assert refresh_card(keys) is None
    assert not (keys.checkpoint / "README.md").exists()


def test_jobs_at_the_same_time_lose_no_score(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job records its score while the first one is writing the card: the card has both."""
    manifest = finish(keys)
    score(keys, "perplexity", manifest, Measurement("wiki.perplexity", 56.789, 0.5, 16320))
    reading, write_text = threading.Event(), card_module.write_text
    second = threading.Thread(target=refresh_card, args=(keys,))

    def slow(path: Path, text: str) -> None:
        if not reading.is_set():  # the first job has read the records
            reading.set()
            score(keys, "tasks", manifest, Measurement("piqa.acc", 0.625, 0.03, 200, 0.5))
            second.start()
            second.join(timeout=0.3)
            assert second.is_alive()  # it waits
        write_text(path, text)

    monkeypatch.setattr(card_module, "write_text", slow)
    refresh_card(keys)
    second.join(timeout=10)
    text = (keys.checkpoint / "README.md").read_text()
    assert "56.79" in text and "62.5%" in text


def test_quantize_job_writes_a_card_that_fits_its_record(repository: Layout) -> None:
    keys = Keys(repository, "smoke", "nano-olmoe", 0, "rtn-w4")
    tokens = torch.randint(2, 4000, (2, 16), generator=torch.Generator().manual_seed(0))
    save_tokens(keys.calibration, tokens, TokensOrigin("text", "sha256", "sha256", 0))
    assert quantize_job(keys, progress=False).ok
    text = (keys.checkpoint / "README.md").read_text()
    details = read_record(keys.record("quantize")).details
    held = sum(details["bytes_by_item"].values()) + details["kept_bytes"]
    assert f"{details['file_bytes']:,} bytes" in text
    assert details["file_bytes"] == sum(path.stat().st_size for path in keys.checkpoint.glob("*.safetensors"))
    assert 1 < details["file_bytes"] / held < 1.01
    assert str(repository.root) not in text
