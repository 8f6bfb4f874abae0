"""When a finished result is stale: hashes of the code and settings that decide it.

Snakemake compares them with those of the last run (`params:`); the block loop writes them into its shards.
"""

from __future__ import annotations

import ast
from functools import lru_cache

from mobie.errors import ConfigError, unknown_name
from mobie.paths import PACKAGE
from mobie.provenance import code_hash

SCORERS = {
    "perplexity": ("mobie.scoring.perplexity", "mobie.data.texts"),
    "tasks": ("mobie.scoring.tasks",),
    "routing": ("mobie.scoring.routing", "mobie.data.texts"),
}


@lru_cache(maxsize=1)
def method_modules() -> dict[str, str]:
    """Registered name of every method → its module, read from the syntax: importing methods would import torch."""
    found = {}
    for path in sorted((PACKAGE / "methods").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = _registered_name(node)
            if name is not None:
                found[name] = ".".join(["mobie", *path.relative_to(PACKAGE).with_suffix("").parts])
    return found


def _registered_name(node: ast.stmt) -> str | None:
    """`x` of a class under `@register` that has `name = "x"`, annotated or not."""
    if not isinstance(node, ast.ClassDef) or "register" not in {getattr(d, "id", None) for d in node.decorator_list}:
        return None
    for statement in node.body:
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        if getattr(target, "id", None) == "name" and isinstance(statement.value, ast.Constant):
            return statement.value.value
    return None


def quantize_code(method: str) -> str:
    """Digest of the code that quantizes with a registered method. Raises `ConfigError` for an unknown one."""
    modules = method_modules()
    if method not in modules:
        raise ConfigError(unknown_name("method", method, modules))
    return code_hash(["mobie.pipeline", modules[method]])


def score_code(kind: str) -> str:
    """Digest of the code behind a kind of score."""
    return code_hash(["mobie.packing.checkpoint", *SCORERS[kind]])


def calibrate_code() -> str:
    return code_hash(["mobie.calibration.tokens", "mobie.data.texts"])


def mirror_code() -> str:
    return code_hash(["mobie.data.mirror"])


def table2_code() -> str:
    return code_hash(["mobie.tables.table2"])
