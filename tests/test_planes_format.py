"""Sign planes as they are stored: values, bytes, files, and what the check counts in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mobie.check.checkpoints import Count, count_block
from mobie.check.files import read_tensor_file
from mobie.packing.bank import PackedBank
from mobie.packing.base import FORMATS, BitLedger
from mobie.packing.checkpoint import BlockNames, PackedBlock, load_block, save_block
from mobie.packing.planes import PlaneMatrix, ratio_at, stored_bytes

COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def planes_of(counts: list[int], out: int = 5, seed: int = 0) -> PlaneMatrix:
    """A matrix with random signs, row scales and ratios."""
    generator = torch.Generator().manual_seed(seed)
    return PlaneMatrix.pack(
        torch.randn(max(counts), out, len(counts), generator=generator),
        torch.randn(out, generator=generator),
        torch.randn(ratio_at(max(counts) + 1, 0), generator=generator),
        torch.tensor(counts),
    )


def by_loop(matrix: PlaneMatrix, counts: list[int]) -> np.ndarray:
    """The definition in Python floats, weight by weight, from the stored bits."""
    out, columns = matrix.size
    rows = [[int(b) for b in np.unpackbits(row, bitorder="little")] for row in matrix.signs.numpy()]
    dense = np.zeros((out, columns))
    start = 0  # bit at which a plane begins
    for plane in range(max(counts)):
        covered = [j for j, count in enumerate(counts) if count > plane]
        for place, j in enumerate(covered):
            ratio = matrix.ratio[counts[j] * (counts[j] - 1) // 2 + plane].item()
            for i in range(out):
                dense[i, j] += matrix.row_scale[i].item() * ratio * (1 if rows[i][start + place] else -1)
        start += 8 * -(-len(covered) // 8)
    return dense


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, out=st.integers(1, 7), seed=st.integers(0, 99))
def test_dense_equals_definition(counts: list[int], out: int, seed: int) -> None:
    matrix = planes_of(counts, out, seed)
    assert matrix.plane_counts().tolist() == counts
    np.testing.assert_allclose(matrix.dequantize().double().numpy(), by_loop(matrix, counts), rtol=1e-6, atol=1e-6)


def test_dense_by_hand() -> None:
    """Columns of 2, 0 and 1 planes; row scales 2 and -1; ρ10 = 1, ρ20 = 0.5, ρ21 = 0.25."""
    signs = torch.tensor([[[1.0, 9, -1], [-1, 9, 1]], [[-1.0, 9, 9], [-1, 9, 9]]])
    matrix = PlaneMatrix.pack(signs, torch.tensor([2.0, -1]), torch.tensor([1, 0.5, 0.25]), torch.tensor([2, 0, 1]))
    assert matrix.dequantize().tolist() == [[2 * (0.5 - 0.25), 0, -2], [-(-0.5 - 0.25), 0, -1]]
    assert matrix.plane_columns == (2, 1)
    assert matrix.paper_bits() == 1


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, out=st.integers(1, 30))
def test_stored_bytes_are_those_of_the_ledger(counts: list[int], out: int) -> None:
    matrix = planes_of(counts, out)
    covered = tuple(sum(count > plane for count in counts) for plane in range(max(counts)))
    ledger = matrix.ledger()
    assert sum(item.bytes for item in ledger.items) == stored_bytes((out, len(counts)), covered)
    assert {item.name for item in ledger.items if item.kind == "code"} == {"signs"}
    assert ledger.weights == out * len(counts)


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS)
def test_files_give_the_same_matrix(counts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    matrix, path = planes_of(counts), tmp_path_factory.getbasetemp() / "planes.safetensors"
    save_file(matrix.tensors(), path)
    again = FORMATS["planes"].from_tensors(json.loads(json.dumps(matrix.header())), load_file(path))
    assert again.header() == matrix.header()
    for name, tensor in matrix.tensors().items():
        assert again.tensors()[name].dtype == tensor.dtype and torch.equal(again.tensors()[name], tensor)
    assert torch.equal(again.dequantize(), matrix.dequantize())


def test_matrix_without_planes_stores_nothing_and_is_zero() -> None:
    matrix = planes_of([0] * 12)
    assert sum(tensor.numel() for tensor in matrix.tensors().values()) == stored_bytes((5, 12), ()) == 0
    assert matrix.dequantize().tolist() == [[0.0] * 12] * 5
    assert matrix.paper_bits() == 0


@pytest.mark.parametrize("change", [{"row_scale": torch.full((5,), torch.nan)}, {"ratio": torch.ones(2)}])
def test_what_does_not_belong_together_is_not_packed(change: dict[str, Any]) -> None:
    fitting = {"signs": torch.ones(2, 5, 3), "row_scale": torch.ones(5), "ratio": torch.ones(3)}
    PlaneMatrix.pack(**fitting, counts=torch.tensor([2, 0, 1]))
    with pytest.raises(ValueError, match="finite|2 ratios"):
        PlaneMatrix.pack(**fitting | change, counts=torch.tensor([2, 0, 1]))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A block of a Linear and of experts that differ in everything, one without planes."""
    experts = PackedBank((planes_of([0] * 9), planes_of([1, 0, 2] * 3), planes_of([4, 3, 3] * 3)))
    block = PackedBlock({"self_attn.q_proj": planes_of([3, 1, 0, 0, 1])}, {"gate": experts})
    save_block(tmp_path / "block", block, "f" * 64, {}, BlockNames("model.layers.0.", "mlp.experts"))
    return tmp_path / "block"


def counted(path: Path, metadata: dict[str, Any] | None = None) -> Count:
    """What the check counts in a block's file with its own header, or with another."""
    file, count = read_tensor_file(path), Count()
    count_block("block0", file, json.loads(file.metadata["mobie"]) if metadata is None else metadata, 0.5, count)
    return count


def test_the_check_counts_what_the_ledger_has(stored: Path) -> None:
    parts = load_block(stored).block.parts()
    ledger = BitLedger.merge({name: part.ledger(0.5) for name, part in parts.items()})
    bits = {"bits_paper": ledger.paper_bits, "bits_codes": ledger.code_bits, "bits_stored": ledger.stored_bits}
    count = counted(stored)
    assert count.bits() == pytest.approx(bits)
    assert (count.weights, count.active) == (ledger.weights, ledger.active_weights)
    assert count.bytes_by_item == {f"block0.{item.name}": item.bytes for item in ledger.items}


@pytest.mark.parametrize("part", ["linears.self_attn.q_proj", "experts.gate"])
def test_the_check_sees_another_number_of_columns_in_a_header(stored: Path, part: str) -> None:
    metadata = json.loads(read_tensor_file(stored).metadata["mobie"])
    header = metadata["headers"][part]["header"]
    own = header if "plane_columns" in header else header["headers"]["each"][1]
    own["plane_columns"][0] ^= 1
    assert counted(stored, metadata).bits()["bits_paper"] != counted(stored).bits()["bits_paper"]
