"""Packed weights as kernels read them: the stored bits and scales, only padded and stacked over experts.

    stored, expert e      plain signs  (rows, ceil(columns/8))             extra signs  (rows, ceil(places/8))
    BinaryBank            signs        (experts, parts, rows, bytes)       extra_signs  (experts, parts, rows, extra/8)

    bytes: a multiple of 16, so that a row is whole runs of 128 columns; extra: a multiple of 32, the same for all
    experts. Spare columns have sign bits 0 and column scale 0, so whatever a kernel reads there counts for nothing.

A bank has two parts, gate and up, which read the same input, or one. The order of the bits is that of `packing.bits`:
column 8b + i of a row is bit i of its byte b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from mobie.errors import UnsupportedError
from mobie.kernels.bank_matrix import BankMatrix
from mobie.packing.bank import GATE_UP, PackedBank, Side, SymmetricRows
from mobie.packing.base import Packed
from mobie.packing.binary import BinaryMatrix, Segment
from mobie.packing.dense import Dense16
from mobie.packing.planes import PlaneMatrix

GROUP = 128  # columns that share one activation scale on the int8 path; rows are padded to whole groups
EXTRA_STEP = 32  # the number of second-order columns is rounded up to a multiple of this
BYTE = 8
ACTIVATION = "silu"  # the one activation that the kernels have


def _map_tensors(value: Any, device: torch.device | str) -> Any:
    """`value` on another device: tensors, and dataclasses of tensors; anything else as it is."""
    if isinstance(value, Tensor):
        return _move(value, device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), device) for f in fields(value)})
    return value


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device; a first dimension that is only expanded stays so and is not copied out."""
    if tensor.dim() and tensor.shape[0] > 1 and tensor.stride(0) == 0:
        return tensor[:1].to(device).expand(tensor.shape)
    return tensor.to(device)


def stored_bytes(value: Any) -> int:
    """Bytes in memory of a tensor, or of all tensors of a dataclass; an expanded dimension counts once."""
    if isinstance(value, Tensor):
        sizes = zip(value.shape, value.stride(), strict=True)
        return math.prod(n for n, stride in sizes if stride or n == 0) * value.element_size()
    if is_dataclass(value):
        return sum(stored_bytes(getattr(value, f.name)) for f in fields(value))
    return 0


@dataclass(frozen=True)
class OnDevice:
    """Dataclass of tensors on one device."""

    def to(self, device: torch.device | str) -> Self:
        return _map_tensors(self, device)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return stored_bytes(self)


@dataclass(frozen=True)
class BinaryBank(OnDevice):
    """Matrices of signs with one magnitude group and no means: MoBiE's format and OBE's (`kernels.bank_matrix`).

        value[e, p, i, j] = row_scale[e, p, i, j // block_size] · column_scale[e, p, j] · sign[e, p, i, j]

    and, for every k, the same of the extra tensors added at column j = extra_columns[e, p, k]; the block is that of j.

    signs:              `(experts, parts, rows, bytes)` uint8, bytes a multiple of 16; spare bits 0.
    row_scale:          `(experts, parts, rows, blocks)` float16.
    column_scale:       `(experts, parts, 8·bytes)` float16; 0 on spare columns.
    extra_signs:        `(experts, parts, rows, extra/8)` uint8; extra a multiple of 32, possibly 0.
    extra_columns:      `(experts, parts, extra)` int32, a column as often as it has further signs; 0 at spare places.
    extra_row_scale:    `(experts, parts, rows, blocks)` float16.
    extra_column_scale: `(experts, parts, extra)` float16; 0 at spare places.
    columns:            columns of the matrices, without the spare ones.
    block_size:         a multiple of 128; 8·bytes where a row has one scale.
    """

    signs: Tensor
    row_scale: Tensor
    column_scale: Tensor
    extra_signs: Tensor
    extra_columns: Tensor
    extra_row_scale: Tensor
    extra_column_scale: Tensor
    columns: int
    block_size: int

    @property
    def experts(self) -> int:
        return self.signs.shape[0]

    @property
    def parts(self) -> int:
        return self.signs.shape[1]

    @property
    def rows(self) -> int:
        return self.signs.shape[2]

    @property
    def blocks(self) -> int:
        return self.row_scale.shape[3]

    @property
    def extra(self) -> int:
        return self.extra_columns.shape[2]


@dataclass(frozen=True)
class Panel(OnDevice):
    """Matrices that every token or pair goes through: shared bases, the int8 head, Linears.

    codes: `(parts, rows, columns)` int8, float16 or bfloat16; where parts share one matrix, an expanded view of it.
    scale: `(parts, rows)` float16, multiplies the rows; None where there is none.
    """

    codes: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class BinaryTensors(OnDevice):
    """Any stored binary matrix (two groups, means, orders, salient columns replaced): see `mobie.packing.binary`.

    plain, extra:   segments as stored; `extra` None if there are no salient columns.
    plain_columns:  `(n,)` int32, columns of the plain segment.
    extra_columns:  `(m,)` int32, columns of the extra segment; added where the plain segment covers them too.
    column_factor:  `(columns,)` float16, multiplies whole columns, or None.
    """

    plain: Segment
    extra: Segment | None
    plain_columns: Tensor
    extra_columns: Tensor
    column_factor: Tensor | None
    rows: int
    columns: int
    block_size: int


@dataclass(frozen=True)
class ExpertsLayout(OnDevice):
    """All experts of a layer.

    gate_up, down:             banks of two parts and of one part.
    gate_up_basis, down_basis: shared factors, or None. Side "left": W = basis @ V; "right": W = V @ basis.
                               Right form with one basis for gate and up: a panel of one part.
    """

    gate_up: BinaryBank
    down: BinaryBank
    gate_up_basis: Panel | None
    down_basis: Panel | None
    gate_up_side: Side
    down_side: Side
    activation: str


@dataclass(frozen=True)
class DenseExperts(OnDevice):
    """16-bit experts as the library has them: gate_up `(experts, 2·width, hidden)`, down `(experts, hidden, width)`."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Groups(OnDevice):
    """(token, expert) pairs sorted by expert, every expert padded to whole tiles.

    tile_expert: `(tiles,)` int32, -1 for a tile that is not used.
    tile_pairs:  `(tiles, tile)` int32, pair = token·k + slot, -1 at spare places.
    The number of tiles follows from shapes alone, so that a CUDA graph can hold it.
    """

    tile_expert: Tensor
    tile_pairs: Tensor


def tiles_needed(pairs: int, experts: int, tile: int) -> int:
    """Tiles that hold `pairs` pairs however they fall on `experts` experts."""
    return min(pairs, experts) + pairs // tile


def one_group(rows: int, tile: int, device: torch.device | str) -> Groups:
    """Groups of a bank with one expert, whose pairs are the rows of x."""
    tiles = -(-rows // tile)
    pairs = torch.arange(tiles * tile, dtype=torch.int32, device=device)
    return Groups(torch.zeros(tiles, dtype=torch.int32, device=device), pairs.where(pairs < rows, -1).view(tiles, tile))


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Bits `(..., length)` uint8 of `(..., ceil(length/8))` uint8, on the device of `packed`."""
    shifts = torch.arange(BYTE, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :length]


def lay_out_experts(packed: Mapping[str, Packed], activation: str) -> ExpertsLayout:
    """Layout of a layer's experts, from `gate` and `up`, or both as `gate_up`, and `down`.

    Raises:
        UnsupportedError: no kernel reads this format or activation; the text says why.
    """
    if activation != ACTIVATION:
        raise UnsupportedError(f"experts with activation {activation!r}; the kernels have {ACTIVATION!r} only")
    gate_up, gate_up_basis, gate_up_side = _gate_and_up(packed)
    down = _require_bank(packed["down"])
    return ExpertsLayout(
        gate_up=gate_up,
        down=_stack_bank([down.experts]),
        gate_up_basis=gate_up_basis,
        down_basis=None if down.basis is None else _panel(down.basis),
        gate_up_side=gate_up_side,
        down_side=down.side,
        activation=activation,
    )


def lay_out_linear(packed: Packed) -> BinaryBank | BinaryTensors | Panel:
    """Layout of one matrix `(out, in)`: a bank of one expert and part where the format allows it.

    Raises:
        UnsupportedError: no kernel reads this format.
    """
    if isinstance(packed, PlaneMatrix):
        return _stack_bank([[packed]])
    if isinstance(packed, BinaryMatrix):
        return _stack_bank([[packed]]) if _why_no_bank(packed) is None else _binary_tensors(packed)
    if isinstance(packed, SymmetricRows | Dense16) and len(packed.shape) == 2:
        return _panel(packed)
    raise UnsupportedError(
        f"a Linear stored as {packed.format!r}; the kernels read binary, sign-plane, int8 and 16-bit matrices"
    )


def _require_bank(packed: Packed) -> PackedBank:
    if not isinstance(packed, PackedBank):
        raise UnsupportedError(f"experts stored as {packed.format!r}; the kernels read banks of matrices of signs")
    return packed


def _gate_and_up(packed: Mapping[str, Packed]) -> tuple[BinaryBank, Panel | None, Side]:
    """Bank of two parts, the bases of both as one panel, and the side they stand on."""
    if GATE_UP in packed:
        both = _require_bank(packed[GATE_UP])
        half = len(both.experts) // 2
        bank = _stack_bank([both.experts[:half], both.experts[half:]])
        basis = None if both.basis is None else _panel(both.basis)
        if basis is not None and both.side == "left":  # each part has its own latent, the matrix is one
            scale = None if basis.scale is None else basis.scale.expand(2, -1)
            basis = Panel(basis.codes.expand(2, -1, -1), scale)
        return bank, basis, both.side
    gate, up = _require_bank(packed["gate"]), _require_bank(packed["up"])
    if gate.side != up.side or (gate.basis is None) != (up.basis is None):
        raise UnsupportedError("gate and up with bases on different sides; the kernels read both from one launch")
    bases = [_panel(each.basis) for each in (gate, up) if each.basis is not None]
    basis = _stack_panels(bases) if bases else None
    return _stack_bank([gate.experts, up.experts]), basis, gate.side


def _panel(packed: Packed) -> Panel:
    """A panel of one part; kernels expect rows that are contiguous, which a packed matrix in memory need not be."""
    if isinstance(packed, Dense16):
        return Panel(packed.weight[None].contiguous())
    if not isinstance(packed, SymmetricRows):
        raise UnsupportedError(f"a shared basis stored as {packed.format!r}; the kernels read int8 and 16-bit bases")
    if packed.bits == BYTE:
        return Panel(packed.codes[None].contiguous(), packed.scale[None])
    planes = unpack_bits(packed.codes, packed.columns)  # (rows, bits, columns)
    weights = 2 ** torch.arange(packed.bits, dtype=torch.uint8, device=planes.device)
    codes = (planes * weights[:, None]).sum(1, dtype=torch.int16) - (1 << (packed.bits - 1))
    return Panel(codes.to(torch.int8)[None], packed.scale[None])


def _stack_panels(panels: Sequence[Panel]) -> Panel:
    kinds = {(panel.codes.shape, panel.codes.dtype) for panel in panels}
    if len(kinds) > 1:
        raise UnsupportedError("gate and up with bases of different shapes or bits; the kernels read both as one panel")
    scales = [panel.scale for panel in panels if panel.scale is not None]
    return Panel(torch.cat([panel.codes for panel in panels]), torch.cat(scales) if scales else None)


def _why_no_bank(matrix: Packed) -> str | None:
    """Why a matrix does not fit a `BinaryBank`; None if it does."""
    if not isinstance(matrix, BinaryMatrix):
        return f"stored as {matrix.format!r}"
    segments = [matrix.plain] if matrix.extra is None else [matrix.plain, matrix.extra]
    reasons = {
        "with two magnitude groups": any(segment.row_scale.shape[1] != 1 for segment in segments),
        "with means": any(segment.mean is not None for segment in segments),
        "with several orders in one segment": any(segment.signs.shape[0] != 1 for segment in segments),
        "whose salient columns are replaced": matrix.extra is not None and not matrix.extra_is_residual,
        "with a factor per column": matrix.column_factor is not None,
        f"with scale blocks of {matrix.block_size} columns": (
            matrix.block_size % GROUP != 0 and matrix.block_size < matrix.size[1]
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _bank_matrix(matrix: Packed) -> BankMatrix:
    """A stored matrix of a bank. Raises UnsupportedError for one that does not fit."""
    if isinstance(matrix, PlaneMatrix):
        return BankMatrix.of_planes(matrix)
    reason = _why_no_bank(matrix)
    if reason is not None or not isinstance(matrix, BinaryMatrix):
        raise UnsupportedError(
            f"experts {reason}; the grouped kernels read sign planes (OBE's), and binary matrices with one group, no "
            f"mean, a residual second order (MoBiE's) and scale blocks of a multiple of {GROUP} columns"
        )
    return BankMatrix.of_binary(matrix)


def _stack_bank(parts: Sequence[Sequence[Packed]]) -> BinaryBank:
    """Bank of `parts[p][e]`.

    All experts get as many places of extra signs as the one with most, so that one launch reads them all. A place takes
    `rows / 8 + 6` bytes, whether an expert has something there or not: where one expert of a layer has four planes in
    all columns, every one of them takes the memory of four. So does plane 0 in columns that have none.
    """
    matrices = [[_bank_matrix(matrix) for matrix in experts] for experts in parts]
    every = [matrix for experts in matrices for matrix in experts]
    if len({(matrix.shape, matrix.block_size) for matrix in every}) > 1:
        raise UnsupportedError("experts, or gate and up, of different shapes; the kernels read them as one bank")
    columns, block_size = every[0].columns, every[0].block_size
    padded = -(-columns // GROUP) * GROUP
    extra = -(-max(matrix.places for matrix in every) // EXTRA_STEP) * EXTRA_STEP
    widths = {"signs": padded // BYTE, "column_scale": padded}
    widths |= {"extra_signs": extra // BYTE, "extra_columns": extra, "extra_column_scale": extra}

    def stack(name: str) -> Tensor:  # (experts, parts, ...)
        own = [torch.stack([_widen(getattr(matrix, name), widths.get(name)) for matrix in each]) for each in matrices]
        return torch.stack(own, dim=1).contiguous()

    tensors = {name: stack(name) for name in BinaryBank.__annotations__ if name not in ("columns", "block_size")}
    return BinaryBank(**tensors, columns=columns, block_size=padded if block_size >= columns else block_size)


def _widen(tensor: Tensor, width: int | None) -> Tensor:
    """Zeros at the end of the last dimension, where a width is given."""
    return tensor if width is None else pad(tensor, (0, width - tensor.shape[-1]))


def _binary_tensors(matrix: BinaryMatrix) -> BinaryTensors:
    device = matrix.plain.signs.device
    return BinaryTensors(
        plain=matrix.plain,
        extra=matrix.extra,
        plain_columns=matrix.plain_columns().to(device, torch.int32),
        extra_columns=matrix.salient.to(device, torch.int32),
        column_factor=matrix.column_factor,
        rows=matrix.size[0],
        columns=matrix.size[1],
        block_size=matrix.block_size,
    )
