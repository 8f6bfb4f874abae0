"""Perplexity over windows of a text: exp of the mean negative log-likelihood of all tokens but each window's first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobie.errors import MeasurementError
from mobie.records import Measurement
from mobie.scoring.windows import WindowProtocol, require_fit

if TYPE_CHECKING:
    from torch import Tensor


class PerplexityProtocol(WindowProtocol):
    """Everything that decides a perplexity; the fields are those of `WindowProtocol`."""


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity on a text, and what it is the mean of.

    window_nll:    mean negative log-likelihood per predicted token of each window, in nats.
    window_tokens: predicted tokens per window: all but the first.
    """

    measurement: Measurement
    window_nll: tuple[float, ...]
    window_tokens: int


def perplexity(model: Any, windows: Tensor, protocol: PerplexityProtocol) -> TextPerplexity:
    """Perplexity of a causal language model on windows `(windows, window)` of a text; `n` counts predicted tokens.

    The measurement is named `TEXT.perplexity`. Its standard error is that of the mean over windows carried through the
    exponential (delta method: `perplexity · s / √windows`, with s the standard deviation of the windows' mean losses);
    None for a single window.

    Raises:
        ConfigError: the model does not fit the protocol.
        MeasurementError: a loss is not finite.
    """
    require_fit(model, protocol)
    losses = window_losses(model, windows, protocol.batch_size)
    value = _exponential(losses, protocol.text)
    error = value * losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None
    measurement = Measurement(f"{protocol.text}.perplexity", value, error, windows.numel() - len(windows))
    return TextPerplexity(measurement, tuple(losses.tolist()), windows.shape[1] - 1)


def _exponential(losses: Tensor, text: str) -> float:
    """exp of the mean loss, refused where it is no number (a record holds finite values only)."""
    bad = int((~losses.isfinite()).sum())
    if bad:
        raise MeasurementError(
            f"text {text!r}: the model's loss is not finite in {bad} of {len(losses)} windows, expected finite losses; "
            "its weights or activations overflow: try another dtype, or look at how it was quantized"
        )
    try:
        return math.exp(losses.mean())
    except OverflowError:
        raise MeasurementError(
            f"text {text!r}: the mean loss is {losses.mean():.0f}, too large for exp; the model is destroyed"
        ) from None


def window_losses(model: Any, windows: Tensor, batch_size: int) -> Tensor:
    """Mean negative log-likelihood of each window's tokens after the first: `(windows, length)` → `(windows,)` float64.

    Logits are taken to float32, sums are kept in float64.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    losses = []
    batches = windows.split(batch_size)
    with torch.inference_mode():
        for batch in tqdm(batches, desc="perplexity", unit="batch", disable=None, leave=False):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits  # (batch, length, vocabulary)
            for row, tokens in zip(logits, batch, strict=True):  # one by one: float32 logits of a batch are large
                losses.append(cross_entropy(row[:-1].float(), tokens[1:], reduction="none").double().mean().cpu())
    return torch.stack(losses)
