"""Speed records as `mobie.jobs.speed` writes them, with values from a generator, for tests of what reads them."""

from __future__ import annotations

import random
from typing import Any

from mobie.jobs.speed import CPU_NO_VERDICT, TIMINGS
from mobie.records import Measurement
from mobie.speed.runners import LABELS


def spread(median: float, n: int = 32) -> dict[str, float | int]:
    return {"median": median, "lower": 0.95 * median, "upper": 1.05 * median, "n": n}


def run(runner: str, speed: float, *, batch: int = 4, router: str = "natural", **changes: Any) -> dict[str, Any]:
    """One run at `speed` tokens per second."""
    return {
        "runner": runner,
        "batch": batch,
        "prefill": 64,
        "decode": 32,
        "router": router,
        "tried": True,
        "status": "ok",
        "reason": None,
        "step_seconds": spread(batch / speed),
        "tokens_per_second": spread(speed),
        "tokens_per_second_stderr": 0.01 * speed,
        "time_to_first_token": spread(0.25, 5),
        "tokens_per_second_with_prefill": 0.8 * speed,
        "peak_memory_bytes": 7 * 10**8,
        "weight_bytes": 8 * 10**6,
        "bytes_per_step": 4e6,
        "roofline_share": 0.25,
        "copy_bandwidth": spread(1e10),
        "activated_bytes": 6e6,
        "distinct_experts": 7.5,
        "distinct_experts_by_layer": [7.0, 8.0],
        "notes": [],
    } | changes


def absent(runner: str, reason: str) -> dict[str, Any]:
    place = {"runner": runner, "batch": 4, "prefill": 64, "decode": 32, "router": "natural", "tried": False}
    return place | {"status": "absent", "reason": reason}


def details(seed: str, *, cpu: bool = True) -> dict[str, Any]:
    """All runners at the first setting, our own at batch 1 too, the block and the cost of int8."""
    draw = random.Random(seed)
    runs = [run(name, draw.uniform(20, 90)) for name in LABELS if name not in ("vllm", "gemlite", "llama.cpp")]
    runs += [absent("vllm", "vllm is not installed; a plug-in that was never run by this project")]
    runs += [run("dense", 20.0, batch=1), run("binary-16bit", 50.0, batch=1)]
    block = [
        {"way": "dense", "batch": 1, "seconds": spread(4e-4), "bytes": 7e7, "layers": 3},
        {"way": "binary-16bit", "batch": 1, "seconds": spread(1e-4), "bytes": 9e6, "layers": 13, "times_dense": 4.0},
    ]
    found: dict[str, Any] = {
        "weights": "stored" if cpu else "random",
        "device": "a processor" if cpu else "a graphics card",
        "software": {},
        "runs": runs,
        "ratios": {},
        "block": block,
        "quality": {
            "perplexity": {"16bit": 93.87},
            "difference": {
                name: {"mean": 0.0006, "stderr": 0.0004}
                for name in ("int8-activations", "int8-head", "int8-activations-and-head")
            },
            "windows": 8,
            "tokens": 2040,
            "dtype": "float32",
            "text": "wiki",
        },
    }
    return found | ({"no_verdict": dict.fromkeys(TIMINGS, CPU_NO_VERDICT)} if cpu else {})


def measurements(seed: str) -> list[Measurement]:
    """Measurements of a record."""
    draw = random.Random(seed)
    return [
        Measurement("tokens_per_second", draw.uniform(20, 90), 1.5, 32),
        Measurement("time_to_first_token", 0.25, None, 5),
        Measurement("weight_bytes", draw.uniform(1e6, 9e6), None, 32),
        Measurement("activated_bytes", 6e6, None, 32),
        Measurement("bits_paper", 2.3, None, 800),
    ]
