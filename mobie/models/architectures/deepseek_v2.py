"""DeepSeek-V2: shared experts, dense first blocks, multi-head latent attention.

Keys and values (and, in the large model, queries) come from a latent of lower rank.
"""

from mobie.models.architecture import DENSE_MLP, SHARED_EXPERTS, Architecture

LATENT_ATTENTION = (
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)

ARCHITECTURE = Architecture("deepseek_v2", linear_groups=LATENT_ATTENTION + SHARED_EXPERTS + DENSE_MLP)
