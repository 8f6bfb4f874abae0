"""Measure tile sizes on the GPU at hand and write its file for `mobie.kernels.tuning`.

A case is one operation of one decoder block of a model of `mobie.speed.architectures`, with random bits as MoBiE stores
them. Every kernel is searched in the same way, the binary ones and their 16-bit baseline: all combinations of rows,
warps and stages, then each other size of the shape class in turn. A shape class serves all models: what counts is the
geometric mean of its cases' times. Each time is the median of runs of a CUDA graph, between which caches are emptied.
"""

from __future__ import annotations

import datetime
import itertools
import math
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mobie.errors import ConfigError, UnsupportedError, unknown_name
from mobie.kernels import tuning, twins
from mobie.kernels.layout import BinaryTensors, ExpertsLayout, Panel, lay_out_experts, lay_out_linear
from mobie.kernels.tuning import KERNELS, Key, Sizes
from mobie.storage import write_text

#: tile of the grouped kernels → tokens of the case: the paper's batch, the largest of decoding's but one, a prefill
TOKENS = {8: 4, 16: 32, 64: 1024}
FEW, MANY = 4, 1024
WARM_UP_MS, MEASURED_MS = 5, 20
#: sizes that are tried: all combinations of these …
GRID: Mapping[str, tuple[int, ...]] = {"rows": (16, 32, 64, 128, 256), "warps": (4, 8), "stages": (1, 2, 3, 4)}
#: … and then each of these where the shape class has it; few tokens are what a batch has and are not searched
THEN: Mapping[str, tuple[int, ...]] = {"slices": (1, 2, 4, 8), "tokens": (16, 32, 64, 128), "block_k": (32, 64, 128)}
MOST_SUMS = 2**14  # float32 sums of a program, so that they fit its registers


@dataclass(frozen=True)
class Case:
    """One operation on inputs of true shape; `run` starts it."""

    kernel: str
    shape: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Found:
    """Best sizes of a shape class; microseconds: geometric mean over its cases, of these and of the default sizes (None
    where those do not fit the GPU)."""

    sizes: Sizes
    microseconds: float
    default_microseconds: float | None


def tune(
    folder: Path = tuning.FOLDER,
    kernels: Sequence[str] = (),
    say: Callable[[str], None] = print,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Measure on the present GPU and write the GPU's file into `folder`, anew after each shape class.

    Args:
        kernels: names of `tuning.KERNELS`; none: all. Sizes of others stay as they are in the GPU's file.
        say: is given one line per shape class.

    Raises:
        ConfigError: an unknown kernel.
        UnsupportedError: no NVIDIA GPU here, or Triton runs its interpreter.
    """
    from tqdm import tqdm

    for name in kernels:
        if name not in KERNELS:
            raise ConfigError(unknown_name("kernel", name, KERNELS))
    gpu = _gpu()
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.yaml"
    kept = dict(tuning.read_table(path).sizes) if path.exists() else {}
    cases = model_cases("cuda", dtype)
    found: dict[Key, Found] = {}
    classes = [key for key in tuning.shape_classes() if not kernels or key[0] in kernels]
    with tqdm(classes, desc="tune", unit="class", disable=None) as bar:
        for key in bar:
            bar.set_postfix_str(" ".join(key))
            best = search(key, [case.run for case in cases if (case.kernel, case.shape) == key])
            say(told(key, best))
            if best is not None:
                found[key] = best
                write_text(path, as_yaml(gpu, kept, found, dtype))
    return path


def _gpu() -> str:
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "tile sizes are measured on an NVIDIA GPU and torch sees none: run this on the GPU's machine; until then "
            f"{tuning.DEFAULT.name} is used"
        )
    import triton

    if triton.knobs.runtime.interpret:
        raise UnsupportedError("tile sizes cannot be measured while TRITON_INTERPRET is set: start without it")
    return torch.cuda.get_device_name()


# --- search ----------------------------------------------------------------------------------------------------------


def search(key: Key, runs: Sequence[Callable[[], Any]]) -> Found | None:
    """Best sizes of a shape class for all of its cases; None where none of the sizes tried fits the GPU."""
    times: dict[Sizes, float] = {}

    def time_of(sizes: Sizes) -> float:
        if sizes not in times:
            with tuning.trial(*key, sizes):
                times[sizes] = geometric_mean(microseconds(run) for run in runs)
        return times[sizes]

    default = best = tuning.default_table().sizes[key]
    time_of(default)
    for tried in steps(key):
        candidates = [
            replace(best, **dict(zip(tried, values, strict=True))) for values in itertools.product(*tried.values())
        ]
        best = min([best, *filter(can_run, candidates)], key=time_of)
    if math.isinf(times[best]):
        return None
    return Found(best, times[best], None if math.isinf(times[default]) else times[default])


def steps(key: Key) -> Iterator[Mapping[str, tuple[int, ...]]]:
    """What is tried together, step by step: size → values."""
    kernel, shape = key
    yield GRID
    for name, values in THEN.items():
        if name in KERNELS[kernel][shape] and (name != "tokens" or shape.endswith("many")):
            yield {name: values}


def can_run(sizes: Sizes) -> bool:
    """Whether a program's warps all have work and its sums fit the registers."""
    return sizes.feeds_warps and sizes.rows * sizes.tokens * sizes.slices <= MOST_SUMS


def geometric_mean(times: Iterator[float | None]) -> float:
    """Infinite where one of the times is None; those after it are not asked for."""
    logarithms = []
    for time in times:
        if time is None:
            return math.inf
        logarithms.append(math.log(time))
    return math.exp(math.fsum(logarithms) / len(logarithms))


def microseconds(run: Callable[[], Any]) -> float | None:
    """Median time of an operation on the GPU with empty caches; None where its sizes do not fit the GPU.

    As a CUDA graph, as in decoding: what Python needs to start it does not count.
    """
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        run()  # compiles
    except (OutOfResources, PTXASError):
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return do_bench(graph.replay, warmup=WARM_UP_MS, rep=MEASURED_MS, return_mode="median") * 1e3


# --- cases -----------------------------------------------------------------------------------------------------------


def model_cases(device: str, dtype: torch.dtype) -> list[Case]:
    """Cases of all models of `mobie.speed.architectures`, one decoder block with experts of each."""
    from mobie.speed.architectures import NAMES, load_shape

    configs = [load_shape(name).build(num_hidden_layers=2) for name in NAMES]  # DeepSeek's first block has no experts
    return [case for config in configs for case in block_cases(config, device, dtype)]


def block_cases(config: Any, device: str, dtype: torch.dtype) -> list[Case]:
    """Cases of the last decoder block of a configuration, and of its head."""
    from transformers import AutoModelForCausalLM

    from mobie.methods.mobie import MoBiE
    from mobie.models.base import Adapter
    from mobie.speed.random_weights import RandomTensors, random_block

    adapter = Adapter(config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    block = adapter.blocks(model)[-1]
    tensors = RandomTensors(device, 0)
    packed = random_block(adapter, block, MoBiE(), tensors)
    experts, router = block.get_submodule(adapter.architecture.experts), adapter.moe_router(block)
    hidden, top_k = config.hidden_size, router.top_k

    def dense(*shape: int) -> Tensor:
        return tensors.normal(*shape, dtype=dtype)

    layout = lay_out_experts(packed.experts, config.hidden_act)
    weights = dense(*experts.gate_up_proj.shape), dense(*experts.down_proj.shape)
    linears = {linear.shape: lay_out_linear(linear) for linear in packed.linears.values()}
    return [
        *_grouped(layout, *weights, top_k, dense),
        *_bases(layout, top_k, dense),
        *_head(config.vocab_size, hidden, tensors, dense),
        *(_linear(each, dense) for each in linears.values() if isinstance(each, BinaryTensors)),
        *_routes(dense(*router.weight.shape), top_k, dense),
    ]


Dense = Callable[..., Tensor]  # a random 16-bit tensor of a shape


def _grouped(layout: ExpertsLayout, gate_up: Tensor, down: Tensor, top_k: int, dense: Dense) -> Iterator[Case]:
    """Both projections, binary and dense, in decoding and prefill."""
    from mobie.kernels.triton_ops import binary_grouped, dense_grouped

    experts, _, hidden = gate_up.shape
    for tile, tokens in TOKENS.items():
        index = dense(tokens, experts).float().topk(top_k).indices
        groups, pairs = twins.group_pairs(index, experts, tile), tokens * top_k
        for bank, weight, per_row, x in (
            (layout.gate_up, gate_up, top_k, dense(tokens, hidden)),
            (layout.down, down, 1, dense(pairs, down.shape[2])),
        ):
            shape = {"pairs": pairs, "pairs_per_row": per_row}
            for activations in ("16bit", "int8"):
                yield Case(
                    "binary_grouped",
                    tuning.shape_class(activations, tile),
                    _call(binary_grouped, bank, x, groups, activations=activations, **shape),
                )
            yield Case(
                "dense_grouped", tuning.shape_class("16bit", tile), _call(dense_grouped, weight, x, groups, **shape)
            )


def _bases(layout: ExpertsLayout, top_k: int, dense: Dense) -> Iterator[Case]:
    """Shared factors, as `mobie.kernels.experts` multiplies with them in the left form."""
    from mobie.kernels.triton_ops import panel

    gate_up, down = layout.gate_up_basis, layout.down_basis
    assert gate_up is not None and down is not None  # MoBiE's
    for tokens, activations in itertools.product((FEW, MANY), ("16bit", "int8")):
        pairs, how = tokens * top_k, {"activations": activations}
        x, weights = dense(pairs, 2, gate_up.codes.shape[2]), dense(pairs).float()
        both = _call(panel, gate_up, x, epilogue="swiglu", pair_weights=weights, **how)
        yield Case("panel", f"{activations}-{tuning.few_or_many(pairs)}", both)
        reduced = _call(panel, down, dense(pairs, 1, down.codes.shape[2]), reduce=top_k, **how)
        yield Case("panel", f"{activations}-{tuning.few_or_many(tokens)}", reduced)


def _head(vocabulary: int, hidden: int, tensors: Any, dense: Dense) -> Iterator[Case]:
    from mobie.kernels.triton_ops import panel

    x = dense(FEW, 1, hidden)
    codes = tensors.integers(-127, 128, 1, vocabulary, hidden, dtype=torch.int8)
    yield Case("panel", "tall-int8", _call(panel, Panel(codes, tensors.scales(1, vocabulary)), x))
    yield Case("panel", "tall-16bit", _call(panel, Panel(dense(1, vocabulary, hidden)), x))


def _linear(matrix: BinaryTensors, dense: Dense) -> Case:
    from mobie.kernels.triton_ops import binary_linear

    return Case("binary_linear", "16bit-few", _call(binary_linear, matrix, dense(FEW, matrix.columns)))


def _routes(weight: Tensor, top_k: int, dense: Dense) -> Iterator[Case]:
    from mobie.kernels.triton_ops import route

    for tokens, (name, own) in itertools.product((FEW, MANY), {"16bit": weight, "float32": weight.float()}.items()):
        x = dense(tokens, weight.shape[1])
        yield Case("route", f"{name}-{tuning.few_or_many(tokens)}", _call(route, x, own, top_k, normalize=True))


def _call(operation: Callable[..., Any], *inputs: Any, **options: Any) -> Callable[[], Any]:
    return lambda: operation(*inputs, **options)


# --- the file --------------------------------------------------------------------------------------------------------


def told(key: Key, found: Found | None) -> str:
    """One line about a shape class."""
    if found is None:
        return f"{' '.join(key)}: none of the sizes fits this GPU; the default stays"
    before = "do not fit" if found.default_microseconds is None else f"{found.default_microseconds:.1f} us"
    return f"{' '.join(key)}: {found.microseconds:.1f} us; default sizes: {before}"


def as_yaml(gpu: str, kept: Mapping[Key, Sizes], found: Mapping[Key, Found], dtype: torch.dtype) -> str:
    """Text of a GPU's file: what was found now, and kept sizes of other shape classes."""
    sizes = {**kept, **{key: each.sizes for key, each in found.items()}}
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for kernel, shape in filter(sizes.__contains__, tuning.shape_classes()):
        names = KERNELS[kernel][shape]
        kernels.setdefault(kernel, {})[shape] = {name: getattr(sizes[kernel, shape], name) for name in names}
    older = [" ".join(key) for key in kept if key not in found]
    lines = [
        f"Measured by `python -m mobie tune` on {datetime.datetime.now(datetime.UTC).date()}: {gpu}, {dtype},",
        f"{versions()}.",
        "Geometric means over the shapes of the models of mobie/speed/architectures:",
        *(f"  {told(key, each)}" for key, each in found.items()),
        *([f"Kept from an earlier run: {', '.join(older)}"] if older else []),
    ]
    text = yaml.safe_dump({"gpu": gpu, "measured": True, "kernels": kernels}, sort_keys=False, default_flow_style=None)
    return "".join(f"# {line}\n" for line in lines) + text


def versions() -> str:
    """Versions of the driver, Triton and torch."""
    import triton

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return f"driver {driver}, triton {triton.__version__}, torch {torch.__version__}"
