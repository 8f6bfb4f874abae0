"""Peak memory of quantizing models of 4, 8 and 16 identical blocks with MoBiE, loss gradients included.

    python benchmarks/streaming_memory.py                # writes benchmarks/records/streaming_memory.json

Every case is a process of its own, whose high-water mark of resident memory the kernel keeps (VmHWM); the mark before
the work begins, with all libraries loaded, is given beside it. A case with the whole model in memory, as the library
loads it, shows what growth would look like. The gradients of the smallest model are compared with those of one backward
pass through the whole model.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mobie.determinism import set_environment

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "streaming_memory.json"
BLOCKS = (4, 8, 16)
SHAPE = {"experts": 16, "hidden": 512, "width": 512, "top_k": 4, "vocabulary": 4096}
TOKENS = (16, 64)  # sequences and their length
MEMORY = "8MB"  # less than the activations of any case: all of them lie in files
#: the fewest steps, so that the runs are short: what is measured is memory
OPTIONS = {"iterations": 1, "gradient_groups": 1, "other_linears": "16bit"}
MB = 1 << 20


def high_water() -> float:
    """The most resident memory that this process has had, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system keeps no high-water mark of memory (VmHWM); run on Linux")


def make(folder: Path, blocks: int) -> None:
    """Write a random OLMoE in bfloat16, in files of 100 MB, with a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tokenizer

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["width"],
        num_experts=SHAPE["experts"],
        num_experts_per_tok=SHAPE["top_k"],
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    tokenizer().save_pretrained(folder)


def calibration() -> Any:
    """Random token ids."""
    import torch

    return torch.randint(2, SHAPE["vocabulary"], TOKENS, generator=torch.Generator().manual_seed(0))


def quantized(folder: Path, out: Path) -> dict[str, float]:
    """Peak memory of a quantization in this process, and of the process before it, MiB."""
    set_environment()  # as every verb that computes
    import torch

    import mobie.pipeline
    from mobie.config import build_method
    from mobie.models.weights import StreamedModel
    from mobie.resources import Resources

    torch.set_num_threads(1)
    StreamedModel(folder)  # loads all of the library that is needed, and no values
    before, began = high_water(), time.process_time()
    method = build_method("mobie", OPTIONS)
    resources = Resources.parse("cpu", MEMORY)
    mobie.pipeline.quantize(folder, method, calibration(), out, fingerprint="benchmark", resources=resources)
    peak = high_water()
    return {"baseline": before, "peak": peak, "above": peak - before, "cpu_seconds": time.process_time() - began}


def loaded_whole(folder: Path) -> dict[str, float]:
    """Peak memory of loading a model with the library, MiB."""
    import torch
    from transformers import AutoModelForCausalLM

    from mobie.models.weights import StreamedModel

    StreamedModel(folder)
    before = high_water()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {"baseline": before, "peak": high_water(), "above": high_water() - before}


def gradients(folder: Path, out: Path) -> dict[str, float]:
    """Largest difference between the roots of streamed and whole-model token weights, relative to the largest root."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from whole_model import whole_model_weights

    from mobie.calibration.backward import GradientPass
    from mobie.calibration.shared import GradientFolder
    from mobie.calibration.store import ActivationStore, Memory
    from mobie.config import build_method
    from mobie.models.weights import StreamedModel
    from mobie.pipeline import batches_of

    torch.set_num_threads(1)
    streamed, method, batches = StreamedModel(folder), build_method("mobie", OPTIONS), batches_of(calibration())
    found = GradientFolder(out, "benchmark", len(streamed.blocks))
    GradientPass(streamed, method, batches, ActivationStore(out / "store", "benchmark", Memory(0)), found).run()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    largest = 0.0
    for index, expected in enumerate(whole_model_weights(model, streamed.adapter, method, batches)):
        got = found.weights(index)
        assert got is not None
        for ours, theirs in ((got.linears, expected.linears), (got.experts, expected.experts)):
            for name, reference in theirs.items():
                difference = (ours[name].sqrt() - reference.sqrt()).abs().max() / reference.sqrt().max()
                largest = max(largest, float(difference))
    return {"largest_relative_difference": largest}


def in_child(*arguments: str) -> Any:
    """Run a case in a process of its own and read the JSON that it prints."""
    command = [sys.executable, __file__, "--case", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def case(kind: str, *arguments: str) -> None:
    """What a child does."""
    folder, out = Path(arguments[0]), Path(arguments[-1])
    results = {
        "make": lambda: make(folder, int(arguments[1])),
        "quantize": lambda: quantized(folder, out),
        "whole": lambda: loaded_whole(folder),
        "gradients": lambda: gradients(folder, out),
    }[kind]()
    print(json.dumps(results))


def measure(work: Path) -> dict[str, Any]:
    """All cases, one after the other."""
    streamed, whole, compared = {}, {}, {}
    for blocks in BLOCKS:
        folder = work / f"model-{blocks}"
        in_child("make", str(folder), str(blocks))
        streamed[str(blocks)] = in_child("quantize", str(folder), str(work / f"out-{blocks}"))
        whole[str(blocks)] = in_child("whole", str(folder))
        print(f"{blocks:3d} blocks: peak {streamed[str(blocks)]['peak']:.0f} MiB, "
              f"above the libraries {streamed[str(blocks)]['above']:.0f} MiB; "
              f"the whole model loaded: {whole[str(blocks)]['peak']:.0f} MiB", flush=True)  # fmt: skip
        if blocks == BLOCKS[0]:
            compared = in_child("gradients", str(folder), str(work / "gradients"))
            print(f"gradients, streamed against whole: {compared['largest_relative_difference']:.1e}", flush=True)
    return {"streamed": streamed, "whole_model": whole, "gradients": compared}


def spread(cases: dict[str, dict[str, float]], what: str) -> float:
    """(largest - smallest) / smallest."""
    values = [one[what] for one in cases.values()]
    return (max(values) - min(values)) / min(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record is written")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case(*arguments.case)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    h, w, experts = SHAPE["hidden"], SHAPE["width"], SHAPE["experts"]
    record = {
        "command": "python benchmarks/streaming_memory.py",
        "unit": "MiB of resident memory",
        "shape": SHAPE | {"sequences": TOKENS[0], "length": TOKENS[1]},
        "block_mib_float32": 4 * (3 * experts * h * w + 4 * h * h) / MB,
        "method": {"name": "mobie"} | OPTIONS,
        "memory": MEMORY,
        **found,
        "spread_of_peaks": spread(found["streamed"], "peak"),
        "spread_above_baseline": spread(found["streamed"], "above"),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    print(f"peaks differ by {record['spread_of_peaks']:.1%}, "
          f"above the libraries by {record['spread_above_baseline']:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
