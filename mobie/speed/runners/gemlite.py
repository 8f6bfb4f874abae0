"""gemlite's 1-bit products in the place of the experts' matrices, where it is installed: our runner, its kernels.

gemlite multiplies one matrix with a batch of rows, so experts run one after another, which no CUDA graph can capture.
It has no shared basis and no second order: its experts hold fewer bits than ours.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar

from mobie.speed.runners.base import Runner, Timing, Weights, random_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from mobie.speed.setting import Setting
    from mobie.speed.subject import Subject

GROUP_SIZE = 128
IMPLEMENTATION = "mobie-gemlite"


class Gemlite(Runner):
    """Experts as gemlite Linears of one bit; everything else as in the library's model."""

    name = "gemlite"
    weights: ClassVar[Weights] = "own"
    tried: ClassVar[bool] = False

    def missing(self, subject: Subject) -> str | None:
        if subject.device != "cuda":
            return "needs a CUDA GPU"
        if importlib.util.find_spec("gemlite") is None:
            return "gemlite is not installed"
        return None

    def time(self, subject: Subject, setting: Setting) -> Timing:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        from mobie.runner.clock import peak_memory_bytes, start_peak_memory
        from mobie.speed.runners.library import generate

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
        model = subject.model("dense")
        experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
        for module in experts:
            module.gemlite = [
                (_linear(module.gate_up_proj[e].shape), _linear(module.down_proj[e].shape))
                for e in range(module.num_experts)
            ]
        ways = (IMPLEMENTATION, IMPLEMENTATION)
        prompt = random_prompt(model, setting)
        start_peak_memory(prompt.device)
        generate(model, prompt, 2, ways)
        prefills = [generate(model, prompt, 0, ways)[0] for _ in range(3)]
        _, steps = generate(model, prompt, min(setting.decode, setting.slow_steps), ways)
        peak = peak_memory_bytes(prompt.device)
        subject.release()
        return Timing(prefills, steps, peak, notes=["experts only, one after another; no shared basis"])


def _linear(size: Any) -> Any:
    import torch
    from gemlite.core import DType, GemLiteLinear

    rows, columns = size
    linear = GemLiteLinear(
        1,
        group_size=GROUP_SIZE,
        in_features=columns,
        out_features=rows,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    codes = torch.randint(0, 2, (rows, columns), dtype=torch.uint8, device="cuda")
    groups = rows * columns // GROUP_SIZE
    scales = torch.full((groups, 1), 0.04, dtype=torch.bfloat16, device="cuda")
    linear.pack(codes, scales, torch.full_like(scales, 0.5), None)
    return linear


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The library's eager loop over experts, with gemlite's products."""
    import torch

    result = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate_up, down = module.gemlite[expert]
        gate, up = gate_up(hidden[token]).chunk(2, dim=-1)
        out = down(torch.nn.functional.silu(gate) * up) * weights[token, slot, None]
        result.index_add_(0, token, out.to(result.dtype))
    return result
