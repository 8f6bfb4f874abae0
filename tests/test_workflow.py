"""The DAG, without running its jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mobie.config import load_method, load_suite, method_classes
from mobie.data.self_sampled import SELF_SAMPLED
from mobie.errors import ConfigError
from mobie.figures import FIGURES, figure_records, figures_of
from mobie.jobs import stale
from mobie.jobs.keys import Keys, model_files
from mobie.jobs.methods import method_modules
from mobie.jobs.score import REFERENCE
from mobie.paths import PACKAGE, Layout
from mobie.plan.graph import TRAINED, Graph
from mobie.records import Record, write_record
from mobie.tables import TABLES, table_records, tables_of
from mobie.verdicts import verdict_records


def snakemake(root: Path, *arguments: str, path: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    """Run Snakemake in a folder; `path` is put before all other places that Python imports from."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(PACKAGE.parent)])}
    command = [sys.executable, "-m", "snakemake", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def planned(shown: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Jobs by rule, from a dry run's table."""
    assert shown.returncode == 0, shown.stdout + shown.stderr
    text = shown.stdout + shown.stderr
    table = text[text.index("Job stats:") :].split("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """A folder that makes imports of heavy libraries fail."""
    folder = tmp_path / "light"
    folder.mkdir()
    for library in ("torch", "transformers", "datasets", "lm_eval", "evalplus"):
        (folder / f"{library}.py").write_text(f"raise ImportError('{library} is not for planning')")
    return folder


@pytest.mark.parametrize("suite", ["smoke", "tiny", "paper"])
def test_a_suite_resolves_whole_without_torch(repository: Layout, no_torch: Path, suite: str) -> None:
    jobs = planned(snakemake(repository.root, "-n", "--config", f"suite={suite}", path=no_torch))
    assert Counter(job.rule.name for job in Graph(repository, suite).jobs(["all"])) == {
        name: count for name, count in jobs.items() if name != "total"
    }  # `python -m mobie plan`
    assert jobs["table"] == len(TABLES)
    assert jobs["figure"] == len(FIGURES)
    assert jobs["claims"] == jobs["report"] == jobs["audit"] == 1
    assert not TRAINED.keys() & jobs.keys()
    wanted = {path for name in TABLES for path in table_records(name, suite, repository)}
    wanted |= {path for name in FIGURES for path in figure_records(name, suite, repository)}
    wanted |= set(verdict_records(suite, repository))
    for kind in (*stale.SCORERS, "code"):
        assert jobs[f"score_{kind}"] == sum(path.name == f"{kind}.json" for path in wanted), kind
    assert jobs["generate_code"] == jobs["score_code"]
    usage = {path for path in wanted if path.name == "expert_usage.json"}  # of tokens: no method is run
    assert jobs["expert_usage"] == len(usage)
    texts = {path: load_method(path.parents[1].name, repository).calibration.text for path in wanted}
    writers = {path.parents[2].name for path, text in texts.items() if text in SELF_SAMPLED}
    assert jobs["self_sample"] == len(writers)
    runs = {path.parent for path in wanted - usage}
    references = {path.parents[2] / REFERENCE / path.parent.name for path in wanted if path.name == "routing.json"}
    assert jobs["quantize"] == len(runs | references)


def test_the_comparison_per_stored_bit_resolves_whole(repository: Layout) -> None:
    jobs = planned(snakemake(repository.root, "-n", "--config", "suite=beyond"))
    config = load_suite("beyond", repository)
    assert Counter(job.rule.name for job in Graph(repository, "beyond").jobs(["all"])) == {
        name: count for name, count in jobs.items() if name != "total"
    }
    assert jobs["table"] == len(tables_of(config)) and jobs["figure"] == len(figures_of(config))
    assert {"score_tasks", "claims", "report"}.isdisjoint(jobs)
    wanted = {path for name in tables_of(config) for path in table_records(name, "beyond", repository)}
    wanted |= {path for name in figures_of(config) for path in figure_records(name, "beyond", repository)}
    for kind in ("perplexity", "routing"):
        assert jobs[f"score_{kind}"] == sum(path.name == f"{kind}.json" for path in wanted), kind


def test_table2_of_the_smoke_suite_needs_its_own_records_only(repository: Layout) -> None:
    shown = snakemake(repository.root, "-n", "results/table2.csv")
    jobs = planned(shown)
    assert (shown.stdout + shown.stderr).count("priority: 100") == 3  # the gate, and what it reads of fp16
    methods = len(load_suite("smoke", repository).methods)
    for rule in ("quantize", "score_perplexity", "score_tasks", "score_routing"):
        assert jobs[rule] == methods
    assert jobs["gate"] == 1
    assert jobs["fetch_wheel"] == jobs["mirror"] == jobs["calibrate"] == jobs["table"] == 1
    assert jobs["windows"] == 4  # three texts for perplexity, one for routing
    assert "score_hard" not in jobs and "figure" not in jobs


def test_table2_of_the_paper_suite_fetches_its_models_and_data(repository: Layout) -> None:
    jobs = planned(snakemake(repository.root, "-n", "--config", "suite=paper", "--", "results/table2.csv"))
    suite = load_suite("paper", repository)
    assert jobs["quantize"] == len(suite.methods) * len(suite.models) == 36
    assert jobs["fetch_model"] == jobs["calibrate"] == 3
    assert jobs["fetch_hub_data"] == len(suite.benchmarks) + 3  # and the texts of the three perplexities
    assert "mirror" not in jobs and "fetch_wheel" not in jobs


@pytest.mark.parametrize("rule", TRAINED)
def test_training_resolves(repository: Layout, rule: str) -> None:
    shown = snakemake(repository.root, "-n", "--printshellcmds", rule)
    assert planned(shown)[rule] == 1
    assert f"train-nano --model {TRAINED[rule]} " in shown.stdout + shown.stderr


def test_one_job_of_another_seed_can_be_asked_for(repository: Layout) -> None:
    target = repository.record("smoke", "nano-olmoe", "rtn-w4", 3, "perplexity").relative_to(repository.root)
    shown = snakemake(repository.root, "-n", str(target))
    assert planned(shown)["score_perplexity"] == 1
    assert "wiki-calibration-n128-l256-s3.safetensors" in shown.stdout + shown.stderr


@pytest.mark.parametrize(
    ("suite", "change", "message"),
    [
        ("smke", {}, "unknown suite 'smke'; did you mean smoke?"),
        ("smoke", {"protocl": "smoke"}, "unknown key 'protocl'; did you mean protocol?"),
        ("smoke", {"methods": ["mobi"]}, "unknown method 'mobi'"),
    ],
)
def test_mistakes_in_a_suite_are_one_message(repository: Layout, suite: str, change: dict, message: str) -> None:
    path = repository.config_file("suites", "smoke")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    shown = snakemake(repository.root, "-n", "--config", f"suite={suite}")
    assert shown.returncode != 0
    assert message in shown.stdout + shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr


def test_a_finished_table_needs_no_job_until_something_that_decides_it_changes(repository: Layout) -> None:
    path = repository.config_file("suites", "smoke")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"methods": ["rtn-w3"]}))
    root = repository.root
    keys = Keys(repository, "smoke", "nano-olmoe", 0, "rtn-w3")
    for kind in ("quantize", "perplexity", "tasks", "routing"):
        write_record(keys.record(kind), Record(kind, "failed", "not tried", "smoke", "nano-olmoe", "rtn-w3", 0, "p"))
    gate = replace(keys, method=REFERENCE).record("gate")
    write_record(gate, Record("gate", "failed", "not tried", "smoke", "nano-olmoe", REFERENCE, 0, "p"))
    # only the table runs: its inputs are taken as they are
    target = ("--", "results/table2.csv")
    built = snakemake(root, "--cores", "1", "--allowed-rules", "table", "--rerun-triggers", "params", "mtime", *target)
    assert built.returncode == 0, built.stdout + built.stderr
    again = snakemake(root, "-n", "--allowed-rules", "table", *target)
    assert "Nothing to be done" in again.stdout + again.stderr, again.stdout + again.stderr
    label = repository.config_file("methods", "rtn-w3")
    label.write_text(yaml.safe_dump(yaml.safe_load(label.read_text()) | {"label": "Nearest"}))
    changed = snakemake(root, "-n", "--allowed-rules", "table", *target)
    assert planned(changed)["table"] == 1


def test_methods_found_by_syntax_are_those_that_register() -> None:
    registered = {name: cls.__module__ for name, cls in method_classes().items()}
    assert method_modules() == registered


def test_each_method_has_its_own_code_hash() -> None:
    hashes = {name: stale.quantize_code(name) for name in method_modules()}
    assert len(set(hashes.values())) == len(hashes)
    with pytest.raises(ConfigError, match="did you mean"):
        stale.quantize_code("gptqq")


def test_model_files_of_a_hub_model_are_its_stamp(repository: Layout) -> None:
    keys = Keys(repository, "paper", "olmoe-1b-7b", 0)
    assert model_files(keys.model, keys.model_config, repository) == [repository.hub_model_stamp("olmoe-1b-7b")]
