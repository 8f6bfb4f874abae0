"""The speed suite: bytes against brute-force counts, routings, random weights against the methods' own, records."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speed_records
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, EXPERTS, HIDDEN, TOP_K, WIDTH, make_model, random_tokens

from mobie.cli import main
from mobie.config import build_method
from mobie.errors import ConfigError, UnsupportedError
from mobie.figures import collect_figure, render
from mobie.jobs import speed as job
from mobie.jobs.keys import Keys
from mobie.kernels.attach import attach
from mobie.methods.base import BankStats, LinearStats
from mobie.models.base import Adapter
from mobie.packing.base import BitLedger
from mobie.paths import Layout
from mobie.provenance import import_closure
from mobie.records import Measurement, Record, read_record, write_record
from mobie.results import Results
from mobie.speed import random_weights
from mobie.speed.architectures import NAMES, Shape, load_shape
from mobie.speed.block import _layers, block_times
from mobie.speed.footprint import Activated, activated, footprint, kv_bytes_per_token, packed_blocks
from mobie.speed.measure import Planned, measure, measure_all, plan, ratios
from mobie.speed.quality import paired, quality
from mobie.speed.random_weights import RandomTensors, random_block, random_model
from mobie.speed.routers import balanced, distinct_assigned, distinct_experts, model_routers, routed, zipf
from mobie.speed.runners import LABELS, OURS, find_runner, runners
from mobie.speed.runners.base import Timing, prefills_of, steps_of
from mobie.speed.setting import Setting, SpeedProtocol, paper_setting
from mobie.speed.subject import RandomSubject
from mobie.speed.timing import Spread, copy_bandwidth
from mobie.tables import build_table
from mobie.tables.table import to_csv, to_markdown

MODEL_TYPES = sorted(CONFIGS)
#: formats of every kind that the method can store
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"joint_svd": "fused_gate_up", "basis_bits": 4},
    "right": {"shared_side": "right", "other_linears": "mixed_order", "basis_bits": 16},
    "off": {"joint_svd": "off", "scope": "matrix", "salient_share": 0.0},
    "truncated": {"rank": 8, "shared_side": "fewest_bytes", "block_size": 16},
}
PROTOCOL = SpeedProtocol(
    batch=2, prefill=6, decode=4, batches=(1,), routers=("zipf",), repetitions=2, slow_steps=4, dtype="float32"
)
SHAPE = "qwen1.5-moe-a2.7b"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch twins, so that nothing is compiled here, and small copies."""
    monkeypatch.setenv("MOBIE_KERNELS", "torch")
    monkeypatch.setattr("mobie.speed.timing.COPY_BYTES", {"cpu": 1 << 20})


def tiny(model_type: str, method: str = "mobie", **options: Any) -> Any:
    """A tiny model with random weights, packed by a method."""
    config = CONFIGS[model_type]()
    return random_model(config, build_method(method, options), device="cpu", dtype=torch.float32)


def subject(method: str = "mobie", model_type: str = "olmoe") -> RandomSubject:
    return RandomSubject("tiny", CONFIGS[model_type](), build_method(method, {}), device="cpu", dtype=torch.float32)


# --- shapes ----------------------------------------------------------------------------------------------------------


def meta(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_shape(name).build(), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(parameter.numel() for parameter in meta(name).parameters()) == load_shape(name).parameters


def test_an_unknown_shape_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="'olmoe-1b'.*did you mean olmoe-1b-7b"):
        load_shape("olmoe-1b")


def test_activated_memory_by_the_papers_definition_gives_its_two_numbers() -> None:
    """Section 5.4 prints 9.64 and 1.88 GB for Qwen1.5-MoE at batch 4; by hand: 24 layers of 16.8 M attention weights
    and 20 experts of 3 · 2048 · 1408, then two matrices of 151936 · 2048 in 16 bits."""
    model = meta(SHAPE)
    found = activated(model, None, batch=4)
    attention, expert, ends = 4 * 2048**2, 3 * 2048 * 1408, 2 * 151936 * 2048
    assert found == Activated(24 * (attention + (16 + 4) * expert), 16.0, ends)
    assert round(found.bytes / 2**30, 2) == 9.64
    assert round(replace(found, bits=1.35).bytes / 2**30, 2) == 1.88  # Table 5's bits; the text's 1.37 give 1.89


def test_keys_and_values_of_a_token() -> None:
    assert kv_bytes_per_token(load_shape(SHAPE).build(), torch.bfloat16) == 24 * 2 * 16 * 128 * 2
    assert kv_bytes_per_token(load_shape("qwen3-30b-a3b").build(), torch.bfloat16) == 48 * 2 * 4 * 128 * 2


# --- random weights --------------------------------------------------------------------------------------------------


def statistics_of(columns: int, tokens: int = 64, groups: int = 4) -> LinearStats:
    generator = torch.Generator().manual_seed(columns)
    weights = torch.rand(tokens, groups, generator=generator)
    return LinearStats.from_inputs(torch.randn(tokens, columns, generator=generator), weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_packed_weights_are_stored_as_the_method_stores_them(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, shapes, types, headers and ledger of the method's own result on weights of the same shape."""
    method = build_method("mobie", {"iterations": 1} | VARIANTS[variant])
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    block = adapter.blocks(model)[0]
    bank = adapter.expert_bank(block)
    stats = {name: statistics_of(weight.shape[2]) for name, weight in bank.projections.items()}
    own = method.quantize_experts(bank, BankStats({n: [s] * EXPERTS for n, s in stats.items()}, stats))
    weight = block.self_attn.q_proj.weight.detach()
    linear = method.quantize_linear(weight, statistics_of(weight.shape[1]))
    if hasattr(linear, "salient"):
        monkeypatch.setattr(random_weights, "LINEAR_SALIENT_SHARE", len(linear.salient) / weight.shape[1])
    found = random_block(adapter, block, method, RandomTensors("cpu", 0))
    assert found.experts.keys() == own.keys()
    pairs = [(found.experts[name], own[name]) for name in own] + [(found.linears["self_attn.q_proj"], linear)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.header() == theirs.header()
        assert {n: (t.shape, t.dtype) for n, t in ours.tensors().items()} == {
            n: (t.shape, t.dtype) for n, t in theirs.tensors().items()
        }
        assert ours.ledger(0.5) == theirs.ledger(0.5)
        assert ours.dequantize().isfinite().all()


def test_spare_bits_are_zero_and_columns_sorted_and_different() -> None:
    tensors = RandomTensors("cpu", 3)
    bits = tensors.bits(5, length=19)
    assert bits.shape == (5, 3) and int((bits[:, -1] >> 3).sum()) == 0 and int(bits[:, -1].sum()) > 0
    columns = tensors.columns(4, 50, 7)
    assert columns.dtype == torch.int16
    assert all(row.tolist() == sorted(set(row.tolist())) for row in columns)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_random_model_runs_with_finite_logits_of_a_dense_models_size(model_type: str) -> None:
    spread = {}
    for method in ("fp16", "mobie"):
        model = tiny(model_type, method)
        with torch.no_grad():
            logits = model(random_tokens(2, 9)).logits
        assert logits.isfinite().all()
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        spread[method] = float(logits.std())
    assert 0.5 < spread["mobie"] / spread["fp16"] < 2


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        method = build_method("mobie", {})
        return random_model(CONFIGS["olmoe"](), method, device="cpu", dtype=torch.float32, seed=seed).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("scope, budget", [("model", 1.5), ("experts", 2.5), ("experts", 1.1)])
def test_random_sign_planes_have_the_methods_budget(scope: str, budget: float) -> None:
    """Every block's bits are those of the budget; experts differ; a model of them runs, by kernels or without."""
    method = build_method("obe", {"scope": scope, "budget": budget})
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    dense = Adapter("olmoe").blocks(make_model("olmoe", **sizes))[0]
    block = random_block(Adapter("olmoe"), dense, method, RandomTensors("cpu", 0))
    planes = {name: part for name, part in block.parts().items() if part.format != "dense16"}
    assert (len(planes) == 3) == (scope == "experts")
    stored = BitLedger.merge({name: part.ledger() for name, part in planes.items()}).stored_bits
    assert 0.98 * budget < stored <= budget
    assert len({expert.plane_columns for expert in planes["experts.gate"].experts}) > 1
    assert all(part.dequantize().isfinite().all() for part in planes.values())
    model = random_model(CONFIGS["olmoe"](**sizes), method, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected = model(random_tokens(2, 9)).logits
        assert not attach(model, compute="kernels").fallbacks
        torch.testing.assert_close(model(random_tokens(2, 9)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_method_without_random_weights_is_named() -> None:
    with pytest.raises(UnsupportedError, match="billm: random packed weights exist for fp16, mobie and obe.*stored"):
        tiny("olmoe", "billm")


# --- bytes -----------------------------------------------------------------------------------------------------------


def all_bytes(model: Any) -> int:
    """Every stored byte of a model: what a state dict holds."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize("method", ["fp16", "mobie"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_step_that_chooses_every_expert_reads_every_byte_but_the_embeddings(model_type: str, method: str) -> None:
    model = tiny(model_type, method)
    found = footprint(model, packed_blocks(model), kv_per_token=100, int8_head=False)
    layers = [layer for layer in found.layers if layer.experts]
    embedding = model.get_input_embeddings().weight
    rest = all_bytes(model) - embedding.numel() * 4
    assert found.step(3, 7.5, [EXPERTS] * len(layers)) == rest + 3 * (HIDDEN * 4 + 7.5 * 100)


def test_each_expert_that_is_not_chosen_is_read_less() -> None:
    """The bytes of the first expert's own tensors, counted one by one in its bank; shared bases are always read."""
    model = tiny("olmoe")
    blocks = packed_blocks(model)
    found = footprint(model, blocks, kv_per_token=0, int8_head=False)
    one = sum(
        tensor.numel() * tensor.element_size()
        for bank in blocks[0].experts.values()
        for tensor in bank.experts[0].tensors().values()
    )
    assert found.layers[0].experts == (one,) * EXPERTS
    assert found.step(1, 0, [3, 3]) - found.step(1, 0, [2, 3]) == one


def test_experts_of_different_size_count_by_their_mean_and_a_fused_bank_has_two_of_each() -> None:
    model = tiny("olmoe", joint_svd="fused_gate_up")
    (bank, down) = (packed_blocks(model)[0].experts[name] for name in ("gate_up", "down"))
    assert len(bank.experts) == 2 * EXPERTS
    found = footprint(model, packed_blocks(model), kv_per_token=0, int8_head=False)
    matrices = (bank.experts[1], bank.experts[EXPERTS + 1], down.experts[1])
    sizes = [t.numel() * t.element_size() for matrix in matrices for t in matrix.tensors().values()]
    assert found.layers[0].experts[1] == sum(sizes)
    uneven = replace(found.layers[0], experts=(10, 20, 60))
    assert replace(found, layers=(uneven,)).step(1, 0, [2]) == uneven.always + 2 * 30 + found.ends + found.embedding_row


def test_an_int8_head_is_a_byte_per_weight_and_a_scale_per_row() -> None:
    model = tiny("olmoe", "fp16")
    wide, narrow = (footprint(model, packed_blocks(model), kv_per_token=0, int8_head=int8) for int8 in (False, True))
    rows = len(model.get_output_embeddings().weight)
    assert wide.ends - narrow.ends == rows * HIDDEN * 4 - (rows * HIDDEN + 2 * rows)
    with pytest.raises(Exception, match="1 numbers of experts, expected one for each of 2 MoE layers"):
        wide.step(1, 0, [3])


# --- routers ---------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 40), experts=st.integers(2, 20), data=st.data())
@settings(max_examples=40, deadline=None)
def test_balanced_counts_differ_by_one_at_most_and_tokens_choose_different_experts(
    tokens: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    chosen = balanced(tokens, experts, top_k, seed=1)
    counts = [int((chosen == e).sum()) for e in range(experts)]
    assert max(counts) - min(counts) <= (0 if tokens * top_k % experts == 0 else 1)
    for draw in (chosen, zipf(tokens, experts, top_k, seed=1)):
        assert draw.shape == (tokens, top_k) and draw.dtype == torch.int64
        assert all(len(set(row)) == top_k for row in draw.tolist())
        assert int(draw.min()) >= 0 and int(draw.max()) < experts


def test_zipf_frequencies_follow_one_over_the_rank() -> None:
    experts, tokens = 8, 60000
    counts = sorted(Counter(zipf(tokens, experts, 1, seed=2)[:, 0].tolist()).values(), reverse=True)
    odds = np.array([1 / rank for rank in range(1, experts + 1)])
    expected = tokens * odds / odds.sum()
    chi_square = float(((np.array(counts) - expected) ** 2 / expected).sum())
    assert chi_square < 25  # the 0.1 % point of 7 degrees of freedom is 24.3
    most_frequent = {int(zipf(200, experts, 1, seed=s)[:, 0].mode().values) for s in range(9)}
    assert len(most_frequent) > 1  # it differs by layer


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["balanced", "zipf"])
def test_a_routing_replaces_the_choice_in_every_layer_and_is_taken_back(model_type: str, kind: str) -> None:
    model = tiny(model_type, "fp16")
    seen: list[torch.Tensor] = []
    ids = random_tokens(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        with routed(model, kind):
            watch = [r.register_forward_hook(lambda m, a, out: seen.append(out[2])) for r in model_routers(model)]
            inside = model(ids).logits
        for handle in watch:
            handle.remove()
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(inside, before)
    draw = {"balanced": balanced, "zipf": zipf}[kind]
    assert [index.tolist() for index in seen] == [
        draw(12, EXPERTS, TOP_K, layer).tolist() for layer in range(len(seen))
    ]
    with pytest.raises(ConfigError, match="'zpif'.*zipf"), routed(model, "zpif"):
        pass


def test_counted_experts_are_those_of_the_assignment() -> None:
    model = tiny("olmoe", "fp16")
    for kind in ("balanced", "zipf"):
        with routed(model, kind):
            counted = distinct_experts(model, random_tokens(3, 5), steps=2)
        assert counted == distinct_assigned(kind, 2, 3, EXPERTS, TOP_K)
    assert distinct_assigned("balanced", 1, 1, EXPERTS, TOP_K) == [TOP_K]
    natural = distinct_experts(model, random_tokens(3, 5), steps=4)
    assert all(TOP_K <= value <= EXPERTS for value in natural)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_spread_is_numpys_and_its_error_that_of_a_median() -> None:
    draw = random.Random(0)
    values = [draw.gauss(5, 1) for _ in range(401)]
    found = Spread.of(values)
    assert (found.lower, found.median, found.upper) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))
    medians = [statistics.median(draw.gauss(5, 1) for _ in range(401)) for _ in range(400)]
    assert found.stderr == pytest.approx(statistics.stdev(medians), rel=0.15)
    rate = found.rate(10)
    assert rate.lower < rate.median < rate.upper and rate.median == 10 / found.median
    assert Spread.of([2.0]).stderr is None


def test_copy_bandwidth_counts_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobie.speed.timing.timed", lambda action, device, repetitions: [0.5, 0.5, 0.5])
    assert copy_bandwidth(torch.device("cpu")).median == 4 * (1 << 20)


def test_slow_runners_are_asked_for_less() -> None:
    setting = Setting(4, 1024, 256, repetitions=20, slow_steps=32)
    assert (steps_of(setting, [0.5, 0.01]), steps_of(setting, [0.5, 0.2])) == (256, 32)
    assert [prefills_of(setting, seconds) for seconds in (0.01, 1.0, 100.0)] == [20, 5, 1]


# --- measuring -------------------------------------------------------------------------------------------------------


def test_a_plan_begins_with_the_setting_and_has_ours_at_the_others() -> None:
    found = plan(PROTOCOL, "mobie", "packed", sweep=False)
    base = paper_setting(PROTOCOL)
    assert base == Setting(2, 6, 4, "natural", 2, 4) and base.mean_context == 7.5
    assert [item.runner for item in found if item.setting == base] == list(LABELS)
    others = {item.runner for item in found if item.setting != base}
    assert others == set(OURS)
    assert {(i.setting.batch, i.setting.router) for i in found} == {(2, "natural"), (1, "natural"), (2, "zipf")}
    assert plan(PROTOCOL, "mobie-u4", "packed", sweep=False) == [Planned("binary-16bit", base)]
    assert plan(PROTOCOL, "fp16", "dense", sweep=False) == [Planned("dense", base)]
    dense = plan(PROTOCOL, "fp16", "dense", sweep=True)
    assert not any(item.runner.startswith("binary") for item in dense)
    assert len(plan(PROTOCOL, "mobie", "packed", sweep=True)) == 3 * len(LABELS)


def test_every_runner_has_a_label_and_untried_ones_say_so() -> None:
    assert [runner.name for runner in runners()] == list(LABELS)
    where = subject()
    for name in ("vllm", "gemlite", "llama.cpp"):
        run = measure(where, Planned(name, paper_setting(PROTOCOL)), Spread(1.0, 1.0, 1.0, 1))
        assert run["status"] == "absent" and not run["tried"]
        assert run["reason"] == "needs a CUDA GPU; a plug-in that was never run by this project"
    with pytest.raises(ConfigError, match="'densee'.*dense"):
        find_runner("densee")


@pytest.mark.parametrize("name", ["library-eager", "library-grouped_mm", "dense", "binary-16bit", "binary-int8"])
def test_a_run_is_consistent_with_itself(name: str) -> None:
    """Speeds, shares and bytes of a run follow from its times and from counts made here."""
    where = subject(model_type="qwen2_moe")
    setting = replace(paper_setting(PROTOCOL), router="balanced", batch=2)
    run = measure(where, Planned(name, setting), Spread(1e9, 1e9, 1e9, 3))
    assert (run["status"], run["reason"]) == ("ok", None)
    step = run["step_seconds"]["median"]
    assert run["step_seconds"]["n"] == 4 and run["time_to_first_token"]["n"] == 2
    assert run["tokens_per_second"]["median"] == pytest.approx(2 / step)
    assert run["tokens_per_second_with_prefill"] == pytest.approx(8 / (4 * step + run["time_to_first_token"]["median"]))
    assert run["distinct_experts"] == min(EXPERTS, 2 * TOP_K)
    assert run["roofline_share"] == pytest.approx(run["bytes_per_step"] / step / 1e9)
    kind = find_runner(name).weights
    model = where.model(kind)
    head = model.get_output_embeddings().weight
    saved = 3 * head.numel() - 2 * len(head) if name == "binary-int8" else 0
    kv = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    rest = all_bytes(model) - 4 * model.get_input_embeddings().weight.numel() - saved
    assert run["bytes_per_step"] == rest + 2 * (4 * HIDDEN + kv * 7.5)
    assert run["weight_bytes"] >= all_bytes(model)


def test_packed_weights_decode_what_the_unpacked_model_decodes() -> None:
    """The runner that is timed computes the model: its tokens are those of the library's generate."""
    from mobie.kernels.attach import attach
    from mobie.runner import DecodeRunner

    model = tiny("olmoe")
    ids = random_tokens(2, 6)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[:, 6:]
    attach(model, compute="kernels")
    runner = DecodeRunner(model, batch=2, context=12, eos=())
    runner.prefill(ids)
    assert torch.equal(runner.decode(5), expected)


def test_a_runner_that_fails_is_a_run_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(find_runner("dense").__class__):
        def time(self, subject: Any, setting: Setting) -> Timing:
            raise RuntimeError("something odd\nand more")

    monkeypatch.setattr("mobie.speed.measure.find_runner", lambda name: Broken())
    runs = measure_all(subject(), plan(PROTOCOL, "fp16", "dense", sweep=False), progress=False)
    assert [(run["status"], run["reason"]) for run in runs] == [("failed", "RuntimeError: something odd")]


def test_ratios_are_of_the_same_setting() -> None:
    runs = [
        speed_records.run("dense", 10.0),
        speed_records.run("binary-16bit", 30.0),
        speed_records.run("binary-16bit", 50.0, batch=1),
        speed_records.absent("vllm", "no"),
    ]
    assert ratios(runs) == {"dense b4 natural": 1.0, "binary-16bit b4 natural": pytest.approx(3.0)}


def test_blocks_are_timed_over_more_than_a_cache() -> None:
    config = CONFIGS["deepseek_v2"]()
    method = build_method("mobie", {})
    found = block_times(config, method, device="cpu", dtype=torch.float32, rotated_bytes=50000, repetitions=3)
    assert [(f["way"], f["batch"]) for f in found] == [
        (way, batch) for way in ("dense", "binary-16bit", "binary-int8") for batch in (1, 4)
    ]
    for entry in found:
        assert (entry["layers"] - 1) * entry["bytes"] >= 50000
        assert entry["seconds"]["n"] == 3
    dense, binary = found[0], found[2]
    assert binary["times_dense"] == pytest.approx(dense["seconds"]["median"] / binary["seconds"]["median"])
    # router, two shared experts as one and three of six experts, in float32
    weights = EXPERTS * HIDDEN + 3 * 2 * WIDTH * HIDDEN + 3 * 3 * WIDTH * HIDDEN
    assert dense["bytes"] == 4 * weights
    assert _layers(config, 3).num_hidden_layers == 3 and _layers(config, 3).first_k_dense_replace == 0


def test_the_cost_of_int8_is_paired() -> None:
    assert paired([1.0, 2.5, 3.0], [0.5, 2.0, 3.5]) == {
        "mean": pytest.approx(0.5 / 3),
        "stderr": pytest.approx(math.sqrt(2 / 3 / 2 / 3)),
    }
    model = tiny("olmoe")
    found = quality(model, random_tokens(3, 12))
    assert found["tokens"] == 33 and found["windows"] == 3
    for name, change in found["difference"].items():
        ratio = found["perplexity"][name] / found["perplexity"]["16bit"]
        assert math.log(ratio) == pytest.approx(change["mean"], abs=1e-9)
    assert found["difference"]["int8-activations"]["mean"] != 0
    assert abs(found["difference"]["int8-head"]["mean"]) < 0.01


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of Qwen1.5-MoE is a tiny one."""
    config = CONFIGS["qwen2_moe"]().to_dict()
    known = {k: v for k, v in config.items() if k not in ("transformers_version", "architectures", "dtype")}
    monkeypatch.setattr(job, "load_shape", lambda name: Shape(name, "tiny", "here", 1, known))


def keys(layout: Layout, method: str = "mobie", model: str = SHAPE, suite: str = "paper") -> Keys:
    return Keys(layout, suite, model, 0, method)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_published_shape_is_skipped_with_the_command_that_measures_it(repository: Layout) -> None:
    record = job.speed_job(keys(repository))
    command = f"python -m mobie speed --suite paper --model {SHAPE} --method mobie"
    assert record.status == "skipped" and record.reason.endswith(f"measure it on one with `{command}`")
    assert job.speed_inputs(keys(repository)) == []


@pytest.mark.parametrize("method", ["fp16", "mobie"])
def test_a_record_holds_the_primary_run_and_survives_the_disk(
    method: str, repository: Layout, tiny_shape: None, tmp_path: Path
) -> None:
    record = job.speed_job(keys(repository, method), PROTOCOL, job.Options(device="cpu"))
    assert (record.status, record.reason, record.kind) == ("ok", None, "speed")
    write_record(tmp_path / "speed.json", record)
    again = read_record(tmp_path / "speed.json")
    assert again.measurements == record.measurements
    assert again.details == json.loads(json.dumps(record.details))
    name = {"fp16": "dense", "mobie": "binary-16bit"}[method]
    primary = next(run for run in record.details["runs"] if run["runner"] == name)
    speed = record.measurement("tokens_per_second")
    assert (speed.value, speed.n) == (primary["tokens_per_second"]["median"], primary["step_seconds"]["n"])
    assert speed.stderr > 0
    assert record.measurement("activated_bytes").value == primary["activated_bytes"]
    assert set(record.details["no_verdict"]) == set(job.TIMINGS)
    assert record.details["weights"] == "random" and record.details["device"]
    bits = record.measurement("bits_paper").value
    assert bits == 16 if method == "fp16" else 1 < bits < 8
    assert "inputs" in record.provenance and record.provenance["inputs"]["shape"]


def test_bits_of_a_record_are_those_of_all_packed_parts(repository: Layout, tiny_shape: None) -> None:
    record = job.speed_job(keys(repository, "mobie-u4"), PROTOCOL, job.Options(device="cpu"))
    model = tiny("qwen2_moe", basis_bits=4)
    parts = {
        f"{i}.{n}": p.ledger(TOP_K / EXPERTS) for i, b in enumerate(packed_blocks(model)) for n, p in b.parts().items()
    }
    assert record.measurement("bits_stored").value == pytest.approx(BitLedger.merge(parts).stored_bits)
    assert len(record.details["runs"]) == 1


def test_a_primary_run_that_fails_leaves_the_others_in_the_record(
    repository: Layout, tiny_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("mobie.speed.runners.ours.BinaryRunner.time", refuse)
    record = job.speed_job(keys(repository), PROTOCOL, job.Options(device="cpu"))
    assert (record.status, record.measurement("tokens_per_second")) == ("oom", None)
    assert record.reason == "binary-16bit at batch 2: OutOfMemoryError: out of memory"
    assert {run["runner"] for run in record.details["runs"] if run["status"] == "ok"} >= {"dense", "library-eager"}


def test_what_is_not_timed_still_has_its_bytes(
    repository: Layout, tiny_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("no module of the model has a kernel")

    options = job.Options(device="cpu")
    timed = job.speed_job(keys(repository, "mobie-u4"), PROTOCOL, options)
    monkeypatch.setattr("mobie.speed.runners.ours.BinaryRunner.time", refuse)
    record = job.speed_job(keys(repository, "mobie-u4"), PROTOCOL, options)
    assert record.status == "unsupported" and "no module of the model has a kernel" in record.reason
    for name in ("activated_bytes", "bits_paper", "bits_stored"):
        assert record.measurement(name).value == timed.measurement(name).value


def test_wrong_options_are_refused(repository: Layout) -> None:
    with pytest.raises(ConfigError, match="no published shape of nano-olmoe; expected one of.*--weights stored"):
        job.speed_job(keys(repository, model="nano-olmoe", suite="smoke"), options=job.Options(weights="random"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no CUDA GPU"):
            job.speed_job(keys(repository), options=job.Options(device="cuda"))


def test_a_hand_run_has_its_own_protocol() -> None:
    changed = job.change_protocol(PROTOCOL, batch=7, prefill=None, router="zipf")
    assert (changed.batch, changed.prefill, changed.router, changed.batches) == (7, 6, "zipf", ())
    assert job.change_protocol(PROTOCOL) == PROTOCOL
    assert changed.digest() != PROTOCOL.digest()
    assert {item.setting.router for item in plan(changed, "mobie", "packed", sweep=False)} == {"zipf"}


def test_stored_weights_wait_for_their_checkpoint(repository: Layout) -> None:
    nano = keys(repository, model="nano-olmoe", suite="smoke")
    names = [path.relative_to(repository.root).as_posix() for path in job.speed_inputs(nano)]
    assert names[0] == "results/smoke/nano-olmoe/mobie/s0/quantize.json" and "windows/wiki-" in names[1]
    assert len(job.speed_inputs(replace(nano, method="mobie-u4"))) == 1
    hole = Record("quantize", "oom", "no memory left", "smoke", "nano-olmoe", "mobie", 0, "p")
    write_record(nano.record("quantize"), hole)
    record = job.speed_job(nano)
    assert (record.status, record.reason) == ("skipped", "quantizing with mobie: oom: no memory left")


def test_quantizing_does_not_depend_on_kernels_or_speed() -> None:
    modules = import_closure(["mobie.pipeline", "mobie.packing.checkpoint"])
    assert not [name for name in modules if name.startswith(("mobie.kernels", "mobie.runner", "mobie.speed"))]


# --- tables and figures ----------------------------------------------------------------------------------------------


def put(path: Path, method: str, *, cpu: bool, model: str = SHAPE, suite: str = "paper", **changes: Any) -> None:
    record = Record(
        "speed",
        "ok",
        None,
        suite,
        model,
        method,
        0,
        "p",
        tuple(speed_records.measurements(method)),
        speed_records.details(method, cpu=cpu),
    )
    write_record(path, replace(record, **changes))


def test_the_table_shows_all_runs_and_says_how_to_fill_the_holes(repository: Layout) -> None:
    put(
        repository.record("smoke", "nano-olmoe", "mobie", 0, "speed"),
        "mobie",
        cpu=True,
        model="nano-olmoe",
        suite="smoke",
    )
    table = build_table("speed", Results("smoke", repository))
    runs = {run["runner"]: run for run in speed_records.details("mobie")["runs"] if run["batch"] == 4}
    rows = {row.label: row for row in table.rows if row.model == "nano-olmoe" and row.section.startswith("batch 4,")}
    dense, binary, grouped = (
        runs[name]["tokens_per_second"]["median"] for name in ("dense", "binary-16bit", "library-grouped_mm")
    )
    cells = rows[LABELS["binary-16bit"]].cells
    assert cells["tokens_per_second"].value == binary
    assert cells["against_dense"].value == pytest.approx(binary / dense)
    assert cells["against_grouped"].value == pytest.approx(binary / grouped)
    assert cells["first_token"].value == 250 and cells["roofline"].value == 25
    assert "against_dense" not in rows[LABELS["dense"]].cells
    assert rows[LABELS["vllm"]].cells["tokens_per_second"].reason.startswith("vllm is not installed")
    blocks = [row for row in table.rows if row.section.startswith("MoE block")]
    assert [row.cells["milliseconds"].value for row in blocks] == pytest.approx([0.4, 0.1])
    holes = [row.cells["tokens_per_second"] for row in table.rows if row.model == "Qwen1.5-MoE-A2.7B"]
    assert len(holes) == len(LABELS) and {cell.status for cell in holes} == {"absent"}
    assert f"--suite paper --model {SHAPE} --method mobie" in holes[0].reason
    notes = "\n".join(table.notes)
    assert "CPU timings of a small model" in notes and "int8 activations +0.060 ± 0.040 %" in notes
    lines = csv.DictReader(io.StringIO(to_csv(table)))
    assert {line["model"] for line in lines} == {"nano-olmoe", *(load_shape(name).label for name in NAMES)}


def test_published_records_fill_the_table_and_are_named(repository: Layout) -> None:
    path = repository.published("paper", SHAPE, "mobie", 0, "speed")
    put(path, "mobie", cpu=False)
    for suite in ("smoke", "paper"):
        put(
            repository.record("paper", SHAPE, "mobie", 0, "speed"),
            "mobie",
            cpu=False,
            status="skipped",
            reason="no GPU",
        )
        table = build_table("speed", Results(suite, repository))
        rows = [row for row in table.rows if "Qwen1.5" in row.model and row.section.startswith("batch 4")]
        assert rows[0].cells["tokens_per_second"].record == f"results/published/paper/{SHAPE}/mobie/s0/speed.json"
        assert "random weights of the true shape, timed on a graphics card; a published record" in to_markdown(table)
        assert path in plan_of(suite, repository)


def plan_of(suite: str, layout: Layout) -> list[Path]:
    results = Results(suite, layout, plan=True)
    build_table("speed", results)
    return list(results.asked)


def test_an_own_record_goes_before_a_published_one(repository: Layout) -> None:
    put(repository.published("paper", SHAPE, "mobie", 0, "speed"), "mobie", cpu=False)
    value = (Measurement("tokens_per_second", 7.0, 0.1, 9),)
    own = repository.record("paper", SHAPE, "mobie", 0, "speed")
    put(own, "mobie", cpu=False, measurements=value)
    results = Results("paper", repository)
    model = next(m for m in results.models("speed") if m.name == SHAPE)
    cell = results.cell(model, "mobie", "speed", "tokens_per_second")
    assert (cell.value, cell.record) == (7.0, own.relative_to(repository.root).as_posix())
    failed = replace(read_record(own), status="failed", reason="broken")
    write_record(own, failed)
    assert Results("paper", repository).cell(model, "mobie", "speed", "tokens_per_second").reason == "broken"


def test_figure_5_is_drawn_from_published_records_alone(repository: Layout) -> None:
    for method in ("fp16", "mobie-u16", "mobie", "mobie-u4"):
        put(repository.published("paper", SHAPE, method, 0, "speed"), method, cpu=False)
    data = collect_figure("fig5", Results("paper", repository))
    points = [row for row in data.select(panel="Tokens per second") if row["series"] != "paper"]
    assert [row["y"] for row in points] == [
        speed_records.measurements(m)[0].value for m in ("fp16", "mobie-u16", "mobie", "mobie-u4")
    ]
    assert {row["x"] for row in points} == {2.3}
    assert all(row["series"].endswith("(published record)") for row in points)
    assert "random weights of the true shape, timed on a graphics card" in data.caption
    running = [row for row in data.select(series="weights in memory")]
    assert running[0]["y"] == 100 and all(row["y"] is not None for row in running)
    render(data)


def test_figure_5_says_that_a_cpus_timings_are_no_statement(repository: Layout) -> None:
    put(
        repository.record("smoke", "nano-olmoe", "mobie", 0, "speed"),
        "mobie",
        cpu=True,
        model="nano-olmoe",
        suite="smoke",
    )
    data = collect_figure("fig5", Results("smoke", repository))
    caption = data.caption
    assert "throughput of a CPU" in data.facts
    assert "the stored weights, timed on a processor; CPU timings of a small model say nothing" in caption


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_verb_writes_a_record_or_none(repository: Layout) -> None:
    def run(*options: str) -> str:
        wanted = ["speed", "--suite", "paper", "--model", SHAPE, "--method", "mobie"]
        done = CliRunner().invoke(main, [*wanted, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    path = repository.record("paper", SHAPE, "mobie", 0, "speed")
    assert "skipped: needs a CUDA GPU" in run("--batch", "8")
    assert not path.exists()
    run("--batch", "8", "--out", "b8.json")
    assert read_record(repository.root / "b8.json").status == "skipped"
    run()
    assert read_record(path).status == "skipped"
