"""What makes a checkpoint a folder that the library loads: its configuration, tokenizer and index of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobie.errors import DataError
from mobie.methods.base import Method
from mobie.packing.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    read_tensors,
    save_manifest,
    weight_files,
)
from mobie.storage import atomic_write, write_bytes, write_json

QUANT_METHOD = "mobie"  # value of `quant_method` in config.json
PUBLISHED = ("gpt_oss", "mxfp4")  # a model of which no files in 16 bits exist; read by `models.mxfp4`
CONFIG = "config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})
#: files that a user may edit in a finished folder: how to sample from the model, and what is said about it
EDITABLE = frozenset({GENERATION_CONFIG, CARD})


def refuse_quantized(model_folder: Path) -> None:
    """Raise DataError for a model that is quantized already; GPT-OSS in MXFP4 is as its makers published it."""
    config = _read_config(model_folder)
    found = config.get("quantization_config")
    published = isinstance(found, dict) and (config.get("model_type"), found.get("quant_method")) == PUBLISHED
    if found is not None and not published:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise DataError(
            f"{model_folder / CONFIG}: the model is quantized already (quant_method {method!r}); expected a model in "
            "16 or 32 bits; give the folder of the original model"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def quantization_config(method: Method, blocks: int) -> dict[str, Any]:
    """The entry of `config.json` by which the library finds the quantizer."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "options": method.options,
        "router_quantized": method.quantizes_router,
        "blocks": blocks,
    }


def finish_folder(model_folder: Path, out: Path, model: Any, method: Method, *, fingerprint: str, blocks: int) -> None:
    """Write everything that stands beside the weight files of a checkpoint; the manifest last.

    Args:
        model_folder: the original model, whose configuration and tokenizer are copied.
        out: checkpoint with `blocks` shards and the kept tensors.
        model: the library's model, for what `model_folder` leaves to defaults.
    """
    copied = _copy_side_files(model_folder, out)
    if GENERATION_CONFIG not in {file.name for file in copied}:
        with atomic_write(out / GENERATION_CONFIG) as temporary:
            model.generation_config.save_pretrained(temporary.parent)  # under this very name
    config = _read_config(model_folder) | {"quantization_config": quantization_config(method, blocks)}
    config.pop("auto_map", None)  # names code in the original's folder, which is not copied
    write_json(out / CONFIG, config)
    write_json(out / INDEX, _index(out, blocks))
    side_files = [out / CONFIG, out / INDEX, *(file for file in copied if file.name not in EDITABLE)]
    save_manifest(out, fingerprint, model.config.model_type, blocks, method.quantizes_router, side_files)


def _copy_side_files(model_folder: Path, out: Path) -> list[Path]:
    """Copy tokenizer, generation configuration and other small files as they are; returns the copies."""
    copied = []
    for file in sorted(model_folder.iterdir()):
        if file.suffix not in SIDE_SUFFIXES or file.name in {CONFIG, MANIFEST} or file.name.endswith(".index.json"):
            continue
        write_bytes(out / file.name, file.read_bytes())
        copied.append(out / file.name)
    return copied


def _index(out: Path, blocks: int) -> dict[str, Any]:
    """Which file holds which tensor, in the form that the library reads."""
    size = 0
    where: dict[str, str] = {}
    for file in weight_files(out, blocks):
        tensors, _ = read_tensors(file, values=False)
        where |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": where}
