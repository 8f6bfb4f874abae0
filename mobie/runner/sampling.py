"""Choosing the next token on the device: greedy, or by inverse distribution function from numbers drawn beforehand.

A captured step must not draw from a generator on the host. So the uniform numbers of a whole run are drawn first, one
per row and position, from a generator made of (seed, row); the step only looks one up. Equal seeds give equal runs on
every device, and a row's draws do not depend on the rows beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mobie.errors import ConfigError

#: keeps the draws apart from those of other generators with the same seed
PURPOSE = 4


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: divides the logits; 0 is greedy.
    top_p:       the smallest set of tokens whose probability reaches it is kept (nucleus sampling); 1 keeps all.
    seed:        of the draws; without effect when greedy.
    Raises ConfigError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature}, expected a number from 0 (greedy) upwards, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}, expected above 0 and at most 1 (1 keeps every token)")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}, expected 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def uniforms(seed: int, rows: int, draws: int) -> Tensor:
    """Uniform numbers strictly between 0 and 1, `(draws, rows)` float64; the first draws do not depend on `draws`."""
    columns = [np.random.default_rng([seed, row, PURPOSE]).integers(0, 2**32, draws) for row in range(rows)]
    return (torch.from_numpy(np.stack(columns, axis=1)).double() + 0.5) / 2**32


def choose_greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row: `(rows, vocabulary)` → `(rows,)` int64."""
    return logits.argmax(dim=-1)


def choose_sampled(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor | None) -> Tensor:
    """Token at which the distribution function of softmax(logits / temperature) passes `uniform`.

    logits `(rows, vocabulary)` float32, uniform `(rows, 1)` float64 in (0, 1), temperature and top_p 0-dimensional;
    top_p None keeps all tokens (and needs no sort) → `(rows,)` int64. No value is read on the host. The sums are in
    float64: in float32 the tail of a large vocabulary would be lost in rounding.
    """
    probability = torch.softmax(logits / temperature, dim=-1).double()
    if top_p is None:
        return _invert(probability, uniform)
    probability, order = probability.sort(dim=-1, descending=True, stable=True)
    likelier = probability.cumsum(-1) - probability  # sum of the tokens before each one
    kept = probability * (likelier < top_p)
    return order.gather(-1, _invert(kept, uniform)[:, None]).squeeze(-1)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative mass is above `uniform` of the total; never one without mass."""
    cumulative = mass.cumsum(-1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1)
