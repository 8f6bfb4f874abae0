"""The cost model against what `python benchmarks/true_size.py` measured on one true-shape block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from mobie.config import load_method
from mobie.jobs.cost import GRAM_FLOPS
from mobie.jobs.quantize_cost import BLOCK_COPIES, CHUNK_MB, hessian_flops, method_seconds, needs_statistics
from mobie.jobs.size import ATTENTION_LINEARS, PROJECTIONS, Size, size_of
from mobie.paths import PACKAGE, Layout

HERE = Layout(PACKAGE.parent)
RECORD = PACKAGE.parent / "benchmarks" / "records" / "true_size.json"
#: an estimate may be so many times a measured value, or that part of it
FACTORS = {"cpu_seconds": 2.0, "statistics_seconds": 2.5, "peak_mb": 2.5}
INTERPRETER_MB = 500  # Python with torch; PROCESS_MB has more, and Snakemake's processes
SHORTEST_SECONDS = 1.0  # below, what a process does besides is larger than what is estimated


def block_of(shape: Mapping[str, int]) -> Size:
    """The measured block as a model of one layer without ends."""
    experts, hidden, width = shape["experts"], shape["hidden"], shape["width"]
    weights = experts * PROJECTIONS * hidden * width + ATTENTION_LINEARS * hidden**2
    return Size(weights, weights, weights, 0, 1, hidden, width, experts, shape["top_k"], 1, known=True)


def estimates(method: str, shape: Mapping[str, int]) -> dict[str, float]:
    """What the cost model says of the measured values."""
    config, size = load_method(method, HERE), block_of(shape)
    grams = hessian_flops(config, size) * shape["tokens"] / GRAM_FLOPS["cpu"]
    return {
        "cpu_seconds": method_seconds(config, size, size.parameters),
        "statistics_seconds": grams if needs_statistics(config) else 0.0,
        "peak_mb": INTERPRETER_MB + BLOCK_COPIES * 4 * size.block / 2**20 + CHUNK_MB,
    }


def departures(record: Mapping[str, Any]) -> list[str]:
    """Estimates of a record that are further from what was measured than their factor."""
    found = []
    for method, measured in record["methods"].items():
        for name, estimate in estimates(method, record["shape"]).items():
            value = measured.get(name)
            if name == "cpu_seconds":  # a survey is passes through the model, not the method's own mathematics
                value -= measured.get("survey_cpu_seconds", 0.0)
            if value is None or max(value, estimate) < SHORTEST_SECONDS or (name[0] == "s" and value == 0):
                continue
            ratio = estimate / value
            if not 1 / FACTORS[name] <= ratio <= FACTORS[name]:
                found.append(f"{method} {name}: estimated {estimate:.1f}, measured {value:.1f}")
    return found


def test_the_estimates_are_near_what_was_measured() -> None:
    if not RECORD.exists():
        pytest.skip(f"{RECORD.name} is not there; `python benchmarks/true_size.py` makes it")
    record = json.loads(RECORD.read_text())
    assert "mobie" in record["methods"]
    assert departures(record) == []


def test_an_estimate_that_moves_away_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"experts": 64, "hidden": 2048, "width": 1024, "top_k": 8, "tokens": 8192}
    methods = ("rtn-w3", "gptq-w3", "awq-w3", "billm", "arb-llm", "mobie")
    record = {"shape": shape, "methods": {method: estimates(method, shape) for method in methods}}
    assert departures(record) == []
    record["methods"]["mobie"]["cpu_seconds"] /= 3
    record["methods"]["awq-w3"]["peak_mb"] *= 3
    assert [line.split(":")[0] for line in departures(record)] == ["awq-w3 peak_mb", "mobie cpu_seconds"]
    monkeypatch.setitem(GRAM_FLOPS, "cpu", GRAM_FLOPS["cpu"] / 10)
    assert len(departures(record)) > 2


def test_the_measured_shape_is_that_of_the_published_model() -> None:
    from mobie.config import load_model_config

    size = size_of(load_model_config("olmoe-1b-7b", HERE))
    assert (size.experts, size.hidden, size.width, size.top_k) == (64, 2048, 1024, 8)
    block = block_of({"experts": 64, "hidden": 2048, "width": 1024, "top_k": 8})
    assert block.parameters == pytest.approx(size.block, rel=0.01)
