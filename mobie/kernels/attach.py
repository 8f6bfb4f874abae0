"""Give a loaded model its way to compute: unpack for every pass, keep dense copies, or kernels. And take it back.

Nothing that is stored changes: names and values of the state dict stay. Modules get a `kernel`, or another `forward` on
the instance; the configuration names the experts implementation. `detach` undoes all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mobie.errors import ConfigError, UnsupportedError
from mobie.hf.modules import PackedExperts, PackedLinear, PackedWeights
from mobie.kernels.backend import name_of, operations, say_once
from mobie.kernels.cpu import choose_compute
from mobie.kernels.experts import DENSE, PACKED, experts_forward, register_implementations, tile_size
from mobie.kernels.layout import (
    ACTIVATION,
    BinaryBank,
    BinaryTensors,
    ExpertsLayout,
    Groups,
    Panel,
    lay_out_experts,
    lay_out_linear,
    one_group,
)
from mobie.kernels.twins import Activations
from mobie.packing.bank import SymmetricRows

Compute = Literal["auto", "unpack", "cached", "kernels"]
HEAD_BITS = 8
UNDO = "_mobie_undo"  # attribute of an attached model

#: RMSNorms that compute `weight · (x / rms(x))` as `rms_norm` does, by name of their class
NORMS = frozenset(
    {"OlmoeRMSNorm", "Qwen2MoeRMSNorm", "Qwen3MoeRMSNorm", "MixtralRMSNorm", "DeepseekV2RMSNorm", "LlamaRMSNorm"}
)


def _as_configured(router: nn.Module) -> tuple[bool, float]:
    return router.norm_topk_prob, 1.0


def _greedy(router: nn.Module) -> tuple[bool, float]:
    if router.topk_method != "greedy":
        raise UnsupportedError(f"a router with topk_method {router.topk_method!r}; the kernel takes the top-k of all")
    return False, router.routed_scaling_factor


#: routers that take the top-k of a softmax over all experts: class name → (renormalise?, factor on the weights)
ROUTERS: dict[str, Callable[[nn.Module], tuple[bool, float]]] = {
    "OlmoeTopKRouter": _as_configured,
    "Qwen2MoeTopKRouter": _as_configured,
    "Qwen3MoeTopKRouter": _as_configured,
    "Qwen3NextTopKRouter": _as_configured,
    "MixtralTopKRouter": lambda _: (True, 1.0),
    "DeepseekV2TopkRouter": _greedy,
}


@dataclass
class AttachReport:
    """What became of a model's modules.

    compute:      "unpack", "cached" or "kernels"; what "auto" turned out to be.
    operations:   "torch", "triton" or "cpp" for kernels, else "library".
    kernels:      names of modules that compute from packed weights.
    swapped:      names of routers, norms and heads whose forward was replaced.
    fallbacks:    reason → names of the modules that the library computes on.
    layout_bytes: memory that the kernels' tensors take.
    host_bytes:   memory of stored tensors that were moved to the host, since only kernels compute.
    """

    compute: str
    operations: str = "library"
    kernels: list[str] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    layout_bytes: int = 0
    host_bytes: int = 0


class _Shared:
    """A callable that a copy of the model shares: it holds nothing that changes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _check_device(x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise UnsupportedError(
            f"kernels were attached on {device}, got a tensor on {x.device}; the model was moved: call "
            "mobie.kernels.attach.attach(model) again after moving it"
        )


@lru_cache(maxsize=64)
def _one_group_kept(rows: int, tile: int, device: torch.device) -> Groups:
    return one_group(rows, tile, device)


def _one_group(rows: int, device: torch.device) -> Groups:
    """Groups of one expert, kept between calls; but what is made while a CUDA graph records belongs to that graph."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (one_group if capturing else _one_group_kept)(rows, tile_size(rows), device)


@dataclass(frozen=True, eq=False)
class LinearKernel(_Shared):
    """`x Wᵀ + bias` from a layout; x `(..., columns)`, bias `(rows,)` or None."""

    layout: BinaryBank | BinaryTensors | Panel
    bias: Tensor | None
    ops: ModuleType
    activations: Activations
    device: torch.device

    def __call__(self, x: Tensor) -> Tensor:
        _check_device(x, self.device)
        return self._product(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self.layout, BinaryTensors):
            return self.ops.binary_linear(self.layout, x, self.bias)
        if isinstance(self.layout, Panel):
            return self.ops.panel(self.layout, x[:, None], bias=self.bias, activations=self.activations)[:, 0]
        groups = _one_group(len(x), x.device)
        out = self.ops.binary_grouped(
            self.layout, x, groups, pairs=len(x), pairs_per_row=1, activations=self.activations
        )[:, 0]
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, eq=False)
class ExpertsKernel(_Shared):
    """All experts of a layer; arguments as those of the library's experts."""

    layout: ExpertsLayout
    ops: ModuleType
    activations: Activations
    device: torch.device

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        _check_device(hidden, self.device)
        return experts_forward(self.layout, hidden, index, weights, self.ops, self.activations)


def _norm(rms_norm: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return rms_norm(flat, module.weight, module.variance_epsilon)[0].view(x.shape)


def _router(
    route: Callable[..., tuple[Tensor, Tensor, Tensor]], module: nn.Module, normalize: bool, factor: float, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's forward; logits and weights are float32, where most routers of the library round to the model's."""
    logits, weights, index = route(x.reshape(-1, x.shape[-1]), module.weight, module.top_k, normalize=normalize)
    return logits, weights if factor == 1 else weights * factor, index


class _Absent:
    """What an instance had before where it had nothing of its own."""


@dataclass(frozen=True)
class _Elsewhere:
    """What a tensor was before: the same on another device."""

    device: torch.device


class _Changes:
    """Changes to a model, each noted so that it can be undone; plain data, so that a copy of the model has its own."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of a configuration, or an instance's own attribute of a module."""
        own = name in vars(target) or not isinstance(target, nn.Module)
        self.done.append((target, name, getattr(target, name) if own else _Absent))
        setattr(target, name, value)

    def move(self, module: nn.Module, name: str, device: torch.device | str) -> None:
        """Move a buffer of a module; only the new place holds it."""
        tensor = getattr(module, name)
        self.done.append((module, name, _Elsewhere(tensor.device)))
        setattr(module, name, tensor.to(device))

    def undo(self) -> None:
        for target, name, before in reversed(self.done):
            if before is _Absent:
                delattr(target, name)
            elif isinstance(before, _Elsewhere):
                setattr(target, name, getattr(target, name).to(before.device))
            else:
                setattr(target, name, before)
        self.done.clear()


def attach(
    model: nn.Module, *, compute: Compute = "auto", activations: Activations = "16bit", int8_head: bool = False
) -> AttachReport:
    """Decide how the packed modules of a model compute, in place; earlier decisions are undone first.

    Args:
        model: a model of the library with packed modules (`mobie.hf.modules`), on its device.
        compute: "unpack" for every pass; "cached": dense copies after the first use; "kernels", where the format has
            one; "auto": kernels on a GPU; on a CPU cached, or kernels where the copies do not fit (`kernels.cpu`).
        activations: "int8" rounds activations in groups of 128 before they meet packed weights (kernels only).
        int8_head: round the head to int8, one scale per row (kernels only). Its parameter stays.

    Raises:
        ConfigError: an argument is none of these.
    """
    _check("compute", compute, get_args(Compute))
    _check("activations", activations, get_args(Activations))
    if compute == "auto":
        on_gpu = any(p.is_cuda for p in model.parameters())
        compute = "kernels" if on_gpu else choose_compute(_dense_bytes(model))
    report = AttachReport(compute)
    with _changing(model) as changes:
        _drop_dense(model)
        if compute == "kernels":
            _attach_kernels(model, activations, report, changes)
            if int8_head:
                _quantize_head(model, activations, report, changes)
            _swap_routers_and_norms(model, report, changes)
        else:
            if activations == "int8" or int8_head:
                say_once(f'int8 activations and an int8 head need compute="kernels", got {compute!r}: left out')
            for _, module in _packed_modules(model):
                changes.set(module, "keep_dense", compute == "cached")
    _tell(report)
    return report


def attach_dense(model: nn.Module) -> AttachReport:
    """Let a model in 16 bits compute its experts, routers and norms with this project's kernels: the fair baseline.

    Raises:
        UnsupportedError: its experts have another activation, biases or transposed weights.
    """
    report = AttachReport("kernels")
    with _changing(model) as changes:
        for name, module in model.named_modules():
            weight = module._parameters.get("gate_up_proj")
            if weight is None or not hasattr(module, "has_gate"):
                continue
            _require_swiglu(name, module)
            report.operations = name_of(operations(weight.device, weight.dtype))
            report.kernels.append(name)
            changes.set(module.config, "_experts_implementation", DENSE)
        _swap_routers_and_norms(model, report, changes)
    _tell(report)
    return report


def detach(model: nn.Module) -> None:
    """Undo `attach` or `attach_dense`; does nothing to a model that has neither."""
    changes = vars(model).pop(UNDO, None)
    if changes is not None:
        changes.undo()
        _drop_dense(model)


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{option} is {value!r}; expected one of {', '.join(known)}")


@contextmanager
def _changing(model: nn.Module) -> Iterator[_Changes]:
    """New changes to a model, in place of earlier ones; all undone where something goes wrong on the way."""
    detach(model)
    register_implementations()
    changes = _Changes()
    setattr(model, UNDO, changes)
    try:
        yield changes
    except BaseException:
        detach(model)
        raise


def _tell(report: AttachReport) -> None:
    """Say what has no kernel, once per reason."""
    for reason, names in report.fallbacks.items():
        say_once(
            f"no kernel for {reason}: {len(names)} modules (first {names[0]}) are computed by the library; packed "
            'weights among them are unpacked for every pass, compute="cached" keeps them unpacked'
        )


def _packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedWeights]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedWeights))


def _dense_bytes(model: nn.Module) -> int:
    """Bytes of dense copies of all packed weights, each in its module's dtype."""
    return sum(
        math.prod(packed.shape) * module.dtype.itemsize
        for _, module in _packed_modules(model)
        for packed in (module.packed.values() if isinstance(module, PackedExperts) else [module.packed])
    )


def _drop_dense(model: nn.Module) -> None:
    for _, module in _packed_modules(model):
        module.drop_dense()


def _device(module: nn.Module) -> torch.device:
    return next(module.buffers()).device


def _activation(experts: nn.Module) -> str:
    return experts.config.hidden_act


def _require_swiglu(name: str, experts: nn.Module) -> None:
    """Raise UnsupportedError for dense experts that no kernel reads."""
    if experts.is_transposed or not experts.has_gate or _activation(experts) != ACTIVATION:
        raise UnsupportedError(f"{name}: {type(experts).__name__} has transposed weights or no SwiGLU")
    _require_no_bias(f"{name}: {type(experts).__name__}", experts)


def _require_no_bias(name: str, experts: nn.Module) -> None:
    """Raise UnsupportedError for biases, with which GPT-OSS has clamps inside its SwiGLU, too."""
    if experts.has_bias:
        raise UnsupportedError(f"{name}: experts with biases; the kernels compute `down(silu(gate x) · up x)` only")


def _attach_kernels(model: nn.Module, activations: Activations, report: AttachReport, changes: _Changes) -> None:
    for name, module in list(_packed_modules(model)):
        ops = operations(_device(module), module.dtype)
        try:
            kernel = _kernel_of(module, ops, activations)
        except UnsupportedError as reason:
            report.fallbacks.setdefault(str(reason), []).append(name)
            continue
        if kernel is None:  # a packed router: small, and `route` takes dense weights
            changes.set(module, "keep_dense", True)
            continue
        changes.set(module, "kernel", kernel)
        if isinstance(kernel, ExpertsKernel):
            changes.set(module.config, "_experts_implementation", PACKED)
        report.operations = name_of(ops)
        report.kernels.append(name)
        report.layout_bytes += kernel.layout.nbytes
        if kernel.device.type == "cuda":
            report.host_bytes += _move_to(module, "cpu", changes)  # the GPU has the layout


def _kernel_of(module: PackedWeights, ops: ModuleType, activations: Activations) -> LinearKernel | ExpertsKernel | None:
    """The kernel of a packed module; None for a router. Raises UnsupportedError for a format without kernel."""
    if isinstance(module, PackedExperts):
        _require_no_bias(type(module).__name__, module)
        layout = lay_out_experts(module.packed, _activation(module))
        return ExpertsKernel(layout, ops, activations, _device(module))
    if isinstance(module, PackedLinear):
        return LinearKernel(lay_out_linear(module.packed), module.bias, ops, activations, _device(module))
    return None


def _move_to(module: PackedWeights, device: str, changes: _Changes) -> int:
    """Move the stored tensors of a module; returns their bytes."""
    for name in module.stored_names():
        changes.move(module, name, device)
    return sum(getattr(module, name).nbytes for name in module.stored_names())


def _quantize_head(model: nn.Module, activations: Activations, report: AttachReport, changes: _Changes) -> None:
    head = model.get_output_embeddings()
    weight = head.weight.detach()
    layout = lay_out_linear(SymmetricRows.quantize(weight.float(), HEAD_BITS))
    kernel = LinearKernel(layout, head.bias, operations(weight.device, weight.dtype), activations, weight.device)
    changes.set(head, "forward", kernel)
    report.swapped.append(next(name for name, module in model.named_modules() if module is head))
    report.layout_bytes += layout.nbytes


def _known(module: nn.Module, names: Mapping[str, Any] | frozenset[str]) -> str | None:
    """Name of the class, or of the one it was made from (packed routers), if it is among `names`."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in names), None)


def _swap_routers_and_norms(model: nn.Module, report: AttachReport, changes: _Changes) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not kind.endswith(("RMSNorm", "Router")):
            continue
        try:
            forward = _replacement(module)
        except UnsupportedError as reason:
            report.fallbacks.setdefault(str(reason), []).append(name)
            continue
        changes.set(module, "forward", forward)
        report.swapped.append(name)


def _replacement(module: nn.Module) -> Callable[[Tensor], Any]:
    """The forward of a router or norm from operations. Raises UnsupportedError for a class that is not known."""
    norm, router = _known(module, NORMS), _known(module, ROUTERS)
    if norm is None and router is None:
        known = ", ".join(sorted({*NORMS, *ROUTERS}))
        raise UnsupportedError(f"modules of class {type(module).__name__} (known are {known})")
    weight = module.weight
    ops = operations(weight.device, weight.dtype)
    if router is None:
        return partial(_norm, ops.rms_norm, module)
    normalize, factor = ROUTERS[router](module)
    return partial(_router, ops.route, module, normalize, factor)
