"""DeepSeekMoE: shared experts, dense first blocks, Llama's attention; its model class is `mobie.hf.deepseek_moe`."""

from mobie.models.architecture import ATTENTION, DENSE_MLP, SHARED_EXPERTS, Architecture

ARCHITECTURE = Architecture("deepseek", linear_groups=ATTENTION + SHARED_EXPERTS + DENSE_MLP)
