from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mobie.config import (
    ModelConfig,
    build_method,
    config_names,
    load_method,
    load_model_config,
    load_protocol,
    load_suite,
    method_classes,
    parse,
    schemas,
)
from mobie.data.texts import TEXTS
from mobie.errors import ConfigError
from mobie.jobs.keys import Keys
from mobie.paths import Layout, find_root
from mobie.results import Results
from mobie.sources import load_sources

HERE = Layout(find_root(Path(__file__).parent))
METHODS = config_names("methods", HERE)

#: names that `mobie try` promises
PROMISED = [
    *("rtn-w3", "gptq-w2", "gptq-w2-g128", "gptq-w3", "gptq-w3-g128", "awq-w3", "awq-w2", "billm"),
    *("arb", "arb-x", "arb-rc", "arb-cgb", "arb-x-cgb", "arb-rc-cgb", "arb-llm", "mobie"),
]


def edit(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.mark.parametrize("name", config_names("suites", HERE))
def test_every_suite_is_complete(name: str) -> None:
    suite = load_suite(name, HERE)
    assert set(suite.benchmarks) <= set(load_sources(HERE.sources))
    protocol = load_protocol(suite.protocol, HERE)
    assert {*protocol.texts, protocol.routing.text} <= set(TEXTS)
    for model in suite.models:
        assert load_model_config(model, HERE).calibration.text in TEXTS
    for method in suite.methods:
        load_method(method, HERE).build()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_config_builds_its_method(name: str) -> None:
    config = load_method(name, HERE)
    method = config.build()
    assert method.name == config.method
    options = json.loads(json.dumps(method.options))
    for option, value in config.options.items():
        assert options[option] == value


def test_the_promised_names_exist() -> None:
    assert set(PROMISED) <= set(METHODS)
    assert load_method("arb-llm", HERE).build() == load_method("arb-rc-cgb", HERE).build()


def test_rows_of_the_paper_suite_are_those_of_the_paper() -> None:
    suite = load_suite("paper", HERE)
    labels = [load_method(name, HERE).paper.method for name in suite.methods]
    papers = ["Baseline", "AWQ", "GPTQ", "AWQ", "GPTQ", "MoEQuant", "NoWag", "BiLLM", "ARB-LLM", "MoBiE"]
    assert labels == [*papers, "QuantMoE-Bench", "MxMoE"]  # the last two are rows of Table 7
    models = [load_model_config(model, HERE).label for model in suite.models]
    assert models == ["OLMoE", "DeepSeekV2-Lite", "Qwen3-MoE"]


@pytest.mark.parametrize(
    ("load", "name", "near", "folder"),
    [
        (load_suite, "smke", "smoke", "suites"),
        (load_model_config, "nano-olmo", "nano-olmoe", "models"),
        (load_method, "gtpq-w3", "gptq-w3", "methods"),
        (load_protocol, "papr", "paper", "protocols"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(load, name: str, near: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r}; did you mean .*{near}") as error:
        load(name, HERE)
    assert folder in str(error.value)


def test_a_misspelt_key_is_refused_with_the_file_and_the_near_key(repository: Layout) -> None:
    path = repository.config_file("suites", "smoke")
    edit(path, protocl="smoke")
    with pytest.raises(ConfigError, match=r"smoke\.yaml: unknown key 'protocl'; did you mean protocol\?"):
        load_suite("smoke", repository)


def test_a_misspelt_key_deep_in_a_file_is_named_with_its_place(repository: Layout) -> None:
    path = repository.config_file("suites", "smoke")
    edit(path, calibration={"sequnces": 3})
    with pytest.raises(ConfigError, match=r"unknown key in calibration 'sequnces'; did you mean sequences\?"):
        load_suite("smoke", repository)
    path = repository.config_file("models", "nano-olmoe")
    edit(path, calibration={"text": "wiki", "sequences": 1, "lenght": 8})
    with pytest.raises(ConfigError, match=r"unknown key in calibration 'lenght'; did you mean length\?"):
        load_model_config("nano-olmoe", repository)


@pytest.mark.parametrize("value", [0, -1, "128", 1.5, None])
def test_a_calibration_without_whole_positive_sequences_is_refused(repository: Layout, value: object) -> None:
    edit(repository.config_file("models", "nano-olmoe"), calibration={"text": "wiki", "sequences": value, "length": 8})
    with pytest.raises(ConfigError, match=r"calibration\.sequences: .*got "):
        load_model_config("nano-olmoe", repository)


def test_a_suite_changes_the_calibration_of_its_models_and_a_method_changes_it_further() -> None:
    model = load_model_config("nano-olmoe", HERE)
    suite = load_suite("tiny", HERE)
    changed = suite.applied_to(model)
    assert changed.calibration == suite.calibration.apply(model.calibration) != model.calibration
    assert changed.model_copy(update={"calibration": model.calibration}) == model
    assert Keys(HERE, "tiny", "nano-olmoe", 0).calibration_config == changed.calibration
    own = Keys(HERE, "tiny", "nano-olmoe", 0, "rtn-w3+calibration.sequences=5").calibration_config
    assert own == changed.calibration.model_copy(update={"sequences": 5})
    assert Results("tiny", HERE).models("table2")[0].config == changed
    assert load_suite("smoke", HERE).applied_to(model) == model


def test_a_missing_key_is_named(repository: Layout) -> None:
    path = repository.config_file("methods", "rtn-w3")
    path.write_text("method: rtn\nlabel: RTN\n")
    with pytest.raises(ConfigError, match="missing key 'description'"):
        load_method("rtn-w3", repository)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "\xff"])
def test_a_file_that_is_no_mapping_is_refused(repository: Layout, text: str) -> None:
    path = repository.config_file("methods", "rtn-w3")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="rtn-w3.yaml"):
        load_method("rtn-w3", repository)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["mobi"]}, "unknown method 'mobi'; did you mean .*mobie"),
        ({"models": ["nano"]}, "unknown model 'nano'"),
        ({"protocol": "smoky"}, "unknown protocol 'smoky'; did you mean smoke"),
        ({"wikitext2_text": "wikitext"}, "unknown text 'wikitext'"),
        ({"models": []}, "models"),
    ],
)
def test_a_suite_that_names_what_does_not_exist_is_refused(repository: Layout, changes, message: str) -> None:
    edit(repository.config_file("suites", "smoke"), **changes)
    with pytest.raises(ConfigError, match=message) as error:
        load_suite("smoke", repository)
    assert "smoke.yaml" in str(error.value)


def test_options_are_checked_against_the_method() -> None:
    with pytest.raises(ConfigError, match="unknown method 'gptqq'; did you mean gptq"):
        build_method("gptqq", {})
    with pytest.raises(ConfigError, match="gptq: unknown option 'bit'; did you mean bits"):
        build_method("gptq", {"bit": 3})
    with pytest.raises(ConfigError, match="gptq: option bits: .*; got 'three'"):
        build_method("gptq", {"bits": "three"})
    with pytest.raises(ConfigError, match="gptq: option bits: .*; got '3'"):
        build_method("gptq", {"bits": "3"})
    with pytest.raises(ConfigError, match="gptq: missing option bits"):
        build_method("gptq", {})


def test_all_modules_of_the_package_are_looked_at_for_methods() -> None:
    assert {"fp16", "rtn", "gptq", "awq", "billm", "arb", "mobie"} <= set(method_classes())


def test_configuration_cannot_be_changed_and_its_digest_follows_its_values() -> None:
    config = load_model_config("nano-olmoe", HERE)
    with pytest.raises(ValidationError):
        config.repo = "other"
    values = config.model_dump(mode="json")
    assert parse(ModelConfig, values, "x").digest() == config.digest()
    assert parse(ModelConfig, values | {"notes": "other"}, "x").digest() != config.digest()


@pytest.mark.parametrize("name", ["suite", "model", "method", "protocol"])
def test_schemas_in_the_repository_are_those_of_the_classes(name: str) -> None:
    written = (HERE.schemas / f"{name}.schema.json").read_text()
    assert written == schemas()[name], "run `python -m mobie schema`"


@pytest.mark.parametrize("kind", ["suite", "model", "method", "protocol"])
def test_files_satisfy_the_generated_schema(kind: str) -> None:
    import json

    import jsonschema

    schema = json.loads(schemas()[kind])
    paths = sorted((HERE.config / f"{kind}s").glob("*.yaml"))
    assert paths
    for path in paths:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)


def test_no_repository_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobie.paths.PACKAGE", tmp_path / "site-packages" / "mobie")
    with pytest.raises(ConfigError, match="no Snakefile"):
        find_root(tmp_path)


def test_the_repository_is_found_from_a_folder_inside_it(repository: Layout) -> None:
    assert find_root(repository.config / "suites") == repository.root.resolve()
