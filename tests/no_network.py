"""Run a command on this machine with no network but what processes share by files."""

from __future__ import annotations

import os
import subprocess
from functools import cache


@cache
def without_network() -> tuple[str, ...] | None:
    """What to put before a command so that it sees no network interface; None where the machine forbids it."""
    prefix = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
    try:
        shown = subprocess.run([*prefix, "cat", "/proc/net/dev"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    interfaces = [line.split(":")[0].strip() for line in shown.stdout.splitlines() if ":" in line]
    return prefix if shown.returncode == 0 and set(interfaces) <= {"lo"} else None
