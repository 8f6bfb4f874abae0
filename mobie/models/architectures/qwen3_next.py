"""Qwen3-Next: three blocks with linear attention (gated delta net) to one with gated full attention; a shared expert.

The two large Linears of the linear attention are quantized as attention is. What stays in 16 bits is small and steers
the recurrence: `in_proj_ba` (two numbers per head: how much to write, how fast to forget), the convolution over four
tokens, `A_log` and `dt_bias`. The rows of a full attention's `q_proj` hold the queries and their gates, head by head.
"""

from mobie.models.architecture import ATTENTION, DENSE_MLP, SHARED_EXPERT, SHARED_GATE, Architecture

LINEAR_ATTENTION = (("linear_attn.in_proj_qkvz",), ("linear_attn.out_proj",))

ARCHITECTURE = Architecture(
    "qwen3_next", linear_groups=LINEAR_ATTENTION + ATTENTION + SHARED_EXPERT + DENSE_MLP, shared_gate=SHARED_GATE
)
