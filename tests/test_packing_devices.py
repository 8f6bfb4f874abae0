"""Packed weights away from the CPU: numpy is never asked, nothing lands on the CPU, and bits are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_binary_format import random_matrix
from test_planes_format import planes_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobie.packing import bits
from mobie.packing.bank import PackedBank, SymmetricRows
from mobie.packing.base import FORMATS, Packed
from mobie.packing.bits import pack_codes, unpack_codes
from mobie.packing.dense import Dense16
from mobie.packing.grid import Grid
from mobie.packing.partial_binary import PartialBinary
from mobie.packing.vector import VectorCodes


def grid(bits_: int, group_size: int | None, scaled: bool) -> Grid:
    generator = torch.Generator().manual_seed(bits_)
    groups = 1 if group_size is None else -(-21 // group_size)
    return Grid.pack(
        torch.randint(1 << bits_, (5, 21), generator=generator),
        torch.rand(5, groups, generator=generator) + 0.1,
        torch.randint(1 << bits_, (5, groups), generator=generator),
        bits=bits_,
        group_size=group_size,
        paper=float(bits_),
        column_scale=torch.rand(21, generator=generator) + 0.5 if scaled else None,
    )


def partial_binary(share: float, group_size: int | None, mean: bool) -> PartialBinary:
    generator = torch.Generator().manual_seed(0)
    groups = 1 if group_size is None else -(-21 // group_size)
    salient = torch.rand(5, 21, generator=generator) < share
    codes = torch.randint(1 << 8, (5, 21), generator=generator)
    row_scale, middle, scale = torch.rand(3, 5, groups, generator=generator) + 0.1
    zero = torch.randint(1 << 8, (5, groups), generator=generator)
    return PartialBinary.pack(
        torch.where(salient, codes, codes % 2),
        salient,
        row_scale,
        middle if mean else None,
        scale,
        zero,
        bits=8,
        group_size=group_size,
    )


def with_factor() -> Packed:
    matrix = random_matrix()
    return type(matrix).build(
        matrix.size,
        matrix.block_size,
        matrix.salient,
        matrix.plain,
        matrix.extra,
        matrix.extra_is_residual,
        torch.rand(matrix.size[1]) + 0.5,
    )


def bank(side: str | None) -> PackedBank:
    experts = tuple(random_matrix(out=6, residual=True, seed=seed) for seed in range(3))
    shape = (9, 6) if side == "left" else (21, 14)
    generator = torch.Generator().manual_seed(0)
    basis = None if side is None else SymmetricRows.quantize(torch.randn(shape, generator=generator), 8)
    return PackedBank(experts, basis, side or "left")


def vectors(*experts: int) -> VectorCodes:
    """A matrix `(5, 21)`, or a bank, in vectors of 4 on a codebook of 300: codes of 9 bits."""
    generator = torch.Generator().manual_seed(0)
    return VectorCodes.pack(
        torch.randint(300, (*experts, 5, 6), generator=generator),
        torch.randn(300, 4, generator=generator),
        torch.rand(*experts, 21, generator=generator) + 0.5,
        torch.rand(*experts, 5, generator=generator) + 0.5,
    )


PACKED: dict[str, Callable[[], Packed]] = {
    "binary replaced": random_matrix,
    "binary residual": lambda: random_matrix(residual=True),
    "binary one group, no mean": lambda: random_matrix(groups=(1, 1), mean=False, column=False),
    "binary no salient": lambda: random_matrix(salient=torch.zeros(21, dtype=torch.bool)),
    "binary factor": with_factor,
    "symmetric 8": lambda: SymmetricRows.quantize(torch.randn(5, 13), 8),
    "symmetric 3": lambda: SymmetricRows.quantize(torch.randn(5, 13), 3),
    "grid": lambda: grid(3, None, False),
    "grid groups": lambda: grid(2, 8, True),
    "partial binary": lambda: partial_binary(0.1, None, True),
    "partial binary groups": lambda: partial_binary(0.7, 8, False),
    "partial binary no salient": lambda: partial_binary(0.0, None, True),
    "partial binary all salient": lambda: partial_binary(1.0, None, True),
    "planes": lambda: planes_of([2, 0, 1, 4, 3, 4] * 3),
    "planes, none": lambda: planes_of([0] * 21),
    "dense": lambda: Dense16(torch.randn(4, 5).bfloat16()),
    "vectors": lambda: vectors(),
    "vectors, shared codebook": lambda: vectors(3),
    "bank": lambda: bank(None),
    "planes in a bank": lambda: PackedBank((planes_of([0] * 21), planes_of([1, 2, 0] * 7))),
    "bank left": lambda: bank("left"),
    "bank right": lambda: bank("right"),
}


class OnlyOn(TorchDispatchMode):
    """Fails when an operation makes a tensor on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == self.device, f"{func} made a tensor on {leaf.device}"
        return result


def on(packed: Packed, device: str) -> Packed:
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors().items()}
    return FORMATS[packed.format].from_tensors(packed.header(), tensors)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_stays_on_the_device_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    """`meta` tensors have no values: numpy, `nonzero` or a copy to the CPU cannot go unnoticed."""
    packed = on(PACKED[name](), "meta")
    with OnlyOn("meta"):
        dense = packed.dequantize(dtype)
    assert dense.dtype == dtype and tuple(dense.shape) == packed.shape and dense.is_meta
    assert all(tensor.is_meta for tensor in packed.tensors().values())


@pytest.mark.parametrize("name", PACKED)
def test_unpacking_without_numpy_gives_the_same_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PACKED[name]()
    expected = packed.dequantize()
    monkeypatch.setattr(bits.np, "unpackbits", None)
    for module in ("bits", "bank", "grid", "partial_binary", "planes", "vector"):
        monkeypatch.setattr(f"mobie.packing.{module}.unpack_codes", bits._unpack_on_device)
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_unpacking_on_a_gpu_gives_the_same_values(name: str) -> None:
    packed = PACKED[name]()
    got = on(packed, "cuda").dequantize()
    tolerance = 1e-5 if name.startswith("bank ") else 0  # a product with the basis is summed in another order
    torch.testing.assert_close(got.cpu(), packed.dequantize(), rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 16), st.integers(0, 3), st.integers(1, 40))
def test_torch_and_numpy_unpack_alike(data: st.DataObject, width: int, rows: int, length: int) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), min_size=rows * length, max_size=rows * length))
    codes = torch.tensor(values, dtype=torch.int64).view(rows, length)
    packed = pack_codes(codes, width)
    assert torch.equal(unpack_codes(packed, length).long(), codes)
    got = bits._unpack_on_device(packed, length)
    assert got.dtype == unpack_codes(packed, length).dtype == (torch.uint8 if width <= 8 else torch.int32)
    assert torch.equal(got.long(), codes)


def test_watch_sees_a_tensor_elsewhere() -> None:
    with pytest.raises(AssertionError, match="made a tensor on cpu"), OnlyOn("meta"):
        torch.zeros(2)
