"""Zero-shot accuracy with lm-eval's own tasks; only the place of their data is replaced (`workflow/config/lm_eval/`).

Prompts, metrics and task versions are the harness's. With a `limit` a fixed sample of each task is scored, drawn from
`sample_seed` and the task's name alone, so every method answers the same items and differences can be paired.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from mobie.errors import ConfigError, DataError, unknown_name
from mobie.records import Measurement
from mobie.scoring.protocol import Dtype, Protocol, require_dtype

#: folders of lm-eval's task collection that hold our tasks; indexing all of it takes 20 seconds
TASK_FOLDERS = ("arc", "hellaswag", "lambada", "piqa", "winogrande")
#: metrics kept, where a task has them
METRICS = ("acc", "acc_norm", "perplexity")


class TasksProtocol(Protocol):
    """Everything that decides the accuracies.

    harness:     version of lm-eval.
    group:       file under `workflow/config/lm_eval/`, without its suffix.
    tasks:       names, a subset of the group's.
    limit:       at most so many items of each task; None: all.
    sample_seed: of the items drawn where a task has more than `limit`.
    max_length:  context in tokens; a longer prompt is cut on its left. The model's own limit holds where it is less.
    dtype:       of the model's weights and activations.
    """

    harness: str
    group: str
    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    sample_seed: int = 0
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(2048, ge=2)
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class TaskScores:
    """Accuracies and what they are made of.

    measurements: `TASK.METRIC`, e.g. `arc_easy.acc_norm`, `lambada_openai.perplexity`.
    items:        task → the numbers of the scored items in their split.
    answers:      `TASK.METRIC` → one value per item in the same order: 0 or 1; for perplexity the log-likelihood.
    """

    measurements: list[Measurement]
    items: dict[str, list[int]]
    answers: dict[str, list[float]]


def tasks(
    model: Any, tokenizer: Any, protocol: TasksProtocol, group: Path, mirror: Path, cache: Path | None = None
) -> TaskScores:
    """Score a causal language model in memory on the tasks of `protocol`.

    group:  the YAML file that `protocol.group` names.
    mirror: folder of data sets laid out as on the hub (`mobie.data.mirror`, or fetched hub sources).
    cache:  where the datasets library keeps its Arrow files; None: a temporary folder.

    Raises:
        ConfigError: another lm-eval is installed, the model is in another dtype, or a task is not in the group.
        DataError: a data set is missing or cannot be read.
    """
    _require_harness(protocol.harness)
    require_dtype(model, protocol.dtype)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # read when the libraries are imported, below
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="mobie-lm-eval-") as scratch:
        loaded = load_tasks(protocol, group, mirror, cache or Path(scratch) / "cache")
        items = {name: sample_items(name, len(task.eval_docs), protocol) for name, task in loaded.items()}
        context = min(protocol.max_length, getattr(model.config, "max_position_embeddings", protocol.max_length))
        harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=protocol.batch_size, max_length=context)
        # seeds of None: zero-shot likelihoods draw nothing, and the global generators are not ours to set
        results = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=list(loaded.values()),
            task_manager=TaskManager(include_defaults=False),  # it would index every task to load none
            samples=items,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=None,
        )
    return _scores(results, items)


def _require_harness(version: str) -> None:
    try:
        installed = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        installed = "no version"
    if installed != version:
        raise ConfigError(
            f"{installed} of lm-eval is installed, the protocol says {version}; install lm-eval=={version}"
        )


def load_tasks(protocol: TasksProtocol, group: Path, mirror: Path, cache: Path) -> dict[str, Any]:
    """The protocol's lm-eval tasks by name, reading from `mirror`.

    Raises:
        ConfigError: the group's file is unreadable or lacks a task.
        DataError: a data set is missing or cannot be read.
    """
    import lm_eval
    import yaml
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    entries = read_group(group, mirror)
    for name in protocol.tasks:
        if name not in entries:
            raise ConfigError(f"{group}: {unknown_name('task', name, entries)}")
        entry = entries[name]
        if not Path(entry["dataset_path"]).is_dir():
            raise DataError(f"{entry['dataset_path']}: no such data set for {name}; run the rule that makes {mirror}")
        entry["dataset_kwargs"] = {"cache_dir": str(cache)}
    collection = Path(lm_eval.__file__).parent / "tasks"
    with tempfile.TemporaryDirectory(prefix="mobie-lm-eval-") as folder:
        filled = {"group": group.stem, "task": [entries[name] for name in protocol.tasks]}
        (Path(folder) / group.name).write_text(yaml.safe_dump(filled), encoding="utf-8")
        folders = [*(collection / name for name in TASK_FOLDERS), Path(folder)]
        manager = TaskManager(include_path=folders, include_defaults=False)
        try:
            return manager.load(group.stem)["tasks"]
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"{mirror}: a data set cannot be read ({error}); delete the folder and make it again"
            ) from error


def read_group(group: Path, mirror: Path) -> dict[str, dict[str, Any]]:
    """Entries of a group file by task name, `{mirror}` filled in."""
    import yaml

    try:
        entries = yaml.safe_load(group.read_text(encoding="utf-8"))["task"]
        return {
            entry["task"]: {**entry, "dataset_path": entry["dataset_path"].format(mirror=mirror.resolve())}
            for entry in entries
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{group}: not a group file ({error}), expected a list `task` of entries with task and dataset_path; "
            "restore it from the repository"
        ) from error


def sample_items(task: str, available: int, protocol: TasksProtocol) -> list[int]:
    """Numbers of the items to score, ascending: all, or a sample that depends on the seed and the task's name only."""
    if protocol.limit is None or protocol.limit >= available:
        return list(range(available))
    return sorted(random.Random(f"{protocol.sample_seed}/items/{task}").sample(range(available), protocol.limit))


def _scores(results: Mapping[str, Any], items: Mapping[str, list[int]]) -> TaskScores:
    measurements, answers = [], {}
    for task, wanted in items.items():
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == wanted, f"{task}: the harness scored other items"
        for metric in METRICS:
            if f"{metric},none" in results["results"][task]:
                values = [float(sample[metric]) for sample in samples]
                answers[f"{task}.{metric}"] = values
                measurements.append(
                    _measurement(f"{task}.{metric}", results["results"][task][f"{metric},none"], values, samples)
                )
    return TaskScores(measurements, {task: list(wanted) for task, wanted in items.items()}, answers)


def _measurement(name: str, value: float, values: Sequence[float], samples: Sequence[Mapping[str, Any]]) -> Measurement:
    """The harness's value, with a standard error and a chance level from the items."""
    n = len(values)
    error = _standard_error(values)
    if name.endswith(".perplexity"):  # exp of minus the mean log-likelihood; delta method
        return Measurement(name, float(value), None if error is None else float(value) * error, n)
    return Measurement(name, float(value), error, n, _chance(samples))


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _chance(samples: Sequence[Mapping[str, Any]]) -> float:
    """Expected accuracy of guessing: the mean of 1 / choices; 0 where a word is to be predicted freely."""
    shares = [1 / len(sample["arguments"]) if len(sample["arguments"]) > 1 else 0.0 for sample in samples]
    return math.fsum(shares) / len(shares)
