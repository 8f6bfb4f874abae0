"""The library's fused experts modules, seen as `gate`, `up` and `down` `(experts, out, in)` whatever their layout.

    usual     gate_up_proj (experts, 2·width, hidden), the gate's rows first     down_proj (experts, hidden, width)
    GPT-OSS   gate_up_proj (experts, hidden, 2·width), gate and up alternating   down_proj (experts, width, hidden)
              gate_up_proj_bias (experts, 2·width)                               down_proj_bias (experts, hidden)

The layout is what the library itself notes on a module (`is_transposed`, `is_concatenated`, `has_bias`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: parameters of the library's experts modules that packed weights replace
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class SharedExpert:
    """A shared expert whose output is multiplied by a score.

    module: the shared expert, given rows `(..., hidden)`.
    gate:   gives the score's logit of each row, `(..., 1)`; the score is its sigmoid.
    linears: names of the shared expert's Linears.
    """

    module: nn.Module
    gate: nn.Module
    linears: frozenset[str]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer; asked of the class, since packed experts unpack when read."""
    return "gate_up_proj" in module._parameters or hasattr(type(module), "gate_up_proj")


def expert_count(module: nn.Module) -> int:
    """How many experts a fused module holds."""
    return module.num_experts


def expert_inputs(module: nn.Module) -> dict[str, int]:
    """Input features of each projection."""
    axis = 1 if module.is_transposed else 2
    hidden, width = module.gate_up_proj.shape[axis], module.down_proj.shape[axis]
    return {"gate": hidden, "up": hidden, "down": width}


def read_projections(module: nn.Module) -> dict[str, Tensor]:
    """`gate`, `up` and `down` of a fused module in float32, `(experts, out, in)`."""
    gate_up, down = module.gate_up_proj.detach().float(), module.down_proj.detach().float()
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    gate, up = split_outputs(module, gate_up, dim=1)
    return {"gate": gate, "up": up, "down": down}


def fuse_gate_up(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """`gate` and `up` `(experts, width, hidden)` as the module's `gate_up_proj`."""
    fused = torch.cat([gate, up], dim=1) if module.is_concatenated else torch.stack([gate, up], dim=2).flatten(1, 2)
    return fuse_down(module, fused)


def fuse_down(module: nn.Module, down: Tensor) -> Tensor:
    """`down (experts, hidden, width)` as the module's `down_proj`."""
    return (down.transpose(1, 2) if module.is_transposed else down).contiguous()


@torch.no_grad()
def write_projections(module: nn.Module, projections: Mapping[str, Tensor]) -> None:
    """Copy `gate`, `up` and `down` into a fused module's parameters; biases stay."""
    module.gate_up_proj.copy_(fuse_gate_up(module, projections["gate"], projections["up"]))
    module.down_proj.copy_(fuse_down(module, projections["down"]))


def split_outputs(module: nn.Module, gate_up: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The gate's and up's part of what `gate_up_proj` gives, along the axis of its output features."""
    if module.is_concatenated:
        gate, up = gate_up.chunk(2, dim=dim)
    else:
        gate, up = gate_up.unflatten(dim, (-1, 2)).unbind(dim=dim if dim < 0 else dim + 1)
    return gate, up


def join_outputs(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Inverse of `split_outputs` on the last axis: what `_apply_gate` takes."""
    return torch.cat([gate, up], dim=-1) if module.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)


def project(module: nn.Module, parameter: str, expert: int, x: Tensor) -> Tensor:
    """`x (tokens, in)` through one expert's `gate_up_proj` or `down_proj` with its bias, as the library computes it."""
    weight = getattr(module, parameter)[expert]
    z = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
    return z + getattr(module, f"{parameter}_bias")[expert] if module.has_bias else z


def expert_output(module: nn.Module, expert: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`x (tokens, hidden)` through one expert in float32, `weights` `(out, in)` in place of its own."""
    own = expert_projections(module, expert) | dict(weights)
    gate, up = x @ own["gate"].T, x @ own["up"].T
    if module.has_bias:
        gate_bias, up_bias = split_outputs(module, module.gate_up_proj_bias[expert].float())
        gate, up = gate + gate_bias, up + up_bias
    output = module._apply_gate(join_outputs(module, gate, up)) @ own["down"].T
    return output + module.down_proj_bias[expert].float() if module.has_bias else output


def expert_projections(module: nn.Module, expert: int) -> dict[str, Tensor]:
    """`gate`, `up` and `down` of one expert in float32, `(out, in)`."""
    gate_up, down = module.gate_up_proj[expert].detach().float(), module.down_proj[expert].detach().float()
    if module.is_transposed:
        gate_up, down = gate_up.T, down.T
    gate, up = split_outputs(module, gate_up, dim=0)
    return {"gate": gate, "up": up, "down": down}
