"""Figures 4 and 8 to 11, the Pareto and the diagnostics figure: rows against sums done here, and what is drawn."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mobie.figures import collect_figure, figure_records, render
from mobie.figures.diagnostics import chosen_layers
from mobie.figures.fig8 import size_method
from mobie.figures.fig10 import per_cent
from mobie.figures.figure import FigureData
from mobie.figures.pareto import PANELS, _Edge, pareto_front
from mobie.paths import Layout, paper_table
from mobie.records import Measurement, Record, read_record, write_record
from mobie.results import Cell, Model, Results
from mobie.tables import table_records
from mobie.tables.table2 import TASK_METRICS
from mobie.tables.table10 import sweep_method

FIGURES = ("fig4", "fig8", "fig9", "fig10", "fig11", "pareto", "diagnostics")
TEXTS = ("wiki", "web", "books")
WINDOWS = 12
SIZES, SEEDS = (16, 32, 64, 128), (0, 1, 2)
MODEL = "nano-olmoe"


def write(layout: Layout, method: str, kind: str, seed: int = 0, **values: Any) -> None:
    known = {"status": "ok", "reason": None, "suite": "smoke", "model": MODEL, "protocol": "p"}
    record = Record(kind=kind, method=method, seed=seed, **(known | values))
    write_record(layout.record("smoke", MODEL, method, seed, kind), record)


def losses(key: str) -> dict[str, np.ndarray]:
    """Mean losses of the windows of every text, different for every key."""
    generator = np.random.default_rng(list(key.encode()))
    return {text: 4 + generator.normal(0, 0.2, WINDOWS) for text in TEXTS}


def write_perplexity(layout: Layout, method: str, seed: int = 0) -> None:
    found = losses(f"{method} {seed}")
    measurements = []
    for text, nll in found.items():
        value = float(np.exp(nll.mean()))
        error = value * float(nll.std(ddof=1)) / WINDOWS**0.5
        measurements.append(Measurement(f"{text}.perplexity", value, error, 255 * WINDOWS))
    details = {"window_nll": {text: nll.tolist() for text, nll in found.items()}}
    write(layout, method, "perplexity", seed, measurements=tuple(measurements), details=details)


def write_quantize(layout: Layout, method: str, stored: float, paper: float = 1.1, **details: Any) -> None:
    bits = {"bits_paper": paper, "bits_codes": 1.2, "bits_stored": stored}
    measurements = tuple(Measurement(name, value, None, 100) for name, value in bits.items())
    write(layout, method, "quantize", measurements=measurements, details={"blocks": []} | details)


def write_tasks(layout: Layout, method: str, accuracy: float, error: float = 0.02) -> None:
    measurements = [Measurement(f"{t}.{m}", accuracy, error, 200, 0.3) for t, m in TASK_METRICS.items()]
    write(layout, method, "tasks", measurements=tuple(measurements))


def write_failure(layout: Layout, method: str, kind: str, seed: int = 0) -> None:
    write(layout, method, kind, seed, status="oom", reason="no memory")


def results(layout: Layout, suite: str = "smoke") -> Results:
    return Results(suite, layout)


def model(layout: Layout) -> Model:
    return results(layout).models("fig8")[0]


def rows(data: FigureData, **keys: Any) -> list[Mapping[str, Any]]:
    return data.select(**keys)


def one(data: FigureData, **keys: Any) -> Mapping[str, Any]:
    (found,) = rows(data, **keys)
    return found


def write_all(layout: Layout, skip: Iterable[str] = ()) -> None:
    """Records for everything that the figures ask for; methods in `skip` have failed."""
    asked = dict.fromkeys(path for name in FIGURES for path in figure_records(name, "smoke", layout))
    generator = random.Random("stored bits")
    for path in asked:
        method, seed, kind = path.parent.parent.name, int(path.parent.name[1:]), path.stem
        if method in skip:
            write_failure(layout, method, kind, seed)
        elif kind == "perplexity":
            write_perplexity(layout, method, seed)
        elif kind == "tasks":
            write_tasks(layout, method, 0.25 + 0.3 * generator.random())
        elif kind == "routing":
            write_routing(layout, method)
        else:
            write_quantize(layout, method, 1.5 + 2 * generator.random(), **quantize_details())


def quantize_details() -> dict[str, Any]:
    scales = {"count": 8, "minimum": 0.01, "median": 0.02, "p95": 0.05, "maximum": 0.1}
    blocks = [
        {
            "block": index,
            "output_error": {"self_attn.q_proj": 0.1 + index, "experts.gate": 0.2 + index},
            "scales": {"experts.gate.plain.row_scale": scales, "linears.self_attn.q_proj.plain.row_scale": scales},
        }
        for index in range(2)
    ]
    component = {"paper": 1.1, "codes": 1.0, "stored": 1.9, "weights": 64}
    return {"blocks": blocks, "bits_by_component": {"experts": component, "attention": component}}


def write_routing(layout: Layout, method: str) -> None:
    counts = {"reference": [[10, 30, 60], [50, 50, 100]], "quantized": [[20, 20, 60], [100, 0, 100]]}
    measurements = tuple(Measurement(f"layer{i}.expert_shift", 0.1 * (i + 1), 0.01, 50) for i in range(2))
    overall = Measurement("expert_shift", 0.15, 0.01, 100)
    write(layout, method, "routing", measurements=(*measurements, overall), details={"tokens_per_expert": counts})


# --- figure 8 ---------------------------------------------------------------------------------------------------------


def write_sizes(layout: Layout, skip: tuple[int, int] | None = None) -> dict[tuple[int, int], float]:
    """Perplexities of the first text by size and seed, one left out."""
    values = {}
    for size in SIZES:
        for seed in SEEDS:
            method = size_method(model(layout), size)
            if (size, seed) != skip:
                write_perplexity(layout, method, seed)
            values[size, seed] = float(np.exp(losses(f"{method} {seed}")["wiki"].mean()))
    return values


def test_the_models_own_calibration_size_is_the_plain_config(repository: Layout) -> None:
    assert size_method(model(repository), 128) == "mobie"
    assert size_method(model(repository), 16) == "mobie+calibration.sequences=16"
    assert size_method(Model("X", "X", None, "absent"), 128) == "mobie+calibration.sequences=128"


def test_sizes_and_seeds(repository: Layout) -> None:
    values = write_sizes(repository)
    data = collect_figure("fig8", results(repository))
    everything = np.array(list(values.values()))
    for (size, seed), value in values.items():
        row = one(data, series=f"seed {seed}", x=size)
        assert row["y"] == pytest.approx(value)
        assert row["deviation"] == pytest.approx(100 * (value / everything.mean() - 1))
    for size in SIZES:
        found = np.array([values[size, seed] for seed in SEEDS])
        row = one(data, series="mean of seeds", x=size)
        assert (row["y"], row["spread"]) == pytest.approx((found.mean(), found.std(ddof=1)))
    grand = one(data, series="mean of all")
    assert grand["y"] == pytest.approx(everything.mean())
    assert grand["deviation"] == pytest.approx(100 * np.abs(everything / everything.mean() - 1).max())
    errors = [row["stderr"] for row in data.rows if row["series"].startswith("seed ")]
    assert grand["stderr"] == pytest.approx(np.mean(errors))  # windows are shared: more points do not narrow it
    assert not data.holes


def test_a_size_without_one_seed_has_no_mean(repository: Layout) -> None:
    write_sizes(repository, skip=(32, 1))
    data = collect_figure("fig8", results(repository))
    assert one(data, series="seed 1", x=32)["status"] == "missing"
    means = {row["x"]: row["y"] for row in rows(data, series="mean of seeds")}
    assert means[32] is None and means[16] is not None
    grand = one(data, series="mean of all")
    assert grand["y"] is None and grand["deviation"] is None


# --- figure 9 ---------------------------------------------------------------------------------------------------------


def paired(method: str, reference: str, texts: Sequence[str] = TEXTS) -> tuple[float, float]:
    """Mean log ratio over texts and its standard error, in numpy."""
    differences = [losses(f"{method} 0")[text] - losses(f"{reference} 0")[text] for text in texts]
    errors = [d.std(ddof=1) / np.sqrt(len(d)) for d in differences]
    return float(np.mean([d.mean() for d in differences])), float(np.sqrt(np.sum(np.square(errors))) / len(texts))


def test_the_sweep_is_paired_with_the_papers_lambda(repository: Layout) -> None:
    found = results(repository)
    methods = {value: sweep_method(found, value, "wikitext2") for value in (0.1, 0.2, 0.9)}
    for method in methods.values():
        write_perplexity(repository, method)
    data = collect_figure("fig9", found)
    for value, method in methods.items():
        row = one(data, series="MoBiE", x=value)
        mean = np.mean([np.exp(nll.mean()) for nll in losses(f"{method} 0").values()])
        ratio, error = paired(method, methods[0.2])
        assert row["y"] == pytest.approx(mean)
        assert (row["log_ratio"], row["log_ratio_stderr"]) == pytest.approx((ratio, error))
        assert row["stderr"] == (None if value == 0.2 else pytest.approx(mean * error))
    assert one(data, series="MoBiE", x=0.5)["status"] == "missing"
    assert {row["config"].count("calibration.text=wiki-calibration") for row in rows(data, series="MoBiE")} == {1}


def test_without_the_papers_lambda_there_are_values_but_no_errors(repository: Layout) -> None:
    found = results(repository)
    write_perplexity(repository, sweep_method(found, 0.4, "wikitext2"))
    row = one(collect_figure("fig9", found), series="MoBiE", x=0.4)
    assert row["y"] is not None and row["stderr"] is None


def test_the_papers_averages_stand_beside_the_sweep(repository: Layout) -> None:
    with paper_table("table10").open() as file:
        printed = [line for line in csv.DictReader(file) if line["calibration"] == "wikitext2"]
    data = collect_figure("fig9", results(repository))
    assert [(r["x"], r["y"]) for r in rows(data, series="paper")] == [
        (float(line["lambda"]), float(line["avg_ppl"])) for line in printed
    ]


# --- figures 10 and 11 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backbone"), [("fig10", "billm"), ("fig11", "arb-llm")])
def test_plug_ins_are_paired_with_their_backbone(repository: Layout, name: str, backbone: str) -> None:
    configs = [backbone, f"{backbone}-glas", f"{backbone}-glas-nges"]
    for method in configs:
        write_perplexity(repository, method)
    data = collect_figure(name, results(repository))
    for method in configs:
        for text in TEXTS:
            row = one(data, panel="perplexity", config=method, x=text)
            assert row["y"] == pytest.approx(np.exp(losses(f"{method} 0")[text].mean()))
            assert row["stderr"] == pytest.approx(row["y"] * losses(f"{method} 0")[text].std(ddof=1) / WINDOWS**0.5)
    for method in configs[1:]:
        for text in TEXTS:
            ratio, error = paired(method, backbone, [text])
            row = one(data, panel="change", config=method, x=text)
            assert (row["y"], row["stderr"]) == pytest.approx((100 * np.expm1(ratio), 100 * np.exp(ratio) * error))
    assert not rows(data, panel="change", config=backbone)
    assert len(data.rows) == 15


def test_a_plug_in_that_failed_is_a_hole_and_the_others_are_not(repository: Layout) -> None:
    for method in ("billm", "billm-glas-nges"):
        write_perplexity(repository, method)
    write_failure(repository, "billm-glas", "perplexity")
    data = collect_figure("fig10", results(repository))
    assert {row["config"] for row in data.holes} == {"billm-glas"}
    assert {(row["status"], row["reason"]) for row in data.holes} == {("oom", "no memory")}


def test_without_the_backbone_there_is_no_change(repository: Layout) -> None:
    write_perplexity(repository, "arb-llm-glas")
    data = collect_figure("fig11", results(repository))
    assert one(data, panel="perplexity", config="arb-llm-glas", x="web")["y"] is not None
    assert one(data, panel="change", config="arb-llm-glas", x="web")["status"] == "missing"


def test_a_log_ratio_in_per_cent() -> None:
    cell = per_cent(Cell(np.log(1.25), 0.01, 9))
    assert (cell.value, cell.stderr, cell.n) == (pytest.approx(25), pytest.approx(1.25), 9)


# --- Pareto -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_front_is_what_no_point_beats(better: str) -> None:
    generator = random.Random("front")
    for _ in range(200):
        points = [(generator.randrange(6), generator.randrange(6)) for _ in range(generator.randrange(9))]
        expected = set()
        for index, (bits, value) in enumerate(points):
            gains = [(bits - b, v - value if better == "higher" else value - v) for b, v in points]
            if not any(min(gain) >= 0 and max(gain) > 0 for gain in gains):
                expected.add(index)
        front = pareto_front(points, better)
        assert set(front) == expected
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_rows(repository: Layout) -> None:
    for method, stored, accuracy in (
        ("fp16", 16.0, 0.6),
        ("billm", 2.9, 0.4),
        ("mobie", 1.9, 0.5),
        ("rtn-w3", 3.1, 0.3),
    ):
        write_quantize(repository, method, stored, paper=stored - 0.5)
        write_tasks(repository, method, accuracy)
        write_perplexity(repository, method)
    write_quantize(repository, "billm-glas", 1.0)
    write_perplexity(repository, "billm-glas")
    data = collect_figure("pareto", results(repository))
    accuracy = {row["config"]: row for row in rows(data, panel="accuracy") if row["y"] is not None}
    assert {name: (row["x"], row["bits_paper"], row["y"]) for name, row in accuracy.items()} == {
        "fp16": (16.0, 15.5, pytest.approx(60)),
        "billm": (2.9, 2.4, pytest.approx(40)),
        "mobie": (1.9, 1.4, pytest.approx(50)),
        "rtn-w3": (3.1, 2.6, pytest.approx(30)),
    }
    assert accuracy["mobie"]["stderr"] == pytest.approx(100 * 0.02 / 7**0.5)
    assert {name for name, row in accuracy.items() if row["front"]} == {"fp16", "mobie"}
    assert {name for name, row in accuracy.items() if row["at_chance"]} == {"rtn-w3"}
    perplexity = {row["config"]: row for row in rows(data, panel="perplexity") if row["y"] is not None}
    values = [(row["x"], row["y"]) for row in perplexity.values()]
    assert perplexity["billm-glas"]["front"] and perplexity["billm-glas"]["x"] == 1.0
    assert [row["front"] for row in perplexity.values()] == [
        i in pareto_front(values, "lower") for i in range(len(values))
    ]


def test_what_is_far_beyond_the_rest_stands_at_the_edge_with_its_value() -> None:
    rows = [{"x": x, "y": y} for x, y in ((2.0, 50.0), (2.0, 60.0), (3.0, 50.0), (26.0, 55.0), (2.5, 900.0))]
    edge = _Edge.of(rows, "lower")
    assert (edge.x, edge.y) == (5.0, 110.0)  # twice the medians
    assert [edge.place(row) for row in rows[2:]] == [(3.0, 50.0), (5.0, 55.0), (2.5, 110.0)]
    assert [edge.beyond(row) for row in rows[2:]] == ["", " (→ 26 bits)", " (↑ 900)"]
    assert _Edge.of(rows, "higher").y == 900.0
    assert _Edge.of(rows[:3], "lower") == _Edge(3.0, 60.0)


def test_without_its_bits_a_method_has_no_place(repository: Layout) -> None:
    write_failure(repository, "mobie", "quantize")
    write_perplexity(repository, "mobie")
    row = one(collect_figure("pareto", results(repository)), panel="perplexity", config="mobie")
    assert (row["y"], row["status"], row["reason"]) == (None, "oom", "no memory")
    assert row["record"].endswith("mobie/s0/quantize.json")


@pytest.mark.parametrize("suite", ["smoke", "paper"])
def test_pareto_asks_for_nothing_that_no_other_target_needs(repository: Layout, suite: str) -> None:
    others = {path for name in ("table2", "table4", "table5") for path in table_records(name, suite, repository)}
    others |= {path for name in ("fig10", "fig11") for path in figure_records(name, suite, repository)}
    others |= {path.with_name("quantize.json") for path in others}  # scoring needs it anyway
    asked = figure_records("pareto", suite, repository)
    assert set(asked) <= others
    plug_ins = [path for path in asked if "-glas" in path.parent.parent.name and "mobie" not in str(path.parent)]
    assert plug_ins and all(path.stem in ("quantize", "perplexity") for path in plug_ins)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def test_diagnostics_rows(repository: Layout) -> None:
    write_all(repository)
    data = collect_figure("diagnostics", results(repository))
    assert not data.holes
    errors = {(row["part"], row["x"]): row["y"] for row in rows(data, panel="output error", config="mobie")}
    assert errors == {
        ("self_attn.q_proj", 0): 0.1,
        ("self_attn.q_proj", 1): 1.1,
        ("experts.gate", 0): 0.2,
        ("experts.gate", 1): 1.2,
    }
    shifts = rows(data, panel="expert shift", config="billm")
    assert [(row["x"], row["y"], row["stderr"]) for row in shifts] == [(0, 0.1, 0.01), (1, 0.2, 0.01)]
    bits = {(row["x"], row["kind"]): row["y"] for row in rows(data, panel="bits", config="arb-llm")}
    assert (bits["experts", "codes"], bits["attention", "stored"], bits["experts", "paper"]) == (1.0, 1.9, 1.1)
    scales = rows(data, panel="scales", config="mobie")
    assert {(row["part"], row["x"], row["y"], row["p95"]) for row in scales} == {
        ("experts.gate.plain.row_scale", layer, 0.02, 0.05) for layer in (0, 1)
    }


def test_loads_are_shares_in_the_order_of_full_precision(repository: Layout) -> None:
    write_all(repository)
    data = collect_figure("diagnostics", results(repository))

    def loads(config: str, layer: int) -> list[tuple[int, int, float]]:
        found = rows(data, panel="tokens per expert", config=config, layer=layer)
        return [(row["x"], row["expert"], row["y"]) for row in found]

    assert loads("fp16", 0) == [(1, 2, 0.6), (2, 1, 0.3), (3, 0, 0.1)]
    assert loads("mobie", 0) == [(1, 2, 0.6), (2, 1, 0.2), (3, 0, 0.2)]
    assert loads("fp16", 1) == [(1, 2, 0.5), (2, 0, 0.25), (3, 1, 0.25)]  # ties by number
    assert loads("billm", 1) == [(1, 2, 0.5), (2, 0, 0.5), (3, 1, 0.0)]


def test_a_record_without_details_is_a_hole(repository: Layout) -> None:
    write_all(repository, skip=["billm"])
    path = repository.record("smoke", MODEL, "mobie", 0, "quantize")
    old = read_record(path)
    bare = [{"block": 0, "output_error": {"experts.gate": 0.3}}]
    write(repository, "mobie", "quantize", measurements=old.measurements, details={"blocks": bare})
    data = collect_figure("diagnostics", results(repository))
    holes = {(row["panel"], row["config"]): row["status"] for row in data.holes}
    panels = ("output error", "bits", "tokens per expert", "expert shift", "scales")
    assert holes == {(panel, "billm"): "oom" for panel in panels} | {
        ("bits", "mobie"): "missing",
        ("scales", "mobie"): "missing",
    }
    assert one(data, panel="output error", config="mobie")["y"] == 0.3


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (4, [0, 1, 2, 3]), (16, [0, 5, 10, 15]), (48, [0, 16, 31, 47])]
)
def test_a_few_layers_from_first_to_last(count: int, expected: list[int]) -> None:
    assert chosen_layers(count) == expected


# --- figure 4 and drawing ---------------------------------------------------------------------------------------------


def texts(figure: Any) -> list[Any]:
    """All texts of a figure that show something."""
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def test_the_diagram_needs_no_record_and_nothing_in_it_overlaps_or_is_cut(repository: Layout) -> None:
    assert figure_records("fig4", "smoke", repository) == []
    data = collect_figure("fig4", results(repository))
    numbers = {int(n) for row in data.rows for n in row["equations"].split(", ")}
    assert set(range(4, 14)) <= numbers
    figure = render(data)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    shown = " ".join(text.get_text() for text in texts(axes))
    assert all(f"({number})" in shown for number in (4, 8, 9, 10, 11, 12, 13))
    boxes = [
        (text.get_text(), text.get_window_extent()) for text in texts(axes) if axes.axison or text is not axes.title
    ]
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
    overlaps = [
        (a, b) for i, (a, one_) in enumerate(boxes) for b, other in boxes[:i] if one_.padded(-1).overlaps(other)
    ]
    assert overlaps == []
    assert min(text.get_fontsize() for text in texts(axes)) >= 7


def test_numbers_of_the_pareto_figure_do_not_hide_each_other(repository: Layout) -> None:
    write_all(repository)
    figure = render(collect_figure("pareto", results(repository)))
    figure.draw_without_rendering()
    from matplotlib.text import Annotation, Text

    panels = [axes for axes in figure.axes if axes.get_ylabel() in {label for label, _ in PANELS.values()}]
    assert len(panels) == 2
    for axes in panels:
        boxes = [Text.get_window_extent(text) for text in axes.findobj(Annotation)]  # without its line
        assert len(boxes) > 15
        assert not any(a.padded(-1.5).overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("name", ["fig8", "fig9", "fig10", "pareto", "diagnostics"])
def test_drawn_with_failures_among_values(repository: Layout, name: str) -> None:
    found = results(repository)
    failed = ["billm-glas", "mobie", "mobie-u4", sweep_method(found, 0.3, "wikitext2")]
    write_all(repository, skip=failed)
    data = collect_figure(name, found)
    assert {row["config"] for row in data.holes} <= {*failed}
    figure = render(data)
    figure.draw_without_rendering()
    assert "oom" in " ".join(text.get_text() for text in texts(figure))
