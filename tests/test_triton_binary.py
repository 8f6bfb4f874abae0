"""The Triton Linear of binary matrices, and whole layers of experts composed of Triton kernels.

Against the packed matrices' own dense values in float64, and against the plain torch operations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import random_experts, random_matrix, random_plane_experts, random_planes
from torch import Tensor
from torch.nn.functional import silu
from triton_cases import DEVICE, DTYPES, SHARE, assert_near, poisoned_memory, random

from mobie.errors import UnsupportedError
from mobie.kernels import twins
from mobie.kernels.experts import dense_forward, experts_forward
from mobie.kernels.layout import BinaryTensors, DenseExperts, lay_out_experts, lay_out_linear, one_group
from mobie.packing.bank import split_gate_up
from mobie.packing.base import Packed
from mobie.packing.binary import BinaryMatrix

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from mobie.kernels import triton_ops as ops
from mobie.kernels.triton_ops.binary_runs import runs_of


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


# Linears

#: what the methods store, in the words of `random_matrix`
FORMATS: dict[str, dict[str, Any]] = {
    "ARB-RC, two groups": {"residual": False, "groups": 2, "extra_order": 2},
    "BiLLM": {"residual": False, "groups": 2, "extra_order": 2, "column_scale": False},
    "ARB, two groups and means": {"residual": False, "groups": 2, "mean": True, "order": 1, "extra_order": 2},
    "one group and means, factor of columns": {
        "residual": False,
        "mean": True,
        "column_scale": False,
        "column_factor": True,
    },
    "two orders everywhere, factor of columns": {
        "residual": False,
        "order": 2,
        "extra_order": 2,
        "column_factor": True,
    },
    "residual on salient columns, two groups": {"groups": 2},
    "small blocks": {"residual": False, "groups": 2, "block_size": 20},
    "one scale per row": {"residual": False, "block_size": 200},
}


def _matrix(rows: int, columns: int, salient: int, **options: Any) -> tuple[BinaryMatrix, BinaryTensors]:
    matrix = random_matrix(rows, columns, salient, torch.Generator().manual_seed(7), **options)
    layout = lay_out_linear(matrix).to(DEVICE)
    assert isinstance(layout, BinaryTensors)
    return matrix, layout


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_linear_of_every_format(options: dict[str, Any]) -> None:
    matrix, layout = _matrix(37, 200, 30, **options)
    dense = matrix.dequantize().double().to(DEVICE)
    for tokens, dtype in ((5, torch.float16), (5, torch.bfloat16), (66, torch.float16)):  # few and many
        x = random(tokens, 200, dtype=dtype)
        share = 4 * SHARE[dtype]  # x is rounded after it has been scaled, or the weight
        assert_near(ops.binary_linear(layout, x), x.double() @ dense.T, share)


def test_linear_with_bias_is_the_twins() -> None:
    _, layout = _matrix(24, 136, 9, residual=False, groups=2)
    bias = random(24, seed=3)
    for tokens in (1, 20, 65):
        x = random(tokens, 136, dtype=torch.float16)
        expected = twins.binary_linear(layout, x, bias)
        assert_near(ops.binary_linear(layout, x, bias), expected, 4 * SHARE[x.dtype])
        assert (ops.binary_linear(layout, x) - expected).abs().max() > 0.1  # the bias matters


@pytest.mark.parametrize("salient", [0, 64])
def test_linear_without_and_with_only_salient_columns(salient: int) -> None:
    matrix, layout = _matrix(16, 64, salient, residual=False, groups=2)
    x = random(3, 64, dtype=torch.float16)
    exact = x.double() @ matrix.dequantize().double().to(DEVICE).T
    assert_near(ops.binary_linear(layout, x), exact, 4 * SHARE[x.dtype])


def test_infinity_where_no_column_is_stays_out() -> None:
    """Spare places of a run read no x, not x times zero."""
    _, layout = _matrix(16, 136, 9, residual=False)
    x = random(2, 136, dtype=torch.float16)
    x[0, -1] = float("inf")  # stands before the other row in memory, where a spare column -1 would be
    out = ops.binary_linear(layout, x)
    assert out[0].isinf().all()
    assert out[1].isfinite().all()


def test_runs_lie_in_one_block_each_and_are_long_where_that_wastes_little() -> None:
    _, layout = _matrix(8, 512, 40, residual=False, groups=2)
    plain, extra = runs_of(layout).segments
    assert (plain.words, len(plain.block)) == (4, 4)
    assert extra.words == 1
    for runs, columns in ((plain, layout.plain_columns), (extra, layout.extra_columns)):
        known = runs.columns >= 0
        assert runs.columns[known].tolist() == columns.tolist()
        assert torch.equal((runs.columns // 128)[known], runs.block[:, None].expand_as(known)[known].int())
        assert (runs.column_scale[:, ~known] == 0).all()
    assert runs_of(layout) is runs_of(layout)


def test_linear_refuses_what_it_cannot_read() -> None:
    _, layout = _matrix(8, 64, 3, residual=False)
    with pytest.raises(UnsupportedError, match="float16 and bfloat16"):
        ops.binary_linear(layout, random(2, 64))
    with pytest.raises(ValueError, match=r"expected \(N, 64\)"):
        ops.binary_linear(layout, random(2, 60, dtype=torch.float16))
    with pytest.raises(ValueError, match="bias has shape"):
        ops.binary_linear(layout, random(2, 64, dtype=torch.float16), random(9))


# Layers of experts

EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 160, 72, 2

LAYERS: dict[str, dict[str, Any]] = {
    "left": {"side": "left"},
    "left, gate and up share the basis": {"side": "left", "fused": True},
    "right": {"side": "right"},
    "right, gate and up share the basis": {"side": "right", "fused": True},
    "gate and up right, down left": {"side": "right", "down_side": "left"},
    "without basis": {"basis": None},
    "16-bit basis": {"basis": 16},
}


def _routing(tokens: int) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token: expert 3 has no token, expert 4 one."""
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [4, 0]]).repeat(-(-tokens // 4), 1)[:tokens]
    index[4:] = index[4:].where(index[4:] != 4, 1)
    return index.to(DEVICE), random(tokens, TOP_K, seed=9).softmax(-1)


def _exact(packed: dict[str, Packed], hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The layer in float64, token by token, from dequantized weights."""
    dense = split_gate_up({name: bank.dequantize().double().to(DEVICE) for name, bank in packed.items()})
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for token, x in enumerate(hidden.double()):
        for expert, weight in zip(index[token], weights[token].double(), strict=True):
            inner = silu(dense["gate"][expert] @ x) * (dense["up"][expert] @ x)
            out[token] += weight * (dense["down"][expert] @ inner)
    return out


@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS)
def test_experts_are_those_of_the_packed_weights(kind: dict[str, Any]) -> None:
    packed = random_experts(EXPERTS, HIDDEN, WIDTH, **kind)
    layout = lay_out_experts(packed, "silu").to(DEVICE)
    hidden, (index, weights) = 0.05 * random(4, HIDDEN, dtype=torch.float16), _routing(4)
    hidden = hidden.half()
    out = experts_forward(layout, hidden, index, weights, ops)
    assert_near(out, _exact(packed, hidden, index, weights), share=2.0**-6)
    assert_near(out, experts_forward(layout, hidden, index, weights, twins), share=2.0**-7)


@pytest.mark.parametrize("tokens", [4, 66])
def test_experts_in_sign_planes_are_those_of_the_packed_weights(tokens: int) -> None:
    """Few and many tokens; the expert without planes, and others of 1 to 4 planes a column."""
    packed = random_plane_experts(EXPERTS, HIDDEN, WIDTH)
    layout = lay_out_experts(packed, "silu").to(DEVICE)
    hidden, (index, weights) = (0.05 * random(tokens, HIDDEN)).half(), _routing(tokens)
    out = experts_forward(layout, hidden, index, weights, ops)
    assert_near(out, _exact(packed, hidden, index, weights), share=2.0**-6)
    assert_near(out, experts_forward(layout, hidden, index, weights, twins), share=2.0**-7)
    rounded = [experts_forward(layout, hidden, index, weights, module, "int8") for module in (ops, twins)]
    assert _difference(*rounded) < 1.2e-2


@pytest.mark.parametrize("most", range(5))
def test_linear_in_sign_planes(most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    matrix = random_planes(37, torch.randint(most + 1, (200,), generator=generator), generator)
    layout, dense = lay_out_linear(matrix).to(DEVICE), matrix.dequantize().double().to(DEVICE)
    for tokens, dtype in ((5, torch.float16), (5, torch.bfloat16), (66, torch.float16)):
        x = random(tokens, 200, dtype=dtype)
        out = ops.binary_grouped(layout, x, one_group(tokens, 16, DEVICE), pairs=tokens, pairs_per_row=1)[:, 0]
        assert_near(out, x.double() @ dense.T, 8 * SHARE[dtype])


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Relative, over all elements together."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("tokens", "dtype", "side"),
    [(1, torch.bfloat16, "left"), (4, torch.float16, "right"), (66, torch.float16, "left")],
)
def test_experts_are_the_twins_with_either_activations(tokens: int, dtype: torch.dtype, side: str) -> None:
    """One token, few and many (larger tiles).

    Differences of rounding between the operations put a few int8 codes of the next one on the other side of a tie: 1e-2
    then, less than int8 itself costs. bfloat16 is cut off by the interpreter, always downwards, which adds up.
    """
    packed = random_experts(EXPERTS, HIDDEN, WIDTH, side=side)
    layout = lay_out_experts(packed, "silu").to(DEVICE)
    hidden, (index, weights) = (0.05 * random(tokens, HIDDEN)).to(dtype), _routing(tokens)
    out, twin = (
        {a: experts_forward(layout, hidden, index, weights, module, a) for a in ("16bit", "int8")}
        for module in (ops, twins)
    )
    float16 = dtype == torch.float16
    assert _difference(out["16bit"], twin["16bit"]) < (2e-3 if float16 else 3e-2)
    assert _difference(out["int8"], twin["int8"]) < (1.2e-2 if float16 else 4e-2)
    assert 1e-2 < _difference(out["int8"], out["16bit"]) < 4e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4, 66])
def test_dense_experts_are_the_librarys(dtype: torch.dtype, tokens: int) -> None:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    experts = OlmoeExperts(
        OlmoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    ).to(DEVICE)
    experts.gate_up_proj.data = (0.2 * random(EXPERTS, 2 * WIDTH, HIDDEN)).to(dtype).float()
    experts.down_proj.data = (0.2 * random(EXPERTS, HIDDEN, WIDTH, seed=1)).to(dtype).float()
    hidden, (index, weights) = random(tokens, HIDDEN, seed=2, dtype=dtype), _routing(tokens)
    with torch.no_grad():
        expected = type(experts).forward.__wrapped__(experts, hidden.float(), index, weights)
    layout = DenseExperts(experts.gate_up_proj.data.to(dtype), experts.down_proj.data.to(dtype))
    assert_near(dense_forward(layout, hidden, index, weights, ops), expected, share=8 * SHARE[dtype])


# On a GPU, at the sizes of the paper's models


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 64, 300])
@pytest.mark.parametrize("options", [FORMATS["ARB-RC, two groups"], FORMATS["ARB, two groups and means"]])
def test_linear_at_real_sizes(dtype: torch.dtype, tokens: int, options: dict[str, Any]) -> None:
    _, layout = _matrix(2048, 2048, 200, **options)
    x = random(tokens, 2048, dtype=dtype)
    assert_near(ops.binary_linear(layout, x), twins.binary_linear(layout, x), share=8 * SHARE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["16bit", "int8"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [1, 4, 64, 300])
def test_experts_at_real_sizes(tokens: int, side: str, activations: str) -> None:
    packed = random_experts(16, 2048, 1024, side=side, most_salient=200)
    layout = lay_out_experts(packed, "silu").to(DEVICE)
    hidden = (0.02 * random(tokens, 2048)).to(torch.bfloat16)
    index = torch.stack([torch.randperm(16)[:4] for _ in range(tokens)]).to(DEVICE)
    weights = random(tokens, 4, seed=3).softmax(-1)
    out, twin = (experts_forward(layout, hidden, index, weights, module, activations) for module in (ops, twins))
    assert out.isfinite().all()
    assert _difference(out, twin) < (1e-2 if activations == "16bit" else 2e-2)
