"""Adapters: where a model family keeps its experts, router and Linears. An architecture is a table of data.

transformers 5 keeps the experts of a layer as fused parameters, `gate_up_proj (experts, 2·width, hidden)` with the
gate's rows first, and `down_proj (experts, hidden, width)`. Everything outside this package sees `gate`, `up` and
`down` as `(experts, out, in)` and Linears as `(out, in)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobie.errors import DataError, UnsupportedError, unknown_name
from mobie.methods.base import ExpertBank
from mobie.packing.bank import split_gate_up

ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
SHARED_EXPERT = (
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
)
SHARED_EXPERTS = (  # DeepSeek: several, stored as one of their joint width
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.shared_experts.down_proj",),
)
LATENT_ATTENTION = (  # DeepSeek: keys and values (and, in the large model, queries) come from a latent of lower rank
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)
DENSE_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
EXPERT_INPUTS = (("gate", "up"), ("down",))


@dataclass(frozen=True)
class Architecture:
    """Names inside a decoder block of one `model_type`.

    linear_groups: Linears grouped by shared input; a name that a block lacks (dense first layers) is passed over.
    """

    model_type: str
    blocks: str = "model.layers"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    linear_groups: tuple[tuple[str, ...], ...] = ATTENTION


ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture("olmoe"),
        Architecture("qwen3_moe", linear_groups=ATTENTION + DENSE_MLP),
        Architecture("mixtral"),
        Architecture("qwen2_moe", linear_groups=ATTENTION + SHARED_EXPERT + DENSE_MLP),
        Architecture("deepseek_v2", linear_groups=LATENT_ATTENTION + SHARED_EXPERTS + DENSE_MLP),
    )
}


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer; asked of the class, since packed experts unpack when read."""
    return "gate_up_proj" in module._parameters or hasattr(type(module), "gate_up_proj")


class Adapter:
    """Reads and writes the weights of a model's blocks; the only place that knows an architecture's names."""

    def __init__(self, model_type: str) -> None:
        """Raises UnsupportedError for a `model_type` that no architecture describes."""
        if model_type not in ARCHITECTURES:
            raise UnsupportedError(unknown_name("architecture", model_type, ARCHITECTURES))
        self.architecture = ARCHITECTURES[model_type]

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.get_submodule(self.architecture.blocks)

    def block_prefix(self, index: int) -> str:
        """Prefix of a block's parameters in the model's state dict."""
        return f"{self.architecture.blocks}.{index}."

    def linear_groups(self, block: nn.Module) -> list[dict[str, nn.Linear]]:
        """Linears that the methods quantize, grouped by shared input, by their name in the block."""
        groups = []
        for names in self.architecture.linear_groups:
            found = {name: _submodule(block, name) for name in names}
            group = {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
            if group:
                groups.append(group)
        return groups

    def experts_module(self, block: nn.Module) -> nn.Module | None:
        """The fused experts of a block, or None in a dense block."""
        module = _submodule(block, self.architecture.experts)
        return module if module is not None and _is_fused(module) else None

    def router(self, block: nn.Module) -> nn.Module | None:
        """The router of a block, with `weight (experts, hidden)` and `top_k`, or None in a dense block."""
        return None if self.experts_module(block) is None else _submodule(block, self.architecture.router)

    def moe_router(self, block: nn.Module) -> nn.Module:
        """The router of a block that has experts. Raises UnsupportedError for a dense block."""
        router = self.router(block)
        if router is None:
            raise UnsupportedError("a dense block has no router; expected a block with experts")
        return router

    def expert_bank(self, block: nn.Module) -> ExpertBank | None:
        """The experts of a block as float32 `(experts, out, in)`, or None in a dense block."""
        module = self.experts_module(block)
        if module is None:
            return None
        gate, up = module.gate_up_proj.detach().float().chunk(2, dim=1)
        projections = {"gate": gate, "up": up, "down": module.down_proj.detach().float()}
        for name, weight in projections.items():
            require_finite(f"{self.architecture.experts}.{name}", weight)
        return ExpertBank(projections, EXPERT_INPUTS, active=self.moe_router(block).top_k)

    @torch.no_grad()
    def write_experts(self, block: nn.Module, projections: Mapping[str, Tensor]) -> None:
        """Copy `gate`, `up` (or both as `gate_up`) and `down`, `(experts, out, in)`, into a block's parameters."""
        module = block.get_submodule(self.architecture.experts)
        projections = split_gate_up(projections)
        module.gate_up_proj.copy_(torch.cat([projections["gate"], projections["up"]], dim=1))
        module.down_proj.copy_(projections["down"])

    def quantized_parameters(self, block: nn.Module, *, router: bool) -> set[str]:
        """Names (in the block) of the parameters that packed weights replace; the others are kept in 16 bits."""
        names = {f"{name}.weight" for group in self.linear_groups(block) for name in group}
        if self.experts_module(block) is not None:
            names |= {f"{self.architecture.experts}.{p}" for p in ("gate_up_proj", "down_proj")}
            if router:
                names.add(f"{self.architecture.router}.weight")
        return names


def require_finite(name: str, weight: Tensor) -> None:
    """Raise DataError when a weight holds NaN or infinity."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise DataError(
            f"{name}: {bad} of {weight.numel()} values are NaN or infinite, expected finite weights; "
            "download the model again or check how it was converted"
        )
