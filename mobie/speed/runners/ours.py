"""Our decode runner, the same for 16-bit experts and for binary ones: static cache, one captured step on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mobie.errors import UnsupportedError
from mobie.speed.runners.base import WARM_UP_STEPS, Runner, Timing, Weights, prefills_of, random_prompt, steps_of

if TYPE_CHECKING:
    from mobie.kernels.attach import AttachReport
    from mobie.speed.setting import Setting
    from mobie.speed.subject import Subject


class DenseRunner(Runner):
    """16-bit weights, with our experts kernel for them."""

    name = "dense"
    weights: ClassVar[Weights] = "dense"

    def time(self, subject: Subject, setting: Setting) -> Timing:
        return _time(*subject.attached("dense"), setting)


class BinaryRunner(Runner):
    """Packed weights in our kernels, with 16-bit or int8 activations."""

    weights: ClassVar[Weights] = "packed"

    def __init__(self, name: str, activations: Literal["16bit", "int8"], *, int8_head: bool) -> None:
        self.name, self.activations, self.int8_head = name, activations, int8_head

    def time(self, subject: Subject, setting: Setting) -> Timing:
        model, report = subject.attached("packed", self.activations, int8_head=self.int8_head)
        if not report.kernels:
            reasons = "; ".join(report.fallbacks) or "nothing in it is packed"
            raise UnsupportedError(f"no module of the model has a kernel: {reasons}")
        return _time(model, report, setting)


def _time(model: Any, report: AttachReport, setting: Setting) -> Timing:
    from mobie.runner import DecodeRunner
    from mobie.speed.footprint import device_bytes

    with _grouped_attention(model):
        runner = DecodeRunner(model, batch=setting.batch, context=setting.context, eos=())
        prompt = random_prompt(model, setting)
        runner.prefill(prompt)
        runner.decode(min(WARM_UP_STEPS, setting.decode))
        steps = steps_of(setting, runner.times.step_seconds)
        prefills = []
        for _ in range(prefills_of(setting, runner.times.prefill_seconds)):
            runner.prefill(prompt)
            prefills.append(runner.times.prefill_seconds)
        runner.decode(steps)
    weight_bytes = device_bytes(model) + report.layout_bytes
    notes = _notes(report, runner.graphs)
    return Timing(prefills, runner.times.step_seconds, runner.peak_memory_bytes, weight_bytes, notes)


@contextmanager
def _grouped_attention(model: Any) -> Iterator[None]:
    """On a GPU, for models with grouped queries: attention that does not copy the cache for every query head."""
    from mobie.runner.attention import GROUPED, register_attention

    config = model.config
    if not next(model.parameters()).is_cuda or config.num_key_value_heads == config.num_attention_heads:
        yield
        return
    before = config._attn_implementation
    register_attention()
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _notes(report: AttachReport, graph: bool) -> list[str]:
    told = [f"operations: {report.operations}", f"CUDA graph: {'yes' if graph else 'no'}"]
    return told + [f"no kernel for {reason}: {len(names)} modules" for reason, names in report.fallbacks.items()]
