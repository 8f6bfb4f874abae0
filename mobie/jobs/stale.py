"""When a finished result is stale: hashes of the code and settings that decide it.

Snakemake compares them with those of the last run (`params:`); the block loop writes them into its shards.
"""

from __future__ import annotations

from mobie.errors import ConfigError, unknown_name
from mobie.jobs.methods import method_modules
from mobie.paths import PACKAGE, Layout
from mobie.provenance import code_hash, digest, file_hash

CONFIG_FOLDERS = ("suites", "models", "methods", "protocols")

SCORERS = {
    "perplexity": ("mobie.scoring.perplexity",),
    "tasks": ("mobie.scoring.tasks",),
    "hard": ("mobie.scoring.hard",),
    "routing": ("mobie.scoring.routing",),
    "shift": ("mobie.scoring.shift",),
    "cka": ("mobie.scoring.cka",),
    "generations": ("mobie.scoring.generations",),
}
#: threads, seeds and algorithms of every job that computes
SETTINGS = "mobie.determinism"
#: code behind the programs that a model writes, and behind the verdicts on them
WRITTEN = ("mobie.packing.checkpoint", "mobie.data.problems", "mobie.scoring.code.generate")
JUDGED = ("mobie.data.problems", "mobie.scoring.code.score", "mobie.sandbox")
#: code behind a timing; kernels are imported by name at run time, so they are listed
TIMED = (
    *("mobie.speed.measure", "mobie.speed.quality", "mobie.speed.block"),
    *("mobie.kernels.twins", "mobie.kernels.triton_ops", "mobie.kernels.cpp_ops"),
)


def quantize_code(method: str) -> str:
    """Digest of the code that quantizes with a registered method. Raises `ConfigError` for an unknown one."""
    modules = method_modules()
    if method not in modules:
        raise ConfigError(unknown_name("method", method, modules))
    return code_hash([SETTINGS, "mobie.pipeline", modules[method]])


def gradient_code() -> str:
    """Digest of the code that computes loss gradients and guided Hessians; no method is in it."""
    return code_hash([SETTINGS, "mobie.pipeline"])


def score_code(kind: str) -> str:
    """Digest of the code behind a kind of score."""
    return code_hash([SETTINGS, "mobie.packing.checkpoint", *SCORERS[kind]])


def gate_code() -> str:
    """Digest of the code behind the protocol gate: perplexities of its grid, and how they are held against entries."""
    return code_hash([SETTINGS, "mobie.packing.checkpoint", "mobie.data.texts", "mobie.scoring.reproduce"])


def code_samples_code() -> str:
    """Digest of the code that lets a model write programs."""
    return code_hash([SETTINGS, *WRITTEN])


def code_code() -> str:
    """Digest of the code that judges programs."""
    return code_hash(JUDGED)


def speed_code() -> str:
    """Digest of the code that times models: kernels, runner and what makes random weights."""
    kernels = [path for path in sorted((PACKAGE / "kernels").rglob("*.cpp"))]
    return digest([code_hash([SETTINGS, *TIMED]), {path.name: file_hash(path) for path in kernels}])


def calibrate_code() -> str:
    return code_hash([SETTINGS, "mobie.calibration.tokens", "mobie.data.texts"])


def self_sample_code() -> str:
    """Digest of the code that lets a model write its calibration text."""
    return code_hash(
        [SETTINGS, "mobie.packing.checkpoint", "mobie.data.self_sampled", "mobie.calibration.self_sampling"]
    )


def usage_code() -> str:
    """Digest of the code that counts how a model uses its experts."""
    return code_hash([SETTINGS, "mobie.packing.checkpoint", "mobie.calibration.usage"])


def windows_code() -> str:
    return code_hash([SETTINGS, "mobie.scoring.windows", "mobie.data.texts"])


def mirror_code() -> str:
    return code_hash(["mobie.data.mirror"])


def target_state(module: str, suite: str, layout: Layout) -> str:
    """Digest of what decides a table, a figure, verdicts or the report beside records: code, configuration, data."""
    config = sorted(path for folder in CONFIG_FOLDERS for path in (layout.config / folder).glob("*.yaml"))
    data = sorted(path for path in (PACKAGE / "paper").rglob("*") if path.suffix in {".csv", ".yaml"})
    data += sorted((PACKAGE / "report" / "templates").iterdir())
    files = {f"{path.parent.name}/{path.name}": file_hash(path) for path in (*config, *data)}
    return digest([code_hash([module]), suite, files])
