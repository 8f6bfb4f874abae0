"""The format of binarized matrices: its formula element by element, its files, and the account of its bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobie.packing.bank import PackedBank
from mobie.packing.base import CODE, FORMATS
from mobie.packing.binary import BinaryMatrix, Segment, to_half


def random_segment(
    generator: torch.Generator, out: int, n: int, blocks: int, order: int, groups: int, mean: bool, column: bool
) -> Segment:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Segment.pack(
        normal(order, out, n),
        normal(order, groups, out, blocks),
        normal(groups, out, blocks) if mean else None,
        normal(order, groups, n) if column else None,
        normal(out, n) > 0 if groups == 2 else None,
    )


def random_matrix(
    out: int = 5,
    columns: int = 21,
    block_size: int = 8,
    orders: tuple[int, int] = (1, 2),
    groups: tuple[int, int] = (2, 1),
    mean: bool = True,
    column: bool = True,
    residual: bool = False,
    salient: Tensor | None = None,
    seed: int = 0,
) -> BinaryMatrix:
    generator = torch.Generator().manual_seed(seed)
    if salient is None:
        salient = torch.rand(columns, generator=generator) < 0.3
    blocks, count = math.ceil(columns / block_size), int(salient.sum())
    plain = columns if residual else columns - count
    return BinaryMatrix.build(
        (out, columns),
        block_size,
        salient,
        random_segment(generator, out, plain, blocks, orders[0], groups[0], mean, column),
        random_segment(generator, out, count, blocks, orders[1], groups[1], mean, column),
        residual,
    )


def bit(packed: Tensor, *index: int) -> int:
    """Bit `index[-1]` of a row, little-endian within its bytes."""
    return int(packed[(*index[:-1], index[-1] // 8)]) >> index[-1] % 8 & 1


def segment_value(segment: Segment, i: int, j: int, block: int) -> float:
    """The definition of an element, in Python floats."""
    g = 0 if segment.bitmap is None else bit(segment.bitmap, i, j)
    value = 0.0 if segment.mean is None else segment.mean[g, i, block].item()
    for k in range(len(segment.signs)):
        scale = segment.row_scale[k, g, i, block].item()
        if segment.column_scale is not None:
            scale *= segment.column_scale[k, g, j].item()
        value += scale * (1 if bit(segment.signs, k, i, j) else -1)
    return value


def reference_dense(matrix: BinaryMatrix) -> Tensor:
    """Every element by a double loop."""
    out, columns = matrix.shape
    salient = matrix.salient.tolist()
    plain = [c for c in range(columns) if matrix.extra_is_residual or c not in salient]
    dense = torch.zeros(out, columns, dtype=torch.float64)
    for covered, segment in ((plain, matrix.plain), (salient, matrix.extra)):
        for j, c in enumerate(covered):
            for i in range(out):
                dense[i, c] += segment_value(segment, i, j, c // matrix.block_size)
    return dense


def reload(matrix: BinaryMatrix, folder: Path) -> BinaryMatrix:
    save_file(matrix.tensors(), folder / "m.safetensors")
    header = json.loads(json.dumps(matrix.header()))
    return FORMATS["binary"].from_tensors(header, load_file(folder / "m.safetensors"))


def assert_same(first: BinaryMatrix, second: BinaryMatrix) -> None:
    assert first.header() == second.header()
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert tensor.dtype == second.tensors()[name].dtype
        assert torch.equal(tensor, second.tensors()[name])
    assert torch.equal(first.dequantize(), second.dequantize())


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 7),
    columns=st.integers(1, 26),
    block_size=st.integers(1, 30),
    orders=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mean=st.booleans(),
    column=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dense_equals_definition(
    out: int,
    columns: int,
    block_size: int,
    orders: tuple[int, int],
    groups: tuple[int, int],
    mean: bool,
    column: bool,
    residual: bool,
    seed: int,
) -> None:
    matrix = random_matrix(out, columns, block_size, orders, groups, mean, column, residual, seed=seed)
    dense = matrix.dequantize()
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), reference_dense(matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("parts", [(True, False), (False, True), (True, True)])
def test_file_round_trip(residual: bool, groups: tuple[int, int], parts: tuple[bool, bool], tmp_path: Path) -> None:
    matrix = random_matrix(groups=groups, mean=parts[0], column=parts[1], residual=residual)
    assert_same(matrix, reload(matrix, tmp_path))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_no_and_all_columns_salient(residual: bool, every: bool, tmp_path: Path) -> None:
    matrix = random_matrix(residual=residual, salient=torch.full((21,), every))
    assert_same(matrix, reload(matrix, tmp_path))
    torch.testing.assert_close(matrix.dequantize().double(), reference_dense(matrix), rtol=1e-5, atol=1e-5)
    assert matrix.paper_bits() == (2 if every else 1)


def test_without_extra_segment(tmp_path: Path) -> None:
    full = random_matrix(salient=torch.zeros(21, dtype=torch.bool))
    matrix = BinaryMatrix.build(
        full.size, full.block_size, torch.tensor([], dtype=torch.int64), full.plain, None, False
    )
    assert_same(matrix, reload(matrix, tmp_path))
    assert torch.equal(matrix.dequantize(), full.dequantize())


@pytest.mark.parametrize("residual", [False, True])
def test_ledger_is_the_closed_form(residual: bool) -> None:
    out, columns, block_size = 9, 50, 16
    salient = torch.zeros(columns, dtype=torch.bool)
    salient[[3, 17, 18, 40, 49]] = True
    matrix = random_matrix(out, columns, block_size, (1, 2), (2, 1), salient=salient, residual=residual)
    blocks, plain, extra = 4, columns if residual else 45, 5
    codes = out * math.ceil(plain / 8) + 2 * out * math.ceil(extra / 8)
    row_scales = 2 * (1 * 2 * out * blocks + 2 * 1 * out * blocks)
    column_scales = 2 * (1 * 2 * plain + 2 * 1 * extra)
    means = 2 * (2 * out * blocks + 1 * out * blocks)
    bitmap = out * math.ceil(plain / 8)
    ledger = matrix.ledger()
    total = sum(item.bytes for item in ledger.items)
    assert total == codes + row_scales + column_scales + means + bitmap + 2 * extra
    assert total == sum(t.numel() * t.element_size() for t in matrix.tensors().values())
    assert sum(item.bytes for item in ledger.items if item.kind == CODE) == codes
    assert ledger.code_bits == 8 * codes / (out * columns)
    assert ledger.stored_bits == 8 * total / (out * columns)
    assert ledger.paper_bits == pytest.approx(2 * 0.1 + 0.9)


def test_bank_joins_and_splits_experts_with_different_salient_counts(tmp_path: Path) -> None:
    masks = [torch.arange(21) % step == 0 for step in (2, 5, 30)]
    bank = PackedBank(tuple(random_matrix(salient=mask, seed=i) for i, mask in enumerate(masks)))
    save_file(bank.tensors(), tmp_path / "bank.safetensors")
    header = json.loads(json.dumps(bank.header()))
    loaded = PackedBank.from_tensors(header, load_file(tmp_path / "bank.safetensors"))
    assert torch.equal(loaded.dequantize(), bank.dequantize())
    assert [len(e.salient) for e in loaded.experts] == [11, 5, 1]
    assert bank.ledger().code_bits == pytest.approx(sum(e.ledger().code_bits for e in bank.experts) / 3)


def test_signs_from_values_and_from_booleans_agree() -> None:
    values = torch.tensor([[[-2.0, 0.0, -0.0, 3.0, -1e-30]]])
    scale = torch.ones(1, 1, 1, 1)
    columns = torch.arange(5)
    expected = torch.tensor([[-1.0, 1.0, 1.0, 1.0, -1.0]])
    for signs in (values, values >= 0, expected[None]):
        assert torch.equal(Segment.pack(signs, scale).dequantize(columns, 5), expected)


def test_scales_outside_float16_stay_finite() -> None:
    scales = torch.tensor([1e30, -1e30, 65505.0, 1e-30, -1e-9, 6e-8, 0.0])
    halves = to_half(scales)
    assert halves.isfinite().all()
    assert halves[:3].tolist() == [65504.0, -65504.0, 65504.0]
    assert halves.float()[3:].tolist() == pytest.approx([0, 0, 2**-24, 0])
    huge = torch.full((1, 1, 3, 1), 1e30)
    segment = Segment.pack(torch.ones(1, 3, 4), huge, -huge[0], torch.full((1, 1, 4), 1e30))
    assert segment.dequantize(torch.arange(4), 4).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Segment.pack(torch.ones(1, 2, 4), torch.full((1, 1, 2, 1), bad))


def test_sizes_that_do_not_fit_are_refused() -> None:
    signs, scale = torch.ones(1, 2, 4), torch.ones(1, 1, 2, 1)
    with pytest.raises(ValueError, match="column_scale has shape"):
        Segment.pack(signs, scale, column_scale=torch.ones(1, 1, 5))
    with pytest.raises(ValueError, match="2 groups"):
        Segment.pack(signs, torch.ones(1, 2, 2, 1))
    segment = Segment.pack(signs, scale)
    with pytest.raises(ValueError, match="no extra segment"):
        BinaryMatrix.build((2, 4), 4, torch.tensor([1]), segment, None, True)
    with pytest.raises(ValueError, match="plain.row_scale"):
        BinaryMatrix.build((2, 4), 2, torch.tensor([]), segment, None, True)
    with pytest.raises(ValueError, match="plain.signs"):
        BinaryMatrix.build((2, 20), 20, torch.tensor([]), segment, None, True)


@pytest.mark.parametrize(("columns", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_indices_take_the_smaller_type_that_holds_them(columns: int, dtype: torch.dtype) -> None:
    salient = torch.zeros(columns, dtype=torch.bool)
    salient[[0, columns - 1]] = True
    matrix = random_matrix(1, columns, columns, salient=salient)
    assert matrix.salient.dtype == dtype
    assert matrix.salient.tolist() == [0, columns - 1]
    assert matrix.dequantize().shape == (1, columns)
