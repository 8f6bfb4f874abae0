"""Adding a method is one Python file and one YAML: a made-up one goes through every part of the house."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from working_copy import copy_environment, mobie, snakemake, working_copy

from mobie.paths import Layout
from mobie.records import Measurement, Record, write_record
from mobie.tables.table2 import TASK_METRICS

METHOD = '''"""Made up: as many levels as a row can have between its smallest and its largest weight, at 5 bits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mobie.methods.base import LinearStats, Method, register
from mobie.packing.base import Packed
from mobie.packing.grid import Grid, encode, fit_grid


@register
@dataclass(frozen=True)
class Levels(Method):
    """Every weight to the nearest of 32 levels."""

    name: ClassVar[str] = "levels"

    bits: int = 5

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        scale, zero = fit_grid(weight, self.bits, None)
        codes = encode(weight, scale, zero, self.bits, None)
        return Grid.pack(codes, scale, zero, bits=self.bits, group_size=None, paper=float(self.bits))
'''
CONFIG = {
    "method": "levels",
    "label": "Levels",
    "paper": {"method": "NoWag", "bits": None},  # stands for a row that the suite has no method for
    "description": "Made up.",
}
NAME, MODEL, SUITE = "made-up", "nano-olmoe", "tiny"
KINDS = ("quantize", "perplexity", "tasks", "routing")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with one file more under `mobie`, one under `workflow`, and the method in a suite."""
    folder = working_copy(tmp_path_factory.mktemp("house"), resources=False)
    (folder / "mobie" / "methods" / "levels.py").write_text(METHOD)
    (folder / "workflow" / "config" / "methods" / f"{NAME}.yaml").write_text(yaml.safe_dump(CONFIG))
    suite = folder / "workflow" / "config" / "suites" / f"{SUITE}.yaml"
    suite.write_text(yaml.safe_dump(yaml.safe_load(suite.read_text()) | {"methods": ["fp16", NAME, "mobie"]}))
    return folder


def run(house: Path, *arguments: str) -> str:
    """Standard output of a verb that succeeds."""
    done = mobie(house, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_verbs_know_it(house: Path) -> None:
    assert NAME in run(house, "methods")
    generator = np.random.default_rng(0)
    files = {"weight": generator.normal(size=(6, 16)), "inputs": generator.normal(size=(40, 16))}
    options = []
    for name, values in files.items():
        np.save(house / f"{name}.npy", values.astype(np.float32))
        options += [f"--{name}", f"{name}.npy"]
    assert json.loads(run(house, "try", NAME, *options, "--json"))["bits"]["paper"] == 5


def test_the_contract_tests_take_it_in(house: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_method_contract.py"]
    done = subprocess.run(
        [*command, "-k", NAME], cwd=house, env=copy_environment(house), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_it_is_planned_with_its_own_code(house: Path) -> None:
    target = "results/table2.csv"
    text = run(house, "plan", target, "--config", f"suite={SUITE}", "--machine", "ram=64GB,disk=100GB", "--json")
    assert json.loads(text)["models"][MODEL]["quantize_core_hours"][NAME] > 0
    dry = snakemake(house, "-n", "--config", f"suite={SUITE}", "--", target)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    for kind in KINDS:
        assert f"results/{SUITE}/{MODEL}/{NAME}/s0/{kind}.json" in dry.stdout + dry.stderr


def test_tables_and_figures_show_it(house: Path) -> None:
    layout = Layout(house)
    measurements = {
        "quantize": [Measurement(f"bits_{kind}", 5.25, None, 100) for kind in ("paper", "codes", "stored")],
        "perplexity": [Measurement("wiki.perplexity", 33.5, 0.5, 99)],
        "tasks": [Measurement(f"{task}.{metric}", 0.75, 0.01, 200, 0.25) for task, metric in TASK_METRICS.items()],
    }
    for kind, found in measurements.items():
        record = Record(kind, "ok", None, SUITE, MODEL, NAME, 0, "p", measurements=tuple(found))
        write_record(layout.record(SUITE, MODEL, NAME, 0, kind), record)
    for name in ("table2", "table7"):
        run(house, "table", name, "--suite", SUITE)
        with layout.table(name, "csv").open(newline="") as file:
            (row,) = [row for row in csv.DictReader(file) if row["config"] == NAME]
        assert (row["method"], row["bits"], row["avg7"], row["wikitext2_ppl"]) == ("NoWag", "5.25", "75.00", "33.50")
    run(house, "figure", "pareto", "--suite", SUITE)
    with layout.figure("pareto", "csv").open(newline="") as file:
        points = {row["panel"]: row for row in csv.DictReader(file) if row["config"] == NAME}
    assert {panel: (row["series"], row["x"], row["y"]) for panel, row in points.items()} == {
        "accuracy": ("Levels", "5.25", "75"),
        "perplexity": ("Levels", "5.25", "33.5"),
    }
