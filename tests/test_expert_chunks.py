"""Experts a chunk at a time, on one device or several: the same bytes, statistics asked for once and never kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from surveyed import fixed
from test_method_contract import EXPERTS, HIDDEN, WIDTH, assert_same, layer, stats

from mobie.config import load_method
from mobie.methods.base import BankStats, ExpertBank, FormedStats, LinearStats, map_experts

METHODS = (
    "fp16",
    "rtn-w3",
    "gptq-w3-g128",
    "gptq-w2-affinity",
    "moequant-w2",
    "pb-llm-10",
    "awq-w3",
    "billm-glas-nges",
    "arb-x-cgb",
    "arb-llm",
    "billm-experts",
    "mobie",
    "mobie-right",
)
METHODS += ("mobie-fused", "mobie-matrix-scope", "mobie-none", "mobie-sigma2", "mobie-triangular-feedback")
METHODS += ("quantmoe-2.3", "mxmoe-2.25", "mxmoe-2.25+sensitivity=gptq", "obe-1.5", "obe-1.5-sign-sweeps")
METHODS += (
    "nowag",
    "nowag+codebook_bits=5",
    "nowag-shared-codebook",
    "nowag-shared-codebook+codebook_bits=5+iterations=3",
)
COPIES = 2  # experts of the layer, once and again with other weights: six


def larger_layer(groups: int) -> tuple[ExpertBank, BankStats]:
    """Six experts: those of the contract tests, and the same with their rows in another order."""
    bank, own = layer(groups)
    weights = {name: torch.cat([w, w.flip(1)]) for name, w in bank.projections.items()}
    return replace(bank, projections=weights), BankStats({n: [*s, *s] for n, s in own.experts.items()}, own.pooled)


def per_expert(config: str, bank: ExpertBank, *names: str) -> int:
    """Memory that one expert of the projections `names` takes."""
    return load_method(config).build().expert_bytes([bank.projections[name].shape[1:] for name in names])


@pytest.mark.parametrize("config", METHODS)
def test_bytes_do_not_depend_on_chunks_or_devices(config: str) -> None:
    method = load_method(config).build()
    bank, statistics = larger_layer(method.gradient_groups)
    method = fixed(method, bank, statistics)
    whole = method.quantize_experts(bank, statistics)
    one = per_expert(config, bank, "gate", "up")
    two = (torch.device("cpu"), torch.device("cpu"))
    for devices, chunk in (((), 1), (two, 4)):
        chunked = method.quantize_experts(replace(bank, devices=devices, chunk_bytes=chunk * one), statistics)
        for name, packed in whole.items():
            assert_same(packed, chunked[name])


class Watched(FormedStats):
    """Statistics that say when they were asked for and how many were alive at a time."""

    def __init__(self, own: Sequence[LinearStats]) -> None:
        self._own = own
        self.asked: list[int] = []
        self.most_alive = 0
        self._given: list[weakref.ref[LinearStats]] = []

    def __len__(self) -> int:
        return len(self._own)

    def form(self, expert: int, device: torch.device) -> LinearStats:
        self.asked.append(expert)
        formed = replace(self._own[expert])
        self._given.append(weakref.ref(formed))
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self._given))
        return formed


@pytest.mark.parametrize("config", METHODS)
def test_statistics_are_asked_for_once_in_order_and_not_kept(config: str) -> None:
    method = load_method(config).build()
    bank, plain = larger_layer(method.gradient_groups)
    method = fixed(method, bank, plain)
    whole = method.quantize_experts(bank, plain)
    watched = {name: Watched(own) for name, own in plain.experts.items()}
    budget = 2 * per_expert(config, bank, "gate", "up")
    packed = method.quantize_experts(replace(bank, chunk_bytes=budget), BankStats(watched, plain.pooled, plain.tokens))
    for name, own in watched.items():
        assert own.asked in ([], list(range(EXPERTS * COPIES))), name
        assert own.most_alive <= (2 if name != "down" else budget // per_expert(config, bank, "down"))
    for name, one in whole.items():
        assert_same(one, packed[name])
    assert any(own.asked for own in watched.values()) == method.reads_statistics


def test_results_come_in_order_from_chunks_of_the_size_that_fits() -> None:
    bank = ExpertBank({"w": torch.zeros(7, 1, 1)}, (("w",),), devices=(torch.device("cpu"),) * 3, chunk_bytes=25)
    seen: list[range] = []

    def numbers(experts: range, device: torch.device) -> Iterable[int]:
        seen.append(experts)
        return list(experts)

    assert map_experts(bank, 10, numbers) == list(range(7))
    assert sorted(seen, key=min) == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    assert map_experts(bank, 1000, numbers) == list(range(7))  # one expert at least


def test_threads_of_several_devices_have_the_settings_of_the_caller() -> None:
    bank = ExpertBank({"w": torch.zeros(4, 1, 1)}, (("w",),), devices=(torch.device("cpu"),) * 2, chunk_bytes=1)

    def settings(experts: range, device: torch.device) -> list[tuple[int, bool, bool]]:
        return [(torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        assert map_experts(bank, 1, settings) == [(1, False, False)] * 4
    with torch.inference_mode():
        assert map_experts(bank, 1, settings) == [(1, False, True)] * 4
    torch.set_num_threads(before)


def test_an_error_on_a_device_reaches_the_caller() -> None:
    bank = ExpertBank({"w": torch.zeros(4, 1, 1)}, (("w",),), devices=(torch.device("cpu"),) * 2, chunk_bytes=1)

    def fails(experts: range, device: torch.device) -> list[int]:
        if experts.start == 3:
            raise ValueError("expert 3")
        return [0]

    with pytest.raises(ValueError, match="expert 3"):
        map_experts(bank, 1, fails)


def test_tokens_are_read_from_statistics_that_lie_there() -> None:
    own = [replace(stats(WIDTH, 1, e), tokens=e) for e in range(EXPERTS)]
    assert BankStats({"down": own}, {"down": own[0]}).tokens == {"down": [0, 1, 2]}
    formed = Watched([stats(HIDDEN, 1, 0)])
    assert BankStats({"gate": formed}, {"gate": own[0]}, {"gate": [9]}).tokens == {"gate": [9]}
    assert not formed.asked
