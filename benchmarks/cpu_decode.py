"""How fast a CPU decodes with packed weights, against the same weights unpacked: every way in one run on one thread.

    python benchmarks/cpu_decode.py --save results/cpu_decode.json      # about 3 minutes, 7 GB
    python benchmarks/cpu_decode.py --experts 16 --hidden 512 --width 256 --repeats 5

Random weights in MoBiE's format at the shape of one OLMoE-1B-7B layer (64 experts, top-8, hidden 2048, width 1024, a
shared int8 basis on the left, a tenth of the columns of second order), the attention's 2048 × 2048 Linears in two
formats, and dense 16-bit weights unpacked from exactly these. Every call gets new tokens and experts, and before it 128
MB are written, so that no weight is in a cache, as in a model that is larger than one. The ways take turns; the ratio
is of medians, to bf16. Times are CPU seconds of the process, which a busy neighbour disturbs less than the clock.

    cached bf16, f32   unpacked once, kept: the library's loop over experts, torch's own products
    int8 weights       unpacked once to int8 with a scale per row; 16-bit activations (torch._weight_int8pack_mm)
    int8 both          the same, activations rounded per token (torch._int_mm)
    unpack             unpacked on every call
    torch twins        mobie.kernels.twins: from packed bits in plain torch
    C++, C++ int8      mobie.kernels.cpp_ops, with 16-bit and with int8 activations
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mobie.kernels import twins
from mobie.kernels.backend import operations
from mobie.kernels.experts import experts_forward
from mobie.kernels.layout import BinaryBank, ExpertsLayout, lay_out_experts, lay_out_linear, one_group, stored_bytes
from mobie.packing.bank import PackedBank, SymmetricRows
from mobie.packing.binary import BinaryMatrix, Segment
from mobie.storage import write_json

FLUSHED = 128 * 2**20  # bytes written before every call; more than any cache
COPIES = 4  # of a Linear
SLOW = {"unpack", "torch twins"}  # measured fewer times
REFERENCE = "cached bf16"


@dataclass(frozen=True)
class Way:
    """One way to compute: `run(call)` is timed, `bytes` are kept in memory for it."""

    name: str
    run: Callable[[int], Tensor]
    bytes: int


# --- random packed weights ------------------------------------------------------------------------------------------


def random_bits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(256, (*shape[:-1], -(-shape[-1] // 8)), dtype=torch.uint8, generator=generator)


def random_scales(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
    return (size * (0.5 + torch.rand(shape, generator=generator))).half()


def random_matrix(rows: int, columns: int, generator: torch.Generator, *, groups: int = 1) -> BinaryMatrix:
    """MoBiE's expert format with a tenth of salient columns; with two groups that of its attention (ARB-RC)."""
    salient = torch.randperm(columns, generator=generator)[: columns // 10].sort().values.to(torch.int16)
    blocks, residual = -(-columns // 128), groups == 1

    def segment(count: int, order: int, groups: int) -> Segment:
        return Segment(
            random_bits((order, rows, count), generator),
            random_scales((order, groups, rows, blocks), columns**-0.5, generator),
            column_scale=random_scales((order, groups, count), 1, generator),
            bitmap=random_bits((rows, count), generator) if groups == 2 else None,
        )

    plain = segment(columns if residual else columns - len(salient), 1, groups)
    extra = segment(len(salient), 1 if residual else 2, 1)
    return BinaryMatrix((rows, columns), 128, salient, plain, extra, residual)


def random_layer(experts: int, hidden: int, width: int, generator: torch.Generator) -> dict[str, PackedBank]:
    """Gate, up and down of a layer, each with its own int8 basis on the left."""

    def bank(out: int, columns: int) -> PackedBank:
        matrices = tuple(random_matrix(out, columns, generator) for _ in range(experts))
        basis = torch.randint(-127, 128, (out, out), dtype=torch.int8, generator=generator)
        scale = random_scales((out,), out**-0.5 / 64, generator)
        return PackedBank(matrices, SymmetricRows(basis, scale, 8, out), "left")

    return {"gate": bank(width, hidden), "up": bank(width, hidden), "down": bank(hidden, width)}


# --- products with unpacked weights ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8:
    """Weights `(out, in)` or `(experts, out, in)` as int8 with one scale per row."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = weight.abs().amax(-1).clamp(min=1e-12) / 127
        return cls((weight / scale[..., None]).round().to(torch.int8), scale.bfloat16())

    def __getitem__(self, expert: int) -> Int8:
        return Int8(self.codes[expert], self.scale[expert])

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def weight_only(x: Tensor, weight: Int8) -> Tensor:
    return torch._weight_int8pack_mm(x, weight.codes, weight.scale)


def int8_both(x: Tensor, weight: Int8) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
    codes = (x / scale).round().to(torch.int8)
    return (torch._int_mm(codes, weight.codes.T) * scale * weight.scale).to(x.dtype)


def loop_over_experts(product: Callable[[Tensor, Any], Tensor], gate_up: Any, down: Any) -> Callable[..., Tensor]:
    """The library's eager forward of a layer's experts."""

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            token, slot = (index == expert).nonzero(as_tuple=True)
            gate, up = product(hidden[token], gate_up[expert]).chunk(2, dim=-1)
            own = product(silu(gate) * up, down[expert]) * weights[token, slot, None]
            out.index_add_(0, token, own.to(out.dtype))
        return out

    return forward


# --- the ways -------------------------------------------------------------------------------------------------------


def random_tokens(tokens: int, hidden: int, experts: int, top_k: int, calls: int) -> list[tuple[Tensor, ...]]:
    """For every call: inputs, the experts of each token, and their weights."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(calls):
        scores = torch.randn(tokens, experts, generator=generator).softmax(-1)
        weights, index = scores.topk(top_k, dim=-1)
        drawn.append((torch.randn(tokens, hidden, generator=generator), index, weights))
    return drawn


def layer_ways(
    packed: dict[str, PackedBank], layout: ExpertsLayout, dense: dict[str, Tensor], inputs: list[tuple[Tensor, ...]]
) -> Iterator[Way]:
    both, down = dense["gate_up"], dense["down"]

    def way(name: str, forward: Callable[..., Tensor], size: int, dtype: torch.dtype = torch.bfloat16) -> Way:
        cast = [(hidden.to(dtype), index, weights) for hidden, index, weights in inputs]
        return Way(name, lambda call: forward(*cast[call % len(cast)]), size)

    for name, dtype in (("cached bf16", torch.bfloat16), ("cached f32", torch.float32)):
        own = both.to(dtype), down.to(dtype)
        yield way(name, loop_over_experts(linear, *own), sum(w.nbytes for w in own), dtype)
    int8 = Int8.of(both), Int8.of(down)
    size = sum(w.bytes for w in int8)
    yield way("int8 weights", loop_over_experts(weight_only, *int8), size)
    yield way("int8 both", loop_over_experts(int8_both, *int8), size)

    def unpack(*arguments: Tensor) -> Tensor:
        gate, up, down = (packed[name].dequantize(torch.bfloat16) for name in ("gate", "up", "down"))
        return loop_over_experts(linear, torch.cat((gate, up), 1), down)(*arguments)

    yield way("unpack", unpack, sum(t.nbytes for bank in packed.values() for t in bank.tensors().values()))
    yield way("torch twins", lambda *a: experts_forward(layout, *a, twins), layout.nbytes)
    cpp = operations("cpu", torch.bfloat16, "cpp")
    if cpp is not twins:
        yield way("C++", lambda *a: experts_forward(layout, *a, cpp), layout.nbytes)
        yield way("C++ int8", lambda *a: experts_forward(layout, *a, cpp, "int8"), layout.nbytes)


def linear_ways(matrices: list[BinaryMatrix], inputs: list[tuple[Tensor, ...]]) -> Iterator[Way]:
    """The copies in turn; the bytes are those of one."""
    dense = [matrix.dequantize() for matrix in matrices]
    layouts = [lay_out_linear(matrix) for matrix in matrices]
    count, packed_bytes = len(matrices), sum(t.nbytes for t in matrices[0].tensors().values())

    def way(name: str, product: Callable[..., Tensor], weights: list[Any], size: int, dtype: torch.dtype) -> Way:
        cast = [hidden.to(dtype) for hidden, _, _ in inputs]
        return Way(name, lambda call: product(cast[call % len(cast)], weights[call % count]), size)

    groups = one_group(len(inputs[0][0]), 16, "cpu")

    def packed_product(ops: Any, activations: str = "16bit") -> Callable[..., Tensor]:
        def product(x: Tensor, layout: Any) -> Tensor:
            if not isinstance(layout, BinaryBank):
                return ops.binary_linear(layout, x)
            options = {"pairs": len(x), "pairs_per_row": 1, "activations": activations}
            return ops.binary_grouped(layout, x, groups, **options)[:, 0]

        return product

    bf16 = torch.bfloat16
    for name, dtype in (("cached bf16", bf16), ("cached f32", torch.float32)):
        own = [weight.to(dtype) for weight in dense]
        yield way(name, linear, own, own[0].nbytes, dtype)
    int8 = [Int8.of(weight) for weight in dense]
    del dense
    yield way("int8 weights", weight_only, int8, int8[0].bytes, bf16)
    yield way("int8 both", int8_both, int8, int8[0].bytes, bf16)
    yield way("unpack", lambda x, matrix: linear(x, matrix.dequantize(bf16)), matrices, packed_bytes, bf16)
    size = stored_bytes(layouts[0])
    yield way("torch twins", packed_product(twins), layouts, size, bf16)
    cpp = operations("cpu", bf16, "cpp")
    if cpp is not twins:
        yield way("C++", packed_product(cpp), layouts, size, bf16)
        if isinstance(layouts[0], BinaryBank):
            yield way("C++ int8", packed_product(cpp, "int8"), layouts, size, bf16)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(ways: list[Way], repeats: int, slow_repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each way, the ways in turn; and how far each one's result is from float32's."""
    exact = next(way for way in ways if way.name == "cached f32").run(0).float()
    errors = {way.name: ((way.run(0).float() - exact).norm() / exact.norm()).item() for way in ways}  # warms up, too
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    caches = torch.zeros(FLUSHED, dtype=torch.uint8)
    for call in range(1, repeats + 1):
        for way in ways:
            if way.name in SLOW and call > slow_repeats:
                continue
            caches.add_(1)
            began = time.process_time()
            way.run(call)
            times[way.name].append(1e3 * (time.process_time() - began))
    reference = statistics.median(times[REFERENCE])
    rows = []
    for way in ways:
        low, median, high = statistics.quantiles(times[way.name], n=4)
        rows.append(
            {
                "way": way.name,
                "milliseconds": median,
                "quartiles": [low, high],
                "runs": len(times[way.name]),
                "faster_than_bf16": reference / median,
                "bytes": way.bytes,
                "relative_error": errors[way.name],
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(f"{'':14s} {'median ms':>10s} {'quartiles':>19s} {'x bf16':>7s} {'MB':>8s} {'error':>8s}")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['way']:14s} {row['milliseconds']:10.3f} {low:9.3f} {high:9.3f} {row['faster_than_bf16']:7.2f} "
            f"{row['bytes'] / 1e6:8.1f} {row['relative_error']:8.1e}",
            flush=True,
        )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases: the layer and both Linears, for every batch."""
    e, h, w = arguments.experts, arguments.hidden, arguments.width
    generator = torch.Generator().manual_seed(0)
    cases = []

    def case(title: str, batch: int, ways: Iterator[Way]) -> None:
        rows = measure(list(ways), arguments.repeats, arguments.slow_repeats)
        show(f"{title}, batch {batch}", rows)
        cases.append({"case": title, "batch": batch, "ways": rows})

    draws = {batch: random_tokens(batch, h, e, arguments.top_k, arguments.repeats + 1) for batch in arguments.batches}
    for title, groups in (("Linear, expert format", 1), ("Linear, ARB-RC", 2)):
        matrices = [random_matrix(h, h, generator, groups=groups) for _ in range(COPIES)]
        for batch in arguments.batches:
            case(f"{title}, {h} x {h}", batch, linear_ways(matrices, draws[batch]))
    packed = random_layer(e, h, w, generator)
    layout = lay_out_experts(packed, "silu")
    dense = {name: bank.dequantize() for name, bank in packed.items()}
    dense = {"gate_up": torch.cat((dense.pop("gate"), dense.pop("up")), 1), "down": dense.pop("down")}
    for batch in arguments.batches:
        title = f"layer of {e} experts, top-{arguments.top_k}, {h} x {w}"
        case(title, batch, layer_ways(packed, layout, dense, draws[batch]))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024, help="inner width of an expert")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--slow-repeats", type=int, default=3, help="for unpacking on every call and the twins")
    parser.add_argument("--save", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    with torch.inference_mode():
        cases = run(arguments)
    if arguments.save:
        settings = {k: v for k, v in vars(arguments).items() if k != "save"}
        write_json(arguments.save, {"machine": machine, "settings": settings, "cases": cases})


if __name__ == "__main__":
    main()
