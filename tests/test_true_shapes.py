"""Every model of the paper at its true size, on the device `meta`: numbers of weights and bytes, shapes of experts."""

from __future__ import annotations

import csv
from functools import cache

import pytest
import torch
from torch import nn

import mobie.models.base  # noqa: F401 (makes the model type `deepseek` known)
from mobie.config import config_names, load_model_config
from mobie.models.base import ARCHITECTURES, Adapter
from mobie.models.experts import expert_count, expert_inputs
from mobie.paths import PACKAGE
from mobie.speed.architectures import load_shape

#: a model whose shape is another's
SAME_SHAPE = {"qwen1.5-moe-a2.7b-chat": "qwen1.5-moe-a2.7b"}
MODELS = [name for name in config_names("models") if load_model_config(name).source == "hub"]
#: names in the paper's own tables → ours, where they differ
PAPER_NAMES = {"olmoe-1b-7b": "olmoe-1b-7b-0125", "deepseek-moe-16b-chat": "deepseekmoe-16b-chat"}


@cache
def true_size(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = load_shape(SAME_SHAPE.get(name, name)).build()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def architectures() -> dict[str, dict[str, str]]:
    """Rows of the paper's models by our names."""
    with (PACKAGE / "paper" / "architectures.csv").open() as file:
        return {row["model"].lower(): row for row in csv.DictReader(file)}


def test_every_model_of_the_paper_has_a_config_and_every_architecture_a_model() -> None:
    assert len(MODELS) == 9
    assert {PAPER_NAMES.get(name, name) for name in MODELS} == set(architectures())
    assert {true_size(name).config.model_type for name in MODELS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_a_config_are_those_of_the_true_shape(name: str) -> None:
    found = weights(true_size(name))
    assert found == load_model_config(name).parameters
    assert found == load_shape(SAME_SHAPE.get(name, name)).parameters
    assert found == int(architectures()[PAPER_NAMES.get(name, name)]["parameters"])


@pytest.mark.parametrize("name", MODELS)
def test_experts_have_the_published_shape_and_hold_most_of_what_is_quantized(name: str) -> None:
    model, row = true_size(name), architectures()[PAPER_NAMES.get(name, name)]
    adapter = Adapter(model.config.model_type)
    blocks = adapter.blocks(model)
    sparse = [block for block in blocks if adapter.experts_module(block) is not None]
    assert (len(blocks), len(blocks) - len(sparse)) == (int(row["layers"]), int(row["dense_layers"]))
    hidden, width = int(row["hidden"]), int(row["intermediate"])
    for block in sparse:
        experts = adapter.experts_module(block)
        assert expert_inputs(experts) == {"gate": hidden, "up": hidden, "down": width}
        assert expert_count(experts) == int(row["routed_experts"])
        assert adapter.moe_router(block).top_k == int(row["top_k"])
        assert tuple(adapter.moe_router(block).weight.shape) == (int(row["routed_experts"]), hidden)
    quantized = sum(
        block.get_parameter(parameter).numel()
        for block in blocks
        for parameter in adapter.quantized_parameters(block, router=False)
    )
    assert quantized / sum(map(weights, blocks)) > 0.996  # what is kept is small: routers, norms, biases, convolutions


def expected_bytes(name: str) -> int:
    """Size of the hub's weight files: 16 bits per weight, but for two models."""
    model, config = true_size(name), true_size(name).config
    if name == "gpt-oss-20b":  # experts in MXFP4: for 32 weights 16 bytes and one for the scale
        experts = [block.mlp.experts for block in model.model.layers]
        packed = sum(e.gate_up_proj.numel() + e.down_proj.numel() for e in experts)
        return 2 * (weights(model) - packed) + packed // 32 * 17
    if name == "qwen3-next-80b-a3b":  # and a block for multi-token prediction, with a projection of its own and 3 norms
        full_attention = model.model.layers[config.layer_types.index("full_attention")]
        return 2 * (weights(model) + weights(full_attention) + 2 * config.hidden_size**2 + 3 * config.hidden_size)
    return 2 * weights(model)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_a_config_are_those_of_the_hubs_files(name: str) -> None:
    assert load_model_config(name).bytes == expected_bytes(name)
