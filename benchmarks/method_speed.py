"""How long each method takes on the same matrices, in one run on one thread: ratios that can be compared.

    python benchmarks/method_speed.py                    # the shape of one layer of the embedded model
    python benchmarks/method_speed.py --experts 64 --hidden 2048 --width 1024 --methods billm arb-llm mobie

The weights are random with the falling spectrum of trained ones; inputs are correlated and every expert sees the
same number of tokens. Statistics and gradients are given, so what is timed is the methods' own mathematics; the
loss-gradient pass that GLAS adds to MoBiE is part of the pipeline's own timings (README).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from mobie.config import load_method
from mobie.methods.base import BankStats, ExpertBank, LinearStats, Method
from mobie.models.base import EXPERT_INPUTS

DEFAULT_METHODS = ["rtn-w3", "gptq-w3", "gptq-w2", "awq-w3", "awq-w2", "billm", "arb", "arb-rc", "arb-llm", "mobie"]


def random_bank(experts: int, out: int, width: int, generator: torch.Generator) -> Tensor:
    """Experts `(experts, out, width)` that share part of their spectrum, as trained ones do."""
    spectrum = torch.arange(1, out + 1).float().rsqrt()[:, None]
    common = torch.randn(out, width, generator=generator)
    own = torch.randn(experts, out, width, generator=generator)
    return 0.02 * spectrum * (0.5 * common + own)


def random_stats(width: int, tokens: int, groups: int, generator: torch.Generator) -> LinearStats:
    """Statistics of correlated inputs with random squared gradients."""
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return LinearStats.from_inputs(inputs, torch.rand(tokens, groups, generator=generator))


def layer(arguments: argparse.Namespace, groups: int) -> tuple[ExpertBank, BankStats]:
    """One layer's experts and their statistics, the same for every method with as many gradient groups."""
    generator = torch.Generator().manual_seed(0)
    e, h, w = arguments.experts, arguments.hidden, arguments.width
    shapes = {"gate": (w, h), "up": (w, h), "down": (h, w)}
    projections = {name: random_bank(e, *shape, generator) for name, shape in shapes.items()}
    stats: dict[str, list[LinearStats]] = {}
    for name in ("gate", "down"):
        stats[name] = [random_stats(shapes[name][1], arguments.tokens, groups, generator) for _ in range(e)]
    stats["up"] = stats["gate"]
    pooled = {name: own[0] for name, own in stats.items()}
    return ExpertBank(projections, EXPERT_INPUTS, active=max(1, e // 4)), BankStats(stats, pooled)


def seconds(method: Method, bank: ExpertBank, stats: BankStats, repeats: int) -> list[float]:
    """CPU seconds of quantizing the bank, once per repeat after a warm-up on a quarter of the experts."""
    quarter = max(1, len(bank.projections["gate"]) // 4)
    method.quantize_experts(
        ExpertBank({n: w[:quarter] for n, w in bank.projections.items()}, bank.same_input, 1),
        BankStats({n: s[:quarter] for n, s in stats.experts.items()}, stats.pooled),
    )
    times = []
    for _ in range(repeats):
        began = time.process_time()
        method.quantize_experts(bank, stats)
        times.append(time.process_time() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=128, help="inner width of an expert")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per expert")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results = {}
    for name in arguments.methods:
        method = load_method(name).build()
        results[name] = seconds(method, *layer(arguments, method.gradient_groups), arguments.repeats)
    reference = statistics.median(results.get("arb-llm", next(iter(results.values()))))
    versus = "arb-llm" if "arb-llm" in results else arguments.methods[0]
    print(f"one layer: {arguments.experts} experts, hidden {arguments.hidden}, width {arguments.width}; one thread")
    print(f"{'method':16s} {'median s':>9s} {'min s':>9s} {'max s':>9s} {'/ ' + versus:>12s}")
    for name, times in results.items():
        median = statistics.median(times)
        print(f"{name:16s} {median:9.2f} {min(times):9.2f} {max(times):9.2f} {median / reference:12.2f}")


if __name__ == "__main__":
    main()
