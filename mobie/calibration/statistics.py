"""Statistics of what flows into the weights of one block, gathered while the library's own block runs.

Linears are watched by forward hooks. Of the experts, the layer's inputs are kept once; the statistics of an expert are
computed from its rows when they are asked for (`lazy`), so that memory does not grow with the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from mobie.calibration.lazy import Cache, Lazy, LazyMap
from mobie.calibration.observer import BlockObserver, BlockShape, ExpertRows
from mobie.calibration.pooling import SAMPLE_ROWS, pool
from mobie.calibration.store import ActivationStore
from mobie.methods.base import BankStats, LinearStats, TokenWeighting


@dataclass(frozen=True)
class CalibrationPolicy:
    """What the statistics of a block are taken from.

    inputs:  "quantized_prefix": the blocks before it as they are stored; "full_precision": the original ones.
    experts: "routed": each expert sees the tokens routed to it; "all_experts": every expert sees every token.
    """

    inputs: Literal["quantized_prefix", "full_precision"] = "quantized_prefix"
    experts: Literal["routed", "all_experts"] = "routed"


class Accumulator:
    """Running sums over input rows that become a `LinearStats`."""

    def __init__(self, features: int, device: torch.device, rows_per_call: int = SAMPLE_ROWS) -> None:
        self.count = 0
        self._gram = torch.zeros(features, features, device=device)
        self._sum_abs = torch.zeros(features, device=device)
        self._sample = [torch.zeros(0, features, device=device)]
        self._rows_per_call = rows_per_call

    def add(self, x: Tensor, scores: Tensor | None = None) -> None:
        """Take rows `(tokens, features)`; with scores `(tokens,)` the Hessian is that of `√score · x`."""
        x = x.detach().float()
        self.count += len(x)
        counted = x if scores is None else x * scores.to(x.device).sqrt()[:, None]
        self._gram += counted.T @ counted
        self._sum_abs += x.abs().sum(0)
        room = SAMPLE_ROWS - sum(map(len, self._sample))
        if room > 0:
            self._sample.append(x[: min(self._rows_per_call, room)].clone())

    def finish(self) -> LinearStats:
        """The statistics so far; with no rows at all they are zero."""
        n = max(self.count, 1)
        return LinearStats(2 / n * self._gram, self.count, self._sum_abs / n, torch.cat(self._sample))


class SequenceMeans:
    """Mean input per calibration sequence, over all rows that belong to it."""

    def __init__(self, sequences: int, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(sequences, features, device=device)
        self._count = torch.zeros(sequences, device=device)

    def add(self, x: Tensor, sequence: Tensor) -> None:
        """Take rows `(rows, features)` and the sequence that each comes from."""
        sequence = sequence.to(x.device)
        self._sum.index_add_(0, sequence, x.detach().float())
        self._count.index_add_(0, sequence, torch.ones(len(sequence), device=x.device))

    def gram(self) -> Tensor:
        """`2/s · Σ_q m_q m_qᵀ` over the s sequences."""
        means = self._sum / self._count.clamp(min=1)[:, None]
        return 2 / len(means) * means.T @ means


class BlockStatistics(BlockObserver):
    """Input statistics of one block. What shares its input (query, key, value; gate, up) is watched once."""

    def __init__(self, shape: BlockShape, store: ActivationStore, cache: Cache, *, everyone: bool = False) -> None:
        """Args:
        store, cache: where the experts' inputs and statistics are kept.
        everyone: every expert is shown every token.
        """
        first = {next(iter(group)): group for group in shape.linear_groups}  # leader → its group
        rows = None if shape.experts is None else ExpertRows(shape.experts, store, "experts", everyone)
        super().__init__({leader: group[leader] for leader, group in first.items()}, rows)
        self._groups, self._cache = first, cache
        self._length = shape.length
        self._rows_per_call = max(1, SAMPLE_ROWS // shape.batches)
        width = {leader: module.weight.shape[1] for leader, module in self._watched.items()}
        self._device = shape.device
        self._linears = {name: Accumulator(n, self._device, self._rows_per_call) for name, n in width.items()}
        self._shared = shape.shared
        in_shared = width.keys() & shape.shared.linears if shape.shared is not None else set()
        self._weighted = {name: Accumulator(width[name], self._device, self._rows_per_call) for name in in_shared}
        self._shared_scores = torch.ones(0)  # of the running batch
        self._features = shape.input_features()
        width |= {name: self._features[name] for name in ("gate", "down") if self._features}
        self._means = {name: SequenceMeans(shape.sequences, n, self._device) for name, n in width.items()}
        self._counted: set[tuple[str, int]] = set()  # experts that are in the means already

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks; a shared expert's scores are known before its Linears run."""
        with super().watching():
            if self._shared is None:
                yield
                return
            handle = self._shared.module.register_forward_pre_hook(lambda _, args: self._score_shared(args[0]))
            try:
                yield
            finally:
                handle.remove()

    def _score_shared(self, rows: Tensor) -> None:
        assert self._shared is not None  # its hook has called
        self._shared_scores = self._shared.gate(rows).detach().float().sigmoid().flatten()

    def _linear_input(self, name: str, rows: Tensor) -> None:
        self._linears[name].add(rows)
        if name in self._weighted:
            self._weighted[name].add(rows, self._shared_scores)
        self._means[name].add(rows, torch.arange(self._offset, self._offset + len(rows)) // self._length)

    def linear_stats(self, weighting: TokenWeighting = "none") -> dict[str, LinearStats]:
        """Statistics of every Linear by name; "gate" weights a shared expert's tokens, where its gate is observed."""
        sums = self._linears | self._weighted if weighting == "gate" else self._linears
        stats: dict[str, LinearStats] = {}
        for leader, group in self._groups.items():
            shared = replace(sums[leader].finish(), mean_gram=self._means[leader].gram())
            stats |= dict.fromkeys(group, shared)
        return stats

    def bank_stats(self, weighting: TokenWeighting = "none") -> BankStats:
        """Per-expert statistics as gathered, and their sum over experts as the pooled ones; computed when asked for.

        With the weighting "gate" a token counts by its router score, what the library multiplies the expert's output
        by, in the Hessian; the other statistics and the number of tokens are those of "none".

        The block must have its weights as long as they are asked for.
        """
        assert self._rows is not None  # there are experts
        tokens = self._rows.tokens()
        experts = {name: Lazy(len(tokens), partial(self._cached, weighting, _watched(name))) for name in self._features}

        def pooled(name: str) -> LinearStats:
            return replace(pool(experts[name], tokens), mean_gram=self._means[name].gram())

        shared = LazyMap(["gate", "down"], pooled)
        by_name = LazyMap(list(experts), lambda name: shared[_watched(name)])
        return BankStats(experts, by_name, dict.fromkeys(experts, tokens))

    def expert_output(self, expert: int, weights: Mapping[str, Tensor], most: int | None = None) -> Tensor:
        """What an expert adds to the layer's output, its router's score included (`ExpertRows.output`)."""
        assert self._rows is not None  # there are experts
        return self._rows.output(expert, weights, most)

    def layer_output(self, function: Callable[[Tensor], Tensor], most: int | None = None) -> Tensor:
        """What a function makes of the rows that the experts' layer is given (`ExpertRows.through`)."""
        assert self._rows is not None  # there are experts
        return self._rows.through(function, most)

    def _cached(self, weighting: TokenWeighting, projection: str, expert: int) -> LinearStats:
        return self._cache.get((weighting, projection, expert), lambda: self._of(weighting, projection, expert))

    def _of(self, weighting: TokenWeighting, projection: str, expert: int) -> LinearStats:
        assert self._rows is not None
        sums = Accumulator(self._features[projection], self._device, self._rows_per_call)
        scores = self._rows.scores_of(expert) if weighting == "gate" else repeat(None)
        for (x, token), score in zip(self._rows.of(projection, expert), scores, strict=False):
            sums.add(x, score)
            if (projection, expert) not in self._counted:
                self._means[projection].add(x, token // self._length)
        self._counted.add((projection, expert))
        return sums.finish()

    def drop(self) -> None:
        """Forget what was kept."""
        self._cache.clear()
        if self._rows is not None:
            self._rows.drop()


def _watched(projection: str) -> str:
    """The projection whose input is looked at: up has the gate's."""
    return "gate" if projection == "up" else projection


def blend_with_pool(
    stats: BankStats, pooled_guided: Mapping[str, Tensor] | None = None
) -> tuple[BankStats, dict[str, list[int]]]:
    """Policy `routed`: an expert with fewer than `2·in` tokens borrows from the layer's pooled statistics.

    With n tokens of its own, its statistics become `t·own + (1 - t)·pooled`, `t = n / (2·in)`. Returns the statistics,
    blended when they are asked for, and, per projection, the experts that borrow.

    pooled_guided: projection → guided Hessians over all tokens of the layer, where the pooled statistics have none.
    """
    blended: dict[str, Lazy[LinearStats]] = {}
    borrowed: dict[str, list[int]] = {}
    for name, experts in stats.experts.items():
        tokens = stats.tokens[name]
        enough = 2 * len(experts[0].mean_abs)
        borrowed[name] = [i for i, n in enumerate(tokens) if n < enough]

        def item(i: int, name: str = name, enough: int = enough) -> LinearStats:
            own = stats.experts[name][i]
            if own.tokens >= enough:
                return own
            pooled = stats.pooled[name]
            guided = pooled.guided if pooled_guided is None else pooled_guided[name]
            return _blend(own, pooled, guided, own.tokens / enough)

        blended[name] = Lazy(len(experts), item)
    return BankStats(blended, stats.pooled, stats.tokens), borrowed


def _blend(own: LinearStats, pooled: LinearStats, pooled_guided: Tensor | None, t: float) -> LinearStats:
    guided = None if own.guided is None or pooled_guided is None else t * own.guided + (1 - t) * pooled_guided
    return LinearStats(
        t * own.hessian + (1 - t) * pooled.hessian,
        own.tokens,
        t * own.mean_abs + (1 - t) * pooled.mean_abs,
        torch.cat([own.sample, pooled.sample])[:SAMPLE_ROWS],
        guided,
    )
