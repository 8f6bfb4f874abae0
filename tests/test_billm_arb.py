"""BiLLM and ARB-LLM as a whole against plain loops: blocks, error feedback, saliency, options and configurations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from binary_references import (
    METHODS,
    Array,
    both_sides,
    correlated,
    error,
    example,
    normal,
    output_error,
    reference_fit,
    reference_row_column,
    reference_split,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobie.config import load_method
from mobie.errors import ConfigError, DataError
from mobie.methods.arb import ARB
from mobie.methods.base import LinearStats
from mobie.methods.billm import BiLLM
from mobie.methods.binary_common import BinaryMethod
from mobie.methods.binary_fit import Fit
from mobie.methods.split_search import Split


def reference_quantize(weight: Array, hessian: Array, method: BinaryMethod, guided: Array | None = None) -> Array:
    """The skeleton with explicit inverses, in float64, scales not rounded."""

    def upper_factor(h: Array) -> tuple[Array, Array]:
        h, dead = h.copy(), np.diag(h) == 0
        h[dead, dead] = 1
        h += method.percdamp * np.diag(h).mean() * np.eye(len(h))
        return np.linalg.cholesky(np.linalg.inv(h)).T, dead

    def denominator(factor: Array) -> Array:
        return np.diag(factor.T @ factor) if method.saliency_rule == "inverse_diagonal" else np.diag(factor)

    factor, dead = upper_factor(hessian)
    left = np.where(dead, 0, weight)
    out, columns = weight.shape
    if guided is None:
        d = np.broadcast_to(denominator(factor), weight.shape)
    else:
        runs = np.array_split(np.arange(out), len(guided))
        per_run = [denominator(upper_factor(h)[0]) for h in guided]
        d = np.concatenate([np.tile(row, (len(run), 1)) for row, run in zip(per_run, runs, strict=True)])
    bitmap = isinstance(method, ARB) and method.column_group_bitmap
    dense = np.zeros_like(weight)
    for start in range(0, columns, method.block_size):
        stop = min(start + method.block_size, columns)
        block, saliency = left[:, start:stop].copy(), (left[:, start:stop] / d[:, start:stop]) ** 2
        values = saliency if method.search_on == "saliency" else block
        salient, second = reference_split(values, saliency, bitmap, method.max_salient)
        for part, order in ((~salient, 1), (salient, 2)):
            own = block[:, part]
            one = order == 2 and not bitmap
            groups = [np.ones(own.shape, dtype=bool)] if one else both_sides(second[:, part])
            if isinstance(method, BiLLM):
                dense[:, start:stop][:, part] = reference_fit(own, groups, order)
            else:
                dense[:, start:stop][:, part] = reference_row_column(own, groups, order, method.iterations)
        lost = block - dense[:, start:stop]
        square, behind = factor[start:stop, start:stop], factor[start:stop, stop:]
        if method.feedback == "diagonal":
            left[:, stop:] -= lost / np.diag(square) @ behind
        elif method.feedback == "triangular":
            left[:, stop:] -= lost @ np.linalg.inv(square) @ behind
    return dense


SETTINGS = [
    {},
    {"saliency_rule": "inverse_diagonal"},
    {"saliency_source": "guided"},
    {"search_on": "weights"},
    {"feedback": "triangular"},
    {"feedback": "none"},
    {"max_salient": 2, "percdamp": 0.1},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values())) or "default")
@pytest.mark.parametrize("cls", [BiLLM, ARB])
def test_method_equals_loops(cls: type[BinaryMethod], setting: dict[str, object]) -> None:
    method = cls(block_size=16, **setting)
    weight, stats = example()
    guided = stats.guided.double().numpy() if method.needs_gradients else None
    expected = reference_quantize(weight.double().numpy(), stats.hessian.double().numpy(), method, guided)
    packed = method.quantize_linear(weight, stats)
    # scales are stored with 11 bits, the weights are of size one; rounding may carry one of 480 weights over a border
    differences = np.abs(packed.dequantize().numpy() - expected)
    assert (differences > 4e-3).sum() <= 1


def test_feedback_hands_on_the_error_of_what_is_stored() -> None:
    """The second block, as the method sees it, follows from the first as it is dequantized, float16 scales and all."""
    seen = []

    class Spy(BiLLM):
        def fit_block(self, weights: Tensor, split: Split, gram: Tensor) -> tuple[Fit, Fit]:
            seen.append(weights.double().clone())
            return super().fit_block(weights, split, gram)

    weight, stats = example()
    dense = Spy(block_size=24).quantize_linear(weight, stats).dequantize().double()
    hessian = stats.hessian.double().clone()
    hessian[5, 5] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    expected = weight[:, 24:] - (seen[0] - dense[:, :24]) / factor.diagonal()[:24] @ factor[:24, 24:]
    torch.testing.assert_close(seen[1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [BiLLM, ARB])
@pytest.mark.parametrize("feedback", ["diagonal", "triangular"])
def test_identity_hessian_feeds_nothing_back(cls: type[BinaryMethod], feedback: str) -> None:
    weight, stats = normal(7, 40).float(), replace(example(columns=40)[1], hessian=torch.eye(40))
    with_feedback = cls(block_size=16, feedback=feedback).quantize_linear(weight, stats).dequantize()
    assert torch.equal(with_feedback, cls(block_size=16, feedback="none").quantize_linear(weight, stats).dequantize())


@pytest.mark.parametrize("cls", [BiLLM, ARB])
def test_feedback_lowers_the_output_error_on_correlated_inputs(cls: type[BinaryMethod]) -> None:
    errors = {
        feedback: np.mean(
            [
                output_error(cls(block_size=16, feedback=feedback), normal(24, 64, seed=s), correlated(600, 64, s))
                for s in range(3)
            ]
        )
        for feedback in ("none", "diagonal", "triangular")
    }
    assert errors["diagonal"] < 0.97 * errors["none"]
    assert errors["triangular"] < errors["diagonal"]


def test_arb_error_is_at_most_billms_on_the_same_split() -> None:
    for seed in range(4):
        weights, gram = normal(12, 32, seed=seed), torch.eye(32)
        split = BiLLM().split_block(weights, weights.square())
        plain, extra = BiLLM().fit_block(weights, split, gram)
        refined = ARB(refinement="arb", column_group_bitmap=False).fit_block(weights, split, gram)
        assert error(refined[0], weights[:, ~split.salient]) <= error(plain, weights[:, ~split.salient])
        assert error(refined[1], weights[:, split.salient]) <= error(extra, weights[:, split.salient])


def test_guided_saliency_uses_each_groups_own_hessian() -> None:
    """Columns that matter to the loss become salient; equal Hessians give what the local one gives."""
    weight, stats = example(out=8, columns=32)
    same = replace(stats, guided=stats.hessian.expand(3, -1, -1))
    local = BiLLM().quantize_linear(weight, stats)
    assert torch.equal(BiLLM(saliency_source="guided").quantize_linear(weight, same).dequantize(), local.dequantize())
    loud = torch.ones(32)
    loud[[3, 19]] = 1e4
    method = BiLLM(saliency_source="guided", max_salient=2)
    chosen = method.quantize_linear(weight, replace(stats, guided=torch.diag(loud).expand(2, -1, -1)))
    assert chosen.salient.tolist() == [3, 19]


def test_guided_saliency_without_gradients_is_refused() -> None:
    weight, stats = example()
    method = BiLLM(saliency_source="guided")
    assert method.needs_gradients and method.gradient_groups == 4
    assert not BiLLM().needs_gradients
    with pytest.raises(DataError, match="guided"):
        method.quantize_linear(weight, replace(stats, guided=None))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "refinement", "billm") + str(m.splits_salient))
def test_same_bytes_again_and_inputs_untouched(method: BinaryMethod) -> None:
    weight, stats = example(out=6, columns=150)
    before = (weight.clone(), stats.hessian.clone())
    first, second = (method.quantize_linear(weight, stats) for _ in range(2))
    assert torch.equal(weight, before[0]) and torch.equal(stats.hessian, before[1])
    assert first.header() == second.header()
    for name, tensor in first.tensors().items():
        assert tensor.numpy().tobytes() == second.tensors()[name].numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    out=st.integers(1, 9),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([1, 7, 16, 128]),
    kind=st.sampled_from(["normal", "zero", "constant", "zero row", "one value", "tiny", "huge"]),
    tokens=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_values(
    method: BinaryMethod, out: int, columns: int, block_size: int, kind: str, tokens: int, seed: int
) -> None:
    weight = normal(out, columns, seed=seed).float()
    weight = {
        "normal": weight,
        "zero": torch.zeros_like(weight),
        "constant": torch.full_like(weight, 0.25),
        "zero row": weight * (torch.arange(out) > 0)[:, None],
        "one value": weight * (torch.arange(columns) == columns // 2),
        "tiny": weight * 1e-12,
        "huge": weight * 1e6,
    }[kind]
    inputs = normal(max(tokens, 1), columns, seed=seed + 1) * (tokens > 0)
    packed = replace(method, block_size=block_size).quantize_linear(weight, LinearStats.from_inputs(inputs))
    dense = packed.dequantize()
    assert dense.shape == (out, columns)
    assert dense.isfinite().all()
    assert 1 < packed.paper_bits() <= 2
    per_block = torch.bincount(packed.salient.long() // block_size, minlength=-(-columns // block_size))
    assert per_block.min() >= 1 and per_block.max() <= 49
    rebuilt = type(packed).from_tensors(packed.header(), packed.tensors())
    assert torch.equal(rebuilt.dequantize(), dense)
    if kind == "zero" or tokens == 0:
        assert not dense.any()
    if kind == "constant" and tokens > 0:
        # exact where no error was fed back; a dead column never occurs with these inputs
        first = dense[:, :block_size]
        torch.testing.assert_close(first, weight[:, :block_size], rtol=1e-3, atol=0)


# --- configurations


def test_configs_name_these_methods() -> None:
    names = [f"{kind}{suffix}" for kind in ("arb", "arb-x", "arb-rc") for suffix in ("", "-cgb")]
    for name in names:
        method = load_method(name).build()
        assert isinstance(method, ARB)
        assert method.refinement == name.removesuffix("-cgb")
        assert method.column_group_bitmap == name.endswith("-cgb")
    assert load_method("arb-llm").build() == load_method("arb-rc-cgb").build() == ARB()
    assert load_method("billm").build() == BiLLM()
    assert [load_method(n).paper is not None for n in ("arb-llm", "billm", *names)] == [True, True] + [False] * 6


@pytest.mark.parametrize("backbone", ["billm", "arb-llm"])
def test_plug_in_configs_change_nothing_else(backbone: str) -> None:
    """Section B.4.7: "without altering any other quantization settings"."""
    plain, glas, both = (load_method(backbone + suffix) for suffix in ("", "-glas", "-glas-nges"))
    assert glas.build() == replace(plain.build(), saliency_source="guided")
    assert both.build() == replace(plain.build(), saliency_source="guided", nges=True)
    assert [glas.label, both.label] == [f"{plain.label} + GLAS", f"{plain.label} + GLAS + NGES"]
    assert glas.paper is None and both.paper is None


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((BiLLM, {option: 0}) for option in ("block_size", "max_salient", "nges_iterations", "regularization")),
        *((ARB, {option: -1}) for option in ("percdamp", "iterations", "null_space_energy")),
    ],
)
def test_impossible_options_are_refused(cls: type[BinaryMethod], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        cls(**options)
