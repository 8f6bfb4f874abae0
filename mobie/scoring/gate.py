"""The grid of the protocol gate: perplexity of a model in full precision under windows, separators and BOS policies.

The paper does not say how WikiText-2 is joined and cut. `mobie.scoring.reproduce` holds the values against its entries.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from mobie.provenance import digest
from mobie.records import Measurement
from mobie.scoring.perplexity import PerplexityProtocol, perplexity
from mobie.scoring.protocol import Dtype, Protocol
from mobie.scoring.windows import token_windows

#: how a separator is called in the name of a measurement
SEPARATORS = {"\n\n": "blank_line", "\n": "line", " ": "space", "": "nothing"}


class GateProtocol(Protocol):
    """The grid, and what counts as reproducing a printed entry. The other fields are those of `WindowProtocol`.

    window, separator, bos: what is tried, each with each.
    windows:             at most so many of each point; None: the whole text, as in the paper.
    perplexity_relative: a perplexity may be off by this share of the printed one: kernels and dtypes differ.
    stderrs:             an accuracy, or the perplexity of a part of the text, may be off by so many standard errors.

    Half a unit of the last printed digit is allowed in any case.
    """

    text: str
    window: tuple[int, ...] = Field(min_length=1)
    separator: tuple[str, ...] = Field(min_length=1)
    bos: tuple[Literal["none", "text", "window"], ...] = Field(min_length=1)
    windows: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1)
    dtype: Dtype = "float32"
    perplexity_relative: float = Field(0.005, ge=0)
    stderrs: float = Field(2.0, ge=0)

    def own_point(self, own: PerplexityProtocol) -> PerplexityProtocol:
        """The point that stands for the suite's perplexity protocol on the text: its window, separator and BOS."""
        return self._point(own.window, own.separator, own.bos)

    def points(self, own: PerplexityProtocol) -> tuple[PerplexityProtocol, ...]:
        """All points of the grid, once each; the suite's own comes first, also where no axis has it."""
        axes = itertools.product(self.window, self.separator, self.bos)
        return tuple(dict.fromkeys([self.own_point(own), *(self._point(*values) for values in axes)]))

    def gate_digest(self, own: PerplexityProtocol) -> str:
        """SHA-256 of what decides a gate's perplexities and verdict."""
        return digest([self.digest(), self.own_point(own).digest()])

    def _point(self, window: int, separator: str, bos: Literal["none", "text", "window"]) -> PerplexityProtocol:
        return PerplexityProtocol(
            text=self.text,
            separator=separator,
            window=window,
            windows=self.windows,
            bos=bos,
            batch_size=self.batch_size,
            dtype=self.dtype,
        )


def point_name(point: PerplexityProtocol) -> str:
    """Name of a point in a record: `w4096-blank_line-none`; a separator without a name has its digest's beginning."""
    return f"w{point.window}-{SEPARATORS.get(point.separator, digest(point.separator)[:6])}-{point.bos}"


def point_label(point: PerplexityProtocol) -> str:
    """A point for people."""
    return f"window {point.window}, separator {json.dumps(point.separator)}, BOS {point.bos}"


@dataclass(frozen=True)
class Grid:
    """Perplexities of the points of a grid, what they are the means of, and why a point has none."""

    found: Sequence[tuple[PerplexityProtocol, Measurement]]
    window_nll: Mapping[str, Sequence[float]]
    window_tokens: Mapping[str, int]
    holes: Mapping[str, str]


def measure_grid(model: Any, tokenizer: Any, documents: Sequence[str], points: Iterable[PerplexityProtocol]) -> Grid:
    """Perplexity of every point that the model and its tokenizer allow; measurements are named by the points.

    Raises:
        MeasurementError: a loss is not finite.
        DataError: the text is shorter than a window.
    """
    from tqdm import tqdm

    found, losses, tokens, holes = [], {}, {}, {}
    for point in tqdm(list(points), desc="protocols", unit="point", disable=None):
        name = point_name(point)
        reason = misfit(model, tokenizer, point)
        if reason is not None:
            holes[name] = reason
            continue
        score = perplexity(model, token_windows(documents, tokenizer, point), point)
        found.append((point, replace(score.measurement, name=f"{name}.perplexity")))
        losses[name], tokens[name] = list(score.window_nll), score.window_tokens
    return Grid(found, losses, tokens, holes)


def misfit(model: Any, tokenizer: Any, point: PerplexityProtocol) -> str | None:
    """Why a model has no perplexity under a point of the grid; None where it has."""
    if point.bos != "none" and tokenizer.bos_token_id is None:
        return "the tokenizer has no beginning-of-sequence token"
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and point.window > context:
        return f"windows of {point.window} tokens exceed the model's context of {context}"
    return None
