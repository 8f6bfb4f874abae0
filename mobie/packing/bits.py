"""Bits in bytes. One layout serves signs and n-bit codes: bit planes along the last dimension.

    codes  (..., n)  values 0 .. 2**bits - 1, of up to 16 bits
    packed (..., bits, ceil(n / 8))  uint8

    plane p of a row, byte b:   column  8b  8b+1 … 8b+7
                                bit      0    1  …  7      (bit p of each code; little-endian within the byte)

A row whose length is no multiple of 8 is padded with zero bits at its end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BYTE = 8  # bits; wider codes are unpacked into wider integers


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes `(..., n)` into `(..., bits, ceil(n/8))` uint8.

    Raises:
        ValueError: a code does not fit in `bits` bits.
    """
    values = codes.detach().cpu().numpy()
    if values.size and (values.min() < 0 or values.max() >= 1 << bits):
        raise ValueError(f"codes span {values.min()}..{values.max()}, expected 0..{(1 << bits) - 1}")
    kind = np.uint8 if bits <= BYTE else np.uint16
    planes = (values[..., None, :].astype(kind) >> np.arange(bits, dtype=kind)[:, None]) & 1
    return torch.from_numpy(np.packbits(planes.astype(bool, copy=False), axis=-1, bitorder="little"))


def unpack_codes(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_codes`: `(..., bits, ceil(length/8))` → `(..., length)`, on the device of `packed`.

    uint8, or int32 where a code has more than 8 bits.
    """
    if packed.device.type != "cpu":
        return _unpack_on_device(packed, length)
    planes = np.unpackbits(packed.numpy(), axis=-1, count=length, bitorder="little")
    kind = np.uint8 if packed.shape[-2] <= BYTE else np.int32
    weights = (1 << np.arange(packed.shape[-2], dtype=kind))[:, None]
    return torch.from_numpy((planes * weights).sum(axis=-2, dtype=kind))


def _unpack_on_device(packed: Tensor, length: int) -> Tensor:
    """`unpack_codes` in torch, for tensors that numpy cannot read. On a CPU numpy is several times faster."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :length]
    kind = torch.uint8 if packed.shape[-2] <= BYTE else torch.int32
    places = torch.arange(packed.shape[-2], dtype=kind, device=packed.device)
    return (planes.to(kind) << places[:, None]).sum(dim=-2, dtype=kind)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack booleans `(..., n)` into `(..., ceil(n/8))` uint8."""
    return pack_codes(mask, bits=1).squeeze(-2)


def unpack_mask(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_mask`: `(..., ceil(length/8))` → `(..., length)` bool."""
    return unpack_codes(packed.unsqueeze(-2), length).bool()


def unpack_signs(packed: Tensor, length: int) -> Tensor:
    """Signs `(..., length)` as float32 ±1, from the mask `value >= 0` (eq. 3: sign(0) = +1)."""
    return unpack_mask(packed, length).float().mul_(2).sub_(1)
