"""Let a model write programs as evalplus does: its prompts, stop texts and clean-up, with our decode runner.

A model that was not tuned to follow instructions continues the problem's prompt; one that was gets evalplus's
instruction and the beginning of an answer through its chat template. A program ends with an end-of-sequence token or
before one of evalplus's stop texts.

The programs of a problem are the rows of one run in a cache of a fixed length, drawn with numbers made of (seed, task,
sample), so they do not depend on which other problems there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobie.data.problems import Row
from mobie.runner import GREEDY, DecodeRunner, Sampling
from mobie.scoring.code.protocol import CodeProtocol
from mobie.scoring.code.samples import Program
from mobie.scoring.generations import stop_tokens
from mobie.scoring.protocol import require_dtype

#: what evalplus 0.3.1 asks an instruction-tuned model for, and how it begins the answer; they are arguments there
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
CHAT_STOPS = ("\n```\n",)
STEPS_PER_LOOK = 16  # tokens between two searches for a stop text; what comes after one is cut off


@dataclass(frozen=True)
class Writer:
    """A model that writes programs for one set of problems.

    runner:      as many rows as a problem gets programs, each with room for a text of `runner.context` tokens.
    stop_texts:  a program ends before the first of them.
    stop_tokens: a program ends with the first of them.
    chat:        whether the prompt goes through the chat template; the answer alone is then the program.
    """

    runner: DecodeRunner
    tokenizer: Any
    stop_texts: Sequence[str]
    stop_tokens: frozenset[int]
    chat: bool


def generate(
    model: Any,
    tokenizer: Any,
    problems: Mapping[str, Row],
    dataset: str,
    protocol: CodeProtocol,
    chat: bool,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, list[Program]], list[str]]:
    """Programs by mode (`protocol.modes`), and the tasks whose prompt was cut to fit the context.

    `chat`: the model was tuned to follow instructions. `progress` is told how many programs were written.

    Raises:
        ConfigError: the model is in another dtype.
        UnsupportedError: the runner cannot serve the model, or it has no chat template and `chat` is true.
    """
    require_dtype(model, protocol.dtype)
    context = min(protocol.max_length, getattr(model.config, "max_position_embeddings", protocol.max_length))
    new_tokens = min(protocol.max_new_tokens, context - 1)
    prompts = {task: row["prompt"].strip() + "\n" for task, row in problems.items()}
    texts = {task: chat_prompt(prompt, tokenizer) if chat else prompt for task, prompt in prompts.items()}
    ids = {task: tokenizer(text)["input_ids"] for task, text in texts.items()}
    found: dict[str, list[Program]] = {}
    for mode, count in protocol.modes.items():
        writer = Writer(
            DecodeRunner(model, batch=count, context=context, eos=()),
            tokenizer,
            stop_texts(dataset, chat),
            stop_tokens(model, tokenizer),
            chat,
        )
        found[mode] = []
        for task, prompt in prompts.items():
            sampling = GREEDY if mode == "greedy" else draws_of(protocol, task)
            kept = ids[task][-(context - new_tokens) :]
            found[mode] += write(writer, task, prompt, kept, new_tokens, sampling)
            progress(count)
    return found, [task for task, tokens in ids.items() if len(tokens) + new_tokens > context]


def stop_texts(dataset: str, chat: bool) -> tuple[str, ...]:
    """evalplus's texts that end a program."""
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    return (*EOS, *(CHAT_STOPS if chat else extra_eos_for_direct_completion(dataset)))


def chat_prompt(prompt: str, tokenizer: Any) -> str:
    """evalplus's instruction with the problem and the beginning of an answer. Raises `UnsupportedError`."""
    from evalplus.provider.utility import make_raw_chat_prompt

    from mobie.errors import UnsupportedError

    if tokenizer.chat_template is None:
        raise UnsupportedError(
            "the tokenizer has no chat template, but the model's configuration says `chat`; correct the configuration"
        )
    return make_raw_chat_prompt(prompt, INSTRUCTION, RESPONSE, tokenizer)


def draws_of(protocol: CodeProtocol, task: str) -> Sampling:
    """How the programs of a problem are drawn: the runner's numbers are made of (this seed, row), a row is a sample."""
    word = hashlib.sha256(f"{protocol.sample_seed}/code/{task}".encode()).digest()[:8]
    return Sampling(protocol.temperature, protocol.top_p, int.from_bytes(word, "big"))


def write(
    writer: Writer, task: str, prompt: str, ids: Sequence[int], new_tokens: int, sampling: Sampling
) -> list[Program]:
    """One program for each row of the runner, from the prompt's tokens."""
    writer.runner.prefill([list(ids)] * writer.runner.batch)
    rows: list[list[int]] = [[] for _ in range(writer.runner.batch)]
    ends: list[tuple[str, bool]] = []
    while len(rows[0]) < new_tokens and not (ends and all(finished for _, finished in ends)):
        steps = min(STEPS_PER_LOOK, new_tokens - len(rows[0]))
        for row, more in zip(rows, writer.runner.decode(steps, sampling).tolist(), strict=True):
            row += more
        ends = [_until_stop(writer, row) for row in rows]
    return [
        Program(task, sample, text if writer.chat else prompt + text, finished)
        for sample, (text, finished) in enumerate(ends)
    ]


def _until_stop(writer: Writer, tokens: Sequence[int]) -> tuple[str, bool]:
    """Text before the first stop, and whether there is one."""
    end = next((place for place, token in enumerate(tokens) if token in writer.stop_tokens), None)
    kept = tokens if end is None else tokens[:end]
    text = writer.tokenizer.decode(kept, skip_special_tokens=True)
    stops = [place for stop in writer.stop_texts if (place := text.find(stop)) >= 0]
    text = text[: min(stops, default=len(text))].replace("\t", "    ")  # tabs as evalplus treats them
    return text, end is not None or bool(stops)
