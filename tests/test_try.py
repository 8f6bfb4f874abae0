from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mobie.cli import main
from mobie.config import build_method
from mobie.errors import DataError
from mobie.methods.base import BankStats, ExpertBank, LinearStats
from mobie.try_method import (
    arrange_gradients,
    arrange_inputs,
    load_array,
    relative_errors,
    round_trip,
    try_method,
)

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((16, 24)).astype(np.float32)
BANK = RNG.standard_normal((3, 16, 24)).astype(np.float32)
ROWS = RNG.standard_normal((40, 24)).astype(np.float32)
SEQUENCES = RNG.standard_normal((5, 8, 24)).astype(np.float32)
PER_EXPERT = RNG.standard_normal((3, 40, 24)).astype(np.float32)


def save(folder: Path, **arrays: np.ndarray) -> dict[str, str]:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in arrays}


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["try", *arguments])


def expected_errors(weight: np.ndarray, quantized: np.ndarray, inputs: list[np.ndarray]) -> tuple[float, float]:
    """The definitions, written with einsum in float64."""
    w, q = (a.astype(np.float64).reshape(-1, *a.shape[-2:]) for a in (weight, quantized))
    x = [np.asarray(part, dtype=np.float64) for part in inputs]
    error = np.concatenate([np.einsum("ti,oi->to", part, a - b).ravel() for part, a, b in zip(x, w, q, strict=True)])
    power = np.concatenate([np.einsum("ti,oi->to", part, a).ravel() for part, a in zip(x, w, strict=True)])
    return np.linalg.norm(error) / np.linalg.norm(power), np.linalg.norm(w - q) / np.linalg.norm(w)


@pytest.mark.parametrize(
    ("weight", "inputs", "per_expert"),
    [
        (MATRIX, ROWS, [ROWS]),
        (MATRIX, SEQUENCES, [SEQUENCES.reshape(-1, 24)]),
        (BANK, ROWS, [ROWS] * 3),
        (BANK, SEQUENCES, [SEQUENCES.reshape(-1, 24)] * 3),
        (BANK, PER_EXPERT, list(PER_EXPERT)),
    ],
    ids=["matrix", "matrix-sequences", "bank", "bank-sequences", "bank-per-expert"],
)
@pytest.mark.parametrize("method", ["fp16", "rtn-w3", "gptq-w2", "awq-w3", "billm", "arb-llm", "mobie"])
def test_json_gives_the_errors_of_what_was_written(tmp_path: Path, method, weight, inputs, per_expert) -> None:
    paths = save(tmp_path, W=weight, X=inputs)
    out = tmp_path / "Q.npy"
    result = invoke(method, "--weight", paths["W"], "--inputs", paths["X"], "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    quantized = np.load(out)
    assert quantized.shape == weight.shape and quantized.dtype == np.float32
    output_error, weight_error = expected_errors(weight, quantized, per_expert)
    assert found["output_error"] == pytest.approx(output_error, rel=1e-6)
    assert found["weight_error"] == pytest.approx(weight_error, rel=1e-6)
    assert found["shape"] == list(weight.shape)
    assert found["method"] == method
    assert 0 < found["bits"]["codes"] <= found["bits"]["stored"]
    assert found["seconds"] >= 0
    assert 0 < found["weight_error"] < 1


def test_sixteen_bits_lose_no_more_than_bfloat16_rounding(tmp_path: Path) -> None:
    paths = save(tmp_path, W=MATRIX, X=ROWS)
    found = json.loads(invoke("fp16", "--weight", paths["W"], "--inputs", paths["X"], "--json").stdout)
    assert found["bits"] == {"paper": 16.0, "codes": 16.0, "stored": 16.0}
    assert found["weight_error"] < 2**-8
    exact = torch.from_numpy(MATRIX).bfloat16().float().numpy()
    assert found["weight_error"] == pytest.approx(np.linalg.norm(MATRIX - exact) / np.linalg.norm(MATRIX), rel=1e-5)


def test_a_person_reads_the_same_figures(tmp_path: Path) -> None:
    paths = save(tmp_path, W=MATRIX, X=ROWS)
    arguments = ("rtn-w3", "--weight", paths["W"], "--inputs", paths["X"])
    text, found = invoke(*arguments).stdout, json.loads(invoke(*arguments, "--json").stdout)
    assert f"{found['output_error']:.6f}" in text
    assert f"{found['bits']['stored']:.4f}" in text


def test_what_is_measured_has_gone_through_bytes_and_back() -> None:
    weight, inputs = torch.from_numpy(BANK), torch.from_numpy(ROWS)
    for name, options in (("gptq", {"bits": 3}), ("billm", {}), ("mobie", {"glas": False})):
        stats = LinearStats.from_inputs(inputs)
        packed = build_method(name, options).quantize_experts(
            ExpertBank({"weight": weight}, (("weight",),)), BankStats({"weight": [stats] * 3}, {"weight": stats})
        )["weight"]
        again = round_trip(packed)
        assert again is not packed
        assert torch.equal(again.dequantize(), packed.dequantize())
        assert again.ledger() == packed.ledger()


def test_gradients_steer_glas_and_their_absence_is_said() -> None:
    method = build_method("mobie", {})
    weight, inputs = torch.from_numpy(BANK), torch.from_numpy(ROWS)
    gradients = (
        torch.from_numpy(RNG.standard_normal((3, 40, 16)).astype(np.float32)) * torch.logspace(-2, 2, 40)[:, None]
    )
    without, first = try_method("mobie", method, weight, inputs)
    _, unit = try_method(
        "mobie", build_method("mobie", {"gradient_at": "output"}), weight, inputs, torch.ones(3, 40, 16)
    )
    with_them, second = try_method("mobie", method, weight, inputs, gradients)
    assert any("--gradients" in note for note in without.notes)
    assert not with_them.notes
    assert torch.equal(first, unit)  # unit weights are what gradients of one give
    assert not torch.equal(first, second)
    ignored, _ = try_method("rtn-w3", build_method("rtn", {"bits": 3}), weight, inputs, gradients)
    assert any("no effect" in note for note in ignored.notes)


def test_gradients_for_all_experts_at_once_mean_the_same_for_each() -> None:
    method = build_method("mobie", {})
    weight, inputs = torch.from_numpy(BANK), torch.from_numpy(ROWS)
    one = torch.from_numpy(RNG.standard_normal((40, 16)).astype(np.float32))
    _, shared = try_method("mobie", method, weight, inputs, one)
    _, repeated = try_method("mobie", method, weight, inputs, one.expand(3, 40, 16).contiguous())
    assert torch.equal(shared, repeated)


def test_three_dimensions_are_experts_only_where_the_numbers_agree() -> None:
    bank = torch.from_numpy(BANK)
    assert arrange_inputs(torch.ones(3, 7, 24), bank).per_expert
    assert len(arrange_inputs(torch.ones(4, 7, 24), bank).rows[0]) == 28
    assert not arrange_inputs(torch.ones(3, 7, 24), torch.from_numpy(MATRIX)).per_expert


@pytest.mark.parametrize("shape", [(39, 16), (40, 24), (2, 40, 16), (3, 40, 24)])
def test_gradients_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    weight = torch.from_numpy(BANK)
    with pytest.raises(DataError, match="gradients have shape"):
        arrange_gradients(torch.ones(shape), arrange_inputs(torch.from_numpy(ROWS), weight), weight)


def test_inputs_that_the_weight_cancels_are_refused() -> None:
    weight = torch.tensor([[0.0, 1.0]])
    with pytest.raises(DataError, match="undefined"):
        relative_errors(weight, weight, arrange_inputs(torch.tensor([[1.0, 0.0]]), weight))


def bad(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.flat[3] = value
    return copy


@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        (bad(MATRIX, np.nan), ROWS, "weight has 1 of 384 values that are NaN"),
        (MATRIX, bad(ROWS, np.inf), "inputs has 1 of 960"),
        (MATRIX.astype(np.float64) * 1e300, ROWS, "infinite in float32"),
        (MATRIX, ROWS[:, :20], r"width 20, the weight \(16, 24\) takes 24"),
        (MATRIX, ROWS[:0], r"shape \(0, 24\), expected at least one value"),
        (BANK, PER_EXPERT[:, :0], r"shape \(3, 0, 24\)"),
        (MATRIX.astype(np.int64), ROWS, "type int64, expected float16"),
        (MATRIX[0], ROWS, r"shape \(24,\), expected 2 or 3 dimensions"),
        (MATRIX, ROWS[None, None], r"expected 2 or 3 dimensions"),
        (MATRIX * 0, ROWS, "only zeros"),
        (MATRIX.astype(object), ROWS, "weight cannot be read"),
    ],
)
def test_bad_arrays_are_refused_without_a_traceback(tmp_path: Path, weight, inputs, message: str) -> None:
    paths = save(tmp_path, W=weight, X=inputs)
    result = invoke("rtn-w3", "--weight", paths["W"], "--inputs", paths["X"], "--out", str(tmp_path / "Q.npy"))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    with pytest.raises(DataError, match=message):
        w = load_array(Path(paths["W"]), "the weight", (2, 3))
        arrange_inputs(load_array(Path(paths["X"]), "the inputs", (2, 3)), w)
    assert not (tmp_path / "Q.npy").exists()


def test_a_truncated_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    paths = save(tmp_path, W=MATRIX, X=ROWS)
    Path(paths["W"]).write_bytes(Path(paths["W"]).read_bytes()[:-100])
    for path in (paths["W"], str(tmp_path / "nothing.npy")):
        result = invoke("rtn-w3", "--weight", path, "--inputs", paths["X"])
        assert result.exit_code == 2
        assert path in result.stderr


def test_an_unknown_method_is_refused_with_near_names(tmp_path: Path) -> None:
    paths = save(tmp_path, W=MATRIX, X=ROWS)
    result = invoke("gtpq-w3", "--weight", paths["W"], "--inputs", paths["X"])
    assert result.exit_code == 2
    assert "did you mean gptq-w3" in result.stderr


def test_a_full_disk_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save(tmp_path, W=MATRIX, X=ROWS)
    out = tmp_path / "Q.npy"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = invoke("rtn-w3", "--weight", paths["W"], "--inputs", paths["X"], "--out", str(out))
    assert result.exit_code == 2
    assert "free some space" in result.stderr
    assert out.read_bytes() == b"old"
