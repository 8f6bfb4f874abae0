"""Scores against the library's own losses, brute force and closed forms."""

from __future__ import annotations

import copy
import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mini_wheel import ARC_EASY, HELLASWAG, LAMBADA, PIQA, TEXT, WINOGRANDE, write_mini_wheel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mobie.data.lambada import standard_text
from mobie.data.mirror import write_mirror
from mobie.data.texts import TEXTS, text_digest
from mobie.errors import ConfigError, DataError, MeasurementError, UnsupportedError
from mobie.jobs.data import make_windows, read_windows, windows_path
from mobie.jobs.keys import Keys, find_source
from mobie.jobs.score import JOBS
from mobie.paths import Layout, embedded_model
from mobie.provenance import file_hash
from mobie.scoring.perplexity import PerplexityProtocol, perplexity
from mobie.scoring.routing import RoutingProtocol, compare_routing, record_routing, routing, token_shift
from mobie.scoring.tasks import TaskScores, TasksProtocol, load_tasks, sample_items, tasks
from mobie.scoring.windows import (
    WindowProtocol,
    WindowsOrigin,
    load_windows,
    save_windows,
    token_windows,
    tokenizer_files_digest,
)

ROOT = Path(__file__).parents[1]
GROUP = ROOT / "workflow" / "config" / "lm_eval" / "zero_shot.yaml"
SEVEN = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "lambada_standard", "piqa", "winogrande")
DOCUMENTS = [f"{TEXT} {i} times, said number {i * i}." for i in range(30)]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(DOCUMENTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def olmoe(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> OlmoeForCausalLM:
    torch.manual_seed(seed)
    config = OlmoeConfig(**SMALL, vocab_size=len(tokenizer), num_experts=4, pad_token_id=0, initializer_range=0.3)
    return OlmoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    return olmoe(tokenizer)


def cut(tokenizer: PreTrainedTokenizerFast, protocol: WindowProtocol) -> torch.Tensor:
    return token_windows(DOCUMENTS, tokenizer, protocol)


# ---------------------------------------------------------------- windows


def test_windows_follow_one_another_and_drop_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("\n\n".join(DOCUMENTS))["input_ids"]
    windows = token_windows(DOCUMENTS, tokenizer, WindowProtocol(text="t", window=16))
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert len(ids) % 16, "the text should have an incomplete last window"
    assert tokenizer.decode(windows.flatten()).startswith(f"{DOCUMENTS[0]}\n\n{DOCUMENTS[1]}")


def test_fewer_windows_are_spread_evenly(tokenizer: PreTrainedTokenizerFast) -> None:
    numbers = [str(i) for i in range(400)]  # no window occurs twice
    all_windows = token_windows(numbers, tokenizer, WindowProtocol(text="t", window=16)).tolist()
    few = token_windows(numbers, tokenizer, WindowProtocol(text="t", window=16, windows=5)).tolist()
    places = [all_windows.index(window) for window in few]
    steps = np.diff(places)
    assert places[0] == 0 and len(few) == 5 and steps.max() - steps.min() <= 1
    assert len(all_windows) - places[-1] <= steps.max() + 1


def test_beginning_of_sequence_policies(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = token_windows(DOCUMENTS, tokenizer, WindowProtocol(text="t", window=16)).flatten().tolist()
    once = token_windows(DOCUMENTS, tokenizer, WindowProtocol(text="t", window=16, bos="text")).flatten().tolist()
    each = token_windows(DOCUMENTS, tokenizer, WindowProtocol(text="t", window=16, bos="window"))
    assert once[:100] == [tokenizer.bos_token_id, *plain[:99]]
    assert each[:, 0].eq(tokenizer.bos_token_id).all() and each.shape[1] == 16
    assert each[:, 1:].flatten().tolist()[:100] == plain[:100]


def test_a_text_shorter_than_a_window_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="'wiki': got . tokens, expected at least one window of 64"):
        token_windows(["the cat"], tokenizer, WindowProtocol(text="wiki", window=64))


ORIGIN = WindowsOrigin("wiki", "a" * 64, "register", "b" * 64, "c" * 64)


def test_windows_come_back_from_their_file_as_they_were_cut(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for bos in ("none", "text", "window"):
        windows = cut(tokenizer, WindowProtocol(text="t", window=16, windows=5, bos=bos))
        save_windows(tmp_path / "w.safetensors", windows, ORIGIN)
        loaded, origin = load_windows(tmp_path / "w.safetensors", {"text": "wiki", "protocol_sha256": "c" * 64})
        assert torch.equal(loaded, windows) and loaded.dtype == windows.dtype
        assert origin == ORIGIN


@pytest.mark.parametrize("field", ["text", "source", "tokenizer_sha256", "protocol_sha256", "text_sha256"])
def test_windows_of_something_else_are_refused(field: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_windows(path, torch.zeros(2, 4, dtype=torch.int64), ORIGIN)
    with pytest.raises(DataError, match=rf"w\.safetensors: cut from something else: {field} .*expected other; delete"):
        load_windows(path, {field: "other"})


def test_windows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(DataError, match="no such token windows; run `python -m mobie windows`"):
        load_windows(path, {})
    save_windows(path, torch.zeros(2, 4, dtype=torch.int64), ORIGIN)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="not readable token windows.*delete it"):
        load_windows(path, {})


def test_the_windows_digest_covers_what_decides_the_tokens_and_nothing_else() -> None:
    base = PerplexityProtocol(text="wiki")
    decide = [{"text": "web"}, {"window": 128}, {"windows": 3}, {"separator": " "}, {"bos": "text"}]
    assert len({base.model_copy(update=change).windows_digest() for change in decide} | {base.windows_digest()}) == 6
    for same in ({"batch_size": 1}, {"dtype": "bfloat16"}):
        assert base.model_copy(update=same).windows_digest() == base.windows_digest()
    assert RoutingProtocol(text="wiki").windows_digest() == base.windows_digest()
    assert base.windows_digest().startswith(base.windows_id) and len(base.windows_id) == 12


def test_a_tokenizers_digest_is_over_its_files_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer file"):
        tokenizer_files_digest(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = tokenizer_files_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert tokenizer_files_digest(tmp_path) == before
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text().replace("the", "teh"))
    assert tokenizer_files_digest(tmp_path) != before


@pytest.fixture
def windowed(repository: Layout, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Keys of the embedded model, with a short text in place of every text's source."""
    monkeypatch.setattr("mobie.jobs.data.checked_source", lambda name, layout: Path(name))
    monkeypatch.setattr("mobie.jobs.data.read_text", lambda text, path: [f"{text} {i * i}" for i in range(4000)])
    return Keys(repository, "smoke", "nano-olmoe", 0, "rtn-w3")


def test_the_windows_job_writes_what_the_scores_read(windowed: Keys) -> None:
    protocols = (*windowed.protocol.perplexity, windowed.protocol.routing, windowed.protocol.shift)
    written = make_windows(windowed)
    assert sorted(written) == sorted({windows_path(windowed, part) for part in protocols})
    tokenizer = AutoTokenizer.from_pretrained(embedded_model("nano-olmoe"))
    for part in protocols:
        documents = [f"{part.text} {i * i}" for i in range(4000)]
        windows, hashes = read_windows(windowed, part, embedded_model("nano-olmoe"))
        assert torch.equal(windows, token_windows(documents, tokenizer, part))
        path = windows_path(windowed, part)
        assert path.name == f"{part.text}-{part.windows_digest()[:12]}.safetensors"
        assert hashes == {f"text {part.text}": text_digest(documents), f"windows {part.text}": file_hash(path)}


def test_one_text_or_one_protocol_can_be_cut_alone(windowed: Keys) -> None:
    routing_protocol = windowed.protocol.routing
    (only,) = make_windows(windowed, routing_protocol.text, routing_protocol.windows_id)
    assert only == windows_path(windowed, routing_protocol)
    assert [path.name for path in only.parent.iterdir()] == [only.name]
    with pytest.raises(ConfigError, match=f"no windows of text 'wkii'.*{routing_protocol.windows_id}"):
        make_windows(windowed, "wkii")


def test_windows_of_another_tokenizer_or_source_are_refused(
    windowed: Keys, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    part = windowed.protocol.perplexity[0]
    with pytest.raises(DataError, match="no such token windows; run `python -m mobie windows`"):
        read_windows(windowed, part, embedded_model("nano-olmoe"))
    make_windows(windowed)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="cut from something else: tokenizer_sha256"):
        read_windows(windowed, part, tmp_path)
    register = windowed.layout.sources
    name = TEXTS[part.text].source
    version = find_source(name, windowed.layout).version
    register.write_text(register.read_text().replace(f",{version},", ",99,"))
    with pytest.raises(DataError, match="cut from something else: source"):
        read_windows(windowed, part, embedded_model("nano-olmoe"))


def test_the_perplexity_job_keeps_the_losses_of_all_windows(
    windowed: Keys, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shape = SMALL | {"vocab_size": 4096, "max_position_embeddings": 256}
    model = OlmoeForCausalLM(OlmoeConfig(**shape, num_experts=4)).eval()
    monkeypatch.setattr("mobie.jobs.score.checkpoint_of", lambda keys, method: (embedded_model("nano-olmoe"), "hash"))
    monkeypatch.setattr("mobie.jobs.score.load", lambda folder, dtype: (model, None))
    path = windowed.layout.config_file("protocols", "smoke")
    path.write_text(path.read_text().replace("windows: 64", "windows: 3"))
    make_windows(windowed)
    job = JOBS["perplexity"](windowed)
    scores = job.measure()
    texts = {part.text for part in windowed.protocol.perplexity}
    assert set(job.inputs) == {"checkpoint", *(f"{kind} {text}" for kind in ("text", "windows") for text in texts)}
    assert scores.details["window_tokens"] == dict.fromkeys(texts, 255)
    assert set(scores.details["window_nll"]) == texts
    for measurement in scores.measurements:
        losses = scores.details["window_nll"][measurement.name.removesuffix(".perplexity")]
        assert len(losses) == len(set(losses)) == 3
        assert measurement.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-14)
    assert json.loads(json.dumps(scores.details)) == scores.details  # no digit is lost in a record


# ---------------------------------------------------------------- protocols


def test_protocols_are_frozen_strict_and_hashed_by_every_field() -> None:
    base = PerplexityProtocol(text="wiki")
    assert base.digest() == PerplexityProtocol(text="wiki").digest()
    changes = [{"text": "web"}, {"window": 128}, {"windows": 3}, {"separator": " "}, {"bos": "text"}, {"batch_size": 1}]
    digests = {base.model_copy(update=change).digest() for change in [*changes, {"dtype": "bfloat16"}]}
    assert len(digests | {base.digest()}) == 8
    assert RoutingProtocol(text="wiki").digest() != base.digest()
    with pytest.raises(ValueError, match="frozen"):
        base.window = 3
    with pytest.raises(ValueError, match="strid"):
        PerplexityProtocol(text="wiki", stride=1)


@pytest.mark.parametrize("name", ["smoke", "paper"])
def test_the_repositorys_protocols_are_valid_and_name_known_texts_and_tasks(name: str) -> None:
    from mobie.data.texts import TEXTS

    raw = yaml.safe_load((ROOT / "workflow" / "config" / "protocols" / f"{name}.yaml").read_text())
    texts = [PerplexityProtocol(**part) for part in raw["perplexity"]] + [RoutingProtocol(**raw["routing"])]
    assert {part.text for part in texts} <= set(TEXTS)
    assert TasksProtocol(**raw["tasks"]).tasks == SEVEN
    parts = {"perplexity", "tasks", "hard", "routing", "shift", "cka", "generations", "code", "speed", "gate"}
    assert set(raw) == parts


# ---------------------------------------------------------------- perplexity


def test_perplexity_is_the_exponential_of_the_models_own_loss(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    protocol = PerplexityProtocol(text="t", window=32, windows=7, batch_size=3)
    windows = token_windows(DOCUMENTS, tokenizer, protocol)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    got = perplexity(model, windows, protocol).measurement
    assert got.name == "t.perplexity" and got.n == 7 * 31 and got.chance is None
    assert got.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    # delta method: |d exp(m)/dm| times the standard error of the mean loss
    assert got.stderr == pytest.approx(math.exp(np.mean(losses)) * np.std(losses, ddof=1) / math.sqrt(7), rel=1e-3)


def test_window_losses_are_the_perplexity_s_and_the_library_s(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    protocol = PerplexityProtocol(text="t", window=32, windows=7, batch_size=3)
    windows = cut(tokenizer, protocol)
    got = perplexity(model, windows, protocol)
    assert got.measurement.value == pytest.approx(math.exp(math.fsum(got.window_nll) / 7), rel=1e-14)
    assert got.window_tokens == 31 and got.measurement.n == got.window_tokens * len(got.window_nll)
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    with torch.no_grad():
        for row, loss in zip(windows, got.window_nll, strict=True):
            probabilities = double(input_ids=row[None]).logits[0, :-1].softmax(-1)
            assert loss == pytest.approx(-float(probabilities[range(31), row[1:]].log().mean()), rel=1e-5)


def test_the_batch_size_does_not_change_a_perplexity(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    protocols = [PerplexityProtocol(text="t", window=32, batch_size=size) for size in (1, 4, 100)]
    values = [perplexity(model, cut(tokenizer, p), p).measurement.value for p in protocols]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    uniform = olmoe(tokenizer)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    protocol = PerplexityProtocol(text="t", window=32)
    got = perplexity(uniform, cut(tokenizer, protocol), protocol).measurement
    assert got.value == pytest.approx(len(tokenizer), rel=1e-6)
    assert got.stderr == pytest.approx(0, abs=1e-3)


def test_a_single_window_has_no_standard_error(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = PerplexityProtocol(text="t", window=32, windows=1)
    assert perplexity(model, cut(tokenizer, protocol), protocol).measurement.stderr is None


def test_models_that_do_not_fit_the_protocol_are_refused(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    half, long = PerplexityProtocol(text="t", dtype="bfloat16"), PerplexityProtocol(text="t", window=256)
    with pytest.raises(ConfigError, match="float32, the protocol says bfloat16"):
        perplexity(model, cut(tokenizer, half), half)
    with pytest.raises(ConfigError, match="windows of 256 tokens exceed the model's context of 128; use 128 or less"):
        perplexity(model, cut(tokenizer, long), long)


def test_a_destroyed_model_is_an_error_not_a_number(tokenizer: PreTrainedTokenizerFast) -> None:
    broken = olmoe(tokenizer)
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    protocol = PerplexityProtocol(text="t", window=32, windows=4)
    with pytest.raises(MeasurementError, match="not finite in 4 of 4 windows"):
        perplexity(broken, cut(tokenizer, protocol), protocol)
    with torch.no_grad():
        broken.lm_head.weight.copy_(torch.randn_like(broken.lm_head.weight) * 1e6)
    with pytest.raises(MeasurementError, match="too large for exp"):
        perplexity(broken, cut(tokenizer, protocol), protocol)


# ---------------------------------------------------------------- routing


ROUTING = RoutingProtocol(text="t", window=16, windows=6, batch_size=4)


def test_identical_models_route_identically(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for measurement in routing(model, model, cut(tokenizer, ROUTING), ROUTING):
        assert measurement.value == (0 if measurement.name.endswith("expert_shift") else 1)
        assert measurement.stderr == 0


def test_routing_against_brute_force(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    other = olmoe(tokenizer, seed=1)
    recordings = [record_routing(m, cut(tokenizer, ROUTING), ROUTING) for m in (model, other)]
    got = {m.name: m for m in routing(model, other, cut(tokenizer, ROUTING), ROUTING)}
    for layer in range(2):
        similarity, shift = np.zeros((6, 16)), np.zeros((6, 16))
        for window in range(6):
            for token in range(16):
                z1, z2 = (r[layer, window, token].double().numpy() for r in recordings)
                p, q = np.exp(z1) / np.exp(z1).sum(), np.exp(z2) / np.exp(z2).sum()
                similarity[window, token] = p @ q / np.linalg.norm(p) / np.linalg.norm(q)
                shift[window, token] = len(set(np.argsort(-q)[:2]) - set(np.argsort(-p)[:2])) / 2
        for name, values, n in (("similarity", similarity, 96), ("expert_shift", shift, 192)):
            measured = got[f"layer{layer}.{name}"]
            assert measured.value == pytest.approx(values.mean(), abs=1e-12) and measured.n == n
            assert measured.stderr == pytest.approx(values.mean(axis=1).std(ddof=1) / math.sqrt(6), abs=1e-12)
    for name in ("similarity", "expert_shift"):
        layers = [got[f"layer{layer}.{name}"].value for layer in range(2)]
        assert 0 < got[name].value < 1 and got[name].value == pytest.approx(np.mean(layers))


def test_opposite_routing_shifts_every_expert() -> None:
    z = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert token_shift(z, -z, top_k=2) == 1
    assert token_shift(z, torch.tensor([4.0, 1.0, 2.0, 3.0]), top_k=2) == 0.5
    assert token_shift(z, torch.tensor([3.0, 4.0, 2.0, 1.0]), top_k=2) == 0  # same experts, other order


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral"])
def test_recorded_logits_are_those_the_routers_give(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(2)
    shape = SMALL | {"vocab_size": len(tokenizer), "pad_token_id": 0}
    model = {
        "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**shape, num_experts=4)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, num_experts=4, moe_intermediate_size=16, head_dim=16)
        ),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4)),
    }[family]().eval()
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda gate, inputs, _: seen.append(inputs[0].flatten(0, -2) @ gate.weight.T)
        )
        for layer in model.model.layers
    ]
    protocol = ROUTING.model_copy(update={"batch_size": 6})
    got = record_routing(model, cut(tokenizer, protocol), protocol)
    for hook in hooks:
        hook.remove()
    assert got.shape == (2, 6, 16, 4)
    torch.testing.assert_close(got.flatten(1, 2), torch.stack(seen))


def test_recordings_that_cannot_be_compared_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    z = torch.zeros(1, 2, 3, 4)
    with pytest.raises(DataError, match="expected equal ones"):
        compare_routing(z, torch.zeros(1, 2, 3, 5), top_k=2)
    with pytest.raises(MeasurementError, match="NaN"):
        compare_routing(z, z * math.nan, top_k=2)

    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {k: v for k, v in SMALL.items() if k != "num_experts_per_tok"}
    dense = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0))
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM gives no router logits"):
        record_routing(dense, cut(tokenizer, ROUTING), ROUTING)


# ---------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    write_mirror(write_mini_wheel(folder / "mini.whl"), folder / "data")
    return folder / "data"


def tasks_protocol(**changes: object) -> TasksProtocol:
    fields = {"harness": "0.4.13", "group": "zero_shot", "tasks": SEVEN, "limit": 6, "batch_size": 4, "max_length": 512}
    return TasksProtocol(**fields | changes)


@pytest.fixture(scope="module")
def scores(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, mirror: Path) -> TaskScores:
    """One run of the harness on all seven tasks, with every connection to a network forbidden."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a network connection was tried")

    state = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", forbidden)
        patch.setattr(socket, "getaddrinfo", forbidden)
        found = tasks(model, tokenizer, tasks_protocol(), GROUP, mirror)
    assert torch.equal(state, torch.random.get_rng_state()), "the harness set the global generator"
    return found


def log_likelihood(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, answer: str) -> float:
    """Of `answer` after `context`, which is cut on its left to the model's 128 tokens."""
    start, whole = len(tokenizer(context)["input_ids"]), tokenizer(context + answer)["input_ids"]
    count = len(whole) - start
    kept = torch.tensor(whole[-129:])
    with torch.no_grad():
        log_p = model(input_ids=kept[None, :-1]).logits[0].double().log_softmax(-1)
    return sum(log_p[position - 1, kept[position]].item() for position in range(len(kept) - count, len(kept)))


def expected_choices(task: str, item: int) -> tuple[list[tuple[str, str]], list[str], int]:
    """(context, continuation) of every choice as lm-eval asks, the choices as `acc_norm` measures them, the gold."""
    if task == "arc_easy":
        doc = ARC_EASY[item]
        return [(doc["query"], f" {c}") for c in doc["choices"]], doc["choices"], doc["gold"]
    if task == "piqa":
        doc, choices = PIQA[item], [PIQA[item]["sol1"], PIQA[item]["sol2"]]
        return [(f"Question: {doc['goal']}\nAnswer:", f" {c}") for c in choices], choices, doc["label"]
    if task == "winogrande":
        doc = WINOGRANDE[item]
        before, after = doc["sentence"].split("_")
        names = [doc["option1"], doc["option2"]]
        return [(before + name, after) for name in names], names, int(doc["answer"]) - 1
    doc = HELLASWAG[item]
    context = f"Walking: {doc['ctx_a'].removeprefix('[header] ')} {doc['ctx_b'].capitalize()}".strip()
    endings = [ending.removeprefix("[step]") for ending in doc["endings"]]  # the harness leaves the space
    return [(context, f" {ending}") for ending in endings], endings, int(doc["label"])


@pytest.mark.parametrize("task", ["arc_easy", "piqa", "winogrande", "hellaswag"])
def test_answers_are_those_of_brute_force(
    task: str, scores: TaskScores, model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    acc, acc_norm = [], []
    for item in scores.items[task]:
        asked, choices, gold = expected_choices(task, item)
        likelihoods = np.array([log_likelihood(model, tokenizer, *pair) for pair in asked])
        acc.append(float(likelihoods.argmax() == gold))
        acc_norm.append(float((likelihoods / [len(choice) for choice in choices]).argmax() == gold))
    assert scores.answers[f"{task}.acc"] == acc
    assert scores.answers.get(f"{task}.acc_norm", acc_norm) == acc_norm


def test_the_long_question_was_scored(scores: TaskScores, tokenizer: PreTrainedTokenizerFast) -> None:
    """Else the comparison above says nothing about cutting contexts."""
    lengths = [len(tokenizer(ARC_EASY[item]["query"])["input_ids"]) for item in scores.items["arc_easy"]]
    assert max(lengths) > 128 > min(lengths)


def test_lambada_perplexity_is_that_of_the_last_words(
    scores: TaskScores, model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for task, spelling in (("lambada_openai", str), ("lambada_standard", standard_text)):
        likelihoods = []
        for item in scores.items[task]:
            text = spelling(f"{LAMBADA[item]['query']} {LAMBADA[item]['choices'][0]}")
            context, _, word = text.rpartition(" ")
            likelihoods.append(log_likelihood(model, tokenizer, context, f" {word}"))
        assert scores.answers[f"{task}.perplexity"] == pytest.approx(likelihoods, rel=1e-4)
        got = next(m for m in scores.measurements if m.name == f"{task}.perplexity")
        assert got.value == pytest.approx(math.exp(-np.mean(likelihoods)), rel=1e-3)
        assert got.stderr == pytest.approx(got.value * np.std(likelihoods, ddof=1) / math.sqrt(6), rel=1e-3)


def test_measurements_are_means_of_the_answers_with_their_errors_and_chance(scores: TaskScores) -> None:
    measured = {m.name: m for m in scores.measurements}
    norm = {f"{task}.acc_norm" for task in ("arc_easy", "arc_challenge", "hellaswag", "piqa")}
    lambada = {f"lambada_{kind}.perplexity" for kind in ("openai", "standard")}
    assert set(measured) == norm | lambada | {f"{task}.acc" for task in SEVEN} == set(scores.answers)
    for name in set(measured) - lambada:
        answers = scores.answers[name]
        assert set(answers) <= {0.0, 1.0} and measured[name].n == len(answers) == 6
        assert measured[name].value == pytest.approx(np.mean(answers))
        assert measured[name].stderr == pytest.approx(np.std(answers, ddof=1) / math.sqrt(6))
    choices = [len(ARC_EASY[item]["choices"]) for item in scores.items["arc_easy"]]
    assert len(set(choices)) > 1
    assert measured["arc_easy.acc"].chance == pytest.approx(np.mean([1 / k for k in choices]))
    chances = {name: measured[f"{name}.acc"].chance for name in ("hellaswag", "piqa", "winogrande", "lambada_openai")}
    assert chances == {"hellaswag": 0.25, "piqa": 0.5, "winogrande": 0.5, "lambada_openai": 0}


def test_the_sample_is_fixed_by_seed_and_task(scores: TaskScores) -> None:
    protocol = tasks_protocol()
    assert scores.items["arc_easy"] == sample_items("arc_easy", 12, protocol)
    assert scores.items["arc_easy"] == sorted(set(scores.items["arc_easy"])) != list(range(6))
    assert sample_items("piqa", 1000, protocol) != sample_items("arc_easy", 1000, protocol)
    assert sample_items("piqa", 1000, protocol) != sample_items("piqa", 1000, tasks_protocol(sample_seed=1))
    assert sample_items("piqa", 6, protocol) == list(range(6))


def test_only_the_place_of_the_data_differs_from_the_stock_tasks(mirror: Path, tmp_path: Path) -> None:
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks"
    files = {"arc_easy": "arc/arc_easy", "piqa": "piqa/piqa", "lambada_standard": "lambada/lambada_standard"}
    loaded = load_tasks(tasks_protocol(), GROUP, mirror, tmp_path)
    for name, file in files.items():
        original = yaml.safe_load((stock / f"{file}.yaml").read_text())
        for key in ("doc_to_text", "doc_to_target", "output_type", "test_split"):
            assert loaded[name].get_config(key) == original.get(key), (name, key)
        assert original["metadata"]["version"] == loaded[name].VERSION
        assert loaded[name].get_config("dataset_path") == str(mirror.resolve() / original["dataset_path"])


def test_what_cannot_be_scored_is_refused(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, mirror: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="0.4.13 of lm-eval is installed, the protocol says 0.4.8"):
        tasks(model, tokenizer, tasks_protocol(harness="0.4.8"), GROUP, mirror)
    with pytest.raises(ConfigError, match="the protocol says float16"):
        tasks(model, tokenizer, tasks_protocol(dtype="float16"), GROUP, mirror)
    with pytest.raises(ConfigError, match="'arc_esay'; did you mean arc_easy"):
        tasks(model, tokenizer, tasks_protocol(tasks=("arc_esay",)), GROUP, mirror)
    with pytest.raises(DataError, match="no such data set for arc_challenge"):
        tasks(model, tokenizer, tasks_protocol(), GROUP, tmp_path)
    with pytest.raises(ConfigError, match="not a group file"):
        tasks(model, tokenizer, tasks_protocol(), tmp_path / "none.yaml", mirror)
    (tmp_path / "baber" / "piqa").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be read"):
        tasks(model, tokenizer, tasks_protocol(tasks=("piqa",)), GROUP, tmp_path)
