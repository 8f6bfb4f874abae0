"""Seconds and memory of each method on one block of OLMoE-1B-7B at its true shape; whole models are reckoned from it.

    python benchmarks/true_size.py                                     # every method, hours on one core; may be stopped
    python benchmarks/true_size.py --experts 8 --tokens 1024 --methods mobie --output /tmp/try.json     # a minute
    python benchmarks/true_size.py --compare-loop                      # MoBiE against a plain loop of its mathematics
    python benchmarks/true_size.py --device cuda                       # writes true_size_<gpu>.json

64 experts (gate and up 1024 × 2048, down 2048 × 1024, top-8) and attention's four 2048 × 2048 Linears: random weights
with the falling spectrum of trained ones, correlated inputs of 8192 tokens, each routed to 8 experts. An expert's
statistics are formed from its tokens when a method asks, blended with the layer's as the pipeline does where tokens are
few. Every method runs in a process of its own, on one thread. A finished method is kept in the record; the same command
goes on with the others.

    cpu_seconds            of the method's own mathematics: experts, attention, and the survey before them, if any
    wall_seconds           the same by the clock; on a busy machine more
    bits_stored            bits per weight of the block, every byte counted
    statistics_seconds     CPU seconds for the Hessians, guided ones where the method wants them
    peak_mb                most memory the process had; above_mb: more than before the method began
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mobie_loop
import torch
from method_speed import random_bank
from torch import Tensor
from torch.nn.functional import silu
from tqdm import tqdm

from mobie.config import load_method, load_suite
from mobie.jobs.score import REFERENCE
from mobie.methods.allocation import AllocatingMethod, LayerView
from mobie.methods.base import BankStats, ExpertBank, FormedStats, LinearStats, Method
from mobie.models.base import EXPERT_INPUTS
from mobie.packing.base import BitLedger
from mobie.storage import write_json

SUITE = "smoke"  # whose methods are measured
BLOCKS = 16  # of OLMoE-1B-7B
RECORDS = Path(__file__).parent / "records"
MEGABYTE = 1 << 20


# --- one block ------------------------------------------------------------------------------------------------------


class Rows(FormedStats):
    """Statistics of one projection's experts from the inputs of all tokens; the seconds that takes are counted."""

    def __init__(self, inputs: Sequence[Tensor], token_weights: Sequence[Tensor] | None, pooled: LinearStats) -> None:
        self.inputs, self._weights, self._pooled = inputs, token_weights, pooled
        self.cpu_seconds = self.wall_seconds = 0.0

    def __len__(self) -> int:
        return len(self.inputs)

    def leave_gradients_out(self) -> None:
        """From now on without guided Hessians: a survey has read them, and the method that follows does not."""
        self._weights, self._pooled = None, replace(self._pooled, guided=None)

    def form(self, expert: int, device: torch.device) -> LinearStats:
        began = time.process_time(), time.perf_counter()
        weights = None if self._weights is None else self._weights[expert].to(device)
        own = LinearStats.from_inputs(self.inputs[expert].to(device), weights)
        formed = blend(own, self._pooled.to(device))
        synchronize(device)
        self.cpu_seconds += time.process_time() - began[0]
        self.wall_seconds += time.perf_counter() - began[1]
        return formed


def blend(own: LinearStats, pooled: LinearStats) -> LinearStats:
    """`t·own + (1 - t)·pooled` with `t = tokens / (2·in)`, where an expert has fewer than `2·in` tokens."""
    t = own.tokens / (2 * len(own.mean_abs))
    if t >= 1:
        return own
    guided = None
    if own.guided is not None and pooled.guided is not None:
        guided = own.guided.mul_(t).add_(pooled.guided, alpha=1 - t)
    hessian = own.hessian.mul_(t).add_(pooled.hessian, alpha=1 - t)
    return replace(own, hessian=hessian, mean_abs=t * own.mean_abs + (1 - t) * pooled.mean_abs, guided=guided)


@dataclass(frozen=True)
class Block:
    """Weights and inputs of a block: experts with their statistics, attention's Linears by shared input."""

    bank: ExpertBank
    stats: BankStats
    attention: list[dict[str, Tensor]]
    attention_stats: list[dict[str, LinearStats]]
    attention_seconds: float


def make_block(shape: Mapping[str, int], method: Method, device: torch.device) -> Block:
    """The block, the same for every method, with statistics such as the method wants."""
    generator = torch.Generator().manual_seed(0)
    e, h, w, tokens = (shape[key] for key in ("experts", "hidden", "width", "tokens"))
    groups = method.gradient_groups if method.needs_gradients else 0
    sizes = {"gate": (w, h), "up": (w, h), "down": (h, w)}
    weights = {name: random_bank(e, *size, generator).to(device) for name, size in sizes.items()}
    inputs = correlated(tokens, h, generator)
    routed = torch.rand(tokens, e, generator=generator).topk(shape["top_k"]).indices
    chosen = [(routed == expert).any(1).nonzero().flatten() for expert in range(e)]
    entering = [inputs[own] for own in chosen]
    between = [middle(x, weights["gate"][i], weights["up"][i]) for i, x in enumerate(entering)]
    experts: dict[str, Sequence[LinearStats]] = {}
    pooled: dict[str, LinearStats] = {}
    for name in sizes:
        own = between if name == "down" else entering
        guides = [torch.rand(len(x), groups, generator=generator) for x in own] if groups else None
        pooled[name] = pool(own, guides)
        experts[name] = Rows(own, guides, pooled[name])
    counts = {name: [len(own) for own in chosen] for name in sizes}

    roles = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    attention = [{role: random_bank(1, h, h, generator)[0].to(device) for role in group} for group in roles]
    began = time.process_time()
    attention_stats = []
    for group in roles:
        x = correlated(tokens, h, generator).to(device)
        guides = [torch.rand(tokens, groups, generator=generator).to(device) if groups else None for _ in group]
        found = [LinearStats.from_inputs(x, guide) for guide in guides]
        attention_stats.append(dict(zip(group, found, strict=True)))
    bank = ExpertBank(weights, EXPERT_INPUTS, active=shape["top_k"])
    seconds = time.process_time() - began
    return Block(bank, BankStats(experts, pooled, counts), attention, attention_stats, seconds)


def view_of(block: Block) -> LayerView:
    """The block as a method that shares out bits surveys it; every routing score is 1."""
    gate = block.stats.experts["gate"]
    assert isinstance(gate, Rows)

    def output(expert: int, weights: Mapping[str, Tensor], most: int | None) -> Tensor:
        own = {name: weights.get(name, bank[expert]) for name, bank in block.bank.projections.items()}
        entering = gate.inputs[expert][:most]
        return middle(entering, own["gate"], own["up"]).to(own["down"].device) @ own["down"].T

    linears = {f"self_attn.{role}": weight for group in block.attention for role, weight in group.items()}
    stats = {f"self_attn.{role}": own for group in block.attention_stats for role, own in group.items()}
    return LayerView(linears, stats, block.bank, block.stats, output)


def correlated(tokens: int, features: int, generator: torch.Generator) -> Tensor:
    """Inputs with correlated channels of different strength and a mean."""
    mixing = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    strength = torch.arange(1, features + 1).float().pow(-0.25)[torch.randperm(features, generator=generator)]
    inputs = torch.randn(tokens, features, generator=generator) @ mixing
    return (inputs + 0.1 * torch.randn(features, generator=generator)) * strength


def middle(inputs: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """What an expert's down projection gets."""
    x = inputs.to(gate.device)
    return (silu(x @ gate.T) * (x @ up.T)).to(inputs.device)


def pool(inputs: Sequence[Tensor], token_weights: Sequence[Tensor] | None) -> LinearStats:
    """Statistics over the rows of all experts, summed expert by expert."""
    rows = sum(map(len, inputs))
    features = inputs[0].shape[1]
    hessian, mean_abs = torch.zeros(features, features), torch.zeros(features)
    guided = None if token_weights is None else torch.zeros(token_weights[0].shape[1], features, features)
    for expert, x in enumerate(inputs):
        hessian += 2 / rows * x.T @ x
        mean_abs += x.abs().sum(0) / rows
        for group in range(0 if guided is None else len(guided)):
            guided[group] += 2 / rows * (x * token_weights[expert][:, group, None]).T @ x
    return LinearStats(hessian, rows, mean_abs, inputs[0][:512].clone(), guided)


# --- one method, in a process of its own ----------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_kb(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (most so far) of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


class Watch:
    """Seconds since it was made, until it is stopped, without those in which statistics were formed."""

    def __init__(self, formed: Sequence[Rows], device: torch.device) -> None:
        self._formed, self._device = formed, device
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        synchronize(self._device)
        cpu = sum(own.cpu_seconds for own in self._formed)
        wall = sum(own.wall_seconds for own in self._formed)
        return time.process_time() - cpu, time.perf_counter() - wall

    def stop(self) -> None:
        self.cpu_seconds, self.wall_seconds = (now - began for now, began in zip(self._now(), self._began, strict=True))


def measure(name: str, shape: Mapping[str, int], device: torch.device) -> dict[str, float]:
    """Quantize the block's experts and attention once."""
    method = load_method(name).build()
    block = make_block(shape, method, device)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far
    before = memory_kb("VmRSS") / 1024
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    formed = [own for own in block.stats.experts.values() if isinstance(own, Rows)]
    survey = Watch(formed, device)
    if isinstance(method, AllocatingMethod):
        method = method.over(view_of(block))
    survey.stop()
    if not method.needs_gradients:
        for own in formed:
            own.leave_gradients_out()
    experts = Watch(formed, device)
    packed = dict(method.quantize_experts(block.bank, block.stats))
    experts.stop()
    attention, ledgers = Watch((), device), {name: own.ledger(shape["top_k"]) for name, own in packed.items()}
    for weights, stats in zip(block.attention, block.attention_stats, strict=True):
        ledgers |= {name: own.ledger() for name, own in method.quantize_group(weights, stats).items()}
    attention.stop()
    parts = (survey, experts, attention)
    statistics = sum(own.cpu_seconds for own in formed)
    found = {
        "cpu_seconds": sum(part.cpu_seconds for part in parts),
        "wall_seconds": sum(part.wall_seconds for part in parts),
        "survey_cpu_seconds": survey.cpu_seconds,
        "experts_cpu_seconds": experts.cpu_seconds,
        "attention_cpu_seconds": attention.cpu_seconds,
        "statistics_seconds": statistics + (block.attention_seconds if method.reads_statistics else 0.0),
        "bits_stored": BitLedger.merge(ledgers).stored_bits,
        "peak_mb": memory_kb("VmHWM") / 1024,
        "above_mb": memory_kb("VmHWM") / 1024 - before,
    }
    if device.type == "cuda":
        found["gpu_peak_mb"] = torch.cuda.max_memory_allocated(device) / MEGABYTE
    return {key: round(value, 3) for key, value in found.items()}


def measure_loop(shape: Mapping[str, int], experts: int) -> dict[str, float]:
    """MoBiE's experts, the first few of the block, by the package and by the loop: the whole of both, in CPU seconds.

    The shared decomposition and null space are the same library calls in both, and weigh more with few experts. Here
    and there rounding tips a sign over, which changes what error feedback hands on: then the two differ from each other
    (`relative_difference`, the largest of all matrices), and not in their distance from the weights (`weight_error`).
    """
    method = load_method("mobie").build()
    block = make_block(shape, method, torch.device("cpu"))
    weights = {name: weight[:experts].clone() for name, weight in block.bank.projections.items()}
    stats = {name: own[:experts] for name, own in block.stats.experts.items()}
    began = time.process_time()
    packed = method.quantize_experts(replace(block.bank, projections=weights), BankStats(stats, block.stats.pooled))
    ours = time.process_time() - began
    loop, differences, errors = 0.0, [], {"weight_error": [], "loop_weight_error": []}
    for name, weight in weights.items():
        hessians, guided = [s.hessian for s in stats[name]], [s.guided for s in stats[name]]
        began = time.process_time()
        stored, _ = mobie_loop.quantize(list(weight), hessians, guided, block.stats.pooled[name].hessian)
        loop += time.process_time() - began
        dense = packed[name].dequantize()
        for a, b, w in zip(dense, stored, weight, strict=True):
            differences.append(relative(a, b))
            errors["weight_error"].append(relative(a, w))
            errors["loop_weight_error"].append(relative(b, w))
    found = {"experts": experts, "cpu_seconds": ours, "loop_cpu_seconds": loop, "ratio": loop / ours}
    found |= {name: sum(values) / len(values) for name, values in errors.items()}
    return {key: round(value, 4) for key, value in (found | {"relative_difference": max(differences)}).items()}


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what was expected."""
    return ((got - expected).norm() / expected.norm()).item()


def in_child(arguments: Sequence[str]) -> dict[str, float]:
    """What a child process of this file prints as JSON on its last line; its errors are shown as they are.

    Raises:
        SystemExit: the child failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}; finished methods are in the record")
    return json.loads(done.stdout.splitlines()[-1])


# --- the record -----------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "threads": 1}
    found["memory_gb"] = round(memory / 2**30, 1)
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def record_path(device: torch.device) -> Path:
    if device.type == "cpu":
        return RECORDS / "true_size.json"
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return RECORDS / f"true_size_{name}.json"


def start_record(path: Path, shape: Mapping[str, int], device: torch.device, fresh: bool) -> dict[str, Any]:
    """The record at `path` if it is of the same shape, machine and versions, to go on with; otherwise a new one."""
    versions = {name: version(name) for name in ("torch", "numpy")} | {"python": platform.python_version()}
    new = {"shape": dict(shape), "machine": machine(device), "versions": versions, "blocks": BLOCKS, "methods": {}}
    if fresh or not path.exists():
        return new
    old = json.loads(path.read_text())
    return old if all(old.get(key) == new[key] for key in ("shape", "machine", "versions")) else new


def show(record: Mapping[str, Any]) -> None:
    shape = record["shape"]
    print("one block: " + ", ".join(f"{key} {value}" for key, value in shape.items()))
    print(f"{'':10s} {'CPU s':>9s} {'wall s':>9s} {'statistics s':>13s} {'peak MB':>9s} {'16 blocks, CPU hours':>21s}")
    for name, own in record["methods"].items():
        hours = record["blocks"] * (own["cpu_seconds"] + own["statistics_seconds"]) / 3600
        print(
            f"{name:10s} {own['cpu_seconds']:9.1f} {own['wall_seconds']:9.1f} {own['statistics_seconds']:13.1f} "
            f"{own['peak_mb']:9.0f} {hours:21.2f}"
        )
    for name, loop in record.get("loop", {}).items():
        seconds = f"{loop['cpu_seconds']:.1f} s, in a plain loop {loop['loop_cpu_seconds']:.1f} s"
        print(f"{name}, {loop['experts']} experts: {seconds}: {loop['ratio']:.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024, help="inner width of an expert")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens in all")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"those of the suite {SUITE} but {REFERENCE}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, help="record; benchmarks/records/true_size.json")
    parser.add_argument("--fresh", action="store_true", help="measure methods again that are in the record")
    parser.add_argument("--compare-loop", action="store_true", help="MoBiE against a plain loop of its mathematics")
    parser.add_argument("--loop-experts", type=int, default=2, help="experts of the block in that comparison")
    parser.add_argument("--child", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    shape = {key: getattr(arguments, key) for key in ("experts", "hidden", "width", "top_k", "tokens")}
    if arguments.child:
        with torch.inference_mode():
            if arguments.compare_loop:
                print(json.dumps(measure_loop(shape, arguments.loop_experts)))
            else:
                print(json.dumps(measure(arguments.child, shape, device)))
        return
    output = arguments.output or record_path(device)
    record = start_record(output, shape, device, arguments.fresh)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()] + [f"--device={device}"]
    record["command"] = "python benchmarks/true_size.py " + " ".join(options)
    output.parent.mkdir(exist_ok=True)
    if arguments.compare_loop:
        loop = [f"--loop-experts={arguments.loop_experts}", "--compare-loop", "--child=mobie"]
        record["loop"] = {"mobie": in_child([*loop, *options])}
        write_json(output, record)
        show(record)
        return
    methods = arguments.methods or [name for name in load_suite(SUITE).methods if name != REFERENCE]
    todo = [name for name in methods if name not in record["methods"]]
    with tqdm(todo, unit="method", disable=not todo) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            record["methods"][name] = in_child([f"--child={name}", *options])
            write_json(output, record)
    show(record)


if __name__ == "__main__":
    main()
