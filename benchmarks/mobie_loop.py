"""MoBiE as plain loops: one expert, one row, one column, one candidate at a time. The reference for speed and result.

Written from the paper (sections 4.1 to 4.3, B.3.3, Algorithms 3 and 4) with the defaults of the method's options, not
from `mobie.methods.mobie`, of which it uses nothing. Weights `(out, in)` float32; Hessians are inverted in float64.

    [W1, W2, …] = U S [V1, V2, …]     V ≈ diag(r1) B1 diag(c1) + diag(r2) B2 diag(c2) on salient columns
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PERCDAMP, SHARE, BLOCK, RIDGE, ENERGY, ITERATIONS, TOLERANCE, EPSILON = 0.01, 0.05, 128, 0.2, 0.1, 15, 1e-5, 1e-8


def joint_basis(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`U S` and `S⁻¹ Uᵀ` of the weights side by side (eq. 4), float64, from the eigenvectors of their Gram matrix."""
    gram = torch.zeros(len(weights[0]), len(weights[0]), dtype=torch.float64)
    for weight in weights:
        gram += weight.double() @ weight.double().T
    squared, vectors = torch.linalg.eigh(gram)
    squared, vectors = squared.flip(0), vectors.flip(1)
    return vectors * squared.sqrt(), (vectors / squared.sqrt()).T


def eight_bits(basis: Tensor) -> Tensor:
    """The basis rounded to 255 levels, row by row."""
    rounded = torch.empty_like(basis, dtype=torch.float32)
    for i, row in enumerate(basis.float()):
        scale = half(row.abs().max() / 127)
        rounded[i] = (row / scale).round() * scale
    return rounded


def half(values: Tensor) -> Tensor:
    return values.half().float()


def damped(hessian: Tensor) -> Tensor:
    """Float64, a hundredth of the mean diagonal added to it. Every column is taken to have inputs."""
    h = hessian.double()
    return h + PERCDAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def salient_columns(factor: Tensor, guided: Tensor) -> list[int]:
    """The 5 % of columns with most `(v / [H⁻¹]_jj)²`, a row's H being that of its group of output channels (eq. 9)."""
    total = torch.zeros(factor.shape[1])
    for group, rows in enumerate(torch.arange(len(factor)).tensor_split(len(guided))):
        divisor = torch.linalg.inv(damped(guided[group])).diagonal().float()
        for i in rows.tolist():
            total += (factor[i] / divisor).square()
    ranking = sorted(range(len(total)), key=lambda j: -total[j].item())
    return sorted(ranking[: round(SHARE * len(total))])


def null_space(gram: Tensor) -> Tensor:
    """Projector onto the weak directions of the inputs: the first index, of all, with little energy from there on."""
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    for start in range(1, len(values)):
        if values[start:].sum() <= ENERGY * values[1:start].sum():
            return (vectors[:, start:] @ vectors[:, start:].T).float()
    return torch.zeros(len(gram), len(gram))


def fit_scales(projected: Tensor, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and column scales of `V ∘ B` on some columns, in turn, each the least squares for the other (eq. 46)."""
    rows = torch.ones(len(projected))
    scales = torch.zeros(projected.shape[1])
    scales[list(columns)] = 1.0
    for _ in range(ITERATIONS):
        old_rows, old_scales = rows.clone(), scales.clone()
        power = scales.square().sum() + EPSILON
        for i in range(len(rows)):
            rows[i] = projected[i].dot(scales) / power
        power = rows.square().sum() + EPSILON
        for j in columns:
            scales[j] = projected[:, j].dot(rows) / power
        change = [((a - b).abs() / (b.abs() + EPSILON)).max() for a, b in ((rows, old_rows), (scales, old_scales))]
        if max(change) < TOLERANCE:
            break
    mean = scales.sum() / len(columns) if columns else torch.tensor(1.0)
    return rows * mean, scales / mean


def signs(values: Tensor) -> Tensor:
    return torch.where(values >= 0, 1.0, -1.0)


Plane = tuple[Tensor, list[Tensor], Tensor]  # signs (rows, in), row scales of each block, column scales (in,)


def binarize(factor: Tensor, hessian: Tensor, salient: Sequence[int]) -> list[Plane]:
    """Algorithm 3 block by block, the error of a column handed on to the columns behind its block."""
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True).float()
    work = factor.clone()
    planes: list[Plane] = [(torch.ones_like(factor), [], torch.zeros(factor.shape[1])) for _ in range(2)]
    for start in range(0, factor.shape[1], BLOCK):
        stop = min(start + BLOCK, factor.shape[1])
        residual = work[:, start:stop].clone()
        for order, (sign, rows, columns) in enumerate(planes):
            chosen = [j for j in range(stop - start) if order == 0 or start + j in salient]
            sign[:, start:stop] = signs(residual)
            row, column = fit_scales(residual * sign[:, start:stop], chosen)
            rows.append(row)
            columns[start:stop] = column
            residual -= half(row)[:, None] * sign[:, start:stop] * half(column)
        for j in range(start, stop):
            work[:, stop:] -= torch.outer(residual[:, j - start] / upper[j, j], upper[j, stop:])
    return planes


def dense(planes: Sequence[Plane]) -> Tensor:
    total = torch.zeros_like(planes[0][0])
    for sign, rows, columns in planes:
        for block, row in enumerate(rows):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            total[:, part] += half(row)[:, None] * sign[:, part] * half(columns[part])
    return total


def suppress_shift(factor: Tensor, binarized: Tensor, projector: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rows and columns by eqs. 49 and 50, in turn."""
    target = factor - (factor - binarized) @ projector
    rows, columns = torch.ones(len(factor)), torch.ones(factor.shape[1])
    for _ in range(ITERATIONS):
        old_rows, old_columns = rows.clone(), columns.clone()
        for i in range(len(rows)):
            part = binarized[i] * columns
            rows[i] = (part.dot(target[i]) + RIDGE) / (part.dot(part) + RIDGE + EPSILON)
        for j in range(len(columns)):
            part = binarized[:, j] * rows
            columns[j] = (part.dot(target[:, j]) + RIDGE) / (part.dot(part) + RIDGE + EPSILON)
        if max((rows - old_rows).abs().max(), (columns - old_columns).abs().max()) < TOLERANCE:
            break
    return rows, columns


def quantize(
    weights: Sequence[Tensor], hessians: Sequence[Tensor], guided: Sequence[Tensor], pooled: Tensor
) -> tuple[list[Tensor], list[list[int]]]:
    """One projection of all experts.

    Args:
        weights: `(out, in)` per expert.
        hessians: `(in, in)` per expert; guided: `(groups, in, in)` per expert.
        pooled: `(in, in)`, of the inputs of all experts.

    Returns:
        The weights that are stored, `(out, in)` per expert, and the salient columns of each.
    """
    basis, projection = joint_basis(weights)
    projector = null_space(pooled)
    stored, chosen = [], []
    for weight, hessian, own in zip(weights, hessians, guided, strict=True):
        factor = (projection @ weight.double()).float()
        salient = salient_columns(factor, own)
        planes = binarize(factor, hessian, salient)
        row, column = suppress_shift(factor, dense(planes), projector)
        scaled = [(sign, [row * r for r in rows], column * columns) for sign, rows, columns in planes]
        stored.append(eight_bits(basis) @ dense(scaled))
        chosen.append(salient)
    return stored, chosen
