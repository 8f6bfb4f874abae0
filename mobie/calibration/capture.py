"""Statistics of what flows into the weights of one block, gathered while the library's own block runs.

Linears are watched by forward hooks. Experts are fused, so their inputs never pass a module boundary: an experts
function registered with transformers (`ALL_EXPERTS_FUNCTIONS`) computes the library's eager loop and reports the routed
tokens on the way. It is also where the loss gradients at the experts' outputs are seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mobie.calibration.pooling import SAMPLE_ROWS, pool
from mobie.methods.base import BankStats, LinearStats
from mobie.models.experts import expert_count, expert_inputs, join_outputs, project, split_outputs

EXPERTS_FUNCTION = "mobie_observed"


@dataclass(frozen=True)
class CalibrationPolicy:
    """What the statistics of a block are taken from.

    inputs:  "quantized_prefix": the blocks before it as they are stored; "full_precision": the original ones.
    experts: "routed": each expert sees the tokens routed to it; "all_experts": every expert sees every token.
    """

    inputs: Literal["quantized_prefix", "full_precision"] = "quantized_prefix"
    experts: Literal["routed", "all_experts"] = "routed"


class ExpertsObserver(Protocol):
    """What the observed experts function tells: inputs and outputs of one expert's projections, and whose they are.

    With `sees_all_tokens`, an expert is shown every token (its slot is -1 where it was not chosen); what the layer
    computes stays the same.
    """

    sees_all_tokens: bool

    def inputs(self, projection: str, expert: int, x: Tensor, token: Tensor, slot: Tensor) -> None: ...

    def outputs(self, projection: str, expert: int, z: Tensor, token: Tensor, slot: Tensor) -> None: ...


def observed_experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of one layer, expert by expert, as the library's eager function, reporting to `module.mobie_observer`.

    hidden `(tokens, hidden)`, top_k_index and top_k_weights `(tokens, k)` → `(tokens, hidden)`.
    """
    observer: ExpertsObserver = module.mobie_observer
    result = torch.zeros_like(hidden)
    for expert in range(expert_count(module)):
        slot, token = torch.where((top_k_index == expert).T)  # the library's order: rounding may depend on it
        if observer.sees_all_tokens:
            _show_all_tokens(module, hidden, expert, token, slot)
        if not len(token):
            continue
        x = hidden[token]
        gate, up = split_outputs(module, project(module, "gate_up_proj", expert, x))
        inner = module._apply_gate(join_outputs(module, gate, up))  # joined again so that both halves see gradients
        z = project(module, "down_proj", expert, inner)
        for projection, source, output in (("gate", x, gate), ("up", x, up), ("down", inner, z)):
            if not observer.sees_all_tokens:
                observer.inputs(projection, expert, source, token, slot)
            observer.outputs(projection, expert, output, token, slot)
        result.index_add_(0, token, (z * top_k_weights[token, slot, None]).to(result.dtype))
    return result


def _show_all_tokens(module: nn.Module, hidden: Tensor, expert: int, token: Tensor, slot: Tensor) -> None:
    everyone = torch.arange(len(hidden))
    slots = torch.full_like(everyone, -1).scatter(0, token, slot)
    inner = module._apply_gate(project(module, "gate_up_proj", expert, hidden))
    for projection, source in (("gate", hidden), ("up", hidden), ("down", inner)):
        module.mobie_observer.inputs(projection, expert, source, everyone, slots)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, observed_experts_forward)


@contextmanager
def observe_experts(observers: Mapping[nn.Module, ExpertsObserver], config: Any) -> Iterator[None]:
    """Route the experts modules in `observers` through the observed function while the context lasts."""
    before = config._experts_implementation
    config._experts_implementation = EXPERTS_FUNCTION
    for module, observer in observers.items():
        module.mobie_observer = observer
    try:
        yield
    finally:
        config._experts_implementation = before
        for module in observers:
            del module.mobie_observer


class Accumulator:
    """Running sums over input rows that become a `LinearStats`."""

    def __init__(self, features: int, rows_per_call: int = SAMPLE_ROWS) -> None:
        self.count = 0
        self._gram = torch.zeros(features, features)
        self._sum_abs = torch.zeros(features)
        self._sample = [torch.zeros(0, features)]
        self._rows_per_call = rows_per_call

    def add(self, x: Tensor) -> None:
        """Take rows `(tokens, features)`."""
        x = x.detach().float()
        self.count += len(x)
        self._gram += x.T @ x
        self._sum_abs += x.abs().sum(0)
        room = SAMPLE_ROWS - sum(map(len, self._sample))
        if room > 0:
            self._sample.append(x[: min(self._rows_per_call, room)].clone())

    def finish(self) -> LinearStats:
        """The statistics so far; with no rows at all they are zero."""
        n = max(self.count, 1)
        return LinearStats(2 / n * self._gram, self.count, self._sum_abs / n, torch.cat(self._sample))


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


class SequenceMeans:
    """Mean input per calibration sequence, over all rows that belong to it."""

    def __init__(self, sequences: int, features: int) -> None:
        self._sum = torch.zeros(sequences, features)
        self._count = torch.zeros(sequences)

    def add(self, x: Tensor, sequence: Tensor) -> None:
        """Take rows `(rows, features)` and the sequence that each comes from."""
        self._sum.index_add_(0, sequence, x.detach().float())
        self._count.index_add_(0, sequence, torch.ones(len(sequence)))

    def gram(self) -> Tensor:
        """`2/s · Σ_q m_q m_qᵀ` over the s sequences."""
        means = self._sum / self._count.clamp(min=1)[:, None]
        return 2 / len(means) * means.T @ means


@dataclass(frozen=True)
class BlockShape:
    """What an observer must know of a block and of the tokens that will pass it.

    linear_groups: modules with a `weight (out, in)`, by name, grouped by shared input.
    experts:       the fused experts module, or None in a dense block.
    sequences, length, batches: `sequences · length` calibration tokens come in so many batches.
    """

    linear_groups: Sequence[Mapping[str, nn.Module]]
    experts: nn.Module | None
    sequences: int
    length: int
    batches: int


class _BlockObserver:
    """Counts the tokens that have passed and hooks the Linears' inputs."""

    def __init__(self, watched: Mapping[str, nn.Module]) -> None:
        self._watched = watched
        self._offset = 0  # first token of the running batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks on the Linears."""
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, name=name: self._linear_input(name, args[0].flatten(0, -2))
            )
            for name, module in self._watched.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def next_batch(self, tokens: int) -> None:
        """Say that a batch of so many tokens has passed."""
        self._offset += tokens

    def _linear_input(self, name: str, rows: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} does not watch Linears")

    def outputs(self, projection: str, expert: int, z: Tensor, token: Tensor, slot: Tensor) -> None:
        pass  # only the gradient pass looks at outputs


class BlockStatistics(_BlockObserver):
    """Input statistics of one block. What shares its input (query, key, value; gate, up) is watched once."""

    def __init__(self, shape: BlockShape, sees_all_tokens: bool = False) -> None:
        first = {next(iter(group)): group for group in shape.linear_groups}  # leader → its group
        super().__init__({leader: group[leader] for leader, group in first.items()})
        self.sees_all_tokens = sees_all_tokens
        self._groups = first
        self._length = shape.length
        rows = max(1, SAMPLE_ROWS // shape.batches)
        width = {leader: module.weight.shape[1] for leader, module in self._watched.items()}
        self._linears = {leader: Accumulator(features, rows) for leader, features in width.items()}
        self._experts: dict[str, list[Accumulator]] = {}
        if shape.experts is not None:
            count, features = expert_count(shape.experts), expert_inputs(shape.experts)
            inputs = {name: features[name] for name in ("gate", "down")}
            self._experts = {name: [Accumulator(f, rows) for _ in range(count)] for name, f in inputs.items()}
            width |= inputs
        self._means = {name: SequenceMeans(shape.sequences, features) for name, features in width.items()}

    def _linear_input(self, name: str, rows: Tensor) -> None:
        self._linears[name].add(rows)
        self._means[name].add(rows, torch.arange(self._offset, self._offset + len(rows)) // self._length)

    def inputs(self, projection: str, expert: int, x: Tensor, token: Tensor, slot: Tensor) -> None:
        if projection == "up":
            return  # the gate's input
        self._experts[projection][expert].add(x)
        self._means[projection].add(x, (token + self._offset) // self._length)

    def linear_stats(self) -> dict[str, LinearStats]:
        """Statistics of every Linear by name."""
        stats: dict[str, LinearStats] = {}
        for leader, group in self._groups.items():
            shared = replace(self._linears[leader].finish(), mean_gram=self._means[leader].gram())
            stats |= dict.fromkeys(group, shared)
        return stats

    def bank_stats(self) -> BankStats:
        """Per-expert statistics as gathered, and their sum over experts as the pooled ones."""
        experts = {name: [a.finish() for a in accumulators] for name, accumulators in self._experts.items()}
        pooled = {name: replace(pool(stats), mean_gram=self._means[name].gram()) for name, stats in experts.items()}
        return BankStats(experts | {"up": experts["gate"]}, pooled | {"up": pooled["gate"]})


@dataclass(frozen=True)
class Guided:
    """Guided Hessians of one block (eq. 8).

    linears:     name → `(groups, in, in)`, `2/n · Σ_t w_tg x_t x_tᵀ`.
    experts:     projection → `(experts, groups, in, in)`, each over the tokens of its expert.
    pooled:      projection → `(groups, in, in)`, over the tokens of all experts; a token counts once per expert.
    unmatched:   (token, expert) pairs that the gradient pass did not route.
    cpu_seconds: what it took to compute them.
    """

    linears: Mapping[str, Tensor]
    experts: Mapping[str, Tensor]
    pooled: Mapping[str, Tensor]
    unmatched: int
    cpu_seconds: float = 0.0


class GuidedHessians(_BlockObserver):
    """Hessians weighted by squared loss gradients (eq. 8), one per Linear or (projection, expert), and channel group.

    The block must see the calibration tokens in the order of the gradient pass. A (token, expert) pair that the
    gradient pass did not route gets weight zero and is counted in `unmatched`.
    """

    sees_all_tokens = False

    def __init__(self, shape: BlockShape, weights: TokenWeights) -> None:
        super().__init__({name: module for group in shape.linear_groups for name, module in group.items()})
        self.unmatched = 0
        self._weights = weights
        self._tokens = shape.sequences * shape.length
        groups = next(iter(weights.linears.values())).shape[-1]
        self._linears = {
            name: torch.zeros(groups, module.weight.shape[1], module.weight.shape[1])
            for name, module in self._watched.items()
        }
        self._experts: dict[str, Tensor] = {}
        self._counts: Tensor | None = None
        if shape.experts is not None:
            count = expert_count(shape.experts)
            for name, features in expert_inputs(shape.experts).items():
                self._experts[name] = torch.zeros(count, groups, features, features)
            self._counts = torch.zeros(count)

    def _linear_input(self, name: str, rows: Tensor) -> None:
        token_weights = self._weights.linears[name][self._offset : self._offset + len(rows)]
        _add_weighted(self._linears[name], rows, token_weights)

    def inputs(self, projection: str, expert: int, x: Tensor, token: Tensor, slot: Tensor) -> None:
        assert self._weights.top_k_index is not None and self._counts is not None  # there are experts
        routed = self._weights.top_k_index[token + self._offset] == expert  # (rows, k)
        token_weights = (self._weights.experts[projection][token + self._offset] * routed[..., None]).sum(1)
        _add_weighted(self._experts[projection][expert], x, token_weights)
        if projection == "gate":
            self.unmatched += int((~routed.any(1)).sum())
            self._counts[expert] += len(token)

    def result(self) -> Guided:
        """The Hessians so far."""
        linears = {name: 2 / self._tokens * gram for name, gram in self._linears.items()}
        if self._counts is None:
            return Guided(linears, {}, {}, self.unmatched)
        count = self._counts.clamp(min=1)[:, None, None, None]
        experts = {name: 2 / count * gram for name, gram in self._experts.items()}
        pooled = {name: 2 / self._counts.sum() * gram.sum(0) for name, gram in self._experts.items()}
        return Guided(linears, experts, pooled, self.unmatched)


def _add_weighted(grams: Tensor, x: Tensor, token_weights: Tensor) -> None:
    """`grams[g] += Σ_t w_tg x_t x_tᵀ` for `x (rows, in)` and weights `(rows, groups)`."""
    x = x.detach().float()
    for gram, w in zip(grams, token_weights.T, strict=True):
        gram += (x * w[:, None]).T @ x


def blend_with_pool(stats: BankStats) -> tuple[BankStats, dict[str, list[int]]]:
    """Policy `routed`: an expert with fewer than `2·in` tokens borrows from the layer's pooled statistics.

    With n tokens of its own, its statistics become `t·own + (1 - t)·pooled`, `t = n / (2·in)`. Returns the statistics
    and, per projection, the experts that borrowed.
    """
    blended: dict[str, list[LinearStats]] = {}
    borrowed: dict[str, list[int]] = {}
    for name, experts in stats.experts.items():
        pooled = stats.pooled[name]
        enough = 2 * len(pooled.hessian)
        borrowed[name] = [i for i, s in enumerate(experts) if s.tokens < enough]
        blended[name] = [_blend(s, pooled, s.tokens / enough) if s.tokens < enough else s for s in experts]
    return BankStats(blended, stats.pooled), borrowed


def _blend(own: LinearStats, pooled: LinearStats, t: float) -> LinearStats:
    guided = None if own.guided is None or pooled.guided is None else t * own.guided + (1 - t) * pooled.guided
    return LinearStats(
        t * own.hessian + (1 - t) * pooled.hessian,
        own.tokens,
        t * own.mean_abs + (1 - t) * pooled.mean_abs,
        torch.cat([own.sample, pooled.sample])[:SAMPLE_ROWS],
        guided,
    )
