"""Talk to a packed checkpoint in a terminal: tokens as they come, and how many a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mobie.errors import DataError
from mobie.models import OWN_FILES
from mobie.packing.checkpoint import MANIFEST, read_manifest

END = ("/exit", "/quit")


@dataclass(frozen=True)
class Options:
    """How to answer.

    max_new_tokens: of one answer, unless the model ends it before or its context is full.
    temperature:    0 takes the likeliest token.
    seed:           of sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """tokens: of the answer. first_token: seconds until the first one. seconds: from the first to the last."""

    tokens: int
    first_token: float
    seconds: float

    def __str__(self) -> str:
        text = f"{self.tokens} tokens, the first after {self.first_token:.2f} s"
        return text if self.tokens < 2 else f"{text}, then {(self.tokens - 1) / self.seconds:.1f} tok/s"


class _TimedStreamer(TextStreamer):
    """Writes text as soon as it is certain, and notes when tokens came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out
        self.times: list[float] = []
        self._began = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()

    def timing(self) -> Timing:
        if not self.times:
            return Timing(0, 0.0, 0.0)
        return Timing(len(self.times), self.times[0] - self._began, self.times[-1] - self.times[0])


def load(folder: Path, dtype: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A packed checkpoint through the library, on the GPU where there is one.

    dtype: name of a float type; None takes the checkpoint's own on a GPU and float32 on a CPU.

    Raises:
        DataError: not a folder, not a packed checkpoint, damaged or incomplete, or of another format version.
    """
    import mobie  # noqa: F401 (makes the library know the format)

    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; expected a checkpoint written by `python -m mobie quantize`")
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder}: has no {MANIFEST}; expected a finished checkpoint written by `python -m mobie quantize` "
            "(results/SUITE/MODEL/METHOD/sSEED/checkpoint)"
        )
    read_manifest(folder, files=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = dtype or ("auto" if device == "cuda" else "float32")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_FILES)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=chosen, device_map=device, use_safetensors=True, **OWN_FILES
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: cannot be loaded ({error}); expected a complete checkpoint; run the quantize rule again, or "
            "fetch the folder again"
        ) from error
    return model, tokenizer


class Chat:
    """A conversation; a model without a chat template continues each text by itself."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, out: TextIO = sys.stdout
    ) -> None:
        self._model, self._tokenizer, self._options, self._out = model, tokenizer, options, out
        self._turns: list[dict[str, str]] = []
        torch.manual_seed(options.seed)

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def answer(self, text: str) -> Timing:
        """Stream the answer to a text; what was said before counts, as far as the model's context reaches.

        Raises:
            DataError: the text alone is longer than the context.
        """
        self._turns.append({"role": "user", "content": text})
        try:
            inputs = self._fitting()
        except DataError:
            self._turns.pop()
            raise
        length = inputs["input_ids"].shape[1]
        streamer = _TimedStreamer(self._tokenizer, self._out)
        output = self._model.generate(
            **inputs,
            streamer=streamer,
            max_new_tokens=min(self._options.max_new_tokens, self._context - length),
            pad_token_id=self._padding(),
            **self._sampling(),
        )
        said = self._tokenizer.decode(output[0, length:], skip_special_tokens=True)
        self._turns.append({"role": "assistant", "content": said})
        return streamer.timing()

    @property
    def _context(self) -> int:
        return self._model.config.max_position_embeddings

    def _fitting(self) -> dict[str, Tensor]:
        """The conversation as tokens; its oldest turns are forgotten where it is too long for one more token."""
        while True:
            inputs = self._encode()
            if inputs["input_ids"].shape[1] < self._context:
                return inputs
            if len(self._turns) == 1:
                raise DataError(
                    f"the text has {inputs['input_ids'].shape[1]} tokens; expected fewer than {self._context}, the "
                    "context of this model: shorten it"
                )
            del self._turns[:2]

    def _encode(self) -> dict[str, Tensor]:
        if self.has_template:
            encoded = self._tokenizer.apply_chat_template(
                self._turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self._tokenizer(self._turns[-1]["content"], return_tensors="pt")
        if encoded["input_ids"].shape[1] == 0:
            raise DataError("the text has no token; expected at least one: write something")
        return {name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")}

    def _padding(self) -> int | None:
        padding = self._tokenizer.pad_token_id
        return self._tokenizer.eos_token_id if padding is None else padding

    def _sampling(self) -> dict[str, Any]:
        if self._options.temperature == 0:
            # what the generation config says about sampling does not apply
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self._options.temperature}


def talk(chat: Chat, texts: Iterable[str], out: TextIO, notes: TextIO) -> None:
    """Answer one text after the other, until one of `END`; how fast it was goes to `notes`."""
    for text in texts:
        if text.strip() in END:
            return
        if not text.strip():
            continue
        try:
            notes.write(f"[{chat.answer(text)}]\n")
        except KeyboardInterrupt:
            out.write("\n")
            notes.write("[interrupted]\n")
        except DataError as error:
            notes.write(f"error: {error}\n")


def typed(prompt: str = "> ") -> Iterable[str]:
    """Lines that a user types, until the end of input."""
    while True:
        try:
            yield input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return
