"""Sort (token, expert) pairs by expert into whole tiles, in one launch of fixed shapes.

Program e counts the pairs of every expert, so that it knows where expert e begins, and then writes expert e's tiles;
one program more blanks the tiles that are left over. No program waits for another and none writes where another
does, so the order of pairs (ascending within an expert) does not depend on the run.

    expert of pair   2 0 2 2 1         tile = 2
    tile_expert      0    1    2         2      -1
    tile_pairs       1 .  4 .  0 2       3 .    . .        `.` is -1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.errors import UnsupportedError
from mobie.kernels.layout import Groups, tiles_needed
from mobie.kernels.triton_ops.common import check_device, on_device, power_of_two

BLOCK = 1024  # pairs that are looked at together
BLOCK_AT_LEAST = 128  # one for every thread
BINS_AT_LEAST = 16


@triton.jit
def _group_pairs(
    index,
    tile_expert,
    tile_pairs,
    pairs,
    experts,
    tiles,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, BLOCK):
        chosen = tl.load(index + start + lane, mask=start + lane < pairs, other=-1)
        chosen = tl.where((chosen >= 0) & (chosen < experts), chosen, experts)  # BINS > experts: counted apart
        counts += tl.histogram(chosen.to(tl.int32), BINS)
    needed = tl.where(bins < experts, (counts + TILE - 1) // TILE, 0)
    first = tl.sum(tl.where(bins < expert, needed, 0), axis=0)
    own = tl.sum(tl.where(bins == expert, needed, 0), axis=0)
    if expert == experts:  # the program that has no expert blanks what no expert needs
        own = tiles - first
    for start in range(0, own, BLOCK):
        inside = start + lane < own
        tl.store(tile_expert + first + start + lane, tl.where(expert < experts, expert, -1), mask=inside)
    slots = own * TILE
    count = tl.sum(tl.where((bins == expert) & (expert < experts), counts, 0), axis=0)
    place = tile_pairs + first * TILE
    for start in range(0, slots, BLOCK):
        slot = start + lane
        tl.store(place + slot, tl.full((BLOCK,), -1, tl.int32), mask=(slot >= count) & (slot < slots))
    if count > 0:
        before = 0
        for start in range(0, pairs, BLOCK):
            pair = start + lane
            mine = tl.load(index + pair, mask=pair < pairs, other=-1) == expert
            rank = before + tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(place + rank, pair, mask=mine)
            before += tl.sum(mine.to(tl.int32), axis=0)


def group_pairs(index: Tensor, experts: int, tile: int) -> Groups:
    """Group the pairs of `index` by expert; shapes do not depend on its values, so it goes into a CUDA graph.

    Args:
        index: `(T, k)` int64 or int32, the experts of each token, in `0 … experts - 1`; pair p = token · k + slot.
            Pairs with another value are left out of all tiles.
        experts: how many there are.
        tile: pairs per tile.

    Raises:
        UnsupportedError: not on an NVIDIA GPU, or not integers of 32 or 64 bits.
        ValueError: not two dimensions, or no expert or tile.
    """
    check_device("group_pairs", "index", index)
    if index.dtype not in (torch.int32, torch.int64):
        raise UnsupportedError(f"group_pairs: index is {index.dtype}, expected torch.int64 or torch.int32")
    if index.dim() != 2 or experts < 1 or tile < 1:
        raise ValueError(
            f"group_pairs: index {tuple(index.shape)}, {experts} experts, tile {tile}; expected (T, k) and at least 1"
        )
    index = index.contiguous()
    pairs = index.numel()
    tiles = tiles_needed(pairs, experts, tile)
    tile_expert = torch.empty(tiles, dtype=torch.int32, device=index.device)
    tile_pairs = torch.empty(tiles, tile, dtype=torch.int32, device=index.device)
    if pairs:
        with on_device(index):
            _group_pairs[(experts + 1,)](
                index,
                tile_expert,
                tile_pairs,
                pairs,
                experts,
                tiles,
                TILE=tile,
                BINS=power_of_two(experts + 1, least=BINS_AT_LEAST),
                BLOCK=min(BLOCK, power_of_two(pairs, least=BLOCK_AT_LEAST)),
            )
    return Groups(tile_expert, tile_pairs)
