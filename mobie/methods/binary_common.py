"""The skeleton that BiLLM and ARB-LLM share: blocks of columns, salient columns, magnitude groups, error feedback.

W: weights (out, in)   H: Hessian of the inputs (in, in)   U: upper triangular with H⁻¹ = UᵀU   s: saliency (w / d)²

A block of 128 columns is split into salient columns and two magnitude groups of the rest, its parts are binarized by
the method's own fit, and the error is handed on to the columns behind the block; inside a block nothing is updated. The
splits are searched by error, with the closed-form fit in place of the method's own.

Two parts of MoBiE can be plugged in (section B.4.7): GLAS as the source of the saliency, and NGES, which multiplies the
rows and columns of a binarized Ŵ by factors β_r and β_c:

    β_r · (mu + Σ_k alpha_k · B_k) · β_c

β_r goes into the row scales and the means. β_c goes into the column scales of ARB-RC; BiLLM, ARB and ARB-X have none,
and a mean is not scaled by column, so there β_c is stored by itself, 16 bits for each column.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mobie.errors import ConfigError, DataError
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.methods.binary_fit import Binarization, Fit, divide
from mobie.methods.hessian import (
    Feedback,
    SaliencyRule,
    damp,
    handed_on,
    inverse_cholesky,
    saliency_denominator,
    scaled_saliency_denominator,
)
from mobie.methods.split_search import Split, border_candidates, border_errors, search_salient, split_errors
from mobie.packing.bank import PackedBank
from mobie.packing.base import Packed


@dataclass(frozen=True)
class BinaryMethod(Method):
    """What BiLLM and ARB-LLM have in common.

    block_size:      columns that are split, binarized and scaled together.
    percdamp:        damping of the Hessian, as a share of its mean diagonal.
    saliency_rule:   w² over the square of U_jj ("cholesky_diagonal", as released) or of [H⁻¹]_jj ("inverse_diagonal").
    saliency_source: Hessian in the saliency: of the layer's inputs ("local"), or weighted by loss gradients, one per
                     contiguous group of output rows ("guided", GLAS). Error feedback always uses the local one.
    gradient_groups: number of those groups of rows.
    max_salient:     most salient columns in a block.
    search_on:       errors of the searches are those of the "saliency" matrix, as released, or of the "weights", as
                     BiLLM's Algorithm 2 is printed.
    feedback:        what later columns take up: (W - Ŵ) / diag U times U ("diagonal", as released), the least-squares
                     answer (W - Ŵ) U_block⁻¹ U ("triangular"), or nothing ("none").
    nges:            whether binarized expert projections are modulated by NGES (eqs. 12, 49 and 50), with the null
                     space of the inputs of all tokens of the layer. As in MoBiE, attention, shared experts and the
                     router, which stays in 16 bits, are not.
    null_space_energy, regularization (λ), nges_iterations, tolerance: of NGES, as MoBiE's.
    """

    guided_by: ClassVar[tuple[str, Any]] = ("saliency_source", "guided")
    stores_signs: ClassVar[bool] = True

    block_size: int = 128
    percdamp: float = 0.01
    saliency_rule: SaliencyRule = "cholesky_diagonal"
    saliency_source: Literal["local", "guided"] = "local"
    gradient_groups: int = 4
    max_salient: int = 49
    search_on: Literal["saliency", "weights"] = "saliency"
    feedback: Feedback = "diagonal"
    nges: bool = False
    null_space_energy: float = 0.1
    regularization: float = 0.2
    nges_iterations: int = 15
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        for option in ("block_size", "gradient_groups", "max_salient", "nges_iterations"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{self.name}: {option} is {getattr(self, option)}; expected at least 1")
        if not 0 <= self.percdamp < float("inf"):
            raise ConfigError(f"{self.name}: percdamp is {self.percdamp}; expected a number of at least 0 (0.01)")
        for option in ("null_space_energy", "regularization"):
            if not getattr(self, option) > 0:
                raise ConfigError(f"{self.name}: {option} is {getattr(self, option)}; expected more than 0")

    @property
    def splits_salient(self) -> bool:
        """Whether salient columns have two magnitude groups as well."""
        return False

    @abstractmethod
    def fit_block(self, weights: Tensor, split: Split, gram: Tensor) -> tuple[Fit, Fit]:
        """Binarize a block `(out, n)`: first order for its columns that are not salient, second for those that are.

        `gram` `(n, n)` is the block's own part of the Hessian of the inputs, not damped.
        """

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        return self.quantize_group({"": weight}, {"": stats})[""]

    def quantize_group(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Packed]:
        found = self._binarize(weights, stats)
        return {name: binarized.pack(self.block_size) for name, binarized in found.items()}

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> Mapping[str, Packed]:
        if not self.nges:
            return super().quantize_experts(bank, stats)
        from mobie.methods.mobie.nges import null_space_projector  # here: its package imports this module

        packed: dict[str, PackedBank] = {}
        for names in bank.same_input:
            hessian = stats.pooled[names[0]].hessian.to(bank.working_devices[0])
            projector = null_space_projector(hessian, self.null_space_energy)
            packed |= self.quantize_chunks(bank, stats, names, partial(self._suppress_shift, projector=projector))
        return {name: packed[name] for name in bank.projections}

    def _suppress_shift(
        self, weights: Mapping[str, Tensor], stats: Sequence[Mapping[str, LinearStats]], projector: Tensor
    ) -> list[dict[str, Packed]]:
        """Binarize experts and fuse NGES's factors for the projector P `(in, in)` (eq. 11)."""
        from mobie.methods.mobie.nges import suppress_shift

        packed: list[dict[str, Packed]] = []
        for e, own in enumerate(stats):
            packed.append({})
            dead = next(iter(own.values())).hessian.diagonal() == 0
            for name, binarized in self._binarize({n: weight[e] for n, weight in weights.items()}, own).items():
                row, column = suppress_shift(
                    weights[name][e].float().masked_fill(dead, 0)[None],
                    binarized.dense()[None],
                    projector.to(dead.device),
                    self.regularization,
                    self.nges_iterations,
                    self.tolerance,
                )
                packed[-1][name] = binarized.pack(self.block_size, (row[0], column[0]))
        return packed

    def _binarize(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> dict[str, Binarization]:
        """Binarize weights `(out, in)` that share their input, and so its Hessian."""
        hessian = stats[next(iter(weights))].hessian
        damped, dead = damp(hessian, self.percdamp)
        factor = inverse_cholesky(damped)
        return {
            name: self._binarize_one(weight.float().masked_fill(dead, 0), stats[name], hessian, factor)
            for name, weight in weights.items()
        }

    def _binarize_one(self, remaining: Tensor, stats: LinearStats, hessian: Tensor, factor: Tensor) -> Binarization:
        """Binarize `remaining` `(out, in)`, which is lost; U is the factor of the damped Hessian."""
        rows, columns = remaining.shape
        denominators = self._denominators(factor, stats, rows)  # (out or 1, in)
        masks, plain, extra = [], [], []
        for start in range(0, columns, self.block_size):
            here = slice(start, start + self.block_size)
            block = remaining[:, here]
            split = self.split_block(block, (block / denominators[:, here]).square())
            fits = self.fit_block(block, split, hessian[here, here])
            dense = torch.empty_like(block)
            dense[:, ~split.salient], dense[:, split.salient] = (fit.dense() for fit in fits)
            remaining[:, here.stop :] -= handed_on(block - dense, factor, here, self.feedback)
            masks.append(split.salient)
            plain.append(fits[0])
            extra.append(fits[1])
        return Binarization(torch.cat(masks), tuple(plain), tuple(extra))

    def split_block(self, weights: Tensor, saliency: Tensor) -> Split:
        """Choose the salient columns and the magnitude groups of a block.

        The border between the groups is a quantile of the rest's magnitudes with zeros in place of the salient columns.
        Salient columns that are split too have a border of their own, a quantile of their magnitudes other than zero.

        Args:
            weights, saliency: `(out, n)`.
        """
        values = saliency if self.search_on == "saliency" else weights
        values = divide(values, values.abs().max())  # errors are squared again: keep them within float32
        salient = search_salient(values, saliency, self.max_salient)
        magnitudes = values.abs()
        borders = border_candidates(magnitudes * ~salient)
        upper = magnitudes >= borders[border_errors(values[:, ~salient], borders).argmin()]
        if self.splits_salient:
            own = magnitudes[:, salient]
            candidates = own >= border_candidates(own[own != 0])[:, None, None]
            upper[:, salient] = candidates[split_errors(values[:, salient], candidates, order=2).argmin()]
        return Split(salient, upper)

    def _denominators(self, factor: Tensor, stats: LinearStats, rows: int) -> Tensor:
        if self.saliency_source == "local":
            return saliency_denominator(factor, self.saliency_rule)[None]
        if stats.guided is None:
            raise DataError(
                f"{self.name}: saliency_source 'guided' needs Hessians weighted by loss gradients, got none; calibrate "
                "with gradients, or use saliency_source 'local'"
            )
        per_group = scaled_saliency_denominator(stats.guided, self.saliency_rule, self.percdamp)  # (groups, in)
        runs = torch.arange(rows, device=per_group.device).tensor_split(len(per_group))
        return torch.cat([row.expand(len(run), -1) for row, run in zip(per_group, runs, strict=True)])
