"""Where a model lies while it is scored: on the GPU as far as its blocks fit, the others in RAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: share of a GPU's free memory for weights; the rest is for activations and logits
WEIGHTS_SHARE = 0.7


def place(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model on the GPUs; blocks that do not fit stay in RAM and visit the first GPU when they are run.

    A machine without a GPU keeps the model as it is.
    """
    import torch

    if not torch.cuda.is_available():
        return model
    room: dict[int | str, int] = {
        gpu: int(WEIGHTS_SHARE * torch.cuda.mem_get_info(gpu)[0]) for gpu in range(torch.cuda.device_count())
    }
    if weight_bytes(model) <= room[0]:
        return model.to("cuda")
    return spread(model, room)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def spread(model: PreTrainedModel, room: Mapping[int | str, int]) -> PreTrainedModel:
    """Split a model between blocks, in their order: over GPUs with so many bytes of room each, the rest in RAM."""
    from accelerate import dispatch_model

    return dispatch_model(model, device_map=places(model, room))


def places(model: PreTrainedModel, room: Mapping[int | str, int]) -> dict[str, int | str]:
    """Device of every part of a model by its name; no block is split, the first GPU keeps room for a visiting one."""
    from accelerate import infer_auto_device_map

    memory: dict[int | str, int] = {
        **room,
        "cpu": 2 * weight_bytes(model),
    }  # it lies there already; nothing goes to disk
    return infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(model._no_split_modules))
