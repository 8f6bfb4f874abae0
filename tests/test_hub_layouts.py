"""What the hub's folders of the newer architectures hold, and what of it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, EXPERTS, HIDDEN, WIDTH, make_model, save_model

from mobie.models.base import Adapter
from mobie.models.weights import StreamedModel

#: architecture → names as published of one expert's tensors, `{e}` for the expert
EXPERT_NAMES = {
    "mixtral": (
        "block_sparse_moe.experts.{e}.w1",
        "block_sparse_moe.experts.{e}.w3",
        "block_sparse_moe.experts.{e}.w2",
    ),
}
USUAL = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj")


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name != "gpt_oss"])
def test_experts_of_the_hubs_files_are_those_of_the_bank(model_type: str, tmp_path: Path) -> None:
    """GPT-OSS has all experts in one tensor; test_mxfp4.py has its files."""
    save_model(make_model(model_type), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    streamed, adapter = StreamedModel(tmp_path), Adapter(model_type)
    with streamed.block(1) as block:
        bank = adapter.expert_bank(block)
        for name, published in zip(("gate", "up", "down"), EXPERT_NAMES.get(model_type, USUAL), strict=True):
            for e in range(EXPERTS):
                stored = tensors[f"model.layers.1.{published.format(e=e)}.weight"]
                assert torch.equal(bank.projections[name][e], stored.float()), (name, e)


def test_layer_for_multi_token_prediction_is_left_unread(tmp_path: Path) -> None:
    """Qwen3-Next's files end with one; its experts are named as those of the other layers."""
    save_model(make_model("qwen3_next"), tmp_path)
    path = tmp_path / "model.safetensors"
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    extra = {
        f"mtp.layers.0.mlp.experts.{e}.{name}.weight": torch.ones(shape).bfloat16()
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }
    extra |= {"mtp.fc.weight": torch.ones(HIDDEN, 2 * HIDDEN).bfloat16(), "mtp.norm.weight": torch.ones(HIDDEN)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as file:
        assert any(name.startswith("mtp.") for name in file.keys())  # noqa: SIM118 (not a dict)
    expected = make_model("qwen3_next")
    streamed = StreamedModel(tmp_path)
    for index, original in enumerate(expected.model.layers):
        with streamed.block(index) as block:
            for name, parameter in block.named_parameters():
                assert torch.equal(parameter, original.get_parameter(name)), name
