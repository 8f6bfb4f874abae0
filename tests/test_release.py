"""A release: one version everywhere, a citation that tools can read, a CI script whose steps exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

import mobie
from mobie.reliability import HARNESSES

ROOT = Path(__file__).resolve().parents[1]
CI = ROOT / ".ci"
#: keys that CITATION.cff may have at its root (Citation File Format 1.2.0), and those it must have
CFF_KEYS = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}
CFF_REQUIRED = {"authors", "cff-version", "message", "title"}


def test_one_version_is_the_source_of_all() -> None:
    from setuptools.config.pyprojecttoml import read_configuration

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]
    built = read_configuration(ROOT / "pyproject.toml", expand=True)["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert built == cited == mobie.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", mobie.__version__)


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert heads[0][0] == mobie.__version__
    assert [version for version, _ in heads] == sorted((version for version, _ in heads), key=_numbers, reverse=True)
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text())["date-released"]
    assert heads[0][1] == released.isoformat()
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_citation_has_the_keys_of_its_format() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert CFF_REQUIRED <= set(citation) <= CFF_KEYS
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert isinstance(citation["date-released"], date)
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    for author in citation["authors"]:
        assert set(author) <= {"name"} or {"family-names", "given-names"} <= set(author)
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_pinned_tools_are_installed_in_their_pinned_versions() -> None:
    """What CI runs by name is pinned, so that a new version cannot change what passes."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert {"ruff", "snakefmt", "snakemake", "mypy", "pytest"} <= set(pinned)


def steps() -> dict[str, str]:
    """Name → command of the CI script's steps."""
    text = (CI / "run").read_text()
    return dict(re.findall(r"^ *(?:step|optional \d+) ([\w-]+) (.+?)(?: #.*)?$", text, re.MULTILINE))


def test_the_ci_script_is_a_script() -> None:
    assert os.access(CI / "run", os.X_OK)
    subprocess.run(["bash", "-n", CI / "run"], check=True)


def test_steps_of_ci_call_what_exists() -> None:
    text, found = (CI / "run").read_text(), steps()
    assert {"install", "lint", "format", "workflow-lint", "types", "tests", "plan", "everything", "rebuild"} <= set(
        found
    )
    functions = set(re.findall(r"^(\w+)\(\) \{", text, re.MULTILINE))
    scripts = {"holes", "lint_workflow"}
    for name, command in found.items():
        first = command.split()[0].strip('"')
        known = first in functions or first.startswith(("$environment/bin/", "$python", "$snakemake"))
        assert known or os.access(ROOT / first, os.X_OK), name
        for script in re.findall(r"\.ci/(\w+)", command):
            assert script in scripts and os.access(CI / script, os.X_OK), name
        for harness in re.findall(r"-m tests\.reliability (\w+)", command):
            assert (ROOT / "tests" / "reliability" / f"{harness}.py").exists(), name
        for verb in re.findall(r"-m mobie (\S+)", command):
            from mobie.cli import main

            assert verb in main.commands, name
    for name in re.findall(r"not_run \"\$why\" ([\w -]+)$", text, re.MULTILINE):
        assert set(name.split()) <= set(found)


@pytest.mark.parametrize("name", HARNESSES)
def test_every_harness_that_the_document_names_exists(name: str) -> None:
    assert (ROOT / "tests" / "reliability" / f"{name}.py").exists()


def run_ci_functions(script: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines after the functions of the CI script, in their place."""
    functions = (CI / "run").read_text().split("\nexport OMP_WAIT_POLICY")[0]
    return subprocess.run(
        ["bash", "-c", f"{functions}\n{script}", CI / "run"], capture_output=True, text=True, check=False
    )


def test_what_did_not_run_is_not_counted_as_passed() -> None:
    shown = run_ci_functions('step one true\nnot_run "no such machine" two three\nrunning=')
    assert shown.returncode == 0, shown.stderr
    assert "summary: 1 steps passed, 2 not run" in shown.stdout
    assert "not run  two: no such machine" in shown.stdout and "FAILED" not in shown.stdout


def test_a_failing_step_ends_ci_and_is_named() -> None:
    shown = run_ci_functions("step one true\nstep two false\nstep three true")
    assert shown.returncode == 1
    assert "FAILED   two (status 1)" in shown.stdout and "three" not in shown.stdout


def lint_workflow(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, CI / "lint_workflow"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_advice_of_snakemake_is_followed_or_listed_with_a_reason() -> None:
    shown = lint_workflow(ROOT)
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_new_advice_of_snakemake_fails(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    snakefile = (ROOT / "Snakefile").read_text()
    (tmp_path / "Snakefile").write_text(
        snakefile + '\n\nrule bad:\n    output:\n        "x",\n    shell:\n        "touch x"\n'
    )
    shown = lint_workflow(tmp_path)
    assert shown.returncode == 1 and "No log directive" in shown.stdout and "NEW" in shown.stdout
