"""Methods that share out bits over the whole model: every block is surveyed before any is quantized."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.packing.base import Packed

#: what an expert adds to its layer's output, with weights `(out, in)` by projection in place of its own, for so many
#: of its calibration tokens at most (None: all)
ExpertOutput = Callable[[int, Mapping[str, Tensor], int | None], Tensor]
#: the same of the shared expert, by its Linears' names in the block
SharedOutput = Callable[[Mapping[str, Tensor], int | None], Tensor]


@dataclass(frozen=True)
class LayerView:
    """One decoder block in full precision, and what flows into its weights.

    linears:       name in the block → `(out, in)` float32: attention, shared experts, a dense layer's MLP.
    linear_stats:  of each of them.
    bank:          the routed experts, None in a dense block.
    bank_stats:    theirs; `tokens` tells how often each expert is chosen.
    expert_output: `(expert, weights, most)` → the expert's output for its calibration tokens times the router's score,
                   `(tokens, hidden)` float32; a projection that `weights` leaves out stays as it is.
    shared_output: `(weights, most)` → the same of the shared expert, for all tokens, times its gate's score; None
                   where there is none.
    """

    linears: Mapping[str, Tensor] = field(default_factory=dict)
    linear_stats: Mapping[str, LinearStats] = field(default_factory=dict)
    bank: ExpertBank | None = None
    bank_stats: BankStats | None = None
    expert_output: ExpertOutput | None = None
    shared_output: SharedOutput | None = None


@dataclass(frozen=True)
class AllocatingMethod(Method):
    """Base of methods whose bit widths depend on all blocks: surveyed one by one, shared out, then quantized."""

    survey_passes: ClassVar[float] = 1.0

    @abstractmethod
    def survey(self, view: LayerView) -> dict[str, Any]:
        """What the allocation must know of one block, as JSON values."""

    @abstractmethod
    def allocate(self, surveys: Sequence[Mapping[str, Any]]) -> list[Method]:
        """A method for every surveyed block, its widths fixed; its `options` say which.

        Raises:
            UnsupportedError: the budget is out of this model's reach.
        """

    def over(self, view: LayerView) -> Method:
        """The method of a block that is the whole model."""
        return self.allocate([self.survey(view)])[0]

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        raise TypeError(f"{self.name} quantizes nothing before `allocate`, which gives the method of each block")
