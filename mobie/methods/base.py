"""What a quantization method is: weights and input statistics in, packed weights out. No model, file or hook.

A method is one file with one class; its options are the fields of a frozen dataclass. Adding it to the suite takes that
file and one YAML under `workflow/config/methods/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from mobie.determinism import inherited
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed

T = TypeVar("T")
#: "gate": rows of an expert's inputs are multiplied by the square root of the expert's router score
TokenWeighting = Literal["none", "gate"]

#: memory that one chunk of experts may take where a bank does not say: little on a CPU, whose cache it should suit
CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


@dataclass(frozen=True)
class LinearStats:
    """What a method may know about the inputs X `(tokens, in)` of one Linear.

    hessian:  `(in, in)` float32, `2/n · XᵀX`; with the token weighting "gate", of an expert's rows `√score · x`.
    tokens:   n, before any blending with the pooled Hessian of the layer.
    mean_abs: `(in,)`, mean |x| per channel (AWQ).
    sample:   `(at most 512, in)`, some of the rows of X (AWQ's clip search).
    guided:   `(groups, in, in)` or None: `2/n · Σ_t w_tg x_t x_tᵀ`, with w_tg the mean squared loss gradient of token t
              in contiguous group g of output (or latent) channels (eq. 8, GLAS).
    mean_gram: `(in, in)` or None: `2/s · Σ_q m_q m_qᵀ` over s sequences, m_q the mean input of a sequence.
    """

    hessian: Tensor
    tokens: int
    mean_abs: Tensor
    sample: Tensor
    guided: Tensor | None = None
    mean_gram: Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Tensor, token_weights: Tensor | None = None) -> LinearStats:
        """Statistics of inputs `(tokens, in)`; `token_weights` `(tokens, groups)` gives the guided Hessians."""
        x = inputs.float()
        n = len(x)
        guided = None
        if token_weights is not None:
            guided = torch.stack([2 / n * (x * w[:, None]).T @ x for w in token_weights.float().T])
        stride = max(1, n // 512)
        return cls(2 / n * x.T @ x, n, x.abs().mean(0), x[::stride][:512].clone(), guided)

    def to(self, device: torch.device) -> LinearStats:
        """The same statistics on a device; themselves where they lie there already."""
        if self.hessian.device == device:
            return self

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return LinearStats(
            self.hessian.to(device),
            self.tokens,
            self.mean_abs.to(device),
            self.sample.to(device),
            moved(self.guided),
            moved(self.mean_gram),
        )

    def through(self, matrix: Tensor) -> LinearStats:
        """Statistics of the inputs `x Rᵀ` for R `(rank, in)`; `mean_abs` is then that of the sample."""

        def both_sides(gram: Tensor | None) -> Tensor | None:
            return None if gram is None else matrix @ gram @ matrix.T

        sample = self.sample @ matrix.T
        return LinearStats(
            both_sides(self.hessian),
            self.tokens,
            sample.abs().mean(0),
            sample,
            both_sides(self.guided),
            both_sides(self.mean_gram),
        )


@dataclass(frozen=True)
class ExpertBank:
    """The experts of one layer.

    projections: name → `(experts, out, in)` float32: `gate`, `up`, `down` in a model; a single one in `mobie try`.
    same_input:  names grouped by shared inputs, e.g. `(("gate", "up"), ("down",))`.
    active:      experts that a token uses (top-k), or None where unknown.
    devices:     that work on the experts, in turn; empty: the one on which the weights lie.
    chunk_bytes: memory that the experts which a device works on at a time may take; None: `CHUNK_BYTES`.
    """

    projections: Mapping[str, Tensor]
    same_input: tuple[tuple[str, ...], ...]
    active: int | None = None
    devices: tuple[torch.device, ...] = ()
    chunk_bytes: int | None = None

    @property
    def working_devices(self) -> tuple[torch.device, ...]:
        """Where the experts are worked on, at least one device."""
        return self.devices or (next(iter(self.projections.values())).device,)


class FormedStats(Sequence[LinearStats], ABC):
    """Statistics of a projection's experts that are formed anew whenever one is asked for, and kept by nobody.

    Several threads may ask at a time, where a bank has several devices.
    """

    @abstractmethod
    def form(self, expert: int, device: torch.device) -> LinearStats:
        """Statistics of one expert on the device that will use them."""

    def __getitem__(self, expert: Any) -> Any:
        if isinstance(expert, slice):
            return [self[e] for e in range(*expert.indices(len(self)))]
        return self.form(range(len(self))[expert], torch.device("cpu"))


@dataclass(frozen=True)
class BankStats:
    """Input statistics of a bank.

    experts: name → one `LinearStats` per expert, over the tokens routed to it; may be `FormedStats`: a method asks for
             an expert's once, in order, and holds those of a chunk of experts at a time.
    pooled:  name → `LinearStats` over all calibration tokens of the layer.
    tokens:  name → tokens of each expert; read from `experts` where not given.
    """

    experts: Mapping[str, Sequence[LinearStats]]
    pooled: Mapping[str, LinearStats]
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            tokens = {name: [s.tokens for s in own] for name, own in self.experts.items()}
            object.__setattr__(self, "tokens", tokens)

    def of(self, name: str, experts: range, device: torch.device) -> list[LinearStats]:
        """Statistics of some experts, formed on a device or moved there."""
        own = self.experts[name]
        if isinstance(own, FormedStats):
            return [own.form(e, device) for e in experts]
        return [own[e].to(device) for e in experts]


def map_experts(bank: ExpertBank, expert_bytes: int, function: Callable[[range, torch.device], Sequence[T]]) -> list[T]:
    """Results of `function(experts, device)` for chunks of a bank's experts, put together in the experts' order.

    Chunks go to the bank's devices in turn, one thread for each device where there are several. How large a chunk is
    depends on neither the number of devices nor the machine's state.

    Args:
        expert_bytes: memory that one expert takes.
        function: gives one result per expert; what it gives for an expert must not depend on the others of its chunk.
    """
    count, devices = len(next(iter(bank.projections.values()))), bank.working_devices
    size = max(1, (bank.chunk_bytes or CHUNK_BYTES[devices[0].type]) // max(1, expert_bytes))
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    settings = inherited()

    def work(device: int) -> list[Sequence[T]]:
        with settings():
            return [function(chunk, devices[device]) for chunk in chunks[device :: len(devices)]]

    if len(devices) == 1:
        parts = [function(chunk, devices[0]) for chunk in chunks]
    else:
        with ThreadPoolExecutor(len(devices)) as pool:
            by_device = list(pool.map(work, range(len(devices))))
        parts = [by_device[i % len(devices)][i // len(devices)] for i in range(len(chunks))]
    return [result for part in parts for result in part]


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; subclasses add their options as dataclass fields."""

    name: ClassVar[str]
    #: whether the method looks at input statistics at all, or its error is worth measuring on them
    needs_statistics: ClassVar[bool] = True
    #: whether the packed weights depend on input statistics; if not, none are read
    reads_statistics: ClassVar[bool] = True
    #: option and its value with which the method reads loss gradients; None: it never does
    guided_by: ClassVar[tuple[str, Any] | None] = None
    #: options that decide what those gradients are: jobs in which they agree share them
    gradient_options: ClassVar[tuple[str, ...]] = ("gradient_groups",)
    # The rest decides no result. Like the above it must be literal: plans and tables read it from the syntax.
    #: what a plan reckons with: of one core, per weight of a matrix with 2048 inputs, statistics and the outputs of a
    #: survey given (`benchmarks/true_size.py` measures it); a method that does not say counts as a slow one
    seconds_per_weight: ClassVar[float] = 1.4e-6
    #: passes of the calibration tokens through the experts in a survey of the model; 0: the method makes none
    survey_passes: ClassVar[float] = 0.0
    #: bits on disk per weight, every buffer counted, or the option that has those of the codes (a grid is then added)
    stored_bits: ClassVar[float | str] = "bits"
    #: whether nearly all weights are signs: tables rank such methods with each other
    stores_signs: ClassVar[bool] = False

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value, as JSON values: what a checkpoint says about how it was made."""
        return asdict(self) if is_dataclass(self) else {}

    @property
    def needs_gradients(self) -> bool:
        """Whether `LinearStats.guided` must be filled, which takes one backward pass over the calibration text."""
        if self.guided_by is None:
            return False
        option, value = self.guided_by
        return bool(getattr(self, option) == value)

    @property
    def token_weighting(self) -> TokenWeighting:
        """Whether the tokens of an expert count by their router score in `LinearStats.hessian`, or all alike."""
        return "none"

    @property
    def gradient_groups(self) -> int:
        """Into how many contiguous channel groups the gradients are pooled."""
        return 1

    @abstractmethod
    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Quantize one weight `(out, in)` float32."""

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        """Quantize Linears that share their input (query, key, value; keys are the field's names, `q_proj` …)."""
        return {name: self.quantize_linear(weight, stats[name]) for name, weight in weights.items()}

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> Mapping[str, Packed]:
        """Quantize the experts of a layer, a chunk at a time: projection → `(experts, out, in)`."""
        packed: dict[str, PackedBank] = {}
        for names in bank.same_input:
            packed |= self.quantize_chunks(bank, stats, names, self.quantize_chunk)
        return {name: packed[name] for name in bank.projections}

    def quantize_chunk(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]]
    ) -> list[dict[str, Packed]]:
        """Quantize projections that share their input, of some experts: one by one, unless batching is faster.

        Args:
            weights: name → `(experts, out, in)`.
            stats: of each expert, by name; empty where the method reads none.
        """
        return [
            self.quantize_group({name: weight[e] for name, weight in weights.items()}, own)
            for e, own in enumerate(stats)
        ]

    def quantize_chunks(
        self,
        bank: ExpertBank,
        stats: BankStats,
        names: Sequence[str],
        function: Callable[[Mapping[str, Tensor], Sequence[Mapping[str, LinearStats]]], list[dict[str, Packed]]],
    ) -> dict[str, PackedBank]:
        """Call a function such as `quantize_chunk` for all experts of the projections `names`, which share their input.

        Without loss gradients, the statistics of the first projection are those of all.
        """

        def chunk(experts: range, device: torch.device) -> list[dict[str, Packed]]:
            weights = {n: bank.projections[n][experts.start : experts.stop].to(device) for n in names}
            if not self.reads_statistics:
                return function(weights, [{} for _ in experts])
            if not self.needs_gradients:
                return function(weights, [dict.fromkeys(names, s) for s in stats.of(names[0], experts, device)])
            own = zip(*(stats.of(name, experts, device) for name in names), strict=True)
            return function(weights, [dict(zip(names, s, strict=True)) for s in own])

        shapes = [bank.projections[name].shape[1:] for name in names]
        parts = map_experts(bank, self.expert_bytes(shapes), chunk)
        return {name: PackedBank(tuple(part[name] for part in parts)) for name in names}

    def expert_bytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Roughly the memory that quantizing one expert takes: its weights `(out, in)` and what is made from them."""
        columns = shapes[0][1]
        hessians = (2 + self.gradient_groups * self.needs_gradients * len(shapes)) if self.reads_statistics else 0
        return 4 * (hessians * columns**2 + 6 * sum(rows * columns for rows, _ in shapes))

    @property
    def quantizes_router(self) -> bool:
        """Whether the router is quantized too; otherwise it stays in 16 bits."""
        return False

    @property
    def routes_as_stored(self) -> bool:
        """Whether experts are shown the tokens that the quantized router sends them, or the original's."""
        return False

    def quantize_router(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Quantize the router's weight `(experts, hidden)`."""
        return self.quantize_linear(weight, stats)

    def gradient_bases(self, bank: ExpertBank) -> dict[str, Tensor | None]:
        """Per projection, the matrix B `(out, rank)` through which output gradients are read, `∂ℓ/∂T = Bᵀ ∂ℓ/∂Z`.

        None stands for the identity: the gradient at the output Z itself.
        """
        return dict.fromkeys(bank.projections)


METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its `name`."""
    METHODS[cls.name] = cls
    return cls
