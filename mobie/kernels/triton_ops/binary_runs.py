"""A binary matrix's segments cut into runs of columns that lie in one block of scales.

A segment's columns are those of the matrix with gaps, so its blocks of scales begin anywhere. Here every block's
columns are padded to whole runs of 32, 64 or 128, so that a run of a row has one scale (per order and group):

    segment column   0 … 114          115 … 229                    run    0          1
    block            0                1                   (of 128) block  0          1         (13 columns spare)

    word of 32 columns   bit         31 30 … 17 16   15 14 …  1  0
                         column      31 29 …  3  1   30 28 …  2  0

In that order `word << s` has the signs of columns 2i and 2i + 1 where two 16-bit floats have theirs. Spare columns have
number -1 and scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mobie.kernels.layout import BinaryTensors, unpack_bits
from mobie.packing.binary import Segment

WORD = 32
WORDS_PER_RUN = (4, 2, 1)
SPARE_SHARE = 0.15  # longer runs cost less to scale; this many more columns are worth it


@dataclass(frozen=True)
class Runs:
    """A segment; see the head of this file.

    signs:        `(order, runs, rows, words)` int32, bit 1 for +1.
    bitmap:       `(runs, rows, words)` int32, bit 1 for the second group; None with one group.
    columns:      `(runs, 32·words)` int32, columns of the matrix; -1 where spare.
    block:        `(runs,)` int32.
    column_scale: `(variants, runs, 32·words)` float32, times the column factor; 0 where spare. Variants: those of
                  order k and group g at k·groups + g, and one more, the column factor alone, where there are means.
    row_scale:    `(order, groups, blocks, rows)` float16.
    mean:         `(groups, blocks, rows)` float16, or None.
    """

    signs: Tensor
    bitmap: Tensor | None
    columns: Tensor
    block: Tensor
    column_scale: Tensor
    row_scale: Tensor
    mean: Tensor | None

    @property
    def order(self) -> int:
        return self.signs.shape[0]

    @property
    def groups(self) -> int:
        return self.row_scale.shape[1]

    @property
    def words(self) -> int:
        return self.signs.shape[3]


@dataclass(frozen=True)
class BinaryRuns:
    """All segments of a matrix that have columns, and how x is prepared for them in one go.

    columns:      `(places,)` int32, the columns of x of all variants of all segments, one after the other; -1: none.
    column_scale: `(places,)` float32, what they are multiplied by.
    starts:       place at which each segment begins.
    """

    segments: tuple[Runs, ...]
    columns: Tensor
    column_scale: Tensor
    starts: tuple[int, ...]


#: made on first use, for as long as the matrix lives
_RUNS: WeakKeyDictionary[BinaryTensors, BinaryRuns] = WeakKeyDictionary()


def runs_of(matrix: BinaryTensors) -> BinaryRuns:
    """The matrix in runs; made once per matrix, on its device, at the first call (so not while a graph is captured)."""
    if matrix not in _RUNS:
        _RUNS[matrix] = _make(matrix)
    return _RUNS[matrix]


def _make(matrix: BinaryTensors) -> BinaryRuns:
    candidates = ((matrix.plain, matrix.plain_columns), (matrix.extra, matrix.extra_columns))
    segments = tuple(
        _cut(segment, columns.long(), matrix) for segment, columns in candidates if segment is not None and len(columns)
    )
    sizes = [segment.column_scale.numel() for segment in segments]
    return BinaryRuns(
        segments,
        torch.cat([s.columns.expand(len(s.column_scale), -1, -1).flatten() for s in segments]),
        torch.cat([s.column_scale.flatten() for s in segments]),
        tuple(sum(sizes[:number]) for number in range(len(sizes))),
    )


def _cut(segment: Segment, columns: Tensor, matrix: BinaryTensors) -> Runs:
    blocks = segment.row_scale.shape[-1]
    block = columns // matrix.block_size
    counts = torch.bincount(block, minlength=blocks)
    width = WORD * _words_per_run(counts)
    runs_per_block = -(-counts // width)
    first_place = (runs_per_block.cumsum(0) - runs_per_block) * width
    first_column = counts.cumsum(0) - counts
    place = torch.arange(len(columns), device=columns.device) - first_column[block] + first_place[block]
    runs = int(runs_per_block.sum())

    def spread(values: Tensor, spare: int = 0) -> Tensor:  # (..., n) → (..., runs, width)
        padded = values.new_full((*values.shape[:-1], runs * width), spare)
        padded[..., place] = values
        return padded.unflatten(-1, (runs, width))

    def words(packed: Tensor) -> Tensor:  # (..., rows, bytes) → (..., runs, rows, words)
        return _join(spread(unpack_bits(packed, len(columns)))).transpose(-2, -3).contiguous()

    return Runs(
        signs=words(segment.signs),
        bitmap=None if segment.bitmap is None else words(segment.bitmap),
        columns=spread(columns.int(), spare=-1),
        block=torch.arange(blocks, device=columns.device).repeat_interleave(runs_per_block).int(),
        column_scale=spread(_variants(segment, columns, matrix)),
        row_scale=segment.row_scale.transpose(-1, -2).contiguous(),
        mean=None if segment.mean is None else segment.mean.transpose(-1, -2).contiguous(),
    )


def _words_per_run(counts: Tensor) -> int:
    """The longest runs that need not many more columns than the shortest."""
    padded = {words: int((-(-counts // (WORD * words)) * WORD * words).sum()) for words in WORDS_PER_RUN}
    return next(words for words, columns in padded.items() if columns <= (1 + SPARE_SHARE) * padded[1])


def _join(bits: Tensor) -> Tensor:
    """Bits `(..., 32·words)` in 0, 1 → words `(..., words)` int32; see the head of this file."""
    column = torch.arange(WORD, device=bits.device)
    joined = (bits.unflatten(-1, (-1, WORD)).long() << (column // 2 + 16 * (column % 2))).sum(-1)
    return torch.where(joined < 1 << 31, joined, joined - (1 << 32)).int()


def _variants(segment: Segment, columns: Tensor, matrix: BinaryTensors) -> Tensor:
    """What x is multiplied by before it meets the bits: `(variants, n)` float32."""
    factor = torch.ones(len(columns), device=columns.device)
    if matrix.column_factor is not None:
        factor = matrix.column_factor.float()[columns]
    order, groups = segment.row_scale.shape[:2]
    variants = factor.expand(order * groups, -1)
    if segment.column_scale is not None:
        variants = segment.column_scale.float().flatten(0, 1) * factor
    return variants if segment.mean is None else torch.cat([variants, factor[None]])
