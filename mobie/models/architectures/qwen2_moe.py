"""Qwen1.5-MoE: a shared expert beside the routed ones; some blocks may be dense."""

from mobie.models.architecture import ATTENTION, DENSE_MLP, SHARED_EXPERT, SHARED_GATE, Architecture

ARCHITECTURE = Architecture("qwen2_moe", linear_groups=ATTENTION + SHARED_EXPERT + DENSE_MLP, shared_gate=SHARED_GATE)
