"""Greedy continuations of the prompts of Table 11, and how much they repeat themselves.

A prompt is given as it is printed: no chat template, no system message, no beginning-of-sequence token unless the
tokenizer itself adds one. At each step the most likely token is taken, so nothing is random; prompts run one by one,
since padding would change sums in the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mobie.errors import ConfigError
from mobie.paths import PACKAGE
from mobie.records import Measurement
from mobie.scoring.protocol import Dtype, Protocol, require_dtype

PROMPTS = PACKAGE / "paper" / "prompts.yaml"
NGRAM = 4


class GenerationsProtocol(Protocol):
    """Everything but the prompts that decides a continuation.

    max_new_tokens: a continuation ends there, or before with an end-of-sequence token.
    dtype:          of the model's weights and activations.
    """

    max_new_tokens: int = Field(128, ge=1)
    dtype: Dtype = "float32"


class Prompt(BaseModel):
    """A prompt, and the paper's model whose answers Table 11 shows to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    prompt: str


@dataclass(frozen=True)
class Sample:
    """A continuation.

    id:         `prompt-1` …, the place in the list of prompts.
    model:      the paper's model whose prompt it is, not the one that wrote the text.
    text:       the continuation without the prompt and without special tokens.
    tokens:     generated tokens, the end-of-sequence token not counted.
    finished:   whether it ended with an end-of-sequence token.
    repetition: see `repetition`; None for fewer than four tokens.
    """

    id: str
    model: str
    prompt: str
    text: str
    tokens: int
    finished: bool
    repetition: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self)


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """The prompts of Table 11. Raises `ConfigError` for a file that has no list of them."""
    from mobie.config import read_yaml

    raw = read_yaml(path)
    try:
        return [Prompt.model_validate(entry) for entry in raw["prompts"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{path}: no prompts ({' '.join(str(error).split())}), expected a list `prompts` of entries with model and "
            "prompt; restore it from the repository"
        ) from error


def generations(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], protocol: GenerationsProtocol
) -> tuple[list[Measurement], list[Sample]]:
    """Continue every prompt.

    Returns `repetition` and `tokens`, means over prompts with the standard errors of such means, and the samples. A
    continuation of fewer than four tokens has no repetition and is not in that mean; `repetition` is missing where all
    are so short.

    Raises:
        ConfigError: the model is in another dtype, or a prompt and its continuation exceed the model's context.
    """
    require_dtype(model, protocol.dtype)
    samples = [
        _continue(model, tokenizer, f"prompt-{number}", prompt, protocol.max_new_tokens)
        for number, prompt in enumerate(prompts, start=1)
    ]
    repetitions = [sample.repetition for sample in samples if sample.repetition is not None]
    means = [mean_measurement("repetition", repetitions)] if repetitions else []
    return [*means, mean_measurement("tokens", [sample.tokens for sample in samples])], samples


def _continue(model: Any, tokenizer: Any, name: str, prompt: Prompt, max_new_tokens: int) -> Sample:
    ids = tokenizer(prompt.prompt)["input_ids"]
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and len(ids) + max_new_tokens > context:
        raise ConfigError(
            f"{name}: {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of {context}; "
            f"use max_new_tokens {context - len(ids)} or less"
        )
    stops = stop_tokens(model, tokenizer)
    generated = greedy(model, ids, max_new_tokens, stops)
    finished = bool(generated) and generated[-1] in stops
    kept = generated[:-1] if finished else generated
    return Sample(
        id=name,
        model=prompt.model,
        prompt=prompt.prompt,
        text=tokenizer.decode(kept, skip_special_tokens=True),
        tokens=len(kept),
        finished=finished,
        repetition=repetition(kept),
    )


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence tokens of the model and of its tokenizer."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def greedy(model: Any, ids: Sequence[int], max_new_tokens: int, stops: frozenset[int]) -> list[int]:
    """The most likely token after `ids`, again and again; a stop token is the last.

    A loop of our own: the library's `generate` would follow a model's own repetition penalty and the like.
    """
    import torch

    tokens, cache = torch.tensor([ids], device=model.device), None
    generated: list[int] = []
    with torch.inference_mode():
        while len(generated) < max_new_tokens and not (generated and generated[-1] in stops):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            generated.append(int(output.logits[0, -1].argmax()))
            tokens = tokens.new_tensor([[generated[-1]]])
    return generated


def repetition(tokens: Sequence[int]) -> float | None:
    """Share of the 4-grams of a sequence that occurred before in it; None where it has no 4-gram."""
    grams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def mean_measurement(name: str, values: Sequence[float]) -> Measurement:
    """Mean of values with its standard error, None for a single one; no chance level."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values)
    return Measurement(name, mean, math.sqrt(spread / (n - 1) / n) if n > 1 else None, n)
