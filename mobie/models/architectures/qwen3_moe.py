"""Qwen3-MoE: some blocks may be dense."""

from mobie.models.architecture import ATTENTION, DENSE_MLP, Architecture

ARCHITECTURE = Architecture("qwen3_moe", linear_groups=ATTENTION + DENSE_MLP)
