"""One pass over the full-precision model: how much the loss minds an error at each output, token by token (GLAS).

The gradient at a Linear's output Z (or at the latent `T`, `∂ℓ/∂T = Bᵀ ∂ℓ/∂Z`, for a bank with shared basis B) is
squared and averaged over contiguous groups of channels, and kept per token (eq. 8 with channels pooled: the form per
channel would need `out · in²` memory). The loss is the sum, not the mean, over tokens, so that half precision does not
underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobie.calibration.capture import TokenWeights, observe_experts
from mobie.calibration.pooling import pool_channels
from mobie.errors import DataError
from mobie.methods.base import Method
from mobie.models.base import Adapter
from mobie.packing.checkpoint import read_tensors, save_tensors


class _LayerGradients:
    """Observer of one block's outputs: fills the token weights as the backward pass arrives."""

    sees_all_tokens = False

    def __init__(self, tokens: int, top_k: int | None, groups: int, bases: dict[str, Tensor | None], names: list[str]):
        self._groups = groups
        self._bases = bases
        self._offset = 0
        self.linears = {name: torch.zeros(tokens, groups) for name in names}
        self.experts = {name: torch.zeros(tokens, top_k, groups) for name in bases}
        self.top_k_index = torch.full((tokens, top_k), -1) if top_k else None

    def start_batch(self, offset: int) -> None:
        self._offset = offset

    def inputs(self, projection: str, expert: int, x: Tensor, token: Tensor, slot: Tensor) -> None:
        assert self.top_k_index is not None  # there are experts
        self.top_k_index[token + self._offset, slot] = expert

    def outputs(self, projection: str, expert: int, z: Tensor, token: Tensor, slot: Tensor) -> None:
        rows, basis = token + self._offset, self._bases[projection]

        def keep(gradient: Tensor) -> None:
            latent = gradient if basis is None else gradient.float() @ basis
            self.experts[projection][rows, slot] = pool_channels(latent, self._groups)

        z.register_hook(keep)

    def linear_output(self, name: str, z: Tensor) -> None:
        rows = slice(self._offset, self._offset + z[..., 0].numel())

        def keep(gradient: Tensor) -> None:
            self.linears[name][rows] = pool_channels(gradient.flatten(0, -2), self._groups)

        z.register_hook(keep)

    def result(self) -> TokenWeights:
        return TokenWeights(self.linears, self.experts, self.top_k_index)


def token_weights(
    model: nn.Module,
    adapter: Adapter,
    method: Method,
    batches: list[Tensor],
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[TokenWeights]:
    """Token weights of every block; `batches` are token ids `(sequences, length)` in calibration order."""
    total = sum(b.numel() for b in batches)
    blocks = adapter.blocks(model)
    observers, experts, handles = [], {}, []
    for block in blocks:
        names = {n: m for group in adapter.linear_groups(block) for n, m in group.items()}
        bank = adapter.expert_bank(block)
        bases = {} if bank is None else method.gradient_bases(bank)
        top_k = bank.active if bank else None
        observer = _LayerGradients(total, top_k, method.gradient_groups, bases, list(names))
        observers.append(observer)
        if bank is not None:
            experts[adapter.experts_module(block)] = observer
        for name, module in names.items():
            hook = lambda _, args, out, name=name, observer=observer: observer.linear_output(name, out)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    offset = 0
    try:
        with observe_experts(experts, model.config):
            for ids in batches:
                for observer in observers:
                    observer.start_batch(offset)
                embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
                logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                torch.autograd.grad(loss, embedded)
                offset += ids.numel()
                progress(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    return [observer.result() for observer in observers]


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
