"""Commands of Slurm for tests: `sbatch` checks and records how it is called, and every job it takes fails at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol", "sacct", "scancel")
CALLS = "calls.jsonl"

SCRIPT = """#!{python}
import argparse, json, pathlib, sys

name, folder = pathlib.Path(sys.argv[0]).name, pathlib.Path(sys.argv[0]).parent
calls = folder / "{calls}"
if name == "sbatch":
    parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
    parser.add_argument("--parsable", action="store_true", required=True)
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("--exclusive", action="store_true")
    for option in ("--job-name", "--output", "--export", "--comment", "--wrap"):
        parser.add_argument(option, required=True)
    parser.add_argument("-p", dest="partition", required=True)
    parser.add_argument("-t", dest="minutes", type=int, required=True)
    parser.add_argument("-D", dest="folder", required=True)
    for option in ("--mem", "--cpus-per-task"):
        parser.add_argument(option, type=int, required=True)
    for option in ("--ntasks", "--gpus"):
        parser.add_argument(option, type=int)
    with calls.open("a") as file:
        print(json.dumps(vars(parser.parse_args())), file=file)
    print(len(calls.read_text().splitlines()))
elif name == "squeue":
    for job, _ in enumerate(calls.read_text().splitlines(), start=1):
        print(f"{{job}}|FAILED")
elif name == "sinfo":
    print("PARTITION\\nshort\\nmain*")
elif name == "scontrol":
    print("MinJobAge               = 300 sec\\nMaxArraySize            = 1001")
"""


def install(folder: Path) -> Path:
    """Put the commands into `folder`, which a test puts on PATH; returns the file that the calls go to."""
    folder.mkdir()
    for command in COMMANDS:
        script = folder / command
        script.write_text(SCRIPT.format(python=sys.executable, calls=CALLS))
        script.chmod(0o755)
    return folder / CALLS


def submissions(calls: Path) -> list[dict]:
    """Arguments of every call of `sbatch`, in order, by option."""
    return [json.loads(line) for line in calls.read_text().splitlines()]
