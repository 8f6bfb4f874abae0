"""The grouped binary kernel in Triton's interpreter, against float64 and against its twin."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import exact_bank, exact_signs
from torch import Tensor

from mobie.errors import UnsupportedError
from mobie.kernels import twins
from mobie.kernels.layout import BinaryBank, Groups

pytest.importorskip("triton")
from mobie.kernels.triton_ops import binary_grouped  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
#: relative error of the whole output; Triton's interpreter cuts float32 off to bfloat16 instead of rounding it
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 8e-3}


def make_bank(
    generator: torch.Generator,
    *,
    experts: int = 3,
    parts: int = 2,
    rows: int = 70,
    columns: int = 200,
    block_size: int | None = 128,
    extra: int = 32,
    salient: int | None = None,
) -> BinaryBank:
    """Random bank, places from `salient` to `extra` spare, row scales of both signs; block_size None: one per row."""
    width = -(-columns // 128) * 128
    blocks = 1 if block_size is None else -(-columns // block_size)
    spare = extra if salient is None else salient

    def bits(n: int) -> Tensor:
        return torch.randint(0, 256, (experts, parts, rows, n // 8), generator=generator, dtype=torch.uint8)

    def scales(*shape: int) -> Tensor:
        sign = torch.randint(0, 2, (experts, parts, *shape), generator=generator) * 2 - 1
        return (sign * (0.5 + torch.rand(experts, parts, *shape, generator=generator))).half()

    order = torch.rand(experts, parts, columns, generator=generator).argsort(-1)[..., :extra].sort(-1).values
    bank = BinaryBank(
        signs=bits(width),  # the spare bits too are random: a column scale of 0 must be enough
        row_scale=scales(rows, blocks),
        column_scale=scales(width),
        extra_signs=bits(extra),
        extra_columns=order.int(),
        extra_row_scale=scales(rows, blocks),
        extra_column_scale=scales(extra),
        columns=columns,
        block_size=width if block_size is None else block_size,
    )
    bank.column_scale[..., columns:] = 0
    bank.extra_columns[..., spare:] = 0
    bank.extra_column_scale[..., spare:] = 0
    return bank


def run(bank: BinaryBank, x: Tensor, index: Tensor, tile: int = 16, activations: str = "16bit", **kind: int) -> Tensor:
    """Output of the kernel, `(pairs, parts, rows)`, whose memory held NaN before."""
    groups = twins.group_pairs(index, bank.experts, tile).to(DEVICE)
    options = {"pairs": index.numel(), "pairs_per_row": index.shape[1]} | kind
    return binary_grouped(bank.to(DEVICE), x.to(DEVICE), groups, activations=activations, **options).cpu()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floats are NaN, so that what a kernel does not write shows."""
    plain = Tensor.new_empty

    def new_empty(self: Tensor, *shape: int, **kind: Any) -> Tensor:
        fresh = plain(self, *shape, **kind)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


def exact(bank: BinaryBank, x: Tensor, index: Tensor, codes: bool = False) -> np.ndarray:
    """The product in float64, pair by pair. codes: the plain segment as int8 activations have it."""
    dense, values = exact_bank(bank), x.double().numpy()
    rounding = int8_error(bank, x) if codes else None
    out = np.zeros((index.numel(), bank.parts, bank.rows))
    for pair, expert in enumerate(index.flatten().tolist()):
        for part in range(bank.parts):
            row = values[pair // index.shape[1]]
            row = row[part] if row.ndim == 2 else row
            out[pair, part] = dense[expert, part] @ row
            if rounding is not None:
                out[pair, part] += rounding[pair // index.shape[1], expert, part]
    return out


def int8_error(bank: BinaryBank, x: Tensor) -> np.ndarray:
    """What rounding x · column scale to int8 adds to the output, `(N, experts, parts, rows)`: by the definition."""
    width = bank.signs.shape[-1] * 8
    padded = np.zeros((len(x), width), np.float32)
    padded[:, : bank.columns] = x.float().numpy()
    folded = padded[:, None, None] * bank.column_scale.float().numpy()  # (N, experts, parts, width)
    groups = folded.reshape(*folded.shape[:-1], -1, 128)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.round(groups.astype(np.float64) * inverse)
    assert np.abs(codes).max() <= 127
    added = (codes * largest / 127.0 - groups).reshape(folded.shape)
    row_scale = bank.row_scale.double().numpy()[..., np.arange(width) // bank.block_size]
    return np.einsum("nepj,eprj->nepr", added, row_scale * exact_signs(bank.signs))


def relative(found: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


SHAPES = {
    "not-a-tile": dict(rows=70, columns=200, block_size=128, extra=64, salient=37),
    "one-scale": dict(rows=33, columns=129, block_size=None, extra=32, salient=1),
    "narrow": dict(rows=1, columns=3, block_size=None, extra=0, parts=1),
    "many-blocks": dict(rows=64, columns=384, block_size=128, extra=32),
    "wide-blocks": dict(rows=130, columns=300, block_size=256, extra=32, parts=1),
    "no-salient": dict(rows=48, columns=256, block_size=128, extra=0),
    "all-salient-spare": dict(rows=20, columns=140, block_size=128, extra=32, salient=0),
}


@pytest.mark.parametrize("activations", ["16bit", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_float64(name: str, activations: str) -> None:
    """Experts of 0, 1 and several pairs; shapes that fill no tile; outputs in memory that held NaN."""
    generator = torch.Generator().manual_seed(len(name))
    bank = make_bank(generator, **SHAPES[name])
    index = torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2], [2, 0]])  # expert 1 has none
    index[3, 0] = 1 if name != "no-salient" else 0  # expert 1 has one
    for dtype in DTYPES:
        x = torch.randn(5, bank.columns, generator=generator).to(dtype)
        found = run(bank, x, index, activations=activations)
        assert found.dtype == dtype and found.isfinite().all()
        assert relative(found, exact(bank, x, index, codes=activations == "int8")) < TOLERANCE[dtype]


@pytest.mark.parametrize(("activations", "tile"), [("16bit", 8), ("16bit", 64), ("int8", 8), ("int8", 64)])
def test_tiles(activations: str, tile: int) -> None:
    """The other tiles, more pairs of one expert than a tile holds, and a twin's answer."""
    generator = torch.Generator().manual_seed(tile)
    bank = make_bank(generator, experts=2, parts=1, rows=40, columns=136)
    index = torch.zeros(70, 1, dtype=torch.int64)
    index[11] = 1
    x = torch.randn(70, 136, generator=generator).half()
    found = run(bank, x, index, tile, activations)
    groups = twins.group_pairs(index, 2, tile)
    twin = twins.binary_grouped(bank, x, groups, pairs=70, pairs_per_row=1, activations=activations)
    assert relative(found, twin.double().numpy()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("activations", ["16bit", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit(dtype: torch.dtype, activations: str) -> None:
    """With x the columns of the identity, the kernel gives the matrix back: no bit at another's place, none lost."""
    generator = torch.Generator().manual_seed(1)
    bank = make_bank(generator, experts=1, parts=1, rows=17, columns=250, extra=32)
    powers = 2.0 ** torch.randint(-3, 3, (1, 1, 17, 2), generator=generator)
    bank = dataclasses.replace(
        bank,
        row_scale=powers.half(),
        extra_row_scale=(16 * powers).half(),
        column_scale=(bank.column_scale != 0).half(),
        extra_column_scale=torch.ones(1, 1, 32).half(),
    )
    found = run(bank, torch.eye(250, dtype=dtype), torch.zeros(250, 1, dtype=torch.int64), 64, activations)
    expected = exact_bank(bank)[0, 0].T
    if activations == "16bit":
        assert np.array_equal(found[:, 0].double().numpy(), expected)
    else:
        assert np.abs(found[:, 0].double().numpy() / expected - 1).max() < 1e-2


def test_three_dimensional_x() -> None:
    """Every part reads its own x, and a pair reads row `pair // pairs_per_row`."""
    generator = torch.Generator().manual_seed(2)
    bank = make_bank(generator)
    index = torch.tensor([[0], [2], [1], [2], [0], [1]])
    x = torch.randn(6, 2, 200, generator=generator).half()
    assert relative(run(bank, x, index), exact(bank, x, index)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("activations", ["16bit", "int8"])
def test_pairs_do_not_touch_each_other(activations: str) -> None:
    """NaN in rows of x that are not a pair's stays out of it, bit for bit; so do the tile and the order of pairs."""
    generator = torch.Generator().manual_seed(3)
    bank = make_bank(generator, experts=2, parts=1, rows=18)
    x = torch.randn(6, 200, generator=generator).half()
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    whole = run(bank, x, index, activations=activations)
    x[5] = torch.nan  # memory that lies right behind the last columns of row 4
    part = run(bank, x, index[:5], activations=activations, pairs=10, pairs_per_row=2)
    assert torch.equal(part, whole[:10])
    turned = run(bank, x.flip(0), index.flip(0), activations=activations)
    assert torch.equal(turned.view(6, 2, 18).flip(0)[:5], whole.view(6, 2, 18)[:5])


def test_zeros_and_large_values() -> None:
    """A row of zeros gives zeros with int8 too; bfloat16 beyond float16's range stays finite."""
    generator = torch.Generator().manual_seed(4)
    bank = make_bank(generator, parts=1, rows=16)
    index = torch.tensor([[0], [1]])
    x = torch.zeros(2, 200, dtype=torch.bfloat16)
    x[1] = 1e6 * torch.randn(200, generator=generator)
    for activations in ("16bit", "int8"):
        found = run(bank, x, index, activations=activations)
        assert (found[0] == 0).all() and found.isfinite().all()
        assert relative(found, exact(bank, x, index, activations == "int8")) < TOLERANCE[torch.bfloat16]


def test_no_pairs() -> None:
    bank = make_bank(torch.Generator().manual_seed(5))
    groups = Groups(torch.empty(0, dtype=torch.int32), torch.empty(0, 16, dtype=torch.int32)).to(DEVICE)
    x = torch.empty(0, 200, dtype=torch.float16, device=DEVICE)
    assert binary_grouped(bank.to(DEVICE), x, groups, pairs=0, pairs_per_row=2).shape == (0, 2, 70)


def test_wrong_input() -> None:
    """Wrong dtypes, shapes and memory orders are told by name."""
    bank = make_bank(torch.Generator().manual_seed(6))
    index = torch.tensor([[0, 1]])
    x = torch.zeros(1, 200, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="x is torch.float32"):
        run(bank, x.float(), index)
    with pytest.raises(ValueError, match=r"x has shape \(1, 199\), expected \(rows, 200\)"):
        run(bank, x[:, :199], index)
    with pytest.raises(ValueError, match="activations is '8bit'"):
        run(bank, x, index, activations="8bit")
    with pytest.raises(ValueError, match="tiles of 12 pairs"):
        run(bank, x, index, tile=12)
    with pytest.raises(ValueError, match="4 pairs of 2 per row, but x has 1 rows"):
        run(bank, x, index, pairs=4)
    with pytest.raises(ValueError, match=r"bank.row_scale has shape \(3, 2, 70, 1\), expected \(3, 2, 69, 1\)"):
        run(
            dataclasses.replace(make_bank(torch.Generator(), block_size=None), signs=bank.signs[:, :, 1:].clone()),
            x,
            index,
        )
    with pytest.raises(ValueError, match="bank.signs has strides"):
        run(dataclasses.replace(bank, signs=bank.signs.transpose(0, 1).contiguous().transpose(0, 1)), x, index)
    with pytest.raises(UnsupportedError, match="bank.row_scale is torch.float32, expected torch.float16"):
        run(dataclasses.replace(bank, row_scale=bank.row_scale.float()), x, index)
    with pytest.raises(UnsupportedError, match="blocks of 64 columns; expected a multiple of 128"):
        run(make_bank(torch.Generator(), block_size=64), x, index)
