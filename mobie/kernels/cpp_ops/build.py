"""Builds ops.cpp once per machine and loads it: `$XDG_CACHE_HOME/mobie/cpp_ops/KEY/mobie_cpu.so`.

KEY stands for all that the code depends on: the source, the versions of torch and Python, the compiler, its options and
the instructions of this CPU; so a home folder may be shared by machines that differ. torch's own build
(torch.utils.cpp_extension) does the work in a temporary folder; only a finished library gets its name. A lock keeps a
second process from building the same.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("ops.cpp")
NAME = "mobie_cpu"
OPTIONS = ("-O3", "-march=native", "-fopenmp")
REMEDY = "install a C++ compiler and ninja (for example the packages g++ and ninja-build)"
OWN_TOOLS = Path(sys.executable).parent  # ninja comes with the package; its folder need not be in PATH


def cache_folder() -> Path:
    """Where finished libraries lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobie" / "cpp_ops"


def compiler() -> str | None:
    """Path of the C++ compiler that torch would take, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def load_operators() -> None:
    """Make the operators of ops.cpp known as `torch.ops.mobie_cpu`; builds them if need be.

    Raises:
        ImportError: there is no compiler or no ninja, the build failed, or its result cannot be loaded or kept.
    """
    try:
        torch.ops.load_library(_library())
    except OSError as error:
        raise ImportError(f"the C++ operators cannot be built or loaded: {error}") from error


def _library() -> Path:
    found = compiler()
    if found is None:
        raise ImportError(f"no C++ compiler; {REMEDY}")
    folder = cache_folder() / _key(found)
    library = folder / f"{NAME}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), _tools_in_path():
        if shutil.which("ninja") is None:
            raise ImportError(f"the C++ operators need ninja to be built; {REMEDY}")
        if not library.is_file():
            _build(library)
    return library


@contextmanager
def _tools_in_path() -> Iterator[None]:
    """torch calls ninja by its name."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([before, str(OWN_TOOLS)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _key(found: str) -> str:
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (SOURCE.read_text(), *OPTIONS, version, torch.__version__, sys.version, platform.machine(), _cpu())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What the CPU can do, as Linux lists it; its name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _build(library: Path) -> None:
    """Compile into a temporary folder beside `library`, which appears when all is done.

    Raises:
        ImportError: the compiler reports errors; the text has the first, `build.log` all of them.
    """
    from torch.utils.cpp_extension import load

    work = Path(tempfile.mkdtemp(dir=library.parent))
    try:
        load(
            NAME,
            [str(SOURCE)],
            build_directory=str(work),
            extra_cflags=list(OPTIONS),
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
            is_standalone=False,
        )
        os.replace(work / library.name, library)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        log = library.with_name("build.log")
        log.write_text(f"{error}\n")
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
        raise ImportError(f"building the C++ operators failed: {lines[-1] if lines else error}; see {log}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
