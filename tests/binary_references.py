"""Plain loops and enumerations that BiLLM and ARB-LLM are held against, and examples for them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from mobie.methods.arb import ARB
from mobie.methods.base import LinearStats
from mobie.methods.billm import BiLLM
from mobie.methods.binary_common import BinaryMethod
from mobie.methods.binary_fit import Fit

Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(out: int, n: int, seed: int = 0) -> Tensor:
    return normal(out, n, seed=seed + 1000) > 0.3


def exact(fit: Fit) -> Tensor:
    """Values of a fit without rounding of its scales, element by element."""
    order, out, n = fit.signs.shape
    dense = torch.zeros(out, n, dtype=torch.float64)
    for i, j in itertools.product(range(out), range(n)):
        g = 0 if fit.second_group is None else int(fit.second_group[i, j])
        dense[i, j] = 0 if fit.mean is None else fit.mean[g, i]
        for k in range(order):
            column = 1 if fit.column_scale is None else fit.column_scale[k, g, j]
            dense[i, j] += fit.row_scale[k, g, i] * column * fit.signs[k, i, j]
    return dense


def error(fit: Fit, weights: Tensor) -> float:
    return (weights - exact(fit)).square().sum().item()


def reference_fit(weights: Array, groups: list[Array], order: int) -> Array:
    """Residual binarization with means, one row and group at a time."""
    dense = np.zeros_like(weights)
    for row, (values, *masks) in enumerate(zip(weights, *groups, strict=True)):
        for mask in masks:
            left = values[mask].copy()
            for _ in range(order if mask.any() else 0):
                mu = left.mean()
                step = mu + np.abs(left - mu).mean() * np.where(left - mu >= 0, 1, -1)
                dense[row, mask] += step
                left -= step
    return dense


def both_sides(mask: Tensor | Array) -> list[Array]:
    upper = np.asarray(mask)
    return [~upper, upper]


def reference_row_column(weights: Array, groups: list[Array], order: int, iterations: int) -> Array:
    """ARB-RC of each group by itself, every sum a loop over its members."""
    dense = np.zeros_like(weights)
    for mask in groups:
        rows, columns, signs = [], [], []
        left = np.where(mask, weights, 0)
        for _ in range(order):
            row = np.array([np.abs(v[m]).mean() if m.any() else 0 for v, m in zip(left, mask, strict=True)])
            column = np.zeros(weights.shape[1])
            for j in range(weights.shape[1]):
                ratios = [abs(left[i, j]) / row[i] for i in range(len(row)) if mask[i, j] and row[i] > 0]
                column[j] = np.mean(ratios) if ratios else 0
            rows.append(row)
            columns.append(column)
            signs.append(np.where(left >= 0, 1, -1))
            left = np.where(mask, left - np.outer(row, column) * signs[-1], 0)
        for _ in range(iterations):
            for k in range(order):
                target = weights.copy()
                for other in range(order):
                    if other != k:
                        target -= np.outer(rows[other], columns[other]) * signs[other]
                basis = columns[k] * signs[k] * mask
                norm = (basis**2).sum(1)
                rows[k] = np.divide((target * basis).sum(1), norm, out=np.zeros(len(norm)), where=norm > 0)
                basis = rows[k][:, None] * signs[k] * mask
                norm = (basis**2).sum(0)
                columns[k] = np.divide((target * basis).sum(0), norm, out=np.zeros(len(norm)), where=norm > 0)
            if order == 2:
                first, second = (np.outer(r, c) for r, c in zip(rows, columns, strict=True))
                pairs = list(itertools.product((-1, 1), repeat=2))
                nearest = np.argmin([np.abs(weights - a * first - b * second) for a, b in pairs], axis=0)
                signs = [np.array([pair[k] for pair in pairs])[nearest] for k in (0, 1)]
        product = sum(np.outer(r, c) * b for r, c, b in zip(rows, columns, signs, strict=True))
        dense[mask] = product[mask]
    return dense


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    mix = torch.eye(columns, dtype=torch.float64) + 0.1 * normal(columns, columns, seed=seed + 50)
    return normal(tokens, columns, seed=seed) @ mix.T


def reference_error(values: Array, upper: Array, order: int) -> float:
    return ((values - reference_fit(values, both_sides(upper), order)) ** 2).sum()


def reference_split(values: Array, saliency: Array, bitmap: bool, most: int = 49) -> tuple[Array, Array]:
    """The searches, one candidate after the other."""
    columns = values.shape[1]
    ranking = np.argsort(-saliency.sum(0), kind="stable")
    best = (np.inf, None)
    for count in range(1, min(most, columns) + 1):
        salient = np.isin(np.arange(columns), ranking[:count])
        best = min(best, (reference_error(values, np.broadcast_to(salient, values.shape), 2), count))
    salient = np.isin(np.arange(columns), ranking[: best[1]])
    upper = np.zeros(values.shape, dtype=bool)
    parts = [(~salient, np.abs(np.where(salient, 0, values)), 1)]
    if bitmap:
        parts.append((salient, np.abs(values[:, salient][values[:, salient] != 0]), 2))
    for part, pool, order in parts:
        own, least = values[:, part], np.inf
        for border in np.quantile(pool, np.linspace(0.1, 0.9, 81)):
            candidate = np.abs(own) >= border
            if reference_error(own, candidate, order) < least:
                least = reference_error(own, candidate, order)
                upper[:, part] = candidate
    return salient, upper


def example(out: int = 10, columns: int = 48, seed: int = 0) -> tuple[Tensor, LinearStats]:
    inputs = correlated(150, columns, seed)
    inputs[:, 5] = 0
    token_weights = normal(150, 3, seed=seed + 7).square()
    return normal(out, columns, seed=seed + 1).float(), LinearStats.from_inputs(inputs, token_weights)


def output_error(method: BinaryMethod, weight: Tensor, inputs: Tensor) -> float:
    dense = method.quantize_linear(weight.float(), LinearStats.from_inputs(inputs)).dequantize()
    return ((inputs @ (weight - dense).T).norm() / (inputs @ weight.T).norm()).item()


METHODS = [BiLLM(), *(ARB(refinement=r, column_group_bitmap=b) for r in ("arb", "arb-x", "arb-rc") for b in (0, 1))]
