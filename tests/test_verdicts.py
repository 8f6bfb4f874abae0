"""Verdicts on the paper's statements, from records made by hand; intervals against closed forms and scipy."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import gate_records
import numpy as np
import pytest
import scipy.stats
import yaml

from mobie.config import load_protocol, load_suite
from mobie.errors import ConfigError
from mobie.paper.audit import audit
from mobie.paths import PACKAGE, Layout
from mobie.records import Measurement, Record, read_record, write_record
from mobie.results import Results
from mobie.tables.table2 import TASK_METRICS
from mobie.tables.table8 import METRICS as HARD_METRICS
from mobie.tables.table8 import hard_kind
from mobie.verdicts import document, judge, to_markdown, verdict_records, write_claims
from mobie.verdicts.arithmetic import evaluate
from mobie.verdicts.comparisons import against
from mobie.verdicts.document import Relation, load_ours
from mobie.verdicts.sampling import RESAMPLES, Sampler, exact, half_width, seed_error
from mobie.verdicts.sources import PAPER_TEXTS, Drawn, Hole
from mobie.verdicts.verdict import MEANING, NOT_CHECKABLE, NOT_RUN, Verdicts
from mobie.verdicts.write import to_csv, to_json

SUITES = ("smoke", "paper")
Z = scipy.stats.norm.ppf(0.975)
WINDOWS = 64
TEXTS = {"smoke": ("wiki", "web", "books"), "paper": PAPER_TEXTS}


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    draws = Sampler().mean("a", values)
    assert draws.shape == (1 + RESAMPLES,)
    assert draws[0] == pytest.approx(values.mean(), rel=1e-12)
    assert half_width(draws) == pytest.approx(Z * values.std() / math.sqrt(400), rel=0.06)
    narrow = scipy.stats.norm.ppf(1 - 0.025 / 16) / Z
    assert half_width(draws, 16) == pytest.approx(narrow * half_width(draws), rel=1e-9)


def test_a_ratio_of_perplexities_is_paired() -> None:
    generator = np.random.default_rng(2)
    common = generator.normal(4, 0.5, 200)  # most of the spread is common to both methods
    one, other = common + generator.normal(-0.1, 0.02, 200), common + generator.normal(0, 0.02, 200)
    sampler = Sampler()
    draws = evaluate("100 * (a / b - 1)", {"a": np.exp(sampler.mean("t", one)), "b": np.exp(sampler.mean("t", other))})
    ratio = math.exp((one - other).mean())
    assert draws[0] == pytest.approx(100 * (ratio - 1))
    delta = 100 * ratio * (one - other).std() / math.sqrt(200)
    assert half_width(draws) == pytest.approx(Z * delta, rel=0.06)
    theirs = scipy.stats.bootstrap(
        (one, other),
        lambda a, b, axis=-1: 100 * (np.exp(a.mean(axis=axis) - b.mean(axis=axis)) - 1),
        paired=True,
        n_resamples=4000,
        rng=np.random.default_rng(3),
    )
    assert half_width(draws) == pytest.approx(Z * theirs.standard_error, rel=0.06)
    unpaired = evaluate(
        "100 * (a / b - 1)", {"a": np.exp(sampler.mean("t", one)), "b": np.exp(sampler.mean("u", other))}
    )
    assert half_width(unpaired) > 5 * half_width(draws)


def test_draws_do_not_depend_on_the_order_of_asking() -> None:
    first, second = Sampler(), Sampler()
    values = list(np.random.default_rng(4).random(50))
    first.mean("other", values)
    first.noise("other")
    assert np.array_equal(first.mean("key", values), second.mean("key", values))
    assert np.array_equal(first.noise("key"), second.noise("key"))
    assert not np.array_equal(first.noise("key"), first.noise("other"))


def test_calibration_spread_has_students_interval() -> None:
    assert seed_error(0.02, 3, mean=True, against_one_run=False) * Z == pytest.approx(
        scipy.stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    )
    one = seed_error(0.02, 3, mean=False, against_one_run=False)
    assert one * Z == pytest.approx(scipy.stats.t.ppf(0.975, 2) * 0.02)
    assert seed_error(0.02, 3, mean=False, against_one_run=True) == pytest.approx(math.sqrt(2) * one)


def test_an_exact_number_has_no_interval() -> None:
    draws = evaluate("0.1 + a / 3", {"a": exact(0.7)})
    assert half_width(draws) == 0.0


def test_arithmetic_over_lists_and_draws() -> None:
    a, b = np.array([[1.0, 5.0], [3.0, 1.0]]), np.array([2.0, 2.0])  # a list of two; (value, draw)
    assert evaluate("mean(a)", {"a": a}).tolist() == [2.0, 3.0]
    assert evaluate("min(a - b)", {"a": a, "b": b}).tolist() == [-1.0, -1.0]
    assert evaluate("max(a, b, 4 * b)", {"a": a, "b": b}).tolist() == [8.0, 8.0]
    assert evaluate("-abs(b - 5)", {"b": b}).tolist() == [-3.0, -3.0]
    assert evaluate("place(b, a)", {"a": a, "b": b}).tolist() == [2.0, 2.0]
    assert evaluate("place(b, b)", {"b": b}).tolist() == [1.0, 1.0]  # a tie does not push it down
    for wrong in ("a - b", "a.b", "nothing", "sqrt(b)", "__import__('os')", "1 +"):
        with pytest.raises(ConfigError):
            evaluate(wrong, {"a": a, "b": b})


def spread(value: float, half: float) -> np.ndarray:
    """Draws of a number with a given half-width."""
    return np.concatenate([[value], value + half / Z * np.array([1.0, -1.0] * (RESAMPLES // 2))])


@pytest.mark.parametrize(
    ("relation", "value", "expected"),
    [
        ({"above": 0}, 1.1, "holds"),
        ({"above": 0}, 0.9, "within noise"),
        ({"above": 0}, -0.9, "within noise"),
        ({"above": 0}, -1.1, "opposite"),
        ({"below": 5}, 3.9, "holds"),
        ({"below": 5}, 5.5, "within noise"),
        ({"below": 5}, 6.1, "opposite"),
        ({"not_above": 2}, 2.9, "holds"),
        ({"not_above": 2}, 3.1, "opposite"),
        ({"equals": "2.0"}, 3.04, "holds"),  # one of noise, 0.05 of rounding
        ({"equals": "2.0"}, 3.06, "opposite"),
        ({"equals": "2.0", "about": 0.5}, 3.5, "holds"),
    ],
)
def test_outcomes(relation: dict[str, float], value: float, expected: str) -> None:
    assert against(spread(value, 1.0), Relation(**relation)) == expected


def test_one_of_many_must_be_further_off_to_refute() -> None:
    draws = spread(-1.1, 1.0)
    assert against(draws, Relation(above=0), tests=1) == "opposite"
    assert against(draws, Relation(above=0), tests=2) == "within noise"
    assert against(-draws, Relation(above=0), tests=2) == "holds"


def test_exact_numbers_are_compared_exactly() -> None:
    assert against(exact(0.0), Relation(at_most=0), is_exact=True) == "holds"
    assert against(exact(0.0), Relation(below=0), is_exact=True) == "opposite"
    assert against(exact(1e-9), Relation(at_most=0), is_exact=True) == "opposite"


def test_a_measured_tie_decides_nothing() -> None:
    for relation in ({"below": 0}, {"at_most": 0}, {"above": 0}):
        assert against(exact(0.0), Relation(**relation)) == "within noise"


def test_a_place_must_be_held_in_nearly_all_resamples() -> None:
    def draws(share: float, value: float = 1.0) -> np.ndarray:
        count = round(share * RESAMPLES)
        return np.concatenate([[value], np.ones(count), np.full(RESAMPLES - count, 2.0)])

    place = Relation(place=1)
    assert against(draws(0.96), place) == "holds"
    assert against(draws(0.94), place) == "within noise"
    assert against(draws(0.06, 2.0), place) == "within noise"
    assert against(draws(0.04, 2.0), place) == "opposite"
    assert against(draws(0.04, 2.0), place, tests=3) == "within noise"


def test_relations_are_checked() -> None:
    for wrong in ({}, {"above": 1, "below": 2}, {"above": 1, "about": 1}):
        with pytest.raises(ValueError):
            Relation(**wrong)


# --- records ----------------------------------------------------------------------------------------------------------


def put(layout: Layout, suite: str, model: str, method: str, kind: str, values: Sequence[Measurement], details: Mapping,
        seed: int = 0, **how: str) -> None:  # fmt: skip
    path = layout.record(suite, model, method, seed, kind)
    state = {"status": "ok", "reason": None} | how
    write_record(
        path,
        Record(kind, suite=suite, model=model, method=method, seed=seed, protocol="p", measurements=tuple(values),
               details=details, **state),
    )  # fmt: skip


def put_perplexity(
    layout: Layout, suite: str, model: str, method: str, losses: float, seed: int = 0, noise: float = 0.0
) -> None:
    """Losses of windows: common to all methods but for `losses` and an own part of size `noise`."""
    own = np.random.default_rng(zlib.crc32(f"{method} {seed}".encode()))
    window_nll = {
        text: (np.random.default_rng(i).normal(losses, 0.3, WINDOWS) + own.normal(0, 1, WINDOWS) * noise).tolist()
        for i, text in enumerate(TEXTS[suite])
    }
    values = [Measurement(f"{t}.perplexity", math.exp(np.mean(nll)), 0.1, 100) for t, nll in window_nll.items()]
    put(layout, suite, model, method, "perplexity", values, {"window_nll": window_nll}, seed)


def put_tasks(
    layout: Layout, suite: str, model: str, method: str, right: Mapping[str, int] | int, n: int = 400
) -> None:
    """`right` of `n` items; a method that has more right has all those that another has."""
    answers, values = {}, []
    for task, metric in TASK_METRICS.items():
        count = right if isinstance(right, int) else right[task]
        answers[f"{task}.{metric}"] = [1.0] * count + [0.0] * (n - count)
        values.append(Measurement(f"{task}.{metric}", count / n, 0.02, n, 0.25))
    details = {"answers": answers, "items": {task: list(range(n)) for task in TASK_METRICS}}
    put(layout, suite, model, method, "tasks", values, details)


def put_bits(
    layout: Layout, suite: str, model: str, method: str, bits: float, seed: int = 0, seconds: float = 60
) -> None:
    values = [Measurement(f"bits_{k}", bits + e, None, 9) for k, e in (("paper", 0), ("codes", 0.1), ("stored", 0.5))]
    parts = {"experts": {"paper": bits, "codes": bits, "stored": bits, "weights": 9}}
    details = {
        "blocks": [{"block": 0, "cpu_seconds": seconds}],
        "bits_by_component": parts,
        "gradient_cpu_seconds": None,
    }
    put(layout, suite, model, method, "quantize", values, details, seed)


def put_all(layout: Layout, suite: str) -> None:
    """A record at every path that the verdicts ask for; values differ by method in a fixed way."""
    for path in verdict_records(suite, layout):
        *_, model, method, seed, kind = path.with_suffix("").parts
        place, number = zlib.crc32(method.encode()) % 50, int(seed[1:])
        if kind == "perplexity":
            put_perplexity(layout, suite, model, method, 3 + place / 50 + number / 1000, number, 0.02)
        elif kind == "tasks":
            put_tasks(layout, suite, model, method, 30 + place, n=100)
        elif kind == "quantize":
            put_bits(layout, suite, model, method, 1 + place / 50, number, 60 + place + number)
        elif kind == "routing":
            values = [Measurement(f"layer{i}.similarity", 0.9 - i / 100 - place / 500, 0.001, 99) for i in range(4)]
            values.append(Measurement("similarity", 0.88, 0.001, 99))
            put(layout, suite, model, method, kind, values, {})
        elif kind in ("hard", "code"):
            names = {task: f"{task}.{metric}" for task, metric in HARD_METRICS.items() if hard_kind(task) == kind}
            answers = {name: [1.0] * (60 + place) + [0.0] * (140 - place) for name in names.values()}
            values = [Measurement(name, sum(a) / 200, 0.03, 200, 0.25) for name, a in answers.items()]
            put(layout, suite, model, method, kind, values, {"answers": answers, "items": {t: [1] for t in names}})
        elif kind == "shift":
            parts = [f"{a}_weights.{b}_routing" for a in ("full", "quantized") for b in ("full", "shifted")]
            losses = {p: np.random.default_rng(5).normal(3 + i / 10, 0.2, 40).tolist() for i, p in enumerate(parts)}
            values = [Measurement(p, math.exp(np.mean(nll)), 0.1, 40) for p, nll in losses.items()]
            put(layout, suite, model, method, kind, values, {"window_nll": losses})
        elif kind == "cka":
            names = [f"layer{i}.{p}" for i in range(4) for p in ("gate", "up", "down")]
            values = [
                Measurement(f"{name}.{stage}", level + i / 100, None, 9, 0.0)
                for i, name in enumerate(names)
                for stage, level in (("before", 0.4), ("after", 0.2), ("after_binarized", 0.1))
            ]
            values += [Measurement(s, 0.3, None, 9, 0.0) for s in ("before", "after", "after_binarized")]
            put(layout, suite, model, method, kind, values, {})
        elif kind == "generations":
            put(layout, suite, model, method, kind, [Measurement("repetition", 0.1 + place / 100, 0.01, 5)], {})
        elif kind == "speed":
            put(layout, suite, model, method, kind, [Measurement("tokens_per_second", 20.0 + place, 0.5, 32)], {})
        elif kind == "gate":
            put(layout, suite, model, method, kind, gate_records.MEASUREMENTS, gate_records.details())
        else:
            raise AssertionError(f"no records of kind {kind} in this test")


def test_a_verdict_on_a_model_that_is_not_comparable_says_so(repository: Layout) -> None:
    put_all(repository, "paper")
    path = repository.record("paper", "olmoe-1b-7b", "fp16", 0, "gate")
    assert path in verdict_records("paper", repository)
    assert not any(claim.gate for claim in judged(repository, "paper").claims)
    details = gate_records.details("no", "wikitext2_ppl: 7.50, printed 6.65")
    put(repository, "paper", "olmoe-1b-7b", "fp16", "gate", gate_records.MEASUREMENTS, details)
    verdicts = judged(repository, "paper")
    said = "OLMoE is not comparable with the paper's numbers: wikitext2_ppl: 7.50, printed 6.65"
    told = [claim for claim in verdicts.claims if claim.gate]
    assert told and all(claim.gate == said for claim in told)
    assert all({"perplexity", "tasks", "shift"} & {Path(r).stem for r in claim.records} for claim in told)
    assert any(f"Protocol gate: {said}." in claim.reason for claim in told)
    assert f"- protocol gate: {said}" in to_markdown(verdicts)
    lines = {line["id"]: line["gate"] for line in csv.DictReader(io.StringIO(to_csv(verdicts)))}
    assert lines == {claim.id: claim.gate for claim in verdicts.claims}


def judged(layout: Layout, suite: str) -> Verdicts:
    return judge(Results(suite, layout))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A repository with every record that the verdicts of both suites ask for; tests only read it."""
    root = tmp_path_factory.mktemp("filled")
    shutil.copytree(PACKAGE.parent / "workflow", root / "workflow")
    for suite in SUITES:
        put_all(Layout(root), suite)
    return Layout(root)


# --- the file of checks -----------------------------------------------------------------------------------------------


def test_every_statement_has_checks_or_a_reason() -> None:
    ours = load_ours().claims
    stated = [claim.id for claim in audit(PACKAGE / "paper").claims]
    assert sorted(ours) == sorted(stated) and len(stated) == 60
    for entry in ours.values():
        assert entry.checks or entry.not_run or entry.not_checkable


def changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: object) -> None:
    """Make `ours.yaml` a changed copy."""
    folder = tmp_path / "paper"
    folder.mkdir()
    for path in (PACKAGE / "paper").iterdir():
        if path.suffix in (".yaml", ".csv"):
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tables").symlink_to(PACKAGE / "paper" / "tables")
    value = yaml.safe_load((folder / "ours.yaml").read_text())
    edit(value["claims"])
    (folder / "ours.yaml").write_text(yaml.safe_dump(value))
    monkeypatch.setattr(document, "FILE", folder / "ours.yaml")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda claims: claims.pop("speed"), "speed"),
        (lambda claims: claims.update(speeed=claims["speed"]), "speeed"),
        (lambda claims: claims["speed"].update(reason="?"), "reason"),
        (lambda claims: claims["ppl-qwen3"].update(checks=[]), "ppl-qwen3"),
        (lambda claims: claims["ppl-qwen3"]["checks"][0].pop("models"), "models"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: object, message: str
) -> None:
    changed(monkeypatch, tmp_path, edit)
    with pytest.raises(ConfigError, match=message):
        load_ours()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"method": "mobbie", "perplexity": "wikitext2"}, "mobbie"),
        ({"method": "mobie", "perplexity": "wikitext3"}, "wikitext3"),
        ({"method": "mobie", "accuracy": "arc_esay"}, "arc_esay"),
        ({"method": "mobie", "measure": "sped.x"}, "sped"),
    ],
)
def test_unknown_names_are_refused_not_holes(
    repository: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: dict[str, str], message: str
) -> None:
    changed(monkeypatch, tmp_path, lambda claims: claims["ppl-qwen3"]["checks"][0]["values"].update(arb=value))
    with pytest.raises((ConfigError, ValueError), match=message):
        verdict_records("smoke", repository)


# --- plans and holes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_without_records_nothing_is_judged(repository: Layout, suite: str) -> None:
    verdicts = judged(repository, suite)
    assert len(verdicts.claims) == 60
    assert {claim.verdict for claim in verdicts.claims} == {NOT_RUN, NOT_CHECKABLE}
    assert all(claim.reason and not claim.records for claim in verdicts.claims)
    holes = {"tasks of mobie": "mxmoe-quality", "speed of fp16": "speed", "learns λ": "lambda-learned"}
    for reason, claim in holes.items():
        assert reason in verdicts.claim(claim).reason
        assert verdicts.claim(claim).verdict == NOT_RUN


@pytest.mark.parametrize("suite", SUITES)
def test_a_plan_asks_for_what_is_read(filled: Layout, suite: str) -> None:
    planned = verdict_records(suite, filled)
    assert len(planned) == len(set(planned)) > 60
    results = Results(suite, filled)
    verdicts = judge(results)
    assert list(results.asked) == planned
    read = {filled.root / record for claim in verdicts.claims for record in claim.records}
    assert read <= set(planned)
    assert len(read) > 0.7 * len(planned)
    seeds = {path.parent.name for path in planned if path.parent.parent.name == "arb-llm"}
    assert seeds == {"s0", "s1", "s2"}
    assert not [path for path in planned if path.parent.name != "s0" and path.stem not in ("quantize", "perplexity")]


def test_models_that_a_suite_lacks_are_told(repository: Layout) -> None:
    path = repository.config_file("suites", "paper")
    changed = path.read_text().replace("qwen3-next-80b-a3b", "Qwen3-Next-80B-A3B")
    path.write_text(f"{changed}absent_models: {{Qwen3-Next-80B-A3B: not on this hub}}\n")
    ablation = judged(repository, "paper").claim("ablation-15")
    assert ablation.verdict == NOT_RUN and "not on this hub" in ablation.reason


# --- the nano model ---------------------------------------------------------------------------------------------------


def test_a_nano_model_never_gives_a_verdict_on_the_papers(filled: Layout) -> None:
    verdicts = judged(filled, "smoke")
    assert set(verdicts.counts) <= {v for v in MEANING if "nano" in v} | {NOT_RUN, NOT_CHECKABLE}
    assert len([v for v in verdicts.counts if "nano" in v]) > 1
    for claim in verdicts.claims:
        if claim.verdict not in (NOT_RUN, NOT_CHECKABLE):
            assert claim.verdict.endswith("(nano model)")
            assert "not one of the paper's" in claim.reason and "magnitude is not compared" in claim.reason
        assert not any("stated" in case.compared for case in claim.cases if claim.id != "bits-linear")
    assert "shown" in verdicts.claim("calib-robust").reason
    assert "`wiki` for wikitext2" in " ".join(verdicts.notes)


def test_three_outcomes_of_a_direction_on_the_nano_model(repository: Layout) -> None:
    outcomes = {
        3.5: "direction only (nano model)",
        3.0: "within noise (nano model)",
        2.5: "not reproduced (nano model)",
    }
    put_perplexity(repository, "smoke", "nano-olmoe", "mobie", 3.0, noise=0.05)
    for losses, verdict in outcomes.items():
        put_perplexity(repository, "smoke", "nano-olmoe", "arb-llm", losses, noise=0.05)
        claim = judged(repository, "smoke").claim("ppl-qwen3")
        assert claim.verdict == verdict
        expected = 100 * (1 - math.exp(3.0 - losses))
        assert claim.cases[0].value == pytest.approx(expected, abs=2)
        assert "calibration seeds of mobie: one seed" in claim.tolerance_source
    assert claim.records == tuple(f"results/smoke/nano-olmoe/{m}/s0/perplexity.json" for m in ("arb-llm", "mobie"))


def test_accuracies_at_chance_decide_nothing(repository: Layout) -> None:
    for right, verdict in ((140, "direction only (nano model)"), (104, "within noise (nano model)")):
        put_tasks(repository, "smoke", "nano-olmoe", "mobie", right)
        put_tasks(repository, "smoke", "nano-olmoe", "arb-llm", 96)
        claim = judged(repository, "smoke").claim("acc-qwen3")
        assert claim.verdict == verdict
        assert claim.cases[0].value > 3 * claim.cases[0].tolerance  # the difference itself is beyond its interval
    assert "no accuracy in it is above chance" in claim.cases[0].reason


def test_lambda_needs_its_place_beyond_noise(repository: Layout) -> None:
    suite = load_suite("smoke", repository)
    for text in suite.sweep.texts.values():
        for number in suite.sweep.regularization:
            name = f"mobie+calibration.sequences=32+calibration.text={text}+regularization={number}"
            losses = 3.0 + 0.5 * abs(number - 0.2) - (0.2 if text.startswith("books") and number == 0.5 else 0)
            put_perplexity(repository, "smoke", "nano-olmoe", name, losses, noise=0.001)
    claim = judged(repository, "smoke").claim("lambda")
    assert [case.value for case in claim.cases] == [1, 1, 2]
    assert claim.verdict == "direction only (nano model)"
    for seed, shift in enumerate((0.0, 0.3, -0.3)):  # as much as λ moves it, by the calibration sample alone
        base = "mobie+calibration.sequences=32"
        put_perplexity(repository, "smoke", "nano-olmoe", base, 3 + shift, seed)
    claim = judged(repository, "smoke").claim("lambda")
    assert claim.verdict == "within noise (nano model)"
    assert f"spread over 3 calibration seeds of {base}" in claim.tolerance_source


# --- the paper's models -----------------------------------------------------------------------------------------------


def qwen(layout: Layout, reduction: float, *, seeds: int = 1, spread: float = 0.0, noise: float = 0.001) -> Verdicts:
    """MoBiE's perplexity on Qwen3-30B-A3B is lower than ARB-LLM's by `reduction` per cent."""
    for seed in range(seeds):
        shift = spread * (seed - (seeds - 1) / 2)
        put_perplexity(layout, "paper", "qwen3-30b-a3b", "arb-llm", 3.0, seed, noise)
        lower = 3.0 + math.log(1 - reduction / 100) + shift
        put_perplexity(layout, "paper", "qwen3-30b-a3b", "mobie", lower, seed, noise)
    return judged(layout, "paper")


@pytest.mark.parametrize(
    ("reduction", "noise", "verdict"),
    [
        (52.2, 0.001, "reproduced"),
        (52.0, 0.001, "direction only"),
        (40.0, 0.001, "direction only"),
        (1.0, 1.0, "within noise"),
        (-20.0, 0.001, "not reproduced"),
    ],
)
def test_verdicts_on_the_papers_own_model(repository: Layout, reduction: float, noise: float, verdict: str) -> None:
    claim = qwen(repository, reduction, noise=noise).claim("ppl-qwen3")
    assert claim.verdict == verdict
    assert "nano" not in claim.reason
    assert claim.paper == "supported by the entries"


def test_the_spread_over_seeds_widens_the_tolerance(repository: Layout) -> None:
    spread = 0.05
    claim = qwen(repository, 48.0, seeds=3, spread=spread).claim("ppl-qwen3")
    stated, half = claim.cases
    logs = [spread * (seed - 1) for seed in range(3)]
    for case, variance in ((stated, 1 / 3 + 1), (half, 1 / 3)):  # the paper's one run counts where values are compared
        error = np.std(logs, ddof=1) * math.sqrt(variance) * scipy.stats.t.ppf(0.975, 2)
        assert case.tolerance == pytest.approx(52 * error, rel=0.1)
    assert stated.value == pytest.approx(48.0, abs=0.2)
    assert (stated.outcome, half.outcome) == ("holds", "within noise")
    assert claim.verdict == "within noise"
    assert "spread over 3 calibration seeds" in claim.tolerance_source
    assert len(claim.records) == 6


def test_seeds_are_not_mixed_with_methods_that_have_one(repository: Layout) -> None:
    """Against GPTQ, whose other seeds are not run, MoBiE's value is that of the same seed."""
    for seed, losses in enumerate((3.0, 3.5, 3.5)):
        put_perplexity(repository, "smoke", "nano-olmoe", "mobie", losses, seed)
    put_perplexity(repository, "smoke", "nano-olmoe", "gptq-w3", 3.0)
    put_perplexity(repository, "smoke", "nano-olmoe", "arb-llm", 3.0)
    verdicts = judged(repository, "smoke")
    assert verdicts.claim("vs-gptq3").cases[1].value == pytest.approx(0.0, abs=1e-9)
    assert verdicts.claim("vs-gptq3").cases[1].tolerance > 50
    assert verdicts.claim("ppl-qwen3").cases[0].value == pytest.approx(100 * (1 - math.exp(1 / 3)))


def test_bits_are_exact(repository: Layout) -> None:
    for method, bits in (("arb-llm", 1.11), ("mobie", 1.34)):
        put_bits(repository, "paper", "qwen3-30b-a3b", method, bits)
    claim = judged(repository, "paper").claim("bits-cost")
    assert claim.verdict == "reproduced" and claim.tolerance_source == "exact"
    put_bits(repository, "paper", "qwen3-30b-a3b", "mobie", 1.36)
    assert judged(repository, "paper").claim("bits-cost").verdict == "direction only"
    put_bits(repository, "paper", "qwen3-30b-a3b", "mobie", 1.05)
    assert judged(repository, "paper").claim("bits-cost").verdict == "not reproduced"


def test_a_counterexample_refutes_even_where_others_are_missing(repository: Layout) -> None:
    right = dict.fromkeys(TASK_METRICS, 300)
    put_tasks(repository, "smoke", "nano-olmoe", "mobie", right)
    put_tasks(repository, "smoke", "nano-olmoe", "billm", right | {"piqa": 200})
    claim = judged(repository, "smoke").claim("best-binary")
    assert claim.verdict == "within noise (nano model)"  # equal on six tasks
    put_tasks(repository, "smoke", "nano-olmoe", "billm", {task: 200 for task in right})
    claim = judged(repository, "smoke").claim("best-binary")
    assert claim.verdict == NOT_RUN and "holds beyond noise in 7 of 16" in claim.reason
    put_tasks(repository, "smoke", "nano-olmoe", "billm", dict.fromkeys(right, 200) | {"piqa": 390})
    claim = judged(repository, "smoke").claim("best-binary")
    assert claim.verdict == "not reproduced (nano model)"
    assert "piqa, MoBiE less billm" in claim.reason


def test_one_reading_is_enough_where_the_statement_is_open(repository: Layout) -> None:
    put_bits(repository, "smoke", "nano-olmoe", "arb-llm", 1.1)
    put_bits(repository, "smoke", "nano-olmoe", "mobie", 2.2)
    put_bits(repository, "smoke", "nano-olmoe", "mobie-cejd", 2.2)
    claim = judged(repository, "smoke").claim("no-overhead")
    assert claim.verdict == "direction only (nano model)"
    assert "Read as: every stored byte, GLAS and NGES on and off" in claim.reason


def test_a_proxy_is_at_most_a_direction(repository: Layout) -> None:
    for model in load_suite("paper", repository).targets["table11"]:
        for method, value in (("mobie", 0.1), ("billm", 0.5), ("arb-llm", 0.4)):
            values = [Measurement("repetition", value, 0.02, 5)]
            put(repository, "paper", model, method, "generations", values, {})
    claim = judged(repository, "paper").claim("dialog")
    assert claim.verdict == "direction only" and "readers" in claim.reason


def test_quantization_time(repository: Layout) -> None:
    def times(method: str, *seconds: float | None) -> None:
        for seed, value in enumerate(seconds):
            put_bits(repository, "smoke", "nano-olmoe", method, 1.1, seed, value)

    times("mobie", 300, 306, 312)
    times("billm", 60, 61, 62)
    times("arb-llm", 400)
    verdicts = judged(repository, "smoke")
    case = verdicts.claim("time").cases[0]
    assert case.value == pytest.approx((306 - 61) / 60)
    error = scipy.stats.t.ppf(0.975, 2) * math.hypot(6, 1) / math.sqrt(3) / 60
    assert case.tolerance == pytest.approx(error, rel=0.1)
    assert verdicts.claim("time").verdict == "direction only (nano model)"
    assert verdicts.claim("time-arb").reason.startswith("CPU time of arb-llm: one timing")
    times("arb-llm", 400, None, None)
    assert "read back" in judged(repository, "smoke").claim("time-arb").reason


def test_speed_fills_in_by_itself(repository: Layout) -> None:
    for method, value in (("fp16", 22.0), ("mobie", 51.3)):
        values = [Measurement("tokens_per_second", value, 0.05, 5)]
        put(repository, "paper", "qwen1.5-moe-a2.7b", method, "speed", values, {})
    assert judged(repository, "paper").claim("speed").verdict == "reproduced"


def test_a_timing_on_a_cpu_is_no_verdict(repository: Layout) -> None:
    for method, value in (("fp16", 22.0), ("mobie", 51.3)):
        values = [Measurement("tokens_per_second", value, 0.05, 5)]
        details = {"no_verdict": {"tokens_per_second": "timed on a CPU"}}
        put(repository, "smoke", "nano-olmoe", method, "speed", values, details)
    claim = judged(repository, "smoke").claim("speed")
    assert claim.verdict == NOT_RUN
    assert claim.reason == "timed on a CPU (2 of 2 comparisons)"


def test_a_published_record_stands_in_for_a_skipped_one(repository: Layout) -> None:
    for method, value in (("fp16", 22.0), ("mobie", 51.3)):
        put(repository, "paper", "qwen1.5-moe-a2.7b", method, "speed", [], {}, status="skipped", reason="no GPU")
        assert judged(repository, "paper").claim("speed").verdict == NOT_RUN
        own = repository.record("paper", "qwen1.5-moe-a2.7b", method, 0, "speed")
        record = read_record(own)
        values = (Measurement("tokens_per_second", value, 0.05, 5),)
        published = repository.published("paper", "qwen1.5-moe-a2.7b", method, 0, "speed")
        write_record(published, replace(record, status="ok", reason=None, measurements=values))
    claim = judged(repository, "paper").claim("speed")
    assert claim.verdict == "reproduced"
    assert all(path.startswith("results/published/paper/") for path in claim.records)


def test_a_failed_job_is_told_with_its_reason(repository: Layout) -> None:
    put(repository, "smoke", "nano-olmoe", "mobie", "shift", [], {}, status="failed", reason="no")
    put(repository, "smoke", "nano-olmoe", "arb-llm", "shift", [], {}, status="oom", reason="RuntimeError: no memory")
    assert judged(repository, "smoke").claim("shift-cost").reason.startswith("RuntimeError: no memory")


def test_a_zero_denominator_is_a_hole(repository: Layout) -> None:
    put_tasks(repository, "smoke", "nano-olmoe", "mobie", 200)
    put_tasks(repository, "smoke", "nano-olmoe", "arb-llm", 0)
    claim = judged(repository, "smoke").claim("acc-qwen3")
    assert claim.verdict == NOT_RUN and "denominator" in claim.reason


# --- files ------------------------------------------------------------------------------------------------------------


def test_files(filled: Layout) -> None:
    verdicts = judged(filled, "smoke")
    paths = write_claims(verdicts, filled)
    assert [path.name for path in paths] == ["claims.csv", "claims.md", "claims.json"]
    before = [path.read_bytes() for path in paths]
    write_claims(judged(filled, "smoke"), filled)
    assert [path.read_bytes() for path in paths] == before
    lines = list(csv.DictReader(io.StringIO(to_csv(verdicts))))
    assert [line["id"] for line in lines] == [claim.id for claim in verdicts.claims]
    assert {line["ours"] for line in lines} == set(verdicts.counts)
    assert all(line["reason"] and line["paper"] for line in lines)
    found = json.loads(to_json(verdicts))
    assert sum(found["counts"].values()) == sum(found["paper_counts"].values()) == 60
    assert found["paper_counts"] == audit(PACKAGE / "paper").verdicts
    markdown = to_markdown(verdicts)
    for claim in verdicts.claims:
        assert f"[{claim.id}](#{claim.id})" in markdown and f"\n### {claim.id}\n" in markdown
    for verdict, count in verdicts.counts.items():
        assert f"| {verdict} | {count} |" in markdown


def test_the_verb_needs_no_torch(repository: Layout) -> None:
    code = (
        "import sys; from mobie.cli import main; main(['claims'], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=repository.root, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "claims.md" in done.stdout and f"{NOT_RUN}" in done.stdout


def test_combined_holes_come_first() -> None:
    from mobie.verdicts.sources import combined, stacked

    hole = Hole("missing", "not there")
    assert combined([Drawn(exact(1.0)), hole], sum) is hole
    both = stacked([Drawn(exact(1.0), frozenset("a")), Drawn(exact(2.0), frozenset("b"))])
    assert isinstance(both, Drawn) and both.draws.shape == (2, 1 + RESAMPLES) and both.basis == {"a", "b"}


@pytest.mark.parametrize("suite", SUITES)
def test_texts_of_the_suites(repository: Layout, suite: str) -> None:
    assert load_protocol(load_suite(suite, repository).protocol, repository).texts == TEXTS[suite]
