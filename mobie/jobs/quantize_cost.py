"""What quantizing takes, by method: seconds, stored bits, memory of the block loop. `cost.py` has the whole picture.

    seconds = passes · 2 · active parameters · tokens / FLOP/s                      the model's own forward and backward
            + 2 · tokens · layers · (top_k · (hidden² + width²) + 2 · hidden²) · grams / FLOP/s   Hessians
            + quantized weights · seconds per weight · (columns / COLUMNS)           the method itself

    passes: 2 (observed, then as stored); with loss gradients 5 more (forward, backward with recomputation, once more
            for guided Hessians). grams: 1, with loss gradients 1 + groups. Without statistics none of either.

    device memory = BLOCK_COPIES · block in float32 + chunk + batch of activations + logits of a batch
    host memory   = a block and the two ends of the model as they are read, and what is kept: hidden states of all
                    tokens (two streams with loss gradients), inputs of a layer's experts; BUDGET of that, the rest on
                    disk

The model as a whole is never in memory, so nothing here grows with the number of blocks but what is on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobie.config import Calibration, MethodConfig
    from mobie.jobs.size import Size

COLUMNS = 2048  # inputs of the matrices that the seconds per weight were measured with
FORWARD_PASSES, GRADIENT_PASSES = 2, 5
GRADIENT_GROUPS = 4
GRADIENT_OPTIONS = ("joint_svd", "shared_side", "rank", "gradient_at", "gradient_groups", "router")
NAMED_LINEARS = 7  # Linears of a block beside its experts, at most
BLOCK_COPIES = 3  # as read, as packed and unpacked, what a method works on
BATCH_SEQUENCES = 8  # sequences that pass through a block at a time
ACTIVATIONS = 8  # tensors as wide as the hidden state that a block holds while it runs
CHUNK_MB = 1024  # statistics and work of as many experts as fit
BUDGET_MB = 4096  # of kept activations in RAM
FLOAT = 4  # bytes


@dataclass(frozen=True)
class MethodCost:
    """What a registered method takes.

    seconds: per quantized weight of 2048 columns on one processor core, statistics given; see MEASURED below.
    bits:    stored per quantized weight, all buffers counted; None: `bits` of its options with their grid.
    statistics: whether calibration tokens pass through the model at all.
    """

    seconds: float
    bits: float | None
    statistics: bool = True


METHODS = {
    "fp16": MethodCost(1e-9, 16.0, statistics=False),
    "rtn": MethodCost(5e-9, None),
    "gptq": MethodCost(2.5e-7, None),
    "awq": MethodCost(1.7e-6, None),
    "billm": MethodCost(1e-6, 3.0),
    "arb": MethodCost(1.8e-6, 3.2),
    "mobie": MethodCost(1.4e-6, 1.8),
}
GRID_BITS = 32  # a scale and a zero of 16 bits


def method_cost(config: MethodConfig) -> MethodCost:
    """The entry of a method's registered name; of an unregistered one the slowest."""
    return METHODS.get(config.method, max(METHODS.values(), key=lambda cost: cost.seconds))


def needs_gradients(config: MethodConfig) -> bool:
    """Whether a method reads loss gradients, by its options."""
    if config.method == "mobie":
        return bool(config.options.get("glas", True))
    return config.options.get("saliency_source") == "guided"


def stored_bits(config: MethodConfig, size: Size) -> float:
    """Bits on disk per quantized weight."""
    bits = method_cost(config).bits
    if bits is not None:
        return bits
    group = config.options.get("group_size") or min(size.hidden, size.width)
    return float(config.options["bits"]) + GRID_BITS / group


def checkpoint_bytes(config: MethodConfig, size: Size) -> float:
    """A packed checkpoint: quantized blocks, and the two ends in 16 bits."""
    return (size.parameters - size.ends) * stored_bits(config, size) / 8 + 2 * size.ends


def gradient_key(config: MethodConfig) -> tuple[Any, ...] | None:
    """What decides a method's set of loss gradients beside model and tokens; None for a method without them."""
    if not needs_gradients(config):
        return None
    options: Mapping[str, Any] = config.options
    bases = GRADIENT_OPTIONS if config.method == "mobie" else ("gradient_groups",)
    return (config.method == "mobie", *((name, options.get(name)) for name in bases if name in options))


def gradient_bytes(config: MethodConfig, size: Size, tokens: int) -> float:
    """Squared loss gradients on disk: per token, group and output that a method asks for, in every block."""
    groups = config.options.get("gradient_groups", GRADIENT_GROUPS)
    return float(tokens * groups * (NAMED_LINEARS + 3 * size.top_k) * size.layers * FLOAT)


@dataclass(frozen=True)
class Effort:
    """Work of one quantize job: floating-point operations of matrix products, and seconds on a core for the rest."""

    flops: float
    core_seconds: float


def effort(config: MethodConfig, size: Size, calibration: Calibration) -> Effort:
    """The formula of the module's docstring, before it is divided by a machine's speed."""
    cost, tokens = method_cost(config), calibration.sequences * calibration.length
    own = (size.parameters - size.ends) * cost.seconds * max(size.hidden, size.width) / COLUMNS
    if not cost.statistics:
        return Effort(0.0, own)
    gradients = needs_gradients(config)
    passes = FORWARD_PASSES + GRADIENT_PASSES * gradients
    grams = 1 + gradients * config.options.get("gradient_groups", GRADIENT_GROUPS)
    products = size.top_k * (size.hidden**2 + size.width**2) + 2 * size.hidden**2
    return Effort(2.0 * tokens * (passes * size.active + grams * size.layers * products), own)


@dataclass(frozen=True)
class BlockMemory:
    """MiB: on the device that computes, beside it on the host, on disk while the job runs, on disk afterwards."""

    device: float
    host: float
    work: float
    kept: float


def block_memory(config: MethodConfig, size: Size, calibration: Calibration) -> BlockMemory:
    """Memory of the block loop; on a processor `device` and `host` are one and add up."""
    cost, gradients = method_cost(config), needs_gradients(config)
    block, ends = size.block * FLOAT / 2**20, size.ends * FLOAT / 2**20
    kept = checkpoint_bytes(config, size) / 2**20
    if not cost.statistics:
        return BlockMemory(BLOCK_COPIES * block, ends, 0.0, kept)
    tokens = calibration.sequences * calibration.length
    batch = min(BATCH_SEQUENCES, calibration.sequences) * calibration.length
    activations = ACTIVATIONS * batch * max(size.hidden, size.top_k * size.width) * FLOAT / 2**20
    logits = 2 * calibration.length * size.vocabulary * FLOAT / 2**20 if gradients else 0.0
    pooled = (1 + gradients * GRADIENT_GROUPS) * (2 * size.hidden**2 + size.width**2) * FLOAT / 2**20
    streams = (1 + gradients) * tokens * size.hidden * FLOAT / 2**20
    rows = tokens * (size.hidden + size.top_k * size.width) * FLOAT / 2**20
    held = min(streams + rows, BUDGET_MB)
    return BlockMemory(
        BLOCK_COPIES * block + CHUNK_MB + activations + logits + pooled + ends * gradients / 2,
        block + ends + held,
        streams + rows - held,
        kept,
    )
