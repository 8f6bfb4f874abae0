"""Statistics of several experts, gradients of several channels, in one. Needs torch alone: `try` starts fast."""

from __future__ import annotations

import torch
from torch import Tensor

from mobie.methods.base import LinearStats

SAMPLE_ROWS = 512


def pool(stats: list[LinearStats]) -> LinearStats:
    """Statistics over the union of the rows of several experts (a token counts once per expert it goes to)."""
    total = max(1, sum(s.tokens for s in stats))

    def mean(values: list[Tensor]) -> Tensor:
        return sum(v * (s.tokens / total) for v, s in zip(values, stats, strict=True))

    per_expert = max(1, SAMPLE_ROWS // len(stats))
    return LinearStats(
        mean([s.hessian for s in stats]),
        sum(s.tokens for s in stats),
        mean([s.mean_abs for s in stats]),
        torch.cat([s.sample[:per_expert] for s in stats]),
    )


def pool_channels(gradient: Tensor, groups: int) -> Tensor:
    """Mean square over `groups` contiguous channel groups: `(rows, channels)` → `(rows, groups)`.

    Groups differ by at most one channel where `channels` is no multiple of `groups`.
    """
    parts = gradient.float().square().tensor_split(groups, dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1)
