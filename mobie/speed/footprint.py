"""Bytes: what a decode step has to read, what a model takes in memory, and the paper's activated parameters.

A step of a batch reads, in every layer, all Linears and the router, the shared bases, and the experts that its tokens
chose: `distinct` different ones. Then come norms, the head, one row of the embeddings for each token, and the keys and
values of all tokens before. Weights are counted as they are stored, to the byte; each is counted once.

    bytes = Σ_layers (kept + Linears + bases + distinct · expert) + norm + head + batch · embedding row + KV
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobie.errors import DataError
from mobie.models.base import Adapter
from mobie.packing.bank import PackedBank
from mobie.packing.base import BitLedger, Packed
from mobie.packing.checkpoint import PackedBlock
from mobie.packing.vector import VectorCodes

INT8_HEAD_SCALE_BYTES = 2  # one float16 scale for each row of an int8 head
EMBEDDING_BITS = 16  # of embeddings and head in the paper's definition


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder block: read in every step whatever is chosen, and of each expert (empty: a dense block)."""

    always: int
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Footprint:
    """What a model consists of, in bytes as stored.

    ends:          final norm and head.
    embedding_row: of one token.
    kv_per_token:  keys and values of one token of one row, over all layers.
    """

    layers: tuple[LayerBytes, ...]
    ends: int
    embedding_row: int
    kv_per_token: int

    def step(self, batch: int, context: float, distinct: Sequence[float]) -> float:
        """Bytes of one decode step.

        Args:
            batch: rows.
            context: tokens before the step's own, mean over the steps.
            distinct: different experts that the batch chose, for each MoE layer.

        Raises:
            DataError: not one number for each MoE layer.
        """
        moe = [layer for layer in self.layers if layer.experts]
        if len(distinct) != len(moe):
            raise DataError(f"{len(distinct)} numbers of experts, expected one for each of {len(moe)} MoE layers")
        experts = math.fsum(n * sum(layer.experts) / len(layer.experts) for n, layer in zip(distinct, moe, strict=True))
        always = sum(layer.always for layer in self.layers) + self.ends
        return always + experts + batch * (self.embedding_row + context * self.kv_per_token)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def packed_bytes(packed: Packed) -> int:
    """Stored bytes of a packed weight."""
    return sum(nbytes(tensor) for tensor in packed.tensors().values())


def bank_bytes(bank: Packed, experts: int) -> tuple[int, list[int]]:
    """Bytes that every step reads (shared basis or codebook), and of each expert.

    A bank that joins gate and up has two matrices of each.
    """
    if isinstance(bank, VectorCodes):
        shared = nbytes(bank.codebook)
        return shared, [(packed_bytes(bank) - shared) // experts] * experts
    if not isinstance(bank, PackedBank):
        share = packed_bytes(bank) // experts
        return 0, [share] * experts
    each = [packed_bytes(expert) for expert in bank.experts]
    joined = [sum(each[e::experts]) for e in range(experts)]
    return 0 if bank.basis is None else packed_bytes(bank.basis), joined


def footprint(model: nn.Module, blocks: Sequence[PackedBlock], *, kv_per_token: int, int8_head: bool) -> Footprint:
    """Count a model.

    Args:
        model: the library's model, dense or with packed modules.
        blocks: its packed weights, empty blocks for a dense model.
        kv_per_token: see `Footprint`; measured from a cache.
        int8_head: the head is read as int8 codes with a scale for each row.
    """
    adapter = Adapter(model.config.model_type)
    layers = [
        layer_bytes(adapter, module, packed) for module, packed in zip(adapter.blocks(model), blocks, strict=True)
    ]
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    head_bytes = head.numel() + INT8_HEAD_SCALE_BYTES * len(head) if int8_head else nbytes(head)
    norm = sum(nbytes(p) for p in model.get_submodule(adapter.architecture.blocks.rpartition(".")[0]).norm.parameters())
    return Footprint(tuple(layers), norm + head_bytes, nbytes(embedding[0]), kv_per_token)


def layer_bytes(adapter: Adapter, module: nn.Module, packed: PackedBlock, within: str = "") -> LayerBytes:
    """One decoder block: parameters that are still there, and the packed weights in the place of the others.

    within: count what lies under this prefix only, e.g. `mlp.`.
    """
    prefix = f"{adapter.architecture.experts}."
    own = {name: parameter for name, parameter in module.named_parameters() if name.startswith(within)}
    always = sum(packed_bytes(part) for name, part in packed.linears.items() if name.startswith(within))
    always += sum(nbytes(parameter) for name, parameter in own.items() if not name.startswith(prefix))
    experts_module = adapter.experts_module(module)
    if experts_module is None:
        return LayerBytes(always)
    count = int(experts_module.num_experts)
    kept = sum(nbytes(parameter) for name, parameter in own.items() if name.startswith(prefix)) // count
    if not packed.experts:
        return LayerBytes(always, (kept,) * count)
    parts = [bank_bytes(bank, count) for bank in packed.experts.values()]
    parts.append((0, [kept] * count))  # biases
    experts = tuple(map(sum, zip(*(each for _, each in parts), strict=True)))
    return LayerBytes(always + sum(shared for shared, _ in parts), experts)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token, over all layers, as the library's own cache holds them for a configuration."""
    from transformers import AutoModelForCausalLM

    one = copy.deepcopy(config)
    one.num_hidden_layers, one.vocab_size, one.pad_token_id = 1, 8, None
    one.num_experts = one.num_experts_per_tok  # few, to be quick: the cache does not depend on them
    model = AutoModelForCausalLM.from_config(one, dtype=dtype).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    (layer,) = (layer for layer in cache.layers if layer.is_initialized)  # some versions count layers by their kinds
    return (nbytes(layer.keys) + nbytes(layer.values)) // 2 * config.num_hidden_layers


def device_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers on the model's device; a tensor that is held twice counts once."""
    device = model.get_input_embeddings().weight.device
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device == device:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


# --- the paper's definition ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activated:
    """Weights that a step of a batch uses, and the bits that each takes on average (the paper's Table 2).

    weights: of all blocks; experts as often as all tokens of the batch choose different ones.
    bits:    per weight, by the formula of the method's paper, for one token.
    ends:    weights of embeddings and head, in 16 bits.
    """

    weights: int
    bits: float
    ends: int

    @property
    def bytes(self) -> float:
        """Activated-parameter memory as in section 5.4: in GiB this gives its 9.64 for Qwen1.5-MoE in FP16, batch 4."""
        return self.weights * self.bits / 8 + self.ends * EMBEDDING_BITS / 8


def activated(model: nn.Module, ledger: BitLedger | None, batch: int) -> Activated:
    """Activated weights of a model; `ledger` is that of its packed weights, None for a dense model."""
    adapter = Adapter(model.config.model_type)
    weights = 0
    for module in adapter.blocks(model):
        weights += sum(_size(linear) for group in linear_groups(adapter, module) for linear in group)
        experts = adapter.experts_module(module)
        if experts is not None:
            top_k = int(adapter.moe_router(module).top_k)
            weights += _expert_weights(experts) * min(int(experts.num_experts), batch * top_k)
    ends = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    return Activated(weights, 16.0 if ledger is None else ledger.paper_bits, ends)


def linear_groups(adapter: Adapter, block: nn.Module) -> list[list[nn.Module]]:
    """Linears of a block, dense or packed, grouped by shared input."""
    return [
        [module for name in names if (module := _found(block, name)) is not None]
        for names in adapter.architecture.linear_groups
    ]


def _found(block: nn.Module, name: str) -> nn.Module | None:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        return None
    return module if hasattr(module, "in_features") else None


def _size(linear: Any) -> int:
    return linear.in_features * linear.out_features


def _expert_weights(experts: Any) -> int:
    """Weights of one expert: gate, up and down."""
    return 3 * int(experts.intermediate_dim) * int(experts.hidden_dim)


def model_ledger(model: nn.Module, blocks: Sequence[PackedBlock]) -> BitLedger | None:
    """Account of all packed weights; None for a dense model."""
    adapter = Adapter(model.config.model_type)
    ledgers: dict[str, BitLedger] = {}
    for index, (module, packed) in enumerate(zip(adapter.blocks(model), blocks, strict=True)):
        experts = adapter.experts_module(module)
        share = 1.0 if experts is None else int(adapter.moe_router(module).top_k) / int(experts.num_experts)
        ledgers |= {f"{index}.{name}": part.ledger(share) for name, part in packed.parts().items()}
    return BitLedger.merge(ledgers) if ledgers else None


def packed_blocks(model: nn.Module) -> list[PackedBlock]:
    """Packed weights of a model's blocks, around its buffers; empty blocks for a dense model."""
    from mobie.hf.modules import PackedExperts, PackedWeights

    found = []
    for block in Adapter(model.config.model_type).blocks(model):
        packed = {name: module for name, module in block.named_modules() if isinstance(module, PackedWeights)}
        experts = [module for module in packed.values() if isinstance(module, PackedExperts)]
        linears = {name: module.packed for name, module in packed.items() if not isinstance(module, PackedExperts)}
        found.append(PackedBlock(linears, dict(experts[0].packed) if experts else {}))
    return found
