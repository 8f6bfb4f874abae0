"""Loss gradients from one backward pass through a whole model: the reference of the pass that goes block by block."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mobie.calibration.backward import LayerGradients
from mobie.calibration.capture import observe_experts
from mobie.calibration.guided import TokenWeights
from mobie.models.base import Adapter


def whole_model_weights(model: nn.Module, adapter: Adapter, method: Any, batches: list[Tensor]) -> list[TokenWeights]:
    """Token weights of every block; `batches` are token ids `(sequences, length)`, run as the library runs them."""
    blocks = adapter.blocks(model)
    observers = [LayerGradients(block, adapter, method, sum(ids.numel() for ids in batches)) for block in blocks]
    experts = {adapter.experts_module(b): o for b, o in zip(blocks, observers, strict=True)}
    experts.pop(None, None)
    offset = 0
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching())
        stack.enter_context(observe_experts(experts, model.config))
        for ids in batches:
            for observer in observers:
                observer.start_batch(offset)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            torch.autograd.grad(loss, embedded)
            offset += ids.numel()
    return [observer.result() for observer in observers]
