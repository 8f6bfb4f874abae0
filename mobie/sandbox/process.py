"""Starts a program that may misbehave, and bounds what it costs the host: time, and bytes that it prints."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ERROR_BYTES = 1 << 16
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Finished:
    """What a program printed, and the limit that ended it: "seconds", "output_bytes", "stopped" or None."""

    output: bytes
    errors: str
    limit: str | None


def run_limited(
    command: Sequence[str],
    request: bytes,
    environment: Mapping[str, str],
    folder: Path,
    seconds: float,
    output_bytes: int,
    stop: threading.Event,
) -> Finished:
    """Run `command` with `request` on its stdin; it and all that it started are gone when this returns.

    At most `output_bytes` are kept of what it prints; then, after `seconds`, or when `stop` is set, it is killed.
    """
    with tempfile.TemporaryFile() as source:  # not a pipe: a program that does not read could block us
        source.write(request)
        source.seek(0)
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,  # Ctrl-C in a terminal comes to us, and we end it
        )
    try:
        output, errors, limit = _read(process, time.monotonic() + seconds, output_bytes, stop)
        if limit is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    finally:
        _kill(process)
        for pipe in _pipes(process):
            pipe.close()
    return Finished(output, errors.decode(errors="replace"), limit)


def _read(
    process: subprocess.Popen[bytes], deadline: float, output_bytes: int, stop: threading.Event
) -> tuple[bytes, bytes, str | None]:
    """What the process prints until it closes both pipes or passes a limit, and that limit."""
    stdout, stderr = _pipes(process)
    output, errors = bytearray(), bytearray()
    limit = None
    with selectors.DefaultSelector() as selector:
        for pipe in (stdout, stderr):
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and limit is None:
            for key, _ in selector.select(LOOK_SECONDS):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is stdout:
                    output += data
                else:
                    errors += data[: ERROR_BYTES - len(errors)]
            if len(output) > output_bytes:
                limit = "output_bytes"
            elif time.monotonic() > deadline:
                limit = "seconds"
            elif stop.is_set():
                limit = "stopped"
    return bytes(output[:output_bytes]), bytes(errors), limit


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Where a process that was started with pipes prints."""
    assert process.stdout is not None and process.stderr is not None
    return process.stdout, process.stderr


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything below it, the youngest first: a container's first process takes the rest along."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for child in reversed(below):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
