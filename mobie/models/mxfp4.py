"""GPT-OSS as the hub has it: experts in MXFP4, decoded while they are read.

A row of `32 · g` weights is `g` groups of 32: 16 bytes of two 4-bit floats each (E2M1, the low half of a byte first)
and one byte for a common power of two (E8M0, biased by 127), as in the OCP Microscaling Formats specification 1.0:

    blocks (experts, out, g, 16) uint8     scales (experts, out, g) uint8     weight = float4 · 2^(scale - 127)

Every such weight is a float32 and a bfloat16 number, so that decoding loses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from mobie.models.experts import EXPERT_PARAMETERS

METHOD = "mxfp4"  # value of `quant_method` in the hub's config.json
BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT4 = (*MAGNITUDES, *(-value for value in MAGNITUDES))  # by code; the highest bit is the sign


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Weights of all experts as GPT-OSS keeps them, `(experts, in, out)` float32."""
    experts, rows, groups, half = blocks.shape
    weights = torch.empty(experts, groups * half * 2, rows, device=blocks.device)
    if blocks.is_meta:
        return weights
    table = torch.tensor(FLOAT4, device=blocks.device)
    for target, codes, exponents in zip(weights, blocks.to(torch.uint8), scales, strict=True):  # bounds the memory
        values = table[torch.stack([codes & 15, codes >> 4], dim=-1).int()].flatten(-2)  # (out, g, 32)
        target.copy_(torch.ldexp(values, exponents.int()[..., None] - BIAS).flatten(1).T)
    return weights


class _Decode(ConversionOps):
    """Blocks and scales of one parameter → the parameter."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        blocks, scales = (input_dict[name] for name in source_patterns)
        blocks, scales = (part[0] if isinstance(part, list) else part for part in (blocks, scales))
        return {target_patterns[0]: decode(blocks, scales)}


def is_mxfp4(config: Any) -> bool:
    """Whether a configuration of the library says that its files are in MXFP4."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == METHOD


def conversion_mapping(model: nn.Module) -> list[Any]:
    """How the files' tensors become a model's parameters: the library's own conversion, and decoding of MXFP4."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = list(get_model_conversion_mapping(model))
    if is_mxfp4(model.config):
        for name in EXPERT_PARAMETERS:
            parts = [f"mlp.experts.{name}_{part}" for part in ("blocks", "scales")]
            mapping.append(WeightConverter(parts, f"mlp.experts.{name}", [_Decode()]))
    return mapping
