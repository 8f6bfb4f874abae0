"""Modules that hold packed weights in place of dense ones, and are otherwise the library's own.

A module's buffers are the tensors of its `Packed` objects, so its state dict is what a checkpoint stores. A buffer is
named after the part that it belongs to (`gate`, `up`, `down`; none where a module has one weight) and its tensor, with
`__` for the dots that buffers cannot have:

    self_attn.q_proj.plain__signs        mlp.experts.gate__experts__plain__signs        mlp.gate.codes

What is not a tensor (format and header) is kept beside the buffers. A dense weight exists while a forward pass needs it
(`keep_dense = False`), or from its first use on (`keep_dense = True`); with a `kernel` it is never made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobie.models.experts import EXPERT_PARAMETERS, fuse_down, fuse_gate_up
from mobie.packing.bank import split_gate_up
from mobie.packing.base import FORMATS, Packed
from mobie.packing.checkpoint import PackedBlock, tensor_name
from mobie.packing.dense import Dense16

__all__ = [
    "PackedExperts",
    "PackedLinear",
    "PackedWeights",
    "pack_block",
    "pack_model",
    "packed_experts_class",
    "packed_modules",
    "packed_router_class",
]


class PackedWeights(nn.Module):
    """What the modules of this file share: packed weights as buffers, and dense weights made from them on demand.

    dtype:      of the dense weights; follows `module.to(dtype)`, while the stored tensors keep their own dtypes.
    keep_dense: keep a dense weight after its first use, instead of unpacking it for every forward pass.
    kernel:     computes the forward pass from the packed tensors, where something set it (`mobie.kernels.attach`).
    """

    dtype: torch.dtype
    keep_dense: bool
    kernel: Callable[..., Tensor] | None

    def _store(self, parts: Mapping[str, Packed], dtype: torch.dtype) -> None:
        """Register the tensors of `parts` (name → packed weight) as buffers, on the device where they are."""
        self.dtype, self.keep_dense, self.kernel = dtype, False, None
        self._formats = {name: (type(part).format, part.header()) for name, part in parts.items()}
        self._names: dict[str, dict[str, str]] = {}
        self._dense: dict[str, Tensor] = {}
        self._holds = 0
        for name, part in parts.items():
            tensors = part.tensors()
            self._names[name] = {key: tensor_name(name, key) for key in tensors}
            for key, tensor in tensors.items():
                self.register_buffer(self._names[name][key], tensor)
        self._is_hf_initialized = True  # the library shall not draw random values for this module

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the packed weights in this module."""
        return tuple(self._formats)

    def stored_names(self) -> list[str]:
        """Names of the buffers that hold packed tensors."""
        return [buffer for names in self._names.values() for buffer in names.values()]

    def _part(self, name: str) -> Packed:
        """The packed weight `name`, rebuilt around the buffers as they are now (no copy)."""
        form, header = self._formats[name]
        tensors = {key: self._buffers[buffer] for key, buffer in self._names[name].items()}
        return FORMATS[form].from_tensors(header, tensors)

    def _dense_of(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The dense weight `name`: a kept one, or `make()`, which is kept where somebody still needs it."""
        if name in self._dense:
            return self._dense[name]
        weight = make()
        if self.keep_dense or self._holds:
            self._dense[name] = weight
        return weight

    def drop_dense(self) -> None:
        """Forget kept dense weights; they are made again where they are needed."""
        self._dense.clear()

    @contextmanager
    def _hold_dense(self) -> Iterator[None]:
        """Inside, a dense weight is made at most once; afterwards it is dropped unless `keep_dense`."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if not (self.keep_dense or self._holds):
                self.drop_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`to`, `cuda`, `half` …: buffers move but keep their dtype, for a cast scale would be another weight."""
        self.drop_dense()
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        kept = {name: move(self._buffers.pop(name)) for name in self.stored_names()}
        super()._apply(fn, recurse)
        self._buffers |= kept
        return self


class PackedLinear(PackedWeights):
    """`y = x Wᵀ + bias` with a packed `W (out_features, in_features)`.

    kernel: `Callable[[x], y]`, used in place of `F.linear` where it is set.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        """`packed`: `(out, in)`, on any device, `meta` too. `bias`: `(out,)`; a Parameter is taken over as it is."""
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self._store({"": packed}, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> Packed:
        """The packed weight, rebuilt around the buffers (no copy)."""
        return self._part("")

    @property
    def weight(self) -> Tensor:
        """The dense weight `(out, in)` in `dtype`."""
        return self._dense_of("weight", lambda: self.packed.dequantize(self.dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` → `(..., out)`."""
        if self.kernel is not None:
            return self.kernel(x)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self._formats[''][0]}"


class PackedExperts(PackedWeights):
    """Mix-in of `packed_experts_class`: the fused experts of a layer from two or three packed banks.

    kernel: `Callable[[hidden, top_k_index, top_k_weights], Tensor]`, called by the experts implementation "mobie".
    """

    @property
    def packed(self) -> dict[str, Packed]:
        """`gate` and `up`, or both as `gate_up`, and `down`: banks `(experts, out, in)` around the buffers."""
        return {name: self._part(name) for name in self.parts}

    @property
    def gate_up_proj(self) -> Tensor:
        """In the layout of the library's class, as that of a dense module (`mobie.models.experts`)."""

        def join() -> Tensor:
            dense = {n: self._part(n).dequantize(self.dtype) for n in self.parts if n != "down"}
            split = split_gate_up(dense)
            return fuse_gate_up(self, split["gate"], split["up"])

        return self._dense_of("gate_up_proj", join)

    @property
    def down_proj(self) -> Tensor:
        """In the layout of the library's class."""
        return self._dense_of("down_proj", lambda: fuse_down(self, self._part("down").dequantize(self.dtype)))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The library's own forward, which asks for a weight once per expert: unpacked once."""
        with self._hold_dense():
            return super().forward(*args, **kwargs)


class _PackedRouter(PackedWeights):
    """Mix-in of `packed_router_class`: a router whose weight is packed."""

    @property
    def packed(self) -> Packed:
        """The packed weight `(experts, hidden)` around the buffers."""
        return self._part("")

    @property
    def weight(self) -> Tensor:
        """The dense weight `(experts, hidden)` in `dtype`."""
        return self._dense_of("weight", lambda: self.packed.dequantize(self.dtype).contiguous())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._hold_dense():
            return super().forward(*args, **kwargs)


@functools.cache
def packed_experts_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a library's experts class whose `gate_up_proj` and `down_proj` come from packed banks.

    Instances are made by `pack_block`, which turns an existing module of `cls` into one.
    """
    return type(f"Packed{cls.__name__}", (PackedExperts, cls), {"__module__": __name__, "__doc__": cls.__doc__})


@functools.cache
def packed_router_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a library's router class whose `weight` is packed."""
    return type(f"Packed{cls.__name__}", (_PackedRouter, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def _become(module: nn.Module, cls: type[nn.Module], parts: Mapping[str, Packed], replaced: Sequence[str]) -> None:
    """Make `module` an instance of its packed subclass `cls`: hooks, configuration and identity stay."""
    dtype = getattr(module, replaced[0]).dtype
    for name in replaced:
        del module._parameters[name]
    module.__class__ = cls
    module._store(parts, dtype)


def pack_block(adapter: Any, module: nn.Module, packed: PackedBlock) -> None:
    """Swap the modules of one decoder block for packed ones that hold `packed`.

    The dtype of dense weights is that of the parameters that go; buffers stay on the device of the packed tensors.
    A Linear that is stored in 16 bits stays an ordinary one, with that weight.
    """
    router: Any = adapter.router(module)
    experts: Any = adapter.experts_module(module)
    for name, part in packed.linears.items():
        if isinstance(part, Dense16):  # stored as the parameter that it is
            linear = module.get_submodule(name)
            linear.weight = nn.Parameter(part.dequantize(linear.weight.dtype), requires_grad=False)
        elif name == adapter.architecture.router:
            _become(router, packed_router_class(router.__class__), {"": part}, ["weight"])
        else:
            linear = module.get_submodule(name)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, PackedLinear(part, linear.bias, linear.weight.dtype))
    if packed.experts:
        _become(experts, packed_experts_class(experts.__class__), packed.experts, EXPERT_PARAMETERS)


def pack_model(model: nn.Module, adapter: Any, blocks: Sequence[PackedBlock]) -> None:
    """Swap the modules of a model in memory for packed ones, in place; one `PackedBlock` per decoder block.

    Args:
        model: a model of the library that `adapter` describes, on any device.
        blocks: packed weights; a module that a block does not name stays dense.
    """
    for module, packed in zip(adapter.blocks(model), blocks, strict=True):
        pack_block(adapter, module, packed)


def packed_modules(model: nn.Module) -> dict[str, PackedWeights]:
    """The packed modules of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeights)}
