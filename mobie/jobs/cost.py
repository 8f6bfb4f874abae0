"""What memory and time a job takes, by kind: estimates from configuration alone.

`expect` says what a job should need; `python -m mobie plan` adds that up. `estimate` says what to ask a cluster for: a
job that gets too little is killed and tried again with more, one that asks for too much waits longer in the queue.

    seconds = start + bytes read / READ + tokens · 2 · active parameters / FLOP/s + steps · step + quantizing
    step    = STEP_SECONDS, or as long as it takes to read the active weights once
    host    = process + copies · weights + a block in float32    [bytes; on a processor also the last two terms below]
    device  = context + BLOCKS_AT_ONCE · block and both ends + logits · vocabulary · 8 + cached keys and values
    whole   = the same with all weights: on a smaller card than that layers go to and fro, which takes longer than said

    asked for: memory = MEMORY_MARGIN · host, at most `resources.mem_mb` of the model's config at the first attempt;
               MEMORY_GROWTH at each further one
               minutes = MARGIN · (SLOW_START + seconds), TIME_GROWTH at each further attempt

`quantize_cost.py` has the terms of quantizing, `size.py` the sizes of models. What is assumed:
- a processor core does FLOPS["cpu"] in the matrix products of a model, a third of what it does in large ones alone
  (jobs of the smoke suite on one core with AVX-512: 10 s for 6e11 operations);
- a GPU does EFFICIENCY of what its maker prints (A100: 19.5e12 in float32, 312e12 in bfloat16) and is worth GPU_CORES
  cores in everything else. **Not measured**: no job of the suite has been timed on a GPU;
- a text that the protocol does not limit has WHOLE_TEXT tokens, the size of C4's part, which is the largest; tasks have
  the requests of their published test sets, items times choices; MMLU's choices share one pass;
- weights are read over a network file system; keys and values are KEYS_SHARE as wide as the hidden state (some models
  share them among heads).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from mobie.data.self_sampled import EBSS, SELF_SAMPLED
from mobie.jobs import quantize_cost
from mobie.jobs.size import Size, size_of

if TYPE_CHECKING:
    from mobie.config import Calibration, ProtocolConfig
    from mobie.jobs.keys import Keys

Device = Literal["cpu", "gpu"]
MEMORY_MARGIN, MEMORY_GROWTH = 1.25, 1.5
MARGIN, TIME_GROWTH = 2.0, 2.0

PROCESS_MB = 2000  # Python, torch, transformers, lm-eval; two processes of Snakemake beside it, on a cluster
GPU_PROCESS_MB = 4500  # the same with a CUDA context
CONTEXT_MB = 1000  # of a GPU's memory, before anything is put there
MEMORY_STEP_MB = 500
KEYS_SHARE = 0.5
BLOCKS_AT_ONCE = 2  # the one at work and the next

START_SECONDS = 7  # imports, and a small model
SLOW_START_SECONDS = 120  # the same from a busy network file system
READ_BYTES_PER_SECOND = 2e8
EFFICIENCY = 0.15
FLOPS = {"cpu": 6e10, "gpu": EFFICIENCY * 312e12}
FLOAT32_FLOPS = {"cpu": 6e10, "gpu": EFFICIENCY * 19.5e12}
GRAM_FLOPS = {"cpu": 8e10, "gpu": EFFICIENCY * 19.5e12}  # large products of float32 alone
GPU_CORES = 100
STEP_SECONDS = 0.1  # one token written by every row of a batch
BANDWIDTH = {"cpu": 1e10, "gpu": EFFICIENCY * 1.5e12}  # bytes per second

WHOLE_TEXT = 600_000  # tokens
REQUESTS = {  # of a whole task
    "arc_challenge": 4_700,
    "arc_easy": 9_500,
    "hellaswag": 40_200,
    "lambada_openai": 5_200,
    "lambada_standard": 5_200,
    "piqa": 3_700,
    "winogrande": 2_600,
    "mmlu": 14_100,
    "mathqa": 15_000,
    "gsm8k": 1_400,
}
OTHER_REQUESTS = 10_000  # of a task that is not among them
CHOICES = 5  # at most, of an item of a limited task
REQUEST_TOKENS = 128
SHOT_TOKENS = 200  # of a worked example before an item
MMLU_SUBJECTS = 57
PROBLEMS = {"humaneval": 164, "mbpp": 500}  # at most, of a whole set
PROGRAM_SECONDS = 3  # of one program in its container
PROMPTS = 16  # of the generations, at most
READ_TOKENS = 2048  # whose logits are held while a calibration text is read
RUNNERS = 4  # ways in which one setting is timed


@dataclass(frozen=True)
class Estimate:
    """Memory in MiB and wall time in minutes to ask for."""

    mem_mb: int
    minutes: int


@dataclass(frozen=True)
class Need:
    """What a job is expected to take, without any margin.

    seconds:   of a GPU and the core beside it, where `gpu` is set; else of one processor core.
    device_mb: of the GPU's memory, at least; 0 on a processor. whole_mb: to hold the model there all the time.
    host_mb:   of the machine's own memory.
    work_mb:   on disk while it runs. kept_mb: on disk afterwards.
    """

    seconds: float
    gpu: bool
    device_mb: float
    host_mb: float
    whole_mb: float = 0.0
    work_mb: float = 0.0
    kept_mb: float = 0.0


@dataclass(frozen=True)
class Allowance:
    """What a run gives to quantizing (`--config device=… memory=…`): device, None: as configured; MiB kept in RAM."""

    device: Device | None = None
    memory_mb: float = quantize_cost.BUDGET_MB


DEFAULT = Allowance()


@dataclass(frozen=True)
class Work:
    """What a job does, in units that do not depend on the machine.

    copies:   of the weights in memory at once, in `dtype_bytes` each; 0: no model.
    tokens:   pass through the model. steps: decoding steps.
    logits:   tokens whose logits are held at once. cached: tokens whose keys and values are.
    by_block: blocks are read one after the other, in float32, by the processor; there is never a whole model.
    whole: the model has to lie on the device.
    quantized: whether weights are quantized.
    """

    copies: float
    dtype_bytes: int = 2
    tokens: float = 0
    steps: float = 0
    logits: int = 0
    cached: int = 0
    by_block: bool = False
    whole: bool = False
    quantized: bool = False


@cache  # Snakemake asks several times for each job
def estimate(kind: str, keys: Keys, attempt: int = 1) -> Estimate:
    """What to ask for in the `attempt`-th try (from 1) of a kind of job, one of `WORK`."""
    need, model = expect(kind, keys), keys.model_config
    memory = min(MEMORY_MARGIN * need.host_mb, model.resources.mem_mb) * MEMORY_GROWTH ** (attempt - 1)
    return Estimate(
        mem_mb=MEMORY_STEP_MB * math.ceil(memory / MEMORY_STEP_MB),
        minutes=math.ceil(MARGIN * (SLOW_START_SECONDS + need.seconds) * TIME_GROWTH ** (attempt - 1) / 60),
    )


@cache
def expect(kind: str, keys: Keys, allowance: Allowance = DEFAULT) -> Need:
    """What a kind of job takes: on a GPU where the model's configuration asks for one."""
    work = WORK[kind](keys.calibration_config, keys.protocol)
    size = size_of(keys.model_config)
    device: Device = "gpu" if keys.model_config.resources.gpu else "cpu"
    if work.quantized:
        return _quantizing(keys, size, allowance.device or device, allowance.memory_mb)
    if not work.copies or work.by_block:
        device = "cpu"
    step = max(STEP_SECONDS, 2 * size.active / BANDWIDTH[device])
    seconds = (
        START_SECONDS
        + bool(work.copies) * work.dtype_bytes * size.parameters / READ_BYTES_PER_SECOND
        + work.tokens * 2 * size.active / FLOPS[device]
        + work.steps * (step if work.copies else STEP_SECONDS)
    )
    weights = 0.0 if work.by_block else work.copies * work.dtype_bytes * size.parameters / 2**20
    block = bool(work.copies) * quantize_cost.FLOAT * size.block / 2**20
    if work.by_block:
        block *= quantize_cost.BLOCK_COPIES
    keys_values = 2 * 2 * KEYS_SHARE * size.layers * size.hidden
    held = (2 * 4 * work.logits * size.vocabulary + work.cached * keys_values) / 2**20
    if device == "cpu":
        return Need(seconds, False, 0.0, PROCESS_MB + weights + block + held)
    least = (
        weights if work.whole else min(weights, work.dtype_bytes * (BLOCKS_AT_ONCE * size.block + size.ends) / 2**20)
    )
    sizes = (CONTEXT_MB + least + held, GPU_PROCESS_MB + weights + block, CONTEXT_MB + weights + held)
    return Need(seconds, True, *sizes)


def _quantizing(keys: Keys, size: Size, device: Device, memory_mb: float) -> Need:
    """The block loop: `quantize_cost.py`."""
    config, calibration = keys.method_config, keys.calibration_config
    effort = quantize_cost.effort(config, size, calibration)
    memory = quantize_cost.block_memory(config, size, calibration, memory_mb)
    cores = GPU_CORES if device == "gpu" else 1
    seconds = (
        START_SECONDS
        + effort.reads * keys.model_config.bytes / READ_BYTES_PER_SECOND
        + effort.flops / FLOAT32_FLOPS[device]
        + effort.gram_flops / GRAM_FLOPS[device]
        + effort.core_seconds / cores
    )
    if device == "gpu":
        sizes = (CONTEXT_MB + memory.device, GPU_PROCESS_MB + memory.host)
    else:
        sizes = (0.0, PROCESS_MB + memory.host + memory.device)
    return Need(seconds, device == "gpu", *sizes, work_mb=memory.work, kept_mb=memory.kept)


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _quantize(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return Work(copies=1, quantized=True)


def _tokenize(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return Work(copies=0)


def _self_sample(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    """Every beam of a batch writes a token at each step."""
    settings = SELF_SAMPLED[EBSS]
    batch = settings.batch(calibration.length)
    rows = settings.beams * min(batch, calibration.sequences)
    return Work(
        copies=1,
        dtype_bytes=_bytes(protocol.routing.dtype),
        tokens=settings.beams * calibration.sequences * calibration.length,
        steps=math.ceil(calibration.sequences / batch) * calibration.length,
        logits=rows,
        cached=rows * calibration.length,
    )


def _expert_usage(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    tokens = 2 * calibration.sequences * calibration.length
    return Work(copies=1, dtype_bytes=_bytes(protocol.routing.dtype), tokens=tokens, logits=READ_TOKENS)


def _windows(parts: tuple, models: int) -> Work:
    """Token windows through `models` models, one after the other; a copy of the model for each dtype."""
    tokens = sum(WHOLE_TEXT if part.windows is None else part.windows * part.window for part in parts)
    return Work(
        copies=len({part.dtype for part in parts}),
        dtype_bytes=max(_bytes(part.dtype) for part in parts),
        tokens=models * tokens,
        logits=max(part.batch_size * part.window for part in parts),
    )


def _perplexity(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows(protocol.perplexity, 1)


def _gate(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows(protocol.gate.points(protocol.gate_own), 1)


def _routing(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows((protocol.routing,), 2)


def _shift(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows((protocol.shift,), 4)


def _cka(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return Work(copies=1, tokens=WHOLE_TEXT, by_block=True)  # pairs of experts


def _requests(task: str, limit: int | None) -> int:
    """Requests of a task, of which at most `limit` items are scored (of MMLU: of each subject)."""
    items = MMLU_SUBJECTS if task == "mmlu" else 1
    whole = REQUESTS.get(task, OTHER_REQUESTS)
    return whole if limit is None else min(whole, limit * items * CHOICES)


def _tasks(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.tasks
    requests = sum(_requests(task, part.limit) for task in part.tasks)
    length = min(REQUEST_TOKENS, part.max_length)
    batch = part.batch_size * length
    return Work(copies=1, dtype_bytes=_bytes(part.dtype), tokens=requests * length, logits=batch, cached=batch)


def _hard(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.hard
    tokens, steps, longest = 0, 0, 0
    for task in part.tasks:
        requests = _requests(task.name, task.limit)
        length = min(REQUEST_TOKENS + task.shots * SHOT_TOKENS, part.max_length)
        longest = max(longest, length)
        tokens += requests * length
        steps += math.ceil(requests / part.batch_size) * (task.generated_tokens or 0)
    batch = part.batch_size * longest
    return Work(copies=1, dtype_bytes=_bytes(part.dtype), tokens=tokens, steps=steps, logits=batch, cached=batch)


def _generations(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.generations
    return Work(copies=1, dtype_bytes=_bytes(part.dtype), steps=PROMPTS * part.max_new_tokens)


def _code_samples(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    """A problem is a prompt for each way of generating; its programs are the rows of one batch."""
    part = protocol.code
    problems = sum(PROBLEMS[dataset.name] if dataset.limit is None else dataset.limit for dataset in part.datasets)
    runs = problems * len(part.modes)
    programs = problems * sum(part.modes.values())
    return Work(
        copies=1,
        dtype_bytes=_bytes(part.dtype),
        tokens=programs * min(REQUEST_TOKENS, part.max_length),
        steps=runs * part.max_new_tokens,
        cached=max(part.modes.values()) * part.max_length,
    )


def _code(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    """No model: every program and its sanitized twin in a container of its own, for a few seconds."""
    part = protocol.code
    problems = sum(PROBLEMS[dataset.name] if dataset.limit is None else dataset.limit for dataset in part.datasets)
    programs = 2 * problems * sum(part.modes.values())
    return Work(copies=0, steps=programs * PROGRAM_SECONDS / STEP_SECONDS)


def _speed(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.speed
    settings = 1 + len(part.batches) + len(part.routers)
    return Work(
        copies=1,
        dtype_bytes=_bytes(part.dtype),
        steps=RUNNERS * settings * (part.decode + part.repetitions),
        cached=max(part.batch, *part.batches, 0) * (part.prefill + part.decode),
        whole=True,
    )


#: kind of job → what it does under a calibration and a protocol
WORK: dict[str, Callable[[Calibration, ProtocolConfig], Work]] = {
    "quantize": _quantize,
    "calibrate": _tokenize,
    "self_sample": _self_sample,
    "expert_usage": _expert_usage,
    "windows": _tokenize,
    "perplexity": _perplexity,
    "gate": _gate,
    "tasks": _tasks,
    "hard": _hard,
    "routing": _routing,
    "shift": _shift,
    "cka": _cka,
    "generations": _generations,
    "code_samples": _code_samples,
    "code": _code,
    "speed": _speed,
}
