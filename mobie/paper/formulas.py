"""Table 6 and equations 37–44: what the experts of one layer take, before and after the joint decomposition.

N: experts of the layer   O × I: shape of one expert's weight   k: experts that a token uses
r = min(O, N·I): rank that is kept   B_fp, B_h, B_b: bits of the full precision, of UΣ and of V
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertShape:
    """The experts of one projection of one layer."""

    experts: int  # N
    outputs: int  # O
    inputs: int  # I
    active: int  # k

    @property
    def rank(self) -> int:
        """r: the joint decomposition keeps the full rank (B.2)."""
        return min(self.outputs, self.experts * self.inputs)

    @property
    def weights(self) -> int:
        """Parameter count without the decomposition (eq. 37)."""
        return self.experts * self.outputs * self.inputs

    @property
    def active_weights(self) -> int:
        """Parameter count of the experts that a token uses, without the decomposition (in eq. 41)."""
        return self.active * self.outputs * self.inputs


@dataclass(frozen=True)
class Bits:
    """Bits per weight; the paper's setting is 8 bits for UΣ and one for V."""

    full: float = 16.0  # B_fp
    shared: float = 8.0  # B_h
    expert: float = 1.0  # B_b


def base_bits(shape: ExpertShape, bits: Bits) -> float:
    """Stored bits without the decomposition (eq. 37)."""
    return shape.weights * bits.full


def cejd_weights(shape: ExpertShape) -> int:
    """Parameter count after the decomposition (eq. 38)."""
    return shape.outputs * shape.rank + shape.experts * shape.rank * shape.inputs


def count_factor(shape: ExpertShape) -> float:
    """Parameter count after against before (eq. 39)."""
    return cejd_weights(shape) / shape.weights


def cejd_bits(shape: ExpertShape, bits: Bits) -> float:
    """Stored bits after the decomposition (eq. 40)."""
    return shape.outputs * shape.rank * bits.shared + shape.experts * shape.rank * shape.inputs * bits.expert


def storage_factor(shape: ExpertShape, bits: Bits) -> float:
    """Stored bits after against before (eq. 40)."""
    return cejd_bits(shape, bits) / base_bits(shape, bits)


def base_active_bits(shape: ExpertShape, bits: Bits) -> float:
    """Bits that a token needs without the decomposition (eq. 41)."""
    return shape.active_weights * bits.full


def cejd_active_bits(shape: ExpertShape, bits: Bits) -> float:
    """Bits that a token needs after the decomposition: UΣ once, and V of its experts (eq. 42)."""
    return shape.outputs * shape.rank * bits.shared + shape.active * shape.rank * shape.inputs * bits.expert


def active_factor(shape: ExpertShape, bits: Bits) -> float:
    """Bits that a token needs, after against before (eq. 42)."""
    return cejd_active_bits(shape, bits) / base_active_bits(shape, bits)


def static_average_bits(shape: ExpertShape, bits: Bits) -> float:
    """Stored bits for each weight of the original layer (eq. 43)."""
    return cejd_bits(shape, bits) / shape.weights


def active_average_bits(shape: ExpertShape, bits: Bits) -> float:
    """Bits that a token needs for each weight of the experts it uses (eq. 44), which the paper reports."""
    return cejd_active_bits(shape, bits) / shape.active_weights


def count_overhead(shape: ExpertShape) -> int:
    """Weights that the decomposition adds: O² at full rank (Table 6)."""
    return cejd_weights(shape) - shape.weights


@dataclass(frozen=True)
class Table6Row:
    """A quantity of Table 6 for one shape; None where the table has a dash."""

    quantity: str
    baseline: float | None
    cejd: float


def table6(shape: ExpertShape, bits: Bits) -> list[Table6Row]:
    """The rows of Table 6, evaluated."""
    return [
        Table6Row("Static params (count)", shape.weights, cejd_weights(shape)),
        Table6Row("Static storage (bits)", base_bits(shape, bits), cejd_bits(shape, bits)),
        Table6Row("Static CF (bits)", None, storage_factor(shape, bits)),
        Table6Row("Activation storage (bits)", base_active_bits(shape, bits), cejd_active_bits(shape, bits)),
        Table6Row("Activation CF (bits)", None, active_factor(shape, bits)),
        Table6Row("Count-level overhead", None, count_overhead(shape)),
    ]
