"""A quantized model on disk, and back: the folder is self-contained and everything that is scored is read from it.

block-000.safetensors …   packed tensors of one decoder block; how to read them stands in the metadata
kept.safetensors          everything that stays in 16 bits: embeddings, norms, head, router
config.json, tokenizer    as the library wrote them
manifest.json             format version, fingerprint of the job, files with their sha256
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mobie.errors import DataError, unknown_name
from mobie.packing import bank, binary, dense, grid  # noqa: F401 (registers the formats)
from mobie.packing.base import FORMATS, Packed
from mobie.storage import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 1
KEPT = "kept.safetensors"
MANIFEST = "manifest.json"
METADATA = "mobie"  # name of the one metadata entry of a safetensors file


@dataclass(frozen=True)
class PackedBlock:
    """Packed weights of one decoder block: Linears (and a quantized router) by name, experts by projection."""

    linears: Mapping[str, Packed]
    experts: Mapping[str, Packed]

    def parts(self) -> dict[str, Packed]:
        """Everything under one name each: `linears.self_attn.q_proj`, `experts.gate` …"""
        return {f"linears.{n}": p for n, p in self.linears.items()} | {
            f"experts.{n}": p for n, p in self.experts.items()
        }


def block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:03d}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically; `metadata` are JSON values.

    They go into one entry of the file's metadata: safetensors writes several in no fixed order, and equal contents
    shall give equal bytes.

    Raises:
        StorageError: the file cannot be written (disk full, read-only folder).
    """
    entry = {METADATA: json.dumps(metadata, sort_keys=True, separators=(",", ":"))}
    with atomic_write(path) as temporary:
        try:
            save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=entry)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    Raises:
        DataError: the file is missing, truncated or not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable safetensors file of this project ({error}); expected a complete file; delete it "
            "and run the same command again, it is made anew"
        ) from error


@dataclass(frozen=True)
class Shard:
    """One block as read from disk: packed weights, fingerprint of the job that wrote it, what that job noted."""

    block: PackedBlock
    fingerprint: str
    details: dict[str, Any]


def save_block(path: Path, block: PackedBlock, fingerprint: str, details: Mapping[str, Any]) -> None:
    """Write one block's shard; `details` are JSON values about how it came about, free of timings."""
    parts = block.parts()
    headers = {name: {"format": part.format, "header": part.header()} for name, part in parts.items()}
    tensors = {f"{name}:{key}": tensor for name, part in parts.items() for key, tensor in part.tensors().items()}
    save_tensors(path, tensors, {"details": details, "fingerprint": fingerprint, "headers": headers})


def load_block(path: Path) -> Shard:
    """Read one block's shard.

    Raises:
        DataError: the file is missing or damaged, or holds a format that this version does not know.
    """
    tensors, metadata = read_tensors(path)
    by_part: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(":")
        by_part.setdefault(part, {})[key] = tensor
    linears, experts = {}, {}
    for name, entry in metadata["headers"].items():
        if entry["format"] not in FORMATS:
            raise DataError(
                f"{path}: {unknown_name('format', entry['format'], FORMATS)}; install a newer version of mobie"
            )
        packed = FORMATS[entry["format"]].from_tensors(entry["header"], by_part[name])
        kind, _, rest = name.partition(".")
        (linears if kind == "linears" else experts)[rest] = packed
    return Shard(PackedBlock(linears, experts), metadata["fingerprint"], metadata["details"])


@torch.no_grad()
def write_block(adapter: Any, module: nn.Module, block: PackedBlock) -> None:
    """Put the dequantized weights of a packed block into a decoder block of the library's model."""
    for name, packed in block.linears.items():
        module.get_submodule(name).weight.copy_(packed.dequantize())
    if block.experts:
        adapter.write_experts(module, {name: packed.dequantize() for name, packed in block.experts.items()})


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_manifest(folder: Path, fingerprint: str, model_type: str, blocks: int, router_quantized: bool) -> None:
    """Write `manifest.json` last: a folder that has one is complete."""
    files = sorted([*folder.glob("block-*.safetensors"), folder / KEPT])
    manifest = {
        "blocks": blocks,
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files},
        "fingerprint": fingerprint,
        "format_version": FORMAT_VERSION,
        "model_type": model_type,
        "router_quantized": router_quantized,
    }
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check `manifest.json`: version, and that every file is there with its size and sha256."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable manifest ({error}); expected a finished checkpoint; run the quantize rule again"
        ) from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version}, this version reads up to {FORMAT_VERSION}; "
            "install a newer version of mobie"
        )
    for name, expected in files.items():
        file = folder / name
        got = file_digest(file) if file.exists() else "no file"
        if got != expected["sha256"]:
            raise DataError(
                f"{file}: sha256 {got}, expected {expected['sha256']}; delete the file and run the quantize rule again"
            )
    return manifest


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a checkpoint stores, dequantized into the library's own class, and its tokenizer.

    Raises:
        DataError: a file is damaged, or the files do not hold exactly the model's parameters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mobie.models.base import Adapter

    manifest = read_manifest(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: not a readable config.json ({error}); expected the model's own; run the quantize rule again"
        ) from error
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    adapter = Adapter(manifest["model_type"])
    kept, _ = read_tensors(folder / KEPT)
    filled = set(kept)
    for index, module in enumerate(adapter.blocks(model)):
        write_block(adapter, module, load_block(block_path(folder, index)).block)
        names = adapter.quantized_parameters(module, router=manifest["router_quantized"])
        filled |= {adapter.block_prefix(index) + name for name in names}
    outcome = model.load_state_dict(kept, strict=False)
    missing = sorted(set(outcome.missing_keys) - filled)
    if missing or outcome.unexpected_keys:
        raise DataError(
            f"{folder}: parameters missing {missing}, unexpected {sorted(outcome.unexpected_keys)}; expected exactly "
            "the model's own; delete the folder and run the quantize rule again"
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
