"""The architectures that the suite knows, one small file of data each; a new one is a file and a line here."""

from mobie.models.architecture import Architecture
from mobie.models.architectures import (
    deepseek,
    deepseek_v2,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)

#: model_type → architecture
ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.model_type: module.ARCHITECTURE
    for module in (olmoe, mixtral, qwen2_moe, qwen3_moe, qwen3_next, deepseek, deepseek_v2, gpt_oss)
}
