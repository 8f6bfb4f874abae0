"""Expert-balanced self-sampling: a model writes calibration text by a beam search that also likes balanced experts.

Hu et al., "MoEQuant", arXiv 2505.03804, section 4.2:

    score(S‖v) = -1/(l+1) · (R_S + log P(v | S)) + σ(S) / τ      (eq. 13; less is better)
    R_S        = Σ log P(S_i | S_<i)                             (eq. 11; 0 for the first token, which nothing precedes)

At each step every beam S of l tokens is continued by every token v, and the w best of all S‖v are kept (eq. 14). σ is
that of S, whose tokens have passed the model; it does not know of v (the paper's "deferred" imbalance), so within a
beam only the w likeliest tokens can win, and no more are looked at. The winner is the best S‖v of the last step.

Sequences come in batches. A batch depends on nothing but its first tokens (and, where the imbalance is the set's, on
the batches before it), and is kept on disk until the set is whole: a run that was killed goes on with the next batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobie.calibration.tokens import generator
from mobie.calibration.usage import RouteWatch, expert_imbalance
from mobie.data.self_sampled import SelfSampling
from mobie.errors import ConfigError
from mobie.models.base import Adapter
from mobie.sealed import load_sealed, save_sealed

DEAD = float("-inf")  # log-probability of a beam that is not there yet


@dataclass(frozen=True)
class Vocabulary:
    """What a model may write.

    size:     tokens that it gives a probability.
    ordinary: tokens that may begin a sequence: known to the tokenizer and not special.
    ends:     end-of-text tokens.
    """

    size: int
    ordinary: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a causal language model and its tokenizer."""
        size = model.config.vocab_size
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        known = {token for token in tokenizer.get_vocab().values() if token < size}
        generation = getattr(model, "generation_config", None)
        ends = [] if generation is None or generation.eos_token_id is None else generation.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        return cls(size, tuple(sorted(known - special)), tuple(sorted(end for end in ends if end < size)))

    def banned(self, settings: SelfSampling) -> Tensor:
        """Tokens that are never written, `(size,)` bool."""
        banned = torch.ones(self.size, dtype=torch.bool)
        banned[list(self.ordinary + (self.ends if settings.ends == "kept" else ()))] = False
        return banned


@dataclass(frozen=True)
class Beginnings:
    """How the sequences of a set begin.

    first:   `(sequences,)` the first token of each.
    lengths: `(sequences,)` tokens of the greedy beginning, the first one included.
    """

    first: Tensor
    lengths: Tensor


def beginnings(vocabulary: Vocabulary, sequences: int, settings: SelfSampling, seed: int) -> Beginnings:
    """Draw a first token, another for each sequence, and the length of each greedy beginning.

    Raises:
        ConfigError: no sequence is asked for, or there are fewer ordinary tokens than sequences.
    """
    if sequences < 1:
        raise ConfigError(f"got {sequences} self-sampled sequences, expected at least 1")
    known = torch.tensor(vocabulary.ordinary, dtype=torch.int64)
    if len(known) < sequences:
        raise ConfigError(
            f"{sequences} self-sampled sequences need as many first tokens, and the vocabulary has {len(known)} that "
            f"are not special; use {len(known)} sequences or fewer"
        )
    draw = generator(seed, "self-sampling")
    first = known[torch.randperm(len(known), generator=draw)[:sequences]]
    shortest, longest = settings.prefix
    return Beginnings(first, torch.randint(shortest, longest + 1, (sequences,), generator=draw))


class Search:
    """The beams of one batch: B sequences, w beams each, L layers with E experts."""

    def __init__(self, first: Tensor, lengths: Tensor, banned: Tensor, length: int, settings: SelfSampling) -> None:
        """`first` and `lengths` `(B,)`, `banned` `(vocabulary,)`, all where the model takes its inputs."""
        batch, self._width = len(first), settings.beams
        self._settings, self._lengths, self._banned = settings, lengths, banned
        self.tokens = first.new_zeros(batch, self._width, length)  # (B, w, length)
        self.tokens[..., 0] = first[:, None]
        self.likelihood = torch.full((batch, self._width), DEAD, dtype=torch.float64, device=first.device)  # R, (B, w)
        self.likelihood[:, 0] = 0.0  # all beams of a sequence begin alike: the first stands for all
        self.written = 1

    def last(self) -> Tensor:
        """Token ids `(B·w, 1)` that the model sees next."""
        return self.tokens[..., self.written - 1].reshape(-1, 1)

    def extend(self, logits: Tensor, imbalance: Tensor) -> Tensor:
        """Write the next token of every beam (eqs. 13 and 14).

        Args:
            logits: `(B·w, vocabulary)` behind the latest token.
            imbalance: σ `(B·w,)` of every beam so far.

        Returns:
            `(B·w,)`, the row that every new beam comes from.
        """
        batch, width = self.likelihood.shape
        log_p = logits.float().log_softmax(dim=-1).masked_fill(self._banned, DEAD)
        best, token = log_p.topk(min(width, log_p.shape[-1]), dim=-1)  # (B·w, candidates)
        total = (self.likelihood.flatten()[:, None] + best.double()).view(batch, -1)  # R of S‖v, (B, w · candidates)
        total[(self.written < self._lengths)[:, None] & (torch.arange(total.shape[1], device=total.device) > 0)] = DEAD
        score = -total / (self.written + 1)
        if self._settings.tau is not None:
            score = score + (imbalance / self._settings.tau).repeat_interleave(best.shape[1]).view(batch, -1)
        kept = score.topk(width, dim=-1, largest=False).indices  # (B, w), the best first
        parent = kept // best.shape[1]
        self.likelihood = total.gather(1, kept)
        self.tokens = self.tokens.gather(1, parent[..., None].expand_as(self.tokens))
        self.tokens[..., self.written] = token.view(batch, -1).gather(1, kept)
        self.written += 1
        return (parent + width * torch.arange(batch, device=parent.device)[:, None]).flatten()


@torch.inference_mode()
def write_batch(
    model: Any,
    watch: RouteWatch,
    search: Search,
    settings: SelfSampling,
    *,
    before: tuple[Tensor, int] | None,
    step: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Run a search to its end; `step` is called after each token.

    Args:
        before: uses `(layers, experts)` by the set so far and its number of tokens, where the imbalance is the set's.

    Returns:
        The best sequences `(B, length)` int64, and the uses `(layers, experts)` by their tokens but the last, which no
        pass has seen; both on the CPU.
    """
    from transformers import DynamicCache

    batch, width, length = search.tokens.shape
    device = search.tokens.device
    cache = DynamicCache(config=model.config)
    uses = torch.zeros(len(watch.layers), batch * width, watch.experts, dtype=torch.int64, device=device)
    earlier, others = (0, 0) if before is None else (before[0].to(device)[:, None], before[1])
    with watch.watching():
        while search.written < length:
            logits = model(input_ids=search.last(), past_key_values=cache, use_cache=True).logits[:, -1]
            uses += watch.uses_by_row(device)
            sigma = expert_imbalance(uses + earlier, search.written + others, settings.frequency)
            parents = search.extend(logits.to(device), sigma)
            uses = uses[:, parents]
            if search.written < length:
                cache.reorder_cache(parents)
            step()
    best = uses.view(len(watch.layers), batch, width, -1)[:, :, 0].sum(dim=1)
    return search.tokens[:, 0].cpu(), best.cpu()


class Batches:
    """Finished batches in a folder, sealed with a digest of everything that decides them."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def load(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Tokens and uses of a finished batch; None where it is missing, damaged or another job's."""
        try:
            (tokens, origin), (uses, _) = (load_sealed(self._path(index), name) for name in ("tokens", "uses"))
        except (OSError, ValueError):
            return None
        return (tokens, uses) if origin == {"fingerprint": self._fingerprint, "batch": index} else None

    def save(self, index: int, tokens: Tensor, uses: Tensor) -> None:
        """Keep a batch. Raises `StorageError`."""
        origin = {"fingerprint": self._fingerprint, "batch": index}
        save_sealed(self._path(index), {"tokens": tokens, "uses": uses}, origin)


def self_sample(
    model: Any,
    adapter: Adapter,
    vocabulary: Vocabulary,
    begin: Beginnings,
    length: int,
    settings: SelfSampling,
    batches: Batches,
    *,
    progress: bool = False,
) -> Tensor:
    """Let a model write its calibration set: `(sequences, length)` int64.

    Args:
        model: the library's causal language model, in evaluation mode.
        batches: where finished batches are kept, and found by a later run.
        progress: show a bar with the tokens written.

    Raises:
        ConfigError: sequences of less than one token, or longer than the model's context.
        UnsupportedError: a model without experts.
        StorageError: a batch cannot be kept.
    """
    from tqdm import tqdm

    context = getattr(model.config, "max_position_embeddings", None)
    if length < 1 or (context is not None and length > context):
        raise ConfigError(f"self-sampled sequences of {length} tokens, expected 1 to {context}, the model's context")
    watch, device = RouteWatch(adapter, model), model.device
    banned = vocabulary.banned(settings).to(device)
    uses, seen = torch.zeros(len(watch.layers), watch.experts, dtype=torch.int64), 0
    found = []
    batch = settings.batch(length)
    parts = zip(begin.first.split(batch), begin.lengths.split(batch), strict=True)
    steps = len(begin.first) * (length - 1)
    with tqdm(total=steps, desc="self-sampling", unit="token", disable=not progress) as bar:
        for index, (first, lengths) in enumerate(parts):
            part = batches.load(index)
            if part is None:
                search = Search(first.to(device), lengths.to(device), banned, length, settings)
                before = (uses, seen) if settings.scope == "set" else None
                part = write_batch(model, watch, search, settings, before=before, step=partial(bar.update, len(first)))
                batches.save(index, *part)
            else:
                bar.update(len(first) * (length - 1))
            found.append(part[0])
            uses, seen = uses + part[1], seen + len(first) * (length - 1)
    return torch.cat(found)
