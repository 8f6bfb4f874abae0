"""DeepSeekMoE (model type `deepseek`) from parts of the library: Llama's attention, norms and MLP, fused experts.

    y = Σ_k w_k · expert_k(x) + shared(x)        w = top-k of softmax(W_r x), divided by their sum if so configured

The names of parameters are those of the hub's files (`mlp.gate.weight`, `mlp.shared_experts.gate_proj.weight` …), but
for the experts, which the library's conversion for Qwen2-MoE fuses from `mlp.experts.3.gate_proj.weight` and so on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeMLP, Qwen2MoeTopKRouter
from transformers.utils.output_capturing import OutputRecorder

from mobie.hf.deepseek_config import MODEL_TYPE, DeepseekMoeConfig


class DeepseekMoe(nn.Module):
    """Routed experts and one MLP for all shared experts."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = Qwen2MoeMLP(config, intermediate_size=shared) if shared else None

    def forward(self, hidden: Tensor) -> Tensor:
        """`(batch, length, hidden)` → the same."""
        tokens = hidden.flatten(0, 1)
        _, weights, index = self.gate(tokens)
        result = self.experts(tokens, index, weights).view_as(hidden)
        return result if self.shared_experts is None else result + self.shared_experts(hidden)


class DeepseekMoeDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder block, with experts where the configuration says so."""

    def __init__(self, config: DeepseekMoeConfig, index: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, index)
        self.mlp = DeepseekMoe(config) if config.has_experts(index) else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekMoePreTrainedModel(LlamaPreTrainedModel):
    """What both model classes share."""

    config_class = DeepseekMoeConfig
    _no_split_modules = ["DeepseekMoeDecoderLayer"]  # noqa: RUF012 (the library's own way)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekMoeDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for its decorator in this file, but the experts are another model's

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        parameters: dict[type[nn.Module], list[str]] = {
            Qwen2MoeTopKRouter: ["weight"],
            Qwen2MoeExperts: ["gate_up_proj", "down_proj"],
        }
        for name in parameters.get(type(module), []):
            init.normal_(getattr(module, name), mean=0.0, std=self.config.initializer_range)


class DeepseekMoeModel(DeepseekMoePreTrainedModel, LlamaModel):
    """Llama's model around these blocks."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekMoeForCausalLM(DeepseekMoePreTrainedModel, LlamaForCausalLM):
    """Llama's language model around that."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeepseekMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Make the library's auto classes build the model and read the hub's names; again is no harm."""
    for auto, model in ((AutoModel, DeepseekMoeModel), (AutoModelForCausalLM, DeepseekMoeForCausalLM)):
        known: Any = auto._model_mapping
        if DeepseekMoeConfig not in known:
            auto.register(DeepseekMoeConfig, model)
    if get_checkpoint_conversion_mapping(MODEL_TYPE) is None:
        register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"))


register()
