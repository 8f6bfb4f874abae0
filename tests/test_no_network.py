"""After fetching, jobs need no network: compute nodes of a cluster have none.

`python -m tests.reliability cluster` runs the whole suite `tiny` in this way; here a part of it, to stay short.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from no_network import without_network
from working_copy import copy_environment, working_copy

from mobie.paths import Layout
from mobie.records import read_record


@pytest.mark.usefixtures("eval_wheel")
def test_tokens_windows_quantizing_and_scoring_need_no_network(tmp_path: Path) -> None:
    prefix = without_network()
    if prefix is None:
        pytest.skip("this machine does not let a process leave the network (unshare --net)")
    layout = Layout(working_copy(tmp_path / "copy"))
    protocol = layout.config_file("protocols", "tiny")
    values = yaml.safe_load(protocol.read_text())
    protocol.write_text(yaml.safe_dump(values | {"perplexity": values["perplexity"][:1]}))  # one text, to be quick
    record = layout.record("tiny", "nano-olmoe", "rtn-w3", 0, "perplexity")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "suite=tiny"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "cache" / "huggingface")}
    shown = subprocess.run(
        [*prefix, *command, "--", os.path.relpath(record, layout.root)],
        cwd=layout.root,
        env=copy_environment(layout.root, cache),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert shown.returncode == 0, (shown.stdout + shown.stderr)[-3000:]
    assert read_record(record).ok
    settings = read_record(record).provenance["settings"]["environment"]
    assert settings["HF_HUB_OFFLINE"] == settings["HF_DATASETS_OFFLINE"] == "1"


def test_nothing_is_fetched_without_a_network(tmp_path: Path) -> None:
    """The other way round: what is without a network above cannot have fetched anything."""
    prefix = without_network()
    if prefix is None:
        pytest.skip("this machine does not let a process leave the network (unshare --net)")
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    shown = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True)
    assert "Network is unreachable" in shown.stderr
