"""k-means of short vectors with a weight for every coordinate of every vector.

x: vectors (n, d)    w: their weights (n, d), not negative    c: centroids (k, d), the codebook    a: assignment (n,)

    minimise Σ_n Σ_i w_ni (x_ni - c_{a_n, i})²

by turns: a_n is the centroid with the least weighted distance; a centroid is the weighted mean, coordinate by
coordinate, of the vectors that it serves. Neither step raises the sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: distances that are worked on at a time; on a CPU they should stay in its cache
CHUNK_DISTANCES = {"cpu": 1 << 20, "cuda": 1 << 27}
#: centroids whose least distance is found in one vectorized reduction; an `argmin` over all of them is slower
LANE = 64
SEEDING_ROUNDS = 128


def _expanded(vectors: Tensor, weights: Tensor) -> Tensor:
    """`(n, 2d)`: times `_coefficients` of a codebook, the distances without `Σ_i w_i x_i²`."""
    return torch.cat([weights, weights * vectors], dim=1)


def _coefficients(codebook: Tensor) -> Tensor:
    """`(2d, k)`, so that the product is `Σ_i w_i c_i² - 2 w_i x_i c_i`."""
    return torch.cat([codebook.square(), -2 * codebook], dim=1).T.contiguous()


def nearest(vectors: Tensor, weights: Tensor, codebook: Tensor) -> Tensor:
    """Index `(n,)` of the centroid at the least weighted distance; every centroid is tried for every vector."""
    lanes = -(-len(codebook) // LANE)
    last = len(codebook) - 1  # repeated until the last lane is full
    filled = codebook[torch.arange(lanes * LANE, device=codebook.device).clamp(max=last)]
    rows, columns = _expanded(vectors, weights), _coefficients(filled)
    size = max(1, CHUNK_DISTANCES[codebook.device.type] // len(filled))
    memory, place = rows.new_empty(size, len(filled)), torch.arange(size, device=rows.device)
    found = []
    for part in rows.split(size):
        distances = torch.mm(part, columns, out=memory[: len(part)]).view(-1, lanes, LANE)
        lane = distances.amin(dim=2).argmin(dim=1)
        found.append(lane * LANE + distances[place[: len(part)], lane].argmin(dim=1))
    return torch.cat(found).clamp(max=last)


def totals(vectors: Tensor, weights: Tensor, codebook: Tensor) -> tuple[float, Tensor]:
    """The sum that is minimised, for the best assignment, and each centroid's `Σ w` and `Σ w x`, `(k, 2d)`."""
    assignment = nearest(vectors, weights, codebook)
    error = (weights * (vectors - codebook[assignment]).square()).sum(dtype=torch.float64)
    sums = codebook.new_zeros(len(codebook), 2 * codebook.shape[1])
    return float(error), sums.index_add_(0, assignment, _expanded(vectors, weights))


def means(sums: Tensor, codebook: Tensor) -> Tensor:
    """Centroids `(k, d)` at the weighted means of what they serve; a coordinate that no weight reaches stays."""
    weight, product = sums.chunk(2, dim=1)
    return torch.where(weight > 0, product / weight, codebook)


def kmeans(
    find: Callable[[Tensor], tuple[float, Tensor]], codebook: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Improve a codebook `(k, d)` until its error falls by no more than a share of it.

    Args:
        find: `totals` of the vectors for a codebook.
    """
    least = float("inf")
    for _ in range(iterations):
        error, sums = find(codebook)
        if error >= least * (1 - tolerance):
            break
        least = error
        codebook = means(sums, codebook)
    return codebook


def draw(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places of `count` vectors, drawn evenly without repetition, in order; all places where there are no more."""
    if count >= len(vectors):
        return torch.arange(len(vectors), device=vectors.device)
    return torch.randperm(len(vectors), generator=generator)[:count].sort().values.to(vectors.device)


def seed_plus_plus(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Start `(count, d)` of k-means++: vectors drawn with chances in proportion to their distance from those drawn.

    In 128 rounds of several draws each, distances being those at the start of a round; one draw each up to 128
    centroids, which is k-means++ itself (Arthur and Vassilvitskii 2007).
    """
    draws = -(-count // SEEDING_ROUNDS)
    rows = _expanded(vectors, weights).T.contiguous()
    constant = (weights * vectors.square()).sum(dim=1)

    def distance(centroids: Tensor) -> Tensor:
        return (_coefficients(centroids).T @ rows).amin(dim=0).add_(constant).clamp_(min=0)

    chosen = torch.randint(len(vectors), (1,), generator=generator).to(vectors.device)
    codebook = vectors[chosen]
    least = distance(codebook)
    while len(codebook) < count:
        least[chosen] = 0  # but for rounding it is so
        # the largest of distance / exponential variate are a draw without repetition
        luck = torch.empty(len(vectors)).exponential_(generator=generator).to(vectors.device)
        chosen = (least / luck).topk(min(draws, count - len(codebook))).indices
        least = torch.minimum(least, distance(vectors[chosen]))
        codebook = torch.cat([codebook, vectors[chosen]])
    return codebook
