"""Triton kernels without binary weights: against the library's classes, float64, and the plain torch operations.

Without a GPU they run in Triton's interpreter, and shapes are small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from triton_cases import DEVICE, DTYPES, SHARE, assert_near, poisoned_memory, random

from mobie.errors import UnsupportedError
from mobie.kernels import twins
from mobie.kernels.layout import Groups, Panel, tiles_needed

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from mobie.kernels import triton_ops as ops

#: where a code may be off by one, at ties, as a GPU rounds a product and its sum together
TIES = 2.0**-6 if DEVICE == "cuda" else None
HIDDEN, EXPERTS, TOP_K = 96, 11, 3


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


# The router


def _router(architecture: str, normalize: bool) -> nn.Module:
    """The library's own router in float32, its weights bfloat16 numbers."""
    import transformers

    module, options = {
        "Olmoe": ("olmoe", {"num_experts": EXPERTS, "norm_topk_prob": normalize}),
        "Qwen2Moe": ("qwen2_moe", {"num_experts": EXPERTS, "norm_topk_prob": normalize}),
        "Qwen3Moe": ("qwen3_moe", {"num_experts": EXPERTS, "norm_topk_prob": normalize}),
        "Mixtral": ("mixtral", {"num_local_experts": EXPERTS}),
        "DeepseekV2": ("deepseek_v2", {"n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5}),
    }[architecture]
    config = getattr(transformers, f"{architecture}Config")
    classes = vars(import_module(f"transformers.models.{module}.modeling_{module}"))
    name = next(name for name in classes if name.lower() == f"{architecture}TopKRouter".lower())
    router = classes[name](config(hidden_size=HIDDEN, num_experts_per_tok=TOP_K, **options)).to(DEVICE)
    router.weight.data = random(EXPERTS, HIDDEN, seed=1, dtype=torch.bfloat16).float()
    return router


@pytest.mark.parametrize(
    ("architecture", "normalize", "scaling"),
    [
        ("Olmoe", False, 1.0),
        ("Olmoe", True, 1.0),
        ("Qwen2Moe", False, 1.0),
        ("Qwen3Moe", True, 1.0),
        ("Mixtral", True, 1.0),
        ("DeepseekV2", False, 2.5),
    ],
)
def test_route_is_the_librarys_router(architecture: str, normalize: bool, scaling: float) -> None:
    router = _router(architecture, normalize)
    hidden = random(5, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = router(hidden.float())
    logits, weights, index = ops.route(hidden, router.weight.data.bfloat16(), TOP_K, normalize=normalize)
    assert_near(logits, expected[0])
    assert index.dtype == torch.int64
    if architecture == "DeepseekV2":  # the library leaves the order of the chosen open
        order = expected[1].argsort(dim=-1, descending=True)
        expected = (expected[0], expected[1].gather(1, order), expected[2].gather(1, order))
    torch.testing.assert_close(weights * scaling, expected[1], rtol=1e-5, atol=1e-6)
    assert index.tolist() == expected[2].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 64, 8), (19, 5, 5), (66, 17, 1)])
def test_route_with_bias_at_any_shape(dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    hidden, weight = random(tokens, 40, dtype=dtype), random(experts, 40, seed=1, dtype=dtype)
    bias = random(experts, seed=2)
    logits, weights, index = ops.route(hidden, weight, top_k, normalize=True, bias=bias)
    exact = hidden.double() @ weight.double().T + bias.double()
    assert_near(logits, exact)
    best = exact.softmax(-1).topk(top_k)
    torch.testing.assert_close(weights.double(), best.values / best.values.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert torch.equal(index, best.indices)


def test_route_with_a_float32_weight_does_not_round_it() -> None:
    hidden, weight = random(3, 40, dtype=torch.float16), random(7, 40, seed=1)
    logits, _, _ = ops.route(hidden, weight, 2, normalize=False)
    assert_near(logits, hidden.double() @ weight.double().T)


def test_route_gives_equals_in_the_order_of_their_index() -> None:
    weight = random(4, HIDDEN, dtype=torch.float16).repeat(3, 1)  # experts 0, 4 and 8 have the same logits
    hidden = random(6, HIDDEN, seed=1, dtype=torch.float16)
    logits, _, index = ops.route(hidden, weight, 7, normalize=False)
    assert torch.equal(index, logits.argsort(dim=-1, descending=True, stable=True)[:, :7])
    zeros = ops.route(torch.zeros_like(hidden), weight, 5, normalize=False)
    assert zeros[2].tolist() == [[0, 1, 2, 3, 4]] * 6


def test_route_of_broken_hidden_states_still_names_distinct_experts() -> None:
    hidden = random(4, HIDDEN, dtype=torch.bfloat16)
    hidden[1], hidden[2] = float("nan"), float("inf")
    _, weights, index = ops.route(hidden, random(EXPERTS, HIDDEN, seed=1, dtype=torch.bfloat16), 4, normalize=True)
    assert index.min() >= 0
    assert index.max() < EXPERTS
    assert all(len(set(row)) == 4 for row in index.tolist())
    assert weights[1].isnan().all()


# Norm, SwiGLU, sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (7, 96), (130, 16)])
def test_rms_norm_is_the_librarys(dtype: torch.dtype, rows: int, width: int) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

    norm = OlmoeRMSNorm(width, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = 1 + random(width, seed=1, dtype=dtype)
    x, residual = 3 * random(rows, width, dtype=dtype), random(rows, width, seed=2, dtype=dtype)
    normed, total = ops.rms_norm(x, norm.weight.data, 1e-5, residual=residual)
    assert_near(total, x + residual)
    share = 2 * SHARE[dtype]  # rounded twice
    assert_near(normed, norm(total), share)
    alone, same = ops.rms_norm(x, norm.weight.data, 1e-5)
    assert same is x
    assert_near(alone, norm(x), share)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up, weights = random(5, 2, 1030, dtype=dtype), random(5, seed=1)
    exact = silu(gate_up[:, 0].double()) * gate_up[:, 1].double()
    assert_near(ops.swiglu(gate_up), exact)
    assert_near(ops.swiglu(gate_up, weights), exact * weights.double()[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_pairs_sums_in_order_in_float32(dtype: torch.dtype) -> None:
    x = random(15, 1030, dtype=dtype)
    assert_near(ops.reduce_pairs(x, 3), x.double().view(5, 3, -1).sum(1))
    # 2^15 + 1 + 1: float32 keeps both ones, 16 bits would lose them one by one
    column = torch.tensor([2.0**15, 1, 1, 1, -(2.0**15)], dtype=dtype, device=DEVICE)[:, None]
    assert ops.reduce_pairs(column, 5).item() == 3
    assert torch.equal(ops.reduce_pairs(x, 1), x)


# Groups


def _assert_groups(index: Tensor, experts: int, tile: int) -> Groups:
    """Every pair once, in a tile of its expert, ascending; nothing else."""
    groups = ops.group_pairs(index, experts, tile)
    assert len(groups.tile_expert) == tiles_needed(index.numel(), experts, tile)
    chosen = index.flatten().tolist()
    found: dict[int, list[int]] = {}
    for expert, pairs in zip(groups.tile_expert.tolist(), groups.tile_pairs.tolist(), strict=True):
        assert (expert >= 0) == any(pair >= 0 for pair in pairs)
        found.setdefault(expert, []).extend(pair for pair in pairs if pair >= 0)
        assert pairs == sorted(pairs, key=lambda pair: pair < 0), "spare places come last"
    expected = {e: [p for p, own in enumerate(chosen) if own == e] for e in range(experts)}
    assert {e: pairs for e, pairs in found.items() if e >= 0} == {e: pairs for e, pairs in expected.items() if pairs}
    return groups


@pytest.mark.parametrize(
    ("index", "experts", "tile"),
    [
        pytest.param([[2, 0], [2, 2], [1, 4]], 6, 2, id="experts 3 and 5 have none, 0, 1 and 4 one"),
        pytest.param([[1]], 3, 16, id="one pair"),
        pytest.param([[0]] * 33, 1, 16, id="one expert"),
        pytest.param([[3]] * 32, 5, 16, id="all on one of several, whole tiles"),
        pytest.param(
            [[i % 7, (i + 3) % 7] for i in range(700)], 7, 64, id="more pairs than a program looks at at once"
        ),
    ],
)
def test_group_pairs(index: list[list[int]], experts: int, tile: int) -> None:
    tensor = torch.tensor(index, device=DEVICE)
    groups = _assert_groups(tensor, experts, tile)
    twin = twins.group_pairs(tensor, experts, tile)
    assert torch.equal(groups.tile_expert, twin.tile_expert)
    assert torch.equal(groups.tile_pairs, twin.tile_pairs)


@pytest.mark.parametrize("seed", range(6))
def test_group_pairs_of_random_routings(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k, experts = (int(torch.randint(1, most, (), generator=generator)) for most in (40, 5, 12))
    index = torch.randint(0, experts, (tokens, top_k), generator=generator).to(DEVICE, torch.int32)
    _assert_groups(index, experts, (1, 4, 16)[seed % 3])


def test_pairs_of_no_expert_are_in_no_tile() -> None:
    index = torch.tensor([[0, 3], [-1, 1], [1, 1 << 33]], device=DEVICE)  # experts 0 … 2
    groups = ops.group_pairs(index, 3, 4)
    assert sorted(groups.tile_pairs[groups.tile_pairs >= 0].tolist()) == [0, 3, 4]


def test_groups_of_no_pairs() -> None:
    groups = ops.group_pairs(torch.empty(0, 2, dtype=torch.int64, device=DEVICE), 4, 16)
    assert groups.tile_expert.numel() == groups.tile_pairs.numel() == 0


# 16-bit experts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "rows", "columns", "tile"),
    [(3, 2, 5, 70, 136, 16), (1, 1, 1, 16, 17, 8), (40, 2, 3, 33, 130, 64)],
)
def test_dense_grouped(
    dtype: torch.dtype, tokens: int, top_k: int, experts: int, rows: int, columns: int, tile: int
) -> None:
    x, weight = random(tokens, columns, dtype=dtype), random(experts, rows, columns, seed=1, dtype=dtype)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(DEVICE)
    groups = ops.group_pairs(index, experts, tile)
    shared = ops.dense_grouped(weight, x, groups, pairs=tokens * top_k, pairs_per_row=top_k)
    exact = torch.einsum("nj,nkrj->nkr", x.double(), weight[index].double()).flatten(0, 1)
    assert_near(shared, exact)
    own = x.repeat_interleave(top_k, dim=0)
    assert torch.equal(ops.dense_grouped(weight, own, groups, pairs=tokens * top_k, pairs_per_row=1), shared)


# Panels


def _panel(parts: int, rows: int, columns: int, dtype: torch.dtype) -> Panel:
    if dtype == torch.int8:
        codes = (40 * random(parts, rows, columns, seed=3)).clamp(-127, 127).to(torch.int8)
        return Panel(codes, (0.01 * (1 + random(parts, rows, seed=4).abs())).half())
    return Panel(random(parts, rows, columns, seed=3, dtype=dtype))


def _exact_panel(panel: Panel, x: Tensor, reduce: int) -> Tensor:
    """float64, `(N, parts, rows)`."""
    weight = panel.codes.double() * (1 if panel.scale is None else panel.scale.double()[..., None])
    return torch.einsum("npj,prj->npr", x.double().unflatten(0, (-1, reduce)).sum(1), weight)


#: tokens, parts, rows, columns, reduce; few and many tokens; shapes that are no multiple of a tile; sums of a few rows
#: (within the product) and of more (a launch of their own)
SHAPES = [(1, 1, 16, 128, 1), (5, 2, 50, 200, 1), (2, 1, 33, 130, 6), (20, 1, 18, 40, 4), (70, 2, 70, 150, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.int8, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "parts", "rows", "columns", "reduce"), SHAPES)
def test_panel(
    dtype: torch.dtype, kind: torch.dtype, count: int, parts: int, rows: int, columns: int, reduce: int
) -> None:
    panel = _panel(parts, rows, columns, kind)
    x = random(count * reduce, parts, columns, dtype=dtype)
    residual, bias = random(count, parts, rows, seed=5, dtype=dtype), random(parts * rows, seed=6)
    exact = _exact_panel(panel, x, reduce)
    share = 2.0**-6 if kind not in (torch.int8, dtype) else None  # 16-bit codes are rounded to the dtype of x
    assert_near(ops.panel(panel, x, reduce=reduce), exact, share)
    full = exact + bias.double().view(parts, rows) + residual.double()
    assert_near(ops.panel(panel, x, reduce=reduce, residual=residual, bias=bias), full, share)


@pytest.mark.parametrize("activations", ["16bit", "int8"])
@pytest.mark.parametrize("count", [5, 70])
def test_panel_with_swiglu(count: int, activations: str) -> None:
    panel, x = _panel(2, 50, 200, torch.int8), random(count, 2, 200, dtype=torch.float16)
    weights, residual = random(count, seed=5), random(count, 50, seed=6, dtype=torch.float16)
    options: dict[str, Any] = {"epilogue": "swiglu", "pair_weights": weights, "residual": residual}
    out = ops.panel(panel, x, activations=activations, **options)
    share = TIES if activations == "int8" else None
    assert_near(out, twins.panel(panel, x, activations=activations, **options), share)
    if activations == "16bit":
        gate, up = _exact_panel(panel, x, 1).unbind(1)
        assert_near(out, silu(gate) * up * weights.double()[:, None] + residual.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "parts", "rows", "columns", "reduce"), SHAPES)
def test_panel_with_int8_activations(
    dtype: torch.dtype, count: int, parts: int, rows: int, columns: int, reduce: int
) -> None:
    panel = _panel(parts, rows, columns, torch.int8)
    x = random(count * reduce, parts, columns, dtype=dtype)
    x[..., :7] *= 50  # outliers of the first group of 128: the others' steps must not depend on them
    x[0] = 0
    out = ops.panel(panel, x, reduce=reduce, activations="int8")
    assert_near(out, twins.panel(panel, x, reduce=reduce, activations="int8"), TIES)
    # by hand: largest magnitude of every 128 columns at 127
    summed = torch.zeros(count, parts, -(-columns // 128) * 128, dtype=torch.float64, device=DEVICE)
    summed[..., :columns] = x.double().unflatten(0, (-1, reduce)).sum(1)
    groups = summed.unflatten(-1, (-1, 128))
    step = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    rounded = ((groups / step).round() * step).flatten(-2)[..., :columns]
    assert_near(out, _exact_panel(panel, rounded, 1), share=2.0**-6)


def test_parts_may_share_one_matrix_and_one_input() -> None:
    """Expanded dimensions are read where they are."""
    one = _panel(1, 24, 136, torch.int8)
    both = Panel(one.codes.expand(2, -1, -1), one.scale.expand(2, -1))
    x = random(4, 1, 136, dtype=torch.float16)
    for count in (4, 68):
        rows = x.repeat(count // 4, 1, 1)
        expected = ops.panel(one, rows)
        out = ops.panel(both, rows.expand(-1, 2, -1))
        assert torch.equal(out[:, :1], expected)
        assert torch.equal(out[:, 1:], expected)


def test_the_same_bits_every_time() -> None:
    panel, x = _panel(2, 50, 200, torch.int8), random(5, 2, 200, dtype=torch.float16)
    first = ops.panel(panel, x)
    assert all(torch.equal(ops.panel(panel, x), first) for _ in range(3))
    rows = [ops.panel(panel, x[n : n + 1]) for n in range(5)]
    assert_near(torch.cat(rows), first, share=2.0**-11)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens: int) -> None:
    x = random(tokens, 32, dtype=torch.float16)
    weight = random(4, 32, seed=1, dtype=torch.float16)
    assert [tuple(t.shape) for t in ops.route(x, weight, 2, normalize=True)] == [(tokens, 4), (tokens, 2), (tokens, 2)]
    assert ops.rms_norm(x, weight[0], 1e-5)[0].shape == (tokens, 32)
    assert ops.panel(_panel(1, 8, 32, torch.int8), x[:, None]).shape == (tokens, 1, 8)
    assert ops.reduce_pairs(x, 1).shape == (tokens, 32)
    assert ops.swiglu(x.view(tokens, 2, 16)).shape == (tokens, 16)


# Bad input


def _half(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.route(_half(2, 8).float(), _half(4, 8), 2, normalize=True),
        lambda: ops.rms_norm(_half(2, 8).float(), _half(8), 1e-5),
        lambda: ops.swiglu(_half(2, 2, 8).double()),
        lambda: ops.reduce_pairs(_half(2, 8).float(), 2),
        lambda: ops.panel(Panel(_half(1, 4, 8)), _half(2, 1, 8).float()),
        lambda: ops.panel(Panel(_half(1, 4, 8).float()), _half(2, 1, 8)),
        lambda: ops.dense_grouped(_half(2, 4, 8), _half(2, 8).float(), None, pairs=2, pairs_per_row=1),
        lambda: ops.group_pairs(_half(2, 2), 4, 16),
        lambda: ops.swiglu(_half(2, 2, 8).to("meta")),
        lambda: ops.group_pairs(torch.zeros(2, 2, dtype=torch.int64, device="meta"), 4, 16),
    ],
)
def test_what_no_kernel_takes_is_unsupported(call: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"expect|take float16"):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: ops.route(_half(2, 8), _half(4, 9), 2, normalize=True),
            r"weight has shape \(4, 9\), expected \(4, 8\)",
        ),
        (lambda: ops.route(_half(2, 8), _half(4, 8), 5, normalize=True), "top_k is 5, expected 1 to 4"),
        (lambda: ops.route(_half(2, 8), _half(8, 4).T, 2, normalize=True), "expected it contiguous"),
        (lambda: ops.rms_norm(_half(2, 8), _half(8), 1e-5, residual=_half(3, 8)), "residual has shape"),
        (lambda: ops.swiglu(_half(2, 3, 8)), r"expected \(N, 2, W\)"),
        (lambda: ops.reduce_pairs(_half(7, 8), 2), "7 rows are no multiple of 2"),
        (lambda: ops.panel(Panel(_half(1, 4, 8)), _half(2, 1, 9)), r"expected \(N, 1, 8\)"),
        (lambda: ops.panel(Panel(_half(1, 4, 8)), _half(2, 1, 8), epilogue="swiglu"), "1 parts"),
        (lambda: ops.panel(Panel(_half(1, 4, 8)), _half(2, 1, 8), epilogue="gelu"), "epilogue is 'gelu'"),
        (lambda: ops.panel(Panel(_half(1, 4, 8)), _half(2, 1, 8), activations="int4"), "activations is 'int4'"),
        (lambda: ops.panel(Panel(_half(1, 4, 8)), _half(2, 1, 8), bias=_half(5)), "bias has shape"),
        (lambda: ops.group_pairs(torch.zeros(3, dtype=torch.int64, device=DEVICE), 4, 16), r"expected \(T, k\)"),
        (
            lambda: ops.dense_grouped(
                _half(2, 4, 8),
                _half(2, 8),
                ops.group_pairs(torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), 2, 16),
                pairs=5,
                pairs_per_row=1,
            ),
            "5 pairs of 1 per row, but x has 2 rows",
        ),
        (
            lambda: ops.dense_grouped(
                _half(2, 4, 8),
                _half(2, 8),
                ops.group_pairs(torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), 2, 4),
                pairs=2,
                pairs_per_row=1,
            ),
            "tiles of 4 pairs, expected a power of two from 8 on",
        ),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_inputs_with_gaps_in_memory_are_read_right() -> None:
    wide = random(6, 80, dtype=torch.float16)
    x = wide[:, 8:72]
    assert torch.equal(ops.rms_norm(x, wide[0, :64], 1e-5)[0], ops.rms_norm(x.contiguous(), wide[0, :64], 1e-5)[0])
    panel = _panel(1, 8, 64, torch.int8)
    assert torch.equal(ops.panel(panel, x[:, None]), ops.panel(panel, x[:, None].contiguous()))
    assert torch.equal(ops.reduce_pairs(x.T, 2), ops.reduce_pairs(x.T.contiguous(), 2))


# On a GPU, at the sizes of the paper's models


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 1000])
@pytest.mark.parametrize(("hidden", "width", "experts", "top_k"), [(2048, 1024, 64, 8), (2048, 1408, 60, 4)])
def test_at_real_sizes(dtype: torch.dtype, tokens: int, hidden: int, width: int, experts: int, top_k: int) -> None:
    x, router = random(tokens, hidden, dtype=dtype), random(experts, hidden, seed=1, dtype=dtype) / hidden**0.5
    logits, weights, index = ops.route(x, router, top_k, normalize=True)
    assert_near(logits, x.double() @ router.double().T, share=2.0**-14)
    assert torch.equal(index, logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k])
    groups, twin = (module.group_pairs(index, experts, 16 if tokens <= 64 else 64) for module in (ops, twins))
    assert torch.equal(groups.tile_pairs, twin.tile_pairs)
    assert torch.equal(groups.tile_expert, twin.tile_expert)
    dense = random(experts, 2 * width, hidden, seed=2, dtype=dtype) / hidden**0.5
    shape = {"pairs": tokens * top_k, "pairs_per_row": top_k}
    gate_up = ops.dense_grouped(dense, x, groups, **shape)
    assert_near(gate_up, twins.dense_grouped(dense, x, groups, **shape), share=2.0**-6)
    assert_near(ops.swiglu(gate_up.unflatten(-1, (2, -1)), weights.flatten()),
                twins.swiglu(gate_up.unflatten(-1, (2, -1)), weights.flatten()))  # fmt: skip
    for activations in ("16bit", "int8"):
        basis, latent = _panel(2, width, width, torch.int8), random(tokens * top_k, 2, width, seed=3, dtype=dtype)
        options: dict[str, Any] = {"epilogue": "swiglu", "pair_weights": weights.flatten(), "activations": activations}
        assert_near(ops.panel(basis, latent, **options), twins.panel(basis, latent, **options), share=2.0**-6)
        basis, latent = _panel(1, hidden, hidden, torch.int8), random(tokens * top_k, 1, hidden, seed=4, dtype=dtype)
        options = {"reduce": top_k, "residual": x[:, None], "activations": activations}
        assert_near(ops.panel(basis, latent, **options), twins.panel(basis, latent, **options), share=2.0**-6)


@pytest.mark.gpu
def test_a_graph_holds_router_and_groups() -> None:
    """Captured once, replayed for other tokens: nothing depends on values while it is captured."""
    x, weight = random(4, 256, dtype=torch.float16), random(32, 256, seed=1, dtype=torch.float16)

    def step() -> tuple[Tensor, Tensor]:
        index = ops.route(x, weight, 4, normalize=True)[2]
        return index, ops.group_pairs(index, 32, 16).tile_pairs

    torch.use_deterministic_algorithms(False)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, tile_pairs = step()
    for seed in range(3):
        x.copy_(random(4, 256, seed=10 + seed, dtype=torch.float16))
        graph.replay()
        expected_index, expected_pairs = step()
        assert torch.equal(index, expected_index)
        assert torch.equal(tile_pairs, expected_pairs)
