"""Tensors on disk with a hash of their content, so that a damaged byte is refused and never computed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobie.parsing import parse_json
from mobie.storage import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

ORIGIN, SEAL = "origin", "content_sha256"


def content_digest(tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of names, shapes, types and bytes of tensors, and of JSON values."""
    import torch

    hashed = hashlib.sha256(json.dumps(dict(notes or {}), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def save_sealed(path: Path, tensors: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
    """Write tensors and what they were made of as safetensors. Raises `StorageError`."""
    from safetensors.torch import save

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sealed = dict(origin) | {SEAL: content_digest(whole, origin)}
    # one entry: safetensors writes several in no fixed order
    write_bytes(path, save(whole, {ORIGIN: json.dumps(sealed, sort_keys=True)}))


def load_sealed(path: Path, name: str) -> tuple[Tensor, dict[str, Any]]:
    """The tensor called `name` of a file that `save_sealed` wrote, and its origin.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or not as it was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            origin = parse_json((file.metadata() or {})[ORIGIN])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        seal = origin.pop(SEAL)
        found = content_digest(tensors, origin)
        if found != seal:
            raise ValueError(f"its content has the sha256 {found}, expected {seal} as written in it")
        return tensors[name], origin
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
