"""What comes in: prompts as rows of token ids, checked before they reach a device, and what a model must be like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mobie.errors import DataError, UnsupportedError
from mobie.runner.attention import GROUPED

Prompts: TypeAlias = Tensor | Sequence[Sequence[int]]

ATTENTIONS = ("sdpa", "eager", GROUPED)


def prompt_rows(prompts: Prompts, *, batch: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Token ids `(batch, longest)` int64 on the CPU and the padding tokens to the left of each row, `(batch,)` int64.

    Prompts of unequal length come as a list of lists and are padded on the left; a tensor `(batch, length)` is taken as
    it is. Raises DataError for empty prompts, a wrong number of rows, and ids outside the vocabulary (which a GPU would
    answer with a failed assertion that ends the process).
    """
    rows = [row.tolist() for row in prompts] if isinstance(prompts, Tensor) and prompts.dim() == 2 else prompts
    if isinstance(rows, Tensor):
        raise DataError(
            f"prompt tensor of shape {tuple(rows.shape)}, expected (batch, length); use tokens[None] for one row"
        )
    if rows and isinstance(rows[0], int):
        raise DataError("prompts are a flat list of token ids, expected one list per row; use [tokens] for one row")
    if len(rows) != batch:
        raise DataError(
            f"{len(rows)} prompts, but the runner's cache has {batch} rows; make a DecodeRunner with batch={len(rows)}"
        )
    for number, row in enumerate(rows):
        _check_row(number, row, vocabulary)
    longest = max(len(row) for row in rows)
    tokens = [[0] * (longest - len(row)) + list(row) for row in rows]  # masked: any token would do
    padding = [longest - len(row) for row in rows]
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(padding, dtype=torch.int64)


def _check_row(number: int, row: Sequence[int], vocabulary: int) -> None:
    if len(row) == 0:
        raise DataError(f"prompt {number} is empty, expected at least one token, such as the begin-of-text token")
    wrong = next((t for t in row if not isinstance(t, int) or not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise DataError(
            f"prompt {number}: token id {wrong!r} is no whole number in 0 … {vocabulary - 1}; "
            "was it made with another model's tokenizer?"
        )


def model_device(model: nn.Module) -> torch.device:
    """The one device of a model's parameters. UnsupportedError where values are missing or on several devices."""
    devices = {p.device for p in model.parameters()}  # not of buffers: packed weights may wait on the host
    if torch.device("meta") in devices:
        raise UnsupportedError("the model has parameters without values (device 'meta'); load its weights first")
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UnsupportedError(
            f"the model lies on {names}; the runner needs one device: load with device_map={{'': 'cuda:0'}}"
        )
    return devices.pop()


def check_current_device(device: torch.device) -> None:
    """Raise UnsupportedError for a GPU that is not the current one: events and captures use the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise UnsupportedError(
            f"the model is on {device}, but the current device is cuda:{torch.cuda.current_device()}; "
            f"call torch.cuda.set_device({device.index}) first"
        )


def check_model(model: nn.Module, config: Any, context: int) -> None:
    """Raise UnsupportedError where the library's model cannot be run on one static cache of `context` tokens."""
    if model.training:
        raise UnsupportedError("the model is in training mode; call model.eval() first")
    if config._attn_implementation not in ATTENTIONS:
        raise UnsupportedError(
            f"attention implementation {config._attn_implementation!r}, expected one of {', '.join(ATTENTIONS)} "
            "(they take a ready-made mask); load with attn_implementation='sdpa'"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise UnsupportedError(
            f"context {context} exceeds the model's {longest} positions; use context={longest} or less"
        )
    _check_layers(config, context)


def _check_layers(config: Any, context: int) -> None:
    window = getattr(config, "sliding_window", None) or None  # some configurations say 0 for none
    one_kind = "full_attention" if window is None else "sliding_attention"
    kinds = set(getattr(config, "layer_types", None) or [one_kind])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(f"layers of kind {', '.join(sorted(unknown))}: the runner knows attention layers only")
    if "sliding_attention" in kinds and window is not None and context > window:
        raise UnsupportedError(
            f"context {context} exceeds the attention window of {window} tokens, and the runner has no sliding cache; "
            f"use context={window} or less, or model.generate"
        )


def end_tokens(generation: Any, eos: Sequence[int] | None, pad: int | None) -> tuple[list[int], int]:
    """End tokens and padding: as asked for, else from the generation settings; else no end, and padding by it or 0."""
    if eos is None:
        known = getattr(generation, "eos_token_id", None)
        eos = [] if known is None else [known] if isinstance(known, int) else known
    if pad is None:
        pad = getattr(generation, "pad_token_id", None)
    eos = list(eos)
    return eos, pad if pad is not None else (eos[0] if eos else 0)
