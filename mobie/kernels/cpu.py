"""Which way a packed model computes on a CPU where nobody chose: dense copies where they fit, else the kernels.

Measured with benchmarks/cpu_decode.py on one core of a 2.5 GHz Xeon with AVX-512 and without bf16 instructions: one
layer of OLMoE-1B-7B (64 experts, top-8), medians in milliseconds, no weight in a cache, error relative to float32:

                            batch 1        batch 4      MB    error
    cached bf16          17.3   1.0x    68.6   1.0x    805    7e-3
    cached float32       22.5   0.8x    70.2   1.0x   1611    0
    int8 weights         10.7   1.6x    35.8   1.9x    403    2e-2     torch._weight_int8pack_mm
    int8, both            8.9   1.9x    34.3   2.0x    403    3e-2     torch._int_mm
    unpack every time   14737          14550            75    7e-3
    torch twins           567           1807            76    5e-3
    C++                   5.1   3.4x    11.8   5.8x     76    5e-3
    C++, int8             5.1   3.4x    12.2   5.6x     76    2e-2

A 2048 x 2048 Linear in C++ against cached bf16: in MoBiE's expert format 2.9x and 5.4x (0.41 and 0.67 ms); as ARB-RC
with two groups, the attention's default, 1.3x and 1.9x (0.90 and 1.84 ms, where the twin takes 210). Built for AVX2
only, the layer took 7.0 and 20 ms on the same core; without vector instructions it would be slower than bf16.

Dense copies stay the default although the C++ operators are faster: their logits are bit for bit those of the
dequantized model, which is what a quality measurement is about. `compute="kernels"` is the choice for chatting, and the
only one for a model whose dense copies do not fit. int8 copies of dequantized weights are no choice: larger, slower and
less exact than the packed bits. int8 activations are no faster here than 16-bit ones (both are table look-ups); they
are there to compute what a GPU's fast path computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

KEPT_FREE = 0.2  # share of the available memory that is left for caches, activations and other programs


def choose_compute(dense_bytes: int, available: int | None = None) -> Literal["cached", "kernels"]:
    """What compute="auto" is on a CPU.

    Args:
        dense_bytes: size of all packed weights when they are unpacked in the model's dtype.
        available: bytes of memory that can be had; what the system says unless given.
    """
    available = available_memory() if available is None else available
    return "cached" if available is None or dense_bytes <= (1 - KEPT_FREE) * available else "kernels"


def available_memory() -> int | None:
    """Bytes that can be had without swapping; the least of the machine's and the container's; None where unknown."""
    found = [value for value in (_machine_memory(), _container_memory()) if value is not None]
    return min(found, default=None)


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_memory() -> int | None:
    """What a control group (version 2) leaves, where one limits this process."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
