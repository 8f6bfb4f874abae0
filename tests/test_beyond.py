"""The comparison per stored bit, from records made by hand, against sums done here."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobie.config import load_suite
from mobie.errors import ConfigError
from mobie.excess import difference, over_seeds
from mobie.figures import BEYOND as BEYOND_FIGURES
from mobie.figures import collect_figure, figure_records, figures_of, render, write_figure
from mobie.goals import Judged, judge_goals, load_goals
from mobie.paths import Layout
from mobie.records import Measurement, Record, write_record
from mobie.results import Cell, Results
from mobie.tables import BEYOND, TABLES, build_table, table_records, tables_of
from mobie.tables.table import Row, Table, write_table

SUITE, MODEL = "beyond", "nano-olmoe"
TEXTS = ("wiki", "web", "books")
T_TWO = 4.302652729749464  # 0.975 quantile of Student's t with two degrees of freedom
#: a config with an option `budget` stands in for the rows of the dial
DIAL = {budget: f"mxmoe-2.25-attention+budget={budget}" for budget in (1.1, 1.5, 2.0)}
WINDOWS = 4
RIPPLE = 0.01


@pytest.fixture
def layout(repository: Layout) -> Layout:
    """A small suite: three rivals and three budgets of the whole model, two rows of the experts."""
    suite = {
        **yaml.safe_load(repository.config_file("suites", SUITE).read_text()),
        "models": [MODEL],
        "methods": ["fp16", "billm", "arb-llm", "mobie", "gptq-w2"],
        "targets": {},
    }
    suite["beyond"] = {
        "scopes": {
            "model": {
                "label": "whole model",
                "dial": list(DIAL.values()),
                "rivals": {"billm": "billm", "arb-llm": "arb-llm", "mobie": "mobie"},
            },
            "experts": {
                "label": "experts only",
                "component": "experts",
                "rows": ["billm-experts", "arb-llm-experts"],
                "rivals": {"billm": "billm-experts", "arb-llm": "arb-llm-experts"},
            },
        },
        "once": ["gptq-w2"],
        "ablation": {"base": DIAL[1.5], "variants": [f"{DIAL[1.5]}+sensitivity=gptq"]},
        "sizes": ["arb-llm"],
    }
    repository.config_file("suites", SUITE).write_text(yaml.safe_dump(suite, sort_keys=False))
    run(repository, "fp16", (0.0,))
    return repository


def put(layout: Layout, method: str, seed: int, kind: str, values: Sequence[Measurement], **details: Any) -> None:
    found = Record(kind, "ok", None, SUITE, MODEL, method, seed, "p", tuple(values), details)
    write_record(layout.record(SUITE, MODEL, method, seed, kind), found)


def run(
    layout: Layout,
    method: str,
    excess: Sequence[float],
    stored: float = 2.0,
    *,
    experts: float | None = None,
    by_text: Mapping[str, float] | None = None,
    similarity: Sequence[float] = (),
) -> None:
    """Records of one run per seed whose loss exceeds full precision by so much in every window, but for a ripple."""
    for seed, value in enumerate(excess):
        ripple = RIPPLE * (method != "fp16")
        nll = {
            text: [3 + value + (by_text or {}).get(text, 0.0) + ripple * (-1) ** w for w in range(WINDOWS)]
            for text in TEXTS
        }
        perplexities = [
            Measurement(f"{text}.perplexity", math.exp(sum(x) / WINDOWS), 1.0, 99) for text, x in nll.items()
        ]
        put(layout, method, seed, "perplexity", perplexities, window_nll=nll)
        component = {"experts": {"stored": stored if experts is None else experts, "weights": 60}}
        bits = [Measurement("bits_stored", stored, None, 99)]
        put(layout, method, seed, "quantize", bits, bits_by_component=component)
    if similarity:
        layers = [Measurement(f"layer{i}.similarity", value, 0.001, 9) for i, value in enumerate(similarity)]
        put(layout, method, 0, "routing", layers)


def row_of(table: Table, config: str) -> Row:
    (found,) = [row for row in table.rows if row.config == config]
    return found


def verdicts(layout: Layout, measure: str, budget: float, rival: str = "") -> Judged:
    (found,) = [
        judged
        for judged in judge_goals(Results(SUITE, layout))
        if (judged.goal.measure, judged.budget, judged.scope.label) == (measure, budget, "whole model")
        and judged.goal.rival == rival
    ]
    return found


# --- values ----------------------------------------------------------------------------------------------------------


def test_excess_is_the_mean_over_seeds_with_its_interval(layout: Layout) -> None:
    run(layout, "billm", (0.4, 0.5, 0.6), by_text={"books": 0.3}, stored=2.96)
    row = row_of(build_table("beyond", Results(SUITE, layout)), "billm")
    error = 0.1 / math.sqrt(3)
    assert row.cells["wiki"].value == pytest.approx(0.5)
    assert row.cells["wiki"].stderr == pytest.approx(error)
    assert row.cells["wiki_interval"].value == pytest.approx(T_TWO * error)
    assert row.cells["books"].value == pytest.approx(0.8)
    assert row.cells["mean"].value == pytest.approx(0.6)
    assert row.cells["seeds"].value == 3
    assert row.cells["stored"].value == 2.96


def test_shares_of_the_rivals_and_routing(layout: Layout) -> None:
    run(layout, "arb-llm", (0.2, 0.4, 0.6))
    run(layout, "mobie", (0.8,) * 3, similarity=(0.9, 0.8, 0.7))
    run(layout, DIAL[1.5], (0.1, 0.2, 0.3), similarity=(0.95, 0.79, 0.75))
    row = row_of(build_table("beyond", Results(SUITE, layout)), DIAL[1.5])
    assert row.cells["of_arb-llm"].value == pytest.approx(0.5)
    assert row.cells["of_mobie"].value == pytest.approx(0.25)
    assert row.cells["of_billm"].status == "missing"
    assert row.cells["routing"].value == pytest.approx(-0.01)  # of the second layer


def test_experts_only_counts_the_bits_of_experts(layout: Layout) -> None:
    run(layout, "billm-experts", (0.3,) * 3, stored=4.7, experts=2.9)
    table = build_table("beyond", Results(SUITE, layout))
    row = row_of(table, "billm-experts")
    assert (row.section, row.cells["stored"].value, row.cells["stored"].n) == ("experts only", 2.9, 60)
    assert {row.section for row in table.rows} == {"whole model", "experts only"}


def test_what_is_missing_is_a_hole_with_its_reason(layout: Layout) -> None:
    run(layout, "billm", (0.4, 0.5))  # the third seed has not run
    run(layout, "gptq-w2", (0.4,))
    table = build_table("beyond", Results(SUITE, layout))
    assert row_of(table, "billm").cells["mean"].reason == "its job has not run"
    assert row_of(table, "billm").cells["mean"].record.endswith("billm/s2/perplexity.json")
    once = row_of(table, "gptq-w2")
    assert once.cells["mean"].value == pytest.approx(0.4)
    assert once.cells["mean"].stderr is None
    assert once.cells["mean_interval"].reason == "calibrated with one seed: no interval"


def test_over_seeds_of_one_value_has_no_error() -> None:
    assert over_seeds([Cell(1.5, 0.1, 30)]) == Cell(1.5, None, 1)


def test_difference_compares_runs_of_one_seed(layout: Layout) -> None:
    run(layout, "billm", (0.4, 0.6, 0.8))
    run(layout, "arb-llm", (0.3, 0.4, 0.8))
    run(layout, "gptq-w2", (0.1,))
    results = Results(SUITE, layout)
    (model,) = results.models("beyond")
    found, reach = difference(results, model, "billm", "arb-llm", TEXTS)
    assert found.value == pytest.approx(0.1)
    assert reach == pytest.approx(T_TWO * 0.1 / math.sqrt(3))
    found, reach = difference(results, model, "gptq-w2", "fp16", ("wiki",))  # one seed: two standard errors of windows
    assert found.value == pytest.approx(0.1)
    assert reach == pytest.approx(2 * RIPPLE * math.sqrt(WINDOWS / (WINDOWS - 1)) / math.sqrt(WINDOWS))


def test_ablation_is_paired_with_the_method_as_it_is(layout: Layout) -> None:
    run(layout, DIAL[1.5], (0.2, 0.3, 0.4), stored=1.5)
    variant = f"{DIAL[1.5]}+sensitivity=gptq"
    run(layout, variant, (0.3, 0.4, 0.5), stored=1.4)
    base, other = build_table("ablation", Results(SUITE, layout)).rows
    assert "difference" not in base.cells
    assert other.cells["difference"].value == pytest.approx(0.1)
    assert other.cells["reach"].value == pytest.approx(0, abs=1e-12)  # equal in every seed
    assert other.texts["beyond_interval"] == "yes"
    assert other.cells["stored"].value == 1.4
    run(layout, variant, (0.1, 0.3, 0.7), stored=1.4)
    (_, other) = build_table("ablation", Results(SUITE, layout)).rows
    assert (other.texts["beyond_interval"], other.cells["seeds"].value) == ("no", 3)


def test_an_ablation_with_one_seed_has_no_interval(layout: Layout) -> None:
    path = layout.config_file("suites", SUITE)
    variant = f"{DIAL[1.5]}+sensitivity=gptq"
    suite = yaml.safe_load(path.read_text())
    suite["beyond"]["once"] = [variant]
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    run(layout, DIAL[1.5], (0.2, 0.9, 0.9))
    run(layout, variant, (0.3,))
    (_, other) = build_table("ablation", Results(SUITE, layout)).rows
    assert other.cells["difference"].value == pytest.approx(0.1)  # with the run of the same seed
    assert other.cells["seeds"].value == 1
    assert other.cells["reach"].reason == "calibrated with one seed: no interval"
    assert "beyond_interval" not in other.texts


# --- goals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "rival", "share"), [(1.1, "billm", 1.0), (1.5, "arb-llm", 0.6), (2.0, "arb-llm", 0.3)]
)
@pytest.mark.parametrize("above", [-0.01, 0.01])
def test_an_excess_goal_holds_up_to_its_share(
    layout: Layout, budget: float, rival: str, share: float, above: float
) -> None:
    run(layout, rival, (0.5,) * 3)
    run(layout, DIAL[budget], (share * 0.5 + above,) * 3)
    found = verdicts(layout, "excess", budget, rival)
    assert found.verdict == ("holds" if above < 0 else "does not hold")
    assert found.texts == ("3 of 3" if above < 0 else "0 of 3")
    assert found.ours.value == pytest.approx(share * 0.5 + above)
    assert found.theirs.value == pytest.approx(0.5)


def test_an_excess_goal_says_on_how_many_texts_it_holds(layout: Layout) -> None:
    run(layout, "billm", (0.5,) * 3)
    run(layout, DIAL[1.1], (0.4,) * 3, by_text={"web": 0.2})
    found = verdicts(layout, "excess", 1.1, "billm")
    assert (found.verdict, found.texts) == ("holds", "2 of 3")


def test_goals_at_every_budget_have_a_line_for_each(layout: Layout) -> None:
    run(layout, "mobie", (0.9,) * 3)
    run(layout, DIAL[1.1], (0.31,) * 3)
    run(layout, DIAL[1.5], (0.29,) * 3)
    found = [verdicts(layout, "excess", budget, "mobie").verdict for budget in DIAL]
    assert found == ["does not hold", "holds", "not measured"]


@pytest.mark.parametrize(
    ("rival", "stored", "verdict", "texts"),
    [
        ((0.18, 0.19, 0.20), 1.5, "holds", "3 of 3"),  # lower, but inside the interval
        ((0.10, 0.11, 0.12), 1.5, "does not hold", "0 of 3"),
        ((0.10, 0.11, 0.12), 1.6, "holds", "3 of 3"),  # it stores more
    ],
)
def test_nothing_as_small_is_better(
    layout: Layout, rival: Sequence[float], stored: float, verdict: str, texts: str
) -> None:
    for name in ("billm", "mobie"):
        run(layout, name, (0.9,) * 3, stored=3.0)
    run(layout, "gptq-w2", (0.9,), stored=3.0)
    run(layout, DIAL[1.5], (0.19, 0.20, 0.20), stored=1.5)
    run(layout, "arb-llm", rival, stored=stored)
    found = verdicts(layout, "unbeaten", 1.5)
    assert (found.verdict, found.texts) == (verdict, texts)
    if stored == 1.5:
        assert found.against.startswith("ARB-LLM on ")
    else:
        assert found.theirs.reason == "no other row stores as little"


def test_a_row_that_is_better_on_one_text_is_enough(layout: Layout) -> None:
    for name in ("arb-llm", "mobie"):
        run(layout, name, (0.9,) * 3, stored=3.0)
    run(layout, "gptq-w2", (0.9,), stored=3.0)
    run(layout, DIAL[2.0], (0.2,) * 3, stored=2.0)
    run(layout, "billm", (0.4,) * 3, by_text={"books": -0.3}, stored=1.9)
    found = verdicts(layout, "unbeaten", 2.0)
    assert (found.verdict, found.texts, found.against) == ("does not hold", "2 of 3", "BiLLM on books")
    assert (found.ours.value, found.theirs.value) == (pytest.approx(0.2), pytest.approx(0.1))


def test_unbeaten_is_not_measured_while_a_row_is_missing(layout: Layout) -> None:
    run(layout, DIAL[2.0], (0.2,) * 3, stored=2.0)
    run(layout, "billm", (0.4,) * 3, stored=1.9)
    found = verdicts(layout, "unbeaten", 2.0)
    assert (found.verdict, found.ours.reason) == ("not measured", "its job has not run")


@pytest.mark.parametrize(("second", "verdict"), [(0.81, "holds"), (0.80, "holds"), (0.79, "does not hold")])
def test_routing_is_judged_by_its_worst_layer(layout: Layout, second: float, verdict: str) -> None:
    run(layout, "mobie", (0.9,) * 3, similarity=(0.9, 0.8))
    run(layout, DIAL[1.1], (0.2,) * 3, similarity=(0.99, second))
    found = verdicts(layout, "routing", 1.1, "mobie")
    assert (found.verdict, found.ours.value, found.theirs.value) == (verdict, second, 0.8)


@pytest.mark.parametrize(("stored", "verdict"), [(1.512, "holds"), (1.488, "holds"), (1.52, "does not hold")])
def test_the_budget_is_met_within_a_hundredth(layout: Layout, stored: float, verdict: str) -> None:
    run(layout, DIAL[1.5], (0.2,) * 3, stored=stored)
    assert verdicts(layout, "stored", 1.5).verdict == verdict


def test_a_budget_that_the_suite_lacks_is_not_measured(layout: Layout) -> None:
    table = build_table("goals", Results(SUITE, layout))
    rows = [row for row in table.rows if row.section == "experts only"]
    assert len(rows) == len(load_goals())
    assert {row.texts["verdict"] for row in rows} == {"not measured"}
    assert {row.cells["ours"].reason for row in rows} == {"the suite has no row of our method with this budget"}


def test_goals_name_rivals_that_the_suite_has() -> None:
    rivals = {goal.rival for goal in load_goals() if goal.rival}
    beyond = load_suite(SUITE).beyond
    assert beyond is not None
    for scope in beyond.scopes.values():
        assert rivals <= set(scope.rivals)


# --- workflow and files ----------------------------------------------------------------------------------------------


def test_a_plan_asks_for_seeds_where_they_count(layout: Layout) -> None:
    asked = [path for name in tables_of(load_suite(SUITE, layout)) for path in table_records(name, SUITE, layout)]
    runs = {(path.parents[1].name, path.parent.name, path.stem) for path in asked}
    seeds = {seed for method, seed, kind in runs if (method, kind) == ("billm", "perplexity")}
    assert seeds == {"s0", "s1", "s2"}
    assert {seed for method, seed, _ in runs if method in ("gptq-w2", "fp16")} == {"s0"}
    routed = {(method, seed) for method, seed, kind in runs if kind == "routing"}
    assert routed == {(name, "s0") for name in ("mobie", *DIAL.values())}
    assert "tasks" not in {kind for _, _, kind in runs}


def test_other_suites_have_the_papers_tables(layout: Layout) -> None:
    assert tables_of(load_suite("smoke", layout)) == TABLES
    assert tables_of(load_suite(SUITE, layout)) == BEYOND
    assert figures_of(load_suite(SUITE, layout)) == BEYOND_FIGURES
    with pytest.raises(ConfigError, match="--suite beyond"):
        build_table("beyond", Results("smoke", layout))


def test_the_suites_seed_is_one_of_the_seeds(layout: Layout) -> None:
    path = layout.config_file("suites", SUITE)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"seed": 7}))
    with pytest.raises(ConfigError, match=r"seed 7 is none of sweep.seeds \[0, 1, 2\]"):
        load_suite(SUITE, layout)


def test_files_hold_values_and_holes_and_are_the_same_every_time(layout: Layout) -> None:
    full(layout)
    results = Results(SUITE, layout)
    paths = [path for name in BEYOND for path in write_table(build_table(name, results), layout)]
    paths += [path for name in BEYOND_FIGURES for path in write_figure(name, results)]
    before = [path.read_bytes() for path in paths]
    for name in BEYOND:
        write_table(build_table(name, Results(SUITE, layout)), layout)
    for name in BEYOND_FIGURES:
        write_figure(name, Results(SUITE, layout))
    assert [path.read_bytes() for path in paths] == before
    lines = {line["config"]: line for line in read(layout.figure("dial", "csv")) if line["scope"] == "model"}
    assert (lines["billm"]["x"], float(lines["billm"]["y"])) == ("2.96", pytest.approx(0.5))
    assert float(lines["billm"]["reach"]) == pytest.approx(T_TWO * 0.1 / math.sqrt(3))
    assert lines["gptq-w2"]["reach"] == "" and lines["mobie"]["status"] == "missing"
    assert {line["dial"] for config, line in lines.items() if config in DIAL.values()} == {"true"}
    sizes = {line["x"]: line for line in read(layout.figure("calibration_size", "csv"))}
    assert sizes["128"]["config"] == "arb-llm" and float(sizes["128"]["y"]) == pytest.approx(0.4)
    assert sizes["8"]["config"] == "arb-llm+calibration.sequences=8" and sizes["8"]["reason"] == "its job has not run"


@pytest.mark.parametrize(("least", "scale"), [(0.01, "log"), (-0.01, "linear")])
def test_a_row_that_loses_nothing_has_a_place_in_the_figure(layout: Layout, least: float, scale: str) -> None:
    run(layout, "billm", (0.4, 0.5, 0.6), stored=2.96)
    run(layout, DIAL[2.0], (least,) * 3)
    axes, empty = render(collect_figure("dial", Results(SUITE, layout))).axes
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[0] < least
    assert not empty.lines  # nothing of the experts has run


def full(layout: Layout) -> None:
    """A suite that has run but for MoBiE and most calibration sizes."""
    run(layout, "billm", (0.4, 0.5, 0.6), stored=2.96)
    run(layout, "arb-llm", (0.4, 0.4, 0.4), stored=3.17)
    run(layout, "gptq-w2", (0.3,), stored=2.09)
    for budget, name in DIAL.items():
        run(layout, name, (0.3 / budget, 0.31 / budget, 0.32 / budget), stored=budget, similarity=(0.9,))
    for size in (16, 32):
        run(layout, f"arb-llm+calibration.sequences={size}", (8 / size, 9 / size, 7 / size))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_figures_ask_for_no_record_that_the_tables_do_not(layout: Layout) -> None:
    tables = {path for name in BEYOND for path in table_records(name, SUITE, layout)}
    assert set(figure_records("dial", SUITE, layout)) <= tables
    holes = collect_figure("dial", Results(SUITE, layout)).reasons
    assert set(holes) == {"missing: its job has not run"}
