"""Layouts hold exactly what is stored; tiles hold every pair once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    exact_bank,
    exact_panel,
    random_bank,
    random_experts,
    random_matrix,
    random_plane_experts,
    random_planes,
)
from surveyed import fixed
from test_method_contract import CONFIGS, layer

from mobie.config import load_method
from mobie.errors import UnsupportedError
from mobie.kernels.layout import (
    BinaryBank,
    BinaryTensors,
    DenseExperts,
    ExpertsLayout,
    Panel,
    lay_out_experts,
    lay_out_linear,
    one_group,
    stored_bytes,
    tiles_needed,
    unpack_bits,
)
from mobie.kernels.twins import group_pairs
from mobie.packing.bank import GATE_UP, PackedBank, SymmetricRows
from mobie.packing.base import Packed
from mobie.packing.bits import pack_mask
from mobie.packing.dense import Dense16

TRUNCATED = ["mobie+rank=17", "mobie-right+rank=17"]  # the layer is smaller than the rank of mobie-truncated
MOBIE = [name for name in CONFIGS if name.startswith("mobie")] + TRUNCATED
OBE = [name for name in CONFIGS if name.startswith("obe")]
OTHERS = ["fp16", "rtn-w3", "gptq-w2-g128", "awq-w3", "pb-llm-10"]
OTHERS += ["billm", "billm-glas-nges", "arb", "arb-rc", "arb-x-cgb"]


@cache
def quantized(config: str) -> dict[str, Packed]:
    """Experts of the layer of the method contract: 3 experts, hidden 144 (two blocks of columns), width 40."""
    method = load_method(config).build()
    experts = layer(method.gradient_groups)
    return dict(fixed(method, *experts).quantize_experts(*experts))


def stored_dense(bank: PackedBank) -> np.ndarray:
    """`(experts, out, in)` float64 from the stored format's own decoding of its factors."""
    dense = torch.stack([expert.dequantize() for expert in bank.experts]).double()
    if bank.basis is not None:
        basis = bank.basis.dequantize().double()
        dense = basis @ dense if bank.side == "left" else dense @ basis
    return dense.numpy()


def stored_experts(packed: dict[str, Packed]) -> tuple[np.ndarray, np.ndarray]:
    """gate and up `(experts, 2, width, hidden)`, down `(experts, hidden, width)`."""
    dense = {name: stored_dense(bank) for name, bank in packed.items()}
    if GATE_UP in dense:
        dense["gate"], dense["up"] = np.split(dense[GATE_UP], 2)
    return np.stack([dense["gate"], dense["up"]], axis=1), dense["down"]


def laid_out_experts(layout: ExpertsLayout) -> tuple[np.ndarray, np.ndarray]:
    """The same from a layout."""
    gate_up, down = exact_bank(layout.gate_up), exact_bank(layout.down)
    if layout.gate_up_basis is not None:
        basis = exact_panel(layout.gate_up_basis)
        gate_up = basis @ gate_up if layout.gate_up_side == "left" else gate_up @ basis
    if layout.down_basis is not None:
        basis = exact_panel(layout.down_basis)
        down = basis @ down if layout.down_side == "left" else down @ basis
    return gate_up, down[:, 0]


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the order of float32 sums in the stored format's decoding."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("config", MOBIE + OBE)
def test_layout_of_every_variant_is_what_is_stored(config: str) -> None:
    packed = quantized(config)
    layout = lay_out_experts(packed, "silu")
    for found, expected in zip(laid_out_experts(layout), stored_experts(packed), strict=True):
        assert_near(found, expected)
    assert (layout.gate_up_basis is None) == (next(iter(packed.values())).basis is None)
    assert layout.gate_up.block_size % 128 == 0
    assert layout.gate_up.signs.shape[-1] % 16 == layout.down.signs.shape[-1] % 16 == 0


def test_variants_cover_what_a_layout_can_be() -> None:
    layouts = {config: lay_out_experts(quantized(config), "silu") for config in MOBIE}
    assert {(one.gate_up_side, one.down_side) for one in layouts.values()} >= {("left", "left"), ("right", "right")}
    assert layouts["mobie-fewest-bytes"].gate_up_side != layouts["mobie-fewest-bytes"].down_side
    assert layouts["mobie-none"].gate_up_basis is None
    assert layouts["mobie-u16"].gate_up_basis.codes.dtype == torch.float16
    assert layouts["mobie-u4"].gate_up_basis.codes.abs().max() <= 8
    assert layouts["mobie+rank=17"].gate_up.rows == layouts["mobie-right+rank=17"].gate_up.columns == 17
    assert layouts["mobie-matrix-scope"].gate_up.blocks == 1 < layouts["mobie"].gate_up.blocks
    assert {one.gate_up.parts for one in layouts.values()} == {2}


@pytest.mark.parametrize("config", OTHERS)
def test_other_methods_have_no_experts_layout(config: str) -> None:
    with pytest.raises(UnsupportedError, match=r"experts (stored as|with|whose)"):
        lay_out_experts(quantized(config), "silu")


@pytest.mark.parametrize("hidden, width", [(1, 1), (7, 130), (128, 16), (300, 129)])
@pytest.mark.parametrize("kind", ["left", "right", "fused", "fused-right", "none"])
@pytest.mark.parametrize("most_salient", [0, 5, 33, 10_000])
def test_shapes_that_are_no_multiple_of_anything(hidden: int, width: int, kind: str, most_salient: int) -> None:
    form: dict[str, Any] = {
        "left": {},
        "right": {"side": "right"},
        "fused": {"fused": True},
        "fused-right": {"fused": True, "side": "right"},
        "none": {"basis": None},
    }[kind]
    packed = random_experts(3, hidden, width, most_salient=most_salient, **form)
    layout = lay_out_experts(packed, "silu")
    for found, expected in zip(laid_out_experts(layout), stored_experts(packed), strict=True):
        assert_near(found, expected)
    assert layout.gate_up.extra % 32 == 0
    assert (layout.gate_up.extra == 0) == (most_salient == 0)


@pytest.mark.parametrize("hidden, width", [(1, 1), (7, 130), (128, 16), (300, 129)])
@pytest.mark.parametrize("most", range(5))
def test_sign_planes_of_any_shape(hidden: int, width: int, most: int) -> None:
    """Experts without planes beside others with up to `most` in a column."""
    packed = random_plane_experts(3, hidden, width, most=most)
    layout = lay_out_experts(packed, "silu")
    for found, expected in zip(laid_out_experts(layout), stored_experts(packed), strict=True):
        assert_near(found, expected)
    assert layout.gate_up.extra % 32 == 0
    assert (layout.gate_up.extra == 0) == (most <= 1)
    assert not layout.gate_up.column_scale[0].any() and not layout.gate_up.row_scale[0].any()


def test_sign_planes_have_a_place_for_every_further_plane_of_a_column() -> None:
    """Columns of 2, 0, 1, 3 and 1 planes: three places."""
    bank = lay_out_linear(random_planes(9, [2, 0, 1, 3, 1], torch.Generator().manual_seed(0)))
    assert isinstance(bank, BinaryBank)
    assert bank.extra_columns[0, 0].tolist() == [0, 3, 3, *[0] * 29]
    assert bank.extra_column_scale[0, 0].bool().sum() == 3
    assert bank.column_scale[0, 0].bool().nonzero().flatten().tolist() == [0, 2, 3, 4]


def test_experts_of_few_planes_take_the_memory_of_the_one_with_most() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (random_planes(128, [planes] * 128, generator) for planes in (1, 4))
    layout = lay_out_experts(dict.fromkeys(("gate", "up", "down"), PackedBank((few, many))), "silu")
    own, largest = (lay_out_linear(matrix).nbytes for matrix in (few, many))
    assert layout.nbytes == 6 * largest
    assert largest == own + 3 * 128 * (128 // 8 + 6)


def test_bits_are_the_stored_ones() -> None:
    packed = random_experts(3, 300, 40)
    layout = lay_out_experts(packed, "silu")
    for part, name in enumerate(("gate", "up")):
        for e, matrix in enumerate(packed[name].experts):
            stored = matrix.plain.signs[0]
            assert torch.equal(layout.gate_up.signs[e, part, :, : stored.shape[-1]], stored)
            assert not layout.gate_up.signs[e, part, :, stored.shape[-1] :].any()


def test_spare_places_count_for_nothing() -> None:
    layout = lay_out_experts(random_experts(3, 300, 40, most_salient=9), "silu")
    bank = layout.gate_up
    assert not bank.column_scale[..., bank.columns :].any()
    counts = [9 * e // 2 for e in range(3)]
    for e, count in enumerate(counts):
        assert not bank.extra_column_scale[e, :, count:].any()
        assert bank.extra_column_scale[e, :, :count].all()
        assert not bank.extra_columns[e, :, count:].any()


def test_a_basis_of_both_parts_is_held_once() -> None:
    layout = lay_out_experts(random_experts(2, 300, 40, fused=True), "silu")
    codes = layout.gate_up_basis.codes
    assert codes.shape == (2, 40, 40)
    assert stored_bytes(codes) == 40 * 40
    moved = layout.to("cpu")
    assert moved.gate_up_basis.codes.stride(0) == 0
    assert moved.nbytes == layout.nbytes
    assert layout.to("meta").gate_up_basis.codes.stride(0) == 0


def test_rows_of_a_panel_are_contiguous_whatever_was_packed() -> None:
    matrix = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).T
    for packed in (Dense16(matrix.half()), SymmetricRows.quantize(matrix, 8), SymmetricRows.quantize(matrix, 4)):
        panel = lay_out_linear(packed)
        assert panel.codes.is_contiguous()
        assert_near(exact_panel(panel)[0], packed.dequantize().double().numpy())


def test_bytes_in_memory_are_counted() -> None:
    bank = lay_out_linear(random_matrix(7, 130, 3, torch.Generator().manual_seed(0)))
    assert bank.nbytes == 7 * 32 + 2 * (7 * 2 + 256) + 7 * 4 + 32 * 4 + 2 * (7 * 2 + 32)
    weights = torch.zeros(2, 4, 3, dtype=torch.float16)
    assert DenseExperts(weights, weights[:, :3]).nbytes == 2 * (24 + 18)


def test_layout_moves_as_a_whole() -> None:
    layout = lay_out_experts(random_experts(2, 40, 24), "silu").to("meta")
    banks = (layout.gate_up, layout.down)
    tensors = [value for bank in banks for value in vars(bank).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 14
    assert all(tensor.is_meta for tensor in tensors)
    tensors = lay_out_linear(random_matrix(4, 20, 2, torch.Generator(), residual=False)).to("meta")
    assert tensors.plain.signs.is_meta and tensors.extra.row_scale.is_meta and tensors.plain_columns.is_meta
    assert tensors.column_factor is None


def test_linear_layouts_by_format() -> None:
    generator = torch.Generator().manual_seed(0)
    assert isinstance(lay_out_linear(random_matrix(5, 140, 4, generator)), BinaryBank)
    others = (
        {"residual": False},
        {"groups": 2},
        {"mean": True},
        {"order": 2},
        {"extra_order": 2},
        {"column_factor": True},
        {"block_size": 64},
    )
    for change in others:
        assert isinstance(lay_out_linear(random_matrix(5, 140, 4, generator, **change)), BinaryTensors), change
    weight = torch.randn(5, 140, generator=generator)
    dense = lay_out_linear(Dense16(weight.bfloat16()))
    assert torch.equal(dense.codes[0], weight.bfloat16()) and dense.scale is None
    for bits in (2, 4, 8):
        rows = SymmetricRows.quantize(weight, bits)
        assert_near(exact_panel(lay_out_linear(rows))[0], rows.dequantize().double().numpy())


def test_what_no_kernel_reads_is_refused_with_the_reason() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = quantized("rtn-w3")["gate"]
    with pytest.raises(UnsupportedError, match="'grid'"):
        lay_out_linear(grid.experts[0])
    experts = random_experts(2, 40, 24)
    with pytest.raises(UnsupportedError, match="activation 'gelu'"):
        lay_out_experts(experts, "gelu")
    with pytest.raises(UnsupportedError, match="different sides"):
        lay_out_experts(experts | {"up": random_bank(2, 24, 40, generator, side="right")}, "silu")
    with pytest.raises(UnsupportedError, match="different shapes or bits"):
        lay_out_experts(experts | {"up": random_bank(2, 24, 40, generator, basis=16)}, "silu")
    with pytest.raises(UnsupportedError, match="of different shapes"):
        lay_out_experts(experts | {"up": random_bank(2, 24, 41, generator)}, "silu")
    with pytest.raises(UnsupportedError, match="stored as 'dense16'"):
        lay_out_experts(experts | {"down": Dense16(torch.zeros(2, 40, 24).half())}, "silu")
    with pytest.raises(UnsupportedError, match="scale blocks of 16 columns"):
        lay_out_experts(random_experts(2, 40, 24, block_size=16), "silu")
    with pytest.raises(UnsupportedError, match="basis stored as"):
        broken = PackedBank(experts["down"].experts, grid.experts[0])
        lay_out_experts(experts | {"down": broken}, "silu")


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_unpack_as_they_were_packed(bits: list[bool]) -> None:
    packed = pack_mask(torch.tensor([bits]))
    assert unpack_bits(packed, len(bits))[0].bool().tolist() == bits


@settings(max_examples=200)
@given(st.data())
def test_every_pair_is_in_exactly_one_tile_of_its_expert(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 12), "experts")
    k = data.draw(st.integers(1, min(4, experts)), "k")
    tile = data.draw(st.sampled_from((1, 2, 16, 64)), "tile")
    row = st.permutations(range(experts)).map(lambda chosen: chosen[:k])
    index = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=40), "index"))
    groups = group_pairs(index, experts, tile)
    assert groups.tile_pairs.shape == (tiles_needed(index.numel(), experts, tile), tile)
    assert groups.tile_expert.dtype == groups.tile_pairs.dtype == torch.int32
    found = []
    for expert, pairs in zip(groups.tile_expert.tolist(), groups.tile_pairs.tolist(), strict=True):
        inside = [pair for pair in pairs if pair >= 0]
        assert pairs == inside + [-1] * (tile - len(inside))  # spare places last
        assert bool(inside) == (expert >= 0)
        assert all(int(index.flatten()[pair]) == expert for pair in inside)
        found += [(expert, pair) for pair in inside]
    assert found == sorted(found)  # by expert, then by pair
    assert sorted(pair for _, pair in found) == list(range(index.numel()))
    full = [len([p for p in pairs if p >= 0]) for pairs in groups.tile_pairs.tolist()]
    partial = {int(e) for e, n in zip(groups.tile_expert.tolist(), full, strict=True) if 0 < n < tile}
    assert sum(0 < n < tile for n in full) == len(partial)  # at most one tile of an expert has spare places


@pytest.mark.parametrize("rows", [1, 15, 16, 17])
def test_groups_of_one_expert_are_those_of_sorting(rows: int) -> None:
    groups, sorted_groups = one_group(rows, 16, "cpu"), group_pairs(torch.zeros(rows, 1, dtype=torch.int64), 1, 16)
    used = len(groups.tile_expert)
    assert torch.equal(groups.tile_pairs, sorted_groups.tile_pairs[:used])
    assert torch.equal(groups.tile_expert, sorted_groups.tile_expert[:used])
    assert (sorted_groups.tile_expert[used:] == -1).all()


def test_panel_is_a_dataclass_of_tensors() -> None:
    panel = Panel(torch.zeros(1, 4, 6, dtype=torch.int8), torch.ones(1, 4).half())
    assert panel.nbytes == 24 + 8
    assert panel.to("meta").codes.is_meta
