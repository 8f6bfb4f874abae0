"""Cutting a text into the token windows that perplexity and routing are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mobie.errors import ConfigError, DataError
from mobie.scoring.protocol import Dtype, Protocol, require_dtype

if TYPE_CHECKING:
    from torch import Tensor


class WindowProtocol(Protocol):
    """How a text becomes windows.

    text:       name of the text (mobie.data.texts).
    separator:  put between documents before the whole is tokenized once.
    window:     tokens per window; windows follow one another without overlap, an incomplete last one is dropped.
    windows:    at most so many, evenly spaced over the text; None: all.
    bos:        `none`: no token is added. `text`: one beginning-of-sequence token before the whole text. `window`: it
                is the first token of every window, followed by `window - 1` tokens of text.
    batch_size: windows per forward pass.
    dtype:      of the model's weights and activations.
    """

    text: str
    separator: str = "\n\n"
    window: int = Field(256, ge=2)
    windows: int | None = Field(None, ge=1)
    bos: Literal["none", "text", "window"] = "none"
    batch_size: int = Field(8, ge=1)
    dtype: Dtype = "float32"


def token_windows(documents: Sequence[str], tokenizer: Any, protocol: WindowProtocol) -> Tensor:
    """Token windows `(windows, window)` of a text under `protocol`.

    Raises:
        ConfigError: a beginning-of-sequence token is asked for and the tokenizer has none.
        DataError: the text is shorter than one window.
    """
    import torch

    ids = tokenizer(protocol.separator.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    if protocol.bos != "none" and tokenizer.bos_token_id is None:
        raise ConfigError(f"bos is {protocol.bos!r}, but the tokenizer has no such token; expected bos: none")
    if protocol.bos == "text":
        ids = [tokenizer.bos_token_id, *ids]
    length = protocol.window - (protocol.bos == "window")
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"text {protocol.text!r}: got {len(ids)} tokens, expected at least one window of {length}; "
            "take a longer text or a shorter window"
        )
    rows = torch.tensor(ids[: count * length]).reshape(count, length)
    if protocol.windows is not None and protocol.windows < count:
        rows = rows[torch.arange(protocol.windows) * count // protocol.windows]
    if protocol.bos == "window":
        rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
    return rows


def require_fit(model: Any, protocol: WindowProtocol) -> None:
    """Check that a model is what the protocol speaks of.

    Raises:
        ConfigError: its dtype is another one, or its context is shorter than a window.
    """
    require_dtype(model, protocol.dtype)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and protocol.window > context:
        raise ConfigError(
            f"windows of {protocol.window} tokens exceed the model's context of {context}; use {context} or less"
        )
