"""MoBiE against plain loops of its mathematics, which live with the benchmark that times both."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mobie.config import load_method
from mobie.methods.base import BankStats, ExpertBank, LinearStats

LOOP = Path(__file__).parent.parent / "benchmarks" / "mobie_loop.py"


@pytest.mark.parametrize("shape", [(20, 300), (48, 200)])
def test_equals_the_loop(shape: tuple[int, int]) -> None:
    specification = importlib.util.spec_from_file_location("mobie_loop", LOOP)
    assert specification is not None and specification.loader is not None
    loop = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loop)

    generator = torch.Generator().manual_seed(0)
    out, width = shape
    spectrum = torch.arange(1, out + 1).rsqrt()[:, None]
    weights = spectrum * torch.randn(3, out, width, generator=generator)
    mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    inputs = [torch.randn(250, width, generator=generator) @ mixing for _ in range(3)]
    stats = [LinearStats.from_inputs(x, torch.rand(250, 4, generator=generator)) for x in inputs]
    pooled = LinearStats.from_inputs(torch.cat(inputs))

    bank = ExpertBank({"w": weights}, (("w",),))
    ours = load_method("mobie").build().quantize_experts(bank, BankStats({"w": stats}, {"w": pooled}))["w"]
    expected, salient = loop.quantize(
        list(weights), [s.hessian for s in stats], [s.guided for s in stats], pooled.hessian
    )
    assert [expert.salient.tolist() for expert in ours.experts] == salient
    for e, weight in enumerate(ours.dequantize()):
        difference = (weight - expected[e]).norm() / expected[e].norm()
        assert difference < 2e-3, difference  # scales are in float16
        assert (weights[e] - weight).norm() > 0.1 * weights[e].norm()  # and the weights are not those given
