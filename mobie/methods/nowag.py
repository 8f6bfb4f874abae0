"""NoWag-VQ (Liu et al. 2025): normalized weights, cut into short vectors, on a codebook made by weighted k-means.

W: weights (out, in)   c: norm of each column (in,)   r: norm of each row of W / c (out,)   d: length of a vector

    W[i, j] = Q[i, j] · r_i · c_j        Q: vectors of a codebook of float16, d consecutive inputs of a row each

k-means weighs input j by its mean square, diag(H)_j; there is no error feedback. What the paper's text leaves open is
as in the released implementation, or an option: the released code runs up to 100 iterations over all vectors. Here
the codebook is trained on a sample of them by default, and then every vector is held against every centroid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from mobie.calibration.tokens import generator
from mobie.errors import ConfigError, DataError
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, map_experts, register
from mobie.methods.kmeans import draw, kmeans, nearest, seed_plus_plus, totals
from mobie.packing.base import Packed
from mobie.packing.binary import to_half
from mobie.packing.grid import split_groups
from mobie.packing.vector import VectorCodes

T = TypeVar("T")
Each = Callable[[Callable[[int, "Vectors"], Any]], list[Any]]

SMALLEST_NORM = 2.0**-24  # smallest positive float16
#: least weight of an input, as a share of the mean: a column that no token reached keeps its nearest vectors too
SMALLEST_WEIGHT = 1e-6
MAX_BITS = 16


def norms(values: Tensor, dim: int) -> Tensor:
    """L2 norms along a dimension, rounded to float16, as float32; 1 where all values are 0.

    Raises:
        DataError: values that are not finite.
    """
    found = torch.linalg.vector_norm(values, dim=dim)
    if not found.isfinite().all():
        raise DataError("nowag: the norms of a weight matrix are not finite; expected finite weights: check the model")
    return torch.where(found > 0, to_half(found).float().clamp(min=SMALLEST_NORM), 1.0)


def normalize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized weights `(out, in)`, norms of the columns `(in,)`, and of the rows after that `(out,)`."""
    column = norms(weight, dim=0)
    by_column = weight / column
    row = norms(by_column, dim=1)
    return by_column / row[:, None], column, row


def input_weights(mean_square: Tensor) -> Tensor:
    """How much each input `(in,)` matters: its mean square over the mean of all inputs; alike where all are 0."""
    mean = mean_square.mean()
    return torch.where(mean > 0, mean_square / mean, torch.ones_like(mean_square)).clamp(min=SMALLEST_WEIGHT)


@dataclass(frozen=True)
class Vectors:
    """A matrix as k-means sees it.

    values, weights: `(out · runs, d)`; columns that fill up the last vector of a row have the weight 0.
    column, row:     the norms, `(in,)` and `(out,)`.
    """

    values: Tensor
    weights: Tensor
    column: Tensor
    row: Tensor


@register
@dataclass(frozen=True)
class NoWag(Method):
    """NoWag-VQ. `paper_bits` counts codes, codebook and norms, as the paper does.

    dimension, codebook_bits: length of a vector; a codebook has up to `2^codebook_bits` of them.
    codebook:         one for each matrix, as published, or one for all experts of a projection.
    initialization:   of k-means: k-means++, or vectors drawn evenly.
    weighting:        `inputs`, as published: errors of normalized weights; `outputs`: the norms are multiplied in,
                      so that errors are those of the weights themselves.
    sample_vectors:   drawn evenly, from all experts alike: k-means begins with them; null is all vectors.
    sample_iterations, iterations: of k-means over the sample, then over all vectors.
    tolerance:        k-means ends sooner when an iteration lowers its error by no larger share.
    """

    name: ClassVar[str] = "nowag"
    seconds_per_weight: ClassVar[float] = 2.1e-6
    stored_bits: ClassVar[float] = 2.2

    dimension: int = 6
    codebook_bits: int = 12
    codebook: Literal["matrix", "bank"] = "matrix"
    initialization: Literal["kmeans++", "random"] = "kmeans++"
    weighting: Literal["inputs", "outputs"] = "inputs"
    sample_vectors: int | None = 65536
    sample_iterations: int = 4
    iterations: int = 1
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.codebook_bits <= MAX_BITS:
            raise ConfigError(f"nowag: codebook_bits is {self.codebook_bits}; expected 1 to {MAX_BITS} (12)")
        for option, least, usual in (("dimension", 1, 6), ("sample_iterations", 0, 4), ("iterations", 0, 1)):
            if getattr(self, option) < least:
                raise ConfigError(f"nowag: {option} is {getattr(self, option)}; expected {least} or more ({usual})")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"nowag: tolerance is {self.tolerance}; expected 0 or more and less than 1 (0.0001)")
        if self.sample_vectors is not None and self.sample_vectors < self.centroids:
            raise ConfigError(
                f"nowag: sample_vectors is {self.sample_vectors}; expected at least the {self.centroids} vectors of a "
                "codebook, or null for all vectors"
            )

    @property
    def centroids(self) -> int:
        """Most vectors that a codebook has."""
        return 1 << self.codebook_bits

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        parts = self._cut(weight, stats.hessian.diagonal())
        [(codes, column, row)], codebook = self._quantize(lambda function: [function(0, parts)], 1)
        return _pack(codes, codebook, column, row)

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> Mapping[str, Packed]:
        if self.codebook == "matrix":
            return super().quantize_experts(bank, stats)
        packed: dict[str, Packed] = {}
        for names in bank.same_input:
            mean_squares = self._mean_squares(bank, stats, names)
            packed |= {name: self._quantize_shared(bank, name, mean_squares) for name in names}
        return {name: packed[name] for name in bank.projections}

    def _mean_squares(self, bank: ExpertBank, stats: BankStats, names: Sequence[str]) -> list[Tensor]:
        """`diag H` `(in,)` of every expert for projections that share their input, on the CPU."""

        def diagonals(experts: range, device: torch.device) -> list[Tensor]:
            return [own.hessian.diagonal().clone().cpu() for own in stats.of(names[0], experts, device)]

        return map_experts(bank, self.expert_bytes([bank.projections[name].shape[1:] for name in names]), diagonals)

    def _quantize_shared(self, bank: ExpertBank, name: str, mean_squares: Sequence[Tensor]) -> Packed:
        """Quantize a projection of all experts on one codebook; experts are cut anew whenever they are needed."""
        weights = bank.projections[name]

        def each(function: Callable[[int, Vectors], T]) -> list[T]:
            def chunk(experts: range, device: torch.device) -> list[T]:
                return [function(e, self._cut(weights[e].to(device), mean_squares[e].to(device))) for e in experts]

            return map_experts(bank, self.expert_bytes([weights.shape[1:]]), chunk)

        found, codebook = self._quantize(each, len(weights))
        codes, column, row = (torch.stack(parts) for parts in zip(*found, strict=True))
        return _pack(codes, codebook, column, row)

    def _cut(self, weight: Tensor, mean_square: Tensor) -> Vectors:
        """Normalize a matrix `(out, in)` and cut it; `mean_square` `(in,)` of its inputs, up to a factor."""
        normalized, column, row = normalize(weight)
        weights = input_weights(mean_square).expand_as(weight)
        if self.weighting == "outputs":
            weights = weights * (row[:, None] * column).square()
            weights = weights / weights.mean()
        values, weights = (split_groups(part, self.dimension).flatten(0, 1) for part in (normalized, weights))
        return Vectors(values, weights, column, row)

    def _quantize(self, each: Each, count: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Codes `(out, runs)` and norms of all matrices, on the CPU, and their codebook, holding float16 values.

        Args:
            each: calls a function of the number and the vectors of a matrix for every matrix, and lists the results.
            count: number of matrices.
        """
        share = None if self.sample_vectors is None else -(-self.sample_vectors // count)

        def sample(number: int, parts: Vectors) -> tuple[Tensor, Tensor]:
            chosen = draw(parts.values, share or len(parts.values), generator(self.seed, f"nowag sample {number}"))
            return parts.values[chosen], parts.weights[chosen]

        def find(codebook: Tensor) -> tuple[float, Tensor]:
            found = each(lambda _, own: totals(own.values, own.weights, codebook.to(own.values.device)))
            return sum(error for error, _ in found), torch.stack([s.to(codebook.device) for _, s in found]).sum(dim=0)

        def encode(_: int, parts: Vectors) -> tuple[Tensor, Tensor, Tensor]:
            codes = nearest(parts.values, parts.weights, codebook.to(parts.values.device))
            return codes.view(len(parts.row), -1).to("cpu", torch.int32), parts.column.cpu(), parts.row.cpu()

        codebook = self._start(*zip(*each(sample), strict=True))
        codebook = to_half(kmeans(find, codebook, self.iterations, self.tolerance)).float()
        return each(encode), codebook.cpu()

    def _start(self, values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """A codebook `(at most centroids, d)` from samples alone; all their vectors where there are no more of them."""
        device = values[0].device
        vectors, own = (torch.cat([part.to(device) for part in parts]) for parts in (values, weights))
        if len(vectors) <= self.centroids:
            return vectors
        chance = generator(self.seed, "nowag codebook")  # the same for every codebook, whatever came before
        if self.initialization == "random":
            codebook = vectors[draw(vectors, self.centroids, chance)]
        else:
            codebook = seed_plus_plus(vectors, own, self.centroids, chance)
        return kmeans(partial(totals, vectors, own), codebook, self.sample_iterations, self.tolerance)


def _pack(codes: Tensor, codebook: Tensor, column: Tensor, row: Tensor) -> VectorCodes:
    """Store codes `(…, out, runs)` with the vectors of the codebook that are in use."""
    used, codes = codes.unique(return_inverse=True)
    return VectorCodes.pack(codes, codebook[used.long()], column, row)
