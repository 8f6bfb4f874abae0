"""What a runner is, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from mobie.speed.setting import Setting
    from mobie.speed.subject import Subject

Weights = Literal["dense", "packed", "own"]
WARM_UP_STEPS = 4
SLOW_STEP_SECONDS = 0.1
PREFILL_BUDGET_SECONDS = 5.0


@dataclass(frozen=True)
class Timing:
    """What a runner measured at one setting.

    prefill_seconds: of each repetition: from the prompt to the logits of the first new token.
    step_seconds:    of each decode step, for all rows together.
    peak_memory_bytes: of tensors on a GPU; on a CPU of the whole process since it began. None: not known.
    weight_bytes:    what the weights take on the device; None: not known.
    notes:           what a reader must know.
    """

    prefill_seconds: Sequence[float]
    step_seconds: Sequence[float]
    peak_memory_bytes: int | None = None
    weight_bytes: int | None = None
    notes: Sequence[str] = ()


class Runner(ABC):
    """One way to run a model.

    weights:   what it takes from the subject: "dense" or "packed" weights in the library's model, or its "own".
    int8_head: whether a step reads the head as int8.
    tried:     whether it was ever run by this project; an untried plug-in is named as such.
    """

    name: str
    weights: ClassVar[Weights]
    int8_head: bool = False
    tried: ClassVar[bool] = True

    def missing(self, subject: Subject) -> str | None:
        """Why it cannot run this subject here, or None where it can."""
        return None

    @abstractmethod
    def time(self, subject: Subject, setting: Setting) -> Timing:
        """Measure one setting. Raises `UnsupportedError` where it turns out not to work."""


def random_prompt(model: Any, setting: Setting) -> Tensor:
    """Token ids `(batch, prefill)` from a fixed generator, on the model's device."""
    import torch

    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, len(embedding), (setting.batch, setting.prefill), generator=generator)
    return tokens.to(embedding.device)


def prefills_of(setting: Setting, warm_up_seconds: float) -> int:
    """Prefills to time: all of the setting's, or as many as fit into some seconds."""
    return max(1, min(setting.repetitions, int(PREFILL_BUDGET_SECONDS / warm_up_seconds)))


def steps_of(setting: Setting, warm_up_seconds: Sequence[float]) -> int:
    """Decode steps to time: all of the setting's, or fewer where a warm step is slow."""
    slow = min(warm_up_seconds) > SLOW_STEP_SECONDS
    return min(setting.decode, setting.slow_steps) if slow else setting.decode
