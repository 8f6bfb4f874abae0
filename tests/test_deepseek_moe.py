"""DeepSeekMoE in-tree: the hub's files and names, and the published architecture written out in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, EXPERTS, TOP_K, make_model, random_tokens, save_model
from torch import Tensor, nn

import mobie
from mobie.config import load_method
from mobie.errors import UnsupportedError
from mobie.hf.deepseek_config import DeepseekMoeConfig
from mobie.models import OWN_FILES
from mobie.packing.checkpoint import load_model
from mobie.pipeline import quantize

TOKENS = random_tokens(2, 9, seed=5)
#: entries of the published config.json that are not the shapes
HUB_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "model_type": "deepseek",
    "moe_intermediate_size": 20,
    "moe_layer_freq": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 48,
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hub_folder(folder: Path) -> Path:
    """A folder as on the hub: its config.json, one tensor per expert and projection, and code that must not run."""
    save_model(make_model("deepseek"), folder)
    (folder / "config.json").write_text(json.dumps(HUB_CONFIG))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text("raise SystemExit('code of the folder was run')\n")
    return folder


def load_whole(folder: Path) -> nn.Module:
    """The library's model in float32; every parameter comes from the files."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options, **OWN_FILES)
    assert not any(info.values())
    return model


def hub_names() -> set[str]:
    """Names of the tensors in the published files, for two blocks."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(2):
        block = f"model.layers.{layer}."
        names |= {f"{block}self_attn.{p}_proj.weight" for p in "qkvo"}
        names |= {f"{block}input_layernorm.weight", f"{block}post_attention_layernorm.weight"}
    projections = ("gate_proj", "up_proj", "down_proj")
    names |= {f"model.layers.0.mlp.{p}.weight" for p in projections}
    names |= {f"model.layers.1.mlp.shared_experts.{p}.weight" for p in projections}
    names |= {f"model.layers.1.mlp.experts.{e}.{p}.weight" for e in range(EXPERTS) for p in projections}
    return names | {"model.layers.1.mlp.gate.weight"}


def test_hubs_files_are_read_by_their_own_names_and_no_code_beside_them_runs(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == hub_names()
    model = load_whole(folder)
    assert type(model).__name__ == "DeepseekMoeForCausalLM"
    original = make_model("deepseek")
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())


def test_expert_of_a_file_is_that_expert_of_the_model(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"][:] = 7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fused = load_whole(folder).model.layers[1].mlp.experts.gate_up_proj
    assert bool((fused[4, 20:] == 7).all()) and int((fused == 7).sum()) == 20 * 32


def test_import_of_mobie_is_enough_and_brings_no_torch(tmp_path: Path) -> None:
    code = """
import sys
import mobie
assert not {"torch", "transformers"} & set(sys.modules), "heavy imports"
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    command = [sys.executable, "-c", code, str(hub_folder(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(mobie.__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "DeepseekMoeForCausalLM\n"


def test_importing_what_the_class_is_made_of_comes_to_no_circle() -> None:
    code = """
import mobie, transformers.models.llama.modeling_llama
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("deepseek", hidden_size=8, num_hidden_layers=1, intermediate_size=4, vocab_size=4,
    num_attention_heads=2, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=4)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(mobie.__file__).parents[1], check=False)
    assert done.stdout == "DeepseekMoeForCausalLM\n", done.stderr


def test_packed_checkpoint_of_a_hub_folder_names_no_code(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, out = hub_folder(tmp_path / "source"), tmp_path / "out"
    quantize(folder, load_method("rtn-w4").build(), random_tokens(1, 8), out, fingerprint="job")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))
    with torch.no_grad():
        expected = load_model(out)[0](TOKENS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(TOKENS).logits, expected)


# ---- the published architecture --------------------------------------------------------------------------------------


def by_definition(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of one sequence `(length,)` in float64, from the parameters by their names and the configuration."""
    config, get = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    length, heads = len(ids), config.num_attention_heads
    size = config.hidden_size // heads
    angle = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, size, 2).double() / size))
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return get[name] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotate(x: Tensor) -> Tensor:  # (length, size)
        return x * cos + torch.cat([-x[:, size // 2 :], x[:, : size // 2]], 1) * sin

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        z = gate @ x
        return down @ (z / (1 + torch.exp(-z)) * (up @ x))

    def attention(x: Tensor, block: str) -> Tensor:
        out = []
        for h in range(heads):
            rows = slice(h * size, (h + 1) * size)
            q, k, v = (x @ get[f"{block}.self_attn.{p}_proj.weight"][rows].T for p in "qkv")
            scores = rotate(q) @ rotate(k).T / size**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v)
        return torch.cat(out, 1) @ get[f"{block}.self_attn.o_proj.weight"].T

    def experts(x: Tensor, block: str) -> Tensor:  # one token
        exponentials = torch.exp(get[f"{block}.mlp.gate.weight"] @ x)
        score = exponentials / exponentials.sum()
        chosen = sorted(range(EXPERTS), key=lambda e: -float(score[e]))[: config.num_experts_per_tok]
        total = sum(score[e] for e in chosen) if config.norm_topk_prob else 1.0
        fused, down = get[f"{block}.mlp.experts.gate_up_proj"], get[f"{block}.mlp.experts.down_proj"]
        width = config.moe_intermediate_size
        result = sum(score[e] / total * mlp(x, fused[e, :width], fused[e, width:], down[e]) for e in chosen)
        if config.n_shared_experts:
            names = ("gate_proj", "up_proj", "down_proj")
            result = result + mlp(x, *(get[f"{block}.mlp.shared_experts.{n}.weight"] for n in names))
        return result

    x = get["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        x = x + attention(norm(x, f"{block}.input_layernorm.weight"), block)
        y = norm(x, f"{block}.post_attention_layernorm.weight")
        if i >= config.first_k_dense_replace and i % config.moe_layer_freq == 0:
            x = x + torch.stack([experts(token, block) for token in y])
        else:
            names = ("gate_proj", "up_proj", "down_proj")
            x = x + torch.stack([mlp(token, *(get[f"{block}.mlp.{n}.weight"] for n in names)) for token in y])
    return norm(x, "model.norm.weight") @ get["lm_head.weight"].T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True},
        {"n_shared_experts": None},
        {"num_hidden_layers": 4, "first_k_dense_replace": 0, "moe_layer_freq": 2},
    ],
    ids=str,
)
def test_logits_are_those_of_the_published_definition(changes: dict[str, Any]) -> None:
    model = make_model("deepseek", **changes)
    with torch.no_grad():
        got = model(TOKENS).logits.double()
    expected = torch.stack([by_definition(model, ids) for ids in TOKENS])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.5


def with_experts(model: nn.Module) -> nn.Module:
    return model.model.layers[1].mlp


def test_one_expert_without_shared_ones_is_a_dense_mlp() -> None:
    """The softmax over one expert is 1."""
    block = with_experts(make_model("deepseek", n_routed_experts=1, num_experts_per_tok=1, n_shared_experts=None))
    dense = make_model("deepseek", intermediate_size=20).model.layers[0].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense.gate_proj.weight.copy_(block.experts.gate_up_proj[0, :20])
        dense.up_proj.weight.copy_(block.experts.gate_up_proj[0, 20:])
        dense.down_proj.weight.copy_(block.experts.down_proj[0])
        torch.testing.assert_close(block(x), dense(x))


@pytest.mark.parametrize("normalized", [True, False])
def test_router_between_equal_experts_matters_only_without_normalization(normalized: bool) -> None:
    block = with_experts(make_model("deepseek", norm_topk_prob=normalized))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in (block.experts.gate_up_proj, block.experts.down_proj):
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        before = block(x)
        block.gate.weight.copy_(torch.randn(block.gate.weight.shape, generator=torch.Generator().manual_seed(2)))
        same = torch.allclose(block(x), before, rtol=1e-5, atol=1e-5)
    assert same == normalized


def test_shared_experts_are_added_whatever_the_router_says() -> None:
    block = with_experts(make_model("deepseek"))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        block.experts.down_proj.zero_()
        torch.testing.assert_close(block(x), block.shared_experts(x))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_librarys_ways_to_compute_experts_apply(implementation: str) -> None:
    model = make_model("deepseek")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_cache_gives_the_same_text() -> None:
    model = make_model("deepseek")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(TOKENS, **options), model.generate(TOKENS, use_cache=False, **options))


def test_random_model_has_no_weight_that_was_left_uninitialised() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIGS["deepseek"]())
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        assert float(with_experts(model).get_parameter(name).detach().std()) == pytest.approx(0.02, rel=0.2)


def test_another_score_than_the_softmax_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="scoring_func 'sigmoid', expected 'softmax'"):
        DeepseekMoeConfig(scoring_func="sigmoid")
