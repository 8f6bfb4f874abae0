"""Running a verb in a child of a process that has imported everything once, and disturbing the child exactly.

A verb's libraries take ten seconds to import and its work on the tiny model a tenth of one: a fork makes two hundred
faults affordable. What the child does to files passes an audit hook of the interpreter, which can count the events and
strike at the N-th: kill the child on the spot, or refuse the call as a full disk would.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

#: events of the interpreter that change files, as `sys.addaudithook` names them
CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit status, or the signal that killed it; what it printed; how long it took; file events."""

    status: int | None
    signal: int | None
    output: str
    seconds: float
    events: int

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    @property
    def message(self) -> str:
        """The message of a refusal: from `error:` to the end, on one line."""
        _, found, text = self.output.rpartition("error: ")
        return " ".join(text.split()) if found else ""


class FileEvents:
    """Counts what a process does to files under `root` and calls `strike` before the N-th event; None: never."""

    def __init__(self, root: Path, at: int | None = None, strike: Callable[[str], None] | None = None) -> None:
        self.count, self._root, self._at, self._strike = 0, str(root), at, strike

    def install(self) -> None:
        sys.addaudithook(self._heard)
        fsync = os.fsync

        def counted(descriptor: int) -> None:  # the interpreter has no event for it
            self._happened("os.fsync")
            fsync(descriptor)

        os.fsync = counted

    def _heard(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike) and self._inside(os.fsdecode(path)):
            self._happened(event)

    def _inside(self, path: str) -> bool:
        return not os.path.isabs(path) or path.startswith(self._root)

    def _happened(self, event: str) -> None:
        self.count += 1
        if self.count == self._at:
            self._strike(event)


def kill_self(event: str) -> NoReturn:
    """What `kill -9` does, at this very event."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit  # not reached


def refuse(event: str) -> NoReturn:
    """What a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Child:
    """A verb to run in `root`: what is set before it, what is done to its files, when it is killed.

    prepare: called in the child before the verb (patches, limits).
    strike:  called before the `at`-th file event.
    kill_after: seconds after which the parent kills it.
    name: of the files beside `root` that hold what it prints and counts.
    """

    root: Path
    arguments: Sequence[str]
    prepare: Callable[[], None] | None = None
    at: int | None = None
    strike: Callable[[str], None] | None = None
    kill_after: float | None = None
    limit: float = 120.0
    name: str = "child"
    environment: Mapping[str, str] = field(default_factory=dict)


def run(child: Child) -> Ended:
    """Fork, run, wait. A child that exceeds its limit is killed and reported as having ended by SIGALRM."""
    output = child.root.with_name(f"{child.name}.output")
    report = child.root.with_name(f"{child.name}.events")
    report.unlink(missing_ok=True)
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _be_the_child(child, output, report)
    limit = child.limit if child.kill_after is None else child.kill_after
    status, hung = _wait(process, limit)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if hung and child.kill_after is None:
        number = signal.SIGALRM
    return Ended(
        os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        number,
        output.read_text(encoding="utf-8", errors="replace"),
        time.monotonic() - began,
        int(report.read_text()) if report.exists() else 0,
    )


def _wait(process: int, limit: float) -> tuple[int, bool]:
    """Wait status of a child, and whether it had to be killed."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status, False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1], True


def _be_the_child(child: Child, output: Path, report: Path) -> NoReturn:
    """Never returns: whatever happens, the process ends here."""
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(child.root)
        os.environ.update(child.environment)
        sys.argv = ["mobie", *child.arguments]
        events = FileEvents(child.root, child.at, child.strike)
        if child.prepare is not None:
            child.prepare()
        events.install()
        status = _call(child.arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        report.write_text(str(events.count))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _call(arguments: Sequence[str]) -> int:
    """Exit status of a verb; a defect prints its traceback, as the interpreter would."""
    from mobie.cli import main

    try:
        main(args=list(arguments), prog_name="mobie")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
