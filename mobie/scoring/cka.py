"""How alike the experts of a layer are, before and after the joint decomposition (Figure 2): linear CKA.

Linear Centered Kernel Alignment (Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019)
of X `(samples, p)` and Y `(samples, q)`, each feature centred to mean 0 over the samples:

    CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)    Frobenius norms; equally ⟨X Xᵀ, Y Yᵀ⟩ / (‖X Xᵀ‖ ‖Y Yᵀ‖)

It is 1 for equal matrices, and does not change when the features of one are rotated, reordered, or scaled together.

The matrices are those of Figure 2: an expert's weight W_e before; after, its factor V_e of `W_e = U Σ V_e` (eq. 4),
once exact and once as the checkpoint stores it, binarized and with everything that was done to its scales. The paper
does not say which axis holds the samples; `CkaProtocol.samples` names the readings, and all of them go into a record.

CKA of wide matrices is not 0 by chance: independent Gaussian matrices with n samples and p features come to
p / (n + p) (`chance_level`), the `chance` of every measurement here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mobie.errors import MeasurementError, UnsupportedError
from mobie.records import Measurement
from mobie.scoring.protocol import Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mobie.packing.base import Packed
    from mobie.packing.checkpoint import PackedBlock

Samples = Literal["residual", "inputs", "outputs"]
#: projection → stage → CKA matrix `(experts, experts)` and chance level, of one layer
Layer = Mapping[str, Mapping[str, tuple["Tensor", float]]]
STAGES = ("before", "after", "after_binarized")
#: projections whose matrices go into the record, of the first, middle and last MoE layer
SHOWN = "gate"
DIGITS = 4
SLAB = 128  # samples whose rows of all kernels are held at a time


class CkaProtocol(Protocol):
    """Everything that decides a CKA.

    samples: `residual`: the axis that all experts share, which is the residual stream's: the inputs of gate and up,
             the outputs of down. The default: the other axis counts an expert's own hidden units, whose order is
             arbitrary, and CKA is blind to an order of features only.
             `inputs`, `outputs`: columns, or rows, of every projection.

    Where the basis U Σ took the place of the samples' axis (down under `residual`), the samples of V_e are singular
    directions. Their signs are a convention (`joint_svd`'s), and centring depends on it a little.
    """

    samples: Samples = "residual"


@dataclass(frozen=True)
class Cka:
    """Means over pairs of experts, the standard deviations over those pairs by the same names, and some matrices.

    matrices: `layer{l}.gate` → stage → `(experts, experts)`, rounded to four digits.
    readings: choice of samples → name → mean, for the names that span all layers.
    """

    measurements: list[Measurement]
    spread: dict[str, float]
    matrices: dict[str, dict[str, list[list[float]]]]
    readings: dict[str, dict[str, float]]


def stored_blocks(checkpoint: Path) -> Iterator[PackedBlock]:
    """Packed decoder blocks of a checkpoint in order, one in memory at a time. Raises `DataError` for a damaged one."""
    from mobie.packing.checkpoint import block_path, load_block, read_manifest

    for index in range(read_manifest(checkpoint)["blocks"]):
        yield load_block(block_path(checkpoint, index)).block


def cka(blocks: Iterable[tuple[PackedBlock, PackedBlock]], protocol: CkaProtocol) -> Cka:
    """Compare the experts of every MoE layer with one another.

    Args:
        blocks: decoder blocks in order, of the full-precision and of the quantized checkpoint; read one by one.

    Returns, per MoE layer l in order and per projection, `layer{l}.{projection}.{stage}` for the three `STAGES`: the
    mean CKA of pairs of different experts (`n` pairs, no standard error: all pairs there are were taken). Then
    `{projection}.{stage}` over all layers, and `{stage}` over all projections too.

    Raises:
        UnsupportedError: no MoE layer, one expert only, or experts without a shared basis.
        MeasurementError: a matrix is constant over its samples, so that its CKA is 0 / 0.
    """
    layers: dict[Samples, list[Layer]] = {samples: [] for samples in get_args(Samples)}
    for reference, quantized in blocks:
        if quantized.experts:
            banks = _banks(reference, quantized)
            for samples, found in layers.items():
                found.append(_layer(f"layer{len(found)}", banks, samples))
    chosen = layers[protocol.samples]
    if not chosen:
        raise UnsupportedError("the checkpoint has no experts, expected a mixture of experts")
    measurements, spread = _summaries(chosen)
    return Cka(
        measurements,
        spread,
        matrices={
            f"layer{index}.{SHOWN}": {stage: _rounded(matrix) for stage, (matrix, _) in chosen[index][SHOWN].items()}
            for index in dict.fromkeys((0, len(chosen) // 2, len(chosen) - 1))
        },
        readings={
            samples: {m.name: m.value for m in _summaries(found)[0] if not m.name.startswith("layer")}
            for samples, found in layers.items()
        },
    )


def _banks(reference: PackedBlock, quantized: PackedBlock) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Projection → the banks `(experts, out, in)` of the three stages."""
    from mobie.packing.bank import split_gate_up

    weights = split_gate_up({name: packed.dequantize() for name, packed in reference.experts.items()})
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, packed in quantized.experts.items():
        factors |= expert_factors(name, packed, weights)
    return {projection: (weight, *factors[projection]) for projection, weight in weights.items()}


def _layer(where: str, banks: Mapping[str, Sequence[Tensor]], samples: Samples) -> Layer:
    return {
        projection: {
            stage: _compared(f"{where}.{projection}.{stage}", bank, _rows(projection, samples))
            for stage, bank in zip(STAGES, stages, strict=True)
        }
        for projection, stages in banks.items()
    }


def _rows(projection: str, samples: Samples) -> bool:
    """Whether the samples are the rows of a projection `(out, in)`, else its columns."""
    return samples == "outputs" or (samples == "residual" and projection == "down")


def expert_factors(name: str, packed: Packed, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """V_e of every expert, exact and as stored, by projection (a joint bank of gate and up holds two).

    The exact factors are those of the full-precision `weights` on the stored side and at the stored rank.

    Raises:
        UnsupportedError: the bank has no shared basis.
    """
    import torch

    from mobie.methods.mobie.cejd import joint_svd
    from mobie.packing.bank import GATE_UP, PackedBank

    if not isinstance(packed, PackedBank) or packed.basis is None:
        raise UnsupportedError(
            f"the experts' {name} has no shared basis, expected the joint decomposition of MoBiE: there is no V to "
            "compare"
        )
    projections = ("gate", "up") if name == GATE_UP else (name,)
    rank = packed.basis.shape[1 if packed.side == "left" else 0]
    _, exact = joint_svd(torch.cat([weights[projection] for projection in projections]), packed.side, rank)
    stored = torch.stack([expert.dequantize() for expert in packed.experts])
    parts = zip(exact.chunk(len(projections)), stored.chunk(len(projections)), strict=True)
    return dict(zip(projections, parts, strict=True))


def _compared(where: str, bank: Tensor, rows: bool) -> tuple[Tensor, float]:
    """CKA matrix and chance level of a bank `(experts, out, in)`."""
    features = bank if rows else bank.mT
    if len(features) < 2:
        raise UnsupportedError(f"{where}: {len(features)} expert, expected two at least")
    found = cka_matrix(features)
    if not found.isfinite().all():
        bad = (~found.diagonal().isfinite()).nonzero().flatten().tolist()
        raise MeasurementError(
            f"{where}: the matrices of experts {bad} are constant over samples or not finite, expected values that "
            "vary; look at how the model was quantized"
        )
    return found, chance_level(*features.shape[1:])


def cka_matrix(bank: Tensor) -> Tensor:
    """Linear CKA of all pairs in `(experts, samples, features)`: `(experts, experts)` float64; 0 / 0 gives NaN.

    The kernels X Xᵀ are made slab by slab: all of them at once would be `experts · samples²`.
    """
    centred = bank.double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    alignment = centred.new_zeros(len(bank), len(bank))  # ⟨X Xᵀ, Y Yᵀ⟩
    for slab in centred.split(SLAB, dim=1):
        kernel = (slab @ centred.mT).flatten(1)
        alignment += kernel @ kernel.T
    norms = alignment.diagonal().sqrt()
    return alignment / norms[:, None] / norms


def chance_level(samples: int, features: int) -> float:
    """CKA of independent Gaussian matrices, as a ratio of expectations: features / (samples + features).

    Centring leaves m = samples - 1 dimensions; with Wishart kernels of p features, E⟨K, L⟩ = m p² and
    E‖K‖² = m p (m + p + 1).
    """
    return features / (samples + features)


def _summaries(layers: Sequence[Layer]) -> tuple[list[Measurement], dict[str, float]]:
    """Measurements, and standard deviations over pairs by the same names."""
    import torch

    named: dict[str, list[tuple[Tensor, float]]] = {}
    spans: dict[str, list[tuple[Tensor, float]]] = {}
    for index, layer in enumerate(layers):
        for projection, stages in layer.items():
            for stage, (matrix, chance) in stages.items():
                part = (_pairs(matrix), chance)
                named[f"layer{index}.{projection}.{stage}"] = [part]
                spans.setdefault(f"{projection}.{stage}", []).append(part)
    for stage in STAGES:
        spans[stage] = [part for name, parts in spans.items() if name.endswith(f".{stage}") for part in parts]
    measurements, spread = [], {}
    for name, parts in (named | spans).items():
        pairs = torch.cat([values for values, _ in parts])
        chance = sum(level * len(values) for values, level in parts) / len(pairs)
        measurements.append(Measurement(name, pairs.mean().item(), None, len(pairs), chance))
        spread[name] = pairs.std(correction=0).item()
    return measurements, spread


def _pairs(matrix: Tensor) -> Tensor:
    """Entries above the diagonal."""
    rows, columns = matrix.shape
    index = matrix.new_ones(rows, columns).triu(1).bool()
    return matrix[index]


def _rounded(matrix: Tensor) -> list[list[Any]]:
    return [[round(value, DIGITS) for value in row] for row in matrix.tolist()]
