"""The n-bit grid: arithmetic against a loop in float64, packing round trip, and the account of its bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobie.errors import ConfigError, DataError
from mobie.packing.bank import PackedBank
from mobie.packing.base import FORMATS
from mobie.packing.grid import Grid, check_grid_options, decode, encode, fit_grid, nominal_bits, pack_bank

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))
GROUPS = st.one_of(st.none(), st.integers(1, 48))


def random_weight(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    weight: torch.Tensor, bits: int, group_size: int | None, column_scale: torch.Tensor | None = None
) -> Grid:
    scale, zero = fit_grid(weight, bits, group_size)
    codes = encode(weight, scale, zero, bits, group_size)
    return Grid.pack(codes, scale, zero, bits=bits, group_size=group_size, paper=bits, column_scale=column_scale)


def reference_round_trip(weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Asymmetric round to nearest, one group at a time in Python floats; the scale rounded to float16."""
    rows, columns = weight.shape
    size = group_size or columns
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for start in range(0, columns, size):
            group = weight[i, start : start + size].double().tolist()
            low, high = min(0.0, *group), max(0.0, *group)
            scale = torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32).half().item()
            zero = min(round(-low / scale), 2**bits - 1)
            for k, value in enumerate(group):
                code = min(max(round(value / scale) + zero, 0), 2**bits - 1)
                result[i, start + k] = (code - zero) * scale
    return result


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [None, 8, 7, 64])
def test_round_trip_equals_loop(bits: int, group_size: int | None) -> None:
    weight = random_weight((5, 30), seed=bits)
    dense = quantized(weight, bits, group_size).dequantize()
    expected = reference_round_trip(weight, bits, group_size)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, bits=st.integers(1, 8), group_size=GROUPS, scaled=st.booleans(), seed=st.integers(0, 99))
def test_stored_form_is_exact(
    shape: tuple[int, int], bits: int, group_size: int | None, scaled: bool, seed: int
) -> None:
    weight = random_weight(shape, seed)
    column_scale = random_weight((shape[1],), seed + 1).exp().half().float() if scaled else None
    scale, zero = fit_grid(weight, bits, group_size)
    codes = encode(weight, scale, zero, bits, group_size)
    packed = Grid.pack(codes, scale, zero, bits=bits, group_size=group_size, paper=2.5, column_scale=column_scale)

    seen = decode(codes, scale, zero, group_size) / (column_scale if scaled else 1)
    assert torch.equal(packed.dequantize(), seen)
    again = FORMATS["grid"].from_tensors(packed.header(), packed.tensors())
    assert torch.equal(again.dequantize(), seen)
    assert again.shape == shape
    assert again.paper_bits() == 2.5


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, bits=st.integers(1, 8), group_size=GROUPS, scaled=st.booleans())
def test_ledger_is_closed_form(shape: tuple[int, int], bits: int, group_size: int | None, scaled: bool) -> None:
    rows, columns = shape
    packed = quantized(random_weight(shape, 0), bits, group_size, torch.ones(columns) if scaled else None)
    groups = 1 if group_size is None else math.ceil(columns / group_size)
    expected = {
        "codes": rows * bits * math.ceil(columns / 8),
        "scale": 2 * rows * groups,
        "zero": groups * bits * math.ceil(rows / 8),
    }
    if scaled:
        expected["column_scale"] = 2 * columns
    ledger = packed.ledger()
    assert {item.name: item.bytes for item in ledger.items} == expected
    assert {item.name: item.bytes for item in ledger.items} == {
        name: len(tensor.numpy().tobytes()) for name, tensor in packed.tensors().items()
    }
    assert {item.name for item in ledger.items if item.kind == "code"} == {"codes"}


def test_bits_of_a_typical_matrix() -> None:
    ledger = quantized(random_weight((64, 256), 0), bits=3, group_size=128).ledger()
    assert ledger.code_bits == 3
    assert ledger.stored_bits == 3 + (16 + 3) / 128
    assert nominal_bits(3, None) == 3
    assert nominal_bits(3, 128) == 3.25


def test_error_inside_the_grid_is_at_most_half_a_step() -> None:
    weight = random_weight((7, 50), seed=3)
    scale, zero = fit_grid(weight, 4, 10)
    error = (decode(encode(weight, scale, zero, 4, 10), scale, zero, 10) - weight).abs()
    step = scale.repeat_interleave(10, dim=1)
    position = weight / step + zero.repeat_interleave(10, dim=1)
    inside = (position >= 0) & (position <= 15)
    assert inside.float().mean() > 0.8
    assert (error[inside] <= step[inside] * 0.5001).all()
    assert (
        error <= step * 1.01
    ).all()  # the zero point is rounded too: an end of the range may lie half a step outside


def test_zero_is_exact_and_one_sided_rows_keep_it() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, -1.0, -2.0, -3.0], [1.0, 1.5, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    scale, zero = fit_grid(weight, 2, None)
    assert scale[:3].flatten().tolist() == [1, 1, 1]
    assert zero.flatten().tolist() == [0, 3, 0, 0]
    dense = quantized(weight, 2, None).dequantize()
    assert torch.equal(dense[[0, 1, 3]], weight[[0, 1, 3]])
    assert dense[2].tolist() == [1, 2, 2, 3]  # 1.5 rounds to even


def test_values_that_need_float16_rounding_first() -> None:
    weight = torch.tensor([[0.0, 0.1, 0.2, 0.3]])  # 0.1 is no float16
    scale, _ = fit_grid(weight, 2, None)
    assert scale.item() == torch.tensor(0.1).half().item()
    assert torch.equal(quantized(weight, 2, None).dequantize(), torch.arange(4.0)[None] * scale)


def test_bank_splits_and_joins() -> None:
    weight = random_weight((3, 6, 20), seed=0)
    scale, zero = fit_grid(weight, 3, 8)
    codes = encode(weight, scale, zero, 3, 8)
    column_scale = torch.full((3, 20), 2.0)
    bank = PackedBank(tuple(pack_bank(codes, scale, zero, bits=3, group_size=8, paper=3.0, column_scale=column_scale)))
    assert bank.shape == (3, 6, 20)
    again = FORMATS["bank"].from_tensors(bank.header(), bank.tensors())
    assert torch.equal(again.dequantize(), decode(codes, scale, zero, 8) / 2)


@pytest.mark.parametrize(
    "bits, group_size", [(0, None), (9, None), (2.0, None), ("3", None), (True, None), (3, 0), (3, -1), (3, 64.0)]
)
def test_refuses_options_no_grid_has(bits: object, group_size: object) -> None:
    with pytest.raises(ConfigError, match=r"some-method: (bits|group_size) is .*expected"):
        check_grid_options("some-method", bits, group_size)


@pytest.mark.parametrize("value", [1e9, float("inf"), float("nan")])
def test_refuses_weights_no_float16_scale_covers(value: float) -> None:
    with pytest.raises(DataError, match="rescale the weights"):
        fit_grid(torch.tensor([[0.5, value]]), 4, None)
