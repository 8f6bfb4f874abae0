"""llama.cpp's batched benchmark on a GGUF file that the user names, where its program is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, ClassVar

from mobie.errors import UnsupportedError
from mobie.speed.runners.base import Runner, Timing, Weights

if TYPE_CHECKING:
    from mobie.speed.setting import Setting
    from mobie.speed.subject import Subject

PROGRAM = "llama-batched-bench"
VARIABLE = "MOBIE_LLAMA_GGUF"  # folder with MODEL.gguf, e.g. qwen1.5-moe-a2.7b.gguf, quantized to Q1_0 or as wished
TIMEOUT_SECONDS = 900


class LlamaCpp(Runner):
    """The program prints one line of JSON with the times of prompt processing and of token generation."""

    name = "llama.cpp"
    weights: ClassVar[Weights] = "own"
    tried: ClassVar[bool] = False

    def missing(self, subject: Subject) -> str | None:
        if subject.device != "cuda":
            return "needs a CUDA GPU"
        if shutil.which(PROGRAM) is None:
            return f"{PROGRAM} is not installed"
        folder = os.environ.get(VARIABLE)
        if folder is None:
            return f"{VARIABLE} is not set; expected a folder with {subject.name}.gguf"
        if not os.path.isfile(os.path.join(folder, f"{subject.name}.gguf")):
            return f"{folder} has no {subject.name}.gguf"
        return None

    def time(self, subject: Subject, setting: Setting) -> Timing:
        subject.release()
        file = os.path.join(os.environ[VARIABLE], f"{subject.name}.gguf")
        numbers = {"-npp": setting.prefill, "-ntg": setting.decode, "-npl": setting.batch}
        numbers["-c"] = setting.batch * setting.context
        options = [str(part) for pair in numbers.items() for part in pair]
        command = [PROGRAM, "-m", file, *options, "-ngl", "999", "--output-format", "jsonl"]
        prefills, steps = [], []
        for _ in range(3):
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode != 0 or not lines:
                raise UnsupportedError(f"{PROGRAM} ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
            found = json.loads(lines[-1])
            prefills.append(found["t_pp"])
            steps.append(found["t_tg"] / setting.decode)
        return Timing(
            prefills, steps, notes=["a step's time is the mean over a generation", f"file {subject.name}.gguf"]
        )
