"""NGES plugged into BiLLM and ARB-LLM: its factors against loops, and where they are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from binary_references import METHODS, Array, correlated, example
from safetensors.torch import load_file, save_file

from mobie.methods.arb import ARB
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.methods.billm import BiLLM
from mobie.methods.binary_common import BinaryMethod
from mobie.methods.binary_fit import Binarization, Fit
from mobie.packing.binary import BinaryMatrix


def bank_example(out: int = 10, columns: int = 40, experts: int = 2) -> tuple[ExpertBank, BankStats]:
    """Experts with inputs of their own, one of them with a column that is never used; pooled inputs of a third kind."""
    weights, stats = zip(*(example(out, columns, seed) for seed in range(experts)), strict=True)
    strengths = torch.logspace(0, -2, columns, dtype=torch.float64)
    pooled = LinearStats.from_inputs(correlated(300, columns, seed=77) * strengths)
    return ExpertBank({"up": torch.stack(weights)}, (("up",),)), BankStats({"up": list(stats)}, {"up": pooled})


def experts_of(method: BinaryMethod, bank: ExpertBank, stats: BankStats) -> list[BinaryMatrix]:
    return list(method.quantize_experts(bank, stats)["up"].experts)


def reference_projector(gram: Array, energy: float) -> Array:
    """Eigenvectors behind the first index, from the second on, where the tail is at most `energy` of what is before."""
    vectors, values, _ = np.linalg.svd(gram)
    for start in range(1, len(values)):
        if values[start:].sum() <= energy * values[1:start].sum():
            return vectors[:, start:] @ vectors[:, start:].T
    return np.zeros_like(gram)


def reference_factors(weight: Array, binary: Array, projector: Array, ridge: float, passes: int) -> tuple[Array, Array]:
    """Eqs. 49 and 50, one factor after the other."""
    target = weight - (weight - binary) @ projector
    row, column = np.ones(len(weight)), np.ones(weight.shape[1])
    for _ in range(passes):
        for i in range(len(row)):
            basis = binary[i] * column
            row[i] = (basis @ target[i] + ridge) / (basis @ basis + ridge)
        for j in range(len(column)):
            basis = binary[:, j] * row
            column[j] = (basis @ target[:, j] + ridge) / (basis @ basis + ridge)
    return row, column


PLUGGED = [BiLLM(nges=True), *(ARB(refinement=r, nges=True) for r in ("arb", "arb-x", "arb-rc"))]


BLOCKS = [16, 128]


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
@pytest.mark.parametrize("block_size", BLOCKS)
def test_nges_multiplies_rows_and_columns_by_the_factors_of_loops(method: BinaryMethod, block_size: int) -> None:
    bank, stats = bank_example()
    method = replace(method, block_size=block_size, tolerance=0.0)
    before = experts_of(replace(method, nges=False), bank, stats)
    projector = reference_projector(stats.pooled["up"].hessian.double().numpy(), 0.1)
    assert 0.1 < np.trace(projector) / len(projector) < 0.9
    moved = 0.0
    for e, packed in enumerate(experts_of(method, bank, stats)):
        weight, binary = bank.projections["up"][e].double().numpy(), before[e].dequantize().double().numpy()
        weight = np.where(stats.experts["up"][e].hessian.diagonal() == 0, 0, weight)
        row, column = reference_factors(weight, binary, projector, 0.2, 15)
        moved = max(moved, abs(row - 1).max(), abs(column - 1).max())
        # three numbers of 11 bits are multiplied, before and after
        np.testing.assert_allclose(packed.dequantize().numpy(), row[:, None] * binary * column, rtol=4e-3, atol=2e-3)
    assert moved > 0.05


def test_factors_multiply_means_too_by_hand() -> None:
    """mu = 1, alpha = 2 on columns 0 and 2: 3 and -1; column 1: 4 + 1 + 0.5. β_r = 2, β_c = (0.5, 10, 3)."""
    rest = Fit(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[1.0]]))
    salient = Fit(torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[1.0]], [[0.5]]]), torch.tensor([[4.0]]))
    binarization = Binarization(torch.tensor([False, True, False]), (rest,), (salient,))
    assert binarization.dense().tolist() == [[3.0, 5.5, -1.0]]
    packed = binarization.pack(128, (torch.tensor([2.0]), torch.tensor([0.5, 10.0, 3.0])))
    assert packed.dequantize().tolist() == [[3.0, 110.0, -6.0]]
    assert packed.column_factor.tolist() == [0.5, 10.0, 3.0]


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
def test_with_all_of_space_for_the_error_factors_stay_one(method: BinaryMethod) -> None:
    bank, stats = bank_example()
    weight, own = bank.projections["up"][0], stats.experts["up"][0]
    packed = method._suppress_shift({"up": weight[None]}, [{"up": own}], torch.eye(40))[0]["up"]
    plain = method.quantize_linear(weight, own).dequantize()
    torch.testing.assert_close(packed.dequantize(), plain, rtol=1e-3, atol=1e-6)
    if packed.column_factor is not None:
        assert packed.column_factor.eq(1).all()


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
def test_what_is_stored_lowers_the_error_outside_the_null_space(method: BinaryMethod) -> None:
    """Eq. 12 with its ridge falls from pass to pass, so its first part ends below where it began."""
    bank, stats = bank_example(out=24)
    weight, own = bank.projections["up"][1], stats.experts["up"][1]
    weight = weight.masked_fill(own.hessian.diagonal() == 0, 0).double()
    projector = torch.from_numpy(reference_projector(stats.pooled["up"].hessian.double().numpy(), 0.1))
    binary = method.quantize_linear(weight.float(), own).dequantize().double()
    target = weight - (weight - binary) @ projector

    def first_part(passes: int) -> float:
        chosen = replace(method, nges_iterations=passes, tolerance=0.0)
        packed = experts_of(chosen, bank, stats)[1]
        return (target - packed.dequantize().double()).square().sum().item()

    errors = [(target - binary).square().sum().item(), first_part(1), first_part(15)]
    assert errors[1] < 0.999 * errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-3)


def test_the_ridge_holds_the_factors_at_one() -> None:
    bank, stats = bank_example()
    free, held = (experts_of(BiLLM(nges=True, regularization=r), bank, stats)[0] for r in (0.2, 1e6))
    assert (held.column_factor - 1).abs().max() < 1e-3 < 0.02 < (free.column_factor - 1).abs().max()


@pytest.mark.parametrize("method", PLUGGED, ids=lambda m: getattr(m, "refinement", "billm"))
def test_factors_are_stored_and_counted(method: BinaryMethod, tmp_path: Path) -> None:
    bank, stats = bank_example()
    before = method_bytes(replace(method, nges=False), bank, stats)
    after = method_bytes(method, bank, stats)
    own_scales = getattr(method, "refinement", "") == "arb-rc"
    assert after - before == (0 if own_scales else 2 * 2 * 40)  # two experts, 16 bits a column
    for packed in experts_of(method, bank, stats):
        save_file(packed.tensors(), tmp_path / "m.safetensors")
        again = BinaryMatrix.from_tensors(packed.header(), load_file(tmp_path / "m.safetensors"))
        assert torch.equal(again.dequantize(), packed.dequantize())


def method_bytes(method: BinaryMethod, bank: ExpertBank, stats: BankStats) -> int:
    """Bytes of the bank's ledger, which must be those of its tensors."""
    packed = method.quantize_experts(bank, stats)["up"]
    counted = sum(item.bytes for item in packed.ledger(0.5).items)
    assert counted == sum(tensor.nbytes for tensor in packed.tensors().values())
    return counted


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "refinement", "billm") + str(m.splits_salient))
def test_without_nges_and_outside_experts_nothing_changes(method: BinaryMethod) -> None:
    """Experts are then a loop over Linears, and Linears that are no experts are never modulated, as in MoBiE."""
    bank, stats = bank_example()
    for weight, own, packed in zip(
        bank.projections["up"], stats.experts["up"], experts_of(method, bank, stats), strict=True
    ):
        for linear in (method, replace(method, nges=True)):
            expected = linear.quantize_linear(weight, own).tensors()
            assert packed.tensors().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in packed.tensors().items())
        assert "column_factor" not in packed.tensors()


def test_a_column_factor_that_does_not_fit_is_refused() -> None:
    bank, stats = bank_example()
    matrix = experts_of(BiLLM(), bank, stats)[0]
    parts = (matrix.size, matrix.block_size, matrix.salient, matrix.plain, matrix.extra, False)
    with pytest.raises(ValueError, match="column_factor"):
        BinaryMatrix.build(*parts, torch.ones(39))
    with pytest.raises(ValueError, match="finite"):
        BinaryMatrix.build(*parts, torch.full((40,), torch.nan))
