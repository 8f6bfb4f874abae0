"""Configuration of DeepSeekMoE (model type `deepseek`), which the library does not have; as the hub's config.json.

Architecture: D. Dai et al., "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language
Models" (2024). The hub's own code is for an old version of the library and is never run.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from mobie.errors import UnsupportedError

MODEL_TYPE = "deepseek"


class DeepseekMoeConfig(PreTrainedConfig):
    """What Llama's modules ask for, and what a block with experts needs; defaults as in the published class.

    It is no subclass of Llama's configuration: that one cannot be imported while the library's registry is.

    first_k_dense_replace, moe_layer_freq: block i has experts where `i >= first_k_dense_replace` and i is a multiple
        of `moe_layer_freq`; the others are dense, of `intermediate_size`.
    norm_topk_prob: whether the router divides the weights of the chosen experts by their sum.
    n_shared_experts: None or 0 for none; all of them are one MLP of `n_shared_experts · moe_intermediate_size`.
    """

    model_type = MODEL_TYPE
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012 (the library's own way)

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs: Any) -> None:
        """Raises UnsupportedError for another score than the softmax over all experts."""
        import_module("mobie.hf.deepseek_moe")  # registers the classes; not sooner, for they import half the library
        kwargs.pop("auto_map", None)  # names the hub's code
        if self.scoring_func != "softmax":
            raise UnsupportedError(
                f"config.json: scoring_func {self.scoring_func!r}, expected 'softmax', the only one of DeepSeekMoE; "
                "choose another model"
            )
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def has_experts(self, index: int) -> bool:
        """Whether block `index` has experts."""
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0


def register() -> None:
    """Make `AutoConfig` know the model type; again is no harm, and a class of the library's own is left alone."""
    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, DeepseekMoeConfig)


register()
