"""Tile sizes of kernels: files of `mobie/kernels/tuning/`, one per GPU, and `default.yaml` for all others.

A file names a part of the GPU's name as the driver gives it (`gpu: H100`), whether its sizes were measured on one, and
the sizes by kernel and shape class. What a GPU's file leaves out is taken from `default.yaml`. `mobie.kernels.tune`
measures and writes such files.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from mobie.errors import ConfigError

FOLDER = Path(__file__).parent / "tuning"
DEFAULT = FOLDER / "default.yaml"
MOST_ROWS = 512


@dataclass(frozen=True)
class Choice:
    """Sizes of one launch.

    rows:   rows of weights per program, a power of two.
    warps:  of 32 threads, a power of two.
    stages: steps of the main loop in flight; with 1 nothing is loaded ahead.
    """

    rows: int
    warps: int
    stages: int

    @classmethod
    def read(cls, value: Any, where: str) -> Self:
        """From a file's mapping; ConfigError where it is not three sizes that a kernel can take."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise ConfigError(f"{where}: got {value!r}, expected the keys {', '.join(sorted(names))}")
        for name, size in value.items():
            most = {"rows": MOST_ROWS, "warps": 16, "stages": 8}[name]
            powers = name != "stages"
            if type(size) is not int or not 1 <= size <= most or (powers and size & (size - 1)):
                expected = f"a {'power of two' if powers else 'number'} from 1 to {most}"
                raise ConfigError(f"{where}: {name} is {size!r}, expected {expected}")
        choice = cls(**value)
        if choice.rows < 16 * choice.warps:
            raise ConfigError(
                f"{where}: {choice.rows} rows for {choice.warps} warps, expected at least {16 * choice.warps}: "
                "a tensor-core operand has 16 rows per warp"
            )
        return choice


@dataclass(frozen=True)
class Table:
    """One file. gpu: part of the device's name, "any" in the default. sizes: (kernel, shape class) → sizes."""

    gpu: str
    measured: bool
    sizes: Mapping[tuple[str, str], Choice]


def read_table(path: Path) -> Table:
    """Read and check a file of sizes.

    Raises:
        ConfigError: not readable, or not of the form that the head of `default.yaml` describes.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a table of tile sizes: {error}") from error
    if not isinstance(content, Mapping) or set(content) != {"gpu", "measured", "kernels"}:
        raise ConfigError(f"{path}: expected the keys gpu, measured, kernels; write it with `python -m mobie tune`")
    sizes = {
        (kernel, shape): Choice.read(value, f"{path}: {kernel}, {shape}")
        for kernel, shapes in (content["kernels"] or {}).items()
        for shape, value in shapes.items()
    }
    return Table(str(content["gpu"]), bool(content["measured"]), sizes)


def table_for(gpu: str, folder: Path = FOLDER) -> Table:
    """Sizes for a GPU's name: its file's, and the default's where that has none; the longest matching name wins."""
    default = read_table(folder / DEFAULT.name)
    tables = [read_table(path) for path in sorted(folder.glob("*.yaml")) if path.name != DEFAULT.name]
    own = max((t for t in tables if t.gpu.lower() in gpu.lower()), key=lambda t: len(t.gpu), default=default)
    return Table(own.gpu, own.measured, {**default.sizes, **own.sizes})


@functools.cache
def _device(index: int | None) -> tuple[Table, int]:
    """Table and number of multiprocessors of a CUDA device; of no GPU (the interpreter), the default and one."""
    if index is None:
        return table_for(""), 1
    properties = torch.cuda.get_device_properties(index)
    return table_for(properties.name), properties.multi_processor_count


def device_table(device: torch.device) -> tuple[Table, int]:
    """Table and number of multiprocessors of a device; read once per process."""
    if device.type != "cuda":
        return _device(None)
    return _device(torch.cuda.current_device() if device.index is None else device.index)


def shape_class(activations: str, tile: int) -> str:
    """Name of the shape class of `binary_grouped`: activations and the nearest tile of 8, 16 and 64 that holds it."""
    return f"{activations}-{next((known for known in (8, 16) if tile <= known), 64)}"


def binary_grouped_choice(
    device: torch.device, *, activations: str, rows: int, parts: int, tiles: int, tile: int
) -> Choice:
    """Sizes for a launch of `binary_grouped`.

    Args:
        rows, parts: of the bank.
        tiles: number of tiles of pairs, `tile` pairs each.
    """
    table, multiprocessors = device_table(device)
    choice = table.sizes["binary_grouped", shape_class(activations, tile)]
    return fit_rows(choice, rows, parts * tiles, multiprocessors)


def fit_rows(choice: Choice, rows: int, copies: int, multiprocessors: int) -> Choice:
    """Halve the rows per program while the matrix fills only half of them or a multiprocessor would have no program.

    Args:
        rows: of a matrix, which is multiplied `copies` times in a launch.
    """
    size = choice.rows
    while size > 16 * choice.warps and (2 * rows <= size or -(-rows // size) * copies < multiprocessors):
        size //= 2
    return Choice(size, choice.warps, choice.stages)
