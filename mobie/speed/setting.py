"""What is measured: the protocol of a suite, and one setting of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from mobie.scoring.protocol import Dtype, Protocol

Router = Literal["natural", "balanced", "zipf"]


class SpeedProtocol(Protocol):
    """How speed is measured; section 5.4 of the paper: batch 4, 1024 tokens of prompt, 256 new tokens.

    batch, prefill, decode: rows, tokens of each prompt, decode steps.
    router:          routing; the paper's are the models' own.
    compared:        methods that are timed with every runner, and with our runners at further settings; any other at
                     the first setting and with one runner only.
    batches:         further batch sizes, for our runners, with the model's own router.
    routers:         further routings, for our runners, at `batch`.
    repetitions:     prefills that are timed, fewer of slow ones; a decode step is a repetition of its own.
    slow_steps:      decode steps of a runner whose step takes longer than a tenth of a second.
    dtype:           of everything that is not packed.
    quality_text, quality_windows: what int8 activations and an int8 head cost in perplexity is measured on the first
                     windows of this text; null: not measured (random weights have no perplexity).
    """

    batch: int = Field(4, ge=1)
    prefill: int = Field(1024, ge=1)
    decode: int = Field(256, ge=2)
    router: Router = "natural"
    compared: tuple[str, ...] = Field(("mobie",), strict=False)
    batches: tuple[int, ...] = Field((1, 8, 16, 32, 64), strict=False)
    routers: tuple[Router, ...] = Field(("balanced", "zipf"), strict=False)
    repetitions: int = Field(20, ge=1)
    slow_steps: int = Field(32, ge=2)
    dtype: Dtype = "bfloat16"
    quality_text: str | None = None
    quality_windows: int = Field(8, ge=2)


@dataclass(frozen=True)
class Setting:
    """One setting: rows, tokens of each prompt, decode steps, routing, repetitions of the prefill."""

    batch: int
    prefill: int
    decode: int
    router: str = "natural"
    repetitions: int = 20
    slow_steps: int = 32

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return self.prefill + self.decode

    @property
    def mean_context(self) -> float:
        """Tokens before a decode step's own, mean over the steps."""
        return self.prefill + (self.decode - 1) / 2


def paper_setting(protocol: SpeedProtocol) -> Setting:
    """The protocol's first setting: the paper's."""
    return Setting(
        protocol.batch,
        protocol.prefill,
        protocol.decode,
        protocol.router,
        repetitions=protocol.repetitions,
        slow_steps=protocol.slow_steps,
    )
