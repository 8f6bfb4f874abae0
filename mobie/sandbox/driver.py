"""Runs inside the sandbox: gives one program to evalplus's checker and says what came of it.

The only file of the project in there; it is handed to the image's Python as text, so it imports nothing of the project.

    supervisor (process 1 of the container: nothing inside can kill, stop or trace it)
    └─ worker (imports evalplus)
       └─ the process in which evalplus runs the program, confined by `confine`

The supervisor alone can write to the host. It reads the worker's verdicts from a pipe whose end is closed in the
program's process, bounds time, memory, processes and temporary files of everything below it, and kills what is left.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import CDLL
from functools import partial
from itertools import islice
from typing import Any

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36  # of linux/prctl.h
LOOK_SECONDS = 0.03
PAGE = os.sysconf("SC_PAGE_SIZE")
TEMPORARY_FOLDERS = ("/tmp", "/var/tmp", "/dev", "/dev/shm")
MAPPINGS: dict[str, type] = {"dict": dict, "Counter": Counter}
SEQUENCES: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}
LARGE_INTEGER = 1 << 63
#: outputs with more numbers and strings than this are computed again in each sample's container, not carried there
MOST_LEAVES = 1_000_000
IDENTITY = "/usr/share/mobie/image.json"  # written by the build

Send = Callable[[dict[str, Any]], None]


def encode(value: Any) -> Any:
    """`value` in terms of JSON, its types kept: a tuple is `{"tuple": […]}`.

    Large integers are hexadecimal, because Python bounds the digits of decimal ones.

    Raises:
        TypeError: neither number, string, list, tuple, set nor dictionary.
    """
    kind = type(value)
    if kind is int and abs(value) >= LARGE_INTEGER:
        return {"int": hex(value)}
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if SEQUENCES.get(kind.__name__) is kind:
        return {kind.__name__: [encode(item) for item in value]}
    if MAPPINGS.get(kind.__name__) is kind:
        return {kind.__name__: [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a value of type {kind.__name__}; expected numbers, strings, lists, tuples, sets or dictionaries")


def decode(value: Any) -> Any:
    """The value that `encode` was given; raises ValueError for a form that it does not make."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(item) for item in content)
    if kind in MAPPINGS:
        return MAPPINGS[kind]({decode(key): decode(item) for key, item in content})
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    raise ValueError(f"unknown type {kind!r}")


def leaves(value: Any) -> Iterator[Any]:
    """All numbers and strings in a value."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def confine(limits: dict[str, float], channel: int) -> None:
    """Called in every process forked below the worker: closes the channel and lowers the limits."""
    global _confined
    if _confined:
        return
    _confined = True
    try:
        os.close(channel)
        lower_limits(limits)
    except (OSError, ValueError):
        os._exit(1)  # Python would ignore the error and run the program without limits


def lower_limits(limits: dict[str, float]) -> None:
    """What this process and all below it may use."""
    megabyte = 1 << 20
    for kind, limit in {
        resource.RLIMIT_AS: limits["memory_mb"] * megabyte,
        resource.RLIMIT_FSIZE: limits["file_mb"] * megabyte,
        resource.RLIMIT_NPROC: limits["user_processes"],
        resource.RLIMIT_CPU: limits["seconds"] + 1,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }.items():
        hard = resource.getrlimit(kind)[1]
        value = int(limit) if hard == resource.RLIM_INFINITY else min(int(limit), hard)
        resource.setrlimit(kind, (value, value))


_confined = False


def judge(request: dict[str, Any], channel: int) -> None:
    """Send evalplus's verdict on the base tests and on the plus tests of one program."""
    from evalplus.eval import untrusted_check

    os.register_at_fork(after_in_child=partial(confine, request["limits"], channel))
    for tests in ("base", "plus"):
        inputs = decode(request["inputs"][tests])
        if not inputs:
            continue
        seconds, outputs = request["expected"][tests]["seconds"], request["expected"][tests]["outputs"]
        status, details = untrusted_check(
            request["dataset"],
            request["solution"],
            inputs,
            request["entry_point"],
            expected=canonical_outputs(request, tests)[0] if outputs is None else decode(outputs),
            atol=request["atol"],
            ref_time=seconds,
            fast_check=True,  # as evalplus.evaluate: the first wrong output ends a set of tests
        )
        passed = sum(bool(detail) for detail in details)
        send(channel, {"tests": tests, "status": status, "passed": passed, "of": len(inputs)})


def canonical_outputs(request: dict[str, Any], tests: str) -> tuple[list[Any], list[float]]:
    """What the canonical solution returns for every input, and the seconds that it took."""
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec

    outputs, seconds = trusted_exec(
        request["canonical"],
        decode(request["inputs"][tests]),
        request["entry_point"],
        record_time=True,
        output_not_none=request["dataset"] == "mbpp" and request["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
    )
    return outputs, seconds


def expect(request: dict[str, Any], channel: int) -> None:
    """Send the expected outputs, None where they are too many, and the seconds that they took."""
    for tests in ("base", "plus"):
        outputs, seconds = canonical_outputs(request, tests)
        too_many = sum(1 for _ in islice(leaves(outputs), MOST_LEAVES + 1)) > MOST_LEAVES
        send(channel, {"tests": tests, "outputs": None if too_many else encode(outputs), "seconds": seconds})


def probe(request: dict[str, Any], channel: int) -> None:
    """Send the versions that judge here, and which image this is."""
    from importlib.metadata import version

    import evalplus.eval
    import evalplus.gen.util  # noqa: F401 -- an image where this fails must be refused

    identity = None
    if os.path.isfile(IDENTITY):
        with open(IDENTITY, encoding="utf-8") as file:
            identity = json.load(file)
    versions = {name: version(name) for name in ("evalplus", "numpy")}
    send(channel, versions | {"python": sys.version.split()[0], "image": identity})


WORK = {"judge": judge, "expect": expect, "probe": probe}


def send(channel: int, message: dict[str, Any]) -> None:
    """Write one line of JSON."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


def start_worker(request: dict[str, Any], results: int) -> tuple[int, int]:
    """Fork the process that does the work; returns its id and the end of the pipe that gives its messages."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker:
        os.close(writer)
        return worker, reader
    os.close(reader)
    os.close(results)
    os.setsid()
    try:
        WORK[request["work"]](request, writer)
    except BaseException as error:  # whatever the program did to this process ends as a message
        send(writer, {"error": f"{type(error).__name__}: {error}"[:500]})
    os._exit(0)


def processes() -> list[int]:
    """All processes below this one: in a container everything but process 1."""
    if os.getpid() == 1:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    import psutil  # evalplus needs it too

    return [child.pid for child in psutil.Process().children(recursive=True)]


def user_threads() -> int:
    """Threads of this user that can be seen: the limit on processes counts them all, outside a container many."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += len(os.listdir(f"/proc/{name}/task")) if os.stat(f"/proc/{name}").st_uid == os.getuid() else 0
        except OSError:
            continue  # ended meanwhile
    return count


def held_memory(process: int) -> int:
    """Bytes of memory that a process holds for itself, 0 where it is gone."""
    try:
        with open(f"/proc/{process}/statm") as file:
            _, resident, shared, *_ = file.read().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * PAGE


def used_folder_bytes() -> int:
    """Bytes in the container's temporary folders, which lie in memory; an empty file counts as one page."""
    states = [os.statvfs(folder) for folder in TEMPORARY_FOLDERS]
    by_system = {state.f_fsid or index: state for index, state in enumerate(states)}
    return sum(
        (state.f_blocks - state.f_bfree) * state.f_frsize + (state.f_files - state.f_ffree) * PAGE
        for state in by_system.values()
    )


def broken_limit(limits: dict[str, float], deadline: float, worker: int) -> str | None:
    """Name of the limit that the processes below this one have passed together.

    What the worker holds (expected outputs, libraries) is not the program's, nor its process's inherited share of it.
    """
    if time.monotonic() > deadline:
        return "seconds"
    below = processes()
    if len(below) > limits["processes"] + 1:  # and the worker
        return "processes"
    if sum(map(held_memory, below)) - 2 * held_memory(worker) > int(limits["memory_mb"]) << 20:
        return "memory_mb"
    if os.getpid() == 1 and used_folder_bytes() > (int(limits["file_mb"]) << 20) + 64 * PAGE:
        return "file_mb"
    return None


def reap() -> None:
    """Take the exit status of everything that has ended, so that it does not count as a process any longer."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return


def end_all() -> None:
    """Kill everything below this process."""
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        below = processes()
        if not below:
            return
        if os.getpid() == 1:
            os.kill(-1, signal.SIGKILL)  # of this container; never outside one
        else:
            for process in below:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        reap()
        time.sleep(0.005)


def supervise(request: dict[str, Any], results: int) -> None:
    """Pass the worker's messages on until it has ended or a limit is passed; the last message says which."""
    limits = request["limits"]
    deadline = time.monotonic() + limits["seconds"]
    worker, reader = start_worker(request, results)
    end, passed_on = None, 0
    while end is None:
        ready, _, _ = select.select([reader], [], [], LOOK_SECONDS)
        data = os.read(reader, 1 << 16) if ready else None
        if data:
            passed_on += len(data)
            end = "output_bytes" if passed_on > limits["output_bytes"] else None
            os.write(results, data)
        elif data == b"":
            end = "worker"
        reap()
        end = end or broken_limit(limits, deadline, worker)
    end_all()
    os.write(results, b"\n")  # the last message may have been cut
    send(results, {"end": end})


def main() -> None:
    """Read a request from stdin, do it, write lines of JSON to what was stdout."""
    request = json.loads(sys.stdin.buffer.read())
    request["limits"]["user_processes"] = request["limits"]["processes"] + user_threads() + 2  # this one, the worker
    prctl = CDLL(None).prctl
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process reads this one's memory or its open files
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    results = os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.environ["EVALPLUS_MAX_MEMORY_BYTES"] = str(int(request["limits"]["memory_mb"]) << 20)
    supervise(request, results)


if __name__ == "__main__":
    main()
