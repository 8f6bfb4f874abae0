"""One pass over the full-precision model: how much the loss minds an error at each output, token by token (GLAS).

The gradient at a Linear's output Z (or at the latent `T`, `∂ℓ/∂T = Bᵀ ∂ℓ/∂Z`, for a bank with shared basis B) is
squared and averaged over contiguous groups of channels, and kept per token (eq. 8 with channels pooled: the form per
channel would need `out · in²` memory). The loss is the sum, not the mean, over tokens, so that half precision does not
underflow.

One block is in memory at a time: forward through all blocks, keeping what enters each; the loss and its gradient at the
last block's output; then backward, each block run again with its inputs. What enters the blocks and the gradients
between them lie in a store; a finished block's token weights lie in a `GradientFolder`. A pass that was killed goes on
from what it finds there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from mobie.calibration.capture import observe_experts
from mobie.calibration.guided import TokenWeights
from mobie.calibration.pooling import pool_channels
from mobie.calibration.shared import GradientFolder
from mobie.calibration.store import ActivationStore
from mobie.calibration.stream import Arguments, enter_first_block, run_block, stubbed
from mobie.methods.base import Method
from mobie.models.base import Adapter
from mobie.models.weights import StreamedModel

LOGITS_BYTES = 1 << 28  # of one chunk of tokens; a vocabulary may have 150,000 entries
CPU = torch.device("cpu")


class LayerGradients:
    """Observer of one block's outputs: fills the token weights as the backward pass arrives."""

    def __init__(self, block: nn.Module, adapter: Adapter, method: Method, tokens: int) -> None:
        self._linears = {name: module for group in adapter.linear_groups(block) for name, module in group.items()}
        bank = adapter.expert_bank(block)
        self._bases = {} if bank is None else method.gradient_bases(bank)
        self._groups = method.gradient_groups
        self._offset = 0
        self.linears = {name: torch.zeros(tokens, self._groups) for name in self._linears}
        top_k = None if bank is None else bank.active
        self.experts = {name: torch.zeros(tokens, top_k, self._groups) for name in self._bases}
        self.top_k_index = torch.full((tokens, top_k), -1) if top_k else None

    def start_batch(self, offset: int) -> None:
        """Say that the next batch begins with this token."""
        self._offset = offset

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks on the Linears."""
        handles = [
            module.register_forward_hook(lambda _, args, out, name=name: self._linear_output(name, out))
            for name, module in self._linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def outputs(self, projection: str, expert: int, z: Tensor, token: Tensor, slot: Tensor) -> None:
        """Take one expert's outputs of a projection; called by the observed experts function."""
        assert self.top_k_index is not None  # there are experts
        rows, slots, basis = token.cpu() + self._offset, slot.cpu(), self._bases[projection]
        self.top_k_index[rows, slots] = expert

        def keep(gradient: Tensor) -> None:
            latent = gradient if basis is None else gradient.float() @ basis
            self.experts[projection][rows, slots] = pool_channels(latent, self._groups).cpu()

        z.register_hook(keep)

    def _linear_output(self, name: str, z: Tensor) -> None:
        rows = slice(self._offset, self._offset + z[..., 0].numel())

        def keep(gradient: Tensor) -> None:
            self.linears[name][rows] = pool_channels(gradient.flatten(0, -2), self._groups).cpu()

        z.register_hook(keep)

    def result(self) -> TokenWeights:
        """The token weights of the batches so far."""
        return TokenWeights(self.linears, self.experts, self.top_k_index)


class GradientPass:
    """The pass over one model and calibration text."""

    def __init__(
        self,
        streamed: StreamedModel,
        method: Method,
        batches: Sequence[Tensor],
        store: ActivationStore,
        folder: GradientFolder,
        progress: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        """Args:
        batches: token ids `(sequences, length)` in calibration order.
        store: for what enters the blocks and the gradients between them.
        folder: for the token weights.
        progress: told the number of tokens that passed a block, forward or backward.
        """
        self._streamed, self._method, self._batches = streamed, method, batches
        self._store, self._folder, self._progress = store, folder, progress
        self._arguments: list[list[Arguments]] = []  # of each batch and block

    def run(self) -> float:
        """Compute the token weights of all blocks; returns the CPU seconds, those of earlier attempts' blocks included.

        Raises:
            StorageError: a file cannot be written.
        """
        began, last = time.process_time(), len(self._streamed.blocks)
        first = self._resume()
        with self._streamed.outside():
            self._arguments = enter_first_block(self._streamed, self._batches, self._enter)
        if first is None:
            self._folder.begin()
            self._forward()
            self._loss(last)
            first = last - 1
        cost = time.process_time() - began
        for index in range(first, -1, -1):
            began = time.process_time()
            weights = self._backward(index)
            seconds = time.process_time() - began
            self._folder.save_block(index, weights, seconds + cost)
            cost = 0.0
            self._forget(index)
        self._store.clear()
        return self._folder.finish()

    def _resume(self) -> int | None:
        """The block that a killed pass has to go on with (-1: none is left), or None to begin anew."""
        unfinished = (i for i in reversed(range(len(self._streamed.blocks))) if not self._folder.is_finished(i))
        index = next(unfinished, -1)
        kept = self._has("gradient", index + 1) and all(self._has("inputs", i) for i in range(index + 1))
        return index if index < 0 or kept else None

    def _key(self, what: str, index: int, batch: int) -> str:
        return f"{what}-{index:03d}-{batch:05d}"

    def _has(self, what: str, index: int) -> bool:
        return all(self._store.has(self._key(what, index, batch)) for batch in range(len(self._batches)))

    def _forget(self, index: int) -> None:
        """What was needed for a block that is finished."""
        for batch in range(len(self._batches)):
            self._store.drop(self._key("inputs", index, batch))
            self._store.drop(self._key("gradient", index + 1, batch))

    def _enter(self, batch: int, hidden: Tensor) -> None:
        """Keep what enters the first block."""
        if not self._store.has(self._key("inputs", 0, batch)):
            self._store.put(self._key("inputs", 0, batch), hidden)

    @torch.no_grad()
    def _forward(self) -> None:
        """Keep what enters each block, and what leaves the last."""
        for index in range(len(self._streamed.blocks)):
            if self._has("inputs", index) and self._has("inputs", index + 1):
                self._progress(sum(ids.numel() for ids in self._batches))
                continue
            with self._streamed.block(index) as block:
                for batch, arguments in enumerate(self._arguments):
                    hidden = self._store.get(self._key("inputs", index, batch), self._streamed.device)
                    self._store.put(self._key("inputs", index + 1, batch), run_block(block, hidden, arguments[index]))
                    self._progress(hidden.shape[0] * hidden.shape[1])

    def _loss(self, last: int) -> None:
        """Gradient of the summed loss at the output of the last block."""
        with self._streamed.outside() as model:
            for batch, ids in enumerate(self._batches):
                hidden = self._store.get(self._key("inputs", last, batch), self._streamed.device)
                gradient = loss_gradient(model, self._streamed.blocks, hidden, ids.to(self._streamed.device))
                self._store.put(self._key("gradient", last, batch), gradient)
        for batch in range(len(self._batches)):
            self._store.drop(self._key("inputs", last, batch))

    def _backward(self, index: int) -> TokenWeights:
        """Token weights of a block; leaves the gradient at its input."""
        config, offset = self._streamed.model.config, 0
        with self._streamed.block(index) as block:
            observer = LayerGradients(
                block, self._streamed.adapter, self._method, sum(b.numel() for b in self._batches)
            )
            experts = self._streamed.adapter.experts_module(block)
            with observer.watching(), observe_experts({experts: observer}, config) if experts else nullcontext():
                for batch, arguments in enumerate(self._arguments):
                    observer.start_batch(offset)
                    hidden = self._store.get(self._key("inputs", index, batch), self._streamed.device)
                    behind = self._store.get(self._key("gradient", index + 1, batch), self._streamed.device)
                    hidden = hidden.detach().requires_grad_()
                    with torch.enable_grad():
                        output = run_block(block, hidden, arguments[index])
                        (gradient,) = torch.autograd.grad(output, hidden, behind)
                    if index:
                        self._store.put(self._key("gradient", index, batch), gradient)
                    offset += self._batches[batch].numel()
                    self._progress(self._batches[batch].numel())
        return observer.result()


def loss_gradient(model: nn.Module, blocks: Sequence[nn.Module], hidden: Tensor, ids: Tensor) -> Tensor:
    """Gradient of the loss, summed over the tokens that are predicted, at the last block's output.

    Final norm and head are the library's own, run on chunks of tokens with every block passed over.

    Args:
        hidden: `(sequences, length, hidden)`.
        ids: token ids `(sequences, length)`.
    """
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()  # a sequence's last token predicts nothing
    rows = hidden.flatten(0, 1)
    chunk = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    parts = []
    with stubbed(blocks, lambda hidden, arguments: None), torch.enable_grad():
        for some, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True):
            some = some.detach().requires_grad_()
            logits = model(inputs_embeds=some[:, None], use_cache=False).logits[:, 0].float()
            loss = nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
            parts.append(torch.autograd.grad(loss, some)[0])
    return torch.cat(parts).view_as(hidden)
