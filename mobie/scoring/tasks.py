"""Zero-shot accuracy with lm-eval's own tasks; only the place of their data is replaced (`workflow/config/lm_eval/`).

Prompts, metrics and task versions are the harness's. With a `limit` a fixed sample of each task is scored, drawn from
`sample_seed` and the task's name alone, so every method answers the same items and differences can be paired.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from mobie.determinism import read_locally
from mobie.errors import ConfigError, DataError, unknown_name
from mobie.parsing import parse_yaml
from mobie.records import Measurement
from mobie.scoring.protocol import Dtype, Protocol, require_dtype, require_version

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
    prepare_harness(protocol.harness)
    require_dtype(model, protocol.dtype)
    with tempfile.TemporaryDirectory(prefix="mobie-lm-eval-") as scratch:
        loaded = load_tasks(protocol, group, mirror, cache or Path(scratch) / "cache")
        items = {name: sample_items(name, len(task.eval_docs), protocol) for name, task in loaded.items()}
        results = run_harness(model, tokenizer, loaded, items, protocol.batch_size, protocol.max_length)
    return _scores(results, items)


def run_harness(
    model: Any,
    tokenizer: Any,
    loaded: Mapping[str, Any],
    items: Mapping[str, list[int]],
    batch_size: int,
    max_length: int,
    fewshot_seed: int | None = None,
) -> Mapping[str, Any]:
    """lm-eval's results and samples of loaded tasks on the given items of each.

    `fewshot_seed` decides which examples are drawn; None where none are, which draws nothing.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    context = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    # seeds of None: the global generators are not ours to set
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context),
        tasks=list(loaded.values()),
        task_manager=TaskManager(include_defaults=False),  # it would index every task to load none
        samples=items,
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=fewshot_seed,
    )


def prepare_harness(version: str) -> None:
    """Keep lm-eval off the network and check its version; to be called before it is imported. Raises ConfigError."""
    read_locally()
    require_version("lm-eval", version)


def load_tasks(protocol: TasksProtocol, group: Path, mirror: Path, cache: Path) -> dict[str, Any]:
    """The protocol's lm-eval tasks by name, reading from `mirror`.

    Raises:
        ConfigError: the group's file is unreadable or lacks a task.
        DataError: a data set is missing or cannot be read.
    """
    entries = read_group(group, mirror)
    chosen = [
        find_entry(entries, name, group) | {"dataset_kwargs": {"cache_dir": str(cache)}} for name in protocol.tasks
    ]
    return load_entries(group.stem, chosen, TASK_FOLDERS, mirror)


def find_entry(entries: Mapping[str, dict[str, Any]], name: str, group: Path) -> dict[str, Any]:
    """A task's entry of a group file.

    Raises:
        ConfigError: it has none.
        DataError: its data set is not there.
    """
    if name not in entries:
        raise ConfigError(f"{group}: {unknown_name('task', name, entries)}")
    path = entries[name]["dataset_path"]
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such data set for {name}; run the rule that makes {Path(path).parents[1]}")
    return entries[name]


def load_entries(
    name: str, entries: Sequence[Mapping[str, Any]], folders: Sequence[str], mirror: Path
) -> dict[str, Any]:
    """lm-eval's tasks by name, each from the stock file it names and what its entry puts in place of that.

    Args:
        name: of the group that is made of them.
        folders: of lm-eval's task collection that hold the stock files.
        mirror: named where data cannot be read.

    Raises:
        DataError: a data set cannot be read.
    """
    import lm_eval
    import yaml
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    collection = Path(lm_eval.__file__).parent / "tasks"
    with tempfile.TemporaryDirectory(prefix="mobie-lm-eval-") as folder:
        filled = {"group": name, "task": list(entries)}
        (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(filled), encoding="utf-8")
        manager = TaskManager(
            include_path=[*(collection / stock for stock in folders), Path(folder)], include_defaults=False
        )
        try:
            return manager.load(name)["tasks"]
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            raise DataError(
                f"{mirror}: a data set cannot be read ({error}); delete the folder and make it again"
            ) from error


def read_group(group: Path, mirror: Path) -> dict[str, dict[str, Any]]:
    """Entries of a group file by task name, `{mirror}` filled in."""
    try:
        entries = parse_yaml(group.read_text(encoding="utf-8"))["task"]
        return {
            entry["task"]: {**entry, "dataset_path": entry["dataset_path"].format(mirror=mirror.resolve())}
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{group}: not a group file ({error}), expected a list `task` of entries with task and dataset_path; "
            "restore it from the repository"
        ) from error


def sample_items(task: str, available: int, protocol: TasksProtocol) -> list[int]:
    """Numbers of the items to score, ascending: all, or a sample that depends on the seed and the task's name only."""
    return draw_items(task, available, protocol.limit, protocol.sample_seed)


def draw_items(task: str, available: int, limit: int | None, seed: int) -> list[int]:
    """As `sample_items`, from the limit and the seed themselves."""
    if limit is None or limit >= available:
        return list(range(available))
    return sorted(random.Random(f"{seed}/items/{task}").sample(range(available), limit))


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
                    item_measurement(f"{task}.{metric}", results["results"][task][f"{metric},none"], values, samples)
                )
    return TaskScores(measurements, {task: list(wanted) for task, wanted in items.items()}, answers)


def item_measurement(
    name: str, value: float, values: Sequence[float], samples: Sequence[Mapping[str, Any]]
) -> Measurement:
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
