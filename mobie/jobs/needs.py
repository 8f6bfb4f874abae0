"""What a job or a target reads, from configuration alone: the rules and `python -m mobie plan` ask here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from mobie.config import config_names, load_suite
from mobie.data.self_sampled import SELF_SAMPLED
from mobie.data.texts import TEXTS
from mobie.errors import ConfigError, unknown_name
from mobie.figures import figure_records, figures_of
from mobie.jobs.code import code_sources
from mobie.jobs.data import windows_path
from mobie.jobs.ebss import ordinary_keys
from mobie.jobs.gate import gate_keys
from mobie.jobs.keys import Keys, find_source, model_files
from mobie.jobs.score import COMPARED, REFERENCE, benchmark_sources, hard_sources, uses_mirror
from mobie.paths import Layout
from mobie.sources import Source
from mobie.tables import table_records, tables_of
from mobie.verdicts import verdict_records

#: names of texts that a model writes, as a regular expression
WRITTEN = "(?:" + "|".join(sorted(SELF_SAMPLED)) + ")"
WITH_WINDOWS = frozenset({"perplexity", "routing", "shift"})  # kinds that read token windows of a text
#: where a kind's items come from
BENCHMARKS: dict[str, Callable[[Keys], tuple[Source, ...]]] = {"tasks": benchmark_sources, "hard": hard_sources}


# --- jobs -------------------------------------------------------------------------------------------------------------


def model_inputs(keys: Keys) -> list[Path]:
    """Files that stand for the full-precision model."""
    return model_files(keys.model, keys.model_config, keys.layout)


def text_source(text: str, layout: Layout) -> Path:
    """File or folder that a text is read from. Raises `ConfigError` for an unknown text."""
    if text not in TEXTS:
        raise ConfigError(unknown_name("text", text, TEXTS))
    return layout.source(find_source(TEXTS[text].source, layout))


def quantize_inputs(keys: Keys) -> list[Path]:
    """The model and its calibration tokens."""
    return [*model_inputs(keys), keys.calibration]


def self_sample_inputs(keys: Keys) -> list[Path]:
    """The checkpoint in full precision, which its record stands for, and the model that it was made of."""
    return [*model_inputs(keys), ordinary_keys(keys).record("quantize")]


def usage_inputs(keys: Keys) -> list[Path]:
    """The checkpoint in full precision, a method's calibration tokens and the model's ordinary ones."""
    reference = ordinary_keys(keys)
    return list(dict.fromkeys([reference.record("quantize"), keys.calibration, reference.calibration]))


def score_inputs(keys: Keys, kind: str) -> list[Path]:
    """The record of the quantization, which stands for the checkpoint, and what the kind of score reads beside it."""
    found = [keys.record("quantize")]
    if kind in COMPARED:
        found.append(keys.layout.record(keys.suite, keys.model, REFERENCE, keys.seed, "quantize"))
    if kind in WITH_WINDOWS:
        protocols = getattr(keys.protocol, kind)
        protocols = protocols if isinstance(protocols, tuple) else (protocols,)
        found += [windows_path(keys, protocol) for protocol in protocols]
    if kind in BENCHMARKS:
        sources = BENCHMARKS[kind](keys)
        if uses_mirror(sources):
            found.append(keys.layout.mirror_stamp)
        else:
            found += [keys.layout.source(source) for source in sources]
    return list(dict.fromkeys(found))


def gate_inputs(keys: Keys) -> list[Path]:
    """The checkpoint in 16 bits, which its record stands for, its zero-shot record, and the text of the grid."""
    reference = gate_keys(keys)
    text = text_source(keys.protocol.gate.text, keys.layout)
    return [reference.record("quantize"), reference.record("tasks"), text]


def problem_files(keys: Keys) -> list[Path]:
    """Downloads that hold the programming problems."""
    return [keys.layout.source(source) for source in code_sources(keys)]


# --- targets ----------------------------------------------------------------------------------------------------------


def chosen_models(value: object, layout: Layout) -> tuple[str, ...] | None:
    """Models of `--config models=A,B`, to which the records of a target are restricted; None: all.

    Raises:
        ConfigError: there is no such model.
    """
    if value is None:
        return None
    names = tuple(map(str, value)) if isinstance(value, list | tuple) else tuple(str(value).split(","))
    known = config_names("models", layout)
    for name in names:
        if name not in known:
            raise ConfigError(f"--config models: {unknown_name('model', name, known)}")
    return names


def _of_models(records: Iterable[Path], models: tuple[str, ...] | None) -> list[Path]:
    """Records `…/MODEL/METHOD/sSEED/KIND.json` of some models."""
    return [path for path in records if models is None or path.parents[2].name in models]


def table_inputs(name: str, suite: str, layout: Layout, models: tuple[str, ...] | None = None) -> list[Path]:
    """Records that a table reads; those of other models than `models` are holes in it."""
    return _of_models(table_records(name, suite, layout), models)


def figure_inputs(name: str, suite: str, layout: Layout, models: tuple[str, ...] | None = None) -> list[Path]:
    """Records that a figure reads."""
    return _of_models(figure_records(name, suite, layout), models)


def claims_inputs(suite: str, layout: Layout, models: tuple[str, ...] | None = None) -> list[Path]:
    """Records that the verdicts read."""
    return _of_models(verdict_records(suite, layout), models)


def _tables_and_figures(suite: str, layout: Layout) -> list[Path]:
    config = load_suite(suite, layout)
    tables = [layout.table(name, "csv") for name in tables_of(config)]
    return [*tables, *(layout.figure(name, "svg") for name in figures_of(config))]


def report_inputs(suite: str, layout: Layout) -> list[Path]:
    """The report reads every record by itself, logs too; what it is made of is named so that it comes last."""
    claims = [layout.table("claims", suffix) for suffix in CLAIMS]
    audit = [layout.table("audit", suffix) for suffix in AUDIT]
    return [*_tables_and_figures(suite, layout), *claims, *audit]


def everything(suite: str, layout: Layout) -> list[Path]:
    """What the rule `all` asks for: of a comparison per stored bit no verdicts on the paper and no report."""
    if load_suite(suite, layout).beyond is not None:
        return _tables_and_figures(suite, layout)
    return [*report_inputs(suite, layout), layout.report]


#: suffixes of the files that a target consists of
TABLE = ("csv", "md", "tex", "long.csv")
FIGURE = ("svg", "pdf", "png", "csv")
CLAIMS = ("csv", "md", "json")
AUDIT = ("json", "md")
