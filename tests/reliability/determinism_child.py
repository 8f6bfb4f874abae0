"""One measurement of `determinism.py`, in a process of its own: threads are set once in the life of a process.

score METHOD BATCHES THREADS   logits and perplexity at each pair of two JSON lists, against the first
quantize METHOD THREADS        a checkpoint beside the stored one, and how it differs
operations SIZE THREADS        what quantizing is made of, on square matrices of this size, against one thread
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobie.config import default_layout
from mobie.determinism import make_deterministic
from mobie.jobs.keys import Keys

if TYPE_CHECKING:
    from torch import Tensor

SUITE, MODEL = "tiny", "nano-olmoe"


def keys_of(method: str) -> Keys:
    return Keys(default_layout(), SUITE, MODEL, 0, method)


def score(method: str, batches: list[int], threads: list[int]) -> dict[str, object]:
    """Largest difference of a logit and relative one of the perplexity, by batch and threads."""
    found = []
    reference = logits(keys_of(method).checkpoint, method, batches[0], threads[0])
    for count in threads:
        for batch in batches:
            if (batch, count) != (batches[0], threads[0]):
                got = logits(keys_of(method).checkpoint, method, batch, count)
                found.append({"batch": batch, "threads": count} | difference(reference, got))
    return {"settings": found}


def logits(checkpoint: Path, method: str, batch: int, threads: int) -> tuple[Tensor, float]:
    """Logits `(windows, length, vocabulary)` and mean negative log-likelihood on the protocol's first text."""
    import torch

    from mobie.jobs.data import read_windows
    from mobie.packing.checkpoint import load_model
    from mobie.scoring.perplexity import perplexity

    make_deterministic(threads)
    keys = keys_of(method)
    protocol = keys.protocol.perplexity[0].model_copy(update={"batch_size": batch})
    windows, _ = read_windows(keys, keys.protocol.perplexity[0], checkpoint)
    model, _ = load_model(checkpoint, torch.float32)
    with torch.no_grad():
        values = torch.cat([model(part).logits for part in windows.split(batch)])
    return values, perplexity(model, windows, protocol).measurement.value


def difference(reference: tuple[Tensor, float], got: tuple[Tensor, float]) -> dict[str, float]:
    """How far two pairs of logits and perplexity are apart."""
    return {
        "logit": float((reference[0] - got[0]).abs().max()),
        "perplexity": abs(got[1] - reference[1]) / reference[1],
    }


def quantize(method: str, threads: int) -> dict[str, object]:
    """Quantize again on so many threads, and compare with the stored checkpoint."""
    from mobie.calibration.tokens import load_tokens
    from mobie.jobs.keys import model_folder
    from mobie.pipeline import quantize as run

    keys = keys_of(method)
    make_deterministic(threads)
    tokens, _ = load_tokens(keys.calibration)
    again = keys.checkpoint.with_name(f"checkpoint-{threads}-threads")
    run(model_folder(keys), keys.method_config.build(), tokens, again, fingerprint="again", progress=False)
    values = difference(logits(keys.checkpoint, method, 1, 1), logits(again, method, 1, 1))
    return tensors_of(keys.checkpoint, again) | values


def tensors_of(one: Path, other: Path) -> dict[str, int]:
    """How many tensors, and how many of their bytes, are not the same in two checkpoints."""
    import torch
    from safetensors.torch import load_file

    counts = dict.fromkeys(("tensors", "differing", "all_bytes", "bytes"), 0)
    for path in sorted(one.glob("*.safetensors")):
        expected, got = load_file(path), load_file(other / path.name)
        for name, tensor in expected.items():
            a, b = (value.contiguous().flatten().view(torch.uint8) for value in (tensor, got[name]))
            unequal = int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel())
            counts["tensors"] += 1
            counts["differing"] += unequal > 0
            counts["all_bytes"] += a.numel()
            counts["bytes"] += unequal
    return counts


def operations(size: str, threads: int) -> dict[str, float]:
    """Largest difference of each operation's result, in shares of its largest value."""
    one, other = results(int(size), 1), results(int(size), threads)
    return {name: float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one}


def results(size: int, threads: int) -> dict[str, Any]:
    """Operations on one random matrix, on so many threads."""
    import torch

    make_deterministic(threads)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    gram = matrix @ matrix.T + torch.eye(size)
    return {
        "product": gram,
        "sum": matrix.sum(),
        "Cholesky factor": torch.linalg.cholesky(gram),
        "singular values": torch.linalg.svdvals(matrix),
        "eigenvectors": torch.linalg.eigh(gram)[1],
    }


def main(arguments: list[str]) -> None:
    """Print one JSON object."""
    what, subject, *values = arguments
    numbers = [json.loads(value) for value in values]
    found = {"score": score, "quantize": quantize, "operations": operations}[what](subject, *numbers)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
