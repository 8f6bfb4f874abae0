"""What a packed block looks like in a few numbers, for its record: how large its scales are, where its bits went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mobie.packing.base import BitLedger, Packed

#: how the name of a packed part begins → what it belongs to; the first that fits counts
COMPONENTS = (
    ("experts.", "experts"),
    ("linears.self_attn.", "attention"),
    ("linears.linear_attn.", "attention"),
    ("linears.mlp.shared_expert", "shared_experts"),
)
QUANTILES = {"minimum": 0.0, "median": 0.5, "p95": 0.95, "maximum": 1.0}


def scale_summary(parts: Mapping[str, Packed]) -> dict[str, dict[str, float]]:
    """Number and quantiles (to four digits) of the absolute stored scales, by `PART.TENSOR` as in a ledger.

    Parts without scales are absent.
    """
    summary = {}
    for part, packed in parts.items():
        for name, tensor in packed.scales().items():
            values = np.abs(tensor.float().numpy(), dtype=np.float64).ravel()
            if values.size:
                found = np.quantile(values, list(QUANTILES.values()))
                numbers = {key: float(f"{value:.4g}") for key, value in zip(QUANTILES, found, strict=True)}
                summary[f"{part}.{name}"] = {"count": values.size} | numbers
    return summary


def component_of(part: str, router: str) -> str:
    """What a packed part belongs to: experts, attention, shared_experts, router, or other (dense layers).

    `router` is the name of the router in its block.
    """
    if part == f"linears.{router}":
        return "router"
    return next((component for prefix, component in COMPONENTS if part.startswith(prefix)), "other")


def bits_by_component(blocks: Iterable[Mapping[str, BitLedger]], router: str) -> dict[str, dict[str, Any]]:
    """Bits per weight by the paper's formula, of codes, and of all that is stored, for every component that was packed.

    Args:
        blocks: for each block, part name → its ledger.
        router: name of the router in a block.
    """
    grouped: dict[str, dict[str, BitLedger]] = {}
    for index, ledgers in enumerate(blocks):
        for part, ledger in ledgers.items():
            grouped.setdefault(component_of(part, router), {})[f"{index}.{part}"] = ledger
    merged = {component: BitLedger.merge(ledgers) for component, ledgers in grouped.items()}
    return {
        component: {
            "paper": ledger.paper_bits,
            "codes": ledger.code_bits,
            "stored": ledger.stored_bits,
            "weights": ledger.weights,
        }
        for component, ledger in merged.items()
    }
