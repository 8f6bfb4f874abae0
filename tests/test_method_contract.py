"""What every method config of the suite must do, whatever it is: parametrised over the files, so none goes untested."""

from __future__ import annotations

import pytest
import torch
from surveyed import fixed

from mobie.config import default_layout, load_method
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.packing.base import FORMATS, Packed

CONFIGS = sorted(path.stem for path in (default_layout().config / "methods").glob("*.yaml"))
EXPERTS, HIDDEN, WIDTH, TOKENS = 3, 144, 40, 300  # no multiple of a block or a byte


def stats(width: int, groups: int, seed: int) -> LinearStats:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(TOKENS, width, generator=generator) @ mixing
    found = LinearStats.from_inputs(inputs, torch.rand(TOKENS, groups, generator=generator))
    means = inputs.view(3, -1, width).mean(1)
    return LinearStats(found.hessian, found.tokens, found.mean_abs, found.sample, found.guided, 2 / 3 * means.T @ means)


def layer(groups: int) -> tuple[ExpertBank, BankStats]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    weights = {n: 0.1 * torch.randn(EXPERTS, *shape, generator=generator) for n, shape in shapes.items()}
    experts = {"gate": [stats(HIDDEN, groups, e) for e in range(EXPERTS)]}
    experts |= {"up": experts["gate"], "down": [stats(WIDTH, groups, 10 + e) for e in range(EXPERTS)]}
    pooled = {name: own[0] for name, own in experts.items()}
    return ExpertBank(weights, (("gate", "up"), ("down",)), active=2), BankStats(experts, pooled)


def assert_same(a: Packed, b: Packed) -> None:
    assert a.header() == b.header()
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


@pytest.mark.parametrize("config", CONFIGS)
def test_bank_is_packed_whole_and_the_same_every_time(config: str) -> None:
    method = load_method(config).build()
    bank, statistics = layer(method.gradient_groups)
    method = fixed(method, bank, statistics)
    packed = method.quantize_experts(bank, statistics)
    again = method.quantize_experts(bank, statistics)
    total = sum(weight.numel() for weight in bank.projections.values())
    assert sum(part.ledger().weights for part in packed.values()) == total
    for name, part in packed.items():
        assert_same(part, again[name])
        rebuilt = FORMATS[part.format].from_tensors(part.header(), part.tensors())
        dense = part.dequantize()
        assert torch.equal(rebuilt.dequantize(), dense)
        assert dense.isfinite().all()
        ledger = part.ledger(active_share=2 / EXPERTS)
        assert sum(item.bytes for item in ledger.items) == sum(t.nbytes for t in part.tensors().values())
        assert 0 < ledger.code_bits <= ledger.stored_bits
        assert ledger.active_weights == pytest.approx(ledger.weights * 2 / EXPERTS)


@pytest.mark.parametrize("config", CONFIGS)
def test_linear_group_gives_weights_nearer_than_nothing(config: str) -> None:
    method = load_method(config).build()
    generator = torch.Generator().manual_seed(3)
    weights = {name: 0.1 * torch.randn(WIDTH, HIDDEN, generator=generator) for name in ("q_proj", "k_proj", "v_proj")}
    shared = dict.fromkeys(weights, stats(HIDDEN, method.gradient_groups, 0))
    packed = fixed(method, linears=weights, linear_stats=shared).quantize_group(weights, shared)
    assert packed.keys() == weights.keys()
    for name, weight in weights.items():
        dense = packed[name].dequantize()
        assert dense.shape == weight.shape
        difference = dense - weight
        error = ((difference @ shared[name].hessian) * difference).sum()
        power = ((weight @ shared[name].hessian) * weight).sum()
        assert error < power  # closer to the layer's output than the zero matrix


def test_every_registered_method_has_a_config() -> None:
    from mobie.methods.base import METHODS

    used = {load_method(config).method for config in CONFIGS}
    assert used == set(METHODS)
