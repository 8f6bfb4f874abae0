"""Values of a check, read from `Results`: draws, or the hole that is in their place.

Which records are read follows from the check and the suite, never from what other records hold: a plan lists them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import stdev

import numpy as np

from mobie.config import SPEC_MARK, config_names
from mobie.errors import ConfigError, unknown_name
from mobie.paper.audit.document import Column
from mobie.records import Record
from mobie.results import Cell, Model, Results
from mobie.tables.table2 import TASK_METRICS
from mobie.tables.table8 import METRICS as HARD_METRICS
from mobie.tables.table8 import hard_kind
from mobie.tables.table10 import sweep_method, text_names
from mobie.verdicts.document import Value
from mobie.verdicts.sampling import Draws, Sampler, exact, half_width, seed_error

PAPER_TEXTS = ("wikitext2", "c4", "ptb")
#: methods that are run with every calibration seed, by the registered name of their family
SEEDED = {"billm": "billm", "arb": "arb-llm", "mobie": "mobie", "mxmoe": "mxmoe-2.25"}
REFERENCE = "fp16"
EXACT = "exact"


@dataclass(frozen=True)
class Drawn:
    """A value that is there.

    draws: `(1 + resamples,)`, or `(list, 1 + resamples)`.
    basis: what its interval rests on, in words.
    gaps:  what the interval leaves out, in words.
    lead:  of an accuracy: by how much it is above chance, with its draws; else None.
    """

    draws: Draws
    basis: frozenset[str] = frozenset()
    gaps: frozenset[str] = frozenset()
    lead: Draws | None = None

    @property
    def at_chance(self) -> bool:
        """Whether it is an accuracy that is not above chance beyond its interval; of a list, whether all are."""
        return self.lead is not None and all(row[0] <= half_width(row) for row in np.atleast_2d(self.lead))


@dataclass(frozen=True)
class Hole:
    """A value that is not there."""

    status: str
    reason: str


Found = Drawn | Hole


@dataclass(frozen=True)
class Run:
    """A run that a perplexity is of.

    base: the method that is run with every seed and stands for its spread; None: that of the method's family.
    seed: this seed alone, without a calibration draw.
    """

    method: str
    base: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Context:
    """How the values of one check are read.

    all_seeds:       perplexities are means over the calibration seeds; else of the suite's seed.
    against_one_run: they are compared with a printed value, which has a calibration seed of its own.
    """

    all_seeds: bool = False
    against_one_run: bool = False


@dataclass
class Reader:
    """Reads values of a suite.

    columns: what the paper's columns mean: which tasks an average is of.
    used:    paths of the records behind the values read since it was last emptied, in order.
    """

    results: Results
    sampler: Sampler
    columns: dict[str, Column]
    used: dict[str, None] = field(default_factory=dict)

    # --- which run --------------------------------------------------------------------------------------------------

    def context(self, values: Iterable[Value], *, against_one_run: bool) -> Context:
        """Means over seeds where every value has all seeds, or needs none; else all are of the suite's seed."""
        seeded = {*SEEDED.values(), REFERENCE}
        return Context(all(value.method in seeded for value in values), against_one_run)

    def read(self, value: Value, model: Model, context: Context) -> Found:
        """A value for a model."""
        if value.method is not None:
            self._check_method(value.method)
            return self._of_method(value, model, value.method, context)
        runs = self._sizes(model) if value.sizes else self._sweep(value, model)
        if not runs:
            return Hole("absent", "the suite's sweep does not have this λ, or no other")
        found = [self._perplexity(value.perplexity or "", model, run, context) for run in runs]
        return stacked(found) if value.sweep is None else found[0]

    @cached_property
    def _configs(self) -> list[str]:
        return config_names("methods", self.results.layout)

    def _check_method(self, name: str) -> None:
        """Raises `ConfigError` where there is no such method config."""
        if name.split(SPEC_MARK)[0] not in self._configs:
            raise ConfigError(unknown_name("method", name, self._configs))

    def _sizes(self, model: Model) -> list[Run]:
        """Every size and seed of Figure 8; the seeds are in the list, so that none is drawn."""
        sweep = self.results.suite.sweep
        methods = [self._size_method(model, size) for size in sweep.sizes]
        return [Run(method, seed=seed) for method in methods for seed in sweep.seeds]

    def _sweep(self, value: Value, model: Model) -> list[Run]:
        """MoBiE with one λ of the sweep, or with all others; the spread over seeds is that of as many sequences."""
        sweep = self.results.suite.sweep
        given = sweep.regularization
        wanted = [n for n in given if (n == value.sweep if value.sweep is not None else n != value.sweep_without)]
        base = self._size_method(model, sweep.sequences) if sweep.sequences in sweep.sizes else SEEDED["mobie"]
        return [Run(sweep_method(self.results, n, value.calibration or ""), base) for n in wanted]

    @staticmethod
    def _size_method(model: Model, size: int | None) -> str:
        from mobie.figures.fig8 import size_method

        return SEEDED["mobie"] if model.config is None or size is None else size_method(model, size)

    # --- the kinds of values ----------------------------------------------------------------------------------------

    def _of_method(self, value: Value, model: Model, method: str, context: Context) -> Found:
        if value.perplexity is not None:
            return self._perplexity(value.perplexity, model, Run(method), context)
        if value.accuracy is not None:
            return self._accuracy(value.accuracy, model, method, value.above_chance)
        if value.bits is not None:
            return self._bits(value.bits, value.component, model, method)
        if value.minutes:
            return self._minutes(model, method)
        if value.routing is not None:
            return self._routing(value.routing, model, method)
        if value.cka is not None:
            return self._cka(value.cka, model, method)
        if value.shift is not None:
            return self._shift(value.shift, model, method)
        return self._measure(value.measure or "", model, method)

    def _cell(self, model: Model, method: str, kind: str, name: str, seed: int | None = None) -> Cell:
        cell = self.results.cell(model, method, kind, name, seed=seed)
        if cell.value is not None:
            self.used[cell.record] = None
        return cell

    def _record(self, model: Model, method: str, kind: str, seed: int | None = None) -> Record:
        record = self.results.record(model, method, kind, seed)
        assert record is not None  # a cell of it was there
        return record

    def _perplexity(self, text: str, model: Model, run: Run, context: Context) -> Found:
        """On one of the paper's texts, by its stand-in; the mean over the three for `average`."""
        if text == "average":
            parts = [self._perplexity(one, model, run, context) for one in PAPER_TEXTS]
            return combined(parts, lambda draws: np.mean(draws, axis=0))
        name = self._text(text)
        base = None if run.seed is not None else run.base or self._base(run.method)
        seed = self.results.suite.seed if run.seed is None else run.seed
        cells = {seed: self._text_cell(model, run.method, name, seed)}
        seeds = () if base is None else self.results.suite.sweep.seeds
        family = {s: self._text_cell(model, base or "", name, s) for s in seeds}
        hole = next((cell for cell in cells.values() if cell.value is None), None)
        if hole is not None:
            return as_hole(hole)
        there = {s: cell.value for s, cell in family.items() if cell.value is not None}
        averaged = [seed, *(s for s in there if s != seed)] if base == run.method and context.all_seeds else [seed]
        losses = []
        for s in averaged:
            record = self._record(model, run.method, "perplexity", s)
            window_nll = record.details.get("window_nll", {}).get(name)
            if window_nll is None:
                return Hole("missing", f"perplexity of {run.method}: no losses of windows in it; run its job again")
            losses.append(self.sampler.mean(f"windows {model.name} {name} {record.protocol}", window_nll))
        drawn = Drawn(np.mean(losses, axis=0), frozenset({"paired bootstrap over windows"}))
        if run.seed is None and run.method != REFERENCE:
            spread = [math.log(value) for value in there.values()]
            drawn = self._with_seeds(drawn, model, run.method, base, spread, len(losses) > 1, context)
        return replace(drawn, draws=np.exp(drawn.draws))

    def _with_seeds(
        self, drawn: Drawn, model: Model, method: str, base: str | None, logs: list[float], mean: bool, context: Context
    ) -> Drawn:
        """Mean losses with a calibration draw: `logs` are those of `base`, by seed; `mean`: `drawn` is their mean."""
        if base is None or len(logs) < 2:
            return replace(drawn, gaps=drawn.gaps | {f"calibration seeds of {method}: one seed"})
        error = seed_error(stdev(logs), len(logs), mean=mean, against_one_run=context.against_one_run)
        words = f"spread over {len(logs)} calibration seeds" + ("" if base == method else f" of {base}")
        noise = self.sampler.noise(f"{model.name} {method}")
        return replace(drawn, draws=drawn.draws + error * noise, basis=drawn.basis | {words})

    def _text_cell(self, model: Model, method: str, name: str, seed: int) -> Cell:
        return self._cell(model, method, "perplexity", f"{name}.perplexity", seed)

    def _text(self, name: str) -> str:
        """The suite's text in the place of one of the paper's."""
        texts = text_names(self.results)
        if name not in texts:
            raise ConfigError(unknown_name("text", name, texts))
        return texts[name]

    def _base(self, method: str) -> str | None:
        """The method that is run with every seed and stands for the spread of `method`; None: there is none."""
        return SEEDED.get(self.results.method(method).method)

    def _accuracy(self, name: str, model: Model, method: str, above_chance: bool) -> Found:
        """In per cent; an average is that of its tasks."""
        column = self.columns.get(name)
        if column is not None and column.parts:
            parts = [self._accuracy(task, model, method, above_chance) for task in column.parts]
            return combined(parts, lambda draws: np.mean(draws, axis=0))
        if name in TASK_METRICS:
            kind, metric = "tasks", TASK_METRICS[name]
        elif name in HARD_METRICS:
            kind, metric = hard_kind(name), HARD_METRICS[name]
        else:
            raise ConfigError(unknown_name("task", name, [*TASK_METRICS, *HARD_METRICS]))
        cell = self._cell(model, method, kind, f"{name}.{metric}")
        if cell.value is None:
            return as_hole(cell)
        record = self._record(model, method, kind)
        answers = record.details.get("answers", {}).get(f"{name}.{metric}")
        if answers is None:
            return Hole("missing", f"a record of kind {kind} without its answers; run its job again")
        items = {k: v for k, v in record.details.get("items", {}).items() if k == name or k.startswith(f"{name}_")}
        chosen = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:12]
        draws = 100 * self.sampler.mean(f"items {name} {chosen}", answers)
        lead = draws - 100 * (cell.chance or 0.0)
        gaps = () if method == REFERENCE else ("calibration seeds: accuracies are of one seed",)
        basis = frozenset({"paired bootstrap over items, tasks as strata"})
        if above_chance:
            return Drawn(lead, basis, frozenset(gaps))
        return Drawn(draws, basis, frozenset(gaps), lead)

    def _bits(self, counting: str, component: str | None, model: Model, method: str) -> Found:
        cell = self._cell(model, method, "quantize", f"bits_{counting}")
        if cell.value is None:
            return as_hole(cell)
        if component is None:
            return Drawn(exact(cell.value), frozenset({EXACT}))
        parts = self._record(model, method, "quantize").details.get("bits_by_component", {})
        if component not in parts:
            return Hole("missing", f"the record has no bits of the component {component!r}")
        return Drawn(exact(parts[component][counting]), frozenset({EXACT}))

    def _minutes(self, model: Model, method: str) -> Found:
        """CPU minutes of the block loop and the loss gradients, mean over calibration seeds as repeated timings."""
        base = self._base(method)
        if base != method:
            return Hole("missing", f"{method} is timed once, so no spread")
        cells = {s: self._cell(model, method, "quantize", "bits_stored", s) for s in self.results.suite.sweep.seeds}
        there = [s for s, cell in cells.items() if cell.value is not None]
        if not there:
            return as_hole(next(iter(cells.values())))
        times = [quantize_minutes(self._record(model, method, "quantize", s)) for s in there]
        known = [time for time in times if time is not None]
        if len(known) < 2:
            why = "blocks were read back from an interrupted run" if None in times else "one timing, so no spread"
            return Hole("missing", f"CPU time of {method}: {why}")
        error = seed_error(stdev(known), len(known), mean=True, against_one_run=False)
        draws = np.mean(known) + error * self.sampler.noise(f"minutes {model.name} {method}")
        return Drawn(draws, frozenset({f"spread of {len(known)} timings, one per calibration seed"}))

    def _routing(self, which: str, model: Model, method: str) -> Found:
        cell = self._cell(model, method, "routing", "similarity")
        if cell.value is None:
            return as_hole(cell)
        record = self._record(model, method, "routing")
        layers = [m for m in record.measurements if re.fullmatch(r"layer\d+\.similarity", m.name)]
        layers.sort(key=lambda m: int(re.sub(r"\D", "", m.name)))
        chosen = layers[len(layers) // 2 :] if which == "deep" else layers
        if any(m.stderr is None for m in chosen):
            return Hole("missing", "one window, so no standard error of the routing similarity")
        draws = [m.value + m.stderr * self.sampler.noise(f"{cell.record} {m.name}") for m in chosen]
        basis = frozenset({"standard errors over windows, as if independent"})
        return Drawn(np.stack(draws), basis, frozenset({"calibration seeds: routing is of one seed"}))

    def _cka(self, stage: str, model: Model, method: str) -> Found:
        cell = self._cell(model, method, "cka", stage)
        if cell.value is None:
            return as_hole(cell)
        record = self._record(model, method, "cka")
        parts = {m.name: m.value for m in record.measurements if re.fullmatch(rf"layer\d+\.\w+\.{stage}", m.name)}
        draws = self.sampler.mean(f"layers {cell.record}", [parts[name] for name in sorted(parts)])
        return Drawn(draws, frozenset({"paired bootstrap over layers and projections"}))

    def _shift(self, name: str, model: Model, method: str) -> Found:
        cell = self._cell(model, method, "shift", name)
        if cell.value is None:
            return as_hole(cell)
        record = self._record(model, method, "shift")
        losses = record.details.get("window_nll", {}).get(name)
        if losses is None:
            return Hole("missing", "a shift record without the losses of its windows; run its job again")
        draws = np.exp(self.sampler.mean(f"windows {model.name} shift {record.protocol}", losses))
        gaps = frozenset({"calibration seeds: replayed routing is of one seed"})
        return Drawn(draws, frozenset({"paired bootstrap over windows"}), gaps)

    def _measure(self, measure: str, model: Model, method: str) -> Found:
        kind, _, name = measure.partition(".")
        cell = self._cell(model, method, kind, name)
        if cell.value is None:
            return as_hole(cell)
        reason = self._record(model, method, kind).details.get("no_verdict", {}).get(name)
        if reason is not None:
            return Hole("unsupported", reason)
        if cell.stderr is None:
            return Hole("missing", f"{measure} has no standard error")
        draws = cell.value + cell.stderr * self.sampler.noise(f"{cell.record} {name}")
        return Drawn(draws, frozenset({"standard errors, as if independent"}))


def quantize_minutes(record: Record) -> float | None:
    """CPU minutes of a quantize job's blocks and gradients; None where some blocks were read back."""
    seconds = [block.get("cpu_seconds") for block in record.details.get("blocks", ())]
    if not seconds or None in seconds:
        return None
    return (math.fsum(seconds) + (record.details.get("gradient_cpu_seconds") or 0.0)) / 60


def as_hole(cell: Cell) -> Hole:
    """The hole that a cell without a value is; what has not run is named."""
    reason = cell.reason or cell.status
    if cell.status == "missing" and cell.record:
        *_, method, seed, kind = cell.record.removesuffix(".json").split("/")
        reason = f"{kind} of {method}, seed {seed[1:]}: {reason}"
    return Hole(cell.status, reason)


def first_hole(parts: Iterable[Found]) -> Hole | None:
    """The hole to tell of: one that running a job does not fill comes first; None where there is none."""
    return min(
        (part for part in parts if isinstance(part, Hole)), key=lambda hole: hole.status == "missing", default=None
    )


def combined(parts: Sequence[Found], arithmetic: Callable[[list[Draws]], Draws]) -> Found:
    """One value of several; a hole where one of them is."""
    hole = first_hole(parts)
    if hole is not None:
        return hole
    there = [part for part in parts if isinstance(part, Drawn)]
    leads = [part.lead for part in there if part.lead is not None]
    return Drawn(
        arithmetic([part.draws for part in there]),
        frozenset().union(*(part.basis for part in there)),
        frozenset().union(*(part.gaps for part in there)),
        arithmetic(leads) if len(leads) == len(there) else None,
    )


def stacked(parts: Sequence[Found]) -> Found:
    """A list of values: `(list, 1 + resamples)`."""
    return combined(parts, np.stack)
