"""Attention of a decode step without copies of the cache: the query heads that share a key head are computed together.

With grouped queries and a mask, some versions of the library repeat keys and values for every query head, which in a
decode step is a copy of the whole cache several times its size. Here the query heads become rows of one small matrix
instead. All other passes are the library's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobie.errors import UnsupportedError

#: name of the attention implementation, for `model.set_attn_implementation`
GROUPED = "mobie-grouped"


def register_attention() -> None:
    """Make `model.set_attn_implementation(GROUPED)` known to the library; a second call does nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query `(batch, heads, tokens, size)`, key and value `(batch, key heads, slots, size)` → `(batch, tokens, heads,
    size)`; the mask is shared by all heads, `(batch or 1, 1, tokens, slots)`.

    Raises UnsupportedError for attention with sinks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if options.get("s_aux") is not None:  # GPT-OSS: a logit per head that takes part in the softmax
        raise UnsupportedError(f"attention with sinks as {GROUPED!r}; use model.set_attn_implementation('eager')")
    batch, heads, tokens, _ = query.shape
    key_heads = key.shape[1]
    if tokens > 1 or heads == key_heads or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows = query.reshape(batch, key_heads, heads // key_heads, -1)  # neighbouring heads share a key head
    out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1]), None
