"""A model whose weights stay in its files: blocks are read while they are worked on, so that memory holds one of them.

The library builds the model on the device `meta`, where parameters have shapes and no values. What the files call a
tensor (the hub keeps experts one by one) becomes a parameter by the library's own conversion. Names and shapes of the
whole model are compared with the files' headers before any value is read.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobie.errors import DataError
from mobie.models import OWN_FILES
from mobie.models.base import Adapter, require_finite
from mobie.models.load import model_type
from mobie.models.mxfp4 import conversion_mapping
from mobie.parsing import parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_PIECE = 4 << 20  # bytes; smaller ones are used again at once, and asking the system for them would take longer
OUTSIDE = ""  # stands for what belongs to no block: embeddings, final norm, head


class StreamedModel:
    """The library's model in float32, with the values of at most one block, of what is outside the blocks, or both.

    Its experts run one after the other (`eager`), in the order of sums of the observed experts function: a block read
    back after a kill must pass on the same hidden states, bit for bit, as the block that was observed.
    """

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        """Compare names and shapes of all parameters with the files; reads no values.

        Args:
            folder: local folder of a model that an adapter describes.
            device: where values are put.

        Raises:
            DataError: unreadable files; parameters missing, unexpected or of another shape.
            UnsupportedError: an architecture that no adapter describes.
        """
        _return_large_pieces()
        self.adapter = Adapter(model_type(folder))
        self.folder, self.device = folder, device
        with self._readable():
            self.model = _empty_model(folder, device)
            self._files = _files(folder)
            self._check(self._convert(None))
        self._parts = self._by_part()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks; without values but for those inside `block`."""
        return self.adapter.blocks(self.model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A decoder block with its values, which are freed on leaving."""
        with self._values(self.adapter.block_prefix(index)):
            yield self.blocks[index]

    @contextmanager
    def outside(self) -> Iterator[nn.Module]:
        """The model with the values of everything outside its blocks, which are freed on leaving."""
        with self._values(OUTSIDE):
            yield self.model

    def state_outside(self) -> dict[str, Tensor]:
        """Parameters and buffers that belong to no block, by their names in the model's state dict."""
        return {name: value for name, value in self.model.state_dict().items() if self._part(name) == OUTSIDE}

    @contextmanager
    def _values(self, part: str) -> Iterator[None]:
        empty = self._parameters(part)
        try:
            with self._readable():
                self._convert(self._parts[part])
            if part == OUTSIDE:
                self.model.tie_weights(missing_keys=set(self._tied), recompute_mapping=False)
            for name, parameter in self._parameters(part):
                require_finite(name, parameter)
                parameter.requires_grad_(False)
            yield
        finally:
            for name, parameter in empty:
                module, _, own = name.rpartition(".")
                setattr(self.model.get_submodule(module), own, parameter)
            _return_small_pieces()

    def _parameters(self, part: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters of a block by their names in the model, or those of no block; tied ones under each name."""
        every = self.model.named_parameters(remove_duplicate=False)
        return [(name, parameter) for name, parameter in every if self._part(name) == part]

    def _part(self, name: str) -> str:
        """Prefix of the block that a parameter belongs to."""
        prefix = f"{self.adapter.architecture.blocks}."
        return name[: name.index(".", len(prefix)) + 1] if name.startswith(prefix) else OUTSIDE

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what reading raises into a `DataError` that names the folder and the remedy."""
        from safetensors import SafetensorError

        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(
                f"{self.folder}: the model's weights cannot be read ({error}); expected complete safetensors files and "
                "config.json; delete the folder and fetch the model again"
            ) from error

    def _convert(self, names: Sequence[str] | None) -> Any:
        """Put tensors of the files into the model's parameters, as the library does; returns what it has to say.

        names: tensors in the files; None for all of them, but without values.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            dtype=torch.float32,
            device_map={"": "meta" if names is None else self.device},
            weight_mapping=conversion_mapping(self.model),
        )
        with ExitStack() as stack:
            stack.enter_context(_no_bar())
            found = _headers(self._files) if names is None else self._slices(names, stack)
            info, _ = convert_and_load_state_dict_in_model(self.model, found, config)
        return info

    def _slices(self, names: Sequence[str], stack: ExitStack) -> dict[str, Any]:
        """Tensors of the files, read when they are sliced; the files stay open until `stack` is left."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._files[name]].append(name)
        found: dict[str, Any] = {}
        for path, inside in by_file.items():
            file = stack.enter_context(safe_open(path, "pt"))
            found |= {name: file.get_slice(name) for name in inside}
        return found

    def _check(self, info: Any) -> None:
        """Refuse files that do not hold exactly the model's parameters."""
        self.model._adjust_missing_and_unexpected_keys(info)  # what the library's class says may be absent or more
        tied = self.model.all_tied_weights_keys
        self._tied = {n for pair in tied.items() for n in pair if n in info.missing_keys}
        covered = {n for pair in tied.items() if not set(pair) <= info.missing_keys for n in pair}
        wrong = {
            "missing_keys": info.missing_keys - covered,
            "unexpected_keys": info.unexpected_keys,
            "mismatched_keys": info.mismatched_keys | set(info.conversion_errors.items()),
        }
        told = {key: sorted(map(str, names)) for key, names in wrong.items() if names}
        if told:
            raise DataError(
                f"{self.folder}: {told}; expected exactly the model's own parameters; fetch the model again"
            )

    def _by_part(self) -> dict[str, list[str]]:
        """Tensors in the files by the block of the parameter that they become."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        parts: dict[str, list[str]] = defaultdict(list)
        for name in self._files:
            renamed, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, known)
            if renamed not in known and name in known:
                renamed = name
            if renamed in known:  # else one that the library's class leaves unread
                parts[self._part(renamed)].append(name)
        return parts


def _return_large_pieces() -> None:
    """Let the C library return every large piece of memory when it is freed.

    By itself it learns from what is freed to keep larger and larger pieces, and peaks come to hang on how they fit.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # glibc
        set_option(M_MMAP_THRESHOLD, LARGE_PIECE)


def _return_small_pieces() -> None:
    """Let the C library return freed memory; what was freed in small pieces it would keep for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def _empty_model(folder: Path, device: torch.device) -> nn.Module:
    """The library's model with parameters on `meta` and real buffers (rotary frequencies)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, **OWN_FILES)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor: of the only file, or of those that the index lists."""
    from safetensors import safe_open

    paths = [folder / SINGLE]
    if not paths[0].exists() and (folder / INDEX).exists():
        names = sorted(set(parse_json((folder / INDEX).read_bytes())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{INDEX} lists files of other folders")
        paths = [folder / name for name in names]
    found: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _headers(files: dict[str, Path]) -> dict[str, Tensor]:
    """Every tensor of the files on the device `meta`."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            found |= {n: torch.empty(file.get_slice(n).get_shape(), device="meta") for n in file.keys()}  # noqa: SIM118
    return found


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the library's progress bar, one for every block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
