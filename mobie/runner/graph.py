"""One decode step as a CUDA graph, and what in a model cannot be captured.

A graph replays device work on fixed addresses: no host code of the step runs again. So nothing in the step may read a
value on the host, make a tensor from host values, or bind a new tensor where the next step expects the old one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mobie.kernels.backend import name_of, operations
from mobie.kernels.experts import DENSE, PACKED

#: steps before the capture: kernels are compiled and tuned, libraries make their handles and workspaces
WARM_UP_STEPS = 3
#: rotary embeddings that look at the largest position on the host
HOST_ROTARY = {"dynamic", "longrope"}

Step = Callable[[], None]
#: (step, reset) → replay; `reset` undoes what a step changed in the runner's state
Capture = Callable[[Step, Step], Step]


def capture_cuda(step: Step, reset: Step) -> Step:
    """Warm up on a side stream, capture, and return the replay; the runner's state is as it was before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            step()
            reset()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    reset()
    return graph.replay


def capture_obstacle(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a step of a model with this text configuration cannot be captured; None where no reason is known."""
    experts = getattr(config, "_experts_implementation", None)
    if experts in (PACKED, DENSE) and name_of(operations(device, dtype)) == "torch":
        return "the kernels' torch twins, which compute here, look at the chosen experts on the host"
    if experts == "eager":
        return "eager experts loop over the experts on the host; load with experts_implementation='grouped_mm'"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rotary in HOST_ROTARY:
        return f"{rotary} rotary embeddings read the largest position on the host"
    return None
