"""One block's weights and statistics in, packed weights and what is reported of them out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mobie.calibration.guided import Guided
from mobie.calibration.lazy import Lazy
from mobie.calibration.statistics import BlockStatistics, blend_with_pool
from mobie.methods.base import CHUNK_BYTES, BankStats, ExpertBank, LinearStats, Method
from mobie.models.base import Adapter
from mobie.packing.bank import split_gate_up
from mobie.packing.base import Packed
from mobie.packing.checkpoint import PackedBlock
from mobie.resources import Resources

#: what a method that needs no statistics is given
NO_STATISTICS = LinearStats(torch.zeros(0, 0), 0, torch.zeros(0), torch.zeros(0, 0))

CHUNKS = 8  # a chunk of experts in work takes at most such a part of the memory


def quantize_block(
    block: nn.Module,
    adapter: Adapter,
    method: Method,
    statistics: BlockStatistics | None,
    guided: Guided | None,
    resources: Resources,
    router: Packed | None = None,
) -> tuple[PackedBlock, dict[str, Any]]:
    """Quantize the Linears and experts of a block.

    Output errors are those over the tokens as they are, whatever weights a method gives them.

    Args:
        router: the packed router, where it was quantized before the statistics were gathered.

    Returns:
        Packed weights, and details as JSON values: output errors, tokens per expert, experts that borrow statistics.
    """
    unweighted = defaultdict(lambda: NO_STATISTICS) if statistics is None else statistics.linear_stats()
    linear_stats = unweighted if statistics is None else statistics.linear_stats(method.token_weighting)
    if guided is not None:
        linear_stats = add_guided(linear_stats, guided)
    linears: dict[str, Packed] = {}
    errors: dict[str, float | None] = {}
    for group in adapter.linear_groups(block):
        weights = {name: module.weight.detach().float() for name, module in group.items()}
        roles = {name.rpartition(".")[2]: name for name in group}  # methods know Linears by the field's names, `q_proj`
        by_role = method.quantize_group(
            {role: weights[name] for role, name in roles.items()},
            {role: linear_stats[name] for role, name in roles.items()},
        )
        packed = {name: by_role[role] for role, name in roles.items()}
        linears |= packed
        errors |= {n: _relative_error(w, packed[n].dequantize(), unweighted[n]) for n, w in weights.items()}

    details: dict[str, Any] = {"output_error": errors}
    bank = _bank(block, adapter, resources)
    if bank is None:
        return PackedBlock(linears, {}), details
    if method.quantizes_router:
        name = adapter.architecture.router
        weight = adapter.moe_router(block).weight.detach().float()
        linears[name] = method.quantize_router(weight, linear_stats[name]) if router is None else router
    if statistics is None:
        local = bank_stats = _no_bank_statistics(bank)
    else:
        gathered = statistics.bank_stats(method.token_weighting)
        local, borrowed = blend_with_pool(statistics.bank_stats())
        weighted = blend_with_pool(gathered)[0]
        bank_stats = (
            weighted if guided is None else blend_with_pool(add_guided_bank(gathered, guided), guided.pooled)[0]
        )
        details["tokens_per_expert"] = list(gathered.tokens["gate"])
        details["borrowed_statistics"] = borrowed
    experts = method.quantize_experts(bank, bank_stats)
    errors |= _expert_errors(bank, experts, local)
    if guided is not None:
        details["pairs_without_gradient"] = guided.unmatched
    return PackedBlock(linears, experts), details


def _bank(block: nn.Module, adapter: Adapter, resources: Resources) -> ExpertBank | None:
    """The experts of a block, with the devices that work on them and what these may take; None in a dense block."""
    bank = adapter.expert_bank(block)
    if bank is None:
        return None
    devices = resources.torch_devices()
    chunk = min(CHUNK_BYTES[devices[0].type], max(1, resources.memory // CHUNKS))
    return replace(bank, devices=devices, chunk_bytes=chunk)


def add_guided(linears: Mapping[str, LinearStats], guided: Guided) -> dict[str, LinearStats]:
    """Statistics of Linears with the guided Hessians of those that have some."""
    by_name = guided.linears
    return {name: replace(s, guided=by_name[name]) if name in by_name else s for name, s in linears.items()}


def add_guided_bank(stats: BankStats, guided: Guided) -> BankStats:
    """Statistics of experts with their guided Hessians, formed when they are asked for."""

    def both(name: str) -> Lazy[LinearStats]:
        own, weighted = stats.experts[name], guided.experts[name]
        return Lazy(len(own), lambda i: replace(own[i], guided=weighted[i]))

    return BankStats({name: both(name) for name in stats.experts}, stats.pooled, stats.tokens)


def _no_bank_statistics(bank: ExpertBank) -> BankStats:
    experts = {name: [NO_STATISTICS] * len(weight) for name, weight in bank.projections.items()}
    return BankStats(experts, dict.fromkeys(bank.projections, NO_STATISTICS))


def _expert_errors(bank: ExpertBank, experts: Mapping[str, Packed], stats: BankStats) -> dict[str, float | None]:
    """Mean relative output error of each projection's experts, None where it is not known of all."""
    dense = split_gate_up({name: packed.dequantize() for name, packed in experts.items()})
    errors: dict[str, float | None] = {}
    for name, weight in bank.projections.items():
        known = _known(weight, dense[name], stats.experts[name])
        errors[f"experts.{name}"] = sum(known) / len(weight) if len(known) == len(weight) else None
    return errors


def _known(weights: Tensor, dequantized: Tensor, stats: Sequence[LinearStats]) -> list[float]:
    per_expert = zip(weights, dequantized, stats, strict=True)
    return [error for w, d, s in per_expert if (error := _relative_error(w, d, s)) is not None]


def _relative_error(weight: Tensor, dequantized: Tensor, stats: LinearStats) -> float | None:
    """‖X(W - Ŵ)ᵀ‖_F / ‖XWᵀ‖_F of `(out, in)` weights from the Hessian of X.

    Without statistics it is 0 where nothing changed, and else not known.
    """
    dequantized = dequantized.to(weight.device)
    if stats is NO_STATISTICS:
        return 0.0 if torch.equal(weight, dequantized) else None
    hessian = stats.hessian
    difference = weight - dequantized
    error = ((difference @ hessian) * difference).sum()
    power = ((weight @ hessian) * weight).sum()
    return float((error.clamp(min=0) / power.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())
