"""The pass before the block loop in which an allocating method sees every block: full precision in, findings out.

A finding is a file as soon as its block is surveyed, so a run that was killed goes on behind the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobie.block import add_guided, add_guided_bank
from mobie.calibration.guided import Guided
from mobie.calibration.lazy import Cache
from mobie.calibration.statistics import BlockStatistics, blend_with_pool
from mobie.calibration.store import ActivationStore, Memory
from mobie.calibration.stream import Stream, enter_first_block
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.models.base import Adapter
from mobie.models.weights import StreamedModel
from mobie.parsing import parse_json
from mobie.storage import make_folder, unsealed, write_sealed

#: guided Hessians of a block from what flows into it, and what forgets them again
GuidedOf = Callable[[int, nn.Module, Stream, bool], tuple[Guided, Callable[[], None]]]


@dataclass(frozen=True)
class Finding:
    """What a method found in one block, as JSON values, and the CPU seconds that it took."""

    values: dict[str, Any]
    cpu_seconds: float


class Survey:
    """Findings of all blocks of a model, in files of one job."""

    def __init__(
        self,
        streamed: StreamedModel,
        method: AllocatingMethod,
        folder: Path,
        fingerprint: str,
        memory: Memory,
        guided_of: GuidedOf | None = None,
    ) -> None:
        """Args:
        folder: of the findings, and of activations beyond `memory`.
        fingerprint: of the job; findings with another are as good as none.
        guided_of: `(index, block, stream, move)` → guided Hessians, for a method that uses loss gradients.
        """
        self._streamed, self._method, self._guided_of = streamed, method, guided_of
        self._folder, self._fingerprint, self._memory = folder, fingerprint, memory

    @torch.no_grad()
    def run(self, batches: Sequence[Tensor], *, progress: bool) -> list[Finding]:
        """Survey the blocks that have no finding yet, the calibration tokens passing through in full precision."""
        count = len(self._streamed.blocks)
        found = [self._read(index) for index in range(count)]
        last = max((index for index, finding in enumerate(found) if finding is None), default=-1)
        if last >= 0:
            make_folder(self._folder)
            store = ActivationStore(self._folder, self._fingerprint, self._memory)
            stream = Stream("survey", batches, store, self._streamed.device)
            with self._streamed.outside():
                stream.arguments = enter_first_block(self._streamed, batches, stream.put)
            for index in tqdm(range(last + 1), "survey of the model", disable=not progress):
                with self._streamed.block(index) as block:
                    if found[index] is None:
                        found[index] = self._look(index, block, stream, store, move=index < last)
                    elif index < last:
                        stream.through(block)
        return [finding for finding in found if finding is not None]

    def _look(self, index: int, block: nn.Module, stream: Stream, store: ActivationStore, *, move: bool) -> Finding:
        began = time.process_time()
        adapter = self._streamed.adapter
        shape = stream.shape(adapter.linear_groups(block), adapter.experts_module(block))
        statistics = BlockStatistics(shape, store, Cache(self._memory))
        stream.observe(block, statistics, move=move and self._guided_of is None)
        guided, forgets = None, [statistics.drop]
        if self._guided_of is not None:
            guided, forget = self._guided_of(index, block, stream, move)
            forgets.append(forget)
        values = self._method.survey(layer_view(block, adapter, statistics, guided))
        for forget in forgets:
            forget()
        finding = Finding(values, time.process_time() - began)
        content = {"fingerprint": self._fingerprint, "values": values, "cpu_seconds": finding.cpu_seconds}
        write_sealed(self._path(index), content)
        return finding

    def _read(self, index: int) -> Finding | None:
        try:
            content = unsealed(parse_json(self._path(index).read_bytes()))
        except (OSError, ValueError):
            return None
        if content["fingerprint"] != self._fingerprint:
            return None
        return Finding(content["values"], content["cpu_seconds"])

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:05d}.json"


def layer_view(
    block: nn.Module, adapter: Adapter, statistics: BlockStatistics, guided: Guided | None = None
) -> LayerView:
    """A block as a method surveys it; the block must have its weights as long as the view is in use."""
    groups = adapter.linear_groups(block)
    linears = {name: module.weight.detach().float() for group in groups for name, module in group.items()}
    linear_stats = statistics.linear_stats()
    if guided is not None:
        linear_stats = add_guided(linear_stats, guided)
    bank = adapter.expert_bank(block)
    if bank is None:
        return LayerView(linears, linear_stats)
    gathered = statistics.bank_stats()
    if guided is None:
        blended, _ = blend_with_pool(gathered)
    else:
        blended, _ = blend_with_pool(add_guided_bank(gathered, guided), guided.pooled)
    shared = {name: weight for name, weight in linears.items() if "shared_expert" in name}

    def shared_output(weights: Mapping[str, Tensor], most: int | None) -> Tensor:
        return statistics.layer_output(lambda x: adapter.shared_output(block, x, shared | dict(weights)), most)

    return LayerView(
        linears,
        linear_stats,
        bank,
        blended,
        statistics.expert_output,
        shared_output if shared else None,
    )
