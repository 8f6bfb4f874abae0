"""Finds a way to run programs on this machine, and runs one request of the driver in it.

In a container (Apptainer, `containers/code.sif`) a program has: a root file system that cannot be written, an empty
temporary folder that is gone afterwards, no network, no capabilities, no environment, no files of the host, and no
processes but its own. Started by root it runs as a user that nothing else has, else in a user namespace.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from mobie.containers.apptainer import apptainer_environment, find_apptainer
from mobie.containers.images import IMAGES
from mobie.errors import StorageError, UnsupportedError
from mobie.paths import Layout
from mobie.sandbox.process import Finished, run_limited
from mobie.sandbox.types import Limits
from mobie.storage import storage_errors

HERE = Path(__file__).resolve().parent
SECCOMP = HERE / "seccomp.json"
#: a container's start and its end come on top of a sample's own seconds, which the driver watches
GRACE_SECONDS = 30.0
PROBE_SECONDS = 60.0
FIRST_USER, USERS = 1 << 30, 1 << 29  # user ids that no system hands out
#: all that a program sees; the hash seed makes the order of sets, and so a verdict, the same each time
INSIDE = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
#: variables that Apptainer itself needs; others would change what it binds or sets inside
PASSED_ON = ("PATH", "HOME", "TMPDIR", "APPTAINER_TMPDIR", "APPTAINER_CONFIGDIR", "APPTAINER_DROP_CAPS")
PASSED_ON_FOR_CGROUPS = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")


@dataclass(frozen=True)
class Reply:
    """The driver's messages in order, and what ended it: the name of a limit, "worker" when done, None if killed."""

    messages: list[dict[str, Any]]
    end: str | None
    errors: str


class Runtime(Protocol):
    """A way to run programs."""

    def describe(self) -> dict[str, Any]:
        """For the record: `kind` is "apptainer" or "none", then versions and how programs are kept apart."""

    def run(self, request: Mapping[str, Any], limits: Limits, stop: threading.Event) -> Reply:
        """Let the driver do one request."""


@dataclass(frozen=True)
class Container:
    """One new container for each request.

    image: the .sif file, or the folder that it was unpacked into
    own_user: run by root, as a user of its own; else in a user namespace
    cgroups: memory and processes are bounded by the kernel's control groups too
    """

    program: str
    image: Path
    own_user: bool
    cgroups: bool
    facts: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        isolation = {"user": "own id" if self.own_user else "namespace", "cgroups": self.cgroups, "seccomp": True}
        return {"kind": "apptainer", **isolation, **self.facts}

    def command(self, limits: Limits) -> list[str]:
        """The arguments of one container."""
        options = ["--containall", "--cleanenv", "--no-home", "--no-privs", "--no-eval", "--no-init", "--pid", "--ipc"]
        options += ["--net", "--network", "none", "--hostname", "sandbox", "--cwd", "/tmp"]
        options += ["--no-mount", "sys,devpts,bind-paths,cwd", "--security", f"seccomp:{SECCOMP}"]
        if self.own_user:
            user = FIRST_USER + secrets.randbelow(USERS)
            options += ["--security", f"uid:{user},gid:{user}"]
        else:
            options += ["--userns"]
        if self.cgroups:
            memory = f"{limits.memory_mb + limits.file_mb + 256}M"  # and the driver's own
            options += ["--memory", memory, "--memory-swap", memory, "--pids-limit", str(limits.processes + 16)]
        inside = INSIDE | {"PATH": "/opt/venv/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp"}
        variables = [f"{name}={value}" for name, value in inside.items()]
        driver = ["/usr/bin/env", "-i", *variables, "/opt/venv/bin/python", "-s", "-B", "-c", driver_source()]
        return [self.program, "--silent", "exec", *options, str(self.image), *driver]

    def run(self, request: Mapping[str, Any], limits: Limits, stop: threading.Event) -> Reply:
        names = PASSED_ON + (PASSED_ON_FOR_CGROUPS if self.cgroups else ())
        environment = {name: value for name, value in apptainer_environment().items() if name in names}
        return _run(self.command(limits), request, environment, Path("/"), limits, stop)


@dataclass(frozen=True)
class Plain:
    """No container: a process with limits in a temporary folder. It can read and write what this user can."""

    facts: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        return {"kind": "none", **self.facts}

    def run(self, request: Mapping[str, Any], limits: Limits, stop: threading.Event) -> Reply:
        command = [sys.executable, "-s", "-B", "-c", driver_source()]
        with tempfile.TemporaryDirectory(prefix="mobie-unsandboxed-", ignore_cleanup_errors=True) as folder:
            environment = INSIDE | {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder}
            return _run(command, request, environment, Path(folder), limits, stop)


@cache
def driver_source() -> str:
    """The driver as text: it reaches the container as an argument, so nothing needs to be bound into it."""
    return (HERE / "driver.py").read_text(encoding="utf-8")


def _run(
    command: list[str],
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    folder: Path,
    limits: Limits,
    stop: threading.Event,
) -> Reply:
    """Start the driver and read its messages."""
    data = json.dumps({**request, "limits": vars(limits)}).encode()
    seconds = limits.seconds + GRACE_SECONDS
    finished = run_limited(command, data, environment, folder, seconds, limits.output_bytes + 4096, stop)
    messages = list(_messages(finished))
    last = messages.pop() if messages and "end" in messages[-1] else {}
    return Reply(messages, finished.limit or last.get("end"), finished.errors.strip())


def _messages(finished: Finished) -> Iterator[dict[str, Any]]:
    """The lines that are messages; a container that was killed may have left half a line."""
    for line in finished.output.splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict):
            yield message


def find_runtime(unsandboxed: bool, layout: Layout) -> Runtime:
    """A way to run programs here that was tried: the container, or with `unsandboxed` a process without one.

    Raises:
        UnsupportedError: there is no Apptainer, no image, or neither form of the image starts.
    """
    if unsandboxed:
        return Plain(_probe(Plain({})))
    refusal = "programs that a model wrote run only in a container"
    remedy = "or run them with this user's rights, which the record will say: --unsandboxed (--config unsandboxed=true)"
    try:
        program = find_apptainer()
    except UnsupportedError as error:
        raise UnsupportedError(f"{refusal}: {error}; {remedy}") from error
    image = IMAGES["code"].sif(layout.root)
    if not image.is_file():
        raise UnsupportedError(f"{refusal}, and {image} is not there; build it with `containers/build code`; {remedy}")
    failures = []
    for prepare in (lambda: image, lambda: unpacked(program, image)):
        try:
            return _first_that_starts(program, prepare())
        except (UnsupportedError, StorageError) as error:
            failures.append(str(error))
    raise UnsupportedError("\n".join([f"{refusal}, and none starts from {image}:", *failures, remedy]))


def _first_that_starts(program: str, image: Path) -> Container:
    """With control groups, else without. Raises UnsupportedError with the last words of both.

    Root's programs never run in a user namespace of root: what the kernel lets its owner write is root's there too.
    """
    failures = []
    for cgroups in (True, False):
        attempt = Container(program, image, own_user=os.geteuid() == 0, cgroups=cgroups, facts={})
        try:
            return replace(attempt, facts=_probe(attempt))
        except UnsupportedError as error:
            failures.append(str(error))
    raise UnsupportedError("\n".join(dict.fromkeys(failures)))


def _probe(runtime: Runtime) -> dict[str, Any]:
    """Versions inside; raises UnsupportedError with the last words of what does not start."""
    reply = runtime.run({"work": "probe"}, Limits(seconds=PROBE_SECONDS), threading.Event())
    if len(reply.messages) == 1 and "evalplus" in reply.messages[0]:
        return reply.messages[0]
    said = [message["error"] for message in reply.messages if "error" in message] + reply.errors.splitlines()
    raise UnsupportedError(f"{type(runtime).__name__}: {said[-1] if said else reply.end or 'killed'}")


def unpacked(program: str, image: Path) -> Path:
    """The image as a folder beside it, for a user who may not mount files; made once and again for a new image.

    Raises:
        UnsupportedError: it cannot be unpacked.
    """
    folder, stamp = image.with_suffix(".unpacked"), image.with_suffix(".unpacked.stamp")
    state = f"{image.stat().st_size} {image.stat().st_mtime_ns}"
    with storage_errors(folder), FileLock(image.with_suffix(".unpacked.lock")):
        if folder.is_dir() and stamp.is_file() and stamp.read_text(encoding="ascii") == state:
            return folder
        stamp.unlink(missing_ok=True)
        command = [program, "--silent", "build", "--force", "--sandbox", str(folder), str(image)]
        finished = run_limited(command, b"", apptainer_environment(), image.parent, 600.0, 1 << 20, threading.Event())
        if not (folder / "usr").is_dir() or finished.limit:
            raise UnsupportedError(f"{image} cannot be unpacked: {finished.errors.strip() or finished.limit}")
        stamp.write_text(state, encoding="ascii")
    return folder
