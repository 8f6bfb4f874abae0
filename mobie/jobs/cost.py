"""What memory and time to ask a cluster for, by kind of job: estimates from configuration alone, none of them measured.

A job that gets too little is killed by the cluster and tried again with more; one that asks for too much waits longer
in the queue. So the first attempt asks for about twice what we expect, and each further one for more.

    memory  = process + copies · weights in the job's dtype + calibration tokens · BYTES_PER_TOKEN
              at most `resources.mem_mb` of the model's config at the first attempt; MEMORY_GROWTH at each further one
    minutes = MARGIN · (start + reading + tokens · passes · 2 · parameters / FLOP/s + steps · STEP_SECONDS
              + parameters · seconds per weight), TIME_GROWTH at each further attempt

What is assumed:
- a token costs 2 · *all* parameters, as if every expert saw it: too much by the model's sparsity, on purpose;
- a GPU does a twentieth of what its makers print, a processor core what one AVX2 core does in float32;
- quantizing needs five forward passes (capture, forward and backward for gradients, quantized) and a time per weight;
- a text that the protocol does not limit has WHOLE_TEXT tokens, the size of C4's part, which is the largest; tasks have
  the requests of their published test sets, items times choices; MMLU's choices share one pass;
- weights are read once for every copy, over a network file system.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobie.config import Calibration, ModelConfig, ProtocolConfig
    from mobie.jobs.keys import Keys

MEMORY_GROWTH = 1.5
TIME_GROWTH = 2.0
MARGIN = 2.0

PROCESS_MB = 2000  # Python, torch, transformers, lm-eval; two processes of Snakemake beside it, on a cluster
GPU_PROCESS_MB = 4500  # the same with a CUDA context
BYTES_PER_TOKEN = 16384  # of calibration: a block's input and output, 2048 wide, in float32
MEMORY_STEP_MB = 500

START_SECONDS = 120
READ_BYTES_PER_SECOND = 2e8
FLOPS = {"cpu": 3e10, "gpu": 5e13}
SECONDS_PER_WEIGHT = {"cpu": 1e-5, "gpu": 5e-7}  # of quantizing, without the model's own passes
STEP_SECONDS = 0.1  # one token written by every row of a batch

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
RUNNERS = 4  # ways in which one setting is timed


@dataclass(frozen=True)
class Estimate:
    """Memory in MiB and wall time in minutes to ask for."""

    mem_mb: int
    minutes: int


@dataclass(frozen=True)
class Work:
    """What a job does, in units that do not depend on the machine.

    copies: of the weights in memory at once, in `dtype_bytes` each.
    kept:   calibration tokens whose activations are kept.
    tokens: pass through the model. steps: decoding steps. quantized: whether weights are quantized.
    """

    copies: float
    dtype_bytes: int = 2
    kept: int = 0
    tokens: float = 0
    steps: float = 0
    quantized: bool = False


@cache  # Snakemake asks several times for each job
def estimate(kind: str, keys: Keys, attempt: int = 1) -> Estimate:
    """What to ask for in the `attempt`-th try (from 1) of a kind of job, one of `WORK`."""
    return request(WORK[kind](keys.calibration_config, keys.protocol), keys.model_config, attempt)


def request(work: Work, model: ModelConfig, attempt: int) -> Estimate:
    """The formulas of the module's docstring."""
    device = "gpu" if model.resources.gpu else "cpu"
    weights = work.copies * work.dtype_bytes * model.parameters
    process = PROCESS_MB if device == "cpu" else GPU_PROCESS_MB
    memory = min(process + (weights + work.kept * BYTES_PER_TOKEN) / 2**20, model.resources.mem_mb)
    seconds = (
        START_SECONDS
        + weights / READ_BYTES_PER_SECOND
        + work.tokens * 2 * model.parameters / FLOPS[device]
        + work.steps * STEP_SECONDS
        + work.quantized * model.parameters * SECONDS_PER_WEIGHT[device]
    )
    return Estimate(
        mem_mb=MEMORY_STEP_MB * math.ceil(memory * MEMORY_GROWTH ** (attempt - 1) / MEMORY_STEP_MB),
        minutes=math.ceil(MARGIN * seconds * TIME_GROWTH ** (attempt - 1) / 60),
    )


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _quantize(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    tokens = calibration.sequences * calibration.length
    return Work(copies=2, kept=tokens, tokens=5 * tokens, quantized=True)


def _tokenize(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return Work(copies=0)


def _windows(parts: tuple, models: int) -> Work:
    """Token windows through `models` models, one after the other; loading makes a second copy for a while."""
    tokens = sum(WHOLE_TEXT if part.windows is None else part.windows * part.window for part in parts)
    return Work(copies=2, dtype_bytes=max(_bytes(part.dtype) for part in parts), tokens=models * tokens)


def _perplexity(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows(protocol.perplexity, 1)


def _gate(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows(protocol.gate.points(protocol.gated), 1)


def _routing(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows((protocol.routing,), 2)


def _shift(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return _windows((protocol.shift,), 4)


def _cka(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    return Work(copies=1, dtype_bytes=4, tokens=WHOLE_TEXT)  # pairs of experts of one block after the other


def _requests(task: str, limit: int | None) -> int:
    """Requests of a task, of which at most `limit` items are scored (of MMLU: of each subject)."""
    items = MMLU_SUBJECTS if task == "mmlu" else 1
    whole = REQUESTS.get(task, OTHER_REQUESTS)
    return whole if limit is None else min(whole, limit * items * CHOICES)


def _tasks(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.tasks
    requests = sum(_requests(task, part.limit) for task in part.tasks)
    return Work(copies=2, dtype_bytes=_bytes(part.dtype), tokens=requests * min(REQUEST_TOKENS, part.max_length))


def _hard(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.hard
    tokens, steps = 0, 0
    for task in part.tasks:
        requests = _requests(task.name, task.limit)
        tokens += requests * min(REQUEST_TOKENS + task.shots * SHOT_TOKENS, part.max_length)
        steps += math.ceil(requests / part.batch_size) * (task.generated_tokens or 0)
    return Work(copies=2, dtype_bytes=_bytes(part.dtype), tokens=tokens, steps=steps)


def _generations(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    part = protocol.generations
    return Work(copies=2, dtype_bytes=_bytes(part.dtype), steps=PROMPTS * part.max_new_tokens)


def _code_samples(calibration: Calibration, protocol: ProtocolConfig) -> Work:
    """A problem is a prompt for each way of generating; its programs are the rows of one batch."""
    part = protocol.code
    problems = sum(PROBLEMS[dataset.name] if dataset.limit is None else dataset.limit for dataset in part.datasets)
    runs = problems * len(part.modes)
    programs = problems * sum(part.modes.values())
    return Work(
        copies=2,
        dtype_bytes=_bytes(part.dtype),
        tokens=programs * min(REQUEST_TOKENS, part.max_length),
        steps=runs * part.max_new_tokens,
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
    return Work(copies=2, dtype_bytes=_bytes(part.dtype), steps=RUNNERS * settings * (part.decode + part.repetitions))


#: kind of job → what it does under a calibration and a protocol
WORK: dict[str, Callable[[Calibration, ProtocolConfig], Work]] = {
    "quantize": _quantize,
    "calibrate": _tokenize,
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
