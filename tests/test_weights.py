"""Weights read block by block against the library's own `from_pretrained`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, save_model
from torch import nn

from mobie.errors import DataError
from mobie.models.base import ARCHITECTURES
from mobie.models.weights import StreamedModel

MODEL_TYPES = sorted(ARCHITECTURES)


def write(model_type: str, folder: Path, *, tied: bool = False, shards: bool = False) -> Path:
    """A hub-shaped folder in bfloat16, in one file or in many small ones."""
    model = make_model(model_type, **({"tie_word_embeddings": True} if tied else {}))
    save_model(model, folder)
    if shards:
        (folder / "model.safetensors").unlink()
        model.bfloat16().save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def reference(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("tied", "shards"), [(False, False), (True, True)])
def test_every_parameter_equals_the_librarys(model_type: str, tied: bool, shards: bool, tmp_path: Path) -> None:
    folder = write(model_type, tmp_path, tied=tied, shards=shards)
    expected = reference(folder)
    streamed = StreamedModel(folder)
    seen = set()
    with streamed.outside():
        for name, value in streamed.state_outside().items():
            assert torch.equal(value, expected.get_parameter(name)), name
            seen.add(name)
    for index in range(len(streamed.blocks)):
        with streamed.block(index) as block:
            for own, parameter in block.named_parameters():
                name = streamed.adapter.block_prefix(index) + own
                assert parameter.dtype == torch.float32 and not parameter.requires_grad
                assert torch.equal(parameter, expected.get_parameter(name)), name
                seen.add(name)
    assert seen == {name for name, _ in expected.named_parameters(remove_duplicate=False)}
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in streamed.model.named_buffers())


def test_values_are_there_only_inside(tmp_path: Path) -> None:
    streamed = StreamedModel(write("olmoe", tmp_path))

    def real() -> set[str]:
        return {name for name, parameter in streamed.model.named_parameters() if not parameter.is_meta}

    assert real() == set()
    with streamed.block(1):
        assert real() == {n for n, _ in streamed.model.named_parameters() if n.startswith("model.layers.1.")}
        with streamed.outside():
            assert real() == {n for n, _ in streamed.model.named_parameters() if not n.startswith("model.layers.0.")}
    assert real() == set()
    with pytest.raises(RuntimeError, match="inside"), streamed.block(0):
        raise RuntimeError("inside")
    assert real() == set()


def damaged(folder: Path, **tensors: Any) -> str:
    """Message for a folder some of whose tensors are replaced (None: left out)."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path) | tensors
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, {"format": "pt"})
    with pytest.raises(DataError) as caught:
        StreamedModel(folder)
    return str(caught.value)


def test_names_and_shapes_are_refused_from_the_headers(tmp_path: Path) -> None:
    source = write("olmoe", tmp_path / "source")

    def message(case: str, **tensors: Any) -> str:
        return damaged(Path(shutil.copytree(source, tmp_path / case)), **tensors)

    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert "missing_keys" in message("a", **{"model.layers.1.self_attn.k_proj.weight": None})
    assert "missing_keys': ['lm_head.weight']" in message("b", **{"lm_head.weight": None})
    assert "unexpected_keys': ['model.extra']" in message("c", **{"model.extra": torch.zeros(2)})
    assert "model.layers.1.mlp.experts.gate_up_proj" in message("d", **{expert: None})
    assert "model.layers.1.mlp.experts.gate_up_proj" in message("e", **{expert: torch.zeros(3, 4)})
    assert "model.norm.weight" in message("f", **{"model.norm.weight": torch.zeros(5)})


def test_a_missing_shard_and_an_index_that_leads_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = write("olmoe", tmp_path / "model", shards=True)
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    outside = entries | {"weight_map": entries["weight_map"] | {"lm_head.weight": "../other.safetensors"}}
    index.write_text(json.dumps(outside))
    with pytest.raises(DataError, match="files of other folders"):
        StreamedModel(folder)
    index.write_text(json.dumps(entries))
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(DataError, match=r"cannot be read.*fetch the model again"):
        StreamedModel(folder)


def test_both_tied_weights_in_the_files_stay_what_they_are(tmp_path: Path) -> None:
    """Files that hold both, with different values, are used as they are, as the library does."""
    from safetensors.torch import load_file, save_file

    folder = write("olmoe", tmp_path, tied=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors | {"lm_head.weight": head}, path, {"format": "pt"})
    streamed = StreamedModel(folder)
    with streamed.outside() as model:
        assert torch.equal(model.lm_head.weight, head.float())
        assert torch.equal(model.get_input_embeddings().weight, head.float() / 2)
