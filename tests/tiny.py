"""Tiny random models of every registered architecture, in the library's own classes, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 32
WIDTH = 20
EXPERTS = 6
TOP_K = 3
VOCABULARY = 48

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def _olmoe(**changes: Any) -> Any:
    from transformers import OlmoeConfig

    return OlmoeConfig(**(COMMON | {"intermediate_size": WIDTH, "num_experts": EXPERTS} | changes))


def _qwen3_moe(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig

    own = {"intermediate_size": 40, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "head_dim": 16}
    return Qwen3MoeConfig(**(COMMON | own | {"mlp_only_layers": [0]} | changes))  # the first block is dense


def _mixtral(**changes: Any) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**(COMMON | {"intermediate_size": WIDTH, "num_local_experts": EXPERTS} | changes))


def _qwen2_moe(**changes: Any) -> Any:
    from transformers import Qwen2MoeConfig

    own = {"intermediate_size": 40, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 28}
    return Qwen2MoeConfig(**(COMMON | own | {"num_experts": EXPERTS} | changes))


def _deepseek_v2(**changes: Any) -> Any:
    from transformers import DeepseekV2Config

    own = {"intermediate_size": 40, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "n_shared_experts": 2}
    latent = {"q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
    first_dense = {"first_k_dense_replace": 1, "num_key_value_heads": 4}
    return DeepseekV2Config(**(COMMON | own | latent | first_dense | changes))


def _deepseek(**changes: Any) -> Any:
    from mobie.hf.deepseek_config import DeepseekMoeConfig

    own = {"intermediate_size": 40, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "n_shared_experts": 2}
    return DeepseekMoeConfig(**(COMMON | own | {"first_k_dense_replace": 1, "num_key_value_heads": 4} | changes))


def _qwen3_next(**changes: Any) -> Any:
    """One block with linear attention, one with full attention."""
    from transformers import Qwen3NextConfig

    own = {"moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 28, "num_experts": EXPERTS}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_num_key_heads": 2}
    heads = {"linear_num_value_heads": 4, "head_dim": 16, "full_attention_interval": 2}
    return Qwen3NextConfig(**(COMMON | own | linear | heads | changes))


def _gpt_oss(**changes: Any) -> Any:
    """One block with a window of 4 tokens, one that sees all; gates are clamped at values that occur."""
    from transformers import GptOssConfig

    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 150000.0}
    rope |= {"truncate": False, "original_max_position_embeddings": 4096}
    own = {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "head_dim": 16, "max_position_embeddings": 131072}
    small = {"sliding_window": 4, "swiglu_limit": 1.5, "rope_parameters": rope}
    return GptOssConfig(**(COMMON | own | small | changes))


#: model_type → configuration; every architecture of the registry is expected here
CONFIGS: dict[str, Callable[..., Any]] = {
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "qwen3_next": _qwen3_next,
    "gpt_oss": _gpt_oss,
}


def make_model(model_type: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Model in float32 whose values are bfloat16 numbers; larger weights than the library's, so that logits differ."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type](**changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            start = torch.ones_like(parameter) if "norm" in name else torch.zeros_like(parameter)
            parameter.copy_((start + 0.2 * noise).bfloat16())
    return model


def save_model(model: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model with a tokenizer as a folder that the library loads; the model itself is left as it is."""
    import copy

    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """One token per word `w0` … `w47`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w0")


def experts_by_hand(module: nn.Module) -> dict[str, Tensor]:
    """A fused module's `gate`, `up`, `down` `(experts, out, in)` and their `_bias` `(experts, out)` in float64."""
    gate_up, down = module.gate_up_proj.detach().double(), module.down_proj.detach().double()
    experts = len(down)
    if type(module).__name__ == "GptOssExperts":
        both = module.gate_up_proj_bias.detach().double()
        weights = {"gate": gate_up[:, :, 0::2].mT, "up": gate_up[:, :, 1::2].mT, "down": down.mT}
        biases = {"gate_bias": both[:, 0::2], "up_bias": both[:, 1::2]}
        return weights | biases | {"down_bias": module.down_proj_bias.detach().double()}
    weights = {"gate": gate_up[:, : gate_up.shape[1] // 2], "up": gate_up[:, gate_up.shape[1] // 2 :], "down": down}
    return weights | {f"{name}_bias": torch.zeros(experts, w.shape[1]).double() for name, w in weights.items()}


def inner_by_hand(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """What an expert's down projection is given: SwiGLU, in GPT-OSS clamped and shifted, written out."""
    if type(module).__name__ == "GptOssExperts":
        limit = module.limit
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    return gate / (1 + torch.exp(-gate)) * up


def random_tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Token ids `(sequences, length)`."""
    return torch.randint(2, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def starve_experts(model: nn.Module, rare_token: int) -> None:
    """Change an OLMoE in place so that expert 0 gets no token at all and expert 1 exactly the token `rare_token`.

    Channel 0 of the residual stream is large for every token, channel 1 only for `rare_token`; no layer writes to
    either, and only these two decide about experts 0 and 1.
    """
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0], embeddings[:, 1] = 8, 0
        embeddings[rare_token, 1] = 8
        for block in model.model.layers:
            block.post_attention_layernorm.weight[:2] = 1
            block.self_attn.o_proj.weight[:2] = 0
            block.mlp.experts.down_proj[:, :2] = 0
            router = block.mlp.gate.weight
            router[:, :2] = 0
            router[:2] = 0
            router[:2, 0] = -32
            router[1, 1] = 128


class SilentObserver:
    """An experts observer that looks at nothing."""

    def outputs(self, *_: object) -> None:
        pass
