"""What is disturbed: a repository with a model of two blocks, a miniature data wheel, and everything made from them.

The undisturbed run is made once and kept; every fault gets a copy of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reliability.fault.children import Child, Ended, run
from reliability.fault.repository import MODEL, SUITE, allow_small_mirror, make_repository

from mobie.errors import MobieError
from mobie.paths import PACKAGE

if TYPE_CHECKING:
    from reliability.fault.network import Server

KEYS = ("--suite", SUITE, "--model", MODEL)
LEFTOVER = (".tmp", ".part")


@dataclass(frozen=True)
class Job:
    """A verb with its arguments, what it writes (patterns under the root), and whether equal runs give equal values.

    slow:     it takes seconds even here.
    in_place: the output is changed, not made: it is there before the first run.
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    timed: bool = False
    slow: bool = False
    in_place: bool = False


def _run_outputs(method: str, kind: str) -> str:
    return f"results/{SUITE}/{MODEL}/{method}/s0/{kind}.json"


def _quantize(method: str) -> Job:
    run = f"results/{SUITE}/{MODEL}/{method}/s0"
    outputs = [f"{run}/quantize.json", f"{run}/checkpoint/**/*"]
    if method == "mobie":
        outputs.append(f"results/{SUITE}/{MODEL}/gradients/**/*")
    return Job(f"quantize {method}", ("quantize", *KEYS, "--method", method), tuple(outputs))


def _score(kind: str, method: str) -> Job:
    arguments = (f"score-{kind}", *KEYS, "--method", method)
    return Job(f"score-{kind}", arguments, (_run_outputs(method, kind),), slow=kind in ("tasks", "hard"))


#: every kind of job, in an order in which each finds its inputs
JOBS = (
    Job("mirror", ("mirror",), ("resources/lm_eval_mirror/**/*", "resources/lm_eval_mirror.json")),
    Job("calibrate", ("calibrate", *KEYS), (f"results/{SUITE}/{MODEL}/calibration/*",)),
    Job("windows", ("windows", *KEYS), (f"results/{SUITE}/{MODEL}/windows/*",)),
    _quantize("fp16"),
    _quantize("rtn-w3"),
    _quantize("mobie"),
    _score("perplexity", "mobie"),
    _score("tasks", "mobie"),
    _score("routing", "mobie"),
    _score("shift", "mobie"),
    _score("cka", "mobie"),
    _score("generations", "mobie"),
    _score("hard", "rtn-w3"),
    Job("speed", ("speed", *KEYS, "--method", "mobie"), (_run_outputs("mobie", "speed"),), timed=True, slow=True),
    Job("table", ("table", "table2", "--suite", SUITE), ("results/table2.*",)),
    Job("figure", ("figure", "fig6", "--suite", SUITE), ("paper_figures/fig6.*",)),
    Job("claims", ("claims", "--suite", SUITE), ("results/claims.*",), slow=True),
    Job("report", ("report", "--suite", SUITE), ("results/report.html",), slow=True),
    Job("readme", ("readme",), ("README.md",), in_place=True),
)


def job(name: str) -> Job:
    """The job of this name."""
    return next(one for one in JOBS if one.name == name)


@dataclass(frozen=True)
class Snapshot:
    """Bytes (as a hash) and time of the last change of every file of a folder."""

    files: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, root: Path) -> Snapshot:
        found = {}
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                status = path.stat()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(root).as_posix()] = (digest, status.st_mtime_ns)
        return cls(found)


@dataclass
class Workshop:
    """The undisturbed run in `base`, and how each of its jobs went."""

    folder: Path
    server: Server | None = None  # plays the package index and the hub
    jobs: tuple[Job, ...] = JOBS
    ended: dict[str, Ended] = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=lambda: Snapshot({}))
    contents: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def build(self) -> None:
        """Make the repository and run every job once, undisturbed.

        Raises:
            MobieError: a job does not end well even undisturbed.
        """
        make_repository(self.base, PACKAGE.parent)
        allow_small_mirror()
        for one in self.jobs:
            ended = run(Child(self.base, one.arguments))
            if ended.status != 0:
                raise MobieError(f"{one.name} does not end well undisturbed (status {ended.status}):\n{ended.output}")
            self.ended[one.name] = ended
        self.snapshot = Snapshot.of(self.base)
        self.contents = {name: content(self.base / name) for name in self.snapshot.files}

    def copy(self, without: Sequence[Job] = ()) -> Path:
        """A fresh copy of the undisturbed run; outputs of the jobs `without` are not in it."""
        root = self.folder / "work"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.base, root, symlinks=True)
        for one in (one for one in without if not one.in_place):
            for path in outputs(root, one):
                path.unlink()
        return root

    def differences(self, root: Path, names: Sequence[str] | None = None) -> list[str]:
        """Files of the undisturbed run that are missing from `root` or have another content there."""
        found = []
        for name in self.snapshot.files if names is None else names:
            path = root / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif content(path) != self.contents[name]:
                found.append(f"{name} differs")
        return found


def outputs(root: Path, one: Job) -> list[Path]:
    """Files that a job has written under `root`."""
    return sorted({path for pattern in one.outputs for path in root.glob(pattern) if path.is_file()})


def leftovers(root: Path) -> list[str]:
    """Temporary files and folders that a killed job left."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob(".*") if p.name.endswith(LEFTOVER))


def content(path: Path) -> str:
    """What must be equal after a fault: a record without what differs from run to run, any other file byte by byte.

    Model cards say how long a job took, and shared loss gradients what they cost: of those only that they are there.
    Whether gradients are whole shows in the checkpoint that they lead to.
    """
    if path.name == "README.md" and path.parent.name == "checkpoint":
        return "a card" if path.read_text().startswith("---") else "no card"
    if "gradients" in path.parts:
        return "gradients"
    data = path.read_bytes()
    if path.suffix == ".json" and re.fullmatch(r"s\d+", path.parent.name):
        from mobie.parsing import parse_json
        from mobie.records import stable

        return json.dumps(stable(parse_json(data)), sort_keys=True)
    return hashlib.sha256(data).hexdigest()
