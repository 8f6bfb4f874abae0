"""The one place that sets what decides the last bits of a result: threads, seeds, algorithms, environment.

Sums and factorisations on two threads differ from those on one, TF32 products from full ones, a GPU's atomic adds from
one call to the next. `read_locally` is called for every verb but `fetch` and `lock`, `make_deterministic` by every verb
that computes with torch, `set_environment` by those that build tables, figures and verdicts from records. `settings`
reads back what is set, for the record.

Hash randomization is left on: no result hangs on the order of a set, which tests/reliability/determinism.py shows by
runs with different hash seeds.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mobie.redaction import drop_secrets

SEED = 0  # of the global generators; the suite's own draws come from generators made of (seed, purpose)

#: nothing but `fetch` and `lock` may ask the network; libraries read these when they are imported
LOCAL = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
#: beside the number of threads
COMPUTING = {
    "TOKENIZERS_PARALLELISM": "false",  # one thread; with more the result would be the same
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the faster one of its two deterministic settings
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # tensors are read when they are needed; ahead, in threads, they pile up in memory
}
#: variables that hold a number of threads; read when numpy and torch are imported
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def read_locally() -> None:
    """Keep libraries off the network, and their progress bars out of log files; before they are imported.

    Tokens and passwords are taken out of the environment: nothing but `fetch` and `lock` needs one.
    """
    drop_secrets()
    os.environ.update(LOCAL)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws its bars into log files too


def set_environment(threads: int = 1) -> None:
    """Set the variables that decide values; before numpy and torch are imported."""
    os.environ.update(COMPUTING | dict.fromkeys(THREADS, str(threads)))


def make_deterministic(threads: int = 1, *, algorithms: bool = True) -> None:
    """Set threads, seeds, algorithms and environment of this process; imports torch.

    threads:    of torch and of the libraries below it.
    algorithms: prefer deterministic algorithms. False only where time is measured: they are not what others run. An
                operation that has none warns and runs; on a CPU the suite uses no such operation.
    """
    set_environment(threads)
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = algorithms
    torch.use_deterministic_algorithms(algorithms, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing reads such memory


def inherited() -> Callable[[], AbstractContextManager[None]]:
    """What torch keeps for each thread by itself, taken from this one: `with here():` sets it in another thread."""
    import torch

    threads, inference, gradients = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    @contextmanager
    def here() -> Iterator[None]:
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            yield

    return here


def settings() -> dict[str, Any]:
    """What decides the last bits in this process, read back from the environment and, where it is imported, torch."""
    found: dict[str, Any] = {
        "environment": {name: os.environ.get(name) for name in sorted({*LOCAL, *COMPUTING, *THREADS})},
        "torch": None,
    }
    if (torch := sys.modules.get("torch")) is not None:
        found["torch"] = {
            "threads": torch.get_num_threads(),
            "seed": torch.initial_seed(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return found
