"""What a quantization method is: weights and input statistics in, packed weights out. No model, file or hook.

A method is one file with one class; its options are the fields of a frozen dataclass. Adding it to the suite takes that
file and one YAML under `workflow/config/methods/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar

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
    mean_gram: `(in, in)` or None: `2/s · Σ_q m_q m_qᵀ` over s sequences, m_q the mean input of a sequence.
    """

    hessian: Tensor
    tokens: int
    mean_abs: Tensor
    sample: Tensor
    guided: Tensor | None = None
    mean_gram: Tensor | None = None

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

    def through(self, matrix: Tensor) -> LinearStats:
        """Statistics of the inputs `x Rᵀ` for R `(rank, in)`; `mean_abs` is then that of the sample."""

        def both_sides(gram: Tensor | None) -> Tensor | None:
            return None if gram is None else matrix @ gram @ matrix.T

        sample = self.sample @ matrix.T
        return LinearStats(
            both_sides(self.hessian),
            self.tokens,
            sample.abs().mean(0),
            sample,
            both_sides(self.guided),
            both_sides(self.mean_gram),
        )


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
    tokens:  name → tokens of each expert; read from `experts` where not given.
    """

    experts: Mapping[str, Sequence[LinearStats]]
    pooled: Mapping[str, LinearStats]
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            tokens = {name: [s.tokens for s in own] for name, own in self.experts.items()}
            object.__setattr__(self, "tokens", tokens)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; subclasses add their options as dataclass fields."""

    name: ClassVar[str]
    #: whether the method looks at input statistics at all, or its error is worth measuring on them
    needs_statistics: ClassVar[bool] = True

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value, as JSON values: what a checkpoint says about how it was made."""
        return asdict(self) if is_dataclass(self) else {}

    @property
    def needs_gradients(self) -> bool:
        """Whether `LinearStats.guided` must be filled, which takes one backward pass over the calibration text."""
        return False

    @property
    def gradient_groups(self) -> int:
        """Into how many contiguous channel groups the gradients are pooled."""
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

    @property
    def quantizes_router(self) -> bool:
        """Whether the router is quantized too; otherwise it stays in 16 bits."""
        return False

    def quantize_router(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Quantize the router's weight `(experts, hidden)`."""
        return self.quantize_linear(weight, stats)

    def gradient_bases(self, bank: ExpertBank) -> dict[str, Tensor | None]:
        """Per projection, the matrix B `(out, rank)` through which output gradients are read, `∂ℓ/∂T = Bᵀ ∂ℓ/∂Z`.

        None stands for the identity: the gradient at the output Z itself.
        """
        return dict.fromkeys(bank.projections)


METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its `name`."""
    METHODS[cls.name] = cls
    return cls
