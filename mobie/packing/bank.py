"""A bank: one projection of all experts of a layer, packed expert by expert, with or without a shared basis.

In a file, the tensors of all experts that have the same name are flattened and joined into one, so that a layer of
hundreds of experts has a handful of tensors; the shapes stand in the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mobie.packing.base import FORMATS, Packed, register_format


@register_format
@dataclass(frozen=True)
class Int8Matrix(Packed):
    """Symmetric n-bit matrix with one float16 scale per row (section 4.1: the shared basis UΣ).

    codes `(rows, cols)` int8, scale `(rows,)`.
    """

    format = "int8-rows"
    code_tensors = frozenset({"codes"})

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @classmethod
    def quantize(cls, matrix: Tensor) -> Self:
        """Round `(rows, cols)` to 8 bits, the largest magnitude of a row at ±127."""
        scale = (matrix.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
        codes = (matrix / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(codes, scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes.float() * self.scale.float()[:, None]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["codes"], tensors["scale"])

    def paper_bits(self, active_experts: int | None = None) -> float:
        return 8.0


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
    side: str = "left"

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
        joined = {f"experts.{name}": torch.cat([p[name].flatten() for p in parts]) for name in parts[0]}
        if self.basis is not None:
            joined |= {f"basis.{name}": tensor for name, tensor in self.basis.tensors().items()}
        return joined

    def header(self) -> dict[str, Any]:
        return {
            "experts": [
                {"header": e.header(), "shapes": {n: list(t.shape) for n, t in e.tensors().items()}}
                for e in self.experts
            ],
            "expert_format": self.experts[0].format,
            "basis": None if self.basis is None else {"format": self.basis.format, "header": self.basis.header()},
            "side": self.side,
        }

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        expert_class = FORMATS[header["expert_format"]]
        offsets = dict.fromkeys(header["experts"][0]["shapes"], 0)
        experts = []
        for entry in header["experts"]:
            own = {}
            for name, shape in entry["shapes"].items():
                size = torch.Size(shape).numel()
                own[name] = tensors[f"experts.{name}"][offsets[name] : offsets[name] + size].view(shape)
                offsets[name] += size
            experts.append(expert_class.from_tensors(entry["header"], own))
        basis = header["basis"]
        if basis is not None:
            own = {n.removeprefix("basis."): t for n, t in tensors.items() if n.startswith("basis.")}
            basis = FORMATS[basis["format"]].from_tensors(basis["header"], own)
        return cls(tuple(experts), basis, header["side"])

    def is_code(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        return (self.basis if part == "basis" else self.experts[0]).is_code(rest)

    def paper_bits(self, active_experts: int | None = None) -> float:
        count, rows, cols = self.shape
        expert_weights = self.experts[0].shape[0] * self.experts[0].shape[1]
        bits = sum(expert.paper_bits() for expert in self.experts) / count * expert_weights / (rows * cols)
        if self.basis is None:
            return bits
        basis_weights = self.basis.shape[0] * self.basis.shape[1]
        return bits + self.basis.paper_bits() * basis_weights / ((active_experts or count) * rows * cols)
