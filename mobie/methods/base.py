"""What a quantization method is: weights and input statistics in, packed weights out. No model, file or hook.

A method is one file with one class; its options are the fields of a frozen dataclass. Adding it to the suite takes that
file and one YAML under `workflow/config/methods/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed


@dataclass(frozen=True)
class LinearStats:
    """What a method may know about the inputs X `(tokens, in)` of one Linear.

    hessian:  `(in, in)` float32, `2/n · XᵀX`.
    tokens:   n, before any blending with the pooled Hessian of the layer.
    mean_abs: `(in,)`, mean |x| per channel (AWQ).
    sample:   `(at most 512, in)`, some of the rows of X (AWQ's clip search).
    guided:   `(groups, in, in)` or None: `2/n · Σ_t w_tg x_t x_tᵀ`, with w_tg the mean squared loss gradient of token t
              in contiguous group g of output (or latent) channels (eq. 8, GLAS).
    """

    hessian: Tensor
    tokens: int
    mean_abs: Tensor
    sample: Tensor
    guided: Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Tensor, token_weights: Tensor | None = None) -> LinearStats:
        """Statistics of inputs `(tokens, in)`; `token_weights` `(tokens, groups)` gives the guided Hessians."""
        x = inputs.float()
        n = len(x)
        guided = None
        if token_weights is not None:
            guided = torch.stack([2 / n * (x * w[:, None]).T @ x for w in token_weights.float().T])
        stride = max(1, n // 512)
        return cls(2 / n * x.T @ x, n, x.abs().mean(0), x[::stride][:512].clone(), guided)


@dataclass(frozen=True)
class ExpertBank:
    """The experts of one layer.

    projections: name → `(experts, out, in)` float32: `gate`, `up`, `down` in a model; a single one in `mobie try`.
    same_input:  names grouped by shared inputs, e.g. `(("gate", "up"), ("down",))`.
    active:      experts that a token uses (top-k), or None where unknown.
    """

    projections: Mapping[str, Tensor]
    same_input: tuple[tuple[str, ...], ...]
    active: int | None = None


@dataclass(frozen=True)
class BankStats:
    """Input statistics of a bank.

    experts: name → one `LinearStats` per expert, over the tokens routed to it.
    pooled:  name → `LinearStats` over all calibration tokens of the layer.
    """

    experts: Mapping[str, Sequence[LinearStats]]
    pooled: Mapping[str, LinearStats]


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; subclasses add their options as dataclass fields.

    needs_gradients:  whether `LinearStats.guided` must be filled (one backward pass over the calibration text).
    gradient_groups:  into how many contiguous channel groups the gradients are pooled.
    """

    name: ClassVar[str]

    @property
    def needs_gradients(self) -> bool:
        return False

    @property
    def gradient_groups(self) -> int:
        return 1

    @abstractmethod
    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Quantize one weight `(out, in)` float32."""

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        """Quantize Linears that share their input (query, key, value; keys are the field's names, `q_proj` …)."""
        return {name: self.quantize_linear(weight, stats[name]) for name, weight in weights.items()}

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, PackedBank]:
        """Quantize the experts of a layer: a loop over `quantize_linear`, unless the method looks across experts."""
        return {
            name: PackedBank(
                tuple(self.quantize_linear(w, s) for w, s in zip(weight, stats.experts[name], strict=True))
            )
            for name, weight in bank.projections.items()
        }

    def gradient_basis(self, name: str, weight: Tensor) -> Tensor | None:
        """Matrix B `(out, rank)` through which a bank's output gradients are read, `∂ℓ/∂T = Bᵀ ∂ℓ/∂Z`; None for Z itself.

        `weight` is the bank `(experts, out, in)` of projection `name`.
        """
        return None


METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its `name`."""
    METHODS[cls.name] = cls
    return cls
