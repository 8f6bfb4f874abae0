"""The library's own model with its own experts implementations: what `generate` does, without its bookkeeping.

A loop of forward passes with a growing cache and greedy choice, timed step by step; no CUDA graph, as the library's
users have it. "batched_mm" copies a weight matrix for every token and expert, which no memory holds for a prompt: its
prefill is that of "grouped_mm".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mobie.speed.runners.base import WARM_UP_STEPS, Runner, Timing, Weights, prefills_of, random_prompt, steps_of

if TYPE_CHECKING:
    from torch import Tensor

    from mobie.speed.setting import Setting
    from mobie.speed.subject import Subject

#: experts implementation → that of its prefill
PREFILL = {"batched_mm": "grouped_mm"}


class LibraryRunner(Runner):
    """`implementation`: "eager", "grouped_mm" or "batched_mm"."""

    weights: ClassVar[Weights] = "dense"

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"library-{implementation}"

    def time(self, subject: Subject, setting: Setting) -> Timing:
        from mobie.runner.clock import peak_memory_bytes, start_peak_memory
        from mobie.speed.footprint import device_bytes

        model = subject.model("dense")
        ways = (PREFILL.get(self.implementation, self.implementation), self.implementation)
        prompt = random_prompt(model, setting)
        start_peak_memory(prompt.device)
        first, warm = generate(model, prompt, WARM_UP_STEPS, ways)
        steps = steps_of(setting, warm)
        prefills = [generate(model, prompt, 0, ways)[0] for _ in range(prefills_of(setting, first) - 1)]
        prefill, step_seconds = generate(model, prompt, steps, ways)
        peak = peak_memory_bytes(prompt.device)
        notes = [] if ways[0] == ways[1] else [f"prefill by {ways[0]}"]
        return Timing([*prefills, prefill], step_seconds, peak, device_bytes(model), notes)


def generate(model: Any, prompt: Tensor, steps: int, ways: tuple[str, str]) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each of `steps` greedy steps; `ways`: experts implementations of the two."""
    import torch

    from mobie.runner.clock import make_clock

    clock = make_clock(prompt.device)
    with torch.no_grad():
        clock.mark()
        model.set_experts_implementation(ways[0])
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        clock.mark()
        model.set_experts_implementation(ways[1])
        for _ in range(steps):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            clock.mark()
    prefill, *seconds = clock.intervals()
    return prefill, seconds
