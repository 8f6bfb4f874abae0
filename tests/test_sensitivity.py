"""The ranking of readings, against changes made by hand."""

from __future__ import annotations

import math

import pytest

from mobie.config import load_method
from mobie.paths import Layout
from mobie.records import Measurement, Record, write_record
from mobie.results import Results
from mobie.tables import build_table
from mobie.tables.sensitivity import READINGS
from mobie.tables.table import Table
from mobie.tables.table10 import sweep_method

TEXTS = ("wiki", "web", "books")


def run(layout: Layout, method: str, shift: float, stored: float = 2.0) -> None:
    """Records of a method whose loss is `shift` above the default's in every window, but for a ripple."""
    nll = {text: [4 + shift + (0.01 if window % 2 else -0.01) * (shift != 0) for window in range(10)] for text in TEXTS}
    values = [Measurement(f"{text}.perplexity", math.exp(sum(x) / len(x)), 1.0, 99) for text, x in nll.items()]
    for kind, found, details in (
        ("perplexity", values, {"window_nll": nll}),
        ("quantize", [Measurement("bits_stored", stored, None, 99)], {}),
    ):
        record = Record(kind, "ok", None, "smoke", "nano-olmoe", method, 0, "p", tuple(found), details)
        write_record(layout.record("smoke", "nano-olmoe", method, 0, kind), record)


def build(layout: Layout) -> Table:
    return build_table("sensitivity", Results("smoke", layout))


def test_readings_are_ranked_by_the_size_of_their_effect(repository: Layout) -> None:
    run(repository, sweep_method(Results("smoke", repository), 0.2, "wikitext2"), 0.0)
    run(repository, "mobie-fused+calibration.sequences=32", 0.05, stored=2.5)
    run(repository, "mobie-right+calibration.sequences=32", -0.20)
    run(repository, "mobie-u16+calibration.sequences=32", 0.001)
    rows = build(repository).rows
    first = [row.config for row in rows[:3]]
    assert first == [f"mobie-{name}+calibration.sequences=32" for name in ("right", "fused", "u16")]
    right, fused, u16 = rows[:3]
    assert right.cells["change"].value == pytest.approx(100 * (math.exp(-0.20) - 1))
    assert fused.cells["change"].value == pytest.approx(100 * (math.exp(0.05) - 1))
    ripple = 0.01 * math.sqrt(10 / 9) / math.sqrt(10) / math.sqrt(3)  # ± 0.01 in ten windows of three texts
    assert fused.cells["change"].stderr == pytest.approx(100 * math.exp(0.05) * ripple)
    assert fused.cells["stored"].value == 0.5
    assert [row.texts["beyond"] for row in (right, fused, u16)] == ["yes", "yes", "no"]
    assert all(row.cells["change"].reason for row in rows[3:])


def test_every_reading_is_a_variant_that_builds(repository: Layout) -> None:
    rows = build(repository).rows
    assert len(rows) == len(READINGS)
    for row in rows:
        config = load_method(row.config, repository)
        config.build()
        assert config.calibration.sequences == 32
    assert len({row.config for row in rows}) == len(rows)


def test_the_default_of_the_ranking_is_that_of_the_method() -> None:
    default = load_method("mobie").build()
    assert default.regularization == 0.2
