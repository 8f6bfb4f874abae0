"""MXFP4 as the hub's GPT-OSS has it, against the format's definition and against the library's own decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, HIDDEN, make_model, random_tokens, save_model
from torch import Tensor

from mobie.config import load_method
from mobie.errors import DataError
from mobie.models.mxfp4 import decode
from mobie.models.weights import StreamedModel
from mobie.packing.checkpoint import KEPT, load_model, read_tensors
from mobie.packing.folder import refuse_quantized
from mobie.pipeline import quantize

WIDTH = 64  # two groups


def random_codes(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks and scales of all experts; the weights are about as large as a model's."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (EXPERTS, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def float4(code: int) -> float:
    """E2M1: a sign, two bits of exponent with bias 1, one bit of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def by_definition(blocks: Tensor, scales: Tensor) -> Tensor:
    """`(experts, in, out)` float64, weight by weight."""
    experts, rows, groups, _ = blocks.shape
    out = torch.zeros(experts, groups * 32, rows, dtype=torch.float64)
    for e in range(experts):
        for row in range(rows):
            for column in range(groups * 32):
                byte = int(blocks[e, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                out[e, column, row] = float4(code) * 2.0 ** (int(scales[e, row, column // 32]) - 127)
    return out


def test_decoding_is_the_formats_definition_and_the_librarys() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_codes(10, 64)
    decoded = decode(blocks, scales)
    assert decoded.dtype == torch.float32 and decoded.is_contiguous()
    assert torch.equal(decoded.double(), by_definition(blocks, scales))
    assert torch.equal(decoded.bfloat16().float(), decoded)  # nothing is lost in 16 bits
    assert torch.equal(decoded.bfloat16(), convert_moe_packed_tensors(blocks, scales))
    assert set(decoded.abs().unique().tolist()) <= {
        v * 2.0**e for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for e in range(-5, -1)
    }


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A tiny GPT-OSS with the hub's names: `*_blocks` and `*_scales` in the place of the experts' weights."""
    folder = save_model(make_model("gpt_oss", intermediate_size=WIDTH), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[prefix]
            tensors[f"{prefix}_blocks"], tensors[f"{prefix}_scales"] = random_codes(rows, columns, layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_blocks_read_from_the_hubs_files_are_the_librarys_dequantized_ones(hub_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    whole = AutoModelForCausalLM.from_pretrained(
        hub_folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    streamed = StreamedModel(hub_folder)
    for index, expected in enumerate(whole.model.layers):
        with streamed.block(index) as block:
            assert set(dict(block.named_parameters())) == set(dict(expected.named_parameters()))
            for name, parameter in block.named_parameters():
                assert torch.equal(parameter, expected.get_parameter(name)), name
    assert float(whole.model.layers[1].mlp.experts.down_proj.detach().std()) > 0.05


def test_file_without_scales_is_refused(hub_folder: Path) -> None:
    tensors = load_file(hub_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, hub_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"down_proj"):
        StreamedModel(hub_folder)


def test_hubs_model_is_quantized_and_its_checkpoint_is_ordinary(hub_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(hub_folder, load_method("rtn-w4").build(), random_tokens(1, 8), out, fingerprint="job")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "mobie"
    assert "model.layers.0.mlp.experts.down_proj_bias" in read_tensors(out / KEPT)[0]
    with torch.no_grad():
        assert bool(torch.isfinite(load_model(out)[0](random_tokens(1, 8)).logits).all())


@pytest.mark.parametrize(("model_type", "method"), [("gpt_oss", "gptq"), ("olmoe", "mxfp4")])
def test_other_quantized_models_are_refused(model_type: str, method: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"the model is quantized already .quant_method '{method}'"):
        refuse_quantized(tmp_path)
