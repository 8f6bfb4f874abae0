"""Where a result comes from: hashes of its inputs and of the code that made it, versions, host.

The code hash is taken over syntax trees: a comment, a docstring or a line break does not change it, nor what a method
says of itself for plans alone, and only modules that the job's own code imports (directly or not) are in it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from mobie.determinism import settings
from mobie.errors import DataError
from mobie.paths import PACKAGE
from mobie.redaction import redact_arguments

LIBRARIES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "scipy"),
    *("lm-eval", "evalplus", "datasets", "snakemake"),
)
#: written into a container image by its build: which image a job ran in
IMAGE = Path("/usr/share/mobie/image.json")

#: modules that carry values from one place to another and compute none: a change in them makes no result stale
CARRIERS = frozenset(
    f"mobie.{name}"
    for name in ("config", "errors", "parsing", "paths", "progress", "provenance", "records", "redaction", "storage")
)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises `DataError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the job that makes it") from error


def _module_file(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (base / "__init__.py", base.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names under `mobie` that a module imports, inside functions too. `from mobie.a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "mobie")


#: what a method's class says for plans and tables (mobie/methods/base.py): a better estimate makes no result stale
NO_RESULT = frozenset({"seconds_per_weight", "survey_passes", "stored_bits", "stores_signs"})


@cache
def _parsed(path: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of a module's tree without docstrings and `NO_RESULT`, and the modules it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports = tuple(sorted(set(_imported(tree))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if not _is_no_result(part)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _is_no_result(statement: ast.stmt) -> bool:
    """Whether a statement sets one of `NO_RESULT`, annotated."""
    target = statement.target if isinstance(statement, ast.AnnAssign) else None
    return isinstance(target, ast.Name) and target.id in NO_RESULT


def import_closure(modules: Iterable[str]) -> dict[str, Path]:
    """The modules of the package that `modules` need, with their files; carriers left out."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = _module_file(module)
        if path is None or module in found or module in CARRIERS:
            continue
        found[module] = path
        waiting += _parsed(path)[1]
    return found


def code_hash(modules: Iterable[str]) -> str:
    """Digest of the code of `modules` and of all they import inside the package.

    Raises:
        ValueError: a module does not exist, which is a mistake in the caller.
    """
    modules = list(modules)
    for module in modules:
        if _module_file(module) is None:
            raise ValueError(f"no module {module!r} in {PACKAGE}")
    return digest({name: _parsed(path)[0] for name, path in import_closure(modules).items()})


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide values; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def host() -> dict[str, Any]:
    """Machine and thread settings: with another number of threads sums and factorisations differ in the last bits."""
    torch = sys.modules.get("torch")
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "torch_threads": torch.get_num_threads() if torch else None,
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with `+` when files were changed; None outside a clone or without git."""
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() or None


def image() -> dict[str, Any] | None:
    """Identity of the container image that this process runs in: name, digests, commit; None outside of one.

    Raises:
        DataError: the image's description cannot be read, so that a record could not say where it comes from.
    """
    try:
        return dict(json.loads(IMAGE.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{IMAGE}: cannot be read ({error}), expected a JSON object; build the image again") from error


def collect(inputs: Mapping[str, str], code: str, root: Path) -> dict[str, Any]:
    """What a record keeps about its making; `inputs` maps a name to a hash."""
    return {
        "inputs": dict(inputs),
        "code": code,
        "versions": versions(),
        "host": host(),
        "image": image(),
        "settings": settings(),
        "git_commit": git_commit(root),
        "command": redact_arguments(["python", "-m", "mobie", *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
