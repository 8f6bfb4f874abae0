"""The block loop on tiny models: what is stored is what is scored; killed runs end with the same bytes; bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_capture import close, hessian, inner_of, watch_plainly
from tiny import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    VOCABULARY,
    WIDTH,
    make_model,
    random_tokens,
    save_model,
    starve_experts,
)
from torch import Tensor

from mobie import pipeline
from mobie.calibration.backward import GradientPass
from mobie.calibration.gradients import save_checked
from mobie.calibration.shared import GradientCache, basis_digests
from mobie.calibration.statistics import CalibrationPolicy
from mobie.calibration.stream import Stream
from mobie.config import build_method, config_names, load_method
from mobie.errors import DataError, StorageError, UnsupportedError
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.models.base import ARCHITECTURES, Adapter
from mobie.models.weights import StreamedModel
from mobie.packing import checkpoint
from mobie.packing.bank import GATE_UP, split_gate_up
from mobie.packing.checkpoint import KEPT, MANIFEST, block_path, load_block, load_model, read_tensors, save_tensors
from mobie.pipeline import quantize

#: every registered method, with options where it needs some; a method that is missing here fails a test below
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16": ("fp16", {}),
    "rtn": ("rtn", {"bits": 3}),
    "gptq": ("gptq", {"bits": 3}),
    "gptq-g16": ("gptq", {"bits": 2, "group_size": 16}),
    "gptq-affinity": ("gptq", {"bits": 2, "token_weighting": "gate"}),
    "moequant": ("moequant", {"bits": 2}),
    "awq": ("awq", {"bits": 3, "group_size": 16}),
    "billm": ("billm", {"block_size": 16}),
    "arb": ("arb", {"refinement": "arb", "block_size": 16, "iterations": 2}),
    "arb-x": ("arb", {"refinement": "arb-x", "block_size": 16, "iterations": 2}),
    "arb-rc-cgb": (
        "arb",
        {"refinement": "arb-rc", "column_group_bitmap": True, "block_size": 16, "iterations": 2},
    ),
    "pb-llm": ("pb-llm", {"salient_share": 0.1, "group_size": 16, "block_size": 16}),
    "mobie": ("mobie", {"iterations": 2}),
    "mobie-none": ("mobie", {"iterations": 2, "joint_svd": "off", "glas": False, "nges": False}),
    "mobie-router": ("mobie", {"iterations": 2, "router": "binarized", "joint_svd": "fused_gate_up"}),
    "quantmoe": ("quantmoe", {"budget": 3.0, "group_size": 16}),
    "mxmoe": ("mxmoe", {"budget": 3.8}),
    "mobie-right": ("mobie", {"iterations": 2, "shared_side": "right", "null_space": "position_mean"}),
}
for config in config_names("methods"):  # any other method as it is first configured
    found = load_method(config)
    if found.method not in {registered for registered, _ in METHODS.values()}:
        METHODS[config] = (found.method, found.options)
TOKENS = random_tokens(9, 12)  # two batches


def method(name: str) -> Method:
    registered, options = METHODS[name]
    return build_method(registered, options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of every architecture."""
    root = tmp_path_factory.mktemp("sources")
    return {name: save_model(make_model(name), root / name) for name in ARCHITECTURES}


class Watched:
    """A method that remembers what it saw and returned, and can fail in a given block."""

    def __init__(self, inner: Method, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self._inner = inner
        self._fail_at, self._error = fail_at, error
        self.banks: list[tuple[ExpertBank, BankStats]] = []
        self.linears: list[dict[str, Any]] = []
        self.linear_stats: list[dict[str, LinearStats]] = []
        self.experts: list[dict[str, Any]] = []
        self.routers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def quantize_group(self, weights: dict[str, Tensor], stats: dict[str, LinearStats]) -> dict[str, Any]:
        self.linear_stats.append(stats)
        self.linears.append(self._inner.quantize_group(weights, stats))
        return self.linears[-1]

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, Any]:
        if len(self.banks) == self._fail_at:
            raise self._error
        computed = {name: list(own) for name, own in stats.experts.items()}  # lazy: gone after the block
        self.banks.append((bank, BankStats(computed, dict(stats.pooled), stats.tokens)))
        self.experts.append(self._inner.quantize_experts(bank, stats))
        return self.experts[-1]

    def quantize_router(self, weight: Tensor, stats: LinearStats) -> Any:
        self.routers.append(self._inner.quantize_router(weight, stats))
        return self.routers[-1]


class WatchedAllocation(Watched, AllocatingMethod):
    """A method that shares out bits: remembers what the methods of all blocks saw and returned."""

    @property
    def options(self) -> dict[str, Any]:
        return self._inner.options

    @property
    def needs_gradients(self) -> bool:
        return self._inner.needs_gradients

    def survey(self, view: LayerView) -> dict[str, Any]:
        return self._inner.survey(view)

    def allocate(self, surveys: Sequence[Mapping[str, Any]]) -> list[Any]:
        parts = [Watched(method, self._fail_at, self._error) for method in self._inner.allocate(surveys)]
        for part in parts:
            part.banks, part.linears, part.linear_stats = self.banks, self.linears, self.linear_stats
            part.experts, part.routers = self.experts, self.routers
        return parts


def watch(inner: Method, fail_at: int | None = None, error: BaseException | None = None) -> Watched:
    """Watch a method of either kind."""
    return (WatchedAllocation if isinstance(inner, AllocatingMethod) else Watched)(inner, fail_at, error)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("computed again")


def weight_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.is_file()}


def ledger_name(tensor: str, block: int) -> str:
    """`model.layers.0.mlp.experts.gate__basis__scale` → `experts.gate.basis.scale`; Linears begin with `linears.`."""
    name = tensor.removeprefix(f"model.layers.{block}.").replace("__", ".")
    return name.removeprefix("mlp.") if name.startswith("mlp.experts.") else f"linears.{name}"


def tensor_bytes(path: Path) -> int:
    """Size of the tensors in a safetensors file: everything behind the header, whose length stands in 8 bytes."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


# ---- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_checkpoint_holds_exactly_what_the_method_returned(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    watched = watch(method(name))
    report = quantize(sources["olmoe"], watched, TOKENS, tmp_path, fingerprint="job")
    model, _ = load_model(tmp_path)
    original = make_model("olmoe")
    changed = set()
    groups = iter(watched.linears)
    for index, block in enumerate(model.model.layers):
        for _ in range(2):  # query, key and value; output
            for role, packed in next(groups).items():
                assert torch.equal(block.get_parameter(f"self_attn.{role}.weight"), packed.dequantize())
                changed.add(f"model.layers.{index}.self_attn.{role}.weight")
        dense = split_gate_up({n: p.dequantize() for n, p in watched.experts[index].items()})
        fused = torch.cat([dense["gate"], dense["up"]], dim=1)
        assert torch.equal(block.mlp.experts.gate_up_proj, fused)
        assert torch.equal(block.mlp.experts.down_proj, dense["down"])
        changed |= {f"model.layers.{index}.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
        if watched.routers:
            assert torch.equal(block.mlp.gate.weight, watched.routers[index].dequantize())
            changed.add(f"model.layers.{index}.mlp.gate.weight")
    for parameter_name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if parameter_name not in changed:
            assert torch.equal(parameter, original.get_parameter(parameter_name)), parameter_name
    assert bool(watched.routers) == watched.quantizes_router
    assert (GATE_UP in watched.experts[0]) == (name == "mobie-router")
    check_bytes(report, tmp_path)
    assert not (tmp_path / "work").exists()
    for entry in report.blocks:
        assert entry["cpu_seconds"] >= 0
        if watched.needs_statistics:
            assert sum(entry["tokens_per_expert"]) == TOKENS.numel() * TOP_K
            assert all(0 <= e < 2 for e in entry["output_error"].values())
        else:
            assert set(entry["output_error"].values()) == {0}
    assert (report.gradient_cpu_seconds is None) == (not watched.needs_gradients)


def check_bytes(report: Any, folder: Path) -> None:
    """The ledger against the files: every tensor byte of the blocks once, kept tensors apart, headers in neither."""
    blocks = sorted(folder.glob("block-*.safetensors"))
    assert sum(i.bytes for i in report.ledger.items) == sum(map(tensor_bytes, blocks))
    by_block = [
        sum(i.bytes for i in report.ledger.items if i.name.startswith(f"block{n}.")) for n in range(len(blocks))
    ]
    assert by_block == [tensor_bytes(path) for path in blocks]
    assert report.kept_bytes == tensor_bytes(folder / KEPT)
    assert report.file_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"olmoe"}))
@pytest.mark.parametrize("name", ["fp16", "mobie-router", "moequant"])
def test_every_architecture_goes_through(name: str, model_type: str, sources: dict[str, Path], tmp_path: Path) -> None:
    report = quantize(sources[model_type], method(name), TOKENS, tmp_path, fingerprint="job")
    model, _ = load_model(tmp_path)
    adapter, original = Adapter(model_type), make_model(model_type)
    for index, block in enumerate(adapter.blocks(model)):
        parts = load_block(block_path(tmp_path, index)).block
        for linear, packed in parts.linears.items():
            assert torch.equal(block.get_parameter(f"{linear}.weight"), packed.dequantize())
        quantized = adapter.quantized_parameters(block, router=name != "fp16")
        for parameter_name, parameter in block.named_parameters():
            if parameter_name not in quantized:
                assert torch.equal(parameter, adapter.blocks(original)[index].get_parameter(parameter_name))
    check_bytes(report, tmp_path)
    weights = sum(
        block.get_parameter(n).numel()
        for block in adapter.blocks(original)
        for n in adapter.quantized_parameters(block, router=name != "fp16")
    )
    assert report.ledger.weights == weights


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_fp16_reproduces_the_librarys_logits_bit_for_bit(
    model_type: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    report = quantize(sources[model_type], method("fp16"), TOKENS, tmp_path, fingerprint="job")
    library = AutoModelForCausalLM.from_pretrained(sources[model_type], dtype=torch.float32).eval()
    ours, _ = load_model(tmp_path)
    ids = random_tokens(3, 19, seed=5)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, library(ids).logits)
    assert report.ledger.stored_bits == report.ledger.code_bits == report.ledger.paper_bits == 16


def test_reported_output_error_is_that_of_the_outputs(sources: dict[str, Path], tmp_path: Path) -> None:
    """‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ from the first block's real inputs."""
    report = quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path, fingerprint="job")
    original, (stored, _) = make_model("olmoe"), load_model(tmp_path)
    x = watch_plainly(original, Adapter("olmoe"), TOKENS)[0].linears["self_attn.q_proj"]
    w, q = (m.model.layers[0].self_attn.q_proj.weight.detach().double() for m in (original, stored))
    expected = float((x @ (w - q).T).norm() / (x @ w.T).norm())
    assert report.blocks[0]["output_error"]["self_attn.q_proj"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("published", "kept"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_calibration_runs_on_what_is_kept_in_16_bits(published: torch.dtype, kept: torch.dtype, tmp_path: Path) -> None:
    """Embeddings of a 32-bit model are rounded before the first block sees them, as they will be when it is scored."""
    model = make_model("olmoe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.003)
    source = save_model(model, tmp_path / "source", published)
    watched = Watched(method("rtn"))
    quantize(source, watched, TOKENS, tmp_path / "out", fingerprint="job")
    tensors, _ = read_tensors(tmp_path / "out" / KEPT)
    assert {t.dtype for t in tensors.values()} == {kept}
    embeddings = tensors["model.embed_tokens.weight"]
    assert torch.equal(embeddings, model.get_input_embeddings().weight.to(kept))
    stored, _ = load_model(tmp_path / "out")
    x = watch_plainly(stored, Adapter("olmoe"), TOKENS)[0].linears["self_attn.q_proj"]
    close(watched.linear_stats[0]["q_proj"].hessian, hessian(x))


def test_fp16_runs_no_forward_and_claims_no_error_that_it_did_not_measure(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobie.pipeline.enter_first_block", never)
    exact = quantize(sources["olmoe"], method("fp16"), TOKENS, tmp_path / "exact", fingerprint="job")
    assert set(exact.blocks[0]["output_error"].values()) == {0}
    model = make_model("olmoe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.003)  # no bfloat16 numbers any more
    source = save_model(model, tmp_path / "source", torch.float32)
    rounded = quantize(source, method("fp16"), TOKENS, tmp_path / "rounded", fingerprint="job")
    assert set(rounded.blocks[0]["output_error"].values()) == {None}


@pytest.mark.parametrize("name", ["fp16", "gptq-g16", "arb-rc-cgb", "mobie-router"])
def test_scales_and_bits_by_component_are_those_of_the_stored_tensors(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    report = quantize(sources["olmoe"], method(name), TOKENS, tmp_path, fingerprint="job")
    for index, entry in enumerate(report.blocks):
        tensors, _ = read_tensors(block_path(tmp_path, index))
        stored = {ledger_name(n, index): t for n, t in tensors.items() if n.endswith("scale") and t.numel()}
        assert set(entry["scales"]) == set(stored)
        assert bool(stored) == (name != "fp16")
        for tensor_name, tensor in stored.items():
            values = np.sort(np.abs(tensor.double().numpy()).ravel())
            got = entry["scales"][tensor_name]
            assert got["count"] == len(values)
            assert got["minimum"] == pytest.approx(values[0], rel=1e-3)
            assert got["maximum"] == pytest.approx(values[-1], rel=1e-3)
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            assert got["median"] == pytest.approx(middle, rel=1e-3)
            assert got["median"] <= got["p95"] <= got["maximum"]
            assert np.mean(values <= got["p95"] * 1.001) >= 0.95 - 1 / len(values)
    components = report.components
    assert set(components) == {"attention", "experts"} | ({"router"} if name == "mobie-router" else set())
    assert sum(c["weights"] for c in components.values()) == report.ledger.weights
    stored_bits = sum(c["stored"] * c["weights"] for c in components.values())
    assert stored_bits == pytest.approx(8 * sum(item.bytes for item in report.ledger.items))
    in_experts = sum(i.bytes for i in report.ledger.items if ".experts." in i.name and "linears" not in i.name)
    assert components["experts"]["stored"] * components["experts"]["weights"] == pytest.approx(8 * in_experts)
    assert components["attention"]["weights"] == 2 * 2 * (HIDDEN * HIDDEN + HIDDEN * HIDDEN // 2)


# ---- experts that see little -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_experts_with_no_and_with_one_token(name: str, tmp_path: Path) -> None:
    rare = 7
    model = make_model("olmoe")
    starve_experts(model, rare)
    source = save_model(model, tmp_path / "source")
    ids = TOKENS.masked_fill(rare == TOKENS, rare + 1)
    ids[4, 3] = rare
    watched = watch(method(name))
    report = quantize(source, watched, ids, tmp_path / "out", fingerprint="job")
    loaded, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        assert loaded(ids).logits.isfinite().all()
    if not watched.needs_statistics:
        return
    first = report.blocks[0]
    assert first["tokens_per_expert"][:2] == [0, 1]
    assert sum(first["tokens_per_expert"]) == ids.numel() * TOP_K
    assert {0, 1} <= set(first["borrowed_statistics"]["gate"])
    enough = {"gate": 2 * HIDDEN, "up": 2 * HIDDEN, "down": 2 * WIDTH}
    for projection, borrowed in first["borrowed_statistics"].items():
        assert borrowed == [e for e, n in enumerate(first["tokens_per_expert"]) if n < enough[projection]]
    _, stats = watched.banks[0]
    for projection in ("gate", "up", "down"):
        none, pooled = stats.experts[projection][0], stats.pooled[projection]
        assert torch.equal(none.hessian, pooled.hessian)
        assert torch.equal(none.mean_abs, pooled.mean_abs)


# ---- policies --------------------------------------------------------------------------------------------------------


def statistics(source: Path, out: Path, policy: CalibrationPolicy) -> Watched:
    watched = Watched(method("rtn"))
    quantize(source, watched, TOKENS, out, fingerprint="job", policy=policy)
    return watched


def test_inputs_come_from_the_quantized_prefix_or_from_full_precision(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized = statistics(sources["olmoe"], tmp_path / "q", CalibrationPolicy())
    full = statistics(sources["olmoe"], tmp_path / "f", CalibrationPolicy(inputs="full_precision"))
    adapter = Adapter("olmoe")
    stored, _ = load_model(tmp_path / "q")
    with_original = watch_plainly(make_model("olmoe"), adapter, TOKENS)
    with_stored = watch_plainly(stored, adapter, TOKENS)
    for watched, seen in ((full, with_original), (quantized, with_stored)):
        # groups of block 1: query … at 2, output at 3; block 1's own Linears run in full precision while observed
        close(watched.linear_stats[2]["q_proj"].hessian, hessian(seen[1].linears["self_attn.q_proj"]))
    assert torch.equal(full.linear_stats[0]["q_proj"].hessian, quantized.linear_stats[0]["q_proj"].hessian)
    difference = full.linear_stats[2]["q_proj"].hessian - quantized.linear_stats[2]["q_proj"].hessian
    assert float(difference.norm() / full.linear_stats[2]["q_proj"].hessian.norm()) > 1e-3


def test_all_experts_policy_counts_every_token_for_every_expert(sources: dict[str, Path], tmp_path: Path) -> None:
    watched = statistics(sources["olmoe"], tmp_path, CalibrationPolicy(experts="all_experts"))
    model = make_model("olmoe")
    seen = watch_plainly(model, Adapter("olmoe"), TOKENS)[0]
    _, stats = watched.banks[0]
    for expert in range(EXPERTS):
        assert stats.experts["gate"][expert].tokens == TOKENS.numel()
        close(stats.experts["gate"][expert].hessian, hessian(seen.hidden))
        inner = inner_of(model.model.layers[0].mlp.experts, seen.hidden, expert)
        close(stats.experts["down"][expert].hessian, hessian(inner))
    routed = statistics(sources["olmoe"], tmp_path / "routed", CalibrationPolicy())
    assert [s.tokens for s in routed.banks[0][1].experts["gate"]] == [len(seen.routed(e)) for e in range(EXPERTS)]


def test_gradients_reach_the_method_and_match_the_tokens(sources: dict[str, Path], tmp_path: Path) -> None:
    watched = Watched(method("mobie"))
    report = quantize(sources["olmoe"], watched, TOKENS, tmp_path, fingerprint="job")
    assert [entry["pairs_without_gradient"] for entry in report.blocks] == [0, 0]
    for bank, stats in watched.banks:
        for projection, weight in bank.projections.items():
            for own in stats.experts[projection]:
                assert own.guided.shape == (4, weight.shape[2], weight.shape[2])
                assert float(own.guided.abs().max()) > 0
    for stats in watched.linear_stats:
        assert all(float(own.guided.abs().max()) > 0 for own in stats.values())


# ---- resume ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`: nothing on the way may catch it."""


@pytest.mark.parametrize("inputs", ["quantized_prefix", "full_precision"])
@pytest.mark.parametrize("name", ["gptq", "moequant", "mobie", "mobie-router", "quantmoe"])
def test_killed_run_goes_on_and_ends_with_the_same_bytes(
    name: str, inputs: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    policy = CalibrationPolicy(inputs=inputs)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = quantize(sources["olmoe"], method(name), TOKENS, whole, fingerprint="job", policy=policy)
    with pytest.raises(Killed):
        quantize(sources["olmoe"], watch(method(name), 1, Killed()), TOKENS, parts, fingerprint="job", policy=policy)
    assert block_path(parts, 0).exists() and not block_path(parts, 1).exists() and not (parts / MANIFEST).exists()
    with pytest.raises(DataError, match="manifest"):
        load_model(parts)
    stamp = block_path(parts, 0).stat().st_mtime_ns
    again = watch(method(name))
    report = quantize(sources["olmoe"], again, TOKENS, parts, fingerprint="job", policy=policy)
    assert len(again.banks) == 1 and len(again.linears) == 2  # block 1 only
    assert block_path(parts, 0).stat().st_mtime_ns == stamp
    assert weight_files(parts) == weight_files(whole)
    assert report.ledger == expected.ledger
    assert report.blocks[0]["cpu_seconds"] is None and report.blocks[1]["cpu_seconds"] is not None
    for got, entry in zip(report.blocks, expected.blocks, strict=True):
        assert {k: v for k, v in got.items() if k != "cpu_seconds"} == {
            k: v for k, v in entry.items() if k != "cpu_seconds"
        }


def test_gradients_are_kept_over_a_kill(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        quantize(sources["olmoe"], Watched(method("mobie"), 1, Killed()), TOKENS, tmp_path, fingerprint="job")

    monkeypatch.setattr("mobie.pipeline.GradientPass", never)
    report = quantize(sources["olmoe"], method("mobie"), TOKENS, tmp_path, fingerprint="job")
    assert report.gradient_cpu_seconds > 0  # what they cost the first time


# ---- loss gradients that jobs share ----------------------------------------------------------------------------------


def shared(source: Path, out: Path, cache: Path, key: str = "model", name: str = "mobie", **changes: Any) -> Any:
    registered, options = METHODS[name]
    return quantize(
        source,
        build_method(registered, options | changes),
        TOKENS,
        out,
        fingerprint=str(out),
        gradient_cache=GradientCache(cache, key),
    )


def shards(folder: Path) -> list[dict[str, bytes]]:
    """Tensors of every block: the metadata names the job."""
    paths = sorted(folder.glob("block-*.safetensors"))
    return [{n: t.numpy().tobytes() for n, t in read_tensors(path)[0].items()} for path in paths]


@pytest.mark.parametrize(
    ("name", "keeps_guided"), [("mobie", True), ("mobie", False), ("mobie-right", True), ("mobie-router", True)]
)
def test_shared_gradients_change_no_byte_and_are_computed_once(
    name: str, keeps_guided: bool, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = quantize(sources["olmoe"], method(name), TOKENS, tmp_path / "alone", fingerprint="job")
    assert alone.gradients_shared is False
    if not keeps_guided:
        monkeypatch.setattr("mobie.calibration.shared.LARGEST_GUIDED", 0)
    first = shared(sources["olmoe"], tmp_path / "first", tmp_path / "cache", name=name)
    (folder,) = (tmp_path / "cache").iterdir()
    expected = {"000.safetensors", "001.safetensors", "cost.json"}
    expected |= {"guided-000.safetensors", "guided-001.safetensors"} if keeps_guided else set()
    assert {path.name for path in folder.iterdir()} == expected
    before = weight_files(folder)
    monkeypatch.setattr("mobie.pipeline.GradientPass", never)
    if keeps_guided:
        monkeypatch.setattr("mobie.pipeline.GuidedHessians", never)
    second = shared(sources["olmoe"], tmp_path / "second", tmp_path / "cache", name=name)
    assert shards(tmp_path / "alone") == shards(tmp_path / "first") == shards(tmp_path / "second")
    assert weight_files(folder) == before
    assert (first.gradients_shared, second.gradients_shared) == (False, True)
    assert first.gradient_cpu_seconds == second.gradient_cpu_seconds > 0
    for got, entry in zip(second.blocks, first.blocks, strict=True):
        assert got["pairs_without_gradient"] == entry["pairs_without_gradient"]
        assert got["output_error"] == entry["output_error"]


def test_a_block_counts_shared_guided_hessians_with_what_they_cost(sources: dict[str, Path], tmp_path: Path) -> None:
    shared(sources["olmoe"], tmp_path / "first", tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    path = folder / "guided-001.safetensors"
    tensors, metadata = read_tensors(path)
    save_checked(path, tensors, metadata["fingerprint"], metadata["notes"] | {"cpu_seconds": 1000.0})
    second = shared(sources["olmoe"], tmp_path / "second", tmp_path / "cache")
    assert second.blocks[0]["cpu_seconds"] < 1000 <= second.blocks[1]["cpu_seconds"]


def test_gradients_are_shared_by_those_that_need_the_same_and_nobody_else(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    def key(source: str = "model", batch: int = 8, folder: Path = sources["olmoe"], **options: Any) -> str:
        streamed, wanted = StreamedModel(folder), build_method("mobie", options)
        bases = []
        for index in range(len(streamed.blocks)):
            with streamed.block(index) as block:
                bases.append(basis_digests(streamed.adapter.expert_bank(block), wanted))
        return GradientCache(Path(), source).key(wanted, batch, bases)

    base = key()
    assert base == key(regularization=0.3, nges=False, salient_share=0.1, iterations=1, basis_bits=16)
    identity = key(gradient_at="output")
    assert identity == key(shared_side="right") == key(joint_svd="off")  # read at the output as well
    others = [key(gradient_groups=2), key(joint_svd="fused_gate_up"), key(router="binarized"), key(rank=3)]
    others += [key("other calibration tokens"), key(batch=4)]
    assert len({base, identity, *others}) == 8
    model = make_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] += 1
    assert key(folder=save_model(model, tmp_path)) != base  # another basis


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("000.safetensors", "bit"),
        ("000.safetensors", "cut"),
        ("guided-001.safetensors", "bit"),
        ("guided-001.safetensors", "gone"),
        ("cost.json", "cut"),
    ],
)
def test_damaged_shared_gradients_are_computed_again(
    file: str, damage: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    shared(sources["olmoe"], tmp_path / "first", tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    path = folder / file
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = before[:-3] + bytes([before[-3] ^ 64]) + before[-2:]
        path.write_bytes(flipped if damage == "bit" else before[: len(before) // 2])
    # without the guided Hessians of another block the token weights are needed as well
    (folder / "guided-000.safetensors").unlink()
    shared(sources["olmoe"], tmp_path / "second", tmp_path / "cache")
    assert shards(tmp_path / "first") == shards(tmp_path / "second")
    if file == "000.safetensors":
        assert path.read_bytes() == before
    third = shared(sources["olmoe"], tmp_path / "third", tmp_path / "cache")
    assert third.gradients_shared


@pytest.mark.parametrize(("owner", "where"), [(GradientPass, "run"), (pipeline, "save_block")])
def test_two_jobs_at_once_do_each_other_no_harm(
    owner: Any, where: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole second job runs while the first has computed its gradients, or is between two blocks."""
    alone = tmp_path / "alone"
    quantize(sources["olmoe"], method("mobie"), TOKENS, alone, fingerprint="job")
    original = getattr(owner, where)

    def interrupted(*arguments: Any) -> Any:
        result = original(*arguments)
        monkeypatch.setattr(owner, where, original)
        if not (tmp_path / "second").exists():
            shared(sources["olmoe"], tmp_path / "second", tmp_path / "cache")
        return result

    monkeypatch.setattr(owner, where, interrupted)
    shared(sources["olmoe"], tmp_path / "first", tmp_path / "cache")
    assert shards(alone) == shards(tmp_path / "first") == shards(tmp_path / "second")
    assert shared(sources["olmoe"], tmp_path / "third", tmp_path / "cache").gradients_shared
    assert shards(alone) == shards(tmp_path / "third")


def test_a_finished_run_and_the_last_block_need_no_stream(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    through = Stream.through
    monkeypatch.setattr(Stream, "through", lambda self, block: passes.append(1) or through(self, block))
    quantize(sources["olmoe"], method("mobie"), TOKENS, tmp_path, fingerprint="job")
    assert len(passes) == 1  # of two blocks
    monkeypatch.setattr("mobie.pipeline.enter_first_block", never)
    quantize(sources["olmoe"], method("mobie"), TOKENS, tmp_path, fingerprint="job")


def test_shards_of_the_first_format_version_are_written_anew(sources: dict[str, Path], tmp_path: Path) -> None:
    for index in range(2):
        save_tensors(block_path(tmp_path, index), {"linears.q:codes": torch.zeros(1)}, {"fingerprint": "old"})
    quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path, fingerprint="job")
    load_model(tmp_path)


def test_another_fingerprint_computes_everything_anew(sources: dict[str, Path], tmp_path: Path) -> None:
    quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path / "a", fingerprint="old")
    watched = Watched(method("gptq"))
    quantize(sources["olmoe"], watched, TOKENS, tmp_path / "a", fingerprint="new")
    assert len(watched.banks) == 2
    quantize(sources["olmoe"], method("gptq"), TOKENS, tmp_path / "b", fingerprint="new")
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")


def test_finished_run_is_left_as_it_is(sources: dict[str, Path], tmp_path: Path) -> None:
    quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path, fingerprint="job")
    before = weight_files(tmp_path)
    watched = Watched(method("rtn"))
    quantize(sources["olmoe"], watched, TOKENS, tmp_path, fingerprint="job")
    assert watched.banks == [] and weight_files(tmp_path) == before


KILL = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
import torch
from mobie.methods.rtn import RTN
from mobie.pipeline import quantize

@dataclass(frozen=True)
class Dies(RTN):
    def quantize_experts(self, bank, stats):
        if (Path(sys.argv[2]) / "block-000.safetensors").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().quantize_experts(bank, stats)

tokens = torch.load(sys.argv[3])
quantize(Path(sys.argv[1]), Dies(bits=3), tokens, Path(sys.argv[2]), fingerprint="job")
"""


def test_process_killed_outright_leaves_a_folder_to_go_on_from(sources: dict[str, Path], tmp_path: Path) -> None:
    torch.save(TOKENS, tmp_path / "tokens.pt")
    out = tmp_path / "out"
    root = Path(__file__).parents[1]
    outcome = subprocess.run(
        [sys.executable, "-c", KILL, sources["olmoe"], out, tmp_path / "tokens.pt"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr.decode()
    watched = Watched(method("rtn"))
    quantize(sources["olmoe"], watched, TOKENS, out, fingerprint="job")
    assert len(watched.banks) == 1
    quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path / "whole", fingerprint="job")
    assert weight_files(out) == weight_files(tmp_path / "whole")


def test_damaged_own_shard_is_named_and_after_its_removal_the_run_goes_on(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path, fingerprint="job")
    before = weight_files(tmp_path)
    path = block_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"block-001\.safetensors.*expected a complete file; delete it and run the same"
    ):
        quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path, fingerprint="job")
    path.unlink()
    watched = Watched(method("rtn"))
    quantize(sources["olmoe"], watched, TOKENS, tmp_path, fingerprint="job")
    assert len(watched.banks) == 1
    assert weight_files(tmp_path) == before


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_full_disk_leaves_finished_shards_and_the_run_goes_on(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = checkpoint.save_file

    def full_at_block_1(tensors: Any, target: Path, metadata: Any) -> None:
        if "block-001" in Path(target).name:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, target, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_at_block_1)
        with pytest.raises(StorageError, match=r"block-001\.safetensors.*No space left.*free some space"):
            quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path / "out", fingerprint="job")
    left = weight_files(tmp_path / "out")
    assert set(left) == {"block-000.safetensors", KEPT}
    quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path / "out", fingerprint="job")
    after = weight_files(tmp_path / "out")
    assert all(after[name] == data for name, data in left.items())


def test_full_disk_while_copying_the_tokenizer(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"tokenizer\.json.*No space left.*free some space"):
        quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path, fingerprint="job")
    assert not (tmp_path / MANIFEST).exists()


def test_output_folder_that_is_a_file(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(StorageError, match="out.*a file stands where a folder is needed"):
        quantize(sources["olmoe"], method("rtn"), TOKENS, tmp_path / "out", fingerprint="job")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """A copy of the OLMoE folder to damage."""
    yield Path(shutil.copytree(sources["olmoe"], tmp_path / "source"))


def refused(source: Path, out: Path, tokens: Tensor = TOKENS, name: str = "rtn") -> str:
    with pytest.raises((DataError, UnsupportedError)) as caught:
        quantize(source, method(name), tokens, out, fingerprint="job")
    assert not (out / MANIFEST).exists()
    return f"{type(caught.value).__name__}: {caught.value}"


def edit_config(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "parameter",
    [
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.down_proj",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("name", ["rtn", "mobie"])
def test_nan_in_any_weight_is_refused_by_name_before_work_starts(parameter: str, name: str, tmp_path: Path) -> None:
    model = make_model("olmoe")
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[3] = float("nan")
    message = refused(save_model(model, tmp_path / "source"), tmp_path / "out", name=name)
    assert message.startswith(f"DataError: {parameter}: 1 of ")
    assert "expected finite weights; download the model again" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(0, 12), (3, 0), (12,)])
def test_calibration_without_tokens_is_refused(
    shape: tuple[int, ...], sources: dict[str, Path], tmp_path: Path
) -> None:
    message = refused(sources["olmoe"], tmp_path / "out", torch.zeros(shape, dtype=torch.long))
    assert f"shape {shape}, expected (sequences, length) with at least one" in message
    assert "raise `sequences`" in message


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_token_beyond_the_vocabulary_is_refused(token: int, sources: dict[str, Path], tmp_path: Path) -> None:
    ids = TOKENS.clone()
    ids[1, 2] = token
    message = refused(sources["olmoe"], tmp_path / "out", ids)
    assert message.startswith("DataError: calibration token")
    assert str(token) in message and str(VOCABULARY - 1) in message and "run the calibrate rule again" in message


@pytest.mark.parametrize("cut", [0, 100, -50])
def test_truncated_model_is_refused(cut: int, source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    message = refused(source, tmp_path / "out")
    assert message.startswith(f"DataError: {source}: the model's weights cannot be read")
    assert "expected complete safetensors files" in message and "fetch the model again" in message


def test_missing_weights_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    assert "cannot be read" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_missing_or_broken_configuration_is_refused(content: str | None, source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    message = refused(source, tmp_path / "out")
    assert message.startswith(f"DataError: {source}/config.json: no readable model configuration")
    assert "expected a JSON object with `model_type`" in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 3}, "missing_keys"),
        ({"num_hidden_layers": 1}, "unexpected_keys"),
        ({"hidden_size": 64}, "mismatched_keys"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    changes: dict[str, int], problem: str, source: Path, tmp_path: Path
) -> None:
    edit_config(source, **changes)
    message = refused(source, tmp_path / "out")
    assert message.startswith("DataError") and problem in message
    assert "expected exactly the model's own parameters; fetch the model again" in message


@pytest.mark.parametrize("model_type", ["llama", "no_such_thing", "olmo"])
def test_unknown_architecture_is_unsupported(model_type: str, source: Path, tmp_path: Path) -> None:
    edit_config(source, model_type=model_type)
    message = refused(source, tmp_path / "out")
    assert message.startswith(f"UnsupportedError: unknown architecture '{model_type}'")
    assert "olmoe" in message
