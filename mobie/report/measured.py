"""What the committed records of `benchmarks/` say, as parts of README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mobie.paths import Layout
from mobie.report.markdown import markdown_table

SECONDS_PER_HOUR = 3600


def _record(name: str, layout: Layout) -> dict[str, Any]:
    return json.loads(layout.measured(name).read_text(encoding="utf-8"))


def _machine(found: Mapping[str, Any]) -> str:
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GiB"


def true_size(layout: Layout) -> str:
    """Seconds and memory of every method on one block of OLMoE-1B-7B, and what all its blocks would take."""
    record = _record("true_size", layout)
    shape, blocks = record["shape"], record["blocks"]
    rows = []
    for name, own in record["methods"].items():
        hours = blocks * (own["cpu_seconds"] + own["statistics_seconds"]) / SECONDS_PER_HOUR
        cells = [own["cpu_seconds"], own["statistics_seconds"]]
        rows.append([f"`{name}`", *(f"{cell:.0f}" for cell in cells), f"{own['peak_mb'] / 1024:.1f}", f"{hours:.1f}"])
    header = ["one block", "CPU s", "statistics, CPU s", "peak GiB", f"{blocks} blocks, CPU h"]
    note = (
        f"\n{shape['experts']} experts of {shape['hidden']} × {shape['width']} and attention, {shape['tokens']} "
        f"calibration tokens, each to {shape['top_k']} experts; one thread of: {_machine(record['machine'])}. "
        "Statistics grow with the tokens: `python -m mobie plan` reckons with those of the configuration. The model's "
        "own forward and backward passes are not in it.\n"
    )
    return markdown_table(header, rows) + note + "".join(map(_loop, record.get("loop", {}).values()))


def _loop(loop: Mapping[str, Any]) -> str:
    return (
        f"\nMoBiE against a plain loop of its mathematics over experts and candidates (`benchmarks/mobie_loop.py`), "
        f"{loop['experts']} experts of that block: {loop['cpu_seconds']:.0f} against {loop['loop_cpu_seconds']:.0f} "
        f"CPU seconds, {loop['ratio']:.1f} times as fast, at the same error of the weights ({loop['weight_error']:.4f} "
        f"against {loop['loop_weight_error']:.4f}).\n"
    )


def streaming_memory(layout: Layout) -> str:
    """Peak memory of the block loop by the number of blocks, beside that of loading the model whole."""
    record = _record("streaming_memory", layout)
    rows = [
        [blocks, *(f"{value:.0f}" for value in (own["peak"], own["above"], record["whole_model"][blocks]["peak"]))]
        for blocks, own in sorted(record["streamed"].items(), key=lambda case: int(case[0]))
    ]
    header = ["blocks", "peak MiB", "of it above the libraries", "the model loaded whole"]
    note = (
        f"\nBlocks of {record['block_mib_float32']:.0f} MiB in float32, `--memory {record['memory']}`. The peaks "
        f"differ by {100 * record['spread_of_peaks']:.1f} %, what lies above the libraries by "
        f"{100 * record['spread_above_baseline']:.1f} %. Streamed gradients against one backward pass through the "
        f"whole model: largest relative difference {record['gradients']['largest_relative_difference']:.0e}.\n"
    )
    return markdown_table(header, rows) + note
