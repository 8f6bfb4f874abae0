"""One method on one matrix or one bank of experts: how large the error, how many bits, how long.

What is measured is what is stored: the packed result goes through safetensors bytes and back before it is compared.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from mobie.calibration.pooling import pool, pool_channels
from mobie.errors import DataError
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.packing.base import Packed

PROJECTION = "weight"  # name of the only projection of a bank


@dataclass(frozen=True)
class Trial:
    """What was measured.

    output_error: ‖X(W - Ŵ)ᵀ‖_F / ‖XWᵀ‖_F, over all experts of a bank together.
    weight_error: ‖W - Ŵ‖_F / ‖W‖_F.
    bits:         `paper` (the paper's formula), `codes` (codes only), `stored` (every stored byte).
    shape:        of the weight.
    inputs:       `shared` by all experts, or `per expert`.
    notes:        what a reader must know about these figures.
    """

    method: str
    output_error: float
    weight_error: float
    bits: Mapping[str, float]
    seconds: float
    shape: tuple[int, ...]
    inputs: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_array(path: Path, what: str, dimensions: tuple[int, ...]) -> Tensor:
    """Read a `.npy` file of floats as float32.

    Raises:
        DataError: no readable array, wrong type or number of dimensions, an empty dimension, NaN or infinity.
    """
    try:
        # mapped: a header that promises more than the file holds is refused before anything is allocated
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, OverflowError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: {what} cannot be read ({error}); expected a NumPy file, as written by numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        got = array.dtype if isinstance(array, np.ndarray) else "an archive of arrays"
        raise DataError(f"{path}: {what} has type {got}, expected float16, float32 or float64; convert with astype")
    if array.ndim not in dimensions:
        wanted = " or ".join(map(str, dimensions))
        raise DataError(f"{path}: {what} has shape {array.shape}, expected {wanted} dimensions")
    if array.size == 0:
        raise DataError(f"{path}: {what} has shape {array.shape}, expected at least one value in every dimension")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)  # copies, so that torch owns writable memory
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise DataError(
            f"{path}: {what} has {bad} of {array.size} values that are NaN or infinite in float32, expected finite "
            "values; check how it was exported"
        )
    if not array.any():
        raise DataError(f"{path}: {what} has only zeros, a relative error is then undefined; expected other values")
    return torch.from_numpy(array)


@dataclass(frozen=True)
class Inputs:
    """Inputs in one form.

    rows:      one `(tokens, in)` for all, or one per expert.
    sequences: `(sequences, length, in)` where the file had sequences, else None.
    """

    rows: tuple[Tensor, ...]
    sequences: Tensor | None

    @property
    def per_expert(self) -> bool:
        return len(self.rows) > 1


def arrange_inputs(inputs: Tensor, weight: Tensor) -> Inputs:
    """Match `[tokens, in]`, `[sequences, length, in]` or `[experts, tokens, in]` to a weight `[(experts,) out, in]`.

    With a bank, three dimensions of which the first is the number of experts are inputs per expert.

    Raises:
        DataError: the widths differ.
    """
    if inputs.shape[-1] != weight.shape[-1]:
        raise DataError(
            f"inputs {tuple(inputs.shape)} have width {inputs.shape[-1]}, the weight {tuple(weight.shape)} takes "
            f"{weight.shape[-1]}; expected inputs [tokens, {weight.shape[-1]}]; is one of them transposed?"
        )
    if inputs.ndim == 2:
        return Inputs((inputs,), None)
    if weight.ndim == 3 and len(inputs) == len(weight):
        return Inputs(tuple(inputs), None)
    return Inputs((inputs.flatten(0, 1),), inputs)


def arrange_gradients(gradients: Tensor | None, inputs: Inputs, weight: Tensor) -> tuple[Tensor, ...] | None:
    """Loss gradients at the outputs, `(tokens, out)` for the inputs of each expert.

    Raises:
        DataError: the shape is not that of the outputs.
    """
    if gradients is None:
        return None
    tokens, out = len(inputs.rows[0]), weight.shape[-2]
    experts = len(weight) if weight.ndim == 3 else 1
    allowed = {(tokens, out): not inputs.per_expert, (experts, tokens, out): weight.ndim == 3}
    if not allowed.get(tuple(gradients.shape), False):
        wanted = " or ".join(str(list(shape)) for shape, fits in allowed.items() if fits)
        raise DataError(
            f"gradients have shape {list(gradients.shape)}, expected {wanted}: one row per token and expert"
        )
    return tuple(gradients) if gradients.ndim == 3 else (gradients,) * experts


def _stats(inputs: Inputs, expert: int, token_weights: Tensor | None) -> LinearStats:
    stats = LinearStats.from_inputs(inputs.rows[expert if inputs.per_expert else 0], token_weights)
    if inputs.sequences is None:
        return stats
    means = inputs.sequences.mean(1)  # (sequences, in)
    return replace(stats, mean_gram=2 / len(means) * means.T @ means)


def _token_weights(
    method: Method, inputs: Inputs, expert: int, gradients: tuple[Tensor, ...] | None, basis: Tensor | None
) -> Tensor | None:
    """`(tokens, groups)` for methods that use gradients: from them, or ones."""
    if not method.needs_gradients:
        return None
    if gradients is None:
        return torch.ones(len(inputs.rows[expert if inputs.per_expert else 0]), method.gradient_groups)
    gradient = gradients[expert]
    return pool_channels(gradient if basis is None else gradient @ basis, method.gradient_groups)


def quantize_weight(method: Method, weight: Tensor, inputs: Inputs, gradients: tuple[Tensor, ...] | None) -> Packed:
    """Quantize `(out, in)` as one Linear, or `(experts, out, in)` as a bank."""
    if weight.ndim == 2:
        own = _stats(inputs, 0, _token_weights(method, inputs, 0, gradients, None))
        if isinstance(method, AllocatingMethod):
            method = method.over(LayerView({PROJECTION: weight}, {PROJECTION: own}))
        return method.quantize_linear(weight, own)
    bank = ExpertBank({PROJECTION: weight}, ((PROJECTION,),))
    basis = method.gradient_bases(bank)[PROJECTION] if method.needs_gradients and gradients else None
    experts = [
        _stats(inputs, expert, _token_weights(method, inputs, expert, gradients, basis))
        for expert in range(len(weight))
    ]
    pooled = pool(experts) if inputs.per_expert else experts[0]
    stats = BankStats({PROJECTION: experts}, {PROJECTION: pooled})
    if isinstance(method, AllocatingMethod):

        def output(expert: int, weights: Mapping[str, Tensor], most: int | None) -> Tensor:
            x = inputs.rows[expert if inputs.per_expert else 0][:most]
            return x @ weights.get(PROJECTION, weight[expert]).T

        method = method.over(LayerView(bank=bank, bank_stats=stats, expert_output=output))
    return method.quantize_experts(bank, stats)[PROJECTION]


def round_trip(packed: Packed) -> Packed:
    """The packed weight as it comes back from a file: tensors as safetensors bytes, header as JSON."""
    tensors = load(save({name: tensor.contiguous() for name, tensor in packed.tensors().items()}))
    return type(packed).from_tensors(json.loads(json.dumps(packed.header())), tensors)


def relative_errors(weight: Tensor, quantized: Tensor, inputs: Inputs) -> tuple[float, float]:
    """Output and weight error, computed in float64."""
    difference = (weight.double() - quantized.double()).reshape(-1, *weight.shape[-2:])
    original = weight.double().reshape(-1, *weight.shape[-2:])
    error = power = 0.0
    for expert, (d, w) in enumerate(zip(difference, original, strict=True)):
        x = inputs.rows[expert if inputs.per_expert else 0].double()
        error += (x @ d.T).square().sum().item()
        power += (x @ w.T).square().sum().item()
    if power == 0:
        raise DataError(
            "X Wᵀ is zero, its relative error is undefined; expected inputs that the weight does not cancel"
        )
    return (error / power) ** 0.5, (difference.norm() / original.norm()).item()


def try_method(
    name: str, method: Method, weight: Tensor, inputs: Tensor, gradients: Tensor | None = None
) -> tuple[Trial, Tensor]:
    """Quantize a weight and measure what is stored.

    Args:
        name: of the configuration, for the report.
        weight: `(out, in)` or `(experts, out, in)` float32.
        inputs: `(tokens, in)`, `(sequences, length, in)` or `(experts, tokens, in)` float32.
        gradients: `(tokens, out)` or `(experts, tokens, out)`: of the loss, at the outputs; for methods that use them.

    Returns:
        The figures and the dequantized weight.

    Raises:
        DataError: shapes do not fit.
        UnsupportedError: the method does not apply to such a weight.
    """
    arranged = arrange_inputs(inputs, weight)
    by_expert = arrange_gradients(gradients, arranged, weight)
    began = time.perf_counter()
    packed = quantize_weight(method, weight, arranged, by_expert)
    seconds = time.perf_counter() - began
    stored = round_trip(packed)
    quantized = stored.dequantize()
    output_error, weight_error = relative_errors(weight, quantized, arranged)
    ledger = stored.ledger()
    notes = []
    if method.needs_gradients and gradients is None:
        notes.append("no loss gradients given: every token has weight 1; give them with --gradients")
    if method.token_weighting == "gate":
        notes.append("there is no router here: every token has score 1")
    if method.needs_gradients is False and gradients is not None:
        notes.append("this method uses no loss gradients: --gradients had no effect")
    trial = Trial(
        method=name,
        output_error=output_error,
        weight_error=weight_error,
        bits={"paper": ledger.paper_bits, "codes": ledger.code_bits, "stored": ledger.stored_bits},
        seconds=seconds,
        shape=tuple(weight.shape),
        inputs="per expert" if arranged.per_expert else "shared",
        notes=tuple(notes),
    )
    return trial, quantized
