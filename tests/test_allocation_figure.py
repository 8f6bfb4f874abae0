"""The figure of who got how many bits: rows against the record, order, holes, and what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from mobie.figures import collect_figure, figure_records, render
from mobie.figures.allocation import BITS, NOBODY, SHARE
from mobie.figures.figure import FigureData
from mobie.paths import Layout
from mobie.records import Measurement, Record, write_record
from mobie.results import Results

MODEL, METHOD = "nano-olmoe", "quantmoe-2.3"


@pytest.fixture
def suite(repository: Layout) -> Layout:
    """The smoke suite with one method that shares out bits, and one that does not."""
    path = repository.config / "suites" / "smoke.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"methods": ["fp16", METHOD]}))
    return repository


def write(layout: Layout, blocks: list[dict[str, Any]], **how: Any) -> None:
    known = {"status": "ok", "reason": None, "suite": "smoke", "model": MODEL, "protocol": "p", "seed": 0}
    bits = (Measurement("bits_codes", 2.29, None, 100),)
    record = Record(kind="quantize", method=METHOD, measurements=bits, details={"blocks": blocks}, **(known | how))
    write_record(layout.record("smoke", MODEL, METHOD, 0, "quantize"), record)


def block(index: int, tokens: list[int], **bits: list[int]) -> dict[str, Any]:
    experts = {name: {"bits": own, "group_size": [128] * len(own)} for name, own in bits.items()}
    account = {"budget": 2.5, "reached": 2.4567}
    own = {
        "allocation": {"linears": {}, "experts": experts, "account": account},
        "survey": {"experts": {"tokens": tokens}},
    }
    return {"block": index, "tokens_per_expert": [1] * len(tokens)} | own


def collect(layout: Layout) -> FigureData:
    return collect_figure("allocation", Results("smoke", layout))


def test_rows_have_use_and_mean_bits_most_used_first(suite: Layout) -> None:
    dense = {"block": 0, "allocation": {"linears": {}, "experts": {}}, "survey": {}}
    write(suite, [dense, block(1, [10, 60, 30], gate=[2, 4, 2], up=[2, 4, 4], down=[2, 4, 3])])
    data = collect(suite)
    assert not data.holes
    rows = {
        panel: [(r["layer"], r["x"], r["expert"], r["y"]) for r in data.select(panel=panel)] for panel in (SHARE, BITS)
    }
    assert rows[SHARE] == [(1, 1, 1, 0.6), (1, 2, 2, 0.3), (1, 3, 0, 0.1)]
    assert rows[BITS] == [(1, 1, 1, 4.0), (1, 2, 2, 3.0), (1, 3, 0, 2.0)]
    assert data.select(panel=BITS, expert=2)[0]["widths"] == "down 3 gate 2 up 4"
    assert data.rows[0]["record"].endswith(f"{METHOD}/s0/quantize.json")


def test_drawn_as_layers_by_experts_with_the_average_in_the_title(suite: Layout) -> None:
    write(suite, [block(0, [5, 0, 5], gate=[4, 2, 2]), block(1, [0, 0, 0], gate=[2, 2, 4])])
    figure = render(collect(suite))
    images = [axes.images[0].get_array().tolist() for axes in figure.axes if axes.images]
    assert images[0] == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert images[1] == [[4.0, 2.0, 2.0], [2.0, 2.0, 4.0]]
    limits = [axes.images[0].get_clim() for axes in figure.axes if axes.images]
    assert limits[:2] == [(0.0, 0.5), (2.0, 4.0)]
    assert figure.axes[0].get_title() == "nano-olmoe: QuantMoE-Bench\n2.457 of 2.5 bits"


def test_failed_and_old_records_are_holes_with_their_reason(suite: Layout) -> None:
    assert [path.parts[-3] for path in figure_records("allocation", "smoke", suite)] == [METHOD]
    assert [row["status"] for row in collect(suite).holes] == ["missing"]
    write(suite, [], status="unsupported", reason="quantmoe: budget is 2.3 bits per weight, but …")
    (gap,) = collect(suite).rows
    assert (gap["status"], gap["panel"]) == ("unsupported", BITS)
    render(collect(suite))
    write(suite, [{"block": 0, "tokens_per_expert": [1, 2]}])
    assert [row["reason"] for row in collect(suite).holes] == ["the record has no allocation"]


def test_a_suite_without_such_methods_says_so(suite: Layout) -> None:
    path = suite.config / "suites" / "smoke.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"methods": ["fp16"]}))
    data = collect(suite)
    assert [row["reason"] for row in data.holes] == [NOBODY]
    assert figure_records("allocation", "smoke", suite) == []
    render(data)
