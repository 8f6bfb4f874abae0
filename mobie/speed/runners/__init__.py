"""Who runs a model: the library, our runner, and other projects' where they are installed. One file each kind.

A runner has a name, says which weights it takes, may say why it cannot run here, and times one setting. To add one is
to add a file here and its class to `runners()`.
"""

from __future__ import annotations

from mobie.errors import ConfigError, unknown_name
from mobie.speed.runners.base import Runner

#: name → label, in the order of tables; known without torch
LABELS = {
    "library-eager": "library, eager",
    "library-grouped_mm": "library, grouped_mm",
    "library-batched_mm": "library, batched_mm",
    "dense": "our runner, 16-bit experts",
    "binary-16bit": "our runner, binary, 16-bit activations",
    "binary-int8": "our runner, binary, int8 activations and head",
    "vllm": "vLLM, bfloat16",
    "gemlite": "gemlite, 1-bit experts",
    "llama.cpp": "llama.cpp, a GGUF file",
}
#: baselines of the ratios
DENSE, GROUPED = "dense", "library-grouped_mm"
#: timed with every batch size and routing; the others at the paper's setting only, unless a sweep is asked for
OURS = ("dense", "binary-16bit", "binary-int8")
#: the runner whose values are a record's measurements: of a 16-bit model, and of a packed one
PRIMARY = {"dense": "dense", "packed": "binary-16bit"}


def runners() -> list[Runner]:
    """All runners, in the order of `LABELS`."""
    from mobie.speed.runners.gemlite import Gemlite
    from mobie.speed.runners.library import LibraryRunner
    from mobie.speed.runners.llama_cpp import LlamaCpp
    from mobie.speed.runners.ours import BinaryRunner, DenseRunner
    from mobie.speed.runners.vllm import Vllm

    return [
        *(LibraryRunner(kind) for kind in ("eager", "grouped_mm", "batched_mm")),
        DenseRunner(),
        BinaryRunner("binary-16bit", "16bit", int8_head=False),
        BinaryRunner("binary-int8", "int8", int8_head=True),
        Vllm(),
        Gemlite(),
        LlamaCpp(),
    ]


def find_runner(name: str) -> Runner:
    """A runner by its name. Raises `ConfigError`."""
    known = {runner.name: runner for runner in runners()}
    if name not in known:
        raise ConfigError(unknown_name("runner", name, known))
    return known[name]
