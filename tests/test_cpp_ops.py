"""The C++ operators against float64 and the twins, in awkward shapes; equal on any number of threads; and what happens
where they cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_cases import (
    exact_bank,
    exact_panel,
    exact_signs,
    random_experts,
    random_matrix,
    random_plane_experts,
    random_planes,
)
from torch import Tensor

from mobie.kernels import twins
from mobie.kernels.cpu import available_memory, choose_compute
from mobie.kernels.experts import experts_forward
from mobie.kernels.layout import BinaryBank, BinaryTensors, Panel, lay_out_experts, lay_out_linear, one_group
from mobie.paths import PACKAGE

TOLERANCE = 2e-6  # of the sum of magnitudes: float32 sums of up to 1000 numbers


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    """The operators, built where this machine has not yet."""
    try:
        from mobie.kernels import cpp_ops
    except ImportError as error:
        pytest.skip(f"the C++ operators cannot be built here: {error}")
    return cpp_ops


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_bank(experts: int, rows: int, columns: int, *, salient: int = 20, block_size: int = 128) -> BinaryBank:
    """Gate and up of a layer without basis: `(experts, 2, rows, columns)`."""
    packed = random_experts(experts, columns, rows, basis=None, most_salient=salient, block_size=block_size)
    return lay_out_experts(packed, "silu").gate_up


def assert_near(got: Tensor, expected: np.ndarray, magnitude: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """|got - expected| within `tolerance` of the sum of magnitudes of what was added up."""
    assert got.shape == expected.shape
    excess = np.abs(got.double().numpy() - expected) - tolerance * (magnitude + 1e-30)
    assert excess.max() <= 0, f"off by {excess.max():.3g} more than allowed"


def assert_twin(got: Tensor, expected: Tensor, activations: str, code: float) -> None:
    """Equal but for float32 rounding; with int8, a few entries may be off by one code where a quotient is a tie."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    difference, largest = (got - expected).abs(), expected.abs().max().item()
    near = difference <= 1e-5 * largest
    assert near.float().mean().item() >= (1 if activations == "16bit" else 0.95)
    assert difference.max().item() <= 1e-5 * largest + code


# rows: not a multiple of 16, one, more than 64 · columns: less than 4, no multiple of 4, 128 or 512, more than 512
SHAPES = [
    (1, 3, 0, 128),
    (17, 130, 20, 128),
    (33, 300, 300, 128),
    (70, 641, 90, 256),
    (64, 512, 31, 512),
    (5, 1100, 0, 128),
]


@pytest.mark.parametrize(("rows", "columns", "salient", "block_size"), SHAPES)
def test_grouped_product_equals_float64(
    ops: ModuleType, rows: int, columns: int, salient: int, block_size: int
) -> None:
    bank = make_bank(4, rows, columns, salient=salient, block_size=block_size)
    index = torch.tensor([[0, 2], [2, 3], [2, 0]])  # expert 1 has no token, 3 has one
    x = torch.randn(3, columns, generator=generator())
    out = ops.binary_grouped(bank, x, ops.group_pairs(index, 4, 4), pairs=6, pairs_per_row=2)
    dense, inputs = exact_bank(bank), x.double().numpy()
    for pair, expert in enumerate(index.flatten().tolist()):
        expected = dense[expert] @ inputs[pair // 2]
        assert_near(out[pair], expected, np.abs(dense[expert]) @ np.abs(inputs[pair // 2]))


@pytest.mark.parametrize("activations", ["16bit", "int8"])
@pytest.mark.parametrize("per_part", [False, True])
def test_grouped_product_equals_the_twin(ops: ModuleType, activations: str, per_part: bool) -> None:
    bank = make_bank(3, 37, 421, salient=50)
    index = torch.randint(3, (40, 2), generator=generator())  # more tokens of an expert than tables are kept for
    x = torch.randn(40, *([2] if per_part else []), 421, generator=generator()) * 3
    x[1] = 0  # a scale of zero
    groups = ops.group_pairs(index, 3, 64)
    out, expected = (
        o.binary_grouped(bank, x, groups, pairs=80, pairs_per_row=2, activations=activations) for o in (ops, twins)
    )
    one_code = x.abs().max() / 127 * bank.column_scale.max() * bank.row_scale.max() * 2  # a sign of one group
    assert_twin(out, expected, activations, one_code.item())


@pytest.mark.parametrize("most", range(5))
@pytest.mark.parametrize("rows, columns", [(1, 3), (17, 130), (70, 641)])
def test_sign_planes_equal_float64(ops: ModuleType, rows: int, columns: int, most: int) -> None:
    packed = random_planes(rows, torch.randint(most + 1, (columns,), generator=generator(most)), generator())
    x = torch.randn(5, columns, generator=generator())
    out = ops.binary_grouped(lay_out_linear(packed), x, one_group(5, 16, "cpu"), pairs=5, pairs_per_row=1)
    dense, inputs = packed.dequantize().double().numpy(), x.double().numpy()
    positive = replace(packed, row_scale=packed.row_scale.abs(), ratio=packed.ratio.abs())
    together = replace(positive, signs=torch.full_like(packed.signs, 255)).dequantize().double().numpy()
    assert_near(out[:, 0], inputs @ dense.T, np.abs(inputs) @ together.T)


@pytest.mark.parametrize("activations", ["16bit", "int8"])
def test_a_layer_of_sign_planes_is_what_the_twins_make_of_it(ops: ModuleType, activations: str) -> None:
    bank = lay_out_experts(random_plane_experts(4, 300, 40), "silu").gate_up
    x, index = torch.randn(6, 300, generator=generator()), torch.randint(4, (6, 2), generator=generator())
    groups = ops.group_pairs(index, 4, 16)
    out, expected = (
        o.binary_grouped(bank, x, groups, pairs=12, pairs_per_row=2, activations=activations) for o in (ops, twins)
    )
    one_code = x.abs().max() / 127 * bank.column_scale.abs().max() * bank.row_scale.abs().max() * 2
    assert_twin(out, expected, activations, one_code.item())


def test_int8_activations_are_rounded(ops: ModuleType) -> None:
    """Rounding changes the result by what int8 can: less than 1 %, more than float32 would."""
    bank, x = make_bank(1, 40, 384), torch.randn(2, 384, generator=generator())
    groups = one_group(2, 16, "cpu")
    exact, rounded = (
        ops.binary_grouped(bank, x, groups, pairs=2, pairs_per_row=1, activations=a) for a in ("16bit", "int8")
    )
    difference = ((exact - rounded).norm() / exact.norm()).item()
    assert 1e-4 < difference < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_rounded_once(ops: ModuleType, dtype: torch.dtype) -> None:
    """The product of 16-bit numbers is the float32 one, rounded at the end."""
    bank = make_bank(2, 20, 200)
    x = torch.randn(3, 200, generator=generator()).to(dtype)
    groups = ops.group_pairs(torch.tensor([[0], [1], [0]]), 2, 16)
    out, exact = (ops.binary_grouped(bank, v, groups, pairs=3, pairs_per_row=1) for v in (x, x.float()))
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("rows, columns, tokens", [(1, 1, 1), (16, 64, 1), (35, 100, 6), (130, 67, 9), (64, 256, 4)])
@pytest.mark.parametrize("activations", ["16bit", "int8"])
def test_panel_equals_float64_and_the_twin(
    ops: ModuleType, rows: int, columns: int, tokens: int, activations: str
) -> None:
    codes = torch.randint(-127, 128, (2, rows, columns), dtype=torch.int8, generator=generator())
    panel = Panel(codes, torch.rand(2, rows, generator=generator()).half() + 0.1)
    x = torch.randn(tokens, 2, columns, generator=generator())
    out = ops.panel(panel, x, activations=activations)
    twin = twins.panel(panel, x, activations=activations)
    assert_twin(out, twin, activations, (x.abs().max() * panel.scale.max() * 1.01).item())
    if activations == "16bit":
        dense, inputs = exact_panel(panel), x.double().numpy()
        magnitude = np.einsum("prj,npj->npr", np.abs(dense), np.abs(inputs))
        assert_near(out, np.einsum("prj,npj->npr", dense, inputs), magnitude)


def test_panel_that_parts_share(ops: ModuleType) -> None:
    """Gate and up may share one matrix: an expanded view, whose parts lie at the same place."""
    codes = torch.randint(-127, 128, (1, 20, 48), dtype=torch.int8, generator=generator())
    scale = torch.rand(1, 20, generator=generator()).half()
    x = torch.randn(3, 2, 48, generator=generator())
    shared = ops.panel(Panel(codes.expand(2, -1, -1), scale.expand(2, -1)), x)
    own = ops.panel(Panel(codes.repeat(2, 1, 1), scale.repeat(2, 1)), x)
    assert torch.equal(shared, own)


def test_panel_epilogue(ops: ModuleType) -> None:
    panel = Panel(
        torch.randint(-9, 9, (2, 12, 40), dtype=torch.int8, generator=generator()),
        torch.rand(2, 12, generator=generator()).half(),
    )
    x = torch.randn(8, 2, 40, generator=generator())
    options = {
        "reduce": 2,
        "epilogue": "swiglu",
        "pair_weights": torch.rand(4, generator=generator()),
        "residual": torch.randn(4, 12, generator=generator()),
        "bias": torch.randn(24, generator=generator()),
    }
    torch.testing.assert_close(ops.panel(panel, x, **options), twins.panel(panel, x, **options), rtol=1e-4, atol=1e-4)


def test_sixteen_bit_panel_goes_to_the_twin(ops: ModuleType) -> None:
    panel = Panel(torch.randn(1, 5, 8, generator=generator()).half())
    x = torch.randn(2, 1, 8, generator=generator())
    assert torch.equal(ops.panel(panel, x, activations="int8"), twins.panel(panel, x))


FORMATS = {
    "one group": {},
    "two groups": {"groups": 2},
    "two groups, means": {"groups": 2, "mean": True},
    "two groups, means, no column scales": {"groups": 2, "mean": True, "column_scale": False},
    "means": {"mean": True},
    "two orders": {"order": 2, "extra_order": 2, "groups": 2},
    "replaced": {"residual": False, "extra_order": 2, "groups": 2, "mean": True},
    "factor": {"column_factor": True, "mean": True, "column_scale": False},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "salient", "block_size"), [(37, 203, 23, 50), (70, 640, 0, 128), (9, 33, 33, 33)]
)
def test_linear_of_any_format_equals_float64(
    ops: ModuleType, name: str, rows: int, columns: int, salient: int, block_size: int
) -> None:
    matrix = random_matrix(rows, columns, salient, generator(1), block_size=block_size, **FORMATS[name])
    layout = binary_tensors(matrix)
    x = torch.randn(3, columns, generator=generator())
    bias = torch.randn(rows, generator=generator())
    dense = matrix.dequantize().double().numpy()
    inputs = x.double().numpy()
    # group sums are differences of sums over all columns, whose magnitude is that of every scale there is
    magnitude = (np.abs(dense).max(initial=0) + 3) * np.abs(inputs).sum(1, keepdims=True)
    expected = inputs @ dense.T + bias.double().numpy()
    assert_near(ops.binary_linear(layout, x, bias), expected, np.broadcast_to(magnitude, expected.shape))
    out = ops.binary_linear(layout, x.half())
    assert out.dtype == torch.float16


def binary_tensors(matrix: object) -> BinaryTensors:
    """The layout of any binary matrix, even where it would fit a bank."""
    from mobie.kernels.layout import _binary_tensors

    layout = lay_out_linear(matrix)
    return layout if isinstance(layout, BinaryTensors) else _binary_tensors(matrix)


def test_hand_computed_product(ops: ModuleType) -> None:
    """Two rows, five columns: signs ++-+- and ----+, row scales 2 and 1, column scales 1 1 1 1 0.5, x = 1 2 3 4 8."""
    bits = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    bits[0, 0, 0, 0], bits[0, 0, 1, 0] = 0b01011, 0b10000
    column_scale = torch.zeros(1, 1, 128).half()
    column_scale[0, 0, :5] = torch.tensor([1, 1, 1, 1, 0.5])
    none = torch.zeros(1, 1, 0)
    bank = BinaryBank(
        bits,
        torch.tensor([2.0, 1.0]).half().view(1, 1, 2, 1),
        column_scale,
        torch.zeros(1, 1, 2, 0, dtype=torch.uint8),
        none.int(),
        torch.ones(1, 1, 2, 1).half(),
        none.half(),
        columns=5,
        block_size=128,
    )
    assert exact_signs(bits[0, 0, 0])[:5].tolist() == [1, 1, -1, 1, -1]
    x = torch.tensor([[1.0, 2, 3, 4, 8]])
    out = ops.binary_grouped(bank, x, one_group(1, 16, "cpu"), pairs=1, pairs_per_row=1)
    assert out.tolist() == [[[2.0 * (1 + 2 - 3 + 4 - 4), 1.0 * (-1 - 2 - 3 - 4 + 4)]]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_layer_is_what_the_twins_make_of_it(ops: ModuleType, side: str, tokens: int) -> None:
    layout = lay_out_experts(random_experts(5, 96, 40, side=side), "silu")
    hidden = torch.randn(tokens, 96, generator=generator())
    weights, index = torch.randn(tokens, 5, generator=generator()).softmax(-1).topk(2)
    out, expected = (experts_forward(layout, hidden, index, weights, o) for o in (ops, twins))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_results_do_not_depend_on_threads(ops: ModuleType, threads: None) -> None:
    bank, matrix = make_bank(3, 200, 300), random_matrix(200, 300, 20, generator(), groups=2, mean=True)
    panel = Panel(
        torch.randint(-127, 128, (2, 200, 300), dtype=torch.int8, generator=generator()), torch.ones(2, 200).half()
    )
    x = torch.randn(6, 300, generator=generator())
    groups = ops.group_pairs(torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1], [0, 1], [1, 0]]), 3, 4)
    outputs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        outputs.append(
            (
                ops.binary_grouped(bank, x, groups, pairs=12, pairs_per_row=2, activations="int8"),
                ops.binary_linear(binary_tensors(matrix), x),
                ops.panel(panel, x[:, None].expand(-1, 2, -1)),
            )
        )
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_a_token_does_not_depend_on_its_batch(ops: ModuleType) -> None:
    bank, x = make_bank(1, 50, 260), torch.randn(20, 260, generator=generator())
    panel = Panel(
        torch.randint(-127, 128, (1, 50, 260), dtype=torch.int8, generator=generator()), torch.ones(1, 50).half()
    )
    together = ops.binary_grouped(bank, x, one_group(20, 64, "cpu"), pairs=20, pairs_per_row=1)
    product = ops.panel(panel, x[:, None])
    for token in (0, 7, 19):
        own = x[token : token + 1]
        assert torch.equal(
            together[token], ops.binary_grouped(bank, own, one_group(1, 16, "cpu"), pairs=1, pairs_per_row=1)[0]
        )
        assert torch.equal(product[token], ops.panel(panel, own[:, None])[0])


def test_dense_experts(ops: ModuleType) -> None:
    weight = torch.randn(3, 10, 24, generator=generator())
    x = torch.randn(4, 24, generator=generator())
    groups = ops.group_pairs(torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0]]), 3, 16)
    out, expected = (o.dense_grouped(weight, x, groups, pairs=8, pairs_per_row=2) for o in (ops, twins))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_operators_trace(ops: ModuleType) -> None:
    """The shapes that the operators announce are those they return, and a graph can hold them."""
    bank, x = make_bank(2, 20, 130), torch.randn(2, 130, generator=generator())
    groups = one_group(2, 16, "cpu")
    matrix = binary_tensors(random_matrix(20, 130, 8, generator(), groups=2))
    panel = Panel(torch.randint(-9, 9, (2, 7, 130), dtype=torch.int8, generator=generator()), torch.ones(2, 7).half())
    operators = torch.ops.mobie_cpu
    cases = {
        operators.binary_grouped.default: (
            *(getattr(bank, n) for n in ("signs", "row_scale", "column_scale", "extra_signs", "extra_columns")),
            *(
                bank.extra_row_scale,
                bank.extra_column_scale,
                128,
                x,
                groups.tile_expert,
                groups.tile_pairs,
                2,
                1,
                False,
            ),
        ),
        operators.binary_linear.default: (
            *([getattr(s, n) for s in (matrix.plain, matrix.extra)] for n in ("signs", "row_scale", "mean")),
            *([getattr(s, n) for s in (matrix.plain, matrix.extra)] for n in ("column_scale", "bitmap")),
            *([matrix.plain_columns, matrix.extra_columns], 128, x),
        ),
        operators.panel_product.default: (panel.codes, panel.scale, x[:, None].expand(-1, 2, -1).contiguous(), False),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


USE = """
import torch
from mobie.kernels.backend import name_of, operations
for dtype in (torch.float32, torch.float32, torch.bfloat16):
    print(name_of(operations("cpu", dtype)))
"""


def test_without_a_compiler_torch_computes_and_says_so_once(tmp_path: Path) -> None:
    outcome = python(USE, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert outcome.stdout.split() == ["torch"] * 3, outcome.stderr
    assert outcome.stderr.count("no C++ compiler") == 1 and "install a C++ compiler" in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_a_failed_build_is_reported_in_one_line(tmp_path: Path) -> None:
    """A compiler that answers --version and nothing else."""
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "c++ (GCC) 12" && exit\necho "fatal error: no space" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    outcome = python(USE, CXX=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert outcome.stdout.split() == ["torch"] * 3, outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if "not used" in line]
    assert len(lines) == 1 and "fatal error: no space" in lines[0]
    assert not list((tmp_path / "cache").rglob("*.so")) and list((tmp_path / "cache").rglob("build.log"))


def test_a_machine_builds_once(ops: ModuleType) -> None:
    """The next process finds the library, without a build."""
    code = "import torch.utils.cpp_extension as c; c.load = None; import mobie.kernels.cpp_ops"
    outcome = python(code)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("dense", "available", "expected"),
    [(79, 100, "cached"), (80, 100, "cached"), (81, 100, "kernels"), (10**15, 10**9, "kernels")],
)
def test_dense_copies_are_kept_where_they_fit(dense: int, available: int, expected: str) -> None:
    assert choose_compute(dense, available) == expected


def test_available_memory_is_what_the_system_says() -> None:
    memory = available_memory()
    if memory is None:
        pytest.skip("this system does not say how much memory is available")
    assert 0 < memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert choose_compute(1) == "cached" and choose_compute(memory) == "kernels"
