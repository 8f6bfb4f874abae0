"""Adapters: where a model family keeps its experts, router and Linears. An architecture is a table of data.

transformers 5 keeps the experts of a layer as fused parameters (`experts.py`). Everything outside this package sees
`gate`, `up` and `down` as `(experts, out, in)` and Linears as `(out, in)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mobie.errors import DataError, UnsupportedError, unknown_name
from mobie.methods.base import ExpertBank
from mobie.models.architectures import ARCHITECTURES
from mobie.models.experts import SharedExpert, is_fused, read_projections, write_projections
from mobie.packing.bank import split_gate_up

__all__ = ["ARCHITECTURES", "Adapter", "require_finite"]

EXPERT_INPUTS = (("gate", "up"), ("down",))


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


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
        return module if module is not None and is_fused(module) else None

    def shared_expert(self, block: nn.Module) -> SharedExpert | None:
        """The shared expert of a block whose output is multiplied by a gate, or None where there is none."""
        if self.architecture.shared_gate is None:
            return None
        name, gate = self.architecture.shared_gate
        module, gate_module = _submodule(block, name), _submodule(block, gate)
        if module is None or gate_module is None:
            return None
        linears = {linear for group in self.linear_groups(block) for linear in group if linear.startswith(f"{name}.")}
        return SharedExpert(module, gate_module, frozenset(linears))

    def shared_output(self, block: nn.Module, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the shared expert adds to a layer's output, in float32, its gate's score included.

        Args:
            x: the layer's rows `(rows, hidden)` float32.
            weights: by the names of its Linears in the block, one at least, in place of its own.
        """
        name = next(iter(weights)).rpartition(".")[0]
        module = block.get_submodule(name)
        own = {key: value.detach().float() for key, value in module.named_parameters()}
        replaced = {f"{key.removeprefix(f'{name}.')}.weight": weight for key, weight in weights.items()}
        output = functional_call(module, own | replaced, (x,))
        gated = self.shared_expert(block)
        return output if gated is None else torch.sigmoid(x @ gated.gate.weight.detach().float().T) * output

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
        projections = read_projections(module)
        for name, weight in projections.items():
            require_finite(f"{self.architecture.experts}.{name}", weight)
        return ExpertBank(projections, EXPERT_INPUTS, active=self.moe_router(block).top_k)

    def write_experts(self, block: nn.Module, projections: Mapping[str, Tensor]) -> None:
        """Copy `gate`, `up` (or both as `gate_up`) and `down`, `(experts, out, in)`, into a block's parameters."""
        write_projections(block.get_submodule(self.architecture.experts), split_gate_up(projections))

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
