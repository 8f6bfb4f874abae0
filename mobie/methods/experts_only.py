"""Another method on the routed experts alone: attention, shared experts and dense layers stay in 16 bits.

So a method that quantizes every Linear is compared with one that quantizes experts only, per weight of an expert. The
inputs of a layer's experts have then passed through attention as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from mobie.errors import ConfigError, unknown_name
from mobie.methods.arb import ARB
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, register
from mobie.methods.billm import BiLLM
from mobie.methods.fp16 import FP16
from mobie.methods.gptq import GPTQ
from mobie.packing.base import Packed

#: methods that can be restricted; imported above, so that a change of their code makes results of this one stale
INNER: tuple[type[Method], ...] = (BiLLM, ARB, GPTQ)


@register
@dataclass(frozen=True)
class ExpertsOnly(Method):
    """The experts by another method, everything else in 16 bits.

    inner:         registered name of that method, which must not read loss gradients.
    inner_options: its options.
    """

    name: ClassVar[str] = "experts-only"
    seconds_per_weight: ClassVar[float] = 1.4e-6
    stored_bits: ClassVar[float] = 3.2

    inner: str = "billm"
    inner_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [cls.name for cls in INNER]
        if self.inner not in known:
            raise ConfigError(f"{self.name}: inner: {unknown_name('method', self.inner, known)}")
        if self.method.needs_gradients:
            raise ConfigError(
                f"{self.name}: got inner_options {self.inner_options} with which {self.inner} reads loss gradients, "
                f"expected others; leave out {self.method.guided_by[0] if self.method.guided_by else 'them'}"
            )

    @cached_property
    def method(self) -> Method:
        """The inner method. Raises `ConfigError` for options that it refuses."""
        from mobie.config import build_method

        return build_method(self.inner, self.inner_options)

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        return FP16().quantize_linear(weight, stats)

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> Mapping[str, Packed]:
        return self.method.quantize_experts(bank, stats)
