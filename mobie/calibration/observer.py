"""What watches one block while it runs: hooks on its Linears, and on its experts, whose inputs are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mobie.calibration.store import ActivationStore
from mobie.models.experts import SharedExpert, expert_count, expert_inputs, expert_output, project


@dataclass(frozen=True)
class BlockShape:
    """What an observer must know of a block and of the tokens that will pass it.

    linear_groups: modules with a `weight (out, in)`, by name, grouped by shared input.
    experts:       the fused experts module, or None in a dense block.
    sequences, length, batches: `sequences · length` calibration tokens come in so many batches.
    shared:        the shared expert with a gate, where the block has one and its score is wanted.
    """

    linear_groups: Sequence[Mapping[str, nn.Module]]
    experts: nn.Module | None
    sequences: int
    length: int
    batches: int
    shared: SharedExpert | None = None

    def input_features(self) -> dict[str, int]:
        """Input features of the experts' projections; empty in a dense block."""
        return {} if self.experts is None else expert_inputs(self.experts)

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return next(iter(self.linear_groups[0].values())).weight.device


@dataclass
class ExpertRows:
    """What the experts of a layer are given, kept once: an expert's share of it is gathered when it is asked for.

    everyone: every expert is shown every token, not only those that are routed to it.
    """

    module: nn.Module
    store: ActivationStore
    name: str
    everyone: bool = False
    routes: list[Tensor] = field(default_factory=list)  # per batch `(tokens, k)`, the expert of each slot
    scores: list[Tensor] = field(default_factory=list)  # per batch `(tokens, k)`, by which its output is multiplied

    def add(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Take the rows `(tokens, hidden)` of a batch, the experts they go to, and the router's scores of these."""
        self.store.put(self._key(len(self.routes)), hidden)
        self.routes.append(top_k_index.cpu())
        self.scores.append(top_k_weights.detach().cpu())

    def _key(self, batch: int) -> str:
        return f"{self.name}-{batch:05d}"

    def tokens(self) -> list[int]:
        """How many tokens each expert is shown."""
        count = expert_count(self.module)
        if self.everyone:
            return [sum(map(len, self.routes))] * count
        return [sum(int((route == expert).sum()) for route in self.routes) for expert in range(count)]

    def of(self, projection: str, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs `(rows, in)` of one projection of an expert and the tokens they belong to, batch by batch."""
        offset = 0
        for batch, route in enumerate(self.routes):
            token = torch.arange(len(route)) if self.everyone else self._slots(batch, expert)[1]
            if len(token):
                x = self.store.get(self._key(batch))[token].to(self.module.down_proj.device)
                yield self._input(projection, expert, x), token + offset
            offset += len(route)

    def scores_of(self, expert: int) -> Iterator[Tensor]:
        """The router's scores `(rows,)` of the tokens that `of` gives, batch by batch; not for `everyone`."""
        assert not self.everyone  # an expert has no score for tokens that are not routed to it
        for batch, scores in enumerate(self.scores):
            slot, token = self._slots(batch, expert)
            if len(token):
                yield scores[token, slot].float()

    def _slots(self, batch: int, expert: int) -> tuple[Tensor, ...]:
        """Slots of a batch that go to an expert, and their tokens; slots before tokens: the library's order."""
        return torch.where((self.routes[batch] == expert).T)

    @torch.no_grad()
    def output(self, expert: int, weights: Mapping[str, Tensor], most: int | None = None) -> Tensor:
        """What an expert adds to the layer's output, `(rows, hidden)` float32, over the tokens routed to it.

        `weights` `(out, in)` by projection take the place of its own. Of more than `most` tokens, so many are taken,
        at even distances.
        """
        device = self.module.down_proj.device
        parts = [torch.zeros(0, expert_inputs(self.module)["gate"], device=device)]
        chosen = [self._slots(batch, expert) for batch in range(len(self.routes))]
        taken = _evenly(sum(len(token) for _, token in chosen), most).split([len(token) for _, token in chosen])
        for batch, ((slot, token), here) in enumerate(zip(chosen, taken, strict=True)):
            slot, token = slot[here], token[here]
            if len(token):
                x = self.store.get(self._key(batch))[token].to(device)
                score = self.scores[batch][token, slot, None].to(device).float()
                parts.append(score * expert_output(self.module, expert, x.float(), weights))
        return torch.cat(parts)

    @torch.no_grad()
    def through(self, function: Callable[[Tensor], Tensor], most: int | None = None) -> Tensor:
        """What `function` makes of the layer's rows `(rows, hidden)` in float32; of at most `most`, as in `output`."""
        counts = [len(route) for route in self.routes]
        parts = []
        for batch, here in enumerate(_evenly(sum(counts), most).split(counts)):
            x = self.store.get(self._key(batch))[here].to(self.module.down_proj.device)
            parts.append(function(x.float()))
        return torch.cat(parts)

    @torch.no_grad()
    def _input(self, projection: str, expert: int, x: Tensor) -> Tensor:
        if projection != "down":
            return x
        return self.module._apply_gate(project(self.module, "gate_up_proj", expert, x))

    def drop(self) -> None:
        """Forget the rows."""
        for batch in range(len(self.routes)):
            self.store.drop(self._key(batch))


def _evenly(count: int, most: int | None) -> Tensor:
    """Which of `count` rows to take, `(count,)` bool: all, or `most` at even distances."""
    if most is None or count <= most:
        return torch.ones(count, dtype=torch.bool)
    taken = torch.zeros(count, dtype=torch.bool)
    taken[torch.arange(most) * count // most] = True
    return taken


class BlockObserver:
    """Counts the tokens that have passed, and hooks the inputs of Linears and experts."""

    def __init__(self, watched: Mapping[str, nn.Module], rows: ExpertRows | None) -> None:
        self._watched, self._rows = watched, rows
        self._offset = 0  # first token of the running batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks."""
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, name=name: self._linear_input(name, args[0].flatten(0, -2))
            )
            for name, module in self._watched.items()
        ]
        if self._rows is not None:
            rows = self._rows
            handles.append(rows.module.register_forward_pre_hook(lambda _, args: rows.add(*args[:3])))
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
