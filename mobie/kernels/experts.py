"""The experts of a layer as a composition of operations, and the names under which the library finds them.

    left form    y_e = U (V_e x)                pairs → V of gate and up → U with SwiGLU and the router's weight
                 Σ_e g_e U V_e h_e = U Σ_e V_e (g_e h_e)               → V of down → U of the sum over experts
    right form   W_e = V_e R                    tokens → R once per token → V_e → SwiGLU → R → V_e → sum over experts

A pair is a token and one of its experts; pair = token·k + slot. `ops` is a module with the operations of
`mobie.kernels.twins`. Sums over a token's experts run in slot order, so that a result does not depend on timing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mobie.kernels.backend import operations
from mobie.kernels.layout import DenseExperts, ExpertsLayout, Groups
from mobie.kernels.twins import Activations

TILES = {8: 8, 64: 16}  # tokens of a batch, at most → pairs per tile; in a small one most experts have one or two
PREFILL_TILE = 64
PACKED, DENSE = "mobie", "mobie-dense"  # names of the experts implementations


def tile_size(tokens: int) -> int:
    """Pairs per tile for a batch of `tokens`."""
    return next((tile for most, tile in TILES.items() if tokens <= most), PREFILL_TILE)


def experts_forward(
    layout: ExpertsLayout,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    ops: ModuleType,
    activations: Activations = "16bit",
) -> Tensor:
    """Output of a layer's experts.

    Args:
        hidden: `(tokens, hidden)` float16, bfloat16 or float32.
        index: `(tokens, k)` int64, the experts of each token.
        weights: `(tokens, k)`, the router's weights.

    Returns:
        `(tokens, hidden)` in the dtype of `hidden`.
    """
    if not len(hidden):
        return torch.zeros_like(hidden)
    groups = ops.group_pairs(index, layout.gate_up.experts, tile_size(len(hidden)))
    inner = _gate_and_up(layout, hidden, groups, weights, ops, activations)
    return _down(layout, inner, groups, index.shape[1], ops, activations)


def _gate_and_up(
    layout: ExpertsLayout, hidden: Tensor, groups: Groups, weights: Tensor, ops: ModuleType, activations: Activations
) -> Tensor:
    """`silu(gate) · up · weight` of every pair, `(pairs, width)`."""
    k, pair_weights, basis = weights.shape[1], weights.reshape(-1), layout.gate_up_basis
    shape = {"pairs": weights.numel(), "pairs_per_row": k, "activations": activations}
    if basis is not None and layout.gate_up_side == "left":
        latent = ops.binary_grouped(layout.gate_up, hidden, groups, **shape)
        return ops.panel(basis, latent, epilogue="swiglu", pair_weights=pair_weights, activations=activations)
    if basis is not None:
        parts = len(basis.codes)  # one where gate and up share the basis, and then both read the same latent
        hidden = ops.panel(basis, hidden[:, None].expand(-1, parts, -1), activations=activations)
        hidden = hidden[:, 0] if parts == 1 else hidden
    return ops.swiglu(ops.binary_grouped(layout.gate_up, hidden, groups, **shape), pair_weights)


def _down(
    layout: ExpertsLayout, inner: Tensor, groups: Groups, k: int, ops: ModuleType, activations: Activations
) -> Tensor:
    """Down projection of every pair, summed over the `k` pairs of a token: `(tokens, hidden)`."""
    basis = layout.down_basis
    if basis is not None and layout.down_side == "right":
        inner = ops.panel(basis, inner[:, None], activations=activations)[:, 0]
    out = ops.binary_grouped(
        layout.down, inner, groups, pairs=len(inner), pairs_per_row=1, activations=activations
    )  # (pairs, 1, rows)
    if basis is not None and layout.down_side == "left":
        return ops.panel(basis, out, reduce=k, activations=activations)[:, 0]
    return ops.reduce_pairs(out[:, 0], k)


def dense_forward(layout: DenseExperts, hidden: Tensor, index: Tensor, weights: Tensor, ops: ModuleType) -> Tensor:
    """The same for 16-bit experts; arguments and result as those of `experts_forward`."""
    if not len(hidden):
        return torch.zeros_like(hidden)
    k, pairs = index.shape[1], index.numel()
    groups = ops.group_pairs(index, len(layout.gate_up), tile_size(len(hidden)))
    gate_up = ops.dense_grouped(layout.gate_up, hidden, groups, pairs=pairs, pairs_per_row=k)
    inner = ops.swiglu(gate_up.unflatten(-1, (2, -1)), weights.reshape(-1))
    return ops.reduce_pairs(ops.dense_grouped(layout.down, inner, groups, pairs=pairs, pairs_per_row=1), k)


def library_forward(module: nn.Module, *inputs: Any) -> Tensor:
    """The experts class's own loop over experts, beneath the library's choice of implementation."""
    for cls in type(module).__mro__:
        original = getattr(cls.__dict__.get("forward"), "__wrapped__", None)
        if original is not None:
            return original(module, *inputs)
    raise TypeError(f"{type(module).__name__} has no forward that the library wrapped; expected one of its experts")


def packed_implementation(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts implementation "mobie": the module's kernel, or the library's loop where it has none."""
    kernel = getattr(module, "kernel", None)
    return library_forward(module, hidden, index, weights) if kernel is None else kernel(hidden, index, weights)


def dense_implementation(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts implementation "mobie-dense": the library's own 16-bit parameters in this project's kernels."""
    layout = DenseExperts(module.gate_up_proj, module.down_proj)
    return dense_forward(layout, hidden, index, weights, operations(hidden.device, hidden.dtype))


def register_implementations() -> None:
    """Make both implementations known to the library."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(PACKED, packed_implementation)
    ALL_EXPERTS_FUNCTIONS.register(DENSE, dense_implementation)
