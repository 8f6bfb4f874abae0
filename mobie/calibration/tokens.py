"""Calibration token sets: windows drawn from a text, saved with what they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobie.errors import ConfigError, DataError
from mobie.sealed import load_sealed, save_sealed

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class TokensOrigin:
    """What a token set was drawn from: name and SHA-256 of the text, the tokenizer's vocabulary, the seed."""

    text: str
    text_sha256: str
    tokenizer_sha256: str
    seed: int


@dataclass(frozen=True)
class SelfSampledOrigin:
    """What a model wrote a token set with: its own files' SHA-256, the settings of the search, type and kind of device.

    text: name of the settings in `mobie.data.self_sampled`.
    """

    text: str
    model_sha256: str
    tokenizer_sha256: str
    seed: int
    dtype: str
    device: str
    settings: dict[str, Any]


Origin = TokensOrigin | SelfSampledOrigin


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random generator that depends on the seed and its purpose only."""
    state = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(state >> 1)  # 63 bits: manual_seed takes a signed integer


def calibration_tokens(
    documents: Sequence[str], tokenizer: Any, *, sequences: int = 128, length: int = 256, seed: int = 0
) -> Tensor:
    """Token windows `(sequences, length)` int64 at random positions of the text, as GPTQ and its successors draw them.

    Documents are joined by blank lines and tokenized once, no special token added. Windows may overlap.

    Raises:
        ConfigError: no sequence, or sequences of no token, are asked for.
        DataError: the text is shorter than one window.
    """
    if sequences < 1 or length < 1:
        raise ConfigError(f"got {sequences} calibration sequences of {length} tokens, expected at least 1 of each")
    ids = torch.tensor(tokenizer(SEPARATOR.join(documents), add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < length:
        raise DataError(
            f"the calibration text has {len(ids)} tokens, expected at least one window of {length}; "
            "take a longer text or shorter sequences"
        )
    starts = torch.randint(len(ids) - length + 1, (sequences,), generator=generator(seed, "calibration"))
    return ids.long()[starts[:, None] + torch.arange(length)]


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def save_tokens(path: Path, tokens: Tensor, origin: Origin) -> None:
    """Write a token set, its origin and the hash of both as safetensors. Raises `StorageError`."""
    save_sealed(path, {"tokens": tokens}, asdict(origin))


def load_tokens(path: Path) -> tuple[Tensor, Origin]:
    """Read what `save_tokens` wrote.

    Raises:
        DataError: missing, damaged, or not a token set.
    """
    try:
        tokens, origin = load_sealed(path, "tokens")
        return tokens, (SelfSampledOrigin if "settings" in origin else TokensOrigin)(**origin)
    except FileNotFoundError:
        raise DataError(f"{path}: no such calibration set; run the calibrate rule") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable calibration set ({error}); delete it and run its job again") from error
