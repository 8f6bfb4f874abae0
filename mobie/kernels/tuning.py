"""Tile sizes of the Triton kernels: files of `mobie/kernels/tuning/`, one per GPU, and `default.yaml` for all others.

A file names a part of the GPU's name as the driver gives it (`gpu: H100`), whether its sizes were measured on one, and
the sizes by kernel and shape class; `KERNELS` says which there are. What a GPU's file leaves out is taken from
`default.yaml`. `mobie.kernels.tune` measures and writes such files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch

from mobie.errors import ConfigError, unknown_name
from mobie.parsing import parse_yaml

FOLDER = Path(__file__).parent / "tuning"
DEFAULT = FOLDER / "default.yaml"
#: up to this many tokens (or pairs of a panel) a launch is of the decode kind
DECODE_TOKENS = 64
#: the tensor cores' narrowest second operand
LEAST_TOKENS = 8

_ALL = ("rows", "warps", "stages")  # sizes that every kernel has
#: kernel → shape class → names of its sizes. Grouped kernels: activations, then the tile (pairs of a program, which
#: whoever groups them decides). Others: activations (route: weights), then few or many tokens. `tall`: few tokens and a
#: matrix of very many rows, as the head's, by its codes.
KERNELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "binary_grouped": dict.fromkeys(("16bit-8", "16bit-16", "16bit-64", "int8-8", "int8-16", "int8-64"), _ALL),
    "dense_grouped": dict.fromkeys(("16bit-8", "16bit-16", "16bit-64"), (*_ALL, "block_k")),
    "panel": {
        "16bit-few": (*_ALL, "tokens", "block_k", "slices"),
        "16bit-many": (*_ALL, "tokens", "block_k"),
        "int8-few": (*_ALL, "tokens", "slices"),
        "int8-many": (*_ALL, "tokens"),
        "tall-16bit": (*_ALL, "tokens", "block_k", "slices"),
        "tall-int8": (*_ALL, "tokens", "slices"),
    },
    "binary_linear": {"16bit-few": (*_ALL, "tokens", "slices")},
    "route": dict.fromkeys(
        ("16bit-few", "16bit-many", "float32-few", "float32-many"), (*_ALL, "tokens", "block_k", "slices")
    ),
}
#: least and largest value of each; all but stages are powers of two
LIMITS = {
    "rows": (16, 512),
    "warps": (1, 16),
    "stages": (1, 8),
    "tokens": (LEAST_TOKENS, 256),
    "block_k": (16, 256),
    "slices": (1, 16),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one launch; those that a shape class does not have keep these values.

    rows:    of weights per program.
    warps:   of 32 threads.
    stages:  steps of the main loop in flight; with 1 nothing is loaded ahead.
    tokens:  (or pairs) per program.
    block_k: columns per step; 128, those of one activation scale, where activations may be int8.
    slices:  pieces of a step that different warps multiply. With few tokens memory is the limit: then a program has few
             rows, so that every multiprocessor has one, and its warps share a step's columns instead of its rows.
    """

    rows: int
    warps: int
    stages: int
    tokens: int = 2 * LEAST_TOKENS
    block_k: int = 128
    slices: int = 1

    @classmethod
    def read(cls, value: Any, names: tuple[str, ...], where: str) -> Self:
        """From a file's mapping of exactly `names`; ConfigError where a kernel cannot take it."""
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ConfigError(f"{where}: got {value!r}, expected the keys {', '.join(names)}")
        for name, size in value.items():
            least, most = LIMITS[name]
            powers = name != "stages"
            if type(size) is not int or not least <= size <= most or (powers and size & (size - 1)):
                expected = f"a {'power of two' if powers else 'number'} from {least} to {most}"
                raise ConfigError(f"{where}: {name} is {size!r}, expected {expected}")
        sizes = cls(**value)
        if not sizes.feeds_warps:
            raise ConfigError(
                f"{where}: {sizes.rows} rows for {sizes.warps} warps, expected at least "
                f"{16 * sizes.warps // sizes.slices}: a tensor-core operand has 16 rows per warp"
            )
        return sizes

    @property
    def feeds_warps(self) -> bool:
        """Whether every warp has a tensor-core operand of its own."""
        return self.rows * self.slices >= 16 * self.warps


Key = tuple[str, str]  # kernel, shape class


def shape_classes() -> list[Key]:
    """All shape classes of all kernels."""
    return [(kernel, shape) for kernel, shapes in KERNELS.items() for shape in shapes]


@dataclass(frozen=True)
class Table:
    """One file. gpu: part of the device's name, "any" in the default. sizes: by kernel and shape class."""

    gpu: str
    measured: bool
    sizes: Mapping[Key, Sizes]


def read_table(path: Path) -> Table:
    """Read and check a file of sizes.

    Raises:
        ConfigError: not readable, or not of the form that the head of `default.yaml` describes.
    """
    remedy = "; correct it, or delete it and run `python -m mobie tune`"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a table of tile sizes: {error}{remedy}") from error
    if not isinstance(content, Mapping) or set(content) != {"gpu", "measured", "kernels"}:
        raise ConfigError(f"{path}: expected the keys gpu, measured, kernels{remedy}")
    gpu, measured, kernels = content["gpu"], content["measured"], content["kernels"]
    if not isinstance(gpu, str) or not gpu or not isinstance(measured, bool):
        raise ConfigError(f"{path}: gpu is {gpu!r}, measured {measured!r}; expected a name, and true or false{remedy}")
    try:
        return Table(gpu, measured, dict(_read_sizes(kernels, path)))
    except ConfigError as error:
        raise ConfigError(f"{error}{remedy}") from error


def _read_sizes(kernels: Any, path: Path) -> Iterator[tuple[Key, Sizes]]:
    if not isinstance(kernels, Mapping) or not all(isinstance(shapes, Mapping) for shapes in kernels.values()):
        raise ConfigError(f"{path}: kernels is {kernels!r}, expected kernel → shape class → sizes")
    for kernel, shapes in kernels.items():
        if kernel not in KERNELS:
            raise ConfigError(f"{path}: {unknown_name('kernel', str(kernel), KERNELS)}")
        for shape, value in shapes.items():
            names = KERNELS[kernel].get(shape)
            if names is None:
                raise ConfigError(f"{path}: {kernel}: {unknown_name('shape class', str(shape), KERNELS[kernel])}")
            yield (kernel, shape), Sizes.read(value, names, f"{path}: {kernel}, {shape}")


def table_for(gpu: str, folder: Path = FOLDER) -> Table:
    """Sizes for a GPU's name: its file's, and the default's where that has none; the longest matching name wins.

    Raises:
        ConfigError: a file that is no table, or a default that lacks a shape class.
    """
    default = read_table(folder / DEFAULT.name)
    missing = [" ".join(key) for key in shape_classes() if key not in default.sizes]
    if missing:
        raise ConfigError(f"{folder / DEFAULT.name}: no sizes for {', '.join(missing)}; expected all of KERNELS")
    tables = [read_table(path) for path in sorted(folder.glob("*.yaml")) if path.name != DEFAULT.name]
    own = max((t for t in tables if t.gpu.lower() in gpu.lower()), key=lambda t: len(t.gpu), default=default)
    return Table(own.gpu, own.measured, {**default.sizes, **own.sizes})


@functools.cache
def default_table() -> Table:
    """The sizes of a GPU that has no file."""
    return table_for("")


@functools.cache
def _device(index: int | None) -> tuple[Table, int]:
    """Table and number of multiprocessors of a CUDA device; of no GPU (the interpreter), the default and one."""
    if index is None:
        return default_table(), 1
    properties = torch.cuda.get_device_properties(index)
    return table_for(properties.name), properties.multi_processor_count


def device_table(device: torch.device) -> tuple[Table, int]:
    """Table and number of multiprocessors of a device; read once per process."""
    if device.type != "cuda":
        return _device(None)
    return _device(torch.cuda.current_device() if device.index is None else device.index)


_TRIAL: ContextVar[Mapping[Key, Sizes]] = ContextVar("trial", default=MappingProxyType({}))


@contextmanager
def trial(kernel: str, shape: str, sizes: Sizes) -> Iterator[None]:
    """Within it, launches of this shape class take these sizes instead of the table's."""
    token = _TRIAL.set({(kernel, shape): sizes})
    try:
        yield
    finally:
        _TRIAL.reset(token)


def sizes_for(kernel: str, shape: str, device: torch.device) -> Sizes:
    """Sizes of a shape class on a device: those of `KERNELS`, by the device's table."""
    return _TRIAL.get().get((kernel, shape)) or device_table(device)[0].sizes[kernel, shape]


def grouped_sizes(kernel: str, shape: str, device: torch.device, *, rows: int, copies: int) -> Sizes:
    """Sizes for a launch of a grouped kernel: a matrix of `rows` rows, multiplied `copies` times."""
    return fit_rows(sizes_for(kernel, shape, device), rows, copies, device_table(device)[1])


def few_or_many(tokens: int) -> str:
    """End of a shape class's name, for a number of tokens."""
    return "few" if tokens <= DECODE_TOKENS else "many"


def shape_class(activations: str, tile: int) -> str:
    """Shape class of a grouped kernel: activations and the nearest tile of 8, 16 and 64 that holds it."""
    return f"{activations}-{next((known for known in (8, 16) if tile <= known), 64)}"


def fit_tokens(sizes: Sizes, tokens: int) -> Sizes:
    """No more tokens per program than few tokens fill."""
    if tokens > DECODE_TOKENS:
        return sizes
    return replace(sizes, tokens=min(sizes.tokens, max(LEAST_TOKENS, 1 << (tokens - 1).bit_length())))


def fit_rows(sizes: Sizes, rows: int, copies: int, multiprocessors: int) -> Sizes:
    """Halve the rows per program while the matrix fills only half of them or a multiprocessor would have no program.

    Args:
        rows: of a matrix, which is multiplied `copies` times in a launch.
    """
    size = sizes.rows
    while size > 16 * sizes.warps and (2 * rows <= size or -(-rows // size) * copies < multiprocessors):
        size //= 2
    return replace(sizes, rows=size)
