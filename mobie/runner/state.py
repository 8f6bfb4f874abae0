"""The buffers of a run: everything that a captured decode step reads or writes, at fixed addresses.

None of them is ever bound anew. What changes from step to step can be saved and put back, because warming up and
capturing a step run it, or may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mobie.runner.sampling import Sampling, uniforms


class RunState:
    """Buffers for `rows` rows of `context` tokens; `slots` is the cache's length, `position` its cursor.

    mask is what a decode step adds to its scores, `(rows, 1, 1, slots)`: 0 for slots that are written and no padding.
    """

    def __init__(
        self,
        *,
        position: Tensor,
        rows: int,
        context: int,
        slots: int,
        vocabulary: int,
        eos: Sequence[int],
        pad: int,
        dtype: torch.dtype,
    ) -> None:
        device = position.device
        self.position = position  # (1,) slot of the next token
        self.padding = torch.zeros(rows, dtype=torch.int64, device=device)  # masked tokens to the left of each row
        self.mask = torch.zeros(rows, 1, 1, slots, dtype=dtype, device=device)
        self.tokens = torch.zeros(rows, context, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=device)  # of the next token
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        self.pad = torch.tensor(pad, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(context, rows, dtype=torch.float64, device=device)
        self.temperature = torch.ones((), dtype=torch.float32, device=device)
        self.top_p = torch.ones((), dtype=torch.float64, device=device)
        #: what a masked score gets; not minus infinity, which would make a row without any visible slot NaN
        self.lowest = torch.finfo(dtype).min

    def start(self, tokens: Tensor, padding: Tensor) -> None:
        """Begin anew with the prompts `tokens (rows, length)` and their padding `(rows,)`, both on the CPU."""
        length = tokens.shape[1]
        self.tokens.zero_()
        self.tokens[:, :length] = tokens.to(self.tokens.device)
        self.padding.copy_(padding)
        self.finished.fill_(False)
        self.position.fill_(length)
        self.mask.fill_(self.lowest)
        real = torch.arange(length, device=self.mask.device) >= self.padding[:, None]
        self.mask[:, 0, 0, :length] = self.mask[:, 0, 0, :length].masked_fill(real, 0)

    def draw_for(self, sampling: Sampling, first: int) -> None:
        """Fill what a sampled step reads: the draw for position p is number p - `first` of its row."""
        self.temperature.fill_(sampling.temperature)
        self.top_p.fill_(sampling.top_p)
        context, rows = self.uniforms.shape
        self.uniforms[first:] = uniforms(sampling.seed, rows, context - first).to(self.uniforms.device)

    def chunk_positions(self, start: int, end: int) -> Tensor:
        """Positions of a chunk's tokens in their texts, `(rows, end - start)`; 0 for padding."""
        slots = torch.arange(start, end, device=self.padding.device)
        return (slots - self.padding[:, None]).clamp(min=0)

    def chunk_mask(self, start: int, end: int) -> Tensor:
        """Additive mask `(rows, 1, end - start, end)`: causal, without padding; padding sees itself, to stay finite."""
        query = torch.arange(start, end, device=self.mask.device)[:, None]
        key = torch.arange(end, device=self.mask.device)
        seen = (key <= query) & (key >= self.padding[:, None, None]) | (key == query)
        mask = torch.full(seen.shape, self.lowest, dtype=self.mask.dtype, device=self.mask.device)
        return mask.masked_fill_(seen, 0)[:, None]

    def next_draw(self) -> Tensor:
        """Uniform numbers for the present position, `(rows, 1)`."""
        return self.uniforms.index_select(0, self.position).view(-1, 1)

    def write(self, chosen: Tensor) -> Tensor:
        """Write down the chosen tokens `(rows,)`, padding for rows that have ended; returns what was written."""
        token = torch.where(self.finished, self.pad, chosen)
        self.finished.logical_or_((token[:, None] == self.eos).any(-1))
        self.tokens.index_copy_(1, self.position, token[:, None])
        self.mask.index_fill_(3, self.position, 0)
        return token

    def save(self) -> Callable[[], None]:
        """A function that puts back what steps change. Not the cache, the tokens and the mask: the next step writes its
        slot of them before anything reads it."""
        changing = (self.position, self.finished, self.logits)
        saved = [tensor.clone() for tensor in changing]

        def restore() -> None:
            for tensor, before in zip(changing, saved, strict=True):
                tensor.copy_(before)

        return restore
