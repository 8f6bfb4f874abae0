"""Signs and scales of nested planes, fitted to a layer's output error; `obe.md` derives what is computed here.

    Ŵ_ij = a_i Σ_{q < p_j} ρ_{p_j q} s_qij        error(Ŵ) = tr((W - Ŵ) H (W - Ŵ)ᵀ) = n/2 · mean ‖XWᵀ - XŴᵀ‖²

a: row scales, ρ: ratios, s: signs, p: planes of a column; H is the damped Hessian of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobie.methods.binary_fit import divide, sign
from mobie.methods.hessian import inverse_cholesky

#: outputs of the uniform quantizers of 2, 4, 8 and 16 levels with the least squared error for a normal variable of unit
#: variance (Max 1960, table II), as the magnitudes of their signs, and that error
LEVELS = ((0.7979,), (0.9957, 0.4979), (1.1720, 0.5860, 0.2930), (1.3408, 0.6704, 0.3352, 0.1676))
DISTORTION = (1.0, 0.3634, 0.1188, 0.03744, 0.01154)
MOST_PLANES = len(LEVELS)
BLOCK = 64  # columns whose error is fed back at a time
ALTERNATIONS = 8  # between row scales and ratios, for given signs


@dataclass(frozen=True)
class Planes:
    """A batch of matrices `(experts, out, in)` in planes.

    signs:     `(planes, experts, out, in)` ±1; beyond a column's own planes they mean nothing.
    row_scale: `(experts, out)`.
    ratio:     `(experts, planes + 1, planes)`, `[e, p, q]` of plane q in the columns of p planes; 0 where q >= p.
    counts:    `(experts, in)` int64, planes of each column.
    """

    signs: Tensor
    row_scale: Tensor
    ratio: Tensor
    counts: Tensor

    def dense(self) -> Tensor:
        """Values `(experts, out, in)`."""
        return self.row_scale[..., None] * self.shape_of_rows()

    def shape_of_rows(self) -> Tensor:
        """Values `(experts, out, in)` where every row scale is one."""
        per_column = _per_column(self.ratio, self.counts)
        return sum(signs * per_column[:, None, :, q] for q, signs in enumerate(self.signs))


def start(weights: Tensor, counts: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Row scales `(experts, out)` and ratios to begin with: rows as normal variables, each class at its best levels."""
    covered = (counts > 0).to(weights.dtype)[:, None]
    scale = divide((weights.square() * covered).sum(-1), covered.sum(-1).expand(weights.shape[:2])).sqrt()
    ratio = weights.new_zeros(len(weights), planes + 1, planes)
    for own in range(1, planes + 1):
        ratio[:, own, :own] = weights.new_tensor(LEVELS[own - 1])
    return scale, ratio


def nearest_signs(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Signs `(planes, …)` of the sums `Σ_q ±levels_q` next to the values, plane by plane, and those sums.

    That is the nearest one as long as every level is at least the sum of those behind it.

    Args:
        values: `(…)`.
        levels: `(planes, …)`.
    """
    reached = torch.zeros_like(values)
    signs = []
    for level in levels:
        signs.append(sign(values - reached))
        reached = reached + level * signs[-1]
    return torch.stack(signs), reached


def feed_back(weights: Tensor, factor: Tensor, scale: Tensor, ratio: Tensor, counts: Tensor) -> Tensor:
    """Signs chosen column by column, each column's error made up for by the columns behind it (GPTQ's recursion).

    Args:
        weights: `(experts, out, in)`.
        factor: upper triangular U with H⁻¹ = UᵀU.

    Returns:
        `(planes, experts, out, in)` ±1.
    """
    remaining = weights.clone()
    per_column = _per_column(ratio, counts)
    most = counts.amax(0).clamp(min=1).tolist()  # planes of a column in any matrix: the signs of those are looked for
    signs = weights.new_ones(ratio.shape[-1], *weights.shape)
    for begin in range(0, weights.shape[-1], BLOCK):
        end = min(begin + BLOCK, weights.shape[-1])
        here = slice(begin, end)
        near = remaining[..., here].mT.contiguous()  # (experts, columns, out): a column is one run of memory
        errors, chosen = torch.empty_like(near), near.new_ones(len(signs), *near.shape)
        inner = factor[:, here, here]
        for i in range(end - begin):
            own = most[begin + i]
            levels = per_column[:, begin + i, :own].T[..., None] * scale  # (planes, experts, out)
            chosen[:own, :, i], values = nearest_signs(near[:, i], levels)
            errors[:, i] = (near[:, i] - values) / inner[:, i, i, None]
            near[:, i + 1 :] -= inner[:, i, i + 1 :, None] * errors[:, None, i]
        signs[..., here] = chosen.mT
        remaining[..., end:] -= errors.mT.contiguous() @ factor[:, here, end:]
    return signs


def refit(weights: Tensor, hessian: Tensor, planes: Planes) -> Planes:
    """Row scales and ratios of least output error for given signs, each the exact answer to the other, in turns."""
    fitted = [
        _refit_one(weight, gram, planes.signs[:, e], planes.row_scale[e], planes.ratio[e], planes.counts[e])
        for e, (weight, gram) in enumerate(zip(weights, hessian, strict=True))
    ]
    scales, ratios = (torch.stack(list(each)) for each in zip(*fitted, strict=True))
    return Planes(planes.signs, scales, ratios, planes.counts)


def _refit_one(
    weight: Tensor, hessian: Tensor, signs: Tensor, scale: Tensor, ratio: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """`refit` of one matrix `(out, in)`.

    With S_k the signs of one plane in the columns of one class, all that the error depends on are, of every row i, the
    products `g_ikl = S_ki H S_liᵀ` and `r_ik = S_ki H W_iᵀ`:

        error = Σ_i (a_i² ρᵀ g_i ρ - 2 a_i r_iᵀ ρ) + const
        a_i = r_iᵀ ρ / ρᵀ g_i ρ        ρ = (Σ_i a_i² g_i)⁻¹ Σ_i a_i r_i
    """
    classes = [own for own in range(1, ratio.shape[0]) if (counts == own).any()]
    terms = [(own, plane) for own in classes for plane in range(own)]
    if not terms:
        return scale, ratio
    columns = {own: (counts == own).nonzero().flatten() for own in classes}
    parts = [signs[plane][:, columns[own]] for own, plane in terms]  # (out, n) each
    through = weight @ hessian
    target = torch.stack(
        [(part * through[:, columns[own]]).sum(-1) for part, (own, _) in zip(parts, terms, strict=True)], dim=-1
    )
    gram = weight.new_empty(len(weight), len(terms), len(terms))
    for k, (part, (own, _)) in enumerate(zip(parts, terms, strict=True)):
        product = part @ hessian[columns[own]]
        for other in range(k + 1):
            value = (product[:, columns[terms[other][0]]] * parts[other]).sum(-1)
            gram[:, k, other] = gram[:, other, k] = value
    known = ratio[tuple(torch.tensor(terms, device=ratio.device).T)]
    scale, known = _alternate(gram.double(), target.double(), scale.double(), known.double())
    ratio = ratio.clone()
    ratio[tuple(torch.tensor(terms, device=ratio.device).T)] = known.to(ratio.dtype)
    return scale.to(weight.dtype), ratio


def _alternate(gram: Tensor, target: Tensor, scale: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Row scales `(out,)` and ratios `(terms,)` for `gram` `(out, terms, terms)` and `target` `(out, terms)`."""
    for _ in range(ALTERNATIONS):
        scale = divide(target @ ratio, (gram @ ratio) @ ratio)
        system = (scale.square()[:, None, None] * gram).sum(0)
        ridge = 1e-9 * system.diagonal().mean()
        if ridge == 0:  # a matrix of zeros
            return scale, ratio
        ratio = torch.linalg.solve(system + ridge * torch.eye(len(ratio), device=ratio.device), scale @ target)
    return divide(target @ ratio, (gram @ ratio) @ ratio), ratio


def descend(weights: Tensor, hessian: Tensor, planes: Planes, sweeps: int) -> Planes:
    """Turn single signs as long as that lowers the output error, column by column, `sweeps` times over.

    With D = W - Ŵ and v what a sign contributes, turning it changes the error by `4 v (D H)_ij + 4 v² H_jj`.
    """
    signs = planes.signs.clone()
    per_column = _per_column(planes.ratio, planes.counts)
    slope = (weights - planes.dense()) @ hessian  # D H
    for begin in [*range(0, weights.shape[-1], BLOCK)] * sweeps:
        end = min(begin + BLOCK, weights.shape[-1])
        here = slice(begin, end)
        near, taken = slope[..., here].clone(), torch.zeros_like(weights[..., here])
        for j in range(begin, end):
            for q in range(len(signs)):
                value = signs[q, ..., j] * planes.row_scale * per_column[:, j, q, None]
                change = 4 * value * near[..., j - begin] + 4 * value.square() * hessian[:, j, j, None]
                turned = (change < 0).to(value.dtype)
                signs[q, ..., j] *= 1 - 2 * turned
                taken[..., j - begin] += 2 * value * turned
                near += (2 * value * turned)[..., None] * hessian[:, None, j, here]
        slope += taken @ hessian[:, here]
    return Planes(signs, planes.row_scale, planes.ratio, planes.counts)


def output_error(weights: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """`tr((W - Ŵ) H (W - Ŵ)ᵀ)` of each matrix `(experts,)`."""
    difference = weights - values
    return ((difference @ hessian) * difference).sum((-1, -2))


def fit_planes(
    weights: Tensor, hessian: Tensor, counts: Tensor, *, rounds: int, refits: bool, feeds_back: bool, sweeps: int
) -> Planes:
    """Planes of a batch of matrices: signs, then scales, as often as `rounds` says; of each matrix the best round.

    Columns of few planes come first, so that those of more make up for their errors; a column without any is a column
    pruned, with the best answer of all others.

    Args:
        weights: `(experts, out, in)`.
        hessian: `(experts, in, in)`, damped.
        counts: `(experts, in)` int64, planes of each column.
        rounds: of choosing signs; each round starts from the scales of the one before.
        refits: whether scales are fitted to the output error, or left as `start` has them.
        feeds_back: whether errors are made up for, or every weight goes to its nearest level.
        sweeps: of `descend` in every round.
    """
    order = counts.argsort(dim=-1, stable=True)
    back = order.argsort(dim=-1)
    ordered = weights.gather(2, order[:, None].expand_as(weights))
    gram = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    counts = counts.gather(1, order)
    most = max(1, int(counts.max()))
    scale, ratio = start(ordered, counts, most)
    factor = inverse_cholesky(gram) if feeds_back else torch.eye(len(gram[0]), device=gram.device).expand_as(gram)
    best: Planes | None = None
    least = weights.new_full((len(weights),), float("inf"))
    for _ in range(rounds if refits else 1):
        planes = Planes(feed_back(ordered, factor, scale, ratio, counts), scale, ratio, counts)
        if refits:
            planes = refit(ordered, gram, planes)
        if sweeps:
            planes = descend(ordered, gram, planes, sweeps)
            planes = refit(ordered, gram, planes) if refits else planes
        error = output_error(ordered, planes.dense(), gram)
        best = planes if best is None else _better(planes, best, error < least)
        least = torch.minimum(error, least)
        scale, ratio = planes.row_scale.abs(), _falling(planes.ratio)
    assert best is not None  # there is at least one round
    signs = best.signs.gather(3, back[None, :, None].expand_as(best.signs))
    return Planes(signs, best.row_scale, best.ratio, counts.gather(1, back))


def _better(new: Planes, old: Planes, where: Tensor) -> Planes:
    """Of each matrix of a batch the new planes where told."""
    return Planes(
        torch.where(where[None, :, None, None], new.signs, old.signs),
        torch.where(where[:, None], new.row_scale, old.row_scale),
        torch.where(where[:, None, None], new.ratio, old.ratio),
        new.counts,
    )


def _falling(ratio: Tensor) -> Tensor:
    """Magnitudes of ratios with the largest first, as the choice of signs plane by plane needs them."""
    return ratio.abs().sort(dim=-1, descending=True).values


def _per_column(ratio: Tensor, counts: Tensor) -> Tensor:
    """Ratios `(experts, planes + 1, planes)` of every column, `(experts, in, planes)`."""
    return ratio.gather(1, counts[:, :, None].expand(-1, -1, ratio.shape[-1]))
