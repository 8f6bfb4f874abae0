"""The block loop: capture a block's inputs, quantize it, write its shard, run what was written, go on.

Two streams of hidden states pass through the blocks. The *quantized* stream has gone through the blocks as they are
stored; its inputs give the Hessians. The *full-precision* stream exists only for methods that use loss gradients: its
tokens are those for which the gradients were taken. What it gives may be shared by many jobs (`calibration.shared`),
and neither stream goes further than the last block that needs it. A finished block is on disk with a fingerprint; a run
that was killed reads it back instead of computing it, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobie.calibration.capture import (
    BlockStatistics,
    CalibrationPolicy,
    Guided,
    GuidedHessians,
    blend_with_pool,
)
from mobie.calibration.gradients import token_weights
from mobie.calibration.shared import GradientCache, GradientFolder
from mobie.calibration.stream import Stream, check_attention, enter_first_block
from mobie.errors import DataError
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.models.base import Adapter
from mobie.models.load import kept_dtype, load_full_precision, model_type
from mobie.packing.bank import split_gate_up
from mobie.packing.base import BitLedger, Packed
from mobie.packing.checkpoint import (
    KEPT,
    BlockNames,
    PackedBlock,
    block_path,
    load_block,
    read_fingerprint,
    save_block,
    save_tensors,
    weight_files,
    write_block,
)
from mobie.packing.folder import finish_folder, refuse_quantized
from mobie.packing.summary import bits_by_component, scale_summary
from mobie.storage import make_folder, remove_abandoned

BATCH_SEQUENCES = 8
DEFAULT_POLICY = CalibrationPolicy()
#: what a method that needs no statistics is given
NO_STATISTICS = LinearStats(torch.zeros(0, 0), 0, torch.zeros(0), torch.zeros(0, 0))


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantize job found, for its record.

    ledger:      over all quantized weights.
    kept_bytes:  bytes of what stays in 16 bits (embeddings, norms, head, router).
    file_bytes:  size of all weight files of the checkpoint.
    gradient_cpu_seconds: of the gradient pass, in this job or in the one that shared its result; None for a method
                 without one.
    blocks:      per block: CPU seconds (None where the block was read back; shared guided Hessians count with their
                 own), tokens per expert, experts that borrowed pooled statistics, relative output error per projection,
                 quantiles of the scales.
    components:  bits and weights of experts, attention and so on.
    gradients_shared: whether loss gradients were read back, not computed; None for a method without them.
    """

    ledger: BitLedger
    kept_bytes: int
    file_bytes: int
    gradient_cpu_seconds: float | None
    blocks: list[dict[str, Any]]
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    gradients_shared: bool | None = None


def _add_guided(linears: dict[str, LinearStats], guided: Guided) -> dict[str, LinearStats]:
    by_name = guided.linears
    return {name: replace(s, guided=by_name[name]) if name in by_name else s for name, s in linears.items()}


def _add_guided_bank(stats: BankStats, guided: Guided) -> BankStats:
    return BankStats(
        {
            name: [replace(s, guided=g) for s, g in zip(experts, guided.experts[name], strict=True)]
            for name, experts in stats.experts.items()
        },
        {name: replace(s, guided=guided.pooled[name]) for name, s in stats.pooled.items()},
    )


def _relative_error(weight: Tensor, dequantized: Tensor, stats: LinearStats) -> float | None:
    """‖X(W - Ŵ)ᵀ‖_F / ‖XWᵀ‖_F of `(out, in)` weights from the Hessian of X.

    Without statistics it is 0 where nothing changed, and else not known.
    """
    if stats is NO_STATISTICS:
        return 0.0 if torch.equal(weight, dequantized) else None
    hessian = stats.hessian
    difference = weight - dequantized
    error = ((difference @ hessian) * difference).sum()
    power = ((weight @ hessian) * weight).sum()
    return float((error.clamp(min=0) / power.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())


def _quantize_block(
    block: nn.Module,
    adapter: Adapter,
    method: Method,
    statistics: BlockStatistics | None,
    guided: Guided | None,
) -> tuple[PackedBlock, dict[str, Any]]:
    linear_stats = defaultdict(lambda: NO_STATISTICS) if statistics is None else statistics.linear_stats()
    if guided is not None:
        linear_stats = _add_guided(linear_stats, guided)
    linears: dict[str, Packed] = {}
    errors: dict[str, float | None] = {}
    for group in adapter.linear_groups(block):
        weights = {name: module.weight.detach().float() for name, module in group.items()}
        roles = {name.rpartition(".")[2]: name for name in group}  # methods know Linears by the field's names, `q_proj`
        by_role = method.quantize_group(
            {role: weights[name] for role, name in roles.items()},
            {role: linear_stats[name] for role, name in roles.items()},
        )
        packed = {name: by_role[role] for role, name in roles.items()}
        linears |= packed
        errors |= {n: _relative_error(w, packed[n].dequantize(), linear_stats[n]) for n, w in weights.items()}

    details: dict[str, Any] = {"output_error": errors}
    bank = adapter.expert_bank(block)
    if bank is None:
        return PackedBlock(linears, {}), details
    if method.quantizes_router:
        name = adapter.architecture.router
        linears[name] = method.quantize_router(adapter.moe_router(block).weight.detach().float(), linear_stats[name])
    if statistics is None:
        bank_stats = _no_bank_statistics(bank)
    else:
        gathered = statistics.bank_stats()
        bank_stats, borrowed = blend_with_pool(gathered if guided is None else _add_guided_bank(gathered, guided))
        details["tokens_per_expert"] = [s.tokens for s in bank_stats.experts["gate"]]
        details["borrowed_statistics"] = borrowed
    experts = method.quantize_experts(bank, bank_stats)
    dense = split_gate_up({name: packed.dequantize() for name, packed in experts.items()})
    for name, weight in bank.projections.items():
        per_expert = zip(weight, dense[name], bank_stats.experts[name], strict=True)
        known = [error for w, d, s in per_expert if (error := _relative_error(w, d, s)) is not None]
        errors[f"experts.{name}"] = sum(known) / len(weight) if len(known) == len(weight) else None
    if guided is not None:
        details["pairs_without_gradient"] = guided.unmatched
    return PackedBlock(linears, experts), details


def _no_bank_statistics(bank: ExpertBank) -> BankStats:
    experts = {name: [NO_STATISTICS] * len(weight) for name, weight in bank.projections.items()}
    return BankStats(experts, dict.fromkeys(bank.projections, NO_STATISTICS))


def _part_ledgers(block: PackedBlock, router: nn.Module | None) -> dict[str, BitLedger]:
    active_share = router.top_k / len(router.weight) if router is not None else 1.0
    return {name: part.ledger(active_share) for name, part in block.parts().items()}


def _save_kept(
    model: nn.Module, adapter: Adapter, method: Method, dtype: torch.dtype, folder: Path, fingerprint: str
) -> int:
    """Write what stays in 16 bits; returns its bytes."""
    packed = {
        adapter.block_prefix(i) + name
        for i, block in enumerate(adapter.blocks(model))
        for name in adapter.quantized_parameters(block, router=method.quantizes_router)
    }
    skipped = packed | set(model.all_tied_weights_keys)  # a tied parameter is stored once, under its first name
    kept = {n: p.detach().to(dtype) for n, p in model.state_dict().items() if n not in skipped}
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
    gradient_cache: GradientCache | None = None,
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
        gradient_cache: where loss gradients are read from or left for other jobs; None keeps them to this job.
        progress: show progress bars.

    Raises:
        DataError: unusable weights, calibration tokens or files.
        UnsupportedError: an architecture that no adapter describes.
        StorageError: the checkpoint cannot be written.
    """
    adapter = Adapter(model_type(model_folder))
    refuse_quantized(model_folder)
    model = load_full_precision(model_folder)
    check_attention(model)
    _check_calibration(calibration, model)
    remove_abandoned(make_folder(out))  # of files that a killed job had begun or just finished
    loop = _Loop(model, adapter, method, policy, out, fingerprint)
    batches = list(calibration.split(BATCH_SEQUENCES))
    if method.needs_gradients:
        loop.take_gradients(batches, gradient_cache, progress)
    with torch.no_grad():
        kept_bytes = _save_kept(model, adapter, method, kept_dtype(model_folder), out, fingerprint)
        loop.enter(batches)
        blocks = adapter.blocks(model)
        reports = [loop.step(i, block) for i, block in enumerate(tqdm(blocks, "blocks", disable=not progress))]
    finish_folder(model_folder, out, model, method, fingerprint=fingerprint, blocks=len(blocks))
    shutil.rmtree(loop.work, ignore_errors=True)
    file_bytes = sum(file.stat().st_size for file in weight_files(out, len(blocks)))
    by_block = {f"block{index}": BitLedger.merge(ledgers) for index, ledgers in enumerate(loop.ledgers)}
    return QuantizeReport(
        BitLedger.merge(by_block),
        kept_bytes,
        file_bytes,
        loop.gradient_cpu_seconds,
        reports,
        bits_by_component(loop.ledgers, adapter.architecture.router),
        loop.gradients_shared,
    )


class _Loop:
    """A job under way: the two streams, at the entry of the next block, and the ledgers of the blocks behind."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, policy: CalibrationPolicy, out: Path, fingerprint: str
    ) -> None:
        self.model, self.adapter, self.method, self.policy, self.out = model, adapter, method, policy, out
        self.work = out / "work"
        self.ledgers: list[dict[str, BitLedger]] = []
        self.gradient_cpu_seconds: float | None = None
        self.gradients_shared: bool | None = None
        self._fingerprint = fingerprint
        self._finished = [self._is_finished(index) for index in range(len(adapter.blocks(model)))]
        # the last block whose inputs are looked at: the streams end there
        self._last = max((i for i, done in enumerate(self._finished) if not done), default=-1)
        if not method.needs_statistics:
            self._last = -1
        self._gradients: GradientFolder | None = None
        self._shares = False
        self._guided: list[Guided] | None = None  # of all blocks, where another job left them
        self._stream = Stream([], [])
        self._full_stream: Stream | None = None

    def take_gradients(self, batches: list[Tensor], cache: GradientCache | None, progress: bool) -> None:
        """Find or compute the token weights of every block, unless every block is finished."""
        folder, key = self.work, self._fingerprint
        if cache is not None:
            key = cache.key(self.model, self.adapter, self.method, BATCH_SEQUENCES)
            folder = cache.folder / key
        self._shares = cache is not None
        self._gradients = GradientFolder(folder, key, len(self._finished))
        cost = self._gradients.cost()
        if cost is not None and self._shares:
            self._guided = self._gradients.guided()
        present = self._guided is not None or (cost is not None and self._gradients.has_weights())
        if not present and not all(self._finished):
            began = time.process_time()
            total = sum(b.numel() for b in batches)
            with tqdm(total=total, desc="loss gradients", unit="tok", disable=not progress) as bar:
                weights = token_weights(self.model, self.adapter, self.method, batches, bar.update)
            cost = time.process_time() - began
            self._gradients.save_weights(weights, cost)
        self.gradient_cpu_seconds, self.gradients_shared = cost or 0.0, present

    def enter(self, batches: list[Tensor]) -> None:
        """Put the streams before the first block."""
        if self._last < 0:
            return
        self._stream = enter_first_block(self.model, self.adapter, batches)
        if self._gradients is not None and self._guided is None:
            self._full_stream = self._stream

    def step(self, index: int, block: nn.Module) -> dict[str, Any]:
        """Quantize a block or read it back, run what is stored, and report."""
        began = time.process_time()
        credit, behind = 0.0, self._stream
        if not self._finished[index]:
            credit, behind = self._quantize(index, block)
        elif index < self._last:
            behind = self._pass_by(block)
        stored = load_block(block_path(self.out, index))
        write_block(self.adapter, block, stored.block)
        if index < self._last:
            self._stream = behind if self.policy.inputs == "full_precision" else self._stream.through(block)
        self.ledgers.append(_part_ledgers(stored.block, self.adapter.router(block)))
        seconds = None if self._finished[index] else time.process_time() - began + credit
        scales = scale_summary(stored.block.parts())
        return {"block": index, "cpu_seconds": seconds, **stored.details, "scales": scales}

    def _shard_fingerprint(self, index: int) -> str:
        return hashlib.sha256(f"{self._fingerprint}/{index}".encode()).hexdigest()

    def _is_finished(self, index: int) -> bool:
        path = block_path(self.out, index)
        if not path.exists() or read_fingerprint(path) != self._shard_fingerprint(index):
            return False
        load_block(path, verify=True)  # refuses a damaged file before anything is computed
        return True

    def _pass_by(self, block: nn.Module) -> Stream:
        """A finished block: move the full-precision stream on, and the other one where it has full-precision inputs."""
        if self._full_stream is not None:
            self._full_stream = self._full_stream.through(block)
        return self._stream.through(block) if self.policy.inputs == "full_precision" else self._stream

    def _quantize(self, index: int, block: nn.Module) -> tuple[float, Stream]:
        """Gather statistics, quantize, write the shard.

        Returns the CPU seconds that another job spent on this block, and the stream behind the block as it was.
        """
        guided, credit, statistics, behind = None, 0.0, None, self._stream
        if self._guided is not None:
            guided = self._guided[index]
            credit = guided.cpu_seconds
        elif self._gradients is not None:
            guided = self._guided_of(index, block)
        if self.method.needs_statistics:
            groups, experts = self.adapter.linear_groups(block), self.adapter.experts_module(block)
            if self.method.quantizes_router and experts is not None:
                groups.append({self.adapter.architecture.router: self.adapter.router(block)})
            statistics = BlockStatistics(self._stream.shape(groups, experts), self.policy.experts == "all_experts")
            behind = self._stream.observe(block, experts, self.model.config, statistics)
        packed, details = _quantize_block(block, self.adapter, self.method, statistics, guided)
        names = BlockNames.of(self.adapter, index)
        save_block(block_path(self.out, index), packed, self._shard_fingerprint(index), details, names)
        return credit, behind

    def _guided_of(self, index: int, block: nn.Module) -> Guided:
        """Guided Hessians of a block from its token weights; the full-precision stream moves on."""
        began = time.process_time()
        groups, experts = self.adapter.linear_groups(block), self.adapter.experts_module(block)
        assert self._full_stream is not None and self._gradients is not None  # `enter` has made both
        weights = self._gradients.weights(index)
        if weights is None:
            raise DataError(f"block {index}: its token weights are gone; run the same command again to make them")
        observer = GuidedHessians(self._full_stream.shape(groups, experts), weights)
        self._full_stream = self._full_stream.observe(block, experts, self.model.config, observer)
        guided = replace(observer.result(), cpu_seconds=time.process_time() - began)
        if self._shares:
            self._gradients.save_guided(index, guided)
        return guided
