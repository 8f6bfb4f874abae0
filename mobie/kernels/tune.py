"""Measure tile sizes on the GPU at hand and write its file for `mobie.kernels.tuning`.

A case is one projection of Qwen1.5-MoE's size with random bits. Its banks are used in turn, more bytes than any cache
holds, so that weights come from memory as in a model. The time is the median of launches between CUDA events.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mobie.errors import UnsupportedError
from mobie.kernels import tuning
from mobie.kernels.layout import BinaryBank, Groups
from mobie.kernels.tuning import Choice
from mobie.storage import write_text

EXPERTS, PARTS, ROWS, COLUMNS, EXTRA = 60, 2, 1408, 2048, 128
CHOSEN = 4  # experts per token
ROTATED_BYTES = 256e6
WARM_UP, REPEATS = 5, 30
#: shape class → tokens of the case
TOKENS = {"8": 4, "16": 32, "64": 1024}


@dataclass(frozen=True)
class Measured:
    """microseconds: median of one launch; None where the sizes do not fit the GPU."""

    shape: str
    choice: Choice
    microseconds: float | None


def candidates(tile: int) -> list[Choice]:
    """Sizes that are tried for a tile; at least 16 rows per warp."""
    rows, warps, stages = (64, 128, 256), (4, 8), (1, 2, 3, 4)
    most = 2**15 // 2 if tile < 64 else 2**14  # outputs of a program, so that they fit its registers
    return [Choice(*c) for c in itertools.product(rows, warps, stages) if c[0] >= 16 * c[1] and c[0] * tile <= most]


def tune(folder: Path = tuning.FOLDER, say: Callable[[str], None] = print, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Measure `binary_grouped` on the present GPU and write the GPU's file into `folder`.

    Args:
        say: is given one line per shape class.

    Raises:
        UnsupportedError: no NVIDIA GPU here, or Triton runs its interpreter.
    """
    gpu = _gpu()
    best = {}
    for activations, tile in itertools.product(("16bit", "int8"), (8, 16, 64)):
        shape = tuning.shape_class(activations, tile)
        results = sorted(measure(activations, tile, dtype), key=lambda m: m.microseconds or float("inf"))
        if not results or results[0].microseconds is None:
            say(f"{shape}: none of the candidates fits this GPU; the default stays")
            continue
        best[shape] = results[0]
        say(f"{shape}: {results[0].choice} {results[0].microseconds:.1f} us, {bandwidth(results[0]):.0f} GB/s of bits")
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.yaml"
    write_text(path, as_yaml(gpu, best, dtype))
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


def bandwidth(measured: Measured) -> float:
    """GB/s at which a decode case reads the signs of the distinct experts: most it can be, all pairs apart."""
    tokens = TOKENS[measured.shape.split("-")[1]]
    return min(EXPERTS, tokens * CHOSEN) * PARTS * ROWS * COLUMNS / 8 / (measured.microseconds or 1) / 1e3


def as_yaml(gpu: str, best: dict[str, Measured], dtype: torch.dtype) -> str:
    """Text of a GPU's file."""
    sizes = {shape: asdict(measured.choice) for shape, measured in best.items()}
    times = "".join(f"#   {shape}: {m.microseconds:.1f} us\n" for shape, m in best.items())
    head = (
        f"# Measured by `python -m mobie tune`: torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, medians"
        f" of {REPEATS} launches,\n# {EXPERTS} experts of {PARTS} x {ROWS} x {COLUMNS} with {EXTRA} extra columns,"
        f" {CHOSEN} experts per token.\n{times}"
    )
    return head + yaml.safe_dump(
        {"gpu": gpu, "measured": True, "kernels": {"binary_grouped": sizes}}, sort_keys=False, default_flow_style=None
    )


def measure(activations: str, tile: int, dtype: torch.dtype, device: str = "cuda") -> Iterator[Measured]:
    """Time all candidates of a shape class."""
    from triton.runtime.errors import OutOfResources

    from mobie.kernels.triton_ops.binary_grouped import launch

    tokens = TOKENS[str(tile)]
    banks, x, groups = case(tokens, tile, dtype, device)
    out = x.new_empty(tokens * CHOSEN, PARTS, ROWS)
    for choice in candidates(tile):
        turn = itertools.cycle(banks)

        def once(choice: Choice = choice, turn: Iterator[BinaryBank] = turn) -> None:
            launch(next(turn), x, groups, out, CHOSEN, activations == "int8", choice)

        try:
            microseconds: float | None = median_microseconds(once)
        except OutOfResources:
            microseconds = None
        yield Measured(tuning.shape_class(activations, tile), choice, microseconds)


def case(tokens: int, tile: int, dtype: torch.dtype, device: str) -> tuple[list[BinaryBank], Tensor, Groups]:
    """Random banks, x and groups for `tokens` tokens with `CHOSEN` different experts each."""
    from mobie.kernels.twins import group_pairs

    generator = torch.Generator(device).manual_seed(0)
    count = max(2, round(ROTATED_BYTES / (EXPERTS * PARTS * ROWS * COLUMNS / 8)))
    banks = [random_bank(generator) for _ in range(count)]
    x = torch.randn(tokens, COLUMNS, generator=generator, device=device).to(dtype)
    index = torch.rand(tokens, EXPERTS, generator=generator, device=device).topk(CHOSEN).indices
    return banks, x, group_pairs(index, EXPERTS, tile)


def random_bank(generator: torch.Generator) -> BinaryBank:
    """Bits and scales of the case's shape, a row scale per 128 columns."""
    kind = {"generator": generator, "device": generator.device}

    def bits(n: int) -> Tensor:
        return torch.randint(0, 256, (EXPERTS, PARTS, ROWS, n // 8), dtype=torch.uint8, **kind)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(EXPERTS, PARTS, *shape, **kind) + 0.5).half()

    columns = torch.rand(EXPERTS, PARTS, COLUMNS, **kind).argsort(-1)[..., :EXTRA].sort(-1).values.int()
    blocks = COLUMNS // 128
    return BinaryBank(
        signs=bits(COLUMNS),
        row_scale=scales(ROWS, blocks),
        column_scale=scales(COLUMNS),
        extra_signs=bits(EXTRA),
        extra_columns=columns,
        extra_row_scale=scales(ROWS, blocks),
        extra_column_scale=scales(EXTRA),
        columns=COLUMNS,
        block_size=128,
    )


def median_microseconds(launch: Callable[[], None]) -> float:
    """Median time of a launch on the GPU, compiled and warmed up before."""
    for _ in range(WARM_UP):
        launch()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)
