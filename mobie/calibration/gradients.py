"""Token weights on disk: how much the loss minds an error at each output, token by token (`backward` computes them)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mobie.calibration.guided import TokenWeights
from mobie.errors import DataError
from mobie.packing.checkpoint import read_tensors, save_tensors


def save_token_weights(path: Path, weights: TokenWeights, fingerprint: str) -> None:
    """Write one block's token weights. Raises `StorageError`."""
    tensors = {f"linears.{n}": t for n, t in weights.linears.items()}
    tensors |= {f"experts.{n}": t for n, t in weights.experts.items()}
    if weights.top_k_index is not None:
        tensors["top_k_index"] = weights.top_k_index
    save_checked(path, tensors, fingerprint, {})


def save_checked(path: Path, tensors: Mapping[str, Tensor], fingerprint: str, notes: Mapping[str, Any]) -> None:
    """Write tensors with what they belong to and JSON values. Raises `StorageError`."""
    save_tensors(path, tensors, {"fingerprint": fingerprint, "notes": notes})


def load_checked(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and notes of `save_checked`, or None where they are absent or belong to something else.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path, verify=True)
    if metadata.get("fingerprint") != fingerprint:
        return None
    if not isinstance(metadata.get("notes"), dict):
        raise DataError(f"{path}: no notes beside the tensors; delete it and run the same command again")
    return tensors, metadata["notes"]


def load_token_weights(path: Path, fingerprint: str) -> TokenWeights | None:
    """Read one block's token weights, or None where they are absent or belong to another job.

    Raises:
        DataError: the file is damaged.
    """
    loaded = load_checked(path, fingerprint)
    if loaded is None:
        return None
    tensors, _ = loaded
    index = tensors.pop("top_k_index", None)
    by_part: dict[str, dict[str, Tensor]] = {"linears": {}, "experts": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        by_part[part][rest] = tensor
    return TokenWeights(by_part["linears"], by_part["experts"], index)
