"""DeepSeekMoE: shared experts, dense first blocks, the attention of Llama; the model class is `mobie.hf.deepseek_moe`."""

from mobie.models.architecture import ATTENTION, DENSE_MLP, SHARED_EXPERTS, Architecture

ARCHITECTURE = Architecture("deepseek", linear_groups=ATTENTION + SHARED_EXPERTS + DENSE_MLP)
