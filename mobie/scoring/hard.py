"""Harder tasks (Tables 8 and 9): MMLU, MathQA and GSM8K with lm-eval's own tasks, and a reason for what is not scored.

MMLU is 57 tasks of the harness, one for each subject; its accuracy is the mean over all scored items, as the harness
weighs them. With a `limit` the same number of items is drawn from each subject, so that all subjects count alike.

A prompt that does not fit the context is cut on its left, as the harness does it: of a text to continue, so that the
generated tokens fit too. `HardScores.cut` counts such prompts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mobie.data.mmlu import SUBJECTS
from mobie.errors import MeasurementError
from mobie.records import Measurement
from mobie.scoring.protocol import Dtype, Protocol, require_dtype
from mobie.scoring.tasks import (
    draw_items,
    find_entry,
    item_measurement,
    load_entries,
    prepare_harness,
    read_group,
    run_harness,
)

#: the paper's harder tasks, those whose answers are programs (`mobie.scoring.code`) left out; a protocol either scores
#: one or says why not
HARD_TASKS = ("mmlu", "mathqa", "gsm8k")
#: folders of lm-eval's task collection that hold those that the harness scores
TASK_FOLDERS = ("mmlu/default", "mathqa", "gsm8k")
METRICS = ("acc", "acc_norm", "exact_match")
FEWSHOT_SEED = 1234  # the harness's own; examples are drawn with it where a task does not take the first ones


class HardTask(Protocol):
    """One task.

    name:             of `HARD_TASKS`.
    limit:            at most so many items, of MMLU from each subject; None: all.
    shots:            worked examples before each item.
    generated_tokens: at most so many in an answer that is written out; None where choices are compared.
    filter:           the harness's way of finding the answer in a text, e.g. GSM8K's `strict-match` ("#### 18", the
                      form that examples show) or `flexible-extract` (the last number).
    """

    name: str
    limit: int | None = Field(None, ge=1)
    shots: int = Field(0, ge=0)
    generated_tokens: int | None = Field(None, ge=1)
    filter: str = "none"


class HardProtocol(Protocol):
    """Everything that decides the scores; fields as in `TasksProtocol`.

    holes: a task that is not scored → the reason.
    """

    harness: str
    group: str
    tasks: tuple[HardTask, ...] = Field(min_length=1)
    holes: dict[str, str] = Field(default_factory=dict)
    sample_seed: int = 0
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(2048, ge=2)
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def _each_task_once(self) -> HardProtocol:
        named = sorted([*(task.name for task in self.tasks), *self.holes])
        if named != sorted(HARD_TASKS):
            raise ValueError(
                f"got the tasks and holes {', '.join(named)}; expected each of {', '.join(HARD_TASKS)} once, in "
                "`tasks` or, with a reason, in `holes`"
            )
        for task in self.tasks:
            if task.generated_tokens is not None and task.generated_tokens >= self.max_length:
                raise ValueError(
                    f"{task.name}: {task.generated_tokens} generated tokens leave no room for a prompt in max_length "
                    f"{self.max_length}; generate fewer"
                )
        return self


@dataclass(frozen=True)
class HardScores:
    """Scores and what they are made of.

    measurements: `mmlu.acc`, `mathqa.acc`, `gsm8k.exact_match`, …
    items:        task of the harness (for MMLU one for each subject) → numbers of the scored items in their split.
    answers:      measurement → 0 or 1 for each item in that order, MMLU's subjects one after the other.
    cut:          task → how many prompts were longer than the context.
    """

    measurements: list[Measurement]
    items: dict[str, list[int]]
    answers: dict[str, list[float]]
    cut: dict[str, int]


def hard(model: Any, tokenizer: Any, protocol: HardProtocol, group: Path, mirror: Path) -> HardScores:
    """Score a causal language model in memory on the tasks of `protocol`.

    group:  the YAML file that `protocol.group` names.
    mirror: folder of data sets laid out as on the hub.

    Raises:
        ConfigError: another lm-eval is installed, the model is in another dtype, or a task is not in the group.
        DataError: a data set is missing or cannot be read.
        MeasurementError: the harness has no score under a task's filter.
    """
    prepare_harness(protocol.harness)
    require_dtype(model, protocol.dtype)
    with tempfile.TemporaryDirectory(prefix="mobie-lm-eval-") as scratch:
        loaded = load_hard_tasks(protocol, group, mirror, Path(scratch))
        limits = {part: task.limit for task in protocol.tasks for part in harness_names(task.name)}
        items = {
            name: draw_items(name, len(task.eval_docs), limits[name], protocol.sample_seed)
            for name, task in loaded.items()
        }
        results = run_harness(
            model, tokenizer, loaded, items, protocol.batch_size, protocol.max_length, fewshot_seed=FEWSHOT_SEED
        )
    scores = HardScores([], {name: list(wanted) for name, wanted in items.items()}, {}, {})
    context = min(protocol.max_length, getattr(model.config, "max_position_embeddings", protocol.max_length))
    for task in protocol.tasks:
        samples = _samples(results["samples"], task, items)
        scores.cut[task.name] = sum(_is_cut(sample, tokenizer, context, task.generated_tokens) for sample in samples)
        for metric in METRICS:
            if metric in samples[0]:
                name = f"{task.name}.{metric}"
                values = [float(sample[metric]) for sample in samples]
                scores.answers[name] = values
                mean = math.fsum(values) / len(values)
                scores.measurements.append(item_measurement(name, mean, values, samples))
    return scores


def harness_names(task: str) -> tuple[str, ...]:
    """Names of the harness's tasks that make up one of ours."""
    return tuple(f"mmlu_{subject}" for subject in SUBJECTS) if task == "mmlu" else (task,)


def load_hard_tasks(protocol: HardProtocol, group: Path, mirror: Path, cache: Path) -> dict[str, Any]:
    """The harness's tasks by name in the protocol's order, reading from `mirror`. Raises as `hard`."""
    entries = read_group(group, mirror)
    chosen = [
        part
        for task in protocol.tasks
        for part in _harness_entries(task, find_entry(entries, task.name, group), str(cache))
    ]
    loaded = load_entries(group.stem, chosen, TASK_FOLDERS, mirror)
    for task in protocol.tasks:
        if task.generated_tokens is not None:
            settings = {"max_gen_toks": task.generated_tokens}
            loaded[task.name].set_config("generation_kwargs", settings, update=True)
    return {entry["task"]: loaded[entry["task"]] for entry in chosen}


def _harness_entries(task: HardTask, entry: Mapping[str, Any], cache: str) -> list[dict[str, Any]]:
    """What is put in place of the stock files' settings for one of our tasks."""
    changes = {**entry, "num_fewshot": task.shots, "dataset_kwargs": {"cache_dir": cache}}
    if task.shots == 0:  # splits that only hold examples are read even then
        changes |= {"training_split": None, "fewshot_split": None}
    if task.name != "mmlu":
        return [changes]
    splits = ("test",) if task.shots == 0 else ("dev", "test")
    return [
        changes
        | {
            "task": f"mmlu_{subject}",
            # the files themselves: a card that lists 57 configurations takes longer to parse than they to read
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "cache_dir": cache,
                "data_files": {split: f"{entry['dataset_path']}/{subject}/{split}*.parquet" for split in splits},
            },
        }
        for subject in SUBJECTS
    ]


def _samples(
    by_task: Mapping[str, Sequence[Mapping[str, Any]]], task: HardTask, items: Mapping[str, list[int]]
) -> list[Mapping[str, Any]]:
    """The scored items of one of our tasks as the harness logged them under the task's filter, in the items' order."""
    found = []
    for name in harness_names(task.name):
        filters = sorted({sample["filter"] for sample in by_task[name]})
        if task.filter not in filters:
            raise MeasurementError(
                f"{name}: the harness scored it with the filters {', '.join(filters)}, expected {task.filter}; correct "
                "`filter` in the protocol"
            )
        samples = sorted((s for s in by_task[name] if s["filter"] == task.filter), key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == items[name], f"{name}: the harness scored other items"
        found += samples
    return found


def _is_cut(sample: Mapping[str, Any], tokenizer: Any, context: int, generated: int | None) -> bool:
    """Whether a prompt, with its answer, is longer than the context."""
    prompt = sample["arguments"][0][0]
    if generated is not None:
        return len(tokenizer(prompt)["input_ids"]) + generated > context
    longest = max(len(tokenizer(prompt + choice)["input_ids"]) for _, choice in sample["arguments"])
    return longest > context + 1  # the last token is predicted, not read
