"""Partially binarized matrices: a code of several bits for every salient weight, a sign for every other one.

    salient    (code - zero[i, g]) · scale[i, g]        other    mean[i, g] ± row_scale[i, g]        g = j // group_size

Codes and signs are stored without holes, row by row, so that a weight takes the bits of its own kind alone. Where the
salient weights lie is told by gaps, the numbers of other weights before each. A gap is stored in codes of `gap_bits`
bits, of which the largest goes on: it stands for as many other weights as its value, and no salient one.

    weights    . . . s . s s . . . . . . . . s        s: salient
    3 bits           3   1 0             7   1        7 + 1 others before the last
    1 bit      1 1 1 0 1 0 0 1 1 1 1 1 1 1 1 0        a bitmap

With one bit that is a bitmap, as PB-LLM counts it (eq. 3). The width that takes the fewest bytes is stored: for 5 % of
salient weights 6 bits, 0.31 bits per weight; for 10 % 4 or 5 bits, 0.5 bits per weight; a bitmap from about 40 % on.
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
from mobie.packing.bits import pack_codes, pack_mask, unpack_codes, unpack_signs
from mobie.packing.grid import decode, spread_groups

WIDEST_GAP = 8  # bits


def encode_gaps(marked: Tensor) -> tuple[Tensor, int]:
    """Gap codes `(count,)` uint8 of the marked elements of `(n,)` bool, and the width in bits of fewest bytes."""
    gaps = marked.nonzero().flatten().diff(prepend=torch.tensor([-1])) - 1
    sizes = {width: width * -(-_code_count(gaps, width) // 8) for width in range(1, WIDEST_GAP + 1)}
    width = min(sizes, key=sizes.__getitem__)
    top = (1 << width) - 1
    ends = (gaps // top + 1).cumsum(0) - 1
    codes = torch.full((_code_count(gaps, width),), top, dtype=torch.uint8)
    codes[ends] = (gaps % top).to(torch.uint8)
    return codes, width


def _code_count(gaps: Tensor, width: int) -> int:
    return int((gaps // ((1 << width) - 1) + 1).sum())


def decode_gaps(codes: Tensor, width: int, length: int) -> Tensor:
    """Inverse of `encode_gaps`: which of `length` elements are marked, bool, on the device of the codes."""
    top = (1 << width) - 1
    goes_on = codes == top
    position = (codes + (~goes_on).to(torch.uint8)).cumsum(0) - 1  # of the marked element, or the last one passed over
    marked = torch.zeros(length + 1, dtype=torch.bool, device=codes.device)
    marked[torch.where(goes_on, length, position)] = True  # one element behind the end for codes that mark nothing
    return marked[:length]


@register_format
@dataclass(frozen=True)
class PartialBinary(Packed):
    """A matrix `(out, in)` of signs, and of codes where weights are salient; see the head of this file.

    signs:     `(ceil(others/8),)` uint8, packed bits, 1 for +1.
    codes:     `(bits, ceil(salient/8))` uint8, bit planes (`packing.bits`).
    gaps:      `(gap_bits, ceil(gap_count/8))` uint8, bit planes.
    row_scale: `(out, groups)` float16.
    mean:      `(out, groups)` float16, or None.
    scale:     `(out, groups)` float16, of the salient weights' grids.
    zero:      `(groups, bits, ceil(out/8))` uint8: integer zero points, as many bits as a code, packed along `out`.
    size:      (out, in).
    salient:   how many weights are salient.
    """

    format = "partial-binary"
    code_tensors = frozenset({"signs", "codes"})
    scale_tensors = frozenset({"row_scale", "scale"})

    signs: Tensor
    codes: Tensor
    gaps: Tensor
    row_scale: Tensor
    mean: Tensor | None
    scale: Tensor
    zero: Tensor
    size: tuple[int, int]
    salient: int
    bits: int
    group_size: int | None
    gap_bits: int
    gap_count: int

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        salient: Tensor,
        row_scale: Tensor,
        mean: Tensor | None,
        scale: Tensor,
        zero: Tensor,
        *,
        bits: int,
        group_size: int | None,
    ) -> Self:
        """Store a matrix.

        Args:
            codes: `(out, in)` uint8: of a salient weight its code, of another one 1 for +1 and 0 for -1.
            salient: `(out, in)` bool.
            row_scale, mean, scale, zero: `(out, groups)`, in float16's range; zero holds integers.
        """
        where, values = salient.cpu().flatten(), codes.cpu().flatten()
        gaps, gap_bits = encode_gaps(where)
        return cls(
            signs=pack_mask(values[~where].bool()),
            codes=pack_codes(values[where], bits),
            gaps=pack_codes(gaps, gap_bits),
            row_scale=to_half(row_scale).cpu().contiguous(),
            mean=None if mean is None else to_half(mean).cpu().contiguous(),
            scale=to_half(scale).cpu().contiguous(),
            zero=pack_codes(zero.T, bits),
            size=(codes.shape[0], codes.shape[1]),
            salient=int(where.sum()),
            bits=bits,
            group_size=group_size,
            gap_bits=gap_bits,
            gap_count=len(gaps),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        out, columns = self.size
        salient = self.salient_weights()
        codes = _placed(unpack_codes(self.codes, self.salient).float(), salient)
        signs = _placed(unpack_signs(self.signs, salient.numel() - self.salient), ~salient)
        zero = unpack_codes(self.zero, out).T.float()
        binary = signs.mul_(spread_groups(self.row_scale.float(), self.group_size, columns))
        if self.mean is not None:
            binary.add_(spread_groups(self.mean.float(), self.group_size, columns))
        return torch.where(salient, decode(codes, self.scale.float(), zero, self.group_size), binary).to(dtype)

    def salient_weights(self) -> Tensor:
        """Which weights are salient, `(out, in)` bool."""
        return decode_gaps(unpack_codes(self.gaps, self.gap_count), self.gap_bits, math.prod(self.size)).view(self.size)

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "signs": self.signs,
            "codes": self.codes,
            "gaps": self.gaps,
            "row_scale": self.row_scale,
            "mean": self.mean,
            "scale": self.scale,
            "zero": self.zero,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def header(self) -> dict[str, Any]:
        return {
            "size": list(self.size),
            "salient": self.salient,
            "bits": self.bits,
            "group_size": self.group_size,
            "gap_bits": self.gap_bits,
            "gap_count": self.gap_count,
        }

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(**{"mean": None, **tensors}, **{**header, "size": tuple(header["size"])})

    def paper_bits(self, active_share: float = 1.0) -> float:
        """`1 · (1 - r) + bits · r + 1`, r the share of salient weights and the last bit a bitmap (PB-LLM, eq. 3)."""
        share = self.salient / math.prod(self.size)
        return 1 * (1 - share) + self.bits * share + 1


def _placed(values: Tensor, where: Tensor) -> Tensor:
    """`values` `(count,)` at the marked elements of `where` `(out, in)`, row by row; zeros elsewhere."""
    return values.new_zeros(where.shape).masked_scatter_(where, values)
