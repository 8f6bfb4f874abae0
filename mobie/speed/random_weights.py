"""Models of true shape with random weights, dense or packed, made on the target device block by block.

Packed tensors get random bits, and scales of such a size that activations stay finite through all layers; nothing is
quantized, so a model of tens of gigabytes takes seconds. What depends on data is set here: how many columns of a Linear
ARB-RC calls salient is `LINEAR_SALIENT_SHARE`, and how unequal experts and columns are to OBE, which shares its sign
planes out among them by its own allocation, block by block, `EXPERT_SPREAD` and `COLUMN_SPREAD`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mobie.errors import UnsupportedError
from mobie.methods.base import Method
from mobie.methods.fp16 import FP16
from mobie.methods.mixed_bits import role_of
from mobie.methods.mobie import MoBiE
from mobie.methods.mobie.cejd import choose_side
from mobie.methods.obe import OBE, Allotment, AllottedOBE
from mobie.methods.plane_budget import summarize
from mobie.methods.plane_fit import LEVELS
from mobie.models.base import Adapter
from mobie.models.experts import expert_count, expert_inputs
from mobie.packing.bank import GATE_UP, PackedBank, SymmetricRows
from mobie.packing.base import FORMATS, Packed
from mobie.packing.binary import BinaryMatrix
from mobie.packing.bits import pack_codes
from mobie.packing.checkpoint import PackedBlock
from mobie.packing.dense import Dense16
from mobie.packing.planes import PlaneMatrix

#: share of a Linear's columns that ARB-RC binarizes twice: its search decides on real weights (nano-olmoe: 7 to 30 %)
LINEAR_SALIENT_SHARE = 0.1
#: standard deviations of the logarithms of importances to the loss in a layer (nano-olmoe: 1.8 to 2.8, 0.4 to 1.1)
EXPERT_SPREAD, COLUMN_SPREAD = 2.4, 0.6
WEIGHT_STD = 0.02  # the published `initializer_range` of all four models


class RandomTensors:
    """Random stored tensors on one device."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def bits(self, *shape: int, length: int) -> Tensor:
        """Packed bits `(*shape, ceil(length/8))` uint8; spare bits at the end of a row are zero."""
        size = (*shape, -(-length // 8))
        packed = torch.randint(0, 256, size, dtype=torch.uint8, device=self.device, generator=self._generator)
        if length % 8 and packed.numel():
            packed[..., -1] &= (1 << length % 8) - 1
        return packed

    def scales(self, *shape: int, mean: float = 1.0) -> Tensor:
        """Float16 scales within a factor of 1.5 of `mean`."""
        uniform = torch.rand(shape, device=self.device, generator=self._generator)
        return (mean * (0.5 + uniform)).half()

    def columns(self, matrices: int, columns: int, count: int) -> Tensor:
        """Sorted column numbers `(matrices, count)`, int16 where they fit."""
        order = torch.rand(matrices, columns, device=self.device, generator=self._generator).argsort(dim=1)
        fits = columns <= torch.iinfo(torch.int16).max
        return order[:, :count].sort(dim=1).values.to(torch.int16 if fits else torch.int32)

    def order(self, count: int) -> Tensor:
        """The numbers from 0 to `count - 1` in a random order."""
        return torch.rand(count, device=self.device, generator=self._generator).argsort()

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Weights of the models' initial spread."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, WEIGHT_STD, generator=self._generator)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Integers of `low` … `high - 1`."""
        return torch.randint(low, high, shape, dtype=dtype, device=self.device, generator=self._generator)


def random_block(adapter: Adapter, block: nn.Module, method: Method, tensors: RandomTensors) -> PackedBlock:
    """What `method` would store for a decoder block, with random contents; `block` may be on the meta device.

    Raises:
        UnsupportedError: a method whose formats are not written here.
    """
    if isinstance(method, FP16):
        return PackedBlock({}, {})
    if isinstance(method, OBE):
        return _random_planes(adapter, block, method, tensors)
    if not isinstance(method, MoBiE):
        raise UnsupportedError(
            f"{method.name}: random packed weights exist for fp16, mobie and obe and their variants; expected one of "
            "them; measure another method on a stored checkpoint with `--weights stored`"
        )
    linears = {
        name: _random_linear(method, tuple(module.weight.shape), tensors)
        for group in adapter.linear_groups(block)
        for name, module in group.items()
    }
    experts = adapter.experts_module(block)
    if experts is None:
        return PackedBlock(linears, {})
    if method.quantizes_router:
        rows, columns = adapter.moe_router(block).weight.shape
        linears[adapter.architecture.router] = _mixed_order(method, 1, rows, columns, tensors).experts[0]
    return PackedBlock(linears, _random_experts(method, experts, tensors))


def _random_linear(method: MoBiE, size: tuple[int, int], tensors: RandomTensors) -> Packed:
    if method.other_linears == "16bit":
        return Dense16(tensors.normal(*size, dtype=torch.bfloat16))
    if method.other_linears == "mixed_order":
        return _mixed_order(method, 1, *size, tensors).experts[0]
    return _arb_rc(size, method.block_size, tensors)


def _arb_rc(size: tuple[int, int], block_size: int, tensors: RandomTensors) -> BinaryMatrix:
    """ARB-RC without the bitmap on salient columns: two magnitude groups, salient columns of second order replaced."""
    rows, columns = size
    blocks = -(-columns // block_size)
    salient = tensors.columns(1, columns, max(1, round(LINEAR_SALIENT_SHARE * columns)))[0]
    extra, plain = len(salient), columns - len(salient)
    named = {
        "plain.signs": tensors.bits(1, rows, length=plain),
        "plain.row_scale": tensors.scales(1, 2, rows, blocks, mean=WEIGHT_STD),
        "plain.column_scale": tensors.scales(1, 2, plain),
        "plain.bitmap": tensors.bits(rows, length=plain),
        "extra.signs": tensors.bits(2, rows, length=extra),
        "extra.row_scale": tensors.scales(2, 1, rows, blocks, mean=WEIGHT_STD),
        "extra.column_scale": tensors.scales(2, 1, extra),
        "salient": salient,
    }
    header = {"size": [rows, columns], "block_size": block_size, "extra_is_residual": False}
    return BinaryMatrix.from_tensors(header, named)


def _random_experts(method: MoBiE, experts: nn.Module, tensors: RandomTensors) -> dict[str, PackedBank]:
    """Banks of a layer from the shapes of the library's fused parameters."""
    shapes = _bank_shapes(experts)
    count, *_ = shapes["gate"]
    if method.joint_svd == "fused_gate_up":
        shapes = {GATE_UP: (2 * count, *shapes["gate"][1:]), "down": shapes["down"]}
    return {name: _random_bank(method, *shape, tensors) for name, shape in shapes.items()}


def _bank_shapes(experts: nn.Module) -> dict[str, tuple[int, int, int]]:
    """`(experts, out, in)` of each projection."""
    count, inputs = expert_count(experts), expert_inputs(experts)
    hidden, width = inputs["gate"], inputs["down"]
    return {"gate": (count, width, hidden), "up": (count, width, hidden), "down": (count, hidden, width)}


def _random_bank(method: MoBiE, experts: int, out: int, columns: int, tensors: RandomTensors) -> PackedBank:
    """A bank `(experts, out, columns)`: joint decomposition (eq. 4) unless the method has it off."""
    if method.joint_svd == "off":
        return _mixed_order(method, experts, out, columns, tensors)
    side = choose_side(method.shared_side, out, columns)
    long, short = (out, columns) if side == "left" else (columns, out)
    rank = min(method.rank or long, long, experts * short)
    size = (rank, columns) if side == "left" else (out, rank)
    bank = _mixed_order(method, experts, *size, tensors)
    basis = _basis(method, (out, rank) if side == "left" else (rank, columns), rank, tensors)
    return PackedBank(bank.experts, basis, side)


def _basis(method: MoBiE, size: tuple[int, int], rank: int, tensors: RandomTensors) -> Packed:
    """A shared basis of such a spread that the product with the experts has that of a weight."""
    spread = 1 / math.sqrt(rank)
    if method.basis_bits == 16:
        return Dense16((tensors.normal(*size, dtype=torch.float32) * (spread / WEIGHT_STD)).half())
    top = (1 << method.basis_bits - 1) - 1
    scale = tensors.scales(size[0], mean=spread * math.sqrt(3) / top)  # uniform codes spread by top / √3
    if method.basis_bits == 8:
        codes = tensors.integers(-top, top + 1, *size, dtype=torch.int8)
    else:
        codes = tensors.bits(size[0], method.basis_bits, length=size[1])
    return SymmetricRows(codes, scale, method.basis_bits, size[1])


def _mixed_order(method: MoBiE, experts: int, rows: int, columns: int, tensors: RandomTensors) -> PackedBank:
    """Matrices of one order with a second one on salient columns (Algorithm 3), as a bank without basis."""
    block_size = method.block_size if method.scope == "block" else columns
    blocks = -(-columns // block_size)
    extra = round(method.salient_share * columns)
    named = {
        "plain.signs": tensors.bits(experts, 1, rows, length=columns),
        "plain.row_scale": tensors.scales(experts, 1, 1, rows, blocks, mean=WEIGHT_STD),
        "plain.column_scale": tensors.scales(experts, 1, 1, columns),
        "salient": tensors.columns(experts, columns, extra),
    }
    if extra:
        named |= {
            "extra.signs": tensors.bits(experts, 1, rows, length=extra),
            "extra.row_scale": tensors.scales(experts, 1, 1, rows, blocks, mean=0.3 * WEIGHT_STD),
            "extra.column_scale": tensors.scales(experts, 1, 1, extra),
        }
    header = {"size": [rows, columns], "block_size": block_size, "extra_is_residual": True}
    one = FORMATS[BinaryMatrix.format].from_tensors
    return PackedBank(tuple(one(header, {n: t[e] for n, t in named.items()}) for e in range(experts)))


def _random_planes(adapter: Adapter, block: nn.Module, method: OBE, tensors: RandomTensors) -> PackedBlock:
    """What the method shares out where importances are random, a Linear's like those of all experts of a projection."""
    experts = adapter.experts_module(block)
    banks = {} if experts is None else _bank_shapes(experts)
    popularity = _spread(tensors, EXPERT_SPREAD, 1 if experts is None else expert_count(experts))
    sizes = {
        name: tuple(module.weight.shape) for group in adapter.linear_groups(block) for name, module in group.items()
    }

    def finding(size: tuple[int, ...], share: Tensor) -> dict[str, Any]:
        own = size[0] * share * _spread(tensors, COLUMN_SPREAD, size[1])
        return {"size": list(size), "importance": summarize(own)}

    survey: dict[str, Any] = {"linears": {}}
    if method.scope == "model":
        survey["linears"] = {name: finding(size, popularity.sum()) for name, size in sizes.items()}
    if banks:
        found = {name: [finding(shape[1:], share) for share in popularity] for name, shape in banks.items()}
        survey["experts"] = {"tokens": [0] * len(popularity), "matrices": found}
    allotted = method.allocate([survey])[0]
    assert isinstance(allotted, AllottedOBE)
    linears: dict[str, Packed] = {}
    for name, size in sizes.items():
        if role_of(name) in allotted.linears:
            linears[name] = _planes(allotted.linears[role_of(name)], size[0], tensors)
        else:
            linears[name] = Dense16(tensors.normal(*size, dtype=torch.bfloat16))
    packed = {
        name: PackedBank(tuple(_planes(own, shape[1], tensors) for own in allotted.experts[name]))
        for name, shape in banks.items()
    }
    return PackedBlock(linears, packed)


def _spread(tensors: RandomTensors, spread: float, count: int) -> Tensor:
    """Log-normal values `(count,)`."""
    return (spread / WEIGHT_STD * tensors.normal(count, dtype=torch.float32)).exp()


def _planes(own: Allotment, rows: int, tensors: RandomTensors) -> PlaneMatrix:
    """A matrix in the sign planes that it was given, on columns drawn by lot; ratios as the fit begins with."""
    planes = len(own.plane_columns)
    order = tensors.order(own.columns)
    counts = torch.zeros_like(order)
    for covered in own.plane_columns:
        counts[order[:covered]] += 1
    signs = [tensors.bits(rows, length=covered) for covered in own.plane_columns]
    return PlaneMatrix(
        torch.cat([tensors.bits(rows, length=0), *signs], dim=1),
        tensors.scales(rows if planes else 0, mean=WEIGHT_STD),
        torch.tensor([level for p in range(planes) for level in LEVELS[p]]).half().to(tensors.device),
        pack_codes(counts.cpu(), planes.bit_length()).to(tensors.device),
        own.plane_columns,
        (rows, own.columns),
    )


def random_model(
    config: Any,
    method: Method,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> nn.Module:
    """The library's model of a configuration with random weights, packed as `method` stores them, ready to run.

    Args:
        config: the library's configuration object.
        method: FP16 leaves every module dense.
        dtype: of everything that is not packed.

    Raises:
        UnsupportedError: an architecture without adapter, or a method without random weights.
    """
    from transformers import AutoModelForCausalLM

    from mobie.hf.modules import pack_model

    adapter = Adapter(config.model_type)
    tensors = RandomTensors(device, seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    blocks = [random_block(adapter, block, method, tensors) for block in adapter.blocks(model)]
    pack_model(model, adapter, blocks)
    _fill(model, tensors)
    return model


def _fill(model: nn.Module, tensors: RandomTensors) -> None:
    """Give every parameter that is still on the meta device random values; norms are one, biases zero."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if any(buffer.is_meta for buffer in child._buffers.values() if buffer is not None):
                # rotary embeddings: their tables follow from the configuration
                setattr(module, name, type(child)(config=model.config).to(tensors.device))
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = _value(type(module).__name__, name, parameter, tensors)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
    model.requires_grad_(False)


def _value(owner: str, name: str, parameter: Tensor, tensors: RandomTensors) -> Tensor:
    if "Norm" in owner:
        return torch.ones(parameter.shape, dtype=parameter.dtype, device=tensors.device)
    if name == "bias":
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=tensors.device)
    return tensors.normal(*parameter.shape, dtype=parameter.dtype)
