"""The checks of `python -m mobie doctor`: a table of functions, each of which gives lines.

A check reads files, the environment and the versions of installed packages. It imports no torch and starts nothing but
the driver's and the container program's own `--version`. What a line shows holds no secret and no home folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mobie.containers.images import IMAGES, digests_file, read_digests
from mobie.determinism import THREADS
from mobie.paths import Layout
from mobie.plan.machine import find_gpus, memory_mb
from mobie.redaction import redact

State = Literal["ok", "warn", "fail"]
PYTHON = (3, 11)
#: packages without which only some verbs fail: what they are for
OPTIONAL = {
    "triton": "kernels on a GPU",
    "lm-eval": "score-tasks, score-hard",
    "evalplus": "score-code, generate-code",
    "snakemake": "the workflow",
    "snakemake-executor-plugin-slurm": "the slurm profiles",
    "matplotlib": "figures",
    "tabulate": "tables",
    "datasets": "benchmark items",
    "accelerate": "score-tasks",
    "selenium": "tests",
}
#: requirements that only the project's own tests and formatters need
DEVELOPMENT = ("pytest", "hypothesis", "selenium", "jsonschema", "ruff", "snakefmt", "mypy", "types-", "pytest-xdist")
SMALLEST_RAM_MB, SMALLEST_DISK_MB = 4000, 5000  # the smoke suite: its largest job, its files
COMMAND_SECONDS = 10
#: instruction sets of a processor that decide how fast it is, best first
INSTRUCTION_SETS = ("avx512f", "avx2", "asimd", "neon")


@dataclass(frozen=True)
class Line:
    """A finding. `remedy` says what to do; empty where nothing is to be done."""

    topic: str
    state: State
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


# --- versions ---------------------------------------------------------------------------------------------------------


def check_python(_: Layout) -> Iterable[Line]:
    """Version of Python."""
    version = platform.python_version()
    if sys.version_info < PYTHON:
        remedy = "make an environment with Python 3.11: `python3.11 -m venv .venv`"
        yield Line("python", "fail", f"{version}, expected 3.11 or newer", remedy)
    elif sys.version_info[:2] == PYTHON:
        yield Line("python", "ok", version)
    else:
        yield Line(
            "python", "warn", f"{version}; the suite was tested with 3.11", "use 3.11 to get the same last digits"
        )


def pins(layout: Layout) -> dict[str, str]:
    """Package → version in `requirements.txt`; empty where there is none."""
    path = layout.root / "requirements.txt"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(found.groups() for line in lines if (found := re.match(r"([\w.-]+)==([\w.]+)", line)))  # type: ignore[misc]


def check_packages(layout: Layout) -> Iterable[Line]:
    """Installed packages against their pins; those for development only where they are installed."""
    wanted = pins(layout)
    if not wanted:
        yield Line("packages", "warn", "no requirements.txt to compare with", "run this in a clone of the repository")
    for name, version in wanted.items():
        development = name.startswith(DEVELOPMENT)
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not development:
                yield _missing(name, version)
            continue
        if found.split("+")[0] == version:  # torch names its build after a plus sign
            if not development:
                yield Line(name, "ok", found)
        else:
            text = f"{found}, tested with {version}"
            yield Line(name, "warn", text, f"pip install {name}=={version}")


def _missing(name: str, version: str) -> Line:
    needed = OPTIONAL.get(name)
    text = f"not installed; needed for {needed}" if needed else "not installed"
    return Line(name, "warn" if needed else "fail", text, f"pip install {name}=={version}")


# --- the machine ------------------------------------------------------------------------------------------------------


def check_gpu(_: Layout) -> Iterable[Line]:
    """Graphics cards, and whether the installed torch can use them."""
    gpus = find_gpus()
    if not gpus:
        remedy = "none is needed for the smoke suite; see `python -m mobie plan --config suite=paper` for the paper's"
        yield Line("gpu", "warn", "no NVIDIA GPU found (nvidia-smi)", remedy)
        return
    for gpu in gpus:
        yield Line("gpu", "ok", f"{gpu.name}, {gpu.mem_mb / 1024:.0f} GiB, driver {gpu.driver}")
    build = _torch_build()
    if build is not None and build.endswith("cpu"):
        yield Line(
            "gpu", "fail", f"torch {build} cannot use it", "install the CUDA build of torch: https://pytorch.org"
        )


def _torch_build() -> str | None:
    """Version of torch with its build, `2.13.0+cpu`, read without importing it; None: not installed."""
    try:
        files = importlib.metadata.files("torch") or []
        version = next((file for file in files if file.as_posix() == "torch/version.py"), None)
        text = Path(str(version.locate())).read_text(encoding="utf-8") if version is not None else ""
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(r"__version__ = '([^']+)'", text)
    return found[1] if found else None


def check_processor(_: Layout) -> Iterable[Line]:
    """Cores that this process may use, and the processor's instruction sets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _processor_flags()
    best = next((name for name in INSTRUCTION_SETS if name in flags), None)
    text = f"{cores} cores, {platform.machine()}" + (f" with {best}" if best else "")
    if flags and best is None:
        yield Line("processor", "warn", text, "expected AVX2 or NEON; everything runs, several times slower")
    else:
        yield Line("processor", "ok", text)


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {flag for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) for flag in line.split()}


def check_memory(_: Layout) -> Iterable[Line]:
    """Memory that this process may use."""
    found = memory_mb()
    if found is None:
        yield Line("memory", "warn", "not known", "see what the system says, and compare with `python -m mobie plan`")
    elif found < SMALLEST_RAM_MB:
        remedy = f"the smoke suite asks for {SMALLEST_RAM_MB} MiB: close programs, or raise the container's limit"
        yield Line("memory", "warn", f"{found / 1024:.1f} GiB", remedy)
    else:
        yield Line("memory", "ok", f"{found / 1024:.1f} GiB")


def check_disk(layout: Layout) -> Iterable[Line]:
    """Free disk and write permission where results and downloads go."""
    for folder in (layout.root / "results", layout.resources):
        there = _existing(folder)
        free = shutil.disk_usage(there).free >> 20
        name = f"disk {folder.name}"
        if not _writable(there):
            yield Line(name, "fail", "cannot be written", f"give yourself write permission to {folder.name}/")
        elif free < SMALLEST_DISK_MB:
            yield Line(name, "warn", f"{free / 1024:.1f} GiB free", f"free {SMALLEST_DISK_MB} MiB for the smoke suite")
        else:
            yield Line(name, "ok", f"{free / 1024:.0f} GiB free")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _writable(folder: Path) -> bool:
    """Whether a file can be made there; permissions alone do not tell of read-only file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# --- environment ------------------------------------------------------------------------------------------------------


def check_caches(_: Layout) -> Iterable[Line]:
    """Folders that libraries write to."""
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    folders = {
        "HF_HOME": cache / "huggingface",
        "TRITON_CACHE_DIR": home / ".triton" / "cache",
    }
    for variable, default in folders.items():
        value = os.environ.get(variable)
        folder = Path(value) if value else default
        text = f"{tidy(folder)}{'' if value else ' (default)'}"
        if _writable(_existing(folder)):
            yield Line(variable, "ok", text)
        else:
            yield Line(variable, "fail", f"{text} cannot be written", f"export {variable}=FOLDER on a disk that can")


def tidy(path: Path) -> str:
    """A path without the home folder's, and without secrets."""
    absolute, home = path.absolute(), Path.home()
    return redact(f"~/{absolute.relative_to(home)}" if absolute.is_relative_to(home) else str(absolute))


def check_threads(_: Layout) -> Iterable[Line]:
    """Thread settings: a verb that computes sets them for itself, but libraries imported before do not listen."""
    found = {name: os.environ.get(name) for name in THREADS}
    shown = ", ".join(f"{name}={value}" for name, value in found.items() if value) or "none set"
    if found["OMP_NUM_THREADS"] not in (None, "1") and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        remedy = (
            "export OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=passive: threads that wait by spinning slow each other down"
        )
        yield Line("threads", "warn", shown, remedy)
    else:
        yield Line("threads", "ok", f"{shown}; verbs that compute set one")


def check_container(layout: Layout) -> Iterable[Line]:
    """Apptainer and the built images."""
    program = shutil.which("apptainer")
    if program is None:
        remedy = "only `--sdm apptainer` and score-code need it: `containers/get-apptainer PREFIX`, PREFIX/bin on PATH"
        yield Line("apptainer", "warn", "not on PATH", remedy)
    else:
        version = _version(program)
        state: State = "ok" if version else "fail"
        yield Line("apptainer", state, version or "does not start", "" if version else "run `apptainer --version`")
    digests = read_digests(layout.root)
    for file in sorted({image.file for image in IMAGES.values()}):
        path = layout.root / "containers" / f"{file}.sif"
        known = [image.name for image in IMAGES.values() if image.file == file and image.name in digests]
        if not path.is_file():
            command = "containers/build code" if file == "code" else "containers/build (--cuda for GPUs)"
            yield Line(f"image {file}", "warn", f"containers/{path.name} is not built", f"only if needed: {command}")
        elif not known:
            text = f"containers/{path.name}, not in {digests_file(Path()).as_posix()}"
            yield Line(f"image {file}", "warn", text, "build it again, so that its digest is recorded")
        else:
            trees = ", ".join(f"{name} {digests[name]['tree_sha256'][:12]}" for name in known)
            yield Line(f"image {file}", "ok", f"containers/{path.name}; trees recorded: {trees}")


def _version(program: str) -> str | None:
    try:
        shown = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=True, timeout=COMMAND_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip() or None


# --- downloads --------------------------------------------------------------------------------------------------------


def has_login(environment: Mapping[str, str]) -> bool:
    """Whether there is a token for the hub, in the environment or stored by its client; what it is stays unread."""
    if any(environment.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    home = (
        environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    return Path(environment.get("HF_TOKEN_PATH") or Path(home) / "token").is_file()


def login_line(login: bool) -> Line:
    """Whether there is a login for the hub."""
    if login:
        return Line("hub login", "ok", "there is a token")
    remedy = "only gated models need one: `hf auth login` (`python -m mobie plan` lists them)"
    return Line("hub login", "warn", "none", remedy)


def check_mirror(_: Layout) -> Iterable[Line]:
    """The local mirror of the hub, where one is named."""
    value = os.environ.get("MOBIE_MIRROR")
    if not value:
        yield Line("mirror", "ok", "MOBIE_MIRROR is not set: downloads come from the hub")
    elif Path(value).is_dir():
        yield Line("mirror", "ok", f"MOBIE_MIRROR, a folder of {sum(1 for _ in Path(value).iterdir())} entries")
    else:
        yield Line("mirror", "fail", "MOBIE_MIRROR is no folder", "name a folder with OWNER/NAME, or unset it")


CHECKS: tuple[Callable[[Layout], Iterable[Line]], ...] = (
    check_python,
    check_packages,
    check_gpu,
    check_processor,
    check_memory,
    check_disk,
    check_caches,
    check_threads,
    check_container,
    check_mirror,
)


def examine(layout: Layout, login: bool) -> list[Line]:
    """All findings, in order; `login`: `has_login` of the environment as it was before its secrets were dropped."""
    lines = [line for check in CHECKS for line in check(layout)] + [login_line(login)]
    return [replace(line, text=redact(line.text)) for line in lines]
