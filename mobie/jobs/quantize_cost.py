"""What quantizing takes, by method: seconds, stored bits, memory of the block loop. `cost.py` has the whole picture.

    seconds = passes · 2 · active parameters · tokens / FLOP/s                     the model's own forward and backward
            + (hessian_flops + again_flops) · tokens · layers / GRAM_FLOP/s        Hessians
            + quantized weights · seconds per weight · columns / COLUMNS           the method itself

    passes: 2 (observed, then as stored); those of a survey before them, which has Hessians of its own;
            with loss gradients 5 more (forward, backward with recomputation, once more for guided Hessians). Methods
            without statistics take neither passes nor products.

What hangs on the method alone stands in its class: `mobie/jobs/methods.py` reads it there.

    device memory = BLOCK_COPIES · block in float32 + chunk + cached Hessians + activations of a batch
    host memory   = a block, unpacked again, and both ends as they are read + kept activations (up to BUDGET)
                    + token weights of a block
    disk at work  = kept activations beyond BUDGET (`--memory`); with loss gradients what enters every block, if it is
                    more

The block loop keeps hidden states of all tokens and inputs of the layer's experts, both once more with loss gradients.
The model as a whole is never in memory, so only disk grows with the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobie.jobs.methods import is_allocating, method_fact
from mobie.jobs.size import ATTENTION_LINEARS
from mobie.resources import DEFAULT_MEMORY, parse_memory

if TYPE_CHECKING:
    from mobie.config import Calibration, MethodConfig
    from mobie.jobs.size import Size

COLUMNS = 2048  # inputs of the matrices that the seconds per weight were measured with
FORWARD_PASSES, GRADIENT_PASSES = 2, 5
NAMED_LINEARS = 7  # Linears of a block beside its experts, at most
BLOCK_COPIES = 2  # as it runs, and what a method works on; packed results go to the host
BATCH_TOKENS = 8192  # that pass through a block at a time, or one sequence if that is longer
ACTIVATIONS = 10  # tensors as wide as the hidden state that a block holds for the backward pass
EXPERT_ACTIVATIONS = 4  # the same as wide as an expert, for each of the experts of a token
CHUNK_MB = 1024  # statistics and work of as many experts as fit
BUDGET_MB = parse_memory(DEFAULT_MEMORY) / 2**20  # of kept activations in RAM, and of Hessians that are kept
READS, GRADIENT_READS = 2, 2  # of the model's files: a survey and the block loop; forward and backward
FLOAT = 4  # bytes
GRID_BITS = 32  # a scale and a zero of 16 bits
UNKNOWN_BITS = 4  # of a method that does not say


def needs_gradients(config: MethodConfig) -> bool:
    """Whether a method reads loss gradients, by its options."""
    guided_by = method_fact(config.method, "guided_by")
    return guided_by is not None and _option(config, guided_by[0]) == guided_by[1]


def _option(config: MethodConfig, name: str) -> Any:
    """An option as configured, or its default."""
    return config.options.get(name, method_fact(config.method, name))


def needs_statistics(config: MethodConfig) -> bool:
    """Whether calibration tokens pass through the model at all."""
    return bool(method_fact(config.method, "needs_statistics"))


def stored_bits(config: MethodConfig, size: Size) -> float:
    """Bits on disk per quantized weight."""
    bits = method_fact(config.method, "stored_bits")
    if not isinstance(bits, str):
        return float(bits)
    group = config.options.get("group_size") or min(size.hidden, size.width)
    return float(_option(config, bits) or UNKNOWN_BITS) + GRID_BITS / group


def checkpoint_bytes(config: MethodConfig, size: Size) -> float:
    """A packed checkpoint: quantized blocks, and the two ends in 16 bits."""
    return (size.parameters - size.ends) * stored_bits(config, size) / 8 + 2 * size.ends


def gradient_key(config: MethodConfig) -> tuple[Any, ...] | None:
    """What decides a method's set of loss gradients beside model and tokens; None for a method without them."""
    if not needs_gradients(config):
        return None
    return tuple((name, _option(config, name)) for name in method_fact(config.method, "gradient_options"))


def gradient_bytes(config: MethodConfig, size: Size, tokens: int) -> float:
    """Squared loss gradients on disk: per token, group and output that a method asks for, in every block."""
    return float(tokens * groups_of(config) * (NAMED_LINEARS + 3 * size.top_k) * size.layers * FLOAT)


@dataclass(frozen=True)
class Effort:
    """Work of a quantize job.

    reads: of all of the model's files. flops, gram_flops: operations in the model and in Hessians.
    core_seconds: on one core, for the rest.
    """

    reads: int
    flops: float
    gram_flops: float
    core_seconds: float


def effort(config: MethodConfig, size: Size, calibration: Calibration) -> Effort:
    """The formula of the module's docstring, before it is divided by a machine's speed."""
    tokens = calibration.sequences * calibration.length
    own = method_seconds(config, size, size.parameters - size.ends)
    if not needs_statistics(config):
        return Effort(READS, 0.0, 0.0, own)
    gradients, surveys = needs_gradients(config), is_allocating(config.method)
    passes = FORWARD_PASSES + method_fact(config.method, "survey_passes") + GRADIENT_PASSES * gradients
    grams = (1 + surveys) * hessian_flops(config, size) + again_flops(config, size)
    reads = READS + surveys + GRADIENT_READS * gradients
    return Effort(reads, 2.0 * tokens * passes * size.active, tokens * size.layers * grams, own)


def method_seconds(config: MethodConfig, size: Size, weights: int) -> float:
    """Seconds on one core of a method's own mathematics, statistics given."""
    return weights * method_fact(config.method, "seconds_per_weight") * max(size.hidden, size.width) / COLUMNS


def hessian_flops(config: MethodConfig, size: Size) -> float:
    """Per token and layer, of the Hessians that a method asks for. Gate and up share one, but not their guided ones."""
    guided = needs_gradients(config)
    grams = 1 + guided * groups_of(config)
    experts = grams * ((1 + guided) * size.hidden**2 + size.width**2)
    attention = (2 + guided * groups_of(config) * ATTENTION_LINEARS) * size.hidden**2
    return 2.0 * (size.top_k * experts + attention)


def again_flops(config: MethodConfig, size: Size) -> float:
    """Per token and layer, of what the block loop computes anew rather than keeps.

    Inputs of down whenever its Hessian is formed, and all Hessians once more for the output errors in the record.
    """
    inputs = (2 + needs_gradients(config)) * 2 * size.hidden * size.width
    return 2.0 * size.top_k * (inputs + 2 * size.hidden**2 + size.width**2)


def groups_of(config: MethodConfig) -> int:
    """Channel groups with a guided Hessian each."""
    return int(_option(config, "gradient_groups") or 1)


@dataclass(frozen=True)
class BlockMemory:
    """MiB: on the device that computes, beside it on the host, on disk while the job runs, on disk afterwards."""

    device: float
    host: float
    work: float
    kept: float


def block_memory(
    config: MethodConfig, size: Size, calibration: Calibration, budget_mb: float = BUDGET_MB
) -> BlockMemory:
    """Memory of the block loop; on a processor `device` and `host` are one and add up."""
    gradients = needs_gradients(config)
    block, ends, kept = _mib(size.block), _mib(size.ends), checkpoint_bytes(config, size) / 2**20
    if not needs_statistics(config):
        return BlockMemory(BLOCK_COPIES * block, ends, 0.0, kept)
    tokens = calibration.sequences * calibration.length
    batch = min(tokens, max(BATCH_TOKENS, calibration.length))
    activations = ACTIVATIONS * size.hidden + size.top_k * (size.hidden + EXPERT_ACTIVATIONS * size.width)
    expert = (1 + gradients * groups_of(config)) * (2 * size.hidden**2 + size.width**2)
    hessians = min(CHUNK_MB, _mib(size.experts * expert)) + min(BUDGET_MB, _mib(size.experts * expert))
    states = _mib(tokens * size.hidden)
    held = min(2 * (1 + gradients) * states, budget_mb)
    entries = (size.layers + 2) * states if gradients else 0.0
    weights = gradients * gradient_bytes(config, size, tokens) / size.layers / 2**20
    return BlockMemory(
        max(BLOCK_COPIES * block + hessians + _mib(batch * activations), ends),
        block + ends + held + weights,
        max(2 * (1 + gradients) * states - held, entries if entries > budget_mb else 0.0),
        kept,
    )


def _mib(numbers: float) -> float:
    """MiB of so many numbers in float32."""
    return numbers * FLOAT / 2**20
