"""The protocol gate: its grid against closed forms, made-up baselines, and whoever shows what it found."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gate_records
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mobie.check.findings import Report as CheckReport
from mobie.check.gate import check_gate
from mobie.check.records import Stored
from mobie.comparable import comparability, gated_models
from mobie.config import ProtocolConfig, load_protocol, load_suite, parse
from mobie.errors import ConfigError
from mobie.jobs import gate as job
from mobie.jobs.cost import WORK
from mobie.jobs.data import calibrate, make_windows
from mobie.jobs.keys import Keys
from mobie.jobs.quantize import quantize_job
from mobie.jobs.score import score_job
from mobie.models.load import load_full_precision
from mobie.paper.baseline import AVERAGES, COLUMNS, PERPLEXITY, TASK_METRICS, Printed, printed_baseline
from mobie.paths import Layout, embedded_model
from mobie.records import Measurement, Record, read_record, write_record
from mobie.report.build import suite_warnings
from mobie.results import Results
from mobie.scoring.gate import GateProtocol, Grid, measure_grid, point_label, point_name
from mobie.scoring.perplexity import PerplexityProtocol
from mobie.scoring.reproduce import Candidate, accuracy_candidates, compare, conclude, tolerance
from mobie.tables import build_table
from mobie.tables.table import to_latex, to_markdown, write_table
from mobie.tables.table2 import TASK_HEADINGS

DOCUMENTS = [f"The {n}th house stood by the river, and {n * n} people had lived in it before." for n in range(60)]
GATE = GateProtocol(text="wiki", window=(16, 32), separator=("\n\n", " "), bos=("none", "window"), batch_size=32)
OWN = PerplexityProtocol(text="wiki", window=32, bos="none")
BOS = ("none", "text", "window")


# --- the grid ---------------------------------------------------------------------------------------------------------


@given(
    windows=st.lists(st.integers(2, 5000), min_size=1, max_size=3, unique=True),
    separators=st.lists(st.sampled_from(["\n\n", "\n", " ", "", "--", "<s>"]), min_size=1, max_size=3, unique=True),
    bos=st.lists(st.sampled_from(BOS), min_size=1, max_size=3, unique=True),
    own=st.tuples(st.integers(2, 5000), st.sampled_from(["\n\n", " ", "own"]), st.sampled_from(BOS)),
)
def test_a_grid_has_every_combination_once_and_the_suites_own_first(
    windows: list[int], separators: list[str], bos: list[Any], own: tuple[int, str, Any]
) -> None:
    gate = GateProtocol(text="wiki", window=tuple(windows), separator=tuple(separators), bos=tuple(bos), windows=3)
    suites = PerplexityProtocol(text="wiki", window=own[0], separator=own[1], bos=own[2], windows=64, batch_size=8)
    points = gate.points(suites)
    values = [(p.window, p.separator, p.bos) for p in points]
    assert values[0] == own and set(values) == {*itertools.product(windows, separators, bos), own}
    assert len(points) == len(windows) * len(separators) * len(bos) + (
        own not in itertools.product(windows, separators, bos)
    )
    for name in (point_name, point_label, lambda point: point.windows_id):
        assert len({name(point) for point in points}) == len(points)
    assert {(point.text, point.windows, point.batch_size) for point in points} == {("wiki", 3, 1)}


def test_the_papers_grid_is_what_the_paper_leaves_open() -> None:
    protocol = load_protocol("paper")
    points = protocol.gate.points(protocol.gate_own)
    assert len(points) == 2 * 2 * 3 and {point.window for point in points} == {2048, 4096}
    assert all(point.windows is None for point in points)  # the whole text, as the paper's
    assert points[0].windows_id == protocol.gate_own.windows_id  # the same windows as the suite's own perplexity


@pytest.mark.parametrize("name", ["paper", "smoke", "tiny"])
def test_a_suite_gates_the_text_of_its_tables(name: str) -> None:
    suite = load_suite(name)
    assert load_protocol(suite.protocol).gate.text == suite.wikitext2_text


def test_a_gate_on_a_text_that_is_not_scored_is_refused() -> None:
    value = load_protocol("tiny").model_dump(mode="json")
    value["gate"]["text"] = "wikki"
    with pytest.raises(ConfigError, match="wikki.*wiki, web, books"):
        parse(ProtocolConfig, value, "tiny.yaml")


def test_more_points_are_more_work() -> None:
    protocol = load_protocol("paper")
    calibration = Keys(Layout(Path(__file__).parents[1]), "paper", "olmoe-1b-7b", 0).calibration_config
    work = WORK["gate"](calibration, protocol)
    assert work.tokens == 12 * WORK["perplexity"](calibration, protocol).tokens / 3


# --- what the paper prints --------------------------------------------------------------------------------------------


def test_every_full_precision_row_is_found_with_the_digits_it_has() -> None:
    found = {entry.column: entry for entry in printed_baseline("OLMoE")}
    assert list(found) == [PERPLEXITY, *TASK_METRICS, "avg7"]
    assert found[PERPLEXITY] == Printed(PERPLEXITY, "6.65", "table2, table1, table5")
    assert printed_baseline("OLMoE-1B-7B-0125") == printed_baseline("OLMoE")
    assert [(e.text, e.tables) for e in printed_baseline("GPT-OSS-20B")] == [("67.03", "table4")]
    twice = [e.text for e in printed_baseline("Qwen1.5-MoE") if e.column == "avg7"]
    assert twice == ["69.88", "67.98"]  # Tables 7 and 5
    assert printed_baseline(None) == printed_baseline("nano-olmoe") == ()
    assert set(TASK_METRICS) == set(TASK_HEADINGS) and set(COLUMNS) == {PERPLEXITY, *TASK_METRICS, *AVERAGES}


@pytest.mark.parametrize(("text", "half"), [("6.65", 0.005), ("76.8", 0.05), ("7e2", 50.0), ("53", 0.5), ("8.0", 0.05)])
def test_half_a_unit_of_the_last_printed_digit(text: str, half: float) -> None:
    assert Printed("arc_easy", text, "table2").half_unit == pytest.approx(half)


# --- what counts as reproduced ----------------------------------------------------------------------------------------

values = st.floats(1.5, 1e4)
errors = st.none() | st.floats(0, 50)


@given(value=values, stderr=errors, sampled=st.booleans(), printed=values, relative=st.floats(0, 0.1))
def test_a_perplexity_is_within_rounding_or_a_share_of_the_printed_one_or_its_own_noise(
    value: float, stderr: float | None, sampled: bool, printed: float, relative: float
) -> None:
    gate = GATE.model_copy(update={"perplexity_relative": relative, "stderrs": 3.0})
    entry = Printed(PERPLEXITY, f"{printed:.2f}", "table2")
    candidate = Candidate(PERPLEXITY, "", True, Measurement("p.perplexity", value, stderr, 9), sampled)
    allowed = max(0.005, relative * entry.value, 3.0 * (stderr or 0.0) if sampled else 0.0)
    assert tolerance(candidate, entry, gate) == pytest.approx(allowed, rel=1e-12)
    (found,) = compare([candidate], [entry], gate)
    assert found.reproduces == (abs(value - entry.value) <= found.tolerance)


@given(printed=st.floats(1, 99), stderr=st.floats(1e-4, 0.1), side=st.sampled_from([-1, 1]), inside=st.booleans())
def test_an_accuracy_is_within_two_standard_errors(printed: float, stderr: float, side: int, inside: bool) -> None:
    entry = Printed("piqa", f"{printed:.2f}", "table2")
    allowed = max(0.005, 2 * stderr * 100)
    value = entry.value + side * allowed * (1 - 1e-6 if inside else 1 + 1e-6)
    candidate = Candidate("piqa", "", True, Measurement("piqa.acc", value / 100, stderr, 9))
    (found,) = compare([candidate], [entry], GATE)
    assert found.reproduces == inside
    assert conclude([found], [entry]).comparable == ("yes" if inside else "no")


def test_accuracies_are_read_in_every_way_that_the_paper_leaves_open() -> None:
    scored = [Measurement(f"{task}.acc", 0.5, 0.03, 100, 0.25) for task in TASK_METRICS]
    normed = ("arc_easy", "arc_challenge", "hellaswag", "piqa")
    scored += [Measurement(f"{task}.acc_norm", 0.7, 0.04, 100, 0.25) for task in normed]
    found = {c.measurement.name: c for c in accuracy_candidates(scored)}
    assert len(found) == 7 + 4 + 2 * 3
    assert {name for name, c in found.items() if c.own} == {
        *(f"{task}.{metric}" for task, metric in TASK_METRICS.items()),
        *("avg7.tables", "avg4.tables"),
    }
    sevens = {r: found[f"avg7.{r}"].measurement for r in ("acc", "acc_norm", "tables")}
    assert sevens["acc"].value == pytest.approx(0.5)
    assert sevens["acc_norm"].value == pytest.approx((4 * 0.7 + 3 * 0.5) / 7)
    assert sevens["tables"].value == pytest.approx((2 * 0.7 + 5 * 0.5) / 7)
    assert sevens["tables"].stderr == pytest.approx(math.sqrt(2 * 0.04**2 + 5 * 0.03**2) / 7)
    assert (sevens["tables"].n, sevens["tables"].chance) == (700, pytest.approx(0.25))
    assert "avg7.acc" not in {c.measurement.name for c in accuracy_candidates(scored[1:])}  # a task is missing


def test_a_verdict_names_the_protocol_that_would_do() -> None:
    entries = [Printed(PERPLEXITY, "6.65", "table2"), Printed("piqa", "79.76", "table2"), Printed("avg7", "60", "t7")]
    own = Candidate(PERPLEXITY, "window 4096", True, Measurement("a.perplexity", 7.5, 0.1, 9), sampled=False)
    other = Candidate(PERPLEXITY, "window 2048", False, Measurement("b.perplexity", 6.66, 0.1, 9), sampled=False)
    right = Candidate("piqa", "piqa acc", True, Measurement("piqa.acc", 0.797, 0.01, 1838))
    told = conclude(compare([own, other, right], entries, GATE), entries)
    assert told.comparable == "no"
    assert told.reason == "wikitext2_ppl: 7.50, printed 6.65 (table2); window 2048 gives 6.66"
    alone = conclude(compare([own], entries[:1], GATE), entries[:1])
    assert alone.reason.endswith("no protocol of the grid gives it")
    missing = conclude(compare([right], entries, GATE), entries)
    assert (missing.comparable, missing.reason) == (
        "unknown",
        "not measured under the suite's protocol: wikitext2_ppl, avg7",
    )
    assert conclude(compare([right], entries[1:2], GATE), entries[1:2]).comparable == "yes"
    assert conclude([], []).comparable == "unknown"


def test_an_entry_printed_twice_is_reproduced_by_either() -> None:
    entries = [Printed("avg7", "69.88", "table7"), Printed("avg7", "67.98", "table5")]
    for value, comparable in ((0.6988, "yes"), (0.6798, "yes"), (0.5, "no")):
        candidate = Candidate("avg7", "", True, Measurement("avg7.tables", value, 0.001, 9))
        assert conclude(compare([candidate], entries, GATE), entries).comparable == comparable


# --- measured ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    folder = embedded_model("nano-olmoe")
    return load_full_precision(folder), AutoTokenizer.from_pretrained(folder)


def test_a_made_up_baseline_is_found_at_the_point_it_was_measured_at_and_there_alone(nano: tuple[Any, Any]) -> None:
    points = GATE.points(OWN)
    grid = measure_grid(*nano, DOCUMENTS, points)
    assert [point for point, _ in grid.found] == list(points) and not grid.holes
    texts = [f"{found.value:.2f}" for _, found in grid.found]
    assert len(set(texts)) == len(points)
    exact = GATE.model_copy(update={"perplexity_relative": 0.0})
    for index, text in enumerate(texts):
        entries = [Printed(PERPLEXITY, text, "made up")]
        candidates = [
            Candidate(PERPLEXITY, point_label(point), index == 0, found, False)
            for index, (point, found) in enumerate(grid.found)
        ]
        found = compare(candidates, entries, exact)
        assert [c.reproduces for c in found] == [other == index for other in range(len(points))]
        told = conclude(found, entries)
        assert told.comparable == ("yes" if index == 0 else "no")
        assert index == 0 or point_label(points[index]) in told.reason
    for point, found in grid.found:
        losses = grid.window_nll[point_name(point)]
        assert found.name == f"{point_name(point)}.perplexity"
        assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)))
        assert found.n == len(losses) * grid.window_tokens[point_name(point)] == len(losses) * (point.window - 1)


def test_what_a_model_cannot_do_is_a_hole_of_the_grid(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    own = OWN.model_copy(update={"window": 16})
    points = [own, own.model_copy(update={"bos": "text"}), own.model_copy(update={"window": 100_000})]
    bare = AutoTokenizer.from_pretrained(embedded_model("nano-olmoe"), bos_token=None)
    grid = measure_grid(model, bare, DOCUMENTS, points)
    assert [point for point, _ in grid.found] == [own]
    assert grid.holes == {
        "w16-blank_line-text": "the tokenizer has no beginning-of-sequence token",
        "w100000-blank_line-none": f"windows of 100000 tokens exceed the model's context of "
        f"{model.config.max_position_embeddings}",
    }


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, eval_wheel: Path) -> Layout:
    """A repository with what the gate of the suite `tiny` reads (checkpoint, zero-shot record), and a perplexity."""
    root = tmp_path_factory.mktemp("scored")
    shutil.copytree(Path(__file__).parents[1] / "workflow", root / "workflow")
    (root / "resources").mkdir()
    (root / "resources" / eval_wheel.name).symlink_to(eval_wheel)
    layout = Layout(root)
    keys = Keys(layout, "tiny", "nano-olmoe", 0, "fp16")
    calibrate(keys, keys.calibration_config)
    assert quantize_job(keys, progress=False).ok
    make_windows(keys, "wiki")
    make_windows(keys, "web")
    make_windows(keys, "books")
    assert score_job(keys, "perplexity").ok
    put_tasks(keys)
    return layout


def put_tasks(keys: Keys, **how: Any) -> None:
    tasks = [Measurement(f"{task}.{metric}", 0.5, 0.02, 400, 0.25) for task, metric in TASK_METRICS.items()]
    state = {"status": "ok", "reason": None, "measurements": tuple(tasks)} | how
    record = Record("tasks", suite=keys.suite, model=keys.model, method=keys.method, seed=0, protocol="p", **state)
    write_record(keys.record("tasks"), record)


def test_a_model_that_the_paper_does_not_print_is_measured_and_compared_with_nothing(scored: Layout) -> None:
    keys = Keys(scored, "tiny", "nano-olmoe", 0)
    record = job.gate_job(keys)
    assert record.ok and record.kind == "gate" and record.method == "fp16"
    assert record == read_record(scored.record("tiny", "nano-olmoe", "fp16", 0, "gate"))
    assert (record.details["comparable"], record.details["comparisons"]) == ("unknown", [])
    assert "no printed baseline" in record.details["why"]
    own = record.measurement("w64-blank_line-none.perplexity")
    plain = read_record(scored.record("tiny", "nano-olmoe", "fp16", 0, "perplexity")).measurement("wiki.perplexity")
    assert own is not None and plain is not None
    assert own.value == pytest.approx(plain.value, rel=1e-5) and own.n == plain.n  # another batch size
    assert len([m for m in record.measurements if m.name.endswith(".perplexity")]) == 4
    assert set(record.provenance["inputs"]) == {"checkpoint", "text wiki", "accuracies"}
    card = (scored.checkpoint("tiny", "nano-olmoe", "fp16", 0) / "README.md").read_text()
    assert "not known whether comparable with the paper's numbers: no printed baseline" in card


def test_a_printed_row_that_the_suite_reproduces_makes_its_results_comparable(
    scored: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(scored, "tiny", "nano-olmoe", 0)
    gate, own = keys.protocol.gate, keys.protocol.gate_own
    measured = Measurement("w64-blank_line-none.perplexity", 49.97, 9.5, 252)
    grid = Grid([(gate.own_point(own), measured)], {}, {}, {})  # the measuring itself is tested above
    monkeypatch.setattr(job, "load", lambda *_: (None, None))
    monkeypatch.setattr(job, "measure_grid", lambda *_: grid)
    entries = (Printed(PERPLEXITY, f"{measured.value:.2f}", "made up"), Printed("piqa", "50.00", "made up"))
    monkeypatch.setattr(job, "printed_baseline", lambda _: entries)
    # the text stands in for WikiText-2, so its perplexity is not held against the printed one
    assert [c["column"] for c in job.gate_job(keys).details["comparisons"]] == ["piqa"]
    monkeypatch.setattr(job, "PAPER_TEXT", "wiki")
    assert job.gate_job(keys).details["comparable"] == "yes"
    off = (entries[0], Printed("piqa", "99.00", "made up"))
    monkeypatch.setattr(job, "printed_baseline", lambda _: off)
    record = job.gate_job(keys)
    assert record.details["comparable"] == "no" and record.details["why"].startswith("piqa: 50.00, printed 99.00")
    put_tasks(replace(keys, method="fp16"), status="oom", reason="no memory", measurements=())
    record = job.gate_job(keys)
    assert record.ok and record.details["comparable"] == "unknown"
    assert record.details["holes"]["tasks"] == "oom: no memory"
    put_tasks(replace(keys, method="fp16"))


@pytest.mark.parametrize(
    ("suite", "model", "count"),
    [
        ("paper", "olmoe-1b-7b", 12),
        ("paper", "mixtral-8x7b", 1),
        ("tiny", "nano-olmoe", 4),
    ],
)
def test_the_grid_is_tried_where_there_is_a_perplexity_to_find_or_nothing_printed_at_all(
    repository: Layout, suite: str, model: str, count: int
) -> None:
    assert len(job._points(Keys(repository, suite, model, 0))) == count


def test_losses_that_are_not_finite_are_a_failed_record_and_a_hole_upstream_a_skipped_one(
    scored: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(scored.root, tmp_path / "own", symlinks=True)
    keys = Keys(Layout(tmp_path / "own"), "tiny", "nano-olmoe", 0)
    monkeypatch.setattr("mobie.scoring.perplexity.window_losses", lambda *_: torch.tensor([1.0, math.nan]))
    record = job.gate_job(keys)
    assert record.status == "failed" and "not finite" in record.reason and not record.measurements
    hole = Record("quantize", "oom", "no memory", "tiny", "nano-olmoe", "fp16", 0, "p")
    write_record(replace(keys, method="fp16").record("quantize"), hole)
    assert job.gate_job(keys).status == "skipped"


def test_the_check_finds_a_verdict_that_does_not_follow() -> None:
    def problems(**change: Any) -> str:
        record = {"kind": "gate", "status": "ok", "details": gate_records.details("no") | change}
        values = {m.name: {"value": m.value} for m in gate_records.MEASUREMENTS}
        path = Path("/results/paper/m/fp16/s0/gate.json")
        tasks = Stored(path.with_name("tasks.json"), {"status": "ok"}, {"piqa.acc": {"value": piqa}}, False)
        report = CheckReport(Path("/"))
        check_gate(Stored(path, record, values, False), {tasks.path: tasks}, report)
        return "\n".join(finding.what for finding in report.findings)

    piqa = 0.79
    assert problems() == ""
    assert "comparable is 'yes', its comparisons give no" in problems(comparable="yes")
    first, second = gate_records.details()["comparisons"]
    assert "reproducing True; it is off by 0.8" in problems(comparisons=[first | {"reproduces": True}, second])
    assert "off by 0.5" in problems(comparisons=[first | {"distance": 0.5}, second])
    assert "cannot be read (KeyError" in problems(comparisons=[{}])
    piqa = 0.8
    assert problems() == "piqa.acc is 0.79, tasks.json has 0.8"


# --- shown ------------------------------------------------------------------------------------------------------------


def put_gate(layout: Layout, comparable: str, why: str = "as printed", **how: Any) -> None:
    state = {"status": "ok", "reason": None, "measurements": gate_records.MEASUREMENTS} | how
    record = Record(
        "gate", suite="paper", model="olmoe-1b-7b", method="fp16", seed=0, protocol="p",
        details=gate_records.details(comparable, why), **state,
    )  # fmt: skip
    write_record(layout.record("paper", "olmoe-1b-7b", "fp16", 0, "gate"), record)


def states(layout: Layout) -> dict[str, str]:
    """`comparable` of the lines of Table 2, by model."""
    write_table(build_table("table2", Results("paper", layout)), layout)
    with layout.table("table2", "long.csv").open(newline="") as file:
        return {line["model"]: line["comparable"] for line in csv.DictReader(file)}


def test_tables_mark_what_may_not_be_compared(repository: Layout) -> None:
    assert states(repository) == dict.fromkeys(("OLMoE", "DeepSeekV2-Lite", "Qwen3-MoE"), "not checked")
    put_gate(repository, "no", "wikitext2_ppl: 7.50, printed 6.65")
    assert states(repository)["OLMoE"] == "no"
    markdown = repository.table("table2", "md").read_text()
    assert "## OLMoE ‡\n" in markdown
    assert "‡ OLMoE: not comparable with the paper's numbers: wikitext2_ppl: 7.50, printed 6.65." in markdown
    assert r"OLMoE $\ddagger$." in to_latex(build_table("table2", Results("paper", repository)))
    put_gate(repository, "yes")
    assert states(repository)["OLMoE"] == "yes"
    markdown = repository.table("table2", "md").read_text()
    assert "## OLMoE\n" in markdown and "\nOLMoE: comparable with the paper's numbers: as printed." in markdown
    assert "‡" not in to_markdown(build_table("table3", Results("paper", repository)))  # no protocol decides it


def test_the_gates_table_shows_every_protocol_beside_the_printed_entry(repository: Layout) -> None:
    put_gate(repository, "no", "off")
    table = build_table("gate", Results("paper", repository))
    rows = {row.label: row for row in table.rows if row.model == "OLMoE"}
    assert rows["window 4096"].texts == {"own": "true", "reproduces": "false"}
    assert rows["window 2048"].texts == {"own": "false", "reproduces": "true"}
    assert rows["window 2048"].paper == {"value": 6.65} and rows["window 2048"].cells["difference"].value == 0.01
    assert rows["piqa acc"].cells["value"].value == pytest.approx(79.0)
    assert rows["w2048-blank_line-text"].cells["value"].status == "unsupported"
    waiting = [row for row in table.rows if row.model == "Mixtral"]
    assert [row.cells["value"].status for row in waiting] == ["missing"]


def test_report_and_marks_where_the_gate_failed_or_has_nothing_to_try(repository: Layout) -> None:
    put_gate(repository, "no", "off")
    results = Results("paper", repository)
    assert "**OLMoE** is not comparable with the paper's numbers: off." in suite_warnings(results)
    put_gate(repository, "no", status="failed", reason="not finite", measurements=())
    (model, *_) = results.models("table2")
    found = comparability(Results("paper", repository), model)
    assert found.state == "not checked" and "failed: not finite" in found.reason
    (chat,) = [m for m in results.models("table9") if m.name == "qwen1.5-moe-a2.7b-chat"]
    plan = Results("paper", repository, plan=True)
    assert comparability(plan, chat).state == "unknown" and not plan.asked  # no row of it: no job
    assert chat not in gated_models(results)
