"""The MoE block alone: a layer's router, experts and shared experts at decode, dense against binary, same routing.

A model of a few layers is made, all with a MoE block, and their blocks run one after another. There are so many that
more than `ROTATED_BYTES` are read before a weight is read again, so no cache holds them. On a GPU all are captured in
one CUDA graph, as a decode step is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from mobie.kernels.attach import attach, attach_dense, detach
from mobie.methods.base import Method
from mobie.methods.fp16 import FP16
from mobie.models.base import Adapter
from mobie.speed.footprint import layer_bytes, packed_blocks
from mobie.speed.random_weights import random_model
from mobie.speed.routers import BALANCED, distinct_assigned, routed
from mobie.speed.timing import REPETITIONS, Spread, timed

ROTATED_BYTES = 100 * 10**6
BATCHES = (1, 4)
VOCABULARY = 1024  # blocks have none: small embeddings
CALLS_PER_GRAPH = 4  # a graph of one pass would be shorter than its launch on the smallest models
Way = Literal["dense", "binary-16bit", "binary-int8"]
WAYS: tuple[Way, ...] = ("dense", "binary-16bit", "binary-int8")


def block_times(
    config: Any,
    method: Method,
    *,
    device: str,
    dtype: torch.dtype,
    rotated_bytes: int = ROTATED_BYTES,
    repetitions: int = REPETITIONS,
) -> list[dict[str, Any]]:
    """Seconds of one MoE block for every way and batch, and the bytes it reads; balanced routing.

    Args:
        config: the library's configuration of the model.
        method: how the binary block is packed.

    Returns:
        One JSON object for each: `way`, `batch`, `seconds` (median and quartiles), `bytes`, `layers`, and for binary
        ways `times_dense`, how many times as fast as the dense block.
    """
    found, dense = [], {}
    for way in WAYS:
        for batch in BATCHES:
            values = _time(config, method, way, batch, torch.device(device), dtype, rotated_bytes, repetitions)
            if way == "dense":
                dense[batch] = values["seconds"]["median"]
            else:
                values["times_dense"] = dense[batch] / values["seconds"]["median"]
            found.append({"way": way, "batch": batch} | values)
    return found


def _time(
    config: Any,
    method: Method,
    way: Way,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    rotated_bytes: int,
    repetitions: int,
) -> dict[str, Any]:
    weights = FP16() if way == "dense" else method
    one = random_model(_layers(config, 1), weights, device=device, dtype=dtype)
    needed = _bytes(one, batch)
    layers = math.ceil(rotated_bytes / needed) + 1
    model = random_model(_layers(config, layers), weights, device=device, dtype=dtype)
    if way == "dense":
        attach_dense(model)
    else:
        attach(model, compute="kernels", activations="int8" if way == "binary-int8" else "16bit")
    blocks = [block.mlp for block in Adapter(config.model_type).blocks(model)]
    hidden = torch.randn(batch, 1, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    @torch.no_grad()
    def run() -> None:
        for block in blocks:
            block(hidden)

    with routed(model, BALANCED):
        run()
        calls = CALLS_PER_GRAPH if device.type == "cuda" else 1
        action = _captured(run, calls) if device.type == "cuda" else run
        seconds = [s / (layers * calls) for s in timed(action, device, repetitions)]
    detach(model)
    return {"seconds": Spread.of(seconds).as_dict(), "bytes": needed, "layers": layers}


def _layers(config: Any, layers: int) -> Any:
    """The configuration with so many layers, all of them with a MoE block, and a small vocabulary."""
    values = config.to_dict() | {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "first_k_dense_replace": 0}
    values |= {"mlp_only_layers": [], "pad_token_id": None, "layer_types": None}
    known = {key: value for key, value in values.items() if hasattr(config, key)}
    return type(config)(**{key: value for key, value in copy.deepcopy(known).items() if key != "model_type"})


def _bytes(model: Any, batch: int) -> float:
    """What a MoE block reads for a batch: all under `mlp`, of the experts those that are chosen."""
    adapter = Adapter(model.config.model_type)
    (block,) = adapter.blocks(model)
    layer = layer_bytes(adapter, block, packed_blocks(model)[0], within="mlp.")
    top_k = int(adapter.moe_router(block).top_k)
    (distinct,) = distinct_assigned(BALANCED, 1, batch, len(layer.experts), top_k)
    return layer.always + distinct * sum(layer.experts) / len(layer.experts)


def _captured(run: Callable[[], None], calls: int) -> Callable[[], None]:
    """`calls` passes as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled and tuned before the capture
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay
