"""What a machine has: this one, read from the system without torch, or one that is described in words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mobie.errors import ConfigError

SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
SMI_SECONDS = 10
#: files in which Linux says how much memory a container may use
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
UNITS = {"MB": 1, "GB": 1 << 10, "TB": 1 << 20}  # MiB
EXAMPLE = "gpu=1x24GB,ram=64GB,disk=500GB"


@dataclass(frozen=True)
class Gpu:
    """A graphics card: name, memory in MiB, driver's version; empty texts where they are not known."""

    name: str
    mem_mb: int
    driver: str = ""


@dataclass(frozen=True)
class Machine:
    """Cards, and MiB of memory and of free disk; None: not known, and not compared with anything."""

    gpus: tuple[Gpu, ...]
    ram_mb: int | None
    disk_mb: int | None
    described: bool = False

    @property
    def gpu_mb(self) -> int:
        """Memory of the largest card: a model lies on one; 0 without any."""
        return max((gpu.mem_mb for gpu in self.gpus), default=0)

    def line(self) -> str:
        """For people: `1 GPU with 24 GiB, 64 GiB of memory, 500 GiB of free disk`."""
        count = len(self.gpus)
        cards = f"{count} GPU{'s' * (count > 1)} with {self.gpu_mb / 1024:.0f} GiB" if count else "no GPU"
        ram = "" if self.ram_mb is None else f", {self.ram_mb / 1024:.0f} GiB of memory"
        return cards + ram + ("" if self.disk_mb is None else f", {self.disk_mb / 1024:.0f} GiB of free disk")


def this_machine(folder: Path) -> Machine:
    """The machine that runs this, with the free disk where `folder` lies."""
    return Machine(find_gpus(), memory_mb(), shutil.disk_usage(folder).free >> 20)


def find_gpus() -> tuple[Gpu, ...]:
    """NVIDIA cards, as the driver's own program lists them; none where it is missing or fails."""
    try:
        shown = subprocess.run(SMI, capture_output=True, text=True, check=True, timeout=SMI_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rsplit(", ", 2) for line in shown.splitlines() if line.strip()]
    return tuple(Gpu(row[0], int(row[1]), row[2]) for row in rows if len(row) == 3 and row[1].isdigit())


def memory_mb() -> int | None:
    """Memory that this process may use: the machine's, or less inside a container."""
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in MEMORY_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return min(found) >> 20 if found else None


def parse_machine(text: str) -> Machine:
    """A described machine, `gpu=2x80GB,ram=256GB,disk=2TB`; 1 GB is 2³⁰ bytes. What is left out is not compared.

    Without `gpu` there is none; `gpu=24GB` is one card.

    Raises:
        ConfigError: another form.
    """
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in ("gpu", "ram", "disk") or key in values:
            raise _wrong(text)
        values[key] = value
    gpus: tuple[Gpu, ...] = ()
    if "gpu" in values and values["gpu"] not in ("0", "none"):
        count, times, each = values["gpu"].rpartition("x")
        if times and not count.isdigit():
            raise _wrong(text)
        gpus = (Gpu("", _mib(each, text)),) * (int(count) if times else 1)
    ram, disk = (_mib(values[key], text) if key in values else None for key in ("ram", "disk"))
    return Machine(gpus, ram, disk, described=True)


def _mib(value: str, text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]B)", value.strip())
    if found is None:
        raise _wrong(text)
    return int(float(found[1]) * UNITS[found[2]])


def _wrong(text: str) -> ConfigError:
    return ConfigError(f"--machine {text}: expected parts gpu=, ram= and disk= with sizes in MB, GB or TB: {EXAMPLE}")
