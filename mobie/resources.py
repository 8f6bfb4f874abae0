"""What a job may use of a machine: devices, and memory beside the weights of one block. Neither decides its result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobie.errors import ConfigError

if TYPE_CHECKING:
    import torch

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
AUTO, CPU = "auto", "cpu"
DEFAULT_MEMORY = "4GB"


@dataclass(frozen=True)
class Resources:
    """Devices by name, the first of which holds the block in work, and bytes for activations and statistics."""

    devices: tuple[str, ...] = (CPU,)
    memory: int = 4 * 10**9

    @classmethod
    def parse(cls, device: str = CPU, memory: str = DEFAULT_MEMORY) -> Resources:
        """Read `--device` and `--memory`. Raises `ConfigError` for a value of another form, or an absent device."""
        return cls(parse_devices(device), parse_memory(memory))

    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices as torch knows them."""
        import torch

        return tuple(torch.device(name) for name in self.devices)

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`: what decides the last digits of a result."""
        return self.devices[0].partition(":")[0]

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return {"devices": list(self.devices), "memory_bytes": self.memory}


def parse_memory(text: str) -> int:
    """Bytes of `20GB`, `512 MiB` or a bare number. Raises `ConfigError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text, re.IGNORECASE)
    unit = (found[2] or "B").upper() if found else ""
    if found is None or unit not in UNITS:
        raise ConfigError(f"memory is {text!r}, expected a number with a unit, such as 20GB or 512MiB")
    return int(float(found[1]) * UNITS[unit])


def parse_devices(text: str) -> tuple[str, ...]:
    """Devices of `auto`, `cpu`, `cuda` or `cuda:0,cuda:1`.

    `auto` is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: another name, or a GPU that this machine does not have.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == AUTO:
        return ("cuda:0",) if count else (CPU,)
    devices = tuple("cuda:0" if name == "cuda" else name for name in re.split(r"\s*,\s*", text.strip()))
    for name in devices:
        known = re.fullmatch(r"cpu|cuda:(\d+)", name)
        if known is None or (len(devices) > 1 and len(set(devices)) < len(devices) and name != CPU):
            raise ConfigError(f"device is {text!r}, expected auto, cpu, cuda, or GPUs such as cuda:0,cuda:1, each once")
        if known[1] is not None and int(known[1]) >= count:
            raise ConfigError(
                f"device is {text!r}, but torch finds {count} GPUs here; choose cpu, or run `nvidia-smi` to see what "
                "the machine has and install a build of torch for it"
            )
    return devices
