"""Tables of tile sizes, one file per GPU, and how a launch's sizes follow from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from mobie.cli import main
from mobie.errors import ConfigError
from mobie.kernels import tune, tuning
from mobie.kernels.tuning import Choice


def write(folder: Path, name: str, gpu: str, sizes: dict[str, dict[str, int]]) -> None:
    text = yaml.safe_dump({"gpu": gpu, "measured": True, "kernels": {"binary_grouped": sizes}})
    (folder / name).write_text(text)


def test_every_file_of_the_package_is_a_table() -> None:
    """All shape classes have sizes in the default, and no GPU's file names another class."""
    classes = {("binary_grouped", f"{a}-{tile}") for a in ("16bit", "int8") for tile in (8, 16, 64)}
    default = tuning.read_table(tuning.DEFAULT)
    assert classes <= set(default.sizes) and not default.measured
    for path in tuning.FOLDER.glob("*.yaml"):
        assert set(tuning.read_table(path).sizes) <= set(default.sizes)


def test_the_longest_matching_name_wins_and_the_default_fills_up(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text(tuning.DEFAULT.read_text())
    write(tmp_path, "h100.yaml", "H100", {"16bit-8": {"rows": 64, "warps": 4, "stages": 1}})
    write(tmp_path, "h100-pcie.yaml", "H100 PCIe", {"16bit-8": {"rows": 64, "warps": 4, "stages": 4}})
    default = tuning.read_table(tuning.DEFAULT)
    for name, stages in (("NVIDIA H100 80GB HBM3", 1), ("NVIDIA H100 PCIe", 4)):
        table = tuning.table_for(name, tmp_path)
        assert table.measured and table.sizes["binary_grouped", "16bit-8"] == Choice(64, 4, stages)
        assert table.sizes["binary_grouped", "int8-64"] == default.sizes["binary_grouped", "int8-64"]
    assert tuning.table_for("NVIDIA A100", tmp_path) == default


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"rows": 96, "warps": 4, "stages": 1}, "rows is 96, expected a power of two from 1 to 512"),
        ({"rows": 64, "warps": 4, "stages": 0}, "stages is 0, expected a number from 1 to 8"),
        ({"rows": 64, "warps": True, "stages": 1}, "warps is True"),
        ({"rows": 64, "warps": 8, "stages": 1}, "64 rows for 8 warps, expected at least 128"),
        ({"rows": 64, "warps": 4}, "expected the keys rows, stages, warps"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(tmp_path: Path, sizes: dict[str, int], told: str) -> None:
    write(tmp_path, "bad.yaml", "A100", {"16bit-8": sizes})
    with pytest.raises(ConfigError, match=f"bad.yaml: binary_grouped, 16bit-8.*{told}"):
        tuning.read_table(tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["", "gpu: [", "gpu: H100\n", "- 1"])
def test_files_that_are_no_table_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        tuning.read_table(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("rows", "copies", "multiprocessors", "expected"),
    [
        (1408, 100, 132, 256),  # 600 programs
        (1408, 16, 132, 128),  # 96 programs of 256 rows, 176 of 128
        (1408, 8, 132, 64),  # 88 of 128
        (1408, 1, 132, 64),  # few whatever is done
        (100, 1000, 132, 128),  # half of 256 rows would be empty
        (20, 1000, 132, 64),  # never fewer than 16 rows per warp
    ],
)
def test_rows_follow_the_matrix_and_the_gpu(rows: int, copies: int, multiprocessors: int, expected: int) -> None:
    assert tuning.fit_rows(Choice(256, 4, 2), rows, copies, multiprocessors) == Choice(expected, 4, 2)


def test_shape_classes() -> None:
    assert [tuning.shape_class("int8", tile) for tile in (8, 16, 32, 64, 128)] == [
        "int8-8",
        "int8-16",
        "int8-64",
        "int8-64",
        "int8-64",
    ]


def test_tuned_sizes_are_written_as_a_table_that_reads_back(tmp_path: Path) -> None:
    best = {"16bit-8": tune.Measured("16bit-8", Choice(128, 4, 3), 12.5)}
    path = tmp_path / "gpu.yaml"
    path.write_text(tune.as_yaml("NVIDIA X", best, torch.bfloat16))
    assert tuning.read_table(path) == tuning.Table("NVIDIA X", True, {("binary_grouped", "16bit-8"): Choice(128, 4, 3)})


def test_candidates_can_be_written() -> None:
    for tile in (8, 16, 64):
        found = tune.candidates(tile)
        assert len(found) >= 12 and len(set(found)) == len(found)
        for choice in found:
            assert Choice.read({"rows": choice.rows, "warps": choice.warps, "stages": choice.stages}, "") == choice


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter; test_tuning_on_a_gpu is for GPUs")
def test_every_candidate_is_launched_on_every_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop around the clock, in the interpreter: one that does not fit is told, the others have their times."""
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources

    for name, size in dict(EXPERTS=5, PARTS=1, ROWS=40, COLUMNS=128, EXTRA=32, ROTATED_BYTES=0).items():
        monkeypatch.setattr(tune, name, size)
    choices = [Choice(64, 4, 1), Choice(64, 4, 8), Choice(128, 4, 1)]
    monkeypatch.setattr(tune, "candidates", lambda tile: choices)
    clock = iter([7.0, None, 3.0])

    def median(launch: Callable[[], None]) -> float:
        launch()
        microseconds = next(clock)
        if microseconds is None:
            raise OutOfResources(2, 1, "shared memory")
        return microseconds

    monkeypatch.setattr(tune, "median_microseconds", median)
    found = list(tune.measure("int8", 8, torch.bfloat16, device="cpu"))
    assert [(m.shape, m.choice, m.microseconds) for m in found] == [
        ("int8-8", choice, time) for choice, time in zip(choices, (7.0, None, 3.0), strict=True)
    ]
    assert tune.bandwidth(found[0]) == pytest.approx(5 * 40 * 128 / 8 / 7e-6 / 1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_tuning_without_a_gpu_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tune", "--folder", str(tmp_path)])
    assert result.exit_code == 2 and "run this on the GPU's machine" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates of one small case are timed, and the file is found for this GPU."""
    monkeypatch.setattr(tune, "EXPERTS", 8)
    monkeypatch.setattr(tune, "ROTATED_BYTES", 1e6)
    monkeypatch.setattr(tune, "candidates", lambda tile: [Choice(128, 8, 1), Choice(128, 4, 2)])
    (tmp_path / "default.yaml").write_text(tuning.DEFAULT.read_text())
    path = tune.tune(tmp_path)
    assert tuning.read_table(path).measured
    assert tuning.table_for(torch.cuda.get_device_name(), tmp_path).measured
