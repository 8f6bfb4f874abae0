"""Packed banks and checkpoints: round trips, bits by hand, and what happens to damaged files and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tiny import EXPERTS, HIDDEN, TOP_K, WIDTH, make_model, random_tokens, save_model
from torch import Tensor

from mobie.config import load_method
from mobie.errors import DataError, StorageError
from mobie.methods.fp16 import FP16
from mobie.methods.rtn import RTN
from mobie.models.base import Adapter
from mobie.packing import checkpoint
from mobie.packing.bank import GATE_UP, PackedBank, SymmetricRows, split_gate_up
from mobie.packing.base import Packed
from mobie.packing.binary import BinaryMatrix, Segment
from mobie.packing.checkpoint import (
    KEPT,
    MANIFEST,
    BlockNames,
    PackedBlock,
    block_path,
    load_block,
    load_model,
    read_tensors,
    save_block,
    save_tensors,
)
from mobie.packing.dense import Dense16
from mobie.paths import embedded_model
from mobie.pipeline import quantize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def binary(rows: int, columns: int, salient: int, seed: int = 0) -> BinaryMatrix:
    """Mixed-order matrix with `salient` columns of second order, and no second segment where there are none."""
    value = normal(rows, columns, seed=seed)
    scale = value.abs().mean(1)[None, None, :, None]
    plain = Segment.pack(value[None] >= 0, scale)
    chosen = torch.arange(salient)
    extra = Segment.pack(normal(1, rows, salient, seed=seed + 1) >= 0, scale / 2) if salient else None
    return BinaryMatrix.build((rows, columns), columns, chosen, plain, extra, True)


def rebuilt(packed: Packed) -> Packed:
    header = json.loads(json.dumps(packed.header()))  # as it comes back from a file
    return type(packed).from_tensors(header, packed.tensors())


def assert_same(first: Packed, second: Packed) -> None:
    assert type(first) is type(second)
    assert first.shape == second.shape
    assert first.header() == second.header()
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert torch.equal(first.dequantize(), second.dequantize())


# ---- symmetric rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 8, 13])
def test_symmetric_rows_round_trip(bits: int, columns: int) -> None:
    matrix = normal(5, columns)
    matrix[2] = 0
    packed = SymmetricRows.quantize(matrix, bits)
    assert packed.shape == (5, columns)
    assert_same(packed, rebuilt(packed))
    got = packed.dequantize().double()
    # by hand: the step is the row's largest magnitude over 2^(bits-1) - 1, as float16 holds it
    top = 2 ** (bits - 1) - 1
    for row, mine, step in zip(matrix.double(), got, packed.scale.double(), strict=True):
        largest = float(row.abs().max())
        assert float(step) == pytest.approx(max(largest / top, 2.0**-24), rel=2**-11)
        assert float((row - mine).abs().max()) <= float(step) * (0.5 + top * 2**-11) + 1e-12
    assert torch.equal(got[2], torch.zeros(columns, dtype=torch.float64))
    codes = sum(i.bytes for i in packed.ledger().items if i.kind == "code")
    assert codes == (5 * columns if bits == 8 else 5 * bits * -(-columns // 8))
    assert packed.paper_bits() == bits


def test_symmetric_rows_reach_both_ends_and_zero() -> None:
    matrix = torch.tensor([[-4.0, 0.0, 4.0, 2.0]])
    assert SymmetricRows.quantize(matrix, 8).codes.tolist() == [[-127, 0, 127, 64]]
    assert SymmetricRows.quantize(matrix, 2).dequantize().tolist() == [[-4.0, 0.0, 4.0, 0.0]]  # 0.5 rounds to even


# ---- banks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("salient", [(0, 3, 1), (4, 0, 2), (0, 0, 0), (2, 2, 2)])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_bank_of_ragged_experts_round_trips(salient: tuple[int, ...], side: str | None) -> None:
    rows, columns = 6, 11
    experts = tuple(binary(rows, columns, count, seed=10 * e) for e, count in enumerate(salient))
    basis = None
    if side == "left":
        basis = SymmetricRows.quantize(normal(9, rows), 8)
    elif side == "right":
        basis = Dense16(normal(columns, 14).bfloat16())
    bank = PackedBank(experts, basis, side or "left")
    again = rebuilt(bank)
    assert_same(bank, again)
    for mine, original in zip(again.experts, experts, strict=True):
        assert_same(mine, original)
    dense = bank.dequantize()
    for e, expert in enumerate(experts):
        w = expert.dequantize().double()
        if side == "left":
            w = basis.dequantize().double() @ w
        elif side == "right":
            w = w @ basis.dequantize().double()
        assert dense[e].shape == w.shape == bank.shape[1:]
        torch.testing.assert_close(dense[e].double(), w, rtol=1e-5, atol=1e-5)


def test_every_byte_of_a_bank_is_in_its_ledger_once_and_codes_are_told_apart() -> None:
    experts = tuple(binary(6, 11, count, seed=count) for count in (0, 2))
    bank = PackedBank(experts, SymmetricRows.quantize(normal(9, 6), 8))
    items = {i.name: i for i in bank.ledger().items}
    assert {n for n, i in items.items() if i.kind == "code"} == {
        "experts.plain.signs",
        "experts.extra.signs",
        "basis.codes",
    }
    own = [i for part in (*experts, bank.basis) for i in part.ledger().items]
    for kind in ("code", "side"):
        assert sum(i.bytes for i in items.values() if i.kind == kind) == sum(i.bytes for i in own if i.kind == kind)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("active", [2, 8])
def test_paper_bits_of_a_bank_follow_equations_43_and_44(side: str, active: int) -> None:
    """`(r / (k I)) B_h + (r / O) B_b`, k = N in eq. 43; O and I swapped for a basis on the right."""
    out, into, rank, count = 12, 20, 6, 8
    shape = (rank, into) if side == "left" else (out, rank)
    experts = tuple(binary(*shape, salient=3, seed=e) for e in range(count))
    basis = SymmetricRows.quantize(normal(*((out, rank) if side == "left" else (rank, into))), 8)
    bank = PackedBank(experts, basis, side)
    binary_bits = 1 + 3 / shape[1]
    if side == "left":
        expected = rank / (active * into) * 8 + rank / out * binary_bits
    else:
        expected = rank / (active * out) * 8 + rank / into * binary_bits
    assert bank.paper_bits(active / count) == pytest.approx(expected, rel=1e-12)
    ledger = bank.ledger(active / count)
    assert ledger.paper_bits == pytest.approx(expected, rel=1e-12)
    assert ledger.weights == count * out * into
    assert ledger.active_weights == active * out * into


def test_paper_bits_without_a_basis_are_the_experts_mean() -> None:
    bank = PackedBank((binary(4, 10, 0), binary(4, 10, 5)))
    assert bank.paper_bits(0.5) == pytest.approx((1.0 + 1.5) / 2)


def test_gate_and_up_in_one_bank_share_the_basis_between_twice_as_many_matrices() -> None:
    """With gate and up joined, k active experts use 2k of 2N matrices: the same share, half the basis bits each."""
    basis = SymmetricRows.quantize(normal(12, 12), 8)
    bank = PackedBank(tuple(binary(12, 20, 0, seed=e) for e in range(8)), basis)  # 4 experts, gate then up
    assert bank.paper_bits(2 / 4) == pytest.approx(12 / (2 * 2 * 20) * 8 + 1)
    gate_up = bank.dequantize()
    split = split_gate_up({GATE_UP: gate_up, "down": torch.zeros(4, 20, 12)})
    assert set(split) == {"gate", "up", "down"}
    assert torch.equal(split["gate"], gate_up[:4]) and torch.equal(split["up"], gate_up[4:])


# ---- blocks on disk --------------------------------------------------------------------------------------------------


NAMES = BlockNames("model.layers.7.", "mlp.experts")


def sample_block() -> PackedBlock:
    bank = PackedBank(tuple(binary(6, 11, c, seed=c) for c in (0, 2)), SymmetricRows.quantize(normal(9, 6), 8))
    return PackedBlock({"self_attn.q_proj": binary(4, 11, 1)}, {"gate": bank, "down": PackedBank((binary(4, 4, 0),))})


def test_block_round_trips_through_a_file(tmp_path: Path) -> None:
    path = block_path(tmp_path, 7)
    assert path.name == "block-007.safetensors"
    save_block(path, sample_block(), "job", {"tokens_per_expert": [1, 2], "output_error": {"a": 0.25}}, NAMES)
    shard = load_block(path)
    assert shard.fingerprint == "job"
    assert shard.details == {"tokens_per_expert": [1, 2], "output_error": {"a": 0.25}}
    before, after = sample_block().parts(), shard.block.parts()
    assert set(after) == {"linears.self_attn.q_proj", "experts.gate", "experts.down"} == set(before)
    for name in before:
        assert_same(after[name], before[name])


def test_tensors_are_named_as_in_the_model_and_replaced_parameters_have_no_elements(tmp_path: Path) -> None:
    path = block_path(tmp_path, 7)
    block = sample_block()
    dense = Dense16(normal(3, 4).bfloat16())
    save_block(path, PackedBlock({**block.linears, "self_attn.o_proj": dense}, block.experts), "job", {}, NAMES)
    tensors, _ = read_tensors(path)
    prefix = "model.layers.7."
    empty = {name for name, tensor in tensors.items() if not tensor.numel() and "__" not in name}
    q_proj, experts = f"{prefix}self_attn.q_proj.", f"{prefix}mlp.experts."
    assert empty == {f"{q_proj}weight", f"{experts}gate_up_proj", f"{experts}down_proj"}
    assert {n.removeprefix(q_proj) for n in tensors if n.startswith(q_proj)} == {
        "weight",
        "plain__signs",
        "plain__row_scale",
        "extra__signs",
        "extra__row_scale",
        "salient",
    }
    assert f"{experts}gate__basis__codes" in tensors and f"{experts}down__experts__plain__signs" in tensors
    assert torch.equal(tensors[f"{prefix}self_attn.o_proj.weight"], dense.weight)  # stored as what it is
    shard = load_block(path)
    assert shard.replaced == empty
    assert_same(shard.block.linears["self_attn.o_proj"], dense)


def test_header_alone_gives_the_block_without_values(tmp_path: Path) -> None:
    path = block_path(tmp_path, 7)
    save_block(path, sample_block(), "job", {}, NAMES)
    for name, part in load_block(path, values=False).block.parts().items():
        original = sample_block().parts()[name]
        assert part.header() == original.header() and part.shape == original.shape
        got, expected = part.tensors(), original.tensors()
        assert {k: (t.shape, t.dtype) for k, t in got.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}
        assert all(tensor.is_meta for tensor in got.values())


def test_headers_of_many_experts_are_small(tmp_path: Path) -> None:
    """128 experts, each with another number of salient columns: under 1 % of a real layer's signs alone."""
    experts = tuple(binary(4, 300, count, seed=count) for count in range(128))
    path = block_path(tmp_path, 7)
    save_block(path, PackedBlock({}, dict.fromkeys(("gate", "up", "down"), PackedBank(experts))), "job", {}, NAMES)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    signs_of_a_layer = 3 * 128 * 768 * 2048 // 8  # of Qwen3-30B-A3B
    assert header < signs_of_a_layer / 100
    assert_same(load_block(path).block.experts["up"], PackedBank(experts))


@pytest.mark.parametrize("equal", [True, False])
def test_shapes_are_written_once_where_experts_share_them(equal: bool) -> None:
    bank = PackedBank(tuple(binary(4, 10, 2 if equal else e, seed=e) for e in range(1, 4)))
    header = bank.header()
    assert header["shapes"]["plain.signs"] == {"all": [1, 4, 2]}
    assert header["shapes"]["salient"] == ({"all": [2]} if equal else {"each": [[1], [2], [3]]})
    assert_same(rebuilt(bank), bank)


def test_shard_of_the_first_format_version_is_refused(tmp_path: Path) -> None:
    path = block_path(tmp_path, 0)
    save_tensors(path, {"linears.q:codes": torch.zeros(1)}, {"details": {}, "fingerprint": "job", "headers": {}})
    with pytest.raises(DataError, match=r"block-000.*format version 1, expected 2; quantize again"):
        load_block(path)


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes several metadata entries in random order; a checkpoint must not show it."""
    digests = set()
    for i in range(20):
        path = tmp_path / f"{i}.safetensors"
        save_block(path, sample_block(), "job", {"a": 1, "b": [2]}, NAMES)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_truncated_shard_is_refused_with_its_name_and_the_remedy(tmp_path: Path, cut: int) -> None:
    path = block_path(tmp_path, 0)
    save_block(path, sample_block(), "job", {}, NAMES)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        DataError, match=r"block-000\.safetensors.*expected a complete file; delete it and run the same"
    ):
        load_block(path)


def test_missing_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = block_path(tmp_path, 0)
    with pytest.raises(DataError, match=r"block-000\.safetensors.*expected a complete file"):
        load_block(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"block-000\.safetensors.*of this project"):
        load_block(path)


def test_format_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = block_path(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(BinaryMatrix, "format", "binary-2")
        save_block(path, PackedBlock({"q": binary(4, 4, 0)}, {}), "job", {}, NAMES)
    with pytest.raises(DataError, match=r"block-000.*unknown format 'binary-2'.*binary.*newer version"):
        load_block(path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_a_storage_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {})
    before = path.read_bytes()

    def half_written(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(StorageError, match=r"x\.safetensors: could not be written.*No space left.*free some space"):
        save_tensors(path, {"a": torch.zeros(9)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# ---- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(make_model("olmoe"), folder / "source")
    quantize(folder / "source", RTN(bits=3), random_tokens(2, 8), folder / "out", fingerprint="job")
    return folder / "out"


@pytest.fixture
def copy_of_finished(finished: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "checkpoint"))


def test_manifest_lists_every_file_that_decides_what_the_model_does_with_size_and_digest(finished: Path) -> None:
    manifest = json.loads((finished / MANIFEST).read_text())
    files = {p.name: p for p in finished.glob("*.safetensors")}
    assert set(files) == {"block-000.safetensors", "block-001.safetensors", KEPT}
    others = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(manifest["files"]) == set(files) | others
    for name in manifest["files"]:
        data = (finished / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["fingerprint"] == "job"
    assert manifest["model_type"] == "olmoe"
    assert manifest["blocks"] == 2


def test_folder_has_what_the_library_reads(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["model_type"] == "olmoe"
    assert config["quantization_config"] == {
        "quant_method": "mobie",
        "format_version": 2,
        "method": "rtn",
        "options": {"bits": 3, "group_size": None},
        "router_quantized": False,
        "blocks": 2,
    }
    index = json.loads((finished / "model.safetensors.index.json").read_text())
    stored = {n: p.name for p in finished.glob("*.safetensors") for n in read_tensors(p, values=False)[0]}
    assert index["weight_map"] == stored
    sizes = [t.nbytes for p in finished.glob("*.safetensors") for t in read_tensors(p)[0].values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert json.loads((finished / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("model", ["nano-olmoe", "nano-qwen2-moe"])
@pytest.mark.parametrize("name", ["mobie+iterations=1+glas=false+nges=false", "rtn-w2"])
def test_files_of_a_shipped_model_are_within_one_per_cent_of_the_ledger(name: str, model: str, tmp_path: Path) -> None:
    report = quantize(
        embedded_model(model), load_method(name).build(), random_tokens(1, 16), tmp_path, fingerprint="job"
    )
    held = sum(item.bytes for item in report.ledger.items) + report.kept_bytes
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert files == report.file_bytes
    assert held < files < 1.01 * held


def test_generation_configuration_is_written_where_the_model_has_none(tmp_path: Path) -> None:
    source = save_model(make_model("olmoe", num_hidden_layers=1), tmp_path / "source")
    (source / "generation_config.json").unlink()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    quantize(source, RTN(bits=3), random_tokens(2, 8), tmp_path / "out", fingerprint="job")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_load_model_brings_the_tokenizer(finished: Path) -> None:
    _, tokenizer = load_model(finished)
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]


def test_changed_kept_file_is_refused(copy_of_finished: Path) -> None:
    path = copy_of_finished / KEPT
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"kept\.safetensors: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}; delete the"):
        load_model(copy_of_finished)


def test_missing_block_is_refused(copy_of_finished: Path) -> None:
    block_path(copy_of_finished, 1).unlink()
    with pytest.raises(
        DataError, match=r"block-001\.safetensors: sha256 no file, expected.*run the quantize rule again"
    ):
        load_model(copy_of_finished)


def test_newer_format_version_is_refused(copy_of_finished: Path) -> None:
    path = copy_of_finished / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DataError, match=r"manifest\.json: format version 99, this version reads up to 2; install"):
        load_model(copy_of_finished)


def test_older_format_version_is_refused(copy_of_finished: Path) -> None:
    path = copy_of_finished / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(DataError, match=r"manifest\.json: format version 1, which .* no longer reads.*quantize again"):
        load_model(copy_of_finished)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_unusable_manifest_is_refused(copy_of_finished: Path, content: str | None) -> None:
    path = copy_of_finished / MANIFEST
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: not a readable manifest.*run the quantize rule again"):
        load_model(copy_of_finished)


@pytest.mark.parametrize("content", [None, "{"])
def test_unusable_configuration_is_refused(copy_of_finished: Path, content: str | None) -> None:
    path = copy_of_finished / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"config.*run the quantize rule again"):
        load_model(copy_of_finished)


def test_parameters_that_nobody_stored_are_refused(copy_of_finished: Path) -> None:
    """A kept file without the head, with a manifest that fits it."""
    path = copy_of_finished / KEPT
    tensors, metadata = read_tensors(path)
    del tensors["lm_head.weight"]
    tensors["surplus"] = torch.zeros(1)
    save_tensors(path, tensors, metadata)
    manifest = json.loads((copy_of_finished / MANIFEST).read_text())
    manifest["files"][KEPT]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy_of_finished / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"missing \['lm_head\.weight'\], unexpected \['surplus'\].*expected exactly"):
        load_model(copy_of_finished)


def test_write_block_fills_linears_router_and_experts() -> None:
    model, adapter = make_model("olmoe"), Adapter("olmoe")
    block = adapter.blocks(model)[0]
    before = {n: p.clone() for n, p in block.named_parameters()}
    dense = {
        "gate": normal(EXPERTS, WIDTH, HIDDEN, seed=1),
        "up": normal(EXPERTS, WIDTH, HIDDEN, seed=2),
        "down": normal(EXPERTS, HIDDEN, WIDTH, seed=3),
    }
    banks = {n: PackedBank(tuple(FP16().quantize_linear(w, None) for w in ws)) for n, ws in dense.items()}
    router = normal(EXPERTS, HIDDEN, seed=4)
    packed = PackedBlock({"mlp.gate": FP16().quantize_linear(router, None)}, banks)
    checkpoint.write_block(adapter, block, packed)
    assert torch.equal(block.mlp.gate.weight, router.bfloat16().float())
    joined = torch.cat([dense["gate"], dense["up"]], dim=1).bfloat16().float()
    assert torch.equal(block.mlp.experts.gate_up_proj, joined)
    assert torch.equal(block.mlp.experts.down_proj, dense["down"].bfloat16().float())
    untouched = set(before) - {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert all(torch.equal(block.get_parameter(n), before[n]) for n in untouched)
    assert block.mlp.gate.top_k == TOP_K
