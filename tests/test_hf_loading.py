"""Packed checkpoints through the library's `from_pretrained`: the same logits, no cast scale, no random weight."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, random_tokens, save_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import mobie
from mobie.config import default_layout, load_method
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.hf.modules import PackedExperts, PackedLinear, packed_modules
from mobie.hf.quantizer import MobieConfig, MobieQuantizer
from mobie.models.base import ARCHITECTURES
from mobie.packing.checkpoint import KEPT, MANIFEST, block_path, load_model, read_tensors, save_tensors
from mobie.packing.folder import CONFIG, INDEX
from mobie.pipeline import quantize

CONFIGS = sorted(path.stem for path in (default_layout().config / "methods").glob("*.yaml"))
TOKENS = random_tokens(2, 9, seed=5)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, for the methods."""
    return save_model(make_model("olmoe", num_hidden_layers=1), tmp_path_factory.mktemp("small"))


def checkpoint_of(model_type: str, root: Path, method: str = "mobie+iterations=2", **changes: Any) -> Path:
    source = save_model(make_model(model_type, **changes), root / "source")
    quantize(source, load_method(method).build(), random_tokens(2, 8), root / "out", fingerprint="job")
    return root / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of("olmoe", tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def load(folder: Path, dtype: torch.dtype | str = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def assert_as_dequantized(folder: Path, **options: Any) -> Any:
    """Logits equal those of the dequantized model, bit for bit; returns the loaded model."""
    expected = logits(load_model(folder)[0])
    model = load(folder, **options)
    got = logits(model)
    assert torch.equal(got, expected)
    assert got.std() > 0.1  # not a constant, which would be equal as well
    return model


def write_manifest_anew(folder: Path) -> None:
    """Make the manifest fit changed files, so that other checks are reached."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


# ---- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_every_method_loads_with_the_logits_of_the_dequantized_model(config: str, small: Path, tmp_path: Path) -> None:
    method = {"mobie-truncated": "mobie+rank=8"}.get(config, config)  # 128 of its config is beyond a tiny model
    options = {"iterations": 1, "budget": 3.5}  # few; and what the attention of a tiny model leaves
    if config.startswith("obe"):  # its budget has no lower end
        del options["budget"]
    method += "".join(f"+{n}={v}" for n, v in options.items() if n in load_method(method).build().options)
    quantize(small, load_method(method).build(), random_tokens(1, 12), tmp_path, fingerprint="job")
    assert_as_dequantized(tmp_path)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_loads_and_generates(model_type: str, tmp_path: Path) -> None:
    folder = checkpoint_of(model_type, tmp_path)
    model = assert_as_dequantized(folder, device_map="auto")
    reference, tokenizer = load_model(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    assert torch.equal(model.generate(TOKENS, **options), reference.generate(TOKENS, **options))
    kinds = [type(module) for module in packed_modules(model).values()]
    assert any(issubclass(kind, PackedExperts) for kind in kinds) and PackedLinear in kinds
    assert isinstance(model.model.layers[1].mlp.experts, type(reference.model.layers[1].mlp.experts))


def test_router_binarized_and_gate_joined_with_up(tmp_path: Path) -> None:
    folder = checkpoint_of("qwen2_moe", tmp_path, "mobie+iterations=2+router=binarized+joint_svd=fused_gate_up")
    model = assert_as_dequantized(folder)
    assert set(model.model.layers[0].mlp.experts.packed) == {"gate_up", "down"}
    assert model.model.layers[0].mlp.gate.packed.shape == model.model.layers[0].mlp.gate.weight.shape


@pytest.mark.parametrize("model_type", ["deepseek", "gpt_oss", "qwen3_next"])
def test_kept_and_binarized_routers_of_other_kinds_in_16_bits(model_type: str, tmp_path: Path) -> None:
    """GPT-OSS's router has a bias; its norms are ones that the library prefers in 32 bits."""
    folder = checkpoint_of(model_type, tmp_path, "mobie+iterations=1+router=binarized")
    model = load(folder, "auto", experts_implementation="eager")
    reference = load_model(folder, torch.bfloat16)[0]
    reference.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(reference))


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    folder = checkpoint_of("olmoe", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in read_tensors(folder / KEPT)[0]
    model = assert_as_dequantized(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("compute", ["unpack", "cached"])
def test_every_implementation_of_the_library_sees_the_same_weights(compute: str, experts: str, finished: Path) -> None:
    reference = load_model(finished)[0]
    reference.set_experts_implementation(experts)
    model = load(finished, quantization_config=MobieConfig(compute=compute), experts_implementation=experts)
    assert torch.equal(logits(model), logits(reference))
    kept = [name for name, module in packed_modules(model).items() if module._dense]
    assert len(kept) == (len(packed_modules(model)) if compute == "cached" else 0)


@pytest.mark.parametrize(("activations", "tolerance"), [("16bit", 1e-5), ("int8", 0.03)])
def test_kernels_compute_the_same_from_packed_bits(activations: str, tolerance: float, finished: Path) -> None:
    model = load(finished, quantization_config=MobieConfig(compute="kernels", activations=activations))
    expected = logits(load_model(finished)[0])
    assert float((logits(model) - expected).norm() / expected.norm()) < tolerance
    assert all(module.kernel is not None for module in packed_modules(model).values())
    assert not any(module._dense for module in packed_modules(model).values())


@pytest.mark.parametrize(("activations", "tolerance"), [("16bit", 1e-5), ("int8", 0.03)])
def test_kernels_read_sign_planes_of_every_linear_and_expert(
    activations: str, tolerance: float, tmp_path: Path
) -> None:
    folder = checkpoint_of("olmoe", tmp_path, "obe-1.5")
    model = load(folder, quantization_config=MobieConfig(compute="kernels", activations=activations))
    expected = logits(load_model(folder)[0])
    difference = float((logits(model) - expected).norm() / expected.norm())
    assert difference < tolerance and (difference > 1e-4) == (activations == "int8")
    assert all(module.kernel is not None for module in packed_modules(model).values())
    assert not any(module._dense for module in packed_modules(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype_casts_what_is_kept_and_no_scale(dtype: torch.dtype | str, finished: Path) -> None:
    model = load(finished, dtype, device_map="cpu", experts_implementation="eager", low_cpu_mem_usage=True)
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    assert model.dtype == wanted
    stored = {n: t for i in range(2) for n, t in read_tensors(block_path(finished, i))[0].items() if t.numel()}
    buffers = dict(model.named_buffers())
    for name, tensor in stored.items():
        assert buffers[name].dtype == tensor.dtype and torch.equal(buffers[name], tensor), name
    assert any(tensor.dtype == torch.float16 for tensor in stored.values())
    assert {p.dtype for p in model.parameters()} == {wanted}
    reference = load_model(finished, wanted)[0]
    reference.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(reference))


def test_moving_to_another_dtype_casts_no_scale(finished: Path) -> None:
    model = load(finished, experts_implementation="eager")
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "rotary" not in name}
    model.to(torch.bfloat16)
    after = dict(model.named_buffers())
    assert all(after[n].dtype == b.dtype and torch.equal(after[n], b) for n, b in before.items())
    reference = load_model(finished)[0].to(torch.bfloat16)
    reference.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(reference))


def test_scales_that_a_library_casts_are_read_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MobieQuantizer, "get_new_dtype", lambda *_: torch.bfloat16)
    model = load(finished, torch.bfloat16, experts_implementation="eager")
    buffers = dict(model.named_buffers())
    for name, tensor in read_tensors(block_path(finished, 0))[0].items():
        if tensor.numel():
            assert buffers[name].dtype == tensor.dtype and torch.equal(buffers[name], tensor), name


# ---- registration ----------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(mobie.__file__).parents[1], check=False)


def test_importing_before_the_library_is_cheap_and_enough(finished: Path) -> None:
    code = """
import sys
import mobie
from mobie.cli import main
main(["--help"], standalone_mode=False)
assert not {"torch", "transformers", "triton"} & set(sys.modules), "heavy imports"
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.experts).__name__)
"""
    done = run_python(code, finished)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("PackedOlmoeExperts\n")


def test_without_mobie_the_library_refuses_and_after_a_late_import_it_loads(finished: Path) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("random weights")
except RuntimeError as error:
    print(error)
import mobie
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.experts).__name__)
"""
    done = run_python(code, finished)
    assert done.returncode == 0, done.stderr
    assert "random weights" not in done.stdout and "ignore_mismatched_sizes" in done.stdout
    assert done.stdout.endswith("PackedOlmoeExperts\n")
    assert "Unknown quantization type, got mobie" in done.stderr


def test_quantizer_that_imports_the_registry_itself_registers() -> None:
    code = "import mobie.hf.quantizer; from transformers.quantizers.auto import *; print(AUTO_QUANTIZER_MAPPING)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "MobieQuantizer" in done.stdout


def test_registering_again_changes_nothing() -> None:
    from mobie.hf.quantizer import register

    before = dict(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    register()
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES) == before


# ---- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["block-001.safetensors", KEPT, INDEX, "tokenizer.json"])
def test_damaged_or_missing_file_is_refused_by_name(name: str, damage: Callable[[Path], None], copied: Path) -> None:
    damage(copied / name)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: sha256 .*, expected [0-9a-f]{{64}}.*again"):
        load(copied)


def test_changed_configuration_is_refused_by_name(copied: Path) -> None:
    config = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(DataError, match=r"config\.json: sha256"):
        load(copied)


def test_model_card_and_generation_configuration_may_be_edited(copied: Path) -> None:
    (copied / "README.md").write_text("mine")
    (copied / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert load(copied).generation_config.temperature == 0.5


def test_missing_manifest_is_refused_by_name(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"manifest\.json: not a readable manifest.*fetch the whole folder"):
        load(copied)


@pytest.mark.parametrize(
    ("version", "message"), [(1, "no longer reads.*quantize again"), (3, "up to 2; install a newer version")]
)
@pytest.mark.parametrize("file", [CONFIG, MANIFEST])
def test_other_format_versions_are_refused(file: str, version: int, message: str, copied: Path) -> None:
    path = copied / file
    path.write_text(path.read_text().replace('"format_version": 2', f'"format_version": {version}'))
    with pytest.raises(DataError, match=rf"{re.escape(file)}.*format version {version}.*{message}"):
        load(copied)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors, metadata = read_tensors(path)
    change(tensors)
    save_tensors(path, tensors, metadata)
    write_manifest_anew(path.parent)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.input_layernorm.weight", r"missing: model\.layers\.1\.input_layernorm\.weight"),
        ("lm_head.weight", r"missing: lm_head\.weight"),
    ],
)
def test_file_without_a_tensor_is_refused_though_its_hash_fits(name: str, message: str, copied: Path) -> None:
    rewrite(copied / KEPT, lambda tensors: tensors.pop(name))
    with pytest.raises(DataError, match=message):
        load(copied)


def test_shard_without_a_packed_tensor_is_refused_though_its_hash_fits(copied: Path) -> None:
    path = block_path(copied, 1)
    rewrite(path, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.plain__signs"))
    with pytest.raises(DataError, match=r"block-001.*header is not that of its tensors.*'signs'"):
        load(copied)


def test_surplus_or_misshapen_tensors_are_refused(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["surplus"] = torch.zeros(1)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]

    rewrite(copied / KEPT, change)
    with pytest.raises(DataError, match=r"unexpected: surplus; of another shape: lm_head\.weight \(47, 32\)"):
        load(copied)


def test_renaming_tensors_while_loading_is_refused(finished: Path) -> None:
    with pytest.raises(DataError, match=r"kept.*0\.self_attn\.q_norm\.weight was not read into the model.*key_mapping"):
        load(finished, key_mapping={r"layers\.0\.self_attn\.q_norm": "layers.0.self_attn.k_norm"})


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_saving_again_is_refused_with_the_remedy(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"save_pretrained.*{re.escape(str(finished))}.*copy that folder"):
        load(finished).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_model_without_a_head_is_refused(finished: Path) -> None:
    with pytest.raises(UnsupportedError, match="OlmoeModel; expected AutoModelForCausalLM"):
        AutoModel.from_pretrained(finished)


def test_quantizing_on_the_fly_is_refused(small: Path) -> None:
    with pytest.raises(UnsupportedError, match="a MobieConfig for a model that is not quantized.*mobie quantize"):
        load(small, quantization_config=MobieConfig())


def test_packed_checkpoint_is_no_source_of_another(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json: the model is quantized already \(quant_method 'mobie'\)"):
        quantize(finished, load_method("rtn-w4").build(), random_tokens(1, 8), tmp_path, fingerprint="job")


def test_unknown_ways_to_compute_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown compute 'cach'; did you mean cached"):
        MobieConfig(compute="cach")
    with pytest.raises(ConfigError, match="unknown activations 'int4'"):
        MobieConfig(activations="int4")
    with pytest.raises(ConfigError, match="only kernels round activations"):
        MobieConfig(compute="cached", activations="int8")


def test_configuration_of_a_loaded_model_is_that_of_the_folder(finished: Path) -> None:
    stored = json.loads((finished / CONFIG).read_text())["quantization_config"]
    assert load(finished).config.quantization_config.to_dict() == stored
    assert stored["method"] == "mobie" and stored["options"]["iterations"] == 2
