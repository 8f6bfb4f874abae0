"""Profiles: every line explained, every key known to Snakemake, and the paper suite planned with each."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest
import yaml
from test_workflow import planned, snakemake

from mobie.config import load_suite
from mobie.jobs.cost import WORK, estimate
from mobie.jobs.keys import Keys
from mobie.jobs.stale import SCORERS
from mobie.paths import PACKAGE, Layout

PROFILES = PACKAGE.parent / "workflow" / "profiles"
NAMES = sorted(path.parent.name for path in PROFILES.glob("*/config.yaml"))
RULES = PACKAGE.parent / "workflow" / "rules"
VERBS_ON_LOGIN_NODE = {
    "fetch",
    "table",
    "figure",
    "claims",
    "report",
    "audit",
}  # the network, or seconds without a model
FILES = [*sorted(PROFILES.glob("*/config.yaml")), *sorted(PROFILES.glob("*/*.env"))]


def profile(name: str) -> dict:
    return yaml.safe_load((PROFILES / name / "config.yaml").read_text())


def snakemake_options() -> dict[str, argparse.Action]:
    """Options of Snakemake's own parser, with those of its executor plug-ins, by name without dashes."""
    from snakemake.cli import get_argument_parser

    parser = get_argument_parser()
    return {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}


def test_the_profiles_of_the_readme_exist() -> None:
    assert NAMES == ["apptainer", "default", "slurm", "slurm-apptainer"]
    text = (PROFILES / "README.md").read_text()
    assert all(f"`{name}`" in text for name in NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_line_is_commented(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines
    for line in lines:
        assert re.search(r"(^|\s)#\s*\S", line), line
        assert len(line) <= 120, line


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_an_option_of_snakemake(name: str) -> None:
    options = snakemake_options()
    for key, value in profile(name).items():
        assert key in options, f"{name}: {key}"
        action = options[key]
        if isinstance(value, bool):
            assert action.nargs == 0, f"{key} takes a value"
        if action.choices is not None:
            assert value in action.choices, f"{key}: {value}"


def test_a_job_that_a_cluster_kills_is_submitted_again_by_snakemake_alone() -> None:
    assert profile("slurm")["retries"] >= 1
    assert profile("slurm")["slurm-no-requeue"] is True


def test_slurm_apptainer_is_both() -> None:
    image = {key: value for key, value in profile("apptainer").items() if "apptainer" in f"{key}{value}"}
    assert len(image) == 2
    assert profile("slurm-apptainer") == profile("slurm") | image


def test_rules_named_in_profiles_exist(repository: Layout) -> None:
    listed = snakemake(repository.root, "--list-rules").stdout.split()
    for name in NAMES:
        for key in ("set-resources", "set-threads"):
            assert set(profile(name).get(key, {})) <= set(listed)


def test_caches_of_a_container_are_named_by_its_image() -> None:
    text = (PROFILES.parent.parent / "containers" / "mobie.def").read_text()
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert re.search(rf'^ *export .*{variable}="\$MOBIE_CACHE', text, re.MULTILINE), variable
    assert profile("apptainer")["apptainer-args"] == "--nv"


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: Snakemake asks for its version, also in a dry run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "apptainer").write_text("#!/bin/sh\necho apptainer version 1.4.5\n")
    (folder / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("apptainer")
@pytest.mark.parametrize("name", NAMES)
def test_jobs_of_the_paper_suite_are_planned_with_every_profile(repository: Layout, name: str) -> None:
    image = repository.root / "containers" / "mobie.sif"  # with apptainer it must be there; a dry run does not read it
    image.parent.mkdir(exist_ok=True)
    image.touch()
    keys = Keys(repository, "paper", "olmoe-1b-7b", 0, "mobie")
    targets = [str(keys.record(kind).relative_to(repository.root)) for kind in ("quantize", "speed")]
    shown = snakemake(repository.root, "-n", "--workflow-profile", name, "--config", "suite=paper", "--", *targets)
    expected = dict.fromkeys(("fetch_model", "fetch_hub_data", "calibrate", "quantize", "speed"), 1)
    assert planned(shown) == expected | {"total": 5}
    asked = estimate("quantize", keys)
    lines = [set(line.strip().split(", ")) for line in shown.stdout.splitlines() if " resources: " in line]
    assert any(line >= {f"runtime={asked.minutes}", "gpu=1", f"mem_mb={asked.mem_mb}"} for line in lines)
    assert any("slurm_extra=--exclusive" in line for line in lines) == name.startswith("slurm")


def test_table2_of_the_paper_suite_is_planned_for_slurm(repository: Layout) -> None:
    suite = ("--config", "suite=paper", "--", "results/table2.csv")
    jobs = planned(snakemake(repository.root, "-n", "--workflow-profile", "slurm", *suite))
    paper = load_suite("paper", repository)
    assert jobs["quantize"] == len(paper.methods) * len(paper.models)


def test_only_downloads_and_targets_stay_on_the_login_node() -> None:
    """Compute nodes have no network: what fetches is local, and nothing that computes is. A dry run does not say it."""
    text = "\n".join(path.read_text() for path in sorted(RULES.glob("*.smk")))
    local = {name for block in re.findall(r"^localrules:\n((?: +\w+,\n)+)", text, re.M) for name in block.split(",")}
    local = {name.strip() for name in local if name.strip()}
    bodies = dict(re.findall(r"^rule (\w+):\n(.*?)(?=^rule |^localrules:|\Z)", text, re.M | re.S))
    verbs = {name: match[1] for name, body in bodies.items() if (match := re.search(r"MOBIE} ([\w-]+)", body))}
    assert {"fetch_model", "quantize", "speed", "calibrate", "windows", "mirror", "table"} <= set(verbs)
    assert local == {name for name, verb in verbs.items() if verb in VERBS_ON_LOGIN_NODE}


@pytest.mark.parametrize("kind", sorted({*SCORERS, *WORK}))
@pytest.mark.parametrize(
    ("suite", "model"), [("smoke", "nano-olmoe"), ("paper", "olmoe-1b-7b"), ("paper", "mixtral-8x7b")]
)
def test_each_attempt_asks_for_more(suite: str, model: str, kind: str) -> None:
    keys = Keys(Layout(PACKAGE.parent), suite, model, 0, "mobie")
    first, second, third = (estimate(kind, keys, attempt) for attempt in (1, 2, 3))
    assert 0 < first.mem_mb < second.mem_mb < third.mem_mb
    assert 0 < first.minutes < second.minutes < third.minutes
    assert first.mem_mb <= max(keys.model_config.resources.mem_mb, 4000)


def test_a_larger_model_asks_for_more() -> None:
    layout = Layout(PACKAGE.parent)
    small, large = (Keys(layout, "paper", model, 0, "mobie") for model in ("olmoe-1b-7b", "qwen3-30b-a3b"))
    for kind in ("quantize", "tasks", "perplexity"):
        assert estimate(kind, small).mem_mb < estimate(kind, large).mem_mb
        assert estimate(kind, small).minutes < estimate(kind, large).minutes


def test_what_was_measured_here_is_within_the_estimates() -> None:
    """Measured time and memory of finished smoke jobs, which Snakemake writes beside their logs."""
    layout = Layout(PACKAGE.parent)
    measured = layout.benchmarks("smoke")
    if not measured:
        pytest.skip("no finished jobs of the smoke suite here")
    for path in measured:
        if path.stem not in WORK:
            continue
        model, method, seed = path.relative_to(layout.root / "logs" / "smoke").parts[:3]
        asked = estimate(path.stem, Keys(layout, "smoke", model, int(seed[1:]), method))
        names, values = (line.split("\t") for line in path.read_text().splitlines()[:2])
        found = dict(zip(names, values, strict=True))
        if "NA" in (found["max_rss"], found["s"]) or found["max_rss"] == "-":
            continue  # too short to be measured
        assert float(found["max_rss"]) < asked.mem_mb, path
        assert float(found["s"]) < asked.minutes * 60, path
