"""Which implementation of the operations a device gets.

Triton on an NVIDIA GPU, the C++ operators on a CPU where they can be built, plain torch anywhere else. The environment
variable MOBIE_KERNELS (torch, triton or cpp) decides instead, where it is set. What cannot run gives way to plain
torch with one message, so that a model answers, if slowly.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch

from mobie.errors import ConfigError, unknown_name

VARIABLE = "MOBIE_KERNELS"
MODULES = {
    "torch": "mobie.kernels.twins",
    "triton": "mobie.kernels.triton_ops",
    "cpp": "mobie.kernels.cpp_ops",
}
#: device → what it gets where nobody chose
DEFAULTS = {"cuda": "triton", "cpu": "cpp"}
TRITON_DTYPES = (torch.float16, torch.bfloat16)

logger = logging.getLogger("mobie")


@functools.cache
def say_once(text: str) -> None:
    """Log a warning, the first time that it comes up in this process."""
    logger.warning(text)


def operations(device: torch.device | str, dtype: torch.dtype, prefer: str | None = None) -> ModuleType:
    """Module with the operations of `mobie.kernels.twins` for tensors of `dtype` on `device`.

    Args:
        prefer: "torch", "triton" or "cpp"; the environment variable goes before it.

    Raises:
        ConfigError: `prefer` or the variable names something else.
    """
    asked = os.environ.get(VARIABLE) or prefer
    if asked is not None and asked not in MODULES:
        source = f"environment variable {VARIABLE}" if os.environ.get(VARIABLE) else "prefer"
        raise ConfigError(f"{source}: {unknown_name('kernels', asked, MODULES)}")
    kind = torch.device(device).type
    return _load(asked or DEFAULTS.get(kind, "torch"), kind, dtype)


def name_of(ops: ModuleType) -> str:
    """ "torch", "triton" or "cpp" for a module that `operations` gave."""
    return next(name for name, module in MODULES.items() if module == ops.__name__)


@functools.cache
def _load(name: str, kind: str, dtype: torch.dtype) -> ModuleType:
    """The module `name`, or plain torch and a message."""
    obstacle = _obstacle(name, kind, dtype)
    if obstacle is None:
        try:
            return importlib.import_module(MODULES[name])
        except ImportError as error:
            obstacle = f"they cannot be loaded ({error})"
    say_once(f"the {name} kernels are not used: {obstacle}; computing with plain torch instead, which is slower")
    return importlib.import_module(MODULES["torch"])


def _obstacle(name: str, kind: str, dtype: torch.dtype) -> str | None:
    if name == "cpp" and kind != "cpu":
        return f"they need tensors on the CPU, got {kind}"
    if name != "triton":
        return None
    if dtype not in TRITON_DTYPES:
        return f"they take float16 or bfloat16, got {dtype}: load the model with dtype=torch.bfloat16"
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they need an NVIDIA GPU, got {kind}: move the model there, or set TRITON_INTERPRET=1 to test them"
    return None
