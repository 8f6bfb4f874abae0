"""All figures: what every one of them must do, in both suites, and the values of Figures 1 to 3 and 5 to 7 from records
made by hand, against sums done here."""

from __future__ import annotations

import csv
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import speed_records

from mobie.errors import ConfigError, DataError
from mobie.figures import FIGURES, collect_figure, figure_records, render, write_figure
from mobie.figures.figure import COLUMNS, FigureData, hole, point, to_csv
from mobie.figures.style import METHODS, SMALL, STDERRS, fit, method_style, new_figure
from mobie.jobs.methods import is_allocating
from mobie.paper.printed import printed
from mobie.paths import PACKAGE, Layout
from mobie.records import Measurement, Record, write_record
from mobie.results import Cell, Results
from mobie.tables.table2 import TASK_METRICS

SUITES = ("smoke", "paper")
SUFFIXES = ("svg", "pdf", "png", "csv")
NANO = "nano-olmoe"
DIAGRAMS = ("fig4",)  # read no record
REPEATED = ("fig2", "fig5", "fig10")  # images, lines and holes, bars: the writer is the same for all
DRAWN = tuple(name for name in FIGURES if name not in DIAGRAMS)
LAYERS, EXPERTS, TOP_K, TOKENS = 4, 6, 2, 48
CHANCE = dict(zip(TASK_METRICS, (0.25, 0.25, 0.25, 0.0, 0.0, 0.5, 0.5), strict=True))
every_figure = pytest.mark.parametrize("name", FIGURES)
every_drawn = pytest.mark.parametrize("name", DRAWN)
every_suite = pytest.mark.parametrize("suite", SUITES)


# --- records ---------------------------------------------------------------------------------------------------------


def write(
    layout: Layout,
    method: str,
    kind: str,
    measurements: Iterable[Measurement] = (),
    *,
    model: str = NANO,
    suite: str = "smoke",
    seed: int = 0,
    **how: Any,
) -> None:
    keys = {"suite": suite, "model": model, "method": method, "seed": seed, "protocol": "p"}
    record = Record(kind, **({"status": "ok", "reason": None} | how), **keys, measurements=tuple(measurements))
    write_record(layout.record(suite, model, method, seed, kind), record)


def tasks(values: Mapping[str, float], stderr: float = 0.01) -> list[Measurement]:
    """Accuracies by task, with the other metric as a trap."""
    found = []
    for task, value in values.items():
        metric = TASK_METRICS[task]
        other = {"acc": "acc_norm", "acc_norm": "acc"}[metric]
        found.append(Measurement(f"{task}.{metric}", value, stderr, 200, CHANCE[task]))
        found.append(Measurement(f"{task}.{other}", 0.99, stderr, 200, CHANCE[task]))
    return found


def routing(similarity: Iterable[float], shift: Iterable[float], stderr: float = 0.01) -> list[Measurement]:
    named = {"similarity": list(similarity), "expert_shift": list(shift)}
    return [
        *(
            Measurement(f"layer{i}.{name}", v, stderr, 99)
            for name, values in named.items()
            for i, v in enumerate(values)
        ),
        *(Measurement(name, sum(values) / len(values), stderr, 99) for name, values in named.items()),
    ]


def cka(matrices: Mapping[str, Mapping[str, list[list[float]]]]) -> list[Measurement]:
    found = []
    for layer, stages in matrices.items():
        for stage, matrix in stages.items():
            pairs = [value for i, line in enumerate(matrix) for value in line[i + 1 :]]
            found.append(Measurement(f"{layer}.{stage}", sum(pairs) / len(pairs), None, len(pairs), 0.33))
    return [*found, *(Measurement(stage, 0.4, None, 99, 0.33) for stage in ("before", "after", "after_binarized"))]


def block(index: int, draw: random.Random) -> dict[str, Any]:
    """What a quantize record says of a block."""
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + ["experts.gate", "experts.up", "experts.down"]
    scale = {"count": 64, "minimum": 0.001, "median": 0.01, "p95": 0.03, "maximum": 0.08}
    return {
        "block": index,
        "cpu_seconds": draw.uniform(5, 9),
        "output_error": {name: draw.uniform(0.1, 0.5) for name in names},
        "tokens_per_expert": [draw.randrange(50, 500) for _ in range(EXPERTS)],
        "borrowed_statistics": {"gate": [], "up": [], "down": []},
        "scales": {"experts.gate.plain": scale, "experts.down.plain": scale},
    }


def allocation(draw: random.Random) -> dict[str, Any]:
    """What the record of a method that shares out bits says of a block besides."""
    bits = {name: {"bits": [draw.choice([2, 4]) for _ in range(EXPERTS)]} for name in ("gate", "up", "down")}
    account = {"budget": 2.3, "reached": 2.29}
    survey = {"experts": {"tokens": [draw.randrange(50, 500) for _ in range(EXPERTS)]}}
    return {"allocation": {"experts": bits, "account": account}, "survey": survey}


def contents(results: Results, method: str, kind: str) -> tuple[list[Measurement], dict[str, Any]]:
    """Measurements and details of a record of any kind, all values from a generator."""
    draw = random.Random(f"{method} {kind}")
    texts = results.protocol.texts
    if kind == "quantize":
        bits = [Measurement(f"bits_{k}", draw.uniform(1, 3), None, 7340032) for k in ("paper", "codes", "stored")]
        blocks = [block(index, draw) for index in range(LAYERS)]
        if is_allocating(results.method(method).method):
            blocks = [own | allocation(draw) for own in blocks]
        components = {c: {"paper": 1.5, "codes": 1.2, "stored": 2.0, "weights": 100} for c in ("experts", "attention")}
        return bits, {
            "options": {},
            "blocks": blocks,
            "bytes_by_item": {"block0.experts.gate.basis.codes": 65536},
            "kept_bytes": 4235776,
            "file_bytes": 6023856,
            "gradient_cpu_seconds": 15.8,
            "bits_by_component": components,
        }
    if kind == "perplexity":
        nll = {text: [draw.uniform(2, 4) for _ in range(8)] for text in texts}
        found = [Measurement(f"{text}.perplexity", draw.uniform(15, 60), 0.5, 999) for text in texts]
        return found, {"window_nll": nll, "window_tokens": 256}
    if kind == "tasks":
        return tasks({task: draw.uniform(0.2, 0.7) for task in TASK_METRICS}), {"answers": {}, "items": {}}
    if kind == "routing":
        picks = {
            side: [draw.sample(range(EXPERTS), TOP_K) for _ in range(TOKENS)] for side in ("reference", "quantized")
        }
        counts = {side: [[draw.randrange(500) for _ in range(EXPERTS)] for _ in range(LAYERS)] for side in picks}
        values = [[draw.uniform(low, low + 0.1) for _ in range(LAYERS)] for low in (0.85, 0.1)]
        words = ["\n", " the", "$x$", "漢", *(f" word{index}" for index in range(TOKENS - 4))]
        return routing(*values), {"map": {"layer": 2, "tokens": words, **picks}, "tokens_per_expert": counts}
    if kind == "cka":
        shape = range(EXPERTS)
        matrices = {
            f"layer{layer}.gate": {
                stage: [[1.0 if i == j else round(draw.uniform(0.1, 0.6), 4) for j in shape] for i in shape]
                for stage in ("before", "after", "after_binarized")
            }
            for layer in (0, 2, 3)
        }
        return cka(matrices), {"matrices": matrices, "samples": "residual", "spread": {}}
    if kind == "speed":
        return speed_records.measurements(method), speed_records.details(method)
    if kind == "expert_usage":
        sets = {
            side: {"uses": [[draw.randrange(500) for _ in range(EXPERTS)] for _ in range(LAYERS)], "tokens": 1000}
            | {"layers": list(range(LAYERS))}
            for side in ("own", "ordinary")
        }
        names = [f"{layer}{side}.imbalance" for side in sets for layer in ("", *(f"layer{i}." for i in range(LAYERS)))]
        found = [Measurement(name, draw.uniform(0, 0.5), None, 1000) for name in names]
        found += [Measurement(f"{side}.perplexity", draw.uniform(2, 60), None, 1000) for side in sets]
        return found, {**sets, "texts": {"own": "ebss", "ordinary": "wiki-calibration"}}
    raise NotImplementedError(f"a figure asks for records of kind {kind}: add what they hold")


def fill(layout: Layout, suite: str, name: str, **how: Any) -> None:
    """Write every record that a figure reads."""
    results = Results(suite, layout)
    for path in figure_records(name, suite, layout):
        model, method, seed, file = path.relative_to(layout.root).parts[2:]
        kind = file.removesuffix(".json")
        found, details = contents(results, method, kind)
        write(layout, method, kind, found, model=model, suite=suite, seed=int(seed[1:]), details=details, **how)


# --- what every figure must do ---------------------------------------------------------------------------------------


def test_plans_need_neither_torch_nor_matplotlib_and_ask_for_records_of_both_suites() -> None:
    code = """
import sys
from mobie.figures import FIGURES, figure_records
from mobie.config import default_layout
for suite in ("smoke", "paper"):
    for name in FIGURES:
        print(suite, name, len(figure_records(name, suite, default_layout())))
heavy = sorted({"torch", "transformers", "matplotlib", "numpy", "pandas"} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = {tuple(line.split()[:2]): int(line.split()[2]) for line in done.stdout.splitlines()}
    assert {name for (_, name), count in asked.items() if not count} == set(DIAGRAMS)
    assert len(asked) == len(SUITES) * len(FIGURES)


@every_suite
@every_drawn
def test_a_figure_asks_for_the_same_records_whatever_they_hold(repository: Layout, suite: str, name: str) -> None:
    planned = figure_records(name, suite, repository)
    empty = Results(suite, repository)
    collect_figure(name, empty)
    assert list(empty.asked) == planned
    fill(repository, suite, name)
    full = Results(suite, repository)
    data = collect_figure(name, full)
    assert list(full.asked) == planned
    read = {row["record"] for row in data.rows if row.get("record")}
    assert read <= {path.relative_to(repository.root).as_posix() for path in planned}
    assert read
    for path in planned:  # failed ones do not lead to others either
        kind = path.stem
        model, method, seed = path.relative_to(repository.root).parts[2:5]
        how = {"status": "oom", "reason": "RuntimeError: no memory"}
        write(repository, method, kind, model=model, suite=suite, seed=int(seed[1:]), **how)
    failed = Results(suite, repository)
    data = collect_figure(name, failed)
    assert list(failed.asked) == planned
    assert "oom: RuntimeError: no memory" in data.reasons


@every_suite
@every_figure
def test_without_records_a_figure_shows_its_holes(repository: Layout, suite: str, name: str) -> None:
    data = collect_figure(name, Results(suite, repository))
    figure = render(data)
    check_look(figure)
    if name in DIAGRAMS:
        assert not data.holes
        return
    shown = " ".join(" ".join(text.get_text().split()) for text in visible_texts(figure))
    assert "missing: its job has not run" in data.reasons
    assert "missing: its" in shown
    assert any(patch.get_hatch() for patch in drawn_patches(figure))
    assert all(row["y"] is None and row["reason"] for row in data.holes)


@every_suite
@every_drawn
def test_with_all_records_a_figure_has_no_hole_that_could_be_filled(repository: Layout, suite: str, name: str) -> None:
    fill(repository, suite, name)
    data = collect_figure(name, Results(suite, repository))
    assert {row["status"] for row in data.holes} <= {"absent", "unsupported"}
    assert any(row["status"] == "ok" and row.get("record") for row in data.rows)
    check_look(render(data))


@pytest.mark.parametrize("name", ["fig1", "fig4"])
def test_four_files_in_the_folder_of_figures_and_the_csv_holds_the_rows(repository: Layout, name: str) -> None:
    paths = write_figure(name, Results("smoke", repository))
    assert paths == [repository.root / "paper_figures" / f"{name}.{suffix}" for suffix in SUFFIXES]
    starts = [b"<?xml", b"%PDF", b"\x89PNG", b"suite,figure,"]
    assert [path.read_bytes()[: len(start)] for path, start in zip(paths, starts, strict=True)] == starts
    lines = list(csv.DictReader(paths[-1].open(encoding="utf-8")))
    data = collect_figure(name, Results("smoke", repository))
    assert len(lines) == len(data.rows)
    assert list(lines[0])[: 2 + len(COLUMNS)] == ["suite", "figure", *COLUMNS]
    assert {line["suite"] for line in lines} == {"smoke"}


@every_figure
def test_a_figure_says_what_it_is(repository: Layout, name: str) -> None:
    data = collect_figure(name, Results("smoke", repository))
    assert data.name == name
    assert data.suite == "smoke"
    assert data.caption.endswith(".")
    figure = render(data)
    shown = [" ".join(text.get_text().split()) for text in figure.texts]
    assert " ".join(data.heading.split()) in shown
    footer = next(text for text in shown if text.startswith("suite smoke"))
    assert footer.endswith(f"values {data.digest}")
    if name not in DIAGRAMS:
        assert "not a model of the paper's: direction only" in footer
        assert "two standard errors" in data.caption or all(row.get("stderr") is None for row in data.rows)


def test_the_same_values_give_the_same_bytes_in_another_process_at_another_time(repository: Layout) -> None:
    for name in REPEATED:
        fill(repository, "smoke", name, provenance={"finished": "2026-01-01", "host": "one"})
        write_figure(name, Results("smoke", repository))
    paths = [repository.figure(name, suffix) for name in REPEATED for suffix in SUFFIXES]
    before = {path: path.read_bytes() for path in paths}
    for name in REPEATED:
        fill(repository, "smoke", name, provenance={"finished": "2027-02-02", "host": "two"})
    code = (
        "from mobie.figures import write_figure\n"
        "from mobie.config import default_layout\n"
        "from mobie.results import Results\n"
        f"for name in {list(reversed(REPEATED))}:\n"
        "    write_figure(name, Results('smoke', default_layout()))\n"
        "import sys\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    for path in paths:
        path.unlink()
    other = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "99", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=repository.root, env=other, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in paths if path.read_bytes() != before[path]] == []


def test_another_value_gives_another_digest(repository: Layout) -> None:
    fill(repository, "smoke", "fig6")
    before = collect_figure("fig6", Results("smoke", repository))
    write(repository, "mobie", "routing", routing([0.9, 0.9, 0.9, 0.91], [0.1] * LAYERS))
    changed = collect_figure("fig6", Results("smoke", repository))
    write(repository, "mobie", "routing", routing([0.9, 0.9, 0.9, 0.92], [0.1] * LAYERS))
    again = collect_figure("fig6", Results("smoke", repository))
    assert len({before.digest, changed.digest, again.digest}) == 3


def test_an_unknown_figure_and_a_damaged_record_are_refused_by_name(repository: Layout) -> None:
    with pytest.raises(ConfigError, match="fig6"):
        write_figure("fig66", Results("smoke", repository))
    fill(repository, "smoke", "fig6")
    path = repository.record("smoke", NANO, "billm", 0, "routing")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"billm/s0/routing\.json"):
        write_figure("fig6", Results("smoke", repository))
    assert not repository.figure("fig6", "svg").exists()


def visible_texts(figure: Any) -> list[Any]:
    """All texts but the numbers at the axes' ticks: an axis keeps some that it does not draw."""
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    ticks = {id(label) for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if id(text) not in ticks and text.get_visible()]
    return [
        text
        for text in texts
        if text.get_text().strip() and (text.axes is None or text.axes.axison or text in text.axes.texts)
    ]


def drawn_patches(figure: Any) -> list[Any]:
    from matplotlib.patches import Patch

    return [patch for patch in figure.findobj(Patch) if patch.get_visible()]


def check_look(figure: Any) -> None:
    """Text is legible, wholly inside the figure, and title and footer lie on nothing."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    texts = visible_texts(figure)
    boxes = {text: text.get_window_extent() for text in texts}
    tiny = [text.get_text() for text in texts if text.get_fontsize() < SMALL]
    assert not tiny
    boxes_of_axes = {axes: axes.get_tightbbox() for axes in figure.axes}  # tick labels too
    cut = [
        (str(what), box.extents.round().tolist())
        for what, box in (boxes | boxes_of_axes).items()
        if box is not None
        if min(box.x0, box.y0) < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    assert not cut
    frame = figure.texts[-2:]
    covered = [
        (one.get_text(), two.get_text())
        for one in frame
        for two in texts
        if one is not two and boxes[one].overlaps(boxes[two].padded(-1))
    ]
    assert not covered
    assert width / figure.dpi <= 6.8 + 1e-6


# --- values ----------------------------------------------------------------------------------------------------------


def rows_of(data: FigureData, **keys: Any) -> list[Any]:
    found = data.select(**keys)
    assert found, keys
    return found


def test_figure_1_averages_seven_tasks_and_shows_the_papers_beside_them(repository: Layout) -> None:
    values = dict(zip(TASK_METRICS, (0.6, 0.4, 0.5, 0.3, 0.2, 0.65, 0.55), strict=True))
    write(repository, "mobie", "tasks", tasks(values, 0.02), model="olmoe-1b-7b", suite="paper")
    data = collect_figure("fig1", Results("paper", repository))
    (row,) = rows_of(data, model="OLMoE", config="mobie")
    assert row["y"] == pytest.approx(100 * 3.2 / 7)
    assert row["stderr"] == pytest.approx(100 * math.sqrt(7 * 0.02**2) / 7)
    assert row["chance"] == pytest.approx(25)
    printed_there = {(r["model"], r["config"]): r["paper"] for r in data.rows if r.get("paper") is not None}
    assert printed_there[("OLMoE", "mobie")] == 49.89
    assert printed_there[("Mixtral", "fp16")] == 67.98
    assert ("Mixtral", "billm") not in printed_there  # Table 7 has no such row
    assert len(printed_there) == 3 * 4 + 2 * 2
    assert rows_of(data, series="FP16 models of similar size")[0]["status"] == "absent"
    figure = render(data)
    (axes,) = figure.axes
    heights = [patch.get_height() for patch in axes.patches if not patch.get_hatch() and patch.get_height() > 1]
    assert heights == [pytest.approx(row["y"])]
    (bar,) = [c for c in axes.containers if type(c).__name__ == "ErrorbarContainer"]
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * STDERRS * row["stderr"])


def test_figure_1_keeps_the_papers_models_apart_from_ours(repository: Layout) -> None:
    data = collect_figure("fig1", Results("smoke", repository))
    ours, papers = (rows_of(data, panel=panel) for panel in ("measured", "the paper's printed values"))
    assert all(row.get("paper") is None for row in ours)
    assert {row["model"] for row in papers} == {"OLMoE", "DeepSeekV2-Lite", "Qwen3-MoE", "Qwen1.5-MoE", "Mixtral"}
    assert all(row["paper"] == row["y"] for row in papers if row["y"] is not None)
    assert [row["status"] for row in papers].count("absent") == 4
    assert printed("table2", "OLMoE", method="MoBiE")["avg7"] in [row["y"] for row in papers]
    assert {axes.get_title() for axes in render(data).axes} == {"measured", "the paper's printed values"}


def test_figure_2_draws_the_matrices_and_prints_their_means(repository: Layout) -> None:
    fill(repository, "smoke", "fig2")
    record = contents(Results("smoke", repository), "mobie", "cka")
    data = collect_figure("fig2", Results("smoke", repository))
    lines = rows_of(data, layer=2, stage="after", series="expert")
    matrix = record[1]["matrices"]["layer2.gate"]["after"]
    assert [[float(value) for value in row["values"].split()] for row in lines] == matrix
    (mean,) = rows_of(data, layer=2, stage="after", series="mean over pairs of experts")
    pairs = [matrix[i][j] for i in range(EXPERTS) for j in range(i + 1, EXPERTS)]
    assert mean["y"] == pytest.approx(sum(pairs) / 15)
    figure = render(data)
    images = [image for axes in figure.axes for image in axes.images]
    assert len(images) == 9
    assert {image.get_clim() for image in images} == {(0, 1)}
    shown = [image.get_array().tolist() for image in images]
    assert matrix in shown
    assert figure.axes[shown.index(matrix)].get_xlabel().startswith(f"{mean['y']:.3f}")


def test_figure_3_tells_kept_new_and_lost_assignments(repository: Layout) -> None:
    found = {"layer": 1, "tokens": [" a", "\n"], "reference": [[0, 1], [2, 3]], "quantized": [[1, 0], [5, 2]]}
    write(repository, "mobie", "routing", routing([0.9], [0.1]), details={"map": found})
    data = collect_figure("fig3", Results("smoke", repository))
    got = [(r["x"], r["y"], r["state"]) for r in rows_of(data, panel="MoBiE")]
    kept, new, lost = "as in full precision", "new after binarization", "lost by binarization"
    assert got == [(0, 0, kept), (0, 1, kept), (1, 2, kept), (1, 3, lost), (1, 5, new)]
    assert {r["state"] for r in rows_of(data, panel="full precision")} == {kept}
    assert [r["token"] for r in rows_of(data, panel="MoBiE")] == ["a", "a", "␣", "␣", "␣"]
    assert rows_of(data, panel="ARB-LLM")[0]["status"] == "missing"
    titles = [axes.get_title(loc="left") for axes in render(data).axes]
    assert any("MoBiE: 25.0 % changed" in title for title in titles)  # one of four
    assert "`wiki`" in data.caption


def test_figure_3_says_that_an_older_record_has_no_map(repository: Layout) -> None:
    write(repository, "mobie", "routing", routing([0.9], [0.1]))
    data = collect_figure("fig3", Results("smoke", repository))
    assert rows_of(data, panel="MoBiE")[0]["reason"] == "the record has no map of tokens"


def quantize(
    layout: Layout, method: str, bits: float, file_bytes: int, seconds: list[float | None], **more: Any
) -> None:
    measured = [Measurement(f"bits_{k}", bits + extra, None, 800) for k, extra in (("paper", 0), ("stored", 1))]
    blocks = [{"block": i, "cpu_seconds": value} for i, value in enumerate(seconds)]
    details = {"blocks": blocks, "file_bytes": file_bytes, "gradient_cpu_seconds": None} | more
    write(layout, method, "quantize", measured, details=details)


def test_figure_5_compares_bytes_with_full_precision_and_adds_up_seconds(repository: Layout) -> None:
    quantize(repository, "fp16", 15, 4000, [1.0])
    quantize(repository, "mobie", 1.5, 1000, [2.0, 3.0], gradient_cpu_seconds=4.0)
    quantize(repository, "billm", 1.1, 900, [2.0, None])
    write(repository, "mobie", "tasks", tasks(dict.fromkeys(TASK_METRICS, 0.5)))
    data = collect_figure("fig5", Results("smoke", repository))
    (files,) = rows_of(data, series="weight files", config="mobie")
    (weights,) = rows_of(data, series="quantized weights", config="mobie")
    assert (files["x"], files["y"], files["bytes"]) == (1.5, 25.0, 1000.0)
    assert weights["y"] == pytest.approx(100 * 2.5 / 16)
    assert weights["bytes"] == pytest.approx(2.5 * 800 / 8)
    (time,) = rows_of(data, panel="Average accuracy (%)", config="mobie")
    assert (time["x"], time["y"]) == (9.0, pytest.approx(50))
    (unknown,) = rows_of(data, panel="Average accuracy (%)", config="billm")
    assert unknown["y"] is None
    assert "read back" in unknown["reason"]
    check_look(render(data))


def test_figure_5_shows_the_papers_four_points_and_the_missing_speed(repository: Layout) -> None:
    data = collect_figure("fig5", Results("smoke", repository))
    papers = [(r["config"], r["x"], r["paper"]) for r in rows_of(data, series="paper") if r["y"] is not None]
    assert papers == [("fp16", 16, 22.05), ("fp16", 16, 9.64), ("mobie", 1.37, 51.38), ("mobie", 1.37, 1.88)]
    (memory,) = rows_of(data, series="paper", config="mobie", panel="Memory, % of FP16")
    assert memory["y"] == pytest.approx(19.50, abs=0.005)
    speeds = rows_of(data, panel="Tokens per second", model=NANO)
    assert {row["reason"] for row in speeds} == {"its job has not run"}


def test_figure_5_fills_when_speed_is_measured(repository: Layout) -> None:
    fill(repository, "smoke", "fig5")
    for rank, method in enumerate(("fp16", "mobie-u16", "mobie", "mobie-u4"), start=1):
        speed = [
            Measurement("tokens_per_second", 10.0 * rank, 1.0, 9),
            Measurement("weight_bytes", 800.0 / rank, None, 1),
        ]
        write(repository, method, "speed", speed)
    data = collect_figure("fig5", Results("smoke", repository))
    assert [row["y"] for row in rows_of(data, panel="Tokens per second", model=NANO)] == [10, 20, 30, 40]
    assert [row["y"] for row in rows_of(data, series="weights in memory")] == pytest.approx([100, 50, 100 / 3, 25])
    left = render(data).axes[0]
    points = [float(line.get_ydata()[0]) for line in left.lines if line.get_marker() in ("s", "o")]
    assert points == [10, 20, 30, 40]
    assert not any(patch.get_hatch() for patch in left.patches)


def test_figure_6_draws_every_layer_with_its_interval(repository: Layout) -> None:
    write(repository, "fp16", "routing", routing([1.0, 1.0, 1.0], [0.0] * 3, 0.0))
    write(repository, "mobie", "routing", routing([0.98, 0.95, 0.9], [0.1] * 3, 0.02))
    write(repository, "billm", "routing", status="oom", reason="RuntimeError: no memory")
    data = collect_figure("fig6", Results("smoke", repository))
    mobie_rows = rows_of(data, config="mobie")
    assert [(row["x"], row["y"]) for row in mobie_rows] == [(0, 0.98), (1, 0.95), (2, 0.9)]
    figure = render(data)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["MoBiE"]) == [0.98, 0.95, 0.9]
    spans = [segment for c in axes.collections for segment in c.get_segments()]
    assert any(abs((s[1, 1] - s[0, 1]) - 2 * STDERRS * 0.02) < 1e-9 for s in spans)
    legend = [" ".join(text.get_text().split()) for text in axes.get_legend().get_texts()]
    assert "BiLLM: oom: RuntimeError: no memory" in legend
    assert "ARB-LLM: missing: its job has not run" in legend
    dashed = {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"}
    assert dashed == {0.8, 0.9}


def test_figure_7_repeats_the_model_of_figure_6_only_where_the_suite_has_no_other(repository: Layout) -> None:
    fill(repository, "smoke", "fig7")
    smoke = collect_figure("fig7", Results("smoke", repository))
    paper = collect_figure("fig7", Results("paper", repository))
    assert "the model of Figure 6" in smoke.facts
    assert "the model of Figure 6" not in paper.facts
    assert {row["model"] for row in paper.rows} == {"Qwen1.5-MoE"}
    first = collect_figure("fig6", Results("smoke", repository))
    similar = [row["y"] for row in rows_of(smoke, panel="Routing similarity")]
    assert similar == [row["y"] for row in rows_of(first, panel="Routing similarity")]
    shift = rows_of(smoke, panel="Expert shift", config="mobie")
    assert [row["y"] for row in shift] == [
        m.value
        for m in contents(Results("smoke", repository), "mobie", "routing")[0]
        if m.name.endswith("expert_shift")
    ][:LAYERS]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_methods_differ_in_colour_and_marker_and_variants_look_like_their_method() -> None:
    styles = list(METHODS.values())
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == len(styles)
    bars = [METHODS[name] for name in ("fp16", "billm", "arb", "mobie")]
    assert len({(style.color, style.hatch) for style in bars}) == 4
    assert method_style("mobie+regularization=0.3") is method_style("mobie") is METHODS["mobie"]
    assert method_style("arb-llm-glas") is METHODS["arb"]
    assert method_style("something") not in styles


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.1 of two colours `#rrggbb`."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_grey_text_is_legible_on_white() -> None:
    from mobie.figures.style import GREY

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast(GREY, "#ffffff") >= 4.5


def test_a_row_of_a_cell_and_a_hole() -> None:
    row = point(Cell(2.0, 0.5, 9, record="r.json"), x=1, model="m")
    assert (row["y"], row["stderr"], row["n"], row["status"], row["x"], row["model"]) == (2.0, 0.5, 9, "ok", 1, "m")
    gap = hole("absent", "why", model="m", series="s")
    data = FigureData("fig6", "smoke", "t", "c.", (row, gap, gap))
    assert data.holes == (gap, gap)
    assert data.reasons == {"absent: why": ["m s"]}


def test_the_csv_writes_numbers_plainly_and_quotes_text() -> None:
    row = point(Cell(1 / 3), x=1e-7, own=True, series='a, "b"')
    lines = list(csv.DictReader(to_csv(FigureData("fig6", "smoke", "t", "c.", (row,))).splitlines()))
    assert (lines[0]["y"], lines[0]["x"], lines[0]["own"], lines[0]["stderr"]) == ("0.3333333333", "1e-07", "true", "")
    assert lines[0]["series"] == 'a, "b"'


@pytest.mark.parametrize(("length", "depth"), [(0.2, 0.1), (1.0, 0.3), (3.0, 2.0)])
def test_a_reason_is_wrapped_to_its_place_and_cut_after_it(length: float, depth: float) -> None:
    text = "RuntimeError: the graphics card has no memory left for the experts of block 12"
    shown = fit(text, length, depth)
    lines = shown.splitlines()
    assert len(lines) <= max(1, depth * 72 / SMALL)
    assert " ".join(lines) == text or lines[-1].endswith("…")
    figure = new_figure()
    drawn = figure.text(0, 0, shown, size=SMALL)
    box = drawn.get_window_extent()
    assert box.width <= max(length, 0.9) * figure.dpi


def test_no_figure_leaves_a_trace_in_the_global_state_of_matplotlib(repository: Layout) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_figure("fig6", Results("smoke", repository))
    assert dict(matplotlib.rcParams) == before
