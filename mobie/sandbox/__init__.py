"""Runs programs that a model wrote where they can hurt nothing, and judges them with evalplus's own checker.

`types.py` holds the values, `runtime.py` finds and starts the container (`process.py` bounds what it costs the host),
`driver.py` is the only file that runs inside it, `judge.py` turns problems and samples into verdicts.
"""

from __future__ import annotations

from mobie.sandbox.judge import run_samples
from mobie.sandbox.runtime import Runtime, find_runtime
from mobie.sandbox.types import Limits, Sample, Verdict

__all__ = ["Limits", "Runtime", "Sample", "Verdict", "find_runtime", "run_samples"]
