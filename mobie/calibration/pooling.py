"""Statistics of several experts, gradients of several channels, in one. Needs torch alone: `try` starts fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobie.methods.base import LinearStats

SAMPLE_ROWS = 512


def pool(stats: Sequence[LinearStats], tokens: Sequence[int] | None = None) -> LinearStats:
    """Statistics over the union of the rows of several experts (a token counts once per expert it goes to).

    tokens: of each expert, where `stats` are computed when they are asked for; each is asked for once.
    """
    tokens = [s.tokens for s in stats] if tokens is None else tokens
    total = max(1, sum(tokens))
    per_expert = max(1, SAMPLE_ROWS // len(stats))
    hessian: Tensor | float = 0.0
    mean_abs: Tensor | float = 0.0
    samples = []
    for own, count in zip(stats, tokens, strict=True):
        hessian = hessian + own.hessian * (count / total)
        mean_abs = mean_abs + own.mean_abs * (count / total)
        samples.append(own.sample[:per_expert])
    return LinearStats(torch.as_tensor(hessian), sum(tokens), torch.as_tensor(mean_abs), torch.cat(samples))


def pool_channels(gradient: Tensor, groups: int) -> Tensor:
    """Mean square over `groups` contiguous channel groups: `(rows, channels)` → `(rows, groups)`.

    Groups differ by at most one channel where `channels` is no multiple of `groups`.
    """
    parts = gradient.float().square().tensor_split(groups, dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1)
