"""The block loop: capture a block's inputs, quantize it, write its shard, run what was written, go on.

Two streams of hidden states pass through the blocks. The *quantized* stream has gone through the blocks as they are
stored; its inputs give the Hessians. The *full-precision* stream exists only for methods that use loss gradients: its
tokens are those for which the gradients were taken. What it gives may be shared by many jobs (`calibration.shared`),
and neither stream goes further than the last block that needs it.

One block has its values in memory at a time; what passes between blocks is kept within a budget, else in files. A
finished block is on disk with a fingerprint; a run that was killed reads it back instead of computing it, and ends with
the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobie.block import quantize_block
from mobie.calibration.backward import GradientPass
from mobie.calibration.guided import Guided, GuidedHessians
from mobie.calibration.lazy import Cache
from mobie.calibration.shared import GradientCache, GradientFolder, basis_digests
from mobie.calibration.statistics import BlockStatistics, CalibrationPolicy
from mobie.calibration.store import ActivationStore, Memory
from mobie.calibration.stream import Stream, enter_first_block
from mobie.errors import ConfigError, DataError
from mobie.methods.allocation import AllocatingMethod
from mobie.methods.base import Method
from mobie.models.base import Adapter
from mobie.models.load import kept_dtype, model_type
from mobie.models.weights import StreamedModel
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
from mobie.resources import Resources
from mobie.storage import make_folder, remove_abandoned
from mobie.survey import Finding, Survey

BATCH_SEQUENCES = 8
BATCH_TOKENS = 8192  # at most, where a sequence is not longer itself
DEFAULT_POLICY = CalibrationPolicy()
DEFAULT_RESOURCES = Resources()


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantize job found, for its record.

    ledger:      over all quantized weights.
    kept_bytes:  bytes of what stays in 16 bits (embeddings, norms, head, router).
    file_bytes:  size of all weight files of the checkpoint.
    gradient_cpu_seconds: of the gradient pass, in this job or in the one that shared its result; None for a method
                 without one.
    blocks:      per block: CPU seconds (None where the block was read back; a survey and shared guided Hessians count
                 with it), tokens per expert, experts that borrowed pooled statistics, relative output error per
                 projection, quantiles of the scales; of a method that shares out bits what it found and allocated.
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


def _part_ledgers(block: PackedBlock, router: nn.Module | None) -> dict[str, BitLedger]:
    active_share = router.top_k / len(router.weight) if router is not None else 1.0
    return {name: part.ledger(active_share) for name, part in block.parts().items()}


@dataclass(frozen=True)
class _Survey:
    """What one reading of the whole model gives before anything is computed.

    kept:  what stays in 16 bits.
    bases: of every block, what tells apart the matrices that gradients are read through; empty where nothing asks.
    """

    kept: dict[str, Tensor]
    bases: list[dict[str, str]]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())


def _survey(streamed: StreamedModel, method: Method, dtype: torch.dtype, *, bases: bool, progress: bool) -> _Survey:
    """Read every block once. Raises `DataError` for values that are not finite."""
    with streamed.outside() as model:
        tied = set(model.all_tied_weights_keys)  # stored once, under the first name
        kept = {n: v.to("cpu", dtype) for n, v in streamed.state_outside().items() if n not in tied}
    digests = []
    for index in tqdm(range(len(streamed.blocks)), "reading the model", disable=not progress):
        with streamed.block(index) as block:
            packed = streamed.adapter.quantized_parameters(block, router=method.quantizes_router)
            prefix = streamed.adapter.block_prefix(index)
            state = block.state_dict().items()
            kept |= {prefix + name: value.to("cpu", dtype) for name, value in state if name not in packed}
            if bases:
                digests.append(basis_digests(streamed.adapter.expert_bank(block), method))
    order = list(streamed.model.state_dict())
    return _Survey({name: kept[name] for name in order if name in kept}, digests)


def _put_kept(module: nn.Module, prefix: str, kept: dict[str, Tensor]) -> None:
    """Go on with what is stored in 16 bits, in a module whose parameters' names begin with `prefix` in the model."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if prefix + name in kept and not value.is_meta:
                value.copy_(kept[prefix + name])


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


def batches_of(calibration: Tensor) -> list[Tensor]:
    """The calibration tokens `(sequences, length)` as batches that are run at a time."""
    sequences = max(1, min(BATCH_SEQUENCES, BATCH_TOKENS // calibration.shape[1]))
    return list(calibration.split(sequences))


def quantize(
    model_folder: Path,
    method: Method,
    calibration: Tensor,
    out: Path,
    *,
    fingerprint: str,
    policy: CalibrationPolicy = DEFAULT_POLICY,
    gradient_cache: GradientCache | None = None,
    resources: Resources = DEFAULT_RESOURCES,
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
        resources: devices and memory; on the same kind of device they change no byte of the result.
        progress: show progress bars.

    Raises:
        DataError: unusable weights, calibration tokens or files.
        UnsupportedError: an architecture that no adapter describes.
        ConfigError: a method and a policy that exclude each other.
        StorageError: the checkpoint cannot be written.
    """
    Adapter(model_type(model_folder))  # refuses what no adapter describes
    refuse_quantized(model_folder)
    if method.token_weighting == "gate" and policy.experts == "all_experts":
        raise ConfigError(
            f"{method.name}: token_weighting 'gate' with the policy 'all_experts': an expert has no router score for "
            "tokens that are not routed to it; expected the policy 'routed', or token_weighting 'none'"
        )
    streamed = StreamedModel(model_folder, resources.torch_devices()[0])
    _check_calibration(calibration, streamed.model)
    shared = gradient_cache is not None and method.needs_gradients
    survey = _survey(streamed, method, kept_dtype(model_folder), bases=shared, progress=progress)
    remove_abandoned(make_folder(out))  # of files that a killed job had begun or just finished
    loop = _Loop(streamed, method, policy, out, fingerprint, survey, resources)
    batches = batches_of(calibration)
    if method.needs_gradients:
        loop.take_gradients(batches, gradient_cache, progress)
    if isinstance(method, AllocatingMethod):
        loop.allocate(method, batches, progress)
    with torch.no_grad():
        save_tensors(out / KEPT, survey.kept, {"fingerprint": fingerprint})
        loop.enter(batches)
        count = len(streamed.blocks)
        reports = [loop.step(index) for index in tqdm(range(count), "blocks", disable=not progress)]
    finish_folder(model_folder, out, streamed.model, method, fingerprint=fingerprint, blocks=count)
    shutil.rmtree(loop.work, ignore_errors=True)
    file_bytes = sum(file.stat().st_size for file in weight_files(out, count))
    by_block = {f"block{index}": BitLedger.merge(ledgers) for index, ledgers in enumerate(loop.ledgers)}
    return QuantizeReport(
        BitLedger.merge(by_block),
        survey.bytes,
        file_bytes,
        loop.gradient_cpu_seconds,
        reports,
        bits_by_component(loop.ledgers, streamed.adapter.architecture.router),
        loop.gradients_shared,
    )


class _Loop:
    """A job under way: the two streams, at the entry of the next block, and the ledgers of the blocks behind."""

    def __init__(
        self,
        streamed: StreamedModel,
        method: Method,
        policy: CalibrationPolicy,
        out: Path,
        fingerprint: str,
        survey: _Survey,
        resources: Resources,
    ) -> None:
        self.streamed, self.adapter, self.method, self.policy, self.out = (
            streamed,
            streamed.adapter,
            method,
            policy,
            out,
        )
        self.work = out / "work"
        self.ledgers: list[dict[str, BitLedger]] = []
        self.gradient_cpu_seconds: float | None = None
        self.gradients_shared: bool | None = None
        self._fingerprint, self._survey, self._resources = fingerprint, survey, resources
        self._memory = Memory(resources.memory)
        self._store = ActivationStore(self.work / "streams", fingerprint, self._memory)
        self._finished = [self._is_finished(index) for index in range(len(streamed.blocks))]
        # the last block whose inputs are looked at: the streams end there
        self._last = max((i for i, done in enumerate(self._finished) if not done), default=-1)
        if not method.needs_statistics:
            self._last = -1
        self._gradients: GradientFolder | None = None
        self._shares = False
        self._guided: list[Guided] | None = None  # of all blocks, where another job left them
        self._methods = [method] * len(streamed.blocks)
        self._findings: list[Finding] = []  # of all blocks, where the method shares out bits
        self._stream: Stream | None = None
        self._full_stream: Stream | None = None

    @property
    def _guides(self) -> bool:
        """Whether the methods of the blocks read guided Hessians; one that shares out bits may have done so before."""
        return self._gradients is not None and any(method.needs_gradients for method in self._methods)

    def take_gradients(self, batches: Sequence[Tensor], cache: GradientCache | None, progress: bool) -> None:
        """Find or compute the token weights of every block, unless every block is finished."""
        folder, key = self.work, self._fingerprint
        if cache is not None:
            key = cache.key(self.method, len(batches[0]), self._survey.bases)
            folder = cache.folder / key
        self._shares = cache is not None
        self._gradients = GradientFolder(folder, key, len(self._finished))
        cost = self._gradients.cost()
        if cost is not None and self._shares:
            self._guided = self._gradients.guided()
        present = self._guided is not None or (cost is not None and self._gradients.has_weights())
        if not present and not all(self._finished):
            cost = self._compute_gradients(batches, key, self._gradients, progress)
        self.gradient_cpu_seconds, self.gradients_shared = cost or 0.0, present

    def _compute_gradients(
        self, batches: Sequence[Tensor], key: str, gradients: GradientFolder, progress: bool
    ) -> float:
        tokens, blocks = sum(batch.numel() for batch in batches), len(self._finished)
        size = 4 * tokens * self.streamed.model.config.hidden_size * (blocks + 2)
        store = ActivationStore(self.work / "gradients", key, self._memory, keep=size > self._memory.left)
        with tqdm(total=2 * blocks * tokens, desc="loss gradients", unit="tok", disable=not progress) as bar:
            return GradientPass(self.streamed, self.method, batches, store, gradients, bar.update).run()

    def allocate(self, method: AllocatingMethod, batches: Sequence[Tensor], progress: bool) -> None:
        """Survey the model and fix the method of every block, unless every block is finished."""
        if not all(self._finished):
            guided_of = None if self._gradients is None else self._guided_of
            survey = Survey(self.streamed, method, self.work / "survey", self._fingerprint, self._memory, guided_of)
            self._findings = survey.run(batches, progress=progress)
            self._methods = method.allocate([finding.values for finding in self._findings])

    def enter(self, batches: Sequence[Tensor]) -> None:
        """Put the streams before the first block."""
        if self._last < 0:
            return
        self._stream = Stream("quantized", batches, self._store, self.streamed.device)
        streams = [self._stream]
        if self._guides and self._guided is None:
            self._full_stream = Stream("full", batches, self._store, self.streamed.device)
            streams.append(self._full_stream)

        def take(batch: int, hidden: Tensor) -> None:
            for stream in streams:
                stream.put(batch, hidden)

        with self.streamed.outside() as model:
            _put_kept(model, "", self._survey.kept)
            arguments = enter_first_block(self.streamed, batches, take)
        for stream in streams:
            stream.arguments = arguments

    def step(self, index: int) -> dict[str, Any]:
        """Quantize a block or read it back, run what is stored, and report."""
        began, credit = time.process_time(), 0.0
        if not self._finished[index] or index < self._last:
            with self.streamed.block(index) as block:
                _put_kept(block, self.adapter.block_prefix(index), self._survey.kept)
                if self._finished[index]:
                    self._pass_by(block)
                else:
                    credit = self._quantize(index, block)
                if index < self._last and self.policy.inputs == "quantized_prefix":
                    assert self._stream is not None  # `enter` has made it
                    write_block(self.adapter, block, load_block(block_path(self.out, index)).block)
                    self._stream.through(block)
        stored = load_block(block_path(self.out, index))
        self.ledgers.append(_part_ledgers(stored.block, self.adapter.router(self.streamed.blocks[index])))
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

    def _pass_by(self, block: nn.Module) -> None:
        """A finished block: move the full-precision stream on, and the other one where it has full-precision inputs."""
        if self._full_stream is not None:
            self._full_stream.through(block)
        if self.policy.inputs == "full_precision" and self._stream is not None:
            self._stream.through(block)

    def _quantize(self, index: int, block: nn.Module) -> float:
        """Gather statistics, quantize, write the shard; returns the CPU seconds spent on this block before."""
        method = self._methods[index]
        guided, forgets, credit, statistics, router = None, [], 0.0, None, None
        if self._guides and self._guided is not None:
            guided = self._guided[index]
            credit = guided.cpu_seconds
        elif self._guides:
            assert self._full_stream is not None  # `enter` has made it
            guided, forget = self._guided_of(index, block, self._full_stream, index < self._last)
            forgets.append(forget)
        if method.needs_statistics:
            moves = self.policy.inputs == "full_precision" and index < self._last
            statistics, router = self._gather(block, method, move=moves)
            forgets.append(statistics.drop)
        packed, details = quantize_block(block, self.adapter, method, statistics, guided, self._resources, router)
        if self._findings:
            credit += self._findings[index].cpu_seconds
            details |= {"allocation": method.options, "survey": self._findings[index].values}
        for forget in forgets:
            forget()
        names = BlockNames.of(self.adapter, index)
        save_block(block_path(self.out, index), packed, self._shard_fingerprint(index), details, names)
        return credit

    def _gather(self, block: nn.Module, method: Method, *, move: bool) -> tuple[BlockStatistics, Packed | None]:
        """Statistics of a block, and its packed router where that has to be in place before they are gathered.

        move: let the stream go behind the block as it was.
        """
        assert self._stream is not None  # `enter` has made it
        groups, experts = self.adapter.linear_groups(block), self.adapter.experts_module(block)
        if method.quantizes_router and experts is not None:
            groups.append({self.adapter.architecture.router: self.adapter.router(block)})
        shared = self.adapter.shared_expert(block) if method.token_weighting == "gate" else None
        shape = self._stream.shape(groups, experts, shared)
        everyone = self.policy.experts == "all_experts"
        statistics = BlockStatistics(shape, self._store, Cache(self._memory), everyone=everyone)
        if not (method.quantizes_router and method.routes_as_stored and experts is not None):
            self._stream.observe(block, statistics, move=move)
            return statistics, None
        router = self.adapter.moe_router(block)
        original = router.weight.detach().clone()
        packed = self._quantize_router(block, method)
        router.weight.copy_(packed.dequantize())
        self._stream.observe(block, statistics, move=False)
        if move:
            router.weight.copy_(original)
            self._stream.through(block)
        return statistics, packed

    def _quantize_router(self, block: nn.Module, method: Method) -> Packed:
        """The router of a block, quantized from what flows into it."""
        assert self._stream is not None  # `enter` has made it
        name, router = self.adapter.architecture.router, self.adapter.moe_router(block)
        inputs = BlockStatistics(self._stream.shape([{name: router}], None), self._store, Cache(self._memory))
        self._stream.observe(block, inputs, move=False)
        return method.quantize_router(router.weight.detach().float(), inputs.linear_stats()[name])

    def _guided_of(self, index: int, block: nn.Module, stream: Stream, move: bool) -> tuple[Guided, Callable[[], None]]:
        """Guided Hessians of a block from its token weights, and what forgets them.

        stream: of full precision, before the block; it moves on where told.
        """
        if self._guided is not None:
            if move:
                stream.through(block)
            return self._guided[index], lambda: None
        began = time.process_time()
        groups, experts = self.adapter.linear_groups(block), self.adapter.experts_module(block)
        assert self._gradients is not None  # `take_gradients` has made it
        weights = self._gradients.weights(index)
        if weights is None:
            raise DataError(f"block {index}: its token weights are gone; run the same command again to make them")
        shape = stream.shape(groups, experts)
        observer = GuidedHessians(shape, weights, self._store, Cache(self._memory))
        stream.observe(block, observer, move=move)
        guided = observer.result()
        if self._shares and self._gradients.keeps_guided(observer.nbytes):
            guided = replace(guided.whole(), cpu_seconds=time.process_time() - began)
            self._gradients.save_guided(index, guided)
        return guided, observer.drop
