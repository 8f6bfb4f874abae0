"""A training run on disk: parameters and optimisers' tensors as safetensors, everything else as JSON beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mobie.errors import DataError
from mobie.packing.checkpoint import read_tensors, save_tensors

MODEL, STATE = "model/", "optimizer/"


def save_state(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], step: int, seconds: float) -> None:
    """Write a run whole or not at all. Raises `StorageError`."""
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    groups: list[Any] = []
    numbers: list[dict[str, dict[str, Any]]] = []
    for index, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        groups.append(saved["param_groups"])
        numbers.append({})
        for parameter, values in saved["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{STATE}{index}/{parameter}/{name}"] = value
                else:
                    numbers[-1].setdefault(str(parameter), {})[name] = value
    save_tensors(path, tensors, {"groups": groups, "numbers": numbers, "seconds": seconds, "step": step})


def read_state(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[int, float]:
    """Put a run back into a model and its optimisers; returns the steps that are done and the seconds they took.

    Raises:
        DataError: the file is damaged, or is of another recipe.
    """
    tensors, told = read_tensors(path, verify=True)
    states: list[dict[int, dict[str, Any]]] = [defaultdict(dict) for _ in optimizers]
    try:
        for name, tensor in tensors.items():
            if name.startswith(STATE):
                index, parameter, key = name.removeprefix(STATE).split("/")
                states[int(index)][int(parameter)][key] = tensor
        for state, numbers in zip(states, told["numbers"], strict=True):
            for parameter, values in numbers.items():
                state[int(parameter)] |= values
        model.load_state_dict({n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)})
        for optimizer, state, groups in zip(optimizers, states, told["groups"], strict=True):
            optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
        return int(told["step"]), float(told["seconds"])
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise DataError(
            f"{path}: not the state of this run ({error}); delete it to start from the beginning"
        ) from error
