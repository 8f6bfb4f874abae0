"""RELIABILITY.md: made of what harnesses saved, says what was not run, refuses what is damaged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mobie.cli import main
from mobie.config import default_layout
from mobie.errors import ConfigError, DataError
from mobie.paths import Layout
from mobie.reliability import HARNESSES, Finding, command_of, read_finding, render, save_finding

FINDING = Finding(
    name="faults",
    title="3 seeded faults",
    command="python -m tests.reliability faults --count 3",
    columns=("fault", "tried", "lost"),
    rows=(("killed | shot", 2, 0), ("<full> disk", 1, None)),
    passed=True,
    notes=("No GPU here.",),
)


def test_a_finding_is_shown_with_its_table_its_command_and_the_machine(repository: Layout) -> None:
    save_finding(FINDING, repository)
    finding, machine = read_finding("faults", repository)
    assert finding == FINDING
    text = render(repository)
    assert r"| killed \| shot | 2 | 0 |" in text and r"| \<full\> disk | 1 | – |" in text
    assert "**passed**: `python -m tests.reliability faults --count 3`" in text
    assert "- No GPU here." in text and f"python {machine.versions['python']}" in text
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", text)  # the same findings give the same bytes on any day
    for name in set(HARNESSES) - {"faults"}:
        assert f"## {name}: not run" in text and f"Run it with `{command_of(name)}`" in text


def test_a_failed_harness_is_said_so(repository: Layout) -> None:
    save_finding(replace(FINDING, passed=False), repository)
    text = render(repository)
    assert "| faults | FAILED |" in text and "**FAILED**" in text and "**passed**" not in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: "{",
        lambda raw: "[]",
        lambda raw: json.dumps(raw | {"name": "fuzz"}),
        lambda raw: json.dumps(raw | {"rows": [["one cell"]]}),
        lambda raw: json.dumps(raw | {"passed": "perhaps"}),
        lambda raw: json.dumps({key: value for key, value in raw.items() if key != "provenance"}),
        lambda raw: json.dumps(raw | {"provenance": {}}),
        lambda raw: json.dumps(raw | {"provenance": {"versions": [], "host": {}}}),
    ],
)
def test_a_damaged_finding_is_refused_by_name(repository: Layout, damage) -> None:
    path = save_finding(FINDING, repository)
    path.write_text(damage(json.loads(path.read_text())))
    before = repository.reliability.exists()
    result = CliRunner().invoke(main, ["reliability"])
    assert result.exit_code == 2, result.output
    assert str(path) in result.stderr and command_of("faults") in result.stderr
    assert repository.reliability.exists() == before


@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_it_break(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    layout = Layout(tmp_path_factory.mktemp("findings"))
    layout.finding("faults").parent.mkdir(parents=True)
    layout.finding("faults").write_bytes(content)
    with pytest.raises(DataError, match="not a finding"):
        render(layout)


def test_what_does_not_fit_its_table_is_not_saved(repository: Layout) -> None:
    with pytest.raises(ConfigError, match="did you mean faults"):
        save_finding(replace(FINDING, name="fault"), repository)
    with pytest.raises(ValueError, match="2 cells, expected 3"):
        save_finding(replace(FINDING, rows=(("killed", 2),)), repository)


def test_the_committed_document_has_every_harness_and_commands_that_exist() -> None:
    text = default_layout().reliability.read_text()
    assert re.findall(r"^## (\w+):", text, re.MULTILINE) == list(HARNESSES)
    commands = re.findall(r"`(python -m [^`]+)`", text)
    assert {command.split()[2] for command in commands} == {"mobie", "tests.reliability"}
    for command in commands:
        words = command.split()
        assert words[3] in (main.commands if words[2] == "mobie" else HARNESSES), command


@pytest.mark.parametrize(("arguments", "status", "part"), [(["--help"], 0, "examples:"), (["fautls"], 2, "faults?")])
def test_the_entry_point_teaches(arguments: list[str], status: int, part: str) -> None:
    command = [sys.executable, "-m", "tests.reliability", *arguments]
    shown = subprocess.run(command, cwd=default_layout().root, capture_output=True, text=True)
    assert shown.returncode == status
    assert part in shown.stdout + shown.stderr and "Traceback" not in shown.stderr
