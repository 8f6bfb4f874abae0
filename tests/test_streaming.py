"""A job that holds one block and little else: whatever is kept in files, and wherever it is killed, the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, random_tokens, save_model
from torch import Tensor

from mobie.calibration.backward import GradientPass
from mobie.calibration.lazy import Cache, Lazy, LazyMap
from mobie.calibration.shared import GradientFolder
from mobie.calibration.store import ActivationStore, Memory
from mobie.config import build_method
from mobie.errors import ConfigError, DataError
from mobie.methods.base import Method
from mobie.models.base import ARCHITECTURES
from mobie.models.weights import StreamedModel
from mobie.pipeline import batches_of, quantize
from mobie.resources import Resources, parse_devices, parse_memory

BLOCKS = 3
TOKENS = random_tokens(9, 12)  # two batches
NOTHING_KEPT = Resources(memory=0)  # all activations and no statistics stay, in files


def mobie(**changes: Any) -> Method:
    return build_method("mobie", {"iterations": 2} | changes)


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("olmoe", num_hidden_layers=BLOCKS), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a run with everything in memory that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    quantize(source, mobie(), TOKENS, out, fingerprint="job")
    return weight_files(out)


# ---- memory and devices change nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_memory_changes_no_byte(model_type: str, tmp_path: Path) -> None:
    """With plenty, with none, and with a budget that ends in the middle; blocks may have different attention."""
    folder = save_model(make_model(model_type), tmp_path / "source")
    found = []
    for memory in (10**9, 0, 30_000):
        out = tmp_path / str(memory)
        method = mobie(null_space="position_mean")
        quantize(folder, method, TOKENS, out, fingerprint="job", resources=Resources(memory=memory))
        found.append(weight_files(out))
        assert not (out / "work").exists()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["gptq", "moequant", "mobie", "awq"])
def test_several_devices_change_no_byte(name: str, source: Path, tmp_path: Path) -> None:
    options = {"mobie": {"iterations": 2}, "gptq": {"bits": 3}, "awq": {"bits": 3, "group_size": 16}}
    options["moequant"] = {"bits": 2}
    for devices in (("cpu",), ("cpu", "cpu")):
        out = tmp_path / str(len(devices))
        resources = Resources(devices, memory=50_000)
        quantize(source, build_method(name, options[name]), TOKENS, out, fingerprint="job", resources=resources)
    assert weight_files(tmp_path / "1") == weight_files(tmp_path / "2")


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(source: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    reports = [
        quantize(source, mobie(), TOKENS, tmp_path / d, fingerprint=d, resources=Resources((d,)))
        for d in ("cpu", "cuda:0")
    ]
    for ours, reference in zip(reports[1].blocks, reports[0].blocks, strict=True):
        assert ours["tokens_per_expert"] == reference["tokens_per_expert"]
        for name, error in reference["output_error"].items():
            assert ours["output_error"][name] == pytest.approx(error, rel=0.05)


def test_a_block_at_a_time_has_values(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one block and what is outside the blocks."""
    most = 0
    block = StreamedModel.block

    @contextmanager
    def watched(self: StreamedModel, index: int) -> Iterator[Any]:
        nonlocal most
        with block(self, index) as module:
            real = {n.split(".")[2] for n, p in self.model.named_parameters() if "layers" in n and not p.is_meta}
            most = max(most, len(real))
            yield module

    monkeypatch.setattr(StreamedModel, "block", watched)
    quantize(source, mobie(), TOKENS, tmp_path, fingerprint="job", resources=NOTHING_KEPT)
    assert most == 1


def test_long_sequences_come_in_smaller_batches() -> None:
    assert [len(b) for b in batches_of(torch.zeros(9, 256))] == [8, 1]
    assert [len(b) for b in batches_of(torch.zeros(5, 2048))] == [4, 1]
    assert [len(b) for b in batches_of(torch.zeros(2, 20_000))] == [1, 1]


# ---- killed and run again --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`: nothing on the way may catch it."""


def killed_at(name: str, source: Path, out: Path, resources: Resources = NOTHING_KEPT) -> None:
    """Run a job until it would keep the tensor of a name."""
    put = ActivationStore.put

    def until(self: ActivationStore, key: str, tensor: Tensor) -> None:
        if key == name:
            raise Killed
        put(self, key, tensor)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ActivationStore, "put", until)
        quantize(source, mobie(), TOKENS, out, fingerprint="job", resources=resources)


def again(source: Path, out: Path, resources: Resources = NOTHING_KEPT) -> tuple[dict[str, bytes], set[str]]:
    """Run the job to its end; its files, and the names of what it had to compute again."""
    names = set()
    put = ActivationStore.put

    def noting(self: ActivationStore, key: str, tensor: Tensor) -> None:
        names.add(key)
        put(self, key, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationStore, "put", noting)
        quantize(source, mobie(), TOKENS, out, fingerprint="job", resources=resources)
    return weight_files(out), names


@pytest.mark.parametrize(
    ("name", "not_again"),
    [
        ("inputs-000-00001", ()),  # capture, for the gradients
        ("inputs-002-00001", ("inputs-000", "inputs-001")),  # forward
        ("gradient-003-00001", ("inputs-",)),  # the loss
        ("gradient-002-00001", ("inputs-", "gradient-003")),  # backward, in the last block
        ("gradient-001-00000", ("inputs-", "gradient-002")),
        ("quantized-00001", ("inputs-", "gradient-")),  # capture, for the block loop
        ("guided-00001", ("inputs-", "gradient-")),
        ("experts-00001", ("inputs-", "gradient-")),
    ],
)
@pytest.mark.parametrize("resources", [NOTHING_KEPT, Resources()], ids=["files", "memory"])
def test_a_job_killed_at_any_stage_ends_with_the_same_bytes(
    name: str,
    not_again: tuple[str, ...],
    resources: Resources,
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    killed_at(name, source, tmp_path, resources)
    files, names = again(source, tmp_path, resources)
    assert files == whole
    if resources is NOTHING_KEPT:  # what was in memory is gone with the process
        assert not {n for n in names if n.startswith(not_again)} or not not_again


def test_killed_between_a_blocks_gradients_and_the_next(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    save = GradientFolder.save_block

    def dies(self: GradientFolder, index: int, *rest: Any) -> None:
        if index == 1:
            raise Killed
        save(self, index, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(GradientFolder, "save_block", dies)
        quantize(source, mobie(), TOKENS, tmp_path, fingerprint="job", resources=NOTHING_KEPT)
    done: list[int] = []
    backward = GradientPass._backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientPass, "_backward", lambda self, index: done.append(index) or backward(self, index))
        files, _ = again(source, tmp_path)
    assert done == [1, 0]
    assert files == whole


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:-3] + bytes([b[-3] ^ 64]) + b[-2:]])
def test_damaged_activations_are_computed_again(
    damage: Callable[[bytes], bytes], source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed_at("gradient-003-00001", source, tmp_path)
    path = tmp_path / "work" / "gradients" / "inputs-001-00000.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    files, names = again(source, tmp_path)
    assert "inputs-001-00000" in names and files == whole


KILL = """
import os, signal, sys
from pathlib import Path
import torch
from mobie.calibration.store import ActivationStore
from mobie.config import build_method
from mobie.pipeline import quantize
from mobie.resources import Resources

put = ActivationStore.put
def until(self, name, tensor):
    if name == "gradient-002-00001":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, tensor)
ActivationStore.put = until
tokens = torch.load(sys.argv[3])
method = build_method("mobie", {"iterations": 2})
quantize(Path(sys.argv[1]), method, tokens, Path(sys.argv[2]), fingerprint="job", resources=Resources(memory=0))
"""


def test_a_process_killed_outright_in_the_backward_pass(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    torch.save(TOKENS, tmp_path / "tokens.pt")
    outcome = subprocess.run(
        [sys.executable, "-c", KILL, source, tmp_path / "out", tmp_path / "tokens.pt"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr.decode()
    files, names = again(source, tmp_path / "out")
    assert files == whole
    assert not any(name.startswith("inputs-") for name in names)


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_store_fills_memory_first_and_gives_back_what_it_took(tmp_path: Path) -> None:
    memory = Memory(100)
    store = ActivationStore(tmp_path, "job", memory)
    tensors = {name: torch.full((10,), float(i)) for i, name in enumerate("abc")}  # 40 bytes each
    for name, tensor in tensors.items():
        store.put(name, tensor)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["c.safetensors"] and memory.left == 20
    store.drop("a")
    store.put("b", tensors["b"] + 1)
    assert memory.left == 60
    assert torch.equal(store.get("b"), tensors["b"] + 1) and torch.equal(store.get("c"), tensors["c"])
    assert not store.has("a")
    with pytest.raises(DataError, match=r"a\.safetensors"):
        store.get("a")
    store.clear()
    assert memory.left == 100 and not list(tmp_path.glob("*.safetensors"))


def test_store_does_not_take_up_the_files_of_another_job(tmp_path: Path) -> None:
    first = ActivationStore(tmp_path, "job", Memory(1000), keep=True)
    first.put("a", torch.ones(3))
    assert ActivationStore(tmp_path, "job", Memory(0)).has("a")
    assert not ActivationStore(tmp_path, "another", Memory(0)).has("a")


def test_lazy_values_are_made_when_asked_for_and_cached_within_memory() -> None:
    made: list[int] = []
    memory = Memory(100)
    cache = Cache(memory)

    def make(i: int) -> Tensor:
        return cache.get(i, lambda: made.append(i) or torch.full((10,), float(i)))

    lazy = Lazy(4, make)
    assert len(lazy) == 4 and made == []
    assert [float(x[0]) for x in lazy] == [0, 1, 2, 3]
    assert [float(x[0]) for x in lazy[1:3]] == [1, 2] and float(lazy[-1][0]) == 3
    assert made == [0, 1, 2, 3, 2, 3]  # two of them find room
    with pytest.raises(IndexError):
        lazy[4]
    cache.clear()
    assert memory.left == 100
    names: list[str] = []
    mapping = LazyMap(["a", "b"], lambda name: names.append(name) or name * 2)
    assert mapping["b"] == mapping["b"] == "bb" and names == ["b"] and dict(mapping) == {"a": "aa", "b": "bb"}
    with pytest.raises(KeyError):
        mapping["c"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("512MiB", 512 << 20), (" 1.5 gb ", 1_500_000_000), ("4096", 4096), ("0", 0)],
)
def test_memory_is_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "20 XB", "1GB2"])
def test_memory_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number with a unit"):
        parse_memory(text)


def test_devices_are_read_and_absent_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_devices("auto") == parse_devices("cuda") == ("cuda:0",)
    assert parse_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert parse_devices("cpu") == ("cpu",)
    for wrong in ("gpu", "cuda:0,cuda:0", "", "cuda:x"):
        with pytest.raises(ConfigError, match="expected auto, cpu, cuda"):
            parse_devices(wrong)
    with pytest.raises(ConfigError, match="torch finds 2 GPUs here"):
        parse_devices("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_devices("auto") == ("cpu",)
    with pytest.raises(ConfigError, match="torch finds 0 GPUs here"):
        parse_devices("cuda")
