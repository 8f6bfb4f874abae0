"""Hessians weighted by squared loss gradients (eq. 8), from the token weights that the gradient pass left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mobie.calibration.lazy import Cache, Lazy, LazyMap
from mobie.calibration.observer import BlockObserver, BlockShape, ExpertRows
from mobie.calibration.store import ActivationStore


@dataclass(frozen=True)
class TokenWeights:
    """Mean squared loss gradients per calibration token, from one pass over the full-precision model (eq. 8).

    linears: name → `(tokens, groups)`.
    experts: projection → `(tokens, k, groups)`, one row per (token, slot).
    top_k_index: `(tokens, k)`: which expert each slot went to.
    """

    linears: Mapping[str, Tensor]
    experts: Mapping[str, Tensor]
    top_k_index: Tensor | None


@dataclass(frozen=True)
class Guided:
    """Guided Hessians of one block (eq. 8).

    linears:     name → `(groups, in, in)`, `2/n · Σ_t w_tg x_t x_tᵀ`.
    experts:     projection → `(groups, in, in)` of each expert, over the tokens of that expert.
    pooled:      projection → `(groups, in, in)`, over the tokens of all experts; a token counts once per expert.
    unmatched:   (token, expert) pairs that the gradient pass did not route.
    cpu_seconds: what it took to compute them.
    """

    linears: Mapping[str, Tensor]
    experts: Mapping[str, Sequence[Tensor]]
    pooled: Mapping[str, Tensor]
    unmatched: int
    cpu_seconds: float = 0.0

    def whole(self) -> Guided:
        """With everything computed: `experts` as `(experts, groups, in, in)`."""
        experts = {name: torch.stack(list(sequence)) for name, sequence in self.experts.items()}
        return Guided(self.linears, experts, dict(self.pooled), self.unmatched, self.cpu_seconds)


class GuidedHessians(BlockObserver):
    """Guided Hessians, one per Linear or (projection, expert), and channel group; those of experts when asked for.

    The block must see the calibration tokens in the order of the gradient pass. A (token, expert) pair that the
    gradient pass did not route gets weight zero and is counted in `unmatched`.
    """

    def __init__(self, shape: BlockShape, weights: TokenWeights, store: ActivationStore, cache: Cache) -> None:
        rows = None if shape.experts is None else ExpertRows(shape.experts, store, "guided")
        super().__init__({name: module for group in shape.linear_groups for name, module in group.items()}, rows)
        self._weights, self._cache = weights, cache
        self._tokens = shape.sequences * shape.length
        self._groups = next(iter(weights.linears.values())).shape[-1]
        self._features = shape.input_features()
        self._device = shape.device
        self._linears = {name: self._zeros(module.weight.shape[1]) for name, module in self._watched.items()}

    def _zeros(self, features: int) -> Tensor:
        return torch.zeros(self._groups, features, features, device=self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of all guided Hessians of the block."""
        experts = 0 if self._rows is None else len(self._rows.tokens()) + 1  # and the pooled ones
        expert = sum(4 * self._groups * features**2 for features in self._features.values())
        return experts * expert + sum(tensor.nbytes for tensor in self._linears.values())

    def _linear_input(self, name: str, rows: Tensor) -> None:
        token_weights = self._weights.linears[name][self._offset : self._offset + len(rows)]
        _add_weighted(self._linears[name], rows, token_weights)

    def _gram(self, projection: str, expert: int) -> Tensor:
        """`Σ_t w_tg x_t x_tᵀ` of an expert."""
        assert self._rows is not None and self._weights.top_k_index is not None  # there are experts
        gram = self._zeros(self._features[projection])
        for x, token in self._rows.of(projection, expert):
            routed = self._weights.top_k_index[token] == expert  # (rows, k)
            _add_weighted(gram, x, (self._weights.experts[projection][token] * routed[..., None]).sum(1))
        return gram

    def _unmatched(self) -> int:
        assert self._rows is not None and self._weights.top_k_index is not None
        offset, pairs = 0, 0
        for route in self._rows.routes:
            known = self._weights.top_k_index[offset : offset + len(route)]
            pairs += int((route[:, :, None] != known[:, None, :]).all(2).sum())
            offset += len(route)
        return pairs

    def result(self) -> Guided:
        """The Hessians so far. The block must have its weights as long as those of experts are asked for."""
        linears = {name: 2 / self._tokens * gram for name, gram in self._linears.items()}
        if self._rows is None:
            return Guided(linears, {}, {}, 0)
        counts = self._rows.tokens()

        def own(projection: str, expert: int) -> Tensor:
            key = ("guided", projection, expert)
            return self._cache.get(key, lambda: 2 / max(counts[expert], 1) * self._gram(projection, expert))

        def pooled(projection: str) -> Tensor:
            total = self._zeros(self._features[projection])
            for expert, count in enumerate(counts):
                total += own(projection, expert) * (count / max(1, sum(counts)))
            return total

        experts = {name: Lazy(len(counts), partial(own, name)) for name in self._features}
        return Guided(linears, experts, LazyMap(list(experts), pooled), self._unmatched())

    def drop(self) -> None:
        """Forget what was kept."""
        self._cache.clear()
        if self._rows is not None:
            self._rows.drop()


def _add_weighted(grams: Tensor, x: Tensor, token_weights: Tensor) -> None:
    """`grams[g] += Σ_t w_tg x_t x_tᵀ` for `x (rows, in)` and weights `(rows, groups)`."""
    x = x.detach().float()
    for gram, w in zip(grams, token_weights.T.to(x.device), strict=True):
        gram += (x * w[:, None]).T @ x
