"""Cross-Expert Joint Decomposition against LAPACK's SVD of the wide matrix in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobie.methods.mobie.cejd import choose_side, joint_svd

SHAPES = [(5, 12, 20), (3, 20, 12), (1, 9, 7), (1, 7, 9), (2, 30, 5)]  # the last has fewer columns than rows, 10 < 30


def random_bank(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(bank: Tensor, side: str) -> Tensor:
    """Experts side by side for left, stacked for right, float64."""
    return torch.cat(list(bank.double()), dim=1 if side == "left" else 0)


def rebuilt(basis: Tensor, factors: Tensor, side: str) -> Tensor:
    return basis @ factors if side == "left" else factors @ basis


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_identity(shape: tuple[int, int, int], side: str) -> None:
    bank = random_bank(shape)
    basis, factors = joint_svd(bank, side)
    experts, out, width = shape
    rank = min(out, experts * width) if side == "left" else min(width, experts * out)
    assert basis.shape == ((out, rank) if side == "left" else (rank, width))
    assert factors.shape == ((experts, rank, width) if side == "left" else (experts, out, rank))
    assert basis.dtype == factors.dtype == torch.float32
    torch.testing.assert_close(rebuilt(basis, factors, side), bank, rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_svd_of_the_wide_matrix(shape: tuple[int, int, int], side: str) -> None:
    bank = random_bank(shape, seed=1)
    basis, factors = joint_svd(bank, side)
    u, sigma, vt = torch.linalg.svd(laid_out(bank, side), full_matrices=False)
    singular = basis.double() if side == "left" else basis.double().T
    ours = torch.cat(list(factors.double()), dim=1 if side == "left" else 0)
    ours = ours if side == "left" else ours.T  # orthonormal rows
    reference, other = (u, vt) if side == "left" else (vt.T, u.T)
    torch.testing.assert_close(singular.norm(dim=0), sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours @ ours.T, torch.eye(len(sigma), dtype=torch.float64), rtol=0, atol=2e-6)
    # the same directions up to sign, in the same order
    torch.testing.assert_close((singular * reference).sum(0).abs(), sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close((ours * other).sum(1).abs(), torch.ones_like(sigma), rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_truncation_is_the_best_approximation(side: str, rank: int) -> None:
    bank = random_bank((3, 12, 15), seed=2)
    basis, factors = joint_svd(bank, side, rank)
    assert (basis.shape[1] if side == "left" else basis.shape[0]) == rank
    lost = torch.linalg.svdvals(laid_out(bank, side))[rank:].square().sum()  # Eckart and Young
    error = (bank.double() - rebuilt(basis, factors, side).double()).square().sum()
    torch.testing.assert_close(error, lost, rtol=1e-5, atol=0)


def test_rank_beyond_full_is_full() -> None:
    bank = random_bank((2, 6, 8))
    for ours, full in zip(joint_svd(bank, "left", 100), joint_svd(bank, "left"), strict=True):
        assert torch.equal(ours, full)


@pytest.mark.parametrize("side", ["left", "right"])
def test_directions_without_energy_are_zero(side: str) -> None:
    """Experts that span 3 of 10 directions: 7 zero factors instead of noise divided by noise."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    bank = shared @ torch.randn(4, 3, 10, generator=generator, dtype=torch.float64)
    bank = bank if side == "left" else bank.mT
    basis, factors = joint_svd(bank, side)
    rows = factors if side == "left" else factors.mT
    energy = rows.square().sum((0, 2))
    torch.testing.assert_close(energy[:3], torch.ones(3), rtol=1e-5, atol=0)
    assert not energy[3:].any()
    assert not (basis if side == "left" else basis.T)[:, 3:].any()
    torch.testing.assert_close(rebuilt(basis, factors, side).double(), bank, rtol=0, atol=1e-5)


def test_bank_of_zeros() -> None:
    basis, factors = joint_svd(torch.zeros(2, 4, 6), "left")
    assert not basis.any() and not factors.any()


def test_weak_directions_are_kept_accurately() -> None:
    """The Gram matrix squares the condition number; float64 keeps directions a millionth as strong as the first."""
    generator = torch.Generator().manual_seed(4)
    u = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(24, 6, generator=generator, dtype=torch.float64)).Q
    sigma = torch.tensor([10.0, 1.0, 1e-2, 1e-3, 1e-4, 2e-5], dtype=torch.float64)
    bank = torch.stack(((u * sigma) @ v.T).split(8, dim=1))
    basis, factors = joint_svd(bank, "left")
    rows = torch.cat(list(factors.double()), dim=1)
    torch.testing.assert_close(basis.double().norm(dim=0), sigma, rtol=1e-3, atol=0)
    torch.testing.assert_close((rows @ v).diagonal().abs(), torch.ones(6, dtype=torch.float64), rtol=1e-3, atol=0)


def test_heaviest_entry_of_a_direction_is_positive() -> None:
    basis, _ = joint_svd(random_bank((2, 8, 5), seed=5), "left")
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_experts_share_one_basis_and_keep_their_order() -> None:
    bank = random_bank((4, 6, 9), seed=6)
    basis, factors = joint_svd(bank, "left")
    reordered, permuted = joint_svd(bank[[2, 0, 3, 1]], "left")
    torch.testing.assert_close(basis, reordered, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors[[2, 0, 3, 1]], permuted, rtol=1e-5, atol=1e-6)


def test_side_with_fewer_bytes() -> None:
    assert choose_side("fewest_bytes", 1024, 2048) == "left"
    assert choose_side("fewest_bytes", 2048, 1024) == "right"
    assert choose_side("fewest_bytes", 8, 8) == "left"
    assert [choose_side(side, 1, 2) for side in ("left", "right")] == ["left", "right"]
