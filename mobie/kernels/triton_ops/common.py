"""What the Triton kernels share: checks of their inputs, tensor-core products, and the int8 grid of activations.

A kernel multiplies `weights (rows, k) @ activations (k, tokens)`: the weights are the first operand, which the tensor
cores take from registers, where they are decoded; tokens, padded to a tile, are the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobie.errors import UnsupportedError

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)
ACTIVATIONS = ("16bit", "int8")
#: columns of an activation that share one int8 scale
ACTIVATION_GROUP = tl.constexpr(128)
#: adding and subtracting 1.5 · 2^23 rounds a small float32 to the nearest integer, ties to even
ROUNDER = tl.constexpr(12582912.0)
#: groups of activations with no larger magnitude count as zeros: 127 / magnitude would not be finite
SMALLEST_AMPLITUDE = tl.constexpr(1e-30)
#: kernels run in Triton's interpreter, on the CPU; fixed when the first kernel is defined
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def check_activation(operation: str, name: str, x: Tensor, dims: int) -> Tensor:
    """An activation that kernels can read, contiguous.

    Raises:
        UnsupportedError: another dtype than float16 and bfloat16, or not on an NVIDIA GPU.
        ValueError: not `dims` dimensions.
    """
    check_device(operation, name, x)
    if x.dtype not in ACTIVATION_DTYPES:
        raise UnsupportedError(
            f"{operation}: {name} is {x.dtype}; Triton kernels take float16 and bfloat16: load the model with "
            "dtype=torch.bfloat16, or set MOBIE_KERNELS=torch for the plain torch operations"
        )
    if x.dim() != dims:
        raise ValueError(f"{operation}: {name} has shape {tuple(x.shape)}, expected {dims} dimensions")
    return x.contiguous()


def check_device(operation: str, name: str, tensor: Tensor) -> None:
    """Raises UnsupportedError where Triton cannot run: not CUDA, and no interpreter (which runs on the CPU)."""
    if tensor.device.type != ("cpu" if INTERPRETED.value else "cuda"):
        expected = "the CPU, as TRITON_INTERPRET is set" if INTERPRETED.value else "an NVIDIA GPU"
        raise UnsupportedError(
            f"{operation}: {name} is on {tensor.device}; the Triton kernels expect {expected}: move the model there, "
            "or set MOBIE_KERNELS=torch for the plain torch operations"
        )


def check_tensor(
    operation: str,
    name: str,
    tensor: Tensor | None,
    like: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Check a tensor that is read beside `like`; None passes.

    Raises:
        UnsupportedError: a dtype that is not among `dtypes`.
        ValueError: another device than `like`'s, another shape, or not contiguous.
    """
    if tensor is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, expected {like.device} as the activations")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise UnsupportedError(f"{operation}: {name} is {tensor.dtype}, expected {names}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: {name} has strides {tensor.stride()}, expected it contiguous: call .contiguous()"
        )


def check_activations(operation: str, activations: str) -> None:
    """Raises ValueError for another name than "16bit" and "int8"."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"{operation}: activations is {activations!r}, expected one of {', '.join(ACTIVATIONS)}")


def power_of_two(count: int, least: int = 1) -> int:
    """The next power of two, as blocks of a kernel need it."""
    return max(least, triton.next_power_of_2(count))


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which kernels are launched on the tensor's own GPU; nothing on the CPU."""
    return torch.cuda.device_of(tensor)


@triton.jit
def multiply(weights, activations, accumulator):
    """`accumulator + weights @ activations`, float32; 2-D, or 3-D with one product per warp."""
    if INTERPRETED:  # the interpreter keeps bfloat16 as integers and would multiply those
        weights = weights.to(tl.float32)
        activations = activations.to(tl.float32)
    return tl.dot(weights, activations, accumulator, input_precision="ieee")


@triton.jit
def as_kind(codes, kind: tl.constexpr):
    """Stored codes, int8 or 16 bits, as the 16-bit type `kind`; exact for int8."""
    if INTERPRETED:  # which turns integers into bfloat16 as if those were integers too
        codes = codes.to(tl.float32)
    return codes.to(kind)


@triton.jit
def multiply_int8(weights, codes):
    """Exact int32 product of int8 operands."""
    return tl.dot(weights, codes, out_dtype=tl.int32)


@triton.jit
def int8_scale(largest):
    """Scale of a group of activations whose largest magnitude is given: that becomes 127."""
    return tl.div_rn(largest, 127.0)


@triton.jit
def int8_codes(x, largest):
    """Nearest codes of activations, ties to even; 0 in a group of zeros."""
    inverse = 127.0 * tl.div_rn(1.0, tl.maximum(largest, SMALLEST_AMPLITUDE))  # as torch divides a number by a tensor
    inverse = tl.where(largest > SMALLEST_AMPLITUDE, inverse, 0.0)
    return ((x * inverse + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def silu(x):
    """`x / (1 + exp(-x))`, float32."""
    return x / (1.0 + tl.exp(-x))
