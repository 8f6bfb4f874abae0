"""Tile sizes of the kernels: from the tuning table of the GPU where there is one, else the defaults below.

    rows      rows of the weights per program         tokens    tokens (or pairs) per program
    block_k   columns per step                        slices    pieces of a step that different warps multiply
    warps     of 32 threads                           stages    steps in flight

Few tokens make memory the limit. Then a program has few rows, so that every multiprocessor has one, and its warps
share a step's columns (`slices`) instead of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mobie.kernels.triton_ops.common import power_of_two

#: up to this many tokens a launch is of the decode kind
DECODE_TOKENS = 64
#: the tensor cores' narrowest second operand
LEAST_TOKENS = 8


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch; see the head of this file."""

    rows: int
    tokens: int
    block_k: int
    slices: int
    warps: int
    stages: int


#: operation → sizes for few and for many tokens
DEFAULTS: dict[str, tuple[Tile, Tile]] = {
    "route": (Tile(16, 16, 64, 4, 4, 3), Tile(16, 64, 64, 4, 4, 2)),
    "route-float32": (Tile(16, 16, 16, 4, 4, 2), Tile(16, 16, 16, 4, 4, 2)),
    "panel": (Tile(16, 16, 128, 4, 4, 3), Tile(64, 64, 64, 1, 4, 3)),
    "panel-int8": (Tile(16, 16, 128, 4, 4, 3), Tile(64, 64, 128, 1, 4, 3)),
    # a matrix of very many rows, as the head's: programs enough, so each may read x for more rows
    "panel-tall": (Tile(64, 16, 128, 4, 4, 2), Tile(64, 64, 64, 1, 4, 3)),
    "panel-tall-16bit": (Tile(32, 16, 128, 4, 4, 2), Tile(64, 64, 64, 1, 4, 3)),
    "dense_grouped": (Tile(64, 16, 128, 1, 4, 4), Tile(128, 64, 64, 1, 4, 3)),
    "binary_linear": (Tile(16, 16, 64, 4, 4, 2), Tile(64, 64, 64, 1, 4, 2)),
}


def tile_for(operation: str, tokens: int) -> Tile:
    """Sizes of an operation for a number of tokens.

    Args:
        operation: a key of `DEFAULTS`.
    """
    few, many = DEFAULTS[operation]
    if tokens > DECODE_TOKENS:
        return many
    return replace(few, tokens=min(few.tokens, max(LEAST_TOKENS, power_of_two(tokens))))
