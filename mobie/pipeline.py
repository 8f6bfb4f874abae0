"""The block loop: capture a block's inputs, quantize it, write its shard, run what was written, go on.

Two streams of hidden states pass through the blocks. The *quantized* stream has gone through the blocks as they are
stored; its inputs give the Hessians. The *full-precision* stream exists only for methods that use loss gradients: its
tokens are those for which the gradients were taken. A finished block is on disk with a fingerprint; a run that was
killed reads it back instead of computing it, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobie.calibration.capture import (
    BlockStatistics,
    CalibrationPolicy,
    GuidedHessians,
    blend_with_pool,
)
from mobie.calibration.gradients import load_token_weights, save_token_weights, token_weights
from mobie.calibration.stream import Stream, check_attention, enter_first_block
from mobie.errors import DataError
from mobie.methods.base import BankStats, LinearStats, Method
from mobie.models.base import Adapter
from mobie.models.load import kept_dtype, load_full_precision, model_type
from mobie.packing.bank import split_gate_up
from mobie.packing.base import BitLedger
from mobie.packing.checkpoint import (
    KEPT,
    PackedBlock,
    block_path,
    load_block,
    save_block,
    save_manifest,
    save_tensors,
    write_block,
)
from mobie.storage import storage_errors

BATCH_SEQUENCES = 8
DEFAULT_POLICY = CalibrationPolicy()


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantize job found, for its record.

    ledger:      over all quantized weights.
    kept_bytes:  bytes of what stays in 16 bits (embeddings, norms, head, router).
    file_bytes:  size of all weight files of the checkpoint.
    gradient_cpu_seconds: of the gradient pass, None for a method without one.
    blocks:      per block: CPU seconds (None where the block was read back), tokens per expert, experts that borrowed
                 pooled statistics, relative output error per projection.
    """

    ledger: BitLedger
    kept_bytes: int
    file_bytes: int
    gradient_cpu_seconds: float | None
    blocks: list[dict[str, Any]]


def _add_guided(linears: dict[str, LinearStats], guided: GuidedHessians) -> dict[str, LinearStats]:
    by_name = guided.linear_guided()
    return {name: replace(s, guided=by_name[name]) if name in by_name else s for name, s in linears.items()}


def _add_guided_bank(stats: BankStats, guided: GuidedHessians) -> BankStats:
    by_name = guided.expert_guided()
    return BankStats(
        {
            name: [replace(s, guided=g) for s, g in zip(experts, by_name[name][0], strict=True)]
            for name, experts in stats.experts.items()
        },
        {name: replace(s, guided=by_name[name][1]) for name, s in stats.pooled.items()},
    )


def _relative_error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> float:
    """‖X(W - Ŵ)ᵀ‖_F / ‖XWᵀ‖_F of `(out, in)` weights from the Hessian of X."""
    difference = weight - dequantized
    error = ((difference @ hessian) * difference).sum()
    power = ((weight @ hessian) * weight).sum()
    return float((error.clamp(min=0) / power.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())


def _quantize_block(
    block: nn.Module,
    adapter: Adapter,
    method: Method,
    statistics: BlockStatistics,
    guided: GuidedHessians | None,
) -> tuple[PackedBlock, dict[str, Any]]:
    linear_stats = statistics.linear_stats()
    if guided is not None:
        linear_stats = _add_guided(linear_stats, guided)
    linears, errors = {}, {}
    for group in adapter.linear_groups(block):
        weights = {name: module.weight.detach().float() for name, module in group.items()}
        roles = {name.rpartition(".")[2]: name for name in group}  # methods know Linears by the field's names, `q_proj`
        by_role = method.quantize_group(
            {role: weights[name] for role, name in roles.items()},
            {role: linear_stats[name] for role, name in roles.items()},
        )
        packed = {name: by_role[role] for role, name in roles.items()}
        linears |= packed
        errors |= {n: _relative_error(w, packed[n].dequantize(), linear_stats[n].hessian) for n, w in weights.items()}

    details: dict[str, Any] = {"output_error": errors}
    bank = adapter.expert_bank(block)
    if bank is None:
        return PackedBlock(linears, {}), details
    if method.quantizes_router:
        name = adapter.architecture.router
        linears[name] = method.quantize_router(adapter.router(block).weight.detach().float(), linear_stats[name])
    bank_stats = statistics.bank_stats()
    if guided is not None:
        bank_stats = _add_guided_bank(bank_stats, guided)
    bank_stats, borrowed = blend_with_pool(bank_stats)
    experts = method.quantize_experts(bank, bank_stats)
    dense = split_gate_up({name: packed.dequantize() for name, packed in experts.items()})
    for name, weight in bank.projections.items():
        per_expert = zip(weight, dense[name], bank_stats.experts[name], strict=True)
        errors[f"experts.{name}"] = sum(_relative_error(w, d, s.hessian) for w, d, s in per_expert) / len(weight)
    details["tokens_per_expert"] = [s.tokens for s in bank_stats.experts["gate"]]
    details["borrowed_statistics"] = borrowed
    if guided is not None:
        details["pairs_without_gradient"] = guided.unmatched
    return PackedBlock(linears, experts), details


def _ledger(block: PackedBlock, router: nn.Module | None) -> BitLedger:
    active_share = router.top_k / len(router.weight) if router is not None else 1.0
    return BitLedger.merge({name: part.ledger(active_share) for name, part in block.parts().items()})


def _gradients(
    model: nn.Module,
    adapter: Adapter,
    method: Method,
    batches: list[Tensor],
    folder: Path,
    fingerprint: str,
    progress: bool,
) -> float:
    """Fill `folder` with the token weights of every block; returns the CPU seconds, 0 where they were there."""
    paths = [folder / f"{i:03d}.safetensors" for i in range(len(adapter.blocks(model)))]
    if all(path.exists() and load_token_weights(path, fingerprint) is not None for path in paths):
        return 0.0
    began = time.process_time()
    with tqdm(total=sum(b.numel() for b in batches), desc="loss gradients", unit="tok", disable=not progress) as bar:
        weights = token_weights(model, adapter, method, batches, bar.update)
    for path, layer in zip(paths, weights, strict=True):
        save_token_weights(path, layer, fingerprint)
    return time.process_time() - began


def _save_kept(
    model: nn.Module, adapter: Adapter, method: Method, dtype: torch.dtype, folder: Path, fingerprint: str
) -> int:
    """Write what stays in 16 bits; returns its bytes."""
    packed = {
        adapter.block_prefix(i) + name
        for i, block in enumerate(adapter.blocks(model))
        for name in adapter.quantized_parameters(block, router=method.quantizes_router)
    }
    kept = {n: p.detach().to(dtype) for n, p in model.state_dict().items() if n not in packed}
    save_tensors(folder / KEPT, kept, {"fingerprint": fingerprint})
    model.load_state_dict(kept, strict=False)  # go on with what is stored
    return sum(t.numel() * t.element_size() for t in kept.values())


def _check_calibration(calibration: Tensor, model: nn.Module) -> None:
    if calibration.ndim != 2 or calibration.numel() == 0:
        raise DataError(
            f"calibration tokens of shape {tuple(calibration.shape)}, expected (sequences, length) with at least one "
            "token; raise `sequences` or choose a longer text in the model's configuration"
        )
    smallest, largest = int(calibration.min()), int(calibration.max())
    vocabulary = model.config.vocab_size
    if smallest < 0 or largest >= vocabulary:
        raise DataError(
            f"calibration tokens {smallest} to {largest} exceed the model's vocabulary, expected 0 to "
            f"{vocabulary - 1}, tokens of this model's tokenizer; delete the calibration file and run the calibrate "
            "rule again"
        )


def quantize(
    model_folder: Path,
    method: Method,
    calibration: Tensor,
    out: Path,
    *,
    fingerprint: str,
    policy: CalibrationPolicy = DEFAULT_POLICY,
    progress: bool = False,
) -> QuantizeReport:
    """Quantize a model folder block by block into a checkpoint folder.

    Args:
        model_folder: local folder that the library can load.
        method: what to do with the weights.
        calibration: token ids `(sequences, length)`.
        out: checkpoint folder; blocks found there with this job's fingerprint are kept.
        fingerprint: digest of everything that decides the result (method, options, code, model, calibration, policy).
        policy: what the statistics are taken from.
        progress: show progress bars.

    Raises:
        DataError: unusable weights, calibration tokens or files.
        UnsupportedError: an architecture that no adapter describes.
        StorageError: the checkpoint cannot be written.
    """
    adapter = Adapter(model_type(model_folder))
    model = load_full_precision(model_folder)
    check_attention(model)
    _check_calibration(calibration, model)
    loop = _Loop(model, adapter, method, policy, out, fingerprint)
    batches = list(calibration.split(BATCH_SEQUENCES))
    gradient_cpu_seconds = loop.take_gradients(batches, progress) if method.needs_gradients else None
    with torch.no_grad():
        kept_bytes = _save_kept(model, adapter, method, kept_dtype(model_folder), out, fingerprint)
        loop.enter(batches)
        blocks = adapter.blocks(model)
        reports = [loop.step(i, block) for i, block in enumerate(tqdm(blocks, "blocks", disable=not progress))]
    _copy_side_files(model_folder, out)
    save_manifest(out, fingerprint, model.config.model_type, len(blocks), method.quantizes_router)
    shutil.rmtree(loop.work, ignore_errors=True)
    files = [*out.glob("block-*.safetensors"), out / KEPT]
    file_bytes = sum(file.stat().st_size for file in files)
    return QuantizeReport(BitLedger.merge(loop.ledgers), kept_bytes, file_bytes, gradient_cpu_seconds, reports)


class _Loop:
    """A job under way: the two streams, at the entry of the next block, and the ledgers of the blocks behind."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, policy: CalibrationPolicy, out: Path, fingerprint: str
    ) -> None:
        self.model, self.adapter, self.method, self.policy, self.out = model, adapter, method, policy, out
        self.work = out / "work"
        self.ledgers: dict[str, BitLedger] = {}
        self._fingerprint = fingerprint
        self._stream = Stream([], [])
        self._full_stream: Stream | None = None

    def take_gradients(self, batches: list[Tensor], progress: bool) -> float:
        """Fill `work` with token weights, unless every block is finished; returns the CPU seconds."""
        if all(self._finished(index) for index in range(len(self.adapter.blocks(self.model)))):
            return 0.0
        return _gradients(self.model, self.adapter, self.method, batches, self.work, self._fingerprint, progress)

    def enter(self, batches: list[Tensor]) -> None:
        """Put the streams before the first block."""
        self._stream = enter_first_block(self.model, self.adapter, batches)
        self._full_stream = self._stream if self.method.needs_gradients else None

    def step(self, index: int, block: nn.Module) -> dict[str, Any]:
        """Quantize a block or read it back, run what is stored, and report."""
        began = time.process_time()
        finished = self._finished(index)
        behind = self._pass_by(block) if finished else self._quantize(index, block)
        stored = load_block(block_path(self.out, index))
        write_block(self.adapter, block, stored.block)
        self._stream = behind if self.policy.inputs == "full_precision" else self._stream.through(block)
        self.ledgers[f"block{index}"] = _ledger(stored.block, self.adapter.router(block))
        return {"block": index, "cpu_seconds": None if finished else time.process_time() - began, **stored.details}

    def _shard_fingerprint(self, index: int) -> str:
        return hashlib.sha256(f"{self._fingerprint}/{index}".encode()).hexdigest()

    def _finished(self, index: int) -> bool:
        path = block_path(self.out, index)
        return path.exists() and load_block(path).fingerprint == self._shard_fingerprint(index)

    def _pass_by(self, block: nn.Module) -> Stream:
        """A finished block: move the full-precision stream on, and the other one where it has full-precision inputs."""
        if self._full_stream is not None:
            self._full_stream = self._full_stream.through(block)
        return self._stream.through(block) if self.policy.inputs == "full_precision" else self._stream

    def _quantize(self, index: int, block: nn.Module) -> Stream:
        """Gather statistics, quantize, write the shard; returns the stream behind the block as it was."""
        groups, experts = self.adapter.linear_groups(block), self.adapter.experts_module(block)
        guided = None
        if self._full_stream is not None:
            weights = load_token_weights(self.work / f"{index:03d}.safetensors", self._fingerprint)
            guided = GuidedHessians(self._full_stream.shape(groups, experts), weights)
            self._full_stream = self._full_stream.observe(block, experts, self.model.config, guided)
        if self.method.quantizes_router and experts is not None:
            groups.append({self.adapter.architecture.router: self.adapter.router(block)})
        statistics = BlockStatistics(self._stream.shape(groups, experts), self.policy.experts == "all_experts")
        behind = self._stream.observe(block, experts, self.model.config, statistics)
        packed, details = _quantize_block(block, self.adapter, self.method, statistics, guided)
        save_block(block_path(self.out, index), packed, self._shard_fingerprint(index), details)
        return behind


def _copy_side_files(model_folder: Path, out: Path) -> None:
    """Configuration and tokenizer files, as they are."""
    for file in sorted(model_folder.iterdir()):
        if file.suffix in {".json", ".txt", ".model"} and "safetensors" not in file.name:
            with storage_errors(out / file.name):
                shutil.copyfile(file, out / file.name)
