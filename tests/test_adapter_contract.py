"""Every method config of the suite on a tiny block of every architecture: packed, stored, read back, written back."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from surveyed import fixed
from tiny import HIDDEN, make_model
from torch import nn

from mobie.check.checkpoints import Count, count_block, read_tensor_file
from mobie.config import default_layout, load_method
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.models.base import ARCHITECTURES, Adapter
from mobie.packing.bank import split_gate_up
from mobie.packing.base import BitLedger
from mobie.packing.checkpoint import BlockNames, PackedBlock, load_block, save_block, write_block

METHODS = sorted(path.stem for path in (default_layout().config / "methods").glob("*.yaml"))
EXPERTS, TOKENS = 2, 24
COUNT = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}  # what configurations call the experts
COUNT |= {"deepseek": "n_routed_experts", "deepseek_v2": "n_routed_experts"}


@cache
def tiny_blocks(model_type: str) -> list[nn.Module]:
    """Decoder blocks of one architecture: with experts, and with each kind of attention."""
    fewer: dict[str, Any] = {COUNT.get(model_type, "num_experts"): EXPERTS, "num_experts_per_tok": 1}
    return list(Adapter(model_type).blocks(make_model(model_type, **fewer)))


@cache
def statistics(features: int, groups: int, seed: int) -> LinearStats:
    generator = torch.Generator().manual_seed(100 * features + seed)
    inputs = torch.randn(TOKENS, features, generator=generator)
    found = LinearStats.from_inputs(inputs, torch.rand(TOKENS, groups, generator=generator))
    means = inputs.view(3, -1, features).mean(1)
    return LinearStats(found.hessian, found.tokens, found.mean_abs, found.sample, found.guided, 2 / 3 * means.T @ means)


def tiny_method(config: str) -> Method:
    """A method config, with few iterations, a rank that a tiny bank has, and a budget that its attention leaves."""
    options = {"iterations": 1, "rank": 8} if config == "mobie-truncated" else {"iterations": 1, "budget": 3.8}
    if config.startswith("obe"):  # its budget has no lower end
        del options["budget"]
    known = load_method(config).build().options
    return load_method("+".join([config, *(f"{n}={v}" for n, v in options.items() if n in known)])).build()


def statistics_of(bank: ExpertBank, groups: int) -> BankStats:
    features = {name: weight.shape[2] for name, weight in bank.projections.items()}
    own = {n: [statistics(f, groups, e) for e in range(EXPERTS)] for n, f in features.items()}
    return BankStats(own, {n: s[0] for n, s in own.items()})


def pack(block: nn.Module, adapter: Adapter, method: Method) -> PackedBlock:
    modules = {name: module for group in adapter.linear_groups(block) for name, module in group.items()}
    weights = {name: module.weight.detach() for name, module in modules.items()}
    own = {name: statistics(weight.shape[1], method.gradient_groups, 0) for name, weight in weights.items()}
    bank = adapter.expert_bank(block)
    bank_stats = None if bank is None else statistics_of(bank, method.gradient_groups)
    method = fixed(method, bank, bank_stats, weights, own)
    linears = {}
    for group in adapter.linear_groups(block):
        roles = {name.rpartition(".")[2]: name for name in group}
        packed = method.quantize_group(*({r: of[n] for r, n in roles.items()} for of in (weights, own)))
        linears |= {roles[role]: part for role, part in packed.items()}
    if bank is None or bank_stats is None:
        return PackedBlock(linears, {})
    if method.quantizes_router:
        router = adapter.moe_router(block).weight.detach()
        linears[adapter.architecture.router] = method.quantize_router(router, statistics(HIDDEN, 1, 0))
    return PackedBlock(linears, method.quantize_experts(bank, bank_stats))


def count_again(path: Path, index: int) -> Count:
    """What `python -m mobie check` counts in a block's file, apart from the code that wrote it."""
    count, stored = Count(), read_tensor_file(path)
    count_block(f"block{index}", stored, json.loads(stored.metadata["mobie"]), 1 / EXPERTS, count)
    return count


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_method_quantizes_every_architecture(model_type: str, config: str, tmp_path: Path) -> None:
    adapter, method = Adapter(model_type), tiny_method(config)
    sparse = [i for i, block in enumerate(tiny_blocks(model_type)) if adapter.experts_module(block) is not None]
    index = sparse[METHODS.index(config) % len(sparse)]  # blocks with one and with the other attention in turn
    block = copy.deepcopy(tiny_blocks(model_type)[index])
    packed = pack(block, adapter, method)

    save_block(tmp_path / "block", packed, "job", {}, BlockNames.of(adapter, index))
    stored = load_block(tmp_path / "block").block
    assert stored.parts().keys() == packed.parts().keys()
    for name, part in packed.parts().items():
        assert stored.parts()[name].header() == part.header()
        tensors = stored.parts()[name].tensors()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in part.tensors().items()), name

    counted = count_again(tmp_path / "block", index)
    ledger = BitLedger.merge({name: part.ledger(1 / EXPERTS) for name, part in packed.parts().items()})
    assert counted.weights == ledger.weights
    bits = {"bits_paper": ledger.paper_bits, "bits_codes": ledger.code_bits, "bits_stored": ledger.stored_bits}
    assert counted.bits() == pytest.approx(bits)

    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    write_block(adapter, block, stored)
    replaced = adapter.quantized_parameters(block, router=method.quantizes_router)
    for name, parameter in block.named_parameters():
        assert parameter.isfinite().all(), name
        assert name in replaced or torch.equal(parameter, before[name]), name  # nothing else is touched
    bank = adapter.expert_bank(block)
    assert bank is not None
    for name, weight in split_gate_up({n: p.dequantize() for n, p in stored.experts.items()}).items():
        assert torch.equal(bank.projections[name], weight), name
    for name, part in stored.linears.items():
        assert torch.equal(block.get_submodule(name).weight, part.dequantize()), name
    changed = [name for name in replaced if not torch.equal(block.get_parameter(name), before[name])]
    assert bool(changed) == (config != "fp16")
