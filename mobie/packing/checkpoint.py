"""A quantized model on disk, and back: the folder is self-contained and everything that is scored is read from it.

block-000.safetensors …   packed tensors of one decoder block; how to read them stands in the metadata
kept.safetensors          everything that stays in 16 bits: embeddings, norms, head, router
manifest.json             format version, fingerprint of the job, files with their sha256
config.json, tokenizer …  what makes it a folder that the library loads (`packing.folder`)

Tensors are named as in the state dict of the model whose modules hold packed weights (`mobie.hf.modules`):

    model.layers.0. self_attn.q_proj. plain__signs          a Linear, or a quantized router
    model.layers.0. mlp.experts. gate__ experts__plain__signs     experts, by projection

Beside them, every parameter that packed weights replace is there under its own name, without elements: a program that
does not know the format, and would fill what it misses with random values, meets a shape that does not fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mobie.errors import DataError, unknown_name
from mobie.models import OWN_FILES
from mobie.models.experts import EXPERT_PARAMETERS
from mobie.packing import bank, binary, dense, grid, partial_binary, planes, vector  # noqa: F401 (registers the formats)
from mobie.packing.base import FORMATS, Packed
from mobie.packing.dense import Dense16
from mobie.parsing import parse_json
from mobie.sealed import SEAL, content_digest
from mobie.storage import atomic_write, no_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: 1: names of its own, no index; 2: names of the swapped model's state dict, a folder that the library loads
FORMAT_VERSION = 2
KEPT = "kept.safetensors"
MANIFEST = "manifest.json"
THREADS_FROM = 1 << 28  # bytes; below, threads do not pay
METADATA = "mobie"  # name of the one metadata entry of a safetensors file
QUANTIZE_AGAIN = "quantize again with this version"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


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


def tensor_name(part: str, tensor: str) -> str:
    """Name of a packed weight's tensor as a module's buffer: a buffer's name has no dots."""
    return (f"{part}.{tensor}" if part else tensor).replace(".", "__")


@dataclass(frozen=True)
class BlockNames:
    """Where a block stands in the model.

    prefix:  of its parameters in the state dict, `model.layers.0.`.
    experts: name of its experts module, `mlp.experts`.
    """

    prefix: str
    experts: str

    @classmethod
    def of(cls, adapter: Any, index: int) -> BlockNames:
        """Names of block `index` of an architecture."""
        return cls(adapter.block_prefix(index), adapter.architecture.experts)

    def tensors(self, part: str) -> str:
        """What the names of a part's tensors begin with; parts are named as by `PackedBlock.parts`."""
        kind, _, rest = part.partition(".")
        return f"{self.prefix}{rest}." if kind == "linears" else f"{self.prefix}{self.experts}.{rest}__"

    def replaced(self, formats: Mapping[str, str]) -> set[str]:
        """Parameters of the library's model that parts in these formats stand for, and that are therefore not stored.

        A Linear in 16 bits is stored as the parameter that it is.
        """
        names = {
            f"{self.tensors(part)}weight"
            for part, form in formats.items()
            if part.startswith("linears.") and form != Dense16.format
        }
        if any(part.startswith("experts.") for part in formats):
            names |= {f"{self.prefix}{self.experts}.{parameter}" for parameter in EXPERT_PARAMETERS}
        return names


def block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:03d}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically; `metadata` are JSON values.

    They go into one entry of the file's metadata: safetensors writes several in no fixed order, and equal contents
    shall give equal bytes. The content's hash is among them.

    Raises:
        StorageError: the file cannot be written (disk full, read-only folder).
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sealed = dict(metadata) | {SEAL: content_digest(whole, metadata)}
    entry = {METADATA: json.dumps(sealed, sort_keys=True, separators=(",", ":"))}
    with atomic_write(path) as temporary:
        try:
            save_file(whole, temporary, metadata=entry)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path, *, values: bool = True, verify: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    values: False reads the file's header only and gives tensors on the device `meta`.
    verify: compare the content with its hash; for files that no manifest lists yet.

    Raises:
        DataError: the file is missing, truncated or not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(parse_json((file.metadata() or {})[METADATA]))
            read = file.get_tensor if values else lambda name: _without_values(file.get_slice(name))
            tensors = {name: read(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        seal = metadata.pop(SEAL, None)  # files of earlier versions have none
        if verify and (found := content_digest(tensors, metadata)) != seal:
            raise ValueError(f"its content has the sha256 {found}, expected {seal} as written in it")
        return tensors, metadata
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        if no_memory(error):  # the file may be whole
            raise MemoryError(f"{path}: no memory left to read it") from error
        raise DataError(
            f"{path}: not a readable safetensors file of this project ({error}); expected a complete file; delete it "
            "and run the same command again, it is made anew"
        ) from error


def _without_values(stored: Any) -> Tensor:
    return torch.empty(stored.get_shape(), dtype=DTYPES[stored.get_dtype()], device="meta")


def read_fingerprint(path: Path) -> str:
    """Fingerprint of the job that wrote a file. Raises `DataError` like `read_tensors`."""
    return str(read_tensors(path, values=False)[1].get("fingerprint"))


@dataclass(frozen=True)
class Shard:
    """One block as read from disk: packed weights, fingerprint of the job that wrote it, what that job noted.

    replaced: parameters of the library's model that are in the file by name, without elements.
    """

    block: PackedBlock
    fingerprint: str
    details: dict[str, Any]
    replaced: frozenset[str] = frozenset()


def save_block(path: Path, block: PackedBlock, fingerprint: str, details: Mapping[str, Any], names: BlockNames) -> None:
    """Write one block's shard; `details` are JSON values about how it came about, free of timings."""
    parts = block.parts()
    headers = {name: {"format": part.format, "header": part.header()} for name, part in parts.items()}
    tensors = {
        names.tensors(name) + tensor_name("", key): tensor
        for name, part in parts.items()
        for key, tensor in part.tensors().items()
    }
    replaced = names.replaced({name: part.format for name, part in parts.items()})
    tensors |= {name: torch.empty(0, dtype=torch.uint8) for name in sorted(replaced)}
    where = {"block": names.prefix, "experts": names.experts}
    save_tensors(path, tensors, {"details": details, "fingerprint": fingerprint, "headers": headers, "names": where})


def load_block(path: Path, *, values: bool = True, verify: bool = False) -> Shard:
    """Read one block's shard; `values` and `verify` as in `read_tensors`.

    Raises:
        DataError: the file is missing or damaged, or holds a format that this version does not know.
    """
    tensors, metadata = read_tensors(path, values=values, verify=verify)
    if "names" not in metadata:
        raise DataError(f"{path}: a shard of format version 1, expected {FORMAT_VERSION}; {QUANTIZE_AGAIN}")
    try:
        return _shard(path, tensors, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{path}: its header is not that of its tensors ({error!r}); expected a file as it was written; delete it "
            "and run the same command again, it is made anew"
        ) from error


def _shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Shard:
    """The packed parts of a file; a `KeyError` or the like where the metadata are of another form."""
    names = BlockNames(metadata["names"]["block"], metadata["names"]["experts"])
    replaced = names.replaced({name: entry["format"] for name, entry in metadata["headers"].items()})
    linears: dict[str, Packed] = {}
    experts: dict[str, Packed] = {}
    for name, entry in metadata["headers"].items():
        if entry["format"] not in FORMATS:
            raise DataError(
                f"{path}: {unknown_name('format', entry['format'], FORMATS)}; install a newer version of mobie"
            )
        prefix = names.tensors(name)
        own = {
            key.removeprefix(prefix).replace("__", "."): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix) and key not in replaced
        }
        packed = FORMATS[entry["format"]].from_tensors(entry["header"], own)
        kind, _, rest = name.partition(".")
        (linears if kind == "linears" else experts)[rest] = packed
    return Shard(PackedBlock(linears, experts), metadata["fingerprint"], metadata["details"], frozenset(replaced))


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


def weight_files(folder: Path, blocks: int) -> list[Path]:
    """The safetensors files of a checkpoint of so many decoder blocks."""
    return [*(block_path(folder, index) for index in range(blocks)), folder / KEPT]


def save_manifest(
    folder: Path,
    fingerprint: str,
    model_type: str,
    blocks: int,
    router_quantized: bool,
    side_files: Iterable[Path] = (),
) -> None:
    """Write `manifest.json` last: a folder that has one is complete. `side_files` decide what the model does, too."""
    files = sorted([*weight_files(folder, blocks), *side_files])
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


def check_version(version: Any, where: str) -> None:
    """Raise DataError for a format version other than this one; `where` names the file."""
    if type(version) is not int or version < FORMAT_VERSION:
        raise DataError(
            f"{where}: format version {version}, which this version no longer reads (expected {FORMAT_VERSION}); "
            f"{QUANTIZE_AGAIN}"
        )
    if version > FORMAT_VERSION:
        raise DataError(
            f"{where}: format version {version}, this version reads up to {FORMAT_VERSION}; "
            "install a newer version of mobie"
        )


def read_manifest(folder: Path, *, files: bool = True, weights: bool = True) -> dict[str, Any]:
    """Read and check `manifest.json`: version, and the sha256 of every file it lists.

    files:   False compares no file.
    weights: False leaves out the weight files, which take time to read.

    Raises:
        DataError: the manifest is not readable or of another version, or a file is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_bytes())
        version = manifest["format_version"]
        listed = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a readable manifest ({error}); expected a finished checkpoint; run the quantize rule again, "
            "or fetch the whole folder again"
        ) from error
    check_version(version, str(path))
    if files:
        chosen = {name: sha for name, sha in listed.items() if weights or not name.endswith(".safetensors")}
        _check_files(folder, chosen)
    return manifest


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name) < 200


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise DataError for a file whose sha256 is another, or a name that leads out of the folder."""
    strange = next((name for name in digests if not _is_file_name(name)), None)
    if strange is not None:
        raise DataError(
            f"{folder / MANIFEST}: lists {strange!r}, expected names of files in its folder; {QUANTIZE_AGAIN}"
        )
    for (name, expected), got in zip(digests.items(), _digests([folder / name for name in digests]), strict=True):
        if got != expected:
            raise DataError(
                f"{folder / name}: sha256 {got}, expected {expected}; delete the file and run the quantize rule "
                "again, or fetch it again"
            )


def _digests(files: list[Path]) -> list[str]:
    """sha256 of each file, or "no file"; in threads where there is much to read.

    Python waits for ever for a thread that finds no memory to start with: none is started without need.
    """

    def digest(file: Path) -> str:
        return file_digest(file) if file.exists() else "no file"

    if sum(file.stat().st_size for file in files if file.exists()) < THREADS_FROM:
        return [digest(file) for file in files]
    with ThreadPoolExecutor() as pool:  # hashing holds the interpreter's lock for moments only
        return list(pool.map(digest, files))


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a checkpoint stores, dequantized into the library's own class, and its tokenizer.

    Raises:
        DataError: a file is damaged, or the files do not hold exactly the model's parameters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mobie.models.base import Adapter

    manifest = read_manifest(folder)
    try:
        config = AutoConfig.from_pretrained(folder, **OWN_FILES)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: not a readable config.json ({error}); expected the model's own; run the quantize rule again"
        ) from error
    del config.quantization_config  # what is built here is an ordinary model
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    adapter = Adapter(manifest["model_type"])
    kept, _ = read_tensors(folder / KEPT)
    filled = set(kept) | set(model.all_tied_weights_keys)
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
    return model.eval(), AutoTokenizer.from_pretrained(folder, **OWN_FILES)
