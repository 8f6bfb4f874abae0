"""A bank: one projection of all experts of a layer, packed expert by expert, with or without a shared basis.

In a file, the tensors of all experts that have the same name are flattened and joined into one, so that a layer of
hundreds of experts has a handful of tensors; the shapes stand in the header, once where all experts share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mobie.packing.base import FORMATS, Packed, register_format
from mobie.packing.bits import pack_codes, unpack_codes

#: name under which gate and up are stored as one bank, `(2·experts, out, in)`, when they share one basis
GATE_UP = "gate_up"
Side = Literal["left", "right"]
SMALLEST_HALF = 2.0**-24  # smallest positive float16


@register_format
@dataclass(frozen=True)
class SymmetricRows(Packed):
    """Symmetric n-bit matrix with one float16 scale per row (section 4.1: the shared basis UΣ).

    codes: 8 bits: `(rows, cols)` int8; fewer: `(rows, bits, ceil(cols/8))` uint8, bit planes of the code plus
           `2^(bits-1)`.
    scale: `(rows,)` float16.
    """

    format = "symmetric-rows"
    code_tensors = frozenset({"codes"})
    scale_tensors = frozenset({"scale"})

    codes: Tensor
    scale: Tensor
    bits: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.scale), self.columns)

    @classmethod
    def quantize(cls, matrix: Tensor, bits: int) -> Self:
        """Round `(rows, cols)`, the largest magnitude of a row at ±(2^(bits-1) - 1)."""
        top = (1 << (bits - 1)) - 1
        scale = (matrix.abs().amax(dim=1) / top).clamp(min=SMALLEST_HALF).half()
        codes = (matrix / scale.float()[:, None]).round().clamp(-top, top)
        stored = codes.to(torch.int8) if bits == 8 else pack_codes(codes.int() + top + 1, bits)
        return cls(stored, scale, bits, matrix.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.bits == 8:
            codes = self.codes.float()
        else:
            codes = unpack_codes(self.codes, self.columns).float() - (1 << (self.bits - 1))
        return (codes * self.scale.float()[:, None]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def header(self) -> dict[str, Any]:
        return {"bits": self.bits, "columns": self.columns}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["codes"], tensors["scale"], header["bits"], header["columns"])

    def paper_bits(self, active_share: float = 1.0) -> float:
        return float(self.bits)


@register_format
@dataclass(frozen=True)
class PackedBank(Packed):
    """`experts`: one packed matrix per expert. `basis`: shared factor, or None.

    side "left":  W_e = basis @ experts[e]    basis `(out, rank)`, experts `(rank, in)`   (eq. 4)
    side "right": W_e = experts[e] @ basis    experts `(out, rank)`, basis `(rank, in)`
    """

    format = "bank"
    code_tensors = frozenset()

    experts: tuple[Packed, ...]
    basis: Packed | None = None
    side: Side = "left"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, cols = self.experts[0].shape
        if self.basis is not None:
            rows, cols = (self.basis.shape[0], cols) if self.side == "left" else (rows, self.basis.shape[1])
        return (len(self.experts), rows, cols)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = torch.stack([expert.dequantize() for expert in self.experts])
        if self.basis is not None:
            basis = self.basis.dequantize()
            dense = basis @ dense if self.side == "left" else dense @ basis
        return dense.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        parts = [expert.tensors() for expert in self.experts]
        names = dict.fromkeys(name for part in parts for name in part)  # an expert may lack an optional tensor
        joined = {f"experts.{name}": torch.cat([p[name].flatten() for p in parts if name in p]) for name in names}
        if self.basis is not None:
            joined |= {f"basis.{name}": tensor for name, tensor in self.basis.tensors().items()}
        return joined

    def header(self) -> dict[str, Any]:
        shapes = [{name: list(t.shape) for name, t in e.tensors().items()} for e in self.experts]
        names = sorted({name for own in shapes for name in own})
        return {
            "count": len(self.experts),
            "expert_format": self.experts[0].format,
            "headers": _fold([e.header() for e in self.experts]),
            "shapes": {name: _fold([own.get(name) for own in shapes]) for name in names},
            "basis": None if self.basis is None else {"format": self.basis.format, "header": self.basis.header()},
            "side": self.side,
        }

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        expert_class, count = FORMATS[header["expert_format"]], header["count"]
        own: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for name, folded in header["shapes"].items():
            shapes = _unfold(folded, count)
            sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
            for expert, part, shape in zip(own, tensors[f"experts.{name}"].split(sizes), shapes, strict=True):
                if shape is not None:
                    expert[name] = part.view(shape)
        headers = _unfold(header["headers"], count)
        experts = tuple(expert_class.from_tensors(h, e) for h, e in zip(headers, own, strict=True))
        basis = header["basis"]
        if basis is not None:
            named = {n.removeprefix("basis."): t for n, t in tensors.items() if n.startswith("basis.")}
            basis = FORMATS[basis["format"]].from_tensors(basis["header"], named)
        return cls(experts, basis, header["side"])

    def is_code(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        return self._owner(part).is_code(rest)

    def is_scale(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        return self._owner(part).is_scale(rest)

    def _owner(self, part: str) -> Packed:
        """Whose tensor a name begins with `part` is."""
        return self.basis if part == "basis" and self.basis is not None else self.experts[0]

    def paper_bits(self, active_share: float = 1.0) -> float:
        count, rows, cols = self.shape
        expert_weights = self.experts[0].shape[0] * self.experts[0].shape[1]
        bits = sum(expert.paper_bits() for expert in self.experts) / count * expert_weights / (rows * cols)
        if self.basis is None:
            return bits
        basis_weights = self.basis.shape[0] * self.basis.shape[1]
        return bits + self.basis.paper_bits() * basis_weights / (active_share * count * rows * cols)


def _fold(values: list[Any]) -> dict[str, Any]:
    """One value per expert as JSON: written once where all are equal."""
    return {"all": values[0]} if all(value == values[0] for value in values) else {"each": values}


def _unfold(folded: Mapping[str, Any], count: int) -> list[Any]:
    """Inverse of `_fold`."""
    return [folded["all"]] * count if "all" in folded else folded["each"]


def split_gate_up(projections: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the common storage of gate and up: `gate_up (2·experts, out, in)` → `gate` and `up`."""
    split = dict(projections)
    if GATE_UP in split:
        split["gate"], split["up"] = split.pop(GATE_UP).chunk(2)
    return split
