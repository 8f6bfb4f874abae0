"""Vector-quantized matrices: short runs of a row's weights are replaced by the index of a vector in a codebook.

    W[i, j] = codebook[code[i, j // d], j % d] · row_norm[i] · column_norm[j]        d: length of a vector

The last run of a row is filled up with columns that do not exist. A bank has codes and norms for every expert, and one
codebook for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mobie.packing.base import Packed, register_format
from mobie.packing.binary import to_half
from mobie.packing.bits import pack_codes, unpack_codes

HALF_BITS = 16


def runs(columns: int, dimension: int) -> int:
    """Vectors in a row of so many columns, the last one filled up."""
    return -(-columns // dimension)


@register_format
@dataclass(frozen=True)
class VectorCodes(Packed):
    """A matrix `(out, in)`, or the matrices of a bank `(experts, out, in)` that share a codebook.

    codes:       `(…, bits, ceil(out · runs / 8))` uint8, bit planes (`packing.bits`) over all rows of a matrix.
    codebook:    `(centroids, d)` float16.
    column_norm: `(…, in)` float16.
    row_norm:    `(…, out)` float16.
    """

    format = "vector"
    code_tensors = frozenset({"codes"})
    scale_tensors = frozenset({"column_norm", "row_norm"})

    codes: Tensor
    codebook: Tensor
    column_norm: Tensor
    row_norm: Tensor

    @classmethod
    def pack(cls, codes: Tensor, codebook: Tensor, column_norm: Tensor, row_norm: Tensor) -> Self:
        """Store integer codes `(…, out, runs)`; norms and codebook are rounded to float16.

        A code takes as many bits as the number of centroids needs, one at least.
        """
        bits = max(1, (len(codebook) - 1).bit_length())
        packed = pack_codes(codes.flatten(-2), bits)
        return cls(packed, *(to_half(values).cpu().contiguous() for values in (codebook, column_norm, row_norm)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.row_norm.shape, self.column_norm.shape[-1])

    @property
    def vectors(self) -> int:
        """How many vectors a matrix, or all matrices of a bank, are cut into."""
        return self.row_norm.numel() * runs(self.column_norm.shape[-1], self.codebook.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        *experts, rows, columns = self.shape
        per_row = runs(columns, self.codebook.shape[1])
        codes = unpack_codes(self.codes, rows * per_row)
        vectors = self.codebook.float().index_select(0, codes.flatten().int())
        dense = vectors.view(*experts, rows, -1)[..., :columns] * self.row_norm.float()[..., None]
        return dense.mul_(self.column_norm.float()[..., None, :]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "codes": self.codes,
            "codebook": self.codebook,
            "column_norm": self.column_norm,
            "row_norm": self.row_norm,
        }

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(**tensors, **header)

    def paper_bits(self, active_share: float = 1.0) -> float:
        """Codes of `log2(centroids)` bits, codebook and norms of 16 bits each, per weight, as NoWag counts them.

        Of a bank, the codebook weighs on the experts that a token uses.
        """
        own = self.vectors * math.log2(len(self.codebook))
        own += HALF_BITS * (self.column_norm.numel() + self.row_norm.numel())
        shared = HALF_BITS * self.codebook.numel() / (active_share if len(self.shape) == 3 else 1.0)
        return (own + shared) / math.prod(self.shape)
