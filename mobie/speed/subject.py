"""What is timed: one model, as dense weights and as a method packs them, with random contents or from a checkpoint.

One of the two is in memory at a time, so that a GPU holds the largest.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mobie.errors import ConfigError
from mobie.methods.fp16 import FP16
from mobie.models import OWN_FILES
from mobie.packing.base import BitLedger
from mobie.speed import routers
from mobie.speed.footprint import (
    Activated,
    Footprint,
    activated,
    footprint,
    kv_bytes_per_token,
    model_ledger,
    packed_blocks,
)
from mobie.speed.random_weights import random_model

if TYPE_CHECKING:
    from mobie.kernels.attach import AttachReport
    from mobie.kernels.twins import Activations
    from mobie.methods.base import Method

Kind = Literal["dense", "packed"]
COUNTED_STEPS, COUNTED_PROMPT = 16, 64  # where a router's own choices are counted


@dataclass(frozen=True)
class Account:
    """What a model consists of: bytes by whether the head is int8, and the bits of its packed weights."""

    footprints: dict[bool, Footprint]
    ledger: BitLedger | None


class Subject(ABC):
    """A model to time.

    config: the library's configuration object.
    device: "cpu" or "cuda".
    dtype:  of everything that is not packed.
    """

    weights: Literal["random", "stored"]

    def __init__(self, name: str, config: Any, device: str, dtype: torch.dtype) -> None:
        self.name, self.config, self.device, self.dtype = name, config, device, dtype
        self._held: tuple[Kind, Any] | None = None
        self._attached: tuple[tuple[Kind, Activations, bool], AttachReport] | None = None
        self._accounts: dict[Kind, Account] = {}
        self._distinct: dict[tuple[Kind, int, str], list[float]] = {}

    @abstractmethod
    def _load(self, kind: Kind) -> Any:
        """The model with dense or packed weights, on the device."""

    def model(self, kind: Kind) -> Any:
        """The model with these weights as the library computes it, without kernels; the other one is let go."""
        from mobie.kernels.attach import detach

        model = self._loaded(kind)
        detach(model)
        self._attached = None
        return model

    def attached(
        self, kind: Kind, activations: Activations = "16bit", *, int8_head: bool = False
    ) -> tuple[Any, AttachReport]:
        """The model with our kernels, and what became of its modules; kept from call to call."""
        from mobie.kernels.attach import attach, attach_dense

        key = (kind, activations, int8_head)
        if self._attached is None or self._attached[0] != key:
            model = self.model(kind)
            if kind == "dense":
                report = attach_dense(model)
            else:
                report = attach(model, compute="kernels", activations=activations, int8_head=int8_head)
            self._attached = (key, report)
        return self._loaded(kind), self._attached[1]

    def _loaded(self, kind: Kind) -> Any:
        """The model with these weights, attached or not."""
        if self._held is None or self._held[0] != kind:
            self.release()
            model = self._load(kind)
            self._held = (kind, model)
            if kind not in self._accounts:
                self._accounts[kind] = self._count(model)
        return self._held[1]

    def release(self) -> None:
        """Free the memory of whatever is held."""
        self._held = self._attached = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _count(self, model: Any) -> Account:
        blocks = packed_blocks(model)
        kv = kv_bytes_per_token(self.config, self.dtype)
        prints = {int8: footprint(model, blocks, kv_per_token=kv, int8_head=int8) for int8 in (False, True)}
        return Account(prints, model_ledger(model, blocks))

    def account(self, kind: Kind) -> Account:
        """Bytes and bits of the model with these weights."""
        self._loaded(kind)
        return self._accounts[kind]

    def activated(self, kind: Kind, batch: int) -> Activated:
        """Activated weights of a batch by the paper's definition."""
        return activated(self._loaded(kind), self.account(kind).ledger, batch)

    def distinct(self, kind: Kind, batch: int, router: str) -> list[float]:
        """Mean number of different experts that a decode step of a batch reads, by MoE layer."""
        key = (kind, batch, router)
        if key not in self._distinct:
            self._distinct[key] = self._count_distinct(*key)
        return self._distinct[key]

    def _count_distinct(self, kind: Kind, batch: int, router: str) -> list[float]:
        model = self._loaded(kind)
        if router != routers.NATURAL:
            own = routers.model_routers(model)
            experts = routers.number_of_experts(model)
            return routers.distinct_assigned(router, len(own), batch, experts, int(own[0].top_k))
        generator = torch.Generator().manual_seed(1)
        longest = self.config.max_position_embeddings - COUNTED_STEPS
        prompt = torch.randint(0, self.config.vocab_size, (batch, min(COUNTED_PROMPT, longest)), generator=generator)
        model, _ = self.attached(kind)
        return routers.distinct_experts(model, prompt.to(self.device), COUNTED_STEPS)


class RandomSubject(Subject):
    """A model of a configuration with random weights, packed as a method would."""

    weights = "random"

    def __init__(
        self, name: str, config: Any, method: Method, *, device: str, dtype: torch.dtype, seed: int = 0
    ) -> None:
        super().__init__(name, config, device, dtype)
        self._method, self._seed = method, seed

    def _load(self, kind: Kind) -> Any:
        method = FP16() if kind == "dense" else self._method
        return random_model(self.config, method, device=self.device, dtype=self.dtype, seed=self._seed)


class StoredSubject(Subject):
    """A model from files: the full-precision one from its folder, the packed one from a checkpoint of ours."""

    weights = "stored"

    def __init__(self, name: str, source: Path, checkpoint: Path | None, *, device: str, dtype: torch.dtype) -> None:
        """`checkpoint`: None where only dense weights are timed."""
        from transformers import AutoConfig

        super().__init__(name, AutoConfig.from_pretrained(source, **OWN_FILES), device, dtype)
        self._source, self._checkpoint = source, checkpoint

    def _load(self, kind: Kind) -> Any:
        from transformers import AutoModelForCausalLM

        import mobie  # noqa: F401 (makes the library know packed checkpoints)

        folder = self._source if kind == "dense" else self._checkpoint
        if folder is None:
            raise ConfigError(f"{self.name}: no checkpoint to time packed weights of; expected a quantized method")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, use_safetensors=True, **OWN_FILES)
        return model.eval().to(self.device)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
