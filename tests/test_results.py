"""Reading records for targets: cells, holes, plans, and differences on the same windows."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobie.config import load_method, method_spec
from mobie.errors import ConfigError, DataError
from mobie.paired import log_ratio
from mobie.paper.printed import printed, printed_rows, same_model
from mobie.paths import Layout
from mobie.records import Measurement, Record, write_record
from mobie.results import Cell, Results, average


def write(layout: Layout, method: str, kind: str, *measurements: Measurement, seed: int = 0, **values: object) -> None:
    record = Record(
        kind,
        **({"status": "ok", "reason": None} | values),
        suite="smoke",
        model="nano-olmoe",
        method=method,
        seed=seed,
        protocol="p",
        measurements=measurements,
    )
    write_record(layout.record("smoke", "nano-olmoe", method, seed, kind), record)


def perplexity(layout: Layout, method: str, nll: dict[str, list[float]], seed: int = 0) -> None:
    values = [Measurement(f"{text}.perplexity", math.exp(statistics.fmean(x)), 1.0, 99) for text, x in nll.items()]
    write(layout, method, "perplexity", *values, seed=seed, details={"window_nll": nll})


def test_a_cell_is_a_scaled_measurement_with_its_record(repository: Layout) -> None:
    write(repository, "fp16", "tasks", Measurement("piqa.acc", 0.6, 0.02, 200, 0.5))
    results = Results("smoke", repository)
    (model,) = results.models("table2")
    cell = results.cell(model, "fp16", "tasks", "piqa.acc", scale=100)
    path = "results/smoke/nano-olmoe/fp16/s0/tasks.json"
    assert cell == Cell(60.0, 2.0, 200, 50.0, record=path)
    assert not cell.at_chance
    assert list(results.asked) == [repository.root / path]


def test_every_hole_says_why(repository: Layout) -> None:
    write(repository, "billm", "tasks", status="oom", reason="no memory")
    write(repository, "fp16", "hard", details={"holes": {"mathqa": "no data"}})
    results = Results("smoke", repository)
    (model,) = results.models("table2")
    holes = {
        "missing": results.cell(model, "rtn-w3", "tasks", "piqa.acc"),
        "oom": results.cell(model, "billm", "tasks", "piqa.acc"),
        "unsupported": results.cell(model, "fp16", "hard", "mathqa.acc"),
    }
    assert {name: cell.status for name, cell in holes.items()} == {name: name for name in holes}
    assert [cell.reason for cell in holes.values()] == ["its job has not run", "no memory", "no data"]
    assert results.cell(model, "fp16", "hard", "gsm8k.exact_match").reason == "the record has no gsm8k.exact_match"
    with pytest.raises(ValueError, match="sped"):
        results.cell(model, "fp16", "sped", "x")


def test_a_plan_reads_nothing_and_lists_the_same_records(repository: Layout) -> None:
    write(repository, "fp16", "tasks", Measurement("piqa.acc", 0.6, 0.02, 200, 0.5))
    repository.record("smoke", "nano-olmoe", "fp16", 0, "tasks").write_text("damaged")
    plan = Results("smoke", repository, plan=True)
    (model,) = plan.models("table2")
    assert plan.cell(model, "fp16", "tasks", "piqa.acc").status == "missing"
    assert list(plan.asked) == [repository.record("smoke", "nano-olmoe", "fp16", 0, "tasks")]
    with pytest.raises(DataError, match=r"tasks\.json"):
        Results("smoke", repository).cell(model, "fp16", "tasks", "piqa.acc")


def test_absent_models_are_holes_and_ask_for_nothing(repository: Layout) -> None:
    path = repository.config_file("suites", "paper")
    changed = path.read_text().replace("table4: [gpt-oss-20b,", "table4: [GPT-OSS-20B,")
    path.write_text(f"{changed}absent_models: {{GPT-OSS-20B: not on this hub}}\n")
    results = Results("paper", repository)
    first, _ = results.models("table4")
    assert (first.label, first.in_paper) == ("GPT-OSS-20B", True)
    cell = results.cell(first, "fp16", "tasks", "piqa.acc")
    assert (cell.status, cell.reason) == ("absent", "not on this hub")
    assert not results.asked


def test_average_by_hand() -> None:
    two = average([Cell(10.0, 3.0, 5, 1.0, record="a"), Cell(20.0, 4.0, 7, 2.0, record="b")])
    assert two == Cell(15.0, 2.5, 12, 1.5, record="a")
    hole = Cell(None, status="oom", reason="no memory")
    assert average([Cell(10.0), hole]).reason == "no memory"
    assert average([Cell(1.0), Cell(3.0)]) == Cell(2.0)


def test_chance_needs_two_standard_errors() -> None:
    assert Cell(27.0, 1.0, 9, 25.0).at_chance  # exactly two
    assert not Cell(27.1, 1.0, 9, 25.0).at_chance
    assert not Cell(27.0).at_chance and not Cell(None).at_chance


def test_log_ratio_is_the_paired_mean_over_windows(repository: Layout) -> None:
    generator = np.random.default_rng(0)
    base = {text: generator.normal(4, 1, 30) for text in ("wiki", "web")}
    other = {text: values + generator.normal(0.1, 0.01, 30) for text, values in base.items()}
    perplexity(repository, "fp16", {text: values.tolist() for text, values in base.items()})
    perplexity(repository, "billm", {text: values.tolist() for text, values in other.items()})
    results = Results("smoke", repository)
    (model,) = results.models("table2")
    found = log_ratio(results, model, "billm", "fp16", ["wiki", "web"])
    differences = [other[text] - base[text] for text in base]
    errors = [d.std(ddof=1) / math.sqrt(30) for d in differences]
    assert found.value == pytest.approx(np.mean(differences))
    assert found.stderr == pytest.approx(math.hypot(*errors) / 2)
    one = log_ratio(results, model, "billm", "fp16", ["wiki"])
    cells = [results.cell(model, method, "perplexity", "wiki.perplexity").value for method in ("billm", "fp16")]
    assert math.exp(one.value) == pytest.approx(cells[0] / cells[1])
    assert one.stderr < 0.01  # the windows' own spread, about one, cancels
    assert log_ratio(results, model, "billm", "billm", ["wiki"]) == Cell(0.0, 0.0, 30, record=one.record)
    hole = log_ratio(results, model, "billm", "mobie", ["wiki"])
    assert (hole.value, hole.status) == (None, "missing")
    write(repository, "arb-llm", "perplexity", Measurement("wiki.perplexity", 9.0, 1.0, 99))
    old = log_ratio(Results("smoke", repository), model, "arb-llm", "fp16", ["wiki"])
    assert old.value is None and "run its job again" in old.reason and "arb-llm" in old.record


def test_printed_entries_are_found_under_every_name_of_a_model() -> None:
    assert same_model("DeepSeek-V2-Lite", "DeepSeekV2-Lite") and not same_model("OLMoE", "Mixtral")
    assert printed("table2", "DeepSeek-V2-Lite", method="GPTQ", bits=3)["arc_easy"] == 45.33
    assert printed("table1", "DeepSeekV2-Lite", quantized="true", expert_shift="false") == {"wikitext2_ppl": 15.33}
    assert printed("table2", "nano-olmoe", method="GPTQ") == {}
    assert printed_rows("table6") == ()
    with pytest.raises(ConfigError, match="2 rows fit OLMoE"):
        printed("table2", "OLMoE", method="GPTQ")


def test_a_method_spec_changes_options_and_calibration(repository: Layout) -> None:
    name = method_spec("mobie", regularization=0.3, calibration__text="web-calibration", calibration__sequences=None)
    assert name == "mobie+calibration.text=web-calibration+regularization=0.3"
    config = load_method(name, repository)
    assert config.build().regularization == 0.3
    assert config.paper is None and "regularization=0.3" in config.label
    calibration = Results("smoke", repository).models("table2")[0].config.calibration
    changed = config.calibration.apply(calibration)
    assert (changed.text, changed.sequences, changed.length) == ("web-calibration", 128, 256)
    assert load_method("mobie", repository).calibration.apply(calibration) == calibration


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobi+x=1", "unknown method 'mobi'"),
        ("mobie+x", "expected KEY=VALUE"),
        ("mobie+=1", "expected KEY=VALUE"),
        ("mobie+calibration.txt=wiki", "unknown key in calibration 'txt'; did you mean text"),
        ("mobie+calibration.sequences=many", "calibration.sequences"),
        ("mobie+x=[", "not valid YAML"),
    ],
)
def test_mistakes_in_a_method_spec_are_named(repository: Layout, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_method(name, repository)


def test_an_unknown_option_in_a_spec_is_named(repository: Layout) -> None:
    with pytest.raises(ConfigError, match="unknown option 'lambda'"):
        load_method("mobie+lambda=0.3", repository).build()


@given(st.floats(0, 1, allow_nan=False), st.integers(1, 10**6))
def test_a_spec_carries_numbers_exactly(value: float, sequences: int) -> None:
    config = load_method(method_spec("mobie", regularization=value, calibration__sequences=sequences))
    assert config.options["regularization"] == value
    assert config.calibration.sequences == sequences
