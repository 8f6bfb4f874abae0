"""Import once what every child would import, and parse once what every child would hash."""

from __future__ import annotations

import importlib
import pkgutil

LIBRARIES = (
    *("torch", "transformers", "datasets", "lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface", "scipy.linalg"),
    *("matplotlib.pyplot", "matplotlib.backends.backend_svg", "matplotlib.backends.backend_pdf", "jinja2", "tabulate"),
)
AT_RUN_TIME = ("mobie.kernels.triton_ops",)  # how its kernels are defined hangs on an environment that a child sets


def preload() -> None:
    """Import libraries and the package; hash the code of every kind of job."""
    from mobie.determinism import make_deterministic, read_locally

    read_locally()
    for name in LIBRARIES:
        importlib.import_module(name)
    import mobie

    for module in pkgutil.walk_packages(mobie.__path__, "mobie."):
        if not module.name.endswith("__main__") and module.name not in AT_RUN_TIME:
            importlib.import_module(module.name)
    from mobie.jobs import stale
    from mobie.jobs.methods import method_modules

    for method in method_modules():
        stale.quantize_code(method)
    for kind in stale.SCORERS:
        stale.score_code(kind)
    for code in (stale.speed_code, stale.calibrate_code, stale.windows_code, stale.mirror_code):
        code()
    make_deterministic()
