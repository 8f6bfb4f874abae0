"""The survey before the block loop: what a method sees of a block, and runs that are killed on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_pipeline import TOKENS, weight_files
from tiny import TOP_K, make_model, save_model

from mobie.calibration.lazy import Cache
from mobie.calibration.statistics import BlockStatistics
from mobie.calibration.store import ActivationStore, Memory
from mobie.calibration.stream import Stream, enter_first_block
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import LinearStats, Method
from mobie.methods.rtn import RTN
from mobie.models.base import ARCHITECTURES
from mobie.models.weights import StreamedModel
from mobie.packing.checkpoint import block_path, load_block
from mobie.packing.grid import Grid
from mobie.pipeline import batches_of, quantize
from mobie.survey import layer_view

SHARED = {"deepseek", "deepseek_v2", "qwen2_moe", "qwen3_next"}


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


class Killed(Exception):
    """Stands for the end of a process."""


@dataclass(frozen=True)
class Busiest(AllocatingMethod):
    """Four bits for the block whose busiest expert sees most tokens, two for the others; may die in a block."""

    name: ClassVar[str] = "busiest"

    dies_at: int | None = None
    surveyed: ClassVar[list[int]] = []

    def survey(self, view: LayerView) -> dict[str, Any]:
        if self.dies_at == len(self.surveyed):
            raise Killed
        self.surveyed.append(len(self.surveyed))
        tokens = view.bank_stats.tokens["gate"] if view.bank_stats else [0]
        return {"most": max(tokens), "linears": list(view.linears), "of": sum(tokens)}

    def allocate(self, surveys: Sequence[Mapping[str, Any]]) -> list[Method]:
        most = [found["most"] for found in surveys]
        return [RTN(4 if index == most.index(max(most)) else 2) for index in range(len(most))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Busiest.surveyed.clear()
    return save_model(make_model("olmoe"), tmp_path / "model")


def test_each_block_is_quantized_with_the_method_it_was_allocated(folder: Path, tmp_path: Path) -> None:
    report = quantize(folder, Busiest(), TOKENS, tmp_path / "out", fingerprint="job")
    most = [entry["survey"]["most"] for entry in report.blocks]
    bits = [entry["allocation"]["bits"] for entry in report.blocks]
    assert bits == [4 if m == max(most) else 2 for m in most] and len(set(bits)) == 2
    assert [entry["survey"]["of"] for entry in report.blocks] == [TOKENS.numel() * TOP_K] * 2
    stored = [load_block(block_path(tmp_path / "out", index)).block for index in range(2)]
    assert [block.linears["self_attn.q_proj"].bits for block in stored] == bits
    assert not (tmp_path / "out" / "work").exists()


def test_killed_survey_goes_on_behind_its_last_finding(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quantize(folder, Busiest(dies_at=1), TOKENS, tmp_path / "out", fingerprint="job")
    assert Busiest.surveyed == [0]
    quantize(folder, Busiest(), TOKENS, tmp_path / "out", fingerprint="job")
    assert Busiest.surveyed == [0, 1]  # the first block was not looked at again
    quantize(folder, Busiest(), TOKENS, tmp_path / "whole", fingerprint="job")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


def test_finding_of_another_job_is_not_taken(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quantize(folder, Busiest(dies_at=1), TOKENS, tmp_path / "out", fingerprint="another")
    quantize(folder, Busiest(), TOKENS, tmp_path / "out", fingerprint="job")
    assert Busiest.surveyed == [0, 1, 2]


def test_finished_job_surveys_nothing(folder: Path, tmp_path: Path) -> None:
    first = quantize(folder, Busiest(), TOKENS, tmp_path / "out", fingerprint="job")
    again = quantize(folder, Busiest(dies_at=2), TOKENS, tmp_path / "out", fingerprint="job")
    for before, after in zip(first.blocks, again.blocks, strict=True):
        assert before | {"cpu_seconds": None} == after


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@torch.no_grad()
def test_outputs_of_the_experts_add_up_to_the_librarys(model_type: str, tmp_path: Path) -> None:
    streamed = StreamedModel(save_model(make_model(model_type), tmp_path / "model"))
    memory = Memory(1 << 30)
    store = ActivationStore(tmp_path, "job", memory)
    stream = Stream("s", batches_of(TOKENS), store, streamed.device)
    with streamed.outside():
        stream.arguments = enter_first_block(streamed, batches_of(TOKENS), stream.put)
    for index in range(len(streamed.blocks)):
        with streamed.block(index) as block:
            experts = streamed.adapter.experts_module(block)
            shape = stream.shape(streamed.adapter.linear_groups(block), experts)
            statistics = BlockStatistics(shape, store, Cache(memory))
            expected: list[torch.Tensor] = []
            layer: list[torch.Tensor] = []
            if experts is not None:
                experts.register_forward_hook(lambda _, args, out, into=expected: into.append(out))
                block.mlp.register_forward_hook(lambda _, args, out, into=layer: into.append(_first(out)))
            stream.observe(block, statistics, move=True)
            view = layer_view(block, streamed.adapter, statistics)
            assert view.linears.keys() == view.linear_stats.keys()
            if experts is None:
                assert view.bank is None and view.expert_output is None
                continue
            assert view.bank is not None and view.expert_output is not None and statistics._rows is not None
            total = torch.zeros_like(torch.cat(expected).flatten(0, -2))
            for expert in range(len(view.bank.projections["gate"])):
                own = {name: weight[expert] for name, weight in view.bank.projections.items()}
                output = view.expert_output(expert, own, None)
                assert torch.equal(output, view.expert_output(expert, {}, None))
                token = torch.cat([t for _, t in statistics._rows.of("gate", expert)] or [torch.zeros(0).long()])
                total.index_add_(0, token, output)
            torch.testing.assert_close(total, torch.cat(expected).flatten(0, -2), rtol=1e-4, atol=1e-5)
            if view.shared_output is not None:
                total += view.shared_output({}, None)
                assert len(view.shared_output({}, 5)) == 5
            torch.testing.assert_close(total, torch.cat(layer).flatten(0, -2), rtol=1e-4, atol=1e-5)
            assert (view.shared_output is None) == (model_type not in SHARED)


@dataclass(frozen=True)
class Weighed(Busiest):
    """Looks at loss gradients in its survey only: keeps of every block the sum of what its guided Hessians have."""

    name: ClassVar[str] = "weighed"
    guided_by: ClassVar[tuple[str, Any] | None] = ("guided", True)
    guided: bool = True

    def survey(self, view: LayerView) -> dict[str, Any]:
        found = super().survey(view)
        own = {name: stats.guided for name, stats in view.linear_stats.items()}
        if view.bank_stats is not None:
            own |= {
                f"{name}{e}": s.guided for name, each in view.bank_stats.experts.items() for e, s in enumerate(each)
            }
        return found | {"guided": {n: float(h.sum(0).trace()) for n, h in own.items() if h is not None}}


@dataclass(frozen=True)
class Watching(RTN):
    """Keeps the traces of the Linears' guided Hessians that the block loop gives it."""

    name: ClassVar[str] = "watching"
    guided_by: ClassVar[tuple[str, Any] | None] = ("guided", True)
    guided: bool = True
    traces: ClassVar[list[float]] = []

    def quantize_linear(self, weight: torch.Tensor, stats: LinearStats) -> Grid:
        assert stats.guided is not None
        self.traces.append(float(stats.guided.sum(0).trace()))
        return super().quantize_linear(weight, stats)


def test_survey_is_given_the_guided_hessians_of_the_block_loop(folder: Path, tmp_path: Path) -> None:
    Watching.traces.clear()
    report = quantize(folder, Weighed(), TOKENS, tmp_path / "out", fingerprint="job")
    quantize(folder, Watching(8), TOKENS, tmp_path / "loop", fingerprint="job")
    surveyed = [block["survey"] for block in report.blocks]
    assert [found["guided"][name] for found in surveyed for name in found["linears"]] == Watching.traces
    assert len(Watching.traces) == 8 and min(Watching.traces) > 0
    assert all(len(found["guided"]) > len(found["linears"]) for found in surveyed)  # those of the experts too


def test_killed_survey_with_gradients_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quantize(folder, Weighed(dies_at=1), TOKENS, tmp_path / "out", fingerprint="job")
    again = quantize(folder, Weighed(), TOKENS, tmp_path / "out", fingerprint="job")
    whole = quantize(folder, Weighed(), TOKENS, tmp_path / "whole", fingerprint="job")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    assert [b["survey"]["guided"] for b in again.blocks] == [b["survey"]["guided"] for b in whole.blocks]
