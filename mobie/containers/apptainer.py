"""Finding Apptainer, and what its environment needs on machines that hold back a capability from root."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from mobie.errors import UnsupportedError

#: numbers of capabilities.h: all that Apptainer asks for when root runs it, as far as they go missing in practice
CAPABILITIES = {
    21: "CAP_SYS_ADMIN",
    24: "CAP_SYS_RESOURCE",
    25: "CAP_SYS_TIME",
    12: "CAP_NET_ADMIN",
    16: "CAP_SYS_MODULE",
}


def find_apptainer() -> str:
    """Path of the program. Raises `UnsupportedError` with the remedy where it is not installed."""
    path = shutil.which("apptainer")
    if path is None:
        raise UnsupportedError(
            "apptainer is not on PATH; install it (Debian 12 has no package: `containers/get-apptainer PREFIX`, then "
            "`export PATH=PREFIX/bin:$PATH`)"
        )
    return path


def missing_capabilities(status: str) -> list[str]:
    """Capabilities that a process cannot have, from the text of /proc/self/status."""
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if found is None:  # a system without Linux's capabilities lacks none
        return []
    bounds = int(found[1], 16)
    return [name for number, name in sorted(CAPABILITIES.items()) if not bounds >> number & 1]


def apptainer_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, or `environment`, with what Apptainer needs here.

    Run by root, it asks for every capability and stops where the machine holds one back, as containers of cloud
    services do; it has to be told to leave that one out.
    """
    found = dict(os.environ if environment is None else environment)
    if os.geteuid() == 0 and "APPTAINER_DROP_CAPS" not in found:
        missing = missing_capabilities(Path("/proc/self/status").read_text(encoding="ascii"))
        if missing:
            found["APPTAINER_DROP_CAPS"] = ",".join(missing)
    return found


def bound(folder: Path, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variable that lets programs in an image read a folder under its own name, beside what they may already."""
    found = os.environ if environment is None else environment
    binds = [bind for bind in found.get("APPTAINER_BIND", "").split(",") if bind]
    mine = f"{folder}:{folder}:ro"
    return {"APPTAINER_BIND": ",".join(binds if mine in binds else [*binds, mine])}
