"""MoBiE, the method: CEJD, then mixed-order binarization of the expert factors by GLAS saliency, then NGES.

Every reading of the paper that its text leaves open is an option; the defaults are what the tables show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.methods.arb import ARB
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method, register
from mobie.methods.hessian import Feedback, SaliencyRule, damp, inverse_cholesky
from mobie.methods.mobie.cejd import JointBasis, choose_side, joint_basis
from mobie.methods.mobie.glas import saliency, salient_columns
from mobie.methods.mobie.mixed_order import binarize, pack
from mobie.methods.mobie.nges import null_space_projector, suppress_shift
from mobie.packing.bank import GATE_UP, PackedBank, SymmetricRows
from mobie.packing.base import Packed
from mobie.packing.binary import BinaryMatrix
from mobie.packing.dense import Dense16


@dataclass(frozen=True)
class Factor:
    """Of damped Hessians: columns that no input reaches, `dead (experts, in)` bool, and U `upper (experts, in, in)`.

    `upper` is None where no error is handed on.
    """

    dead: Tensor
    upper: Tensor | None


@register
@dataclass(frozen=True)
class MoBiE(Method):
    """Options by the paper's parts; numbers in parentheses are those of the table of readings in the documentation.

    joint_svd:        (1) "separate" per projection; "fused_gate_up" one basis for both; "off" (ablation).
    shared_side:      (2) "left" as eq. 4; "right"; "fewest_bytes" per projection.
    rank:             (3) None keeps the full rank.
    basis_bits:       (5) of the shared basis, per row: 4, 8 or 16.
    other_linears:    (6) attention and shared experts: "arb_rc" with GLAS saliency; "mixed_order" as the experts,
                      without joint SVD; or "16bit".
    gradient_at:      (7) "latent" T = V x, or "output" Z.
    gradient_groups:  (8) contiguous groups of channels that share one guided Hessian.
    glas:             saliency from guided Hessians; off: from the local Hessian (ablation).
    saliency_rule:    (9) "inverse_diagonal" as printed, "cholesky_diagonal" as the released baselines.
    salient_share:    (10) share of columns with a second order.
    scope, block_size, feedback: (11) "block" with error feedback between blocks (`hessian.Feedback`; the default is
                      that of ARB-LLM), or "matrix" without.
    row_weighting:    (12) "uniform", or "sigma2": rows of the latent weighted by the squared singular value.
    router:           (13) "16bit", or "binarized", where NGES then works on the router too.
    nges, nges_target: (13) "experts" (and a binarized router), or "router" only; nges off (ablation).
    null_space:       (14) of "tokens", or of the "position_mean" of each sequence.
    regularization:   (15) λ.
    """

    name: ClassVar[str] = "mobie"
    guided_by: ClassVar[tuple[str, Any]] = ("glas", True)
    gradient_options: ClassVar[tuple[str, ...]] = (
        "joint_svd", "shared_side", "rank", "gradient_at", "gradient_groups", "router",
    )  # fmt: skip
    seconds_per_weight: ClassVar[float] = 7.0e-7
    stored_bits: ClassVar[float] = 1.8
    stores_signs: ClassVar[bool] = True

    joint_svd: Literal["separate", "fused_gate_up", "off"] = "separate"
    shared_side: Literal["left", "right", "fewest_bytes"] = "left"
    rank: int | None = None
    basis_bits: Literal[4, 8, 16] = 8
    other_linears: Literal["arb_rc", "mixed_order", "16bit"] = "arb_rc"
    glas: bool = True
    gradient_at: Literal["latent", "output"] = "latent"
    gradient_groups: int = 4
    saliency_rule: SaliencyRule = "inverse_diagonal"
    salient_share: float = 0.05
    scope: Literal["block", "matrix"] = "block"
    feedback: Feedback = "diagonal"
    block_size: int = 128
    row_weighting: Literal["uniform", "sigma2"] = "uniform"
    router: Literal["16bit", "binarized"] = "16bit"
    nges: bool = True
    nges_target: Literal["experts", "router"] = "experts"
    null_space: Literal["tokens", "position_mean"] = "tokens"
    null_space_energy: float = 0.1
    regularization: float = 0.2
    iterations: int = 15
    tolerance: float = 1e-5
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its range."""
        positive = ("gradient_groups", "block_size", "iterations", "regularization", "percdamp", "null_space_energy")
        for option in positive:
            if getattr(self, option) <= 0:
                raise ConfigError(f"mobie: {option} is {getattr(self, option)}, expected more than 0")
        if not 0 <= self.salient_share <= 1:
            raise ConfigError(f"mobie: salient_share is {self.salient_share}, expected 0 to 1")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"mobie: rank is {self.rank}, expected at least 1, or null for the full rank")
        if self.nges and self.nges_target == "router" and not self.quantizes_router:
            raise ConfigError("mobie: nges_target is router, but the router stays in 16 bits; set router to binarized")

    @property
    def quantizes_router(self) -> bool:
        return self.router == "binarized"

    def gradient_bases(self, bank: ExpertBank) -> dict[str, Tensor | None]:
        if self.joint_svd == "off" or self.gradient_at == "output":
            return super().gradient_bases(bank)
        bases: dict[str, Tensor | None] = {}
        for names in self._joint_banks(bank).values():
            # with the basis on the right, the latent is on the input side and outputs are outputs
            left = choose_side(self.shared_side, *bank.projections[names[0]].shape[1:]) == "left"
            bases |= dict.fromkeys(names, self._joint_basis(bank, names).basis if left else None)
        return bases

    def quantize_linear(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Binarize one Linear that is no expert (reading 6)."""
        if self.other_linears == "16bit":
            return Dense16(weight.to(torch.bfloat16))
        if self.other_linears == "arb_rc":
            return self._arb_rc().quantize_linear(weight, stats)
        return self._binarize(weight[None], [stats], self._factor([stats]))[0]

    def quantize_router(self, weight: Tensor, stats: LinearStats) -> Packed:
        """Binarize the router, with NGES as Algorithm 4 has it; its saliency is local, it has no loss gradients."""
        projector = self._projector(stats) if self.nges else None
        return replace(self, glas=False)._binarize(weight[None], [stats], self._factor([stats]), projector)[0]

    def quantize_experts(self, bank: ExpertBank, stats: BankStats) -> dict[str, PackedBank]:
        stored = self._joint_banks(bank)
        joint: dict[str, JointBasis] = {}
        if self.joint_svd != "off":
            for members in stored.values():
                joint |= dict.fromkeys(members, self._joint_basis(bank, members))
        own: dict[str, PackedBank] = {}
        for names in bank.same_input:
            projectors = self._projectors(stats, names, joint, bank.working_devices[0])
            own |= self.quantize_chunks(
                bank, stats, names, partial(self._quantize_chunk, joint=joint, projectors=projectors)
            )
        packed = {}
        for name, members in stored.items():
            experts = tuple(expert for member in members for expert in own[member].experts)
            packed[name] = PackedBank(experts)
            if members[0] in joint:
                basis = joint[members[0]]
                packed[name] = PackedBank(experts, self._pack_basis(basis.basis.cpu()), basis.side)
        return packed

    def _arb_rc(self) -> ARB:
        """ARB-RC without the bitmap on salient columns, with this method's saliency, feedback and damping."""
        return ARB(
            block_size=self.block_size,
            percdamp=self.percdamp,
            saliency_rule=self.saliency_rule,
            saliency_source="guided" if self.glas else "local",
            gradient_groups=self.gradient_groups,
            feedback=self.feedback,
            refinement="arb-rc",
            column_group_bitmap=False,
            iterations=self.iterations,
        )

    def _joint_banks(self, bank: ExpertBank) -> dict[str, tuple[str, ...]]:
        """Name under which it is stored → projections that are decomposed together."""
        if self.joint_svd == "fused_gate_up" and {"gate", "up"} <= bank.projections.keys():
            others: dict[str, tuple[str, ...]] = {
                name: (name,) for name in bank.projections if name not in ("gate", "up")
            }
            return {GATE_UP: ("gate", "up")} | others
        return {name: (name,) for name in bank.projections}

    def _joint_basis(self, bank: ExpertBank, names: Sequence[str]) -> JointBasis:
        weights = [bank.projections[name] for name in names]
        side = choose_side(self.shared_side, *weights[0].shape[1:])
        return joint_basis(weights, side, self.rank, bank.working_devices[0])

    def _projectors(
        self, stats: BankStats, names: Sequence[str], joint: Mapping[str, JointBasis], device: torch.device
    ) -> dict[str, Tensor]:
        """NGES's projector P `(in, in)` of every projection; none without NGES.

        Projections with the same inputs share one, unless a basis on the right gives each inputs of its own.
        """
        if not (self.nges and self.nges_target == "experts"):
            return {}
        projectors: dict[str, Tensor] = {}
        for name in names:
            basis = joint.get(name)
            if basis is not None and basis.side == "right":
                projectors[name] = self._projector(stats.pooled[name].to(device).through(basis.basis))
            else:
                shared = projectors.get(names[0])
                projectors[name] = self._projector(stats.pooled[name].to(device)) if shared is None else shared
        return projectors

    def _quantize_chunk(
        self,
        weights: Mapping[str, Tensor],
        stats: Sequence[Mapping[str, LinearStats]],
        joint: Mapping[str, JointBasis],
        projectors: Mapping[str, Tensor],
    ) -> list[dict[str, Packed]]:
        """Binarize the factors of some experts; `weights` name → `(experts, out, in)` share their input."""
        packed: list[dict[str, Packed]] = [{} for _ in stats]
        shared: Factor | None = None  # of the common Hessian
        for name, weight in weights.items():
            own, basis, row_weights = [expert[name] for expert in stats], joint.get(name), None
            if basis is None or basis.side == "left":
                shared = factor = self._factor(own) if shared is None else shared
            else:
                own = [s.through(basis.basis.to(weight.device)) for s in own]
                factor = self._factor(own)
            if basis is not None:
                weight = basis.factors(weight)
                if basis.side == "left" and self.row_weighting == "sigma2":
                    row_weights = basis.basis.square().sum(0).to(weight.device)  # σ²: U has unit columns
            projector = projectors[name].to(weight.device) if name in projectors else None
            for expert, matrix in zip(packed, self._binarize(weight, own, factor, projector, row_weights), strict=True):
                expert[name] = matrix
        return packed

    def _pack_basis(self, basis: Tensor) -> Packed:
        if self.basis_bits == 16:
            return Dense16(basis.half())
        return SymmetricRows.quantize(basis, self.basis_bits)

    def _factor(self, experts: Sequence[LinearStats]) -> Factor:
        damped, dead = damp(torch.stack([s.hessian for s in experts]), self.percdamp)
        hands_on = self.feedback != "none" and self.scope == "block" and damped.shape[-1] > self.block_size
        return Factor(dead, inverse_cholesky(damped) if hands_on else None)

    def _projector(self, pooled: LinearStats) -> Tensor:
        return null_space_projector(self._null_space_gram(pooled), self.null_space_energy)

    def _binarize(
        self,
        weight: Tensor,
        experts: list[LinearStats],
        factor: Factor,
        projector: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[BinaryMatrix, ...]:
        """Mixed-order binarization of `(experts, rows, in)`; NGES follows where its projector is given."""
        weight = weight.masked_fill(factor.dead[:, None], 0.0)
        scores = saliency(weight, self._saliency_hessians(experts), self.saliency_rule, self.percdamp)
        salient = salient_columns(scores, self.salient_share)
        block_size = self.block_size if self.scope == "block" else weight.shape[2]
        first, second = binarize(
            weight,
            salient,
            factor.upper,
            feedback=self.feedback,
            block_size=block_size,
            row_weights=weight.new_ones(weight.shape[1]) if row_weights is None else row_weights,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        if projector is not None:
            factors = suppress_shift(
                weight,
                first.dense(block_size) + second.dense(block_size),
                projector,
                self.regularization,
                self.iterations,
                self.tolerance,
            )
            first, second = first.scaled(*factors), second.scaled(*factors)
        return pack(first, second, salient, block_size)

    def _saliency_hessians(self, experts: list[LinearStats]) -> list[Tensor]:
        """`(groups, in, in)` per expert."""
        if not self.glas:
            return [s.hessian[None] for s in experts]
        guided = [s.guided for s in experts if s.guided is not None]
        if len(guided) < len(experts):
            raise DataError(
                f"mobie: {len(experts) - len(guided)} of {len(experts)} matrices have no Hessian weighted by loss "
                "gradients, expected one each; calibrate with gradients, or set glas to false"
            )
        return guided

    def _null_space_gram(self, pooled: LinearStats) -> Tensor:
        if self.null_space == "tokens":
            return pooled.hessian
        if pooled.mean_gram is None:
            raise UnsupportedError(
                "mobie: null_space position_mean needs inputs by sequence, got rows without sequences; "
                "quantize a model, or use null_space tokens"
            )
        return pooled.mean_gram
