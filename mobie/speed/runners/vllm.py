"""vLLM with random bfloat16 weights of the same shape (its `load_format="dummy"`), where it is installed."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from typing import TYPE_CHECKING, Any, ClassVar

from mobie.speed.runners.base import Runner, Timing, Weights

if TYPE_CHECKING:
    from mobie.speed.setting import Setting
    from mobie.speed.subject import Subject


class Vllm(Runner):
    """Offline generation; a step's time is that of a whole generation, less the prefill, over its steps."""

    name = "vllm"
    weights: ClassVar[Weights] = "own"
    tried: ClassVar[bool] = False

    def missing(self, subject: Subject) -> str | None:
        if subject.device != "cuda":
            return "needs a CUDA GPU"
        if importlib.util.find_spec("vllm") is None:
            return "vllm is not installed"
        return None

    def time(self, subject: Subject, setting: Setting) -> Timing:
        from vllm import LLM

        subject.release()  # it reserves the GPU's memory for itself
        with tempfile.TemporaryDirectory() as folder:
            subject.config.save_pretrained(folder)
            model = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=setting.context,
                max_num_seqs=setting.batch,
            )
            self._generate(model, setting, 2)  # graphs and kernels are made
            prefills = [self._generate(model, setting, 1) for _ in range(setting.repetitions)]
            whole = [self._generate(model, setting, setting.decode) for _ in range(max(3, setting.repetitions // 4))]
        first = sorted(prefills)[len(prefills) // 2]
        steps = [(seconds - first) / (setting.decode - 1) for seconds in whole]
        return Timing(prefills, steps, notes=["a step's time is the mean over a generation"])

    @staticmethod
    def _generate(model: Any, setting: Setting, tokens: int) -> float:
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": [(7 * row + 3 * i) % 1000 + 1 for i in range(setting.prefill)]}
            for row in range(setting.batch)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began
