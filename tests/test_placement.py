"""A model that is larger than the GPU is scored with some of its blocks in RAM."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, make_model, random_tokens

from mobie.scoring.placement import place, places, spread, weight_bytes

BLOCKS = 6


def six_blocks(model_type: str) -> torch.nn.Module:
    changes = {"layer_types": None} if model_type in ("gpt_oss", "qwen3_next") else {}
    return make_model(model_type, num_hidden_layers=BLOCKS, **changes)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_whole_blocks_fill_the_gpu_first_and_the_others_stay_in_ram(model_type: str) -> None:
    model = six_blocks(model_type)
    block = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    room = weight_bytes(model) - block  # of which a block's is kept free
    found = places(model, {0: room})
    assert set(found.values()) == {0, "cpu"}
    by_block = [found[f"model.layers.{index}"] for index in range(BLOCKS)]  # a KeyError where a block is split
    on_gpu = by_block.count(0)
    assert 1 <= on_gpu < BLOCKS
    assert by_block == [0] * on_gpu + ["cpu"] * (BLOCKS - on_gpu)
    assert sum(p.nbytes for layer in model.model.layers[:on_gpu] for p in layer.parameters()) <= room - block


def test_without_a_gpu_a_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = make_model("olmoe")
    assert place(model) is model
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_model_that_visits_block_by_block_gives_the_same_logits(model_type: str) -> None:
    tokens = random_tokens(2, 16).cuda()
    with torch.no_grad():
        expected = six_blocks(model_type).cuda()(tokens).logits
        model = six_blocks(model_type)
        block = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
        got = spread(model, {0: weight_bytes(model) - block})(tokens).logits
    torch.testing.assert_close(got, expected)
