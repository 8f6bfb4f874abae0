"""Squared loss gradients per token, taken block by block.

Against autograd through the whole model in float32, the same with experts written out by hand in float64, and finite
differences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    VOCABULARY,
    WIDTH,
    experts_by_hand,
    inner_by_hand,
    make_model,
    random_tokens,
    save_model,
)
from torch import Tensor, nn

from mobie.calibration import backward
from mobie.calibration.backward import GradientPass, LayerGradients
from mobie.calibration.capture import observe_experts
from mobie.calibration.gradients import (
    load_checked,
    load_token_weights,
    save_checked,
    save_token_weights,
)
from mobie.calibration.guided import TokenWeights
from mobie.calibration.pooling import pool_channels
from mobie.calibration.shared import GradientFolder
from mobie.calibration.store import ActivationStore, Memory
from mobie.errors import DataError, StorageError
from mobie.methods.base import ExpertBank
from mobie.models.base import ARCHITECTURES, Adapter
from mobie.models.weights import StreamedModel

SEQUENCES, LENGTH, BATCH = 3, 7, 2


class Wants:
    """Stands for a method: how many channel groups, and through which bases."""

    def __init__(self, groups: int, bases: Callable[[ExpertBank], dict[str, Tensor | None]] | None = None) -> None:
        self.gradient_groups = groups
        self._bases = bases

    def gradient_bases(self, bank: ExpertBank) -> dict[str, Tensor | None]:
        return dict.fromkeys(bank.projections) if self._bases is None else self._bases(bank)


class InMemory:
    """Stands for a `StreamedModel`: the values of all blocks are there all the time."""

    device = torch.device("cpu")

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        model.set_experts_implementation("eager")
        self.model, self.adapter, self.blocks = model, adapter, adapter.blocks(model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        yield self.blocks[index]

    @contextmanager
    def outside(self) -> Iterator[nn.Module]:
        yield self.model


def token_weights(model: nn.Module, adapter: Adapter, method: Any, batches: list[Tensor]) -> list[TokenWeights]:
    """Token weights of every block, block by block."""
    return streamed_weights(InMemory(model, adapter), method, batches)


def streamed_weights(streamed: Any, method: Any, batches: list[Tensor]) -> list[TokenWeights]:
    with TemporaryDirectory() as folder:
        found = GradientFolder(Path(folder), "job", len(streamed.blocks))
        store = ActivationStore(Path(folder) / "store", "job", Memory(1 << 30))
        GradientPass(streamed, method, batches, store, found).run()
        return [found.weights(index) for index in range(len(streamed.blocks))]


def whole_model_weights(model: nn.Module, adapter: Adapter, method: Any, batches: list[Tensor]) -> list[TokenWeights]:
    """The same from one backward pass through the whole model, as the library runs it."""
    blocks = adapter.blocks(model)
    observers = [LayerGradients(block, adapter, method, sum(ids.numel() for ids in batches)) for block in blocks]
    experts = {adapter.experts_module(b): o for b, o in zip(blocks, observers, strict=True)}
    experts.pop(None, None)
    offset = 0
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching())
        stack.enter_context(observe_experts(experts, model.config))
        for ids in batches:
            for observer in observers:
                observer.start_batch(offset)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            torch.autograd.grad(loss, embedded)
            offset += ids.numel()
    return [observer.result() for observer in observers]


def independent_gradients(model: nn.Module, adapter: Adapter, ids: Tensor) -> tuple[list[dict], list[dict], list]:
    """Float64 gradients of the summed loss, all sequences in one batch.

    Experts are computed by gathering each (token, slot)'s own matrices. Returns per block: Linears' output gradients
    `(tokens, out)`, experts' `(tokens, k, out)` by projection, and the routing `(tokens, k)`.
    """
    model = copy.deepcopy(model).double()
    linears: list[dict[str, Tensor]] = []
    experts: list[dict[str, Tensor]] = []
    routing: list[Tensor | None] = []
    for block in adapter.blocks(model):
        own_linears: dict[str, Tensor] = {}
        own_experts: dict[str, Tensor] = {}
        linears.append(own_linears)
        experts.append(own_experts)
        routing.append(None)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):

                def hook(_: nn.Module, __: Any, out: Tensor, name: str = name, own: dict = own_linears) -> None:
                    out.retain_grad()
                    own[name] = out

                module.register_forward_hook(hook)
        module = adapter.experts_module(block)
        if module is None:
            continue

        def forward(
            hidden: Tensor,
            index: Tensor,
            scores: Tensor,
            module: nn.Module = module,
            own: dict = own_experts,
            at: int = len(routing) - 1,
        ) -> Tensor:
            routing[at] = index
            of = experts_by_hand(module)  # weights (tokens, k, out, in) by `index`
            gate = torch.einsum("tkoi,ti->tko", of["gate"][index], hidden) + of["gate_bias"][index]
            up = torch.einsum("tkoi,ti->tko", of["up"][index], hidden) + of["up_bias"][index]
            inner = inner_by_hand(module, gate, up)
            down = torch.einsum("tkoi,tki->tko", of["down"][index], inner) + of["down_bias"][index]
            for name, value in (("gate", gate), ("up", up), ("down", down)):
                value.retain_grad()
                own[name] = value
            return torch.einsum("tko,tk->to", down, scores.double())  # routers choose in float32

        module.forward = forward
    logits = model(ids, use_cache=False).logits
    log_probabilities = logits.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for s in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            total = total - log_probabilities[s, t, ids[s, t + 1]]
    total.backward()
    return (
        [{n: z.grad.flatten(0, -2) for n, z in own.items()} for own in linears],
        [{n: z.grad for n, z in own.items()} for own in experts],
        routing,
    )


def mean_squares(gradient: Tensor, groups: int) -> Tensor:
    """Mean square over contiguous channel groups, `(…, channels)` → `(…, groups)`."""
    parts = np.array_split(np.arange(gradient.shape[-1]), groups)
    return torch.stack([gradient[..., torch.from_numpy(p)].square().mean(-1) for p in parts], dim=-1)


def close(got: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5 * scale)


def by_expert(values: Tensor, index: Tensor) -> Tensor:
    """`(tokens, k, …)` with the slots sorted by expert, so that two routings' slot orders can be compared."""
    order = index.argsort(dim=1)
    return values.gather(1, order[..., None].expand_as(values))


def assert_same(got: TokenWeights, expected: TokenWeights) -> None:
    """Equal to float32 rounding: of a square, relative to its root."""

    def near(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a.sqrt(), b.sqrt(), rtol=1e-4, atol=2e-6 * float(b.sqrt().max()))

    assert got.linears.keys() == expected.linears.keys() and got.experts.keys() == expected.experts.keys()
    for name, weights in expected.linears.items():
        near(got.linears[name], weights)
    for name, weights in expected.experts.items():
        near(got.experts[name], weights)
    if expected.top_k_index is not None:
        assert torch.equal(got.top_k_index, expected.top_k_index)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_streamed_gradients_equal_those_of_a_whole_model_backward(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    batches = list(random_tokens(SEQUENCES, LENGTH).split(BATCH))
    expected = whole_model_weights(model, adapter, Wants(3), batches)
    streamed = StreamedModel(save_model(model, tmp_path))
    for got, reference in zip(streamed_weights(streamed, Wants(3), batches), expected, strict=True):
        assert_same(got, reference)
    monkeypatch.setattr(backward, "LOGITS_BYTES", 4 * VOCABULARY * 5)  # final norm and head by five tokens
    for got, reference in zip(streamed_weights(streamed, Wants(3), batches), expected, strict=True):
        assert_same(got, reference)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("groups", [1, 3])
def test_token_weights_equal_an_independent_backward_pass(model_type: str, groups: int) -> None:
    model = make_model(model_type)
    adapter = Adapter(model_type)
    ids = random_tokens(SEQUENCES, LENGTH)
    linears, experts, routing = independent_gradients(model, adapter, ids)
    result = token_weights(model, adapter, Wants(groups), list(ids.split(BATCH)))
    for index, (block, got) in enumerate(zip(adapter.blocks(model), result, strict=True)):
        assert set(got.linears) == {n for group in adapter.linear_groups(block) for n in group}
        for name, weights in got.linears.items():
            assert weights.shape == (ids.numel(), groups)
            close(weights, mean_squares(linears[index][name], groups))
        if routing[index] is None:
            assert got.experts == {} and got.top_k_index is None
            continue
        assert torch.equal(got.top_k_index.sort(1).values, routing[index].sort(1).values)
        for name, weights in got.experts.items():
            expected = mean_squares(experts[index][name], groups)
            close(by_expert(weights, got.top_k_index), by_expert(expected, routing[index]))


def test_gradients_are_read_through_a_basis() -> None:
    """`∂ℓ/∂T = Bᵀ ∂ℓ/∂Z`: with Z = B T, for a basis narrower than the output, and for some projections only."""
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    ids = random_tokens(SEQUENCES, LENGTH)
    generator = torch.Generator().manual_seed(1)
    bases = {
        "gate": torch.randn(WIDTH, 9, generator=generator),
        "up": None,
        "down": torch.randn(HIDDEN, HIDDEN, generator=generator),
    }
    _, experts, routing = independent_gradients(model, adapter, ids)
    result = token_weights(model, adapter, Wants(4, lambda bank: bases), list(ids.split(BATCH)))
    for index, got in enumerate(result):
        for name, basis in bases.items():
            latent = experts[index][name] if basis is None else experts[index][name] @ basis.double()
            expected = mean_squares(latent, 4)
            close(by_expert(got.experts[name], got.top_k_index), by_expert(expected, routing[index]))


def test_token_weights_equal_finite_differences_of_the_loss() -> None:
    """One group per channel makes a weight the square of one derivative: nudge one output, look at the loss."""
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    ids = random_tokens(1, LENGTH)
    got = token_weights(model, adapter, Wants(HIDDEN), [ids])[0].linears["self_attn.o_proj"]
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    step = 1e-2  # the library normalises in float32 even in a float64 model

    def loss(token: int, channel: int, nudge: float) -> float:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, token, channel] += nudge
            return out

        handle = double.model.layers[0].self_attn.o_proj.register_forward_hook(hook)
        with torch.no_grad():
            logits = double(ids).logits[0, :-1]
        handle.remove()
        return float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    for token, channel in enumerate(got[: LENGTH - 1].argmax(1).tolist()):
        derivative = (loss(token, channel, step) - loss(token, channel, -step)) / (2 * step)
        assert float(got[token, channel]) == pytest.approx(derivative**2, rel=0.03)


def test_last_token_of_a_sequence_predicts_nothing_and_weighs_nothing() -> None:
    model = make_model("olmoe")
    adapter = Adapter("olmoe")
    ids = random_tokens(2, LENGTH)
    last = token_weights(model, adapter, Wants(2), [ids])[-1]
    assert float(last.experts["down"].view(2, LENGTH, TOP_K, 2)[:, -1].abs().max()) == 0
    assert float(last.experts["down"].view(2, LENGTH, TOP_K, 2)[:, :-1].abs().max()) > 0


def test_gradient_pass_leaves_the_model_as_it_was() -> None:
    model = make_model("olmoe")
    model.set_experts_implementation("eager")
    adapter = Adapter("olmoe")
    before = {n: p.clone() for n, p in model.named_parameters()}
    implementation = model.config._experts_implementation
    token_weights(model, adapter, Wants(1), [random_tokens(2, LENGTH)])
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert model.config._experts_implementation == implementation
    assert not any(m._forward_hooks for m in model.modules())


def test_pool_channels_splits_contiguously() -> None:
    gradient = torch.tensor([[1.0, 3.0, 2.0, 4.0, 5.0]])
    torch.testing.assert_close(pool_channels(gradient, 2), torch.tensor([[(1 + 9 + 4) / 3, (16 + 25) / 2]]))


def random_weights() -> TokenWeights:
    generator = torch.Generator().manual_seed(0)
    return TokenWeights(
        {"self_attn.q_proj": torch.rand(6, 2, generator=generator)},
        {"gate": torch.rand(6, TOP_K, 2, generator=generator)},
        torch.randint(0, EXPERTS, (6, TOP_K), generator=generator),
    )


def test_token_weights_round_trip_and_belong_to_one_job(tmp_path: Path) -> None:
    path, weights = tmp_path / "000.safetensors", random_weights()
    assert load_token_weights(path, "job") is None
    save_token_weights(path, weights, "job")
    loaded = load_token_weights(path, "job")
    assert torch.equal(loaded.linears["self_attn.q_proj"], weights.linears["self_attn.q_proj"])
    assert torch.equal(loaded.experts["gate"], weights.experts["gate"])
    assert torch.equal(loaded.top_k_index, weights.top_k_index)
    assert load_token_weights(path, "another job") is None


@pytest.mark.parametrize("where", [-1, -200])
def test_token_weights_with_a_wrong_bit_are_refused(where: int, tmp_path: Path) -> None:
    path = tmp_path / "000.safetensors"
    save_token_weights(path, random_weights(), "job")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000\.safetensors.*its content has the sha256.*delete it"):
        load_token_weights(path, "job")


def test_notes_are_covered_by_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checked(path, {"a": torch.ones(3)}, "job", {"unmatched": 5})
    assert load_checked(path, "job")[1] == {"unmatched": 5}
    path.write_bytes(path.read_bytes().replace(b'unmatched\\":5', b'unmatched\\":6'))
    with pytest.raises(DataError, match="its content has the sha256"):
        load_checked(path, "job")


def test_truncated_token_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "000.safetensors"
    save_token_weights(path, random_weights(), "job")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"000\.safetensors.*expected a complete file.*delete it"):
        load_token_weights(path, "job")


def test_full_disk_while_writing_token_weights_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    path = tmp_path / "000.safetensors"
    save_token_weights(path, random_weights(), "job")
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in ("mobie.packing.checkpoint", "mobie.calibration.gradients"):
        monkeypatch.setattr(f"{module}.save_file", full, raising=False)
    with pytest.raises(StorageError, match=r"000\.safetensors.*No space left.*free some space"):
        save_token_weights(path, random_weights(), "job")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["000.safetensors"]
