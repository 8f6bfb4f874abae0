"""What every packed weight can do: give back a dense weight, its stored tensors, and an account of their bytes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

#: tensor names (last component) that hold codes; everything else is side information (scales, means, maps, indices)
CODE = "code"
SIDE = "side"


@dataclass(frozen=True)
class LedgerItem:
    """Bytes of one stored tensor. `kind` is `code` (the quantized values) or `side` (all that decodes them)."""

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class BitLedger:
    """Every stored byte of some weights, itemised.

    weights:        number of original weights described.
    active_weights: how many of them a token uses (top-k of the experts); the weighting of `paper_bits`.
    paper_bits:     bits per active weight by the formula of the method's paper.
    """

    items: tuple[LedgerItem, ...]
    weights: int
    active_weights: float
    paper_bits: float

    @property
    def stored_bits(self) -> float:
        """Bits per weight counting everything that is stored."""
        return 8 * sum(item.bytes for item in self.items) / self.weights

    @property
    def code_bits(self) -> float:
        """Bits per weight counting codes only: no scale, mean, map or index."""
        return 8 * sum(item.bytes for item in self.items if item.kind == CODE) / self.weights

    @staticmethod
    def merge(ledgers: Mapping[str, BitLedger]) -> BitLedger:
        """Sum of ledgers, item names prefixed by the keys; `paper_bits` is averaged over active weights (Table 2)."""
        items = tuple(
            LedgerItem(f"{prefix}.{item.name}", item.kind, item.bytes)
            for prefix, ledger in ledgers.items()
            for item in ledger.items
        )
        active = sum(ledger.active_weights for ledger in ledgers.values())
        paper = sum(ledger.paper_bits * ledger.active_weights for ledger in ledgers.values()) / active
        return BitLedger(items, sum(ledger.weights for ledger in ledgers.values()), active, paper)


class Packed(ABC):
    """A quantized weight as it is stored. Subclasses are frozen dataclasses, one per format.

    `format` names the class in a checkpoint. `tensors()` and `header()` hold all that is stored;
    `from_tensors(header, tensors)` rebuilds an equal object.
    """

    format: ClassVar[str]
    #: names in `tensors()` that are codes
    code_tensors: ClassVar[frozenset[str]]
    #: names in `tensors()` that multiply the quantized values
    scale_tensors: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: `(out, in)`, or `(experts, out, in)` for a bank."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight that the stored tensors stand for, computed in float32, cast to `dtype`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """JSON values needed beside the tensors to rebuild the object."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of `header()` and `tensors()`."""

    @abstractmethod
    def paper_bits(self, active_share: float = 1.0) -> float:
        """Bits per weight by the formula of the method's paper.

        `active_share` is the share of a bank's experts that a token uses; only a bank with a shared basis depends on it
        (eq. 44; eq. 43 when it is 1).
        """

    def ledger(self, active_share: float = 1.0) -> BitLedger:
        """Account of every stored byte."""
        items = tuple(
            LedgerItem(name, CODE if self.is_code(name) else SIDE, tensor.numel() * tensor.element_size())
            for name, tensor in sorted(self.tensors().items())
        )
        weights = math.prod(self.shape)
        active = weights * active_share if len(self.shape) == 3 else weights
        return BitLedger(items, weights, active, self.paper_bits(active_share))

    def is_code(self, name: str) -> bool:
        return name in self.code_tensors

    def is_scale(self, name: str) -> bool:
        return name in self.scale_tensors

    def scales(self) -> dict[str, Tensor]:
        """The stored tensors that multiply the quantized values, by name."""
        return {name: tensor for name, tensor in self.tensors().items() if self.is_scale(name)}


FORMATS: dict[str, type[Packed]] = {}


def register_format(cls: type[Packed]) -> type[Packed]:
    """Class decorator: make a format loadable by its `format` name."""
    FORMATS[cls.format] = cls
    return cls
