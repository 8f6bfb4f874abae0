"""Tables of tile sizes, one file per GPU; how a launch's sizes follow from them, and how they are measured."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny import CONFIGS

from mobie.cli import main
from mobie.errors import ConfigError
from mobie.kernels import tune, tuning
from mobie.kernels.tune import Case, Found
from mobie.kernels.tuning import Sizes

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
#: a name that no table has, so that only tests find the sizes
GPU = "NVIDIA X"


def write(folder: Path, name: str, gpu: str, kernels: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({"gpu": gpu, "measured": True, "kernels": kernels}))
    return path


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_file_of_the_package_is_a_table() -> None:
    default = tuning.read_table(tuning.DEFAULT)
    assert list(default.sizes) == tuning.shape_classes() and default.gpu == "any" and not default.measured
    for path in tuning.FOLDER.glob("*.yaml"):
        assert tuning.read_table(path).measured == (path != tuning.DEFAULT)


def test_the_longest_matching_name_wins_and_the_default_fills_up(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text(tuning.DEFAULT.read_text())
    for name, gpu, stages in (("h100.yaml", "H100", 1), ("h100-pcie.yaml", "H100 PCIe", 4)):
        sizes = {"rows": 64, "warps": 4, "stages": stages}
        write(tmp_path, name, gpu, {"binary_grouped": {"16bit-8": sizes}})
    default = tuning.read_table(tuning.DEFAULT)
    for name, stages in (("NVIDIA H100 80GB HBM3", 1), ("NVIDIA H100 PCIe", 4)):
        table = tuning.table_for(name, tmp_path)
        assert table.measured and table.sizes["binary_grouped", "16bit-8"] == Sizes(64, 4, stages)
        others = [key for key in default.sizes if table.sizes[key] == default.sizes[key]]
        assert len(others) == len(default.sizes) - 1
    assert tuning.table_for("NVIDIA A100", tmp_path) == default


@pytest.mark.parametrize(
    ("kernel", "shape", "sizes", "told"),
    [
        ("binary_grouped", "16bit-8", {"rows": 96}, "rows is 96, expected a power of two from 16 to 512"),
        ("binary_grouped", "16bit-8", {"stages": 0}, "stages is 0, expected a number from 1 to 8"),
        ("binary_grouped", "16bit-8", {"warps": True}, "warps is True"),
        ("binary_grouped", "16bit-8", {"warps": 8}, "64 rows for 8 warps, expected at least 128"),
        ("binary_grouped", "16bit-8", {"block_k": 64}, "expected the keys rows, warps, stages"),
        ("dense_grouped", "16bit-64", {}, "expected the keys rows, warps, stages, block_k"),
        (
            "panel",
            "int8-few",
            {"tokens": 16, "slices": 1, "block_k": 64},
            "expected the keys rows, warps, stages, tokens",
        ),
        ("panel", "16bit-many", {"tokens": 4, "block_k": 64}, "tokens is 4, expected a power of two from 8 to 256"),
        ("route", "16bit-few", {"rows": 16, "tokens": 8, "slices": 2, "block_k": 64}, "4 warps, expected at least 32"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(
    tmp_path: Path, kernel: str, shape: str, sizes: dict[str, int], told: str
) -> None:
    sizes = {"rows": 64, "warps": 4, "stages": 1} | sizes
    path = write(tmp_path, "bad.yaml", "A100", {kernel: {shape: sizes}})
    with pytest.raises(ConfigError, match=f"bad.yaml: {kernel}, {shape}.*{told}.*mobie tune"):
        tuning.read_table(path)


@pytest.mark.parametrize(
    ("kernels", "told"),
    [
        ({"panle": {}}, "unknown kernel 'panle'; did you mean panel"),
        ({"route": {"16bit-fwe": {}}}, "route: unknown shape class '16bit-fwe'; did you mean 16bit-few"),
        ({"route": {16: {}}}, "unknown shape class '16'"),
        ({"route": None}, "expected kernel → shape class → sizes"),
        (None, "expected kernel → shape class → sizes"),
        ({"route": {"16bit-few": [1]}}, r"route, 16bit-few: got \[1\]"),
    ],
)
def test_names_that_no_kernel_has_are_refused(tmp_path: Path, kernels: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=f"bad.yaml.*{told}.*mobie tune"):
        tuning.read_table(write(tmp_path, "bad.yaml", "A100", kernels))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpu: [",
        "gpu: H100\n",
        "- 1",
        "{gpu: '', measured: true, kernels: {}}",
        "{gpu: A, measured: 1, kernels: {}}",
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad.yaml(.|\n)*mobie tune"):
        tuning.read_table(tmp_path / "bad.yaml")


def test_a_default_without_a_shape_class_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load(tuning.DEFAULT.read_text())
    del content["kernels"]["panel"]["tall-int8"]
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="default.yaml: no sizes for panel tall-int8"):
        tuning.table_for("NVIDIA A100", tmp_path)


# --- sizes of a launch -----------------------------------------------------------------------------------------------


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
    sizes = Sizes(256, 4, 2, block_k=64)
    assert tuning.fit_rows(sizes, rows, copies, multiprocessors) == replace(sizes, rows=expected)


def test_tokens_follow_the_batch_in_decoding() -> None:
    sizes = Sizes(16, 4, 3, tokens=32)
    found = [tuning.fit_tokens(sizes, tokens).tokens for tokens in (1, 8, 9, 16, 17, 64, 65, 1000)]
    assert found == [8, 8, 16, 16, 32, 32, 32, 32]
    assert [tuning.few_or_many(tokens) for tokens in (1, 64, 65)] == ["few", "few", "many"]


def test_shape_classes() -> None:
    found = [tuning.shape_class("int8", tile) for tile in (8, 16, 32, 64, 128)]
    assert found == ["int8-8", "int8-16", "int8-64", "int8-64", "int8-64"]


def test_a_trial_is_for_one_shape_class_and_ends() -> None:
    device, sizes = torch.device("cpu"), Sizes(32, 2, 7)
    default = tuning.default_table().sizes
    with pytest.raises(RuntimeError, match="over"), tuning.trial("route", "16bit-few", sizes):
        assert tuning.sizes_for("route", "16bit-few", device) == sizes
        assert tuning.sizes_for("route", "16bit-many", device) == default["route", "16bit-many"]
        raise RuntimeError("over")
    assert tuning.sizes_for("route", "16bit-few", device) == default["route", "16bit-few"]


# --- measuring -------------------------------------------------------------------------------------------------------

#: kernel → its modules' functions that take the sizes
LAUNCHED = {
    "binary_grouped": ("binary_grouped_kernel",),
    "dense_grouped": ("_dense_grouped",),
    "panel": ("_panel_few", "_panel_many"),
    "binary_linear": ("_binary_few",),
    "route": ("_logits",),
}


class Spy:
    """In place of a kernel: notes what it is launched with, and does nothing."""

    def __init__(self, launches: list[dict[str, Any]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **options: self.launches.append(options)


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """All cases of a tiny model whose first block is dense and whose head is tall."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "TOKENS", {8: 2, 16: 3, 64: 5})
    monkeypatch.setattr(tune, "FEW", 2)
    monkeypatch.setattr(tune, "MANY", 65)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tune.block_cases(CONFIGS["deepseek_v2"](vocab_size=2**14), device, torch.bfloat16)


def test_cases_are_launched_with_the_sizes_on_trial(tiny_cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape class has cases, and each case launches its own kernel with its class's sizes."""
    launches: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in LAUNCHED}
    for kernel, names in LAUNCHED.items():
        module = importlib.import_module(f"mobie.kernels.triton_ops.{kernel}")
        for name in names:
            monkeypatch.setattr(module, name, Spy(launches[kernel]))
    assert {(case.kernel, case.shape) for case in tiny_cases} == set(tuning.shape_classes())
    sizes = Sizes(16, 1, 7, tokens=8, block_k=32, slices=2)
    for case in tiny_cases:
        with tuning.trial(case.kernel, case.shape, sizes):
            case.run()
        (options,) = launches[case.kernel]
        launches[case.kernel].clear()
        names = tuning.KERNELS[case.kernel][case.shape]
        assert (options["num_warps"], options["num_stages"]) == (1, 7)
        assert options.get("ROWS", options.get("EXPERTS")) == 16
        assert "block_k" not in names or options["BLOCK_K"] == 32
        assert "slices" not in names or options["SLICES"] == 2 // options.get("PARTS", 1)
        assert "tokens" not in names or options["TOKENS"] * options.get("SLOTS", 1) == 8
    assert not any(launches.values())


@pytest.mark.parametrize("key", tuning.shape_classes(), ids=" ".join)
def test_the_search_finds_the_least_time_and_tries_only_what_a_file_can_hold(
    key: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two cases whose times fall with the stages, the columns of a step and the slices."""
    tried: list[Sizes] = []
    names = tuning.KERNELS[key[0]][key[1]]

    def work(sizes: Sizes) -> int:
        return math.prod(getattr(sizes, name) for name in names if name in ("stages", "block_k", "slices"))

    def microseconds(run: Callable[[], float]) -> float:
        sizes = tuning.sizes_for(*key, torch.device("cpu"))
        tried.append(sizes)
        Sizes.read({name: getattr(sizes, name) for name in names}, names, "")
        return run() / work(sizes)

    monkeypatch.setattr(tune, "microseconds", microseconds)
    found = tune.search(key, [lambda: 2.0, lambda: 8.0])
    assert found is not None and work(found.sizes) == max(map(work, tried))
    assert found.sizes.stages == max(tune.GRID["stages"])
    assert "block_k" not in names or found.sizes.block_k == max(tune.THEN["block_k"])
    assert found.microseconds == pytest.approx(4 / work(found.sizes))
    assert found.default_microseconds == pytest.approx(4 / work(tuning.default_table().sizes[key]))
    assert len(set(tried)) >= 12 and len(tried) == 2 * len(set(tried))


def test_binary_and_dense_experts_are_searched_alike() -> None:
    """The same combinations; the dense kernel has one size more."""
    binary, dense = (list(tune.steps((kernel, "16bit-8"))) for kernel in ("binary_grouped", "dense_grouped"))
    assert binary == [tune.GRID] and dense == [tune.GRID, {"block_k": tune.THEN["block_k"]}]


def test_sizes_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case that does not fit is enough, and the others are then not timed; where nothing fits, there is nothing."""
    key = ("binary_grouped", "16bit-8")
    timed: list[Sizes] = []

    def microseconds(run: Callable[[], bool]) -> float | None:
        sizes = tuning.sizes_for(*key, torch.device("cpu"))
        timed.append(sizes)
        return 5.0 + sizes.stages if sizes.rows < 128 or run() else None

    monkeypatch.setattr(tune, "microseconds", microseconds)
    found = tune.search(key, [lambda: False, lambda: True])
    assert found == Found(Sizes(64, 4, 1), pytest.approx(6.0), None)
    assert timed.count(Sizes(128, 4, 3)) == 1 and timed.count(Sizes(64, 4, 1)) == 2
    monkeypatch.setattr(tune, "microseconds", lambda run: None)
    assert tune.search(key, [lambda: None]) is None
    assert "none of the sizes fits" in tune.told(key, None)


def test_cases_are_of_all_four_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of true width, and of so many blocks that the last one has experts."""
    monkeypatch.setattr(tune, "block_cases", lambda config, device, dtype: [(config, device, dtype)])
    configs = {config.model_type: config for config, *_ in tune.model_cases("cuda", torch.bfloat16)}
    assert set(configs) == {"olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe"}
    assert {config.hidden_size for config in configs.values()} == {2048}
    assert configs["deepseek_v2"].first_k_dense_replace < configs["deepseek_v2"].num_hidden_layers == 2


def test_geometric_mean() -> None:
    assert tune.geometric_mean(iter([1.0, 10.0, 100.0])) == pytest.approx(10.0)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and its clock; every class has one case."""
    cases = [Case(*key, lambda: None) for key in tuning.shape_classes()]
    monkeypatch.setattr(tune, "_gpu", lambda: GPU)
    monkeypatch.setattr(tune, "versions", lambda: "driver 1, triton 2, torch 3")
    monkeypatch.setattr(tune, "model_cases", lambda device, dtype: cases)
    monkeypatch.setattr(tune, "microseconds", lambda run: 7.0)


@pytest.mark.usefixtures("pretended")
def test_the_file_that_is_written_is_found_and_keeps_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "default.yaml").write_text(tuning.DEFAULT.read_text())
    lines: list[str] = []
    path = tune.tune(tmp_path, say=lines.append)
    default = tuning.default_table()
    assert path.name == "nvidia-x.yaml" and len(lines) == len(default.sizes)
    assert tuning.table_for(GPU, tmp_path) == tuning.Table(GPU, True, default.sizes)  # all equal: the default stays
    text = path.read_text()
    assert "driver 1, triton 2, torch 3" in text and "route 16bit-few: 7.0 us; default sizes: 7.0 us" in text

    monkeypatch.setattr(tune, "GRID", {"rows": (64,), "warps": (1,), "stages": (8,)})
    monkeypatch.setattr(
        tune, "microseconds", lambda run: 7.0 - tuning.sizes_for("route", "16bit-few", torch.device("cpu")).stages / 2
    )
    tune.tune(tmp_path, ["route"], say=lines.append)
    table = tuning.table_for(GPU, tmp_path).sizes
    assert table["route", "16bit-few"].stages == 8
    assert {key for key in table if table[key] != default.sizes[key]} == {("route", "16bit-few")}
    tune.tune(tmp_path, ["binary_linear"], say=lines.append)
    assert tuning.table_for(GPU, tmp_path).sizes["route", "16bit-few"].stages == 8
    assert "Kept from an earlier run: binary_grouped 16bit-8," in path.read_text()
    with pytest.raises(ConfigError, match="unknown kernel 'rout'; did you mean route"):
        tune.tune(tmp_path, ["rout"])


@pytest.mark.usefixtures("pretended")
def test_what_was_measured_before_an_error_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(key: tuple[str, str], runs: list[Any]) -> Found:
        if key[0] == "panel":
            raise RuntimeError("the GPU is gone")
        return Found(tuning.default_table().sizes[key], 1.0, 1.0)

    monkeypatch.setattr(tune, "search", search)
    with pytest.raises(RuntimeError, match="gone"):
        tune.tune(tmp_path, say=lambda line: None)
    kernels = {kernel for kernel, _ in tuning.read_table(tmp_path / "nvidia-x.yaml").sizes}
    assert kernels == {"binary_grouped", "dense_grouped"}


@WITHOUT_GPU
def test_tuning_without_a_gpu_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tune", "--folder", str(tmp_path)])
    assert result.exit_code == 2 and "run this on the GPU's machine" in result.output
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_kernel() -> None:
    shown = CliRunner().invoke(main, ["tune", "--help"]).output
    assert all(kernel in shown for kernel in tuning.KERNELS)


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_cases: list[Case]) -> None:
    """Two candidates of every class are timed on tiny models, and the file is found for this GPU."""
    monkeypatch.setattr(tune, "GRID", {"rows": (64,), "warps": (4,), "stages": (1, 2)})
    monkeypatch.setattr(tune, "THEN", {})
    monkeypatch.setattr(tune, "model_cases", lambda device, dtype: tiny_cases)
    (tmp_path / "default.yaml").write_text(tuning.DEFAULT.read_text())
    path = tune.tune(tmp_path)
    assert set(tuning.read_table(path).sizes) == set(tuning.shape_classes())
    assert tuning.table_for(torch.cuda.get_device_name(), tmp_path).measured
    assert "default sizes: do not fit" not in path.read_text()
