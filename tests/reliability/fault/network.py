"""A package index and a hub that lose the connection, send other bytes, fail or fall silent in the middle of a file.

One small server of this machine plays both. What it does to a request stands at the beginning of the path:
`/cut-1000/simple/…` ends every file after 1000 bytes, `/ok-0/…` does nothing bad.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from reliability.fault.children import Ended
from reliability.fault.judge import LOST, REFUSED, SAME, USED, Bad, Outcome, require_named_refusal
from reliability.fault.repository import WHEEL
from reliability.fault.workshop import Snapshot, Workshop, leftovers

from mobie.paths import PACKAGE, Layout
from mobie.sources import load_sources

DATASET = "wikitext"
COMMIT = "c" * 40
FILES = {
    "README.md": b"# A data set of the harness\n",
    "wikitext-2-raw-v1/test-00000-of-00001.parquet": bytes(random.Random(0).randbytes(60_000)),
}
WAYS = tuple(f"{where}: {how}" for where in ("wheel", "hub") for how in ("cut", "other", "error", "stall", "kill"))
PATIENCE = 3  # seconds that the clients wait for a silent server


class _Handler(BaseHTTPRequestHandler):
    """Answers as the first part of the path says."""

    folder: Path
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        _, fault, place = self.path.split("?")[0].split("/", 2)
        how, _, number = fault.partition("-")
        if place.startswith("simple/"):
            wheel = next(self.folder.glob("*.whl")).name
            self._send(f'<!DOCTYPE html><a href="/{fault}/files/{wheel}">{wheel}</a>'.encode(), "text/html", body)
        elif place.startswith("api/"):
            answer = self._tree() if "/tree/" in place else self._info()
            self._send(json.dumps(answer).encode(), "application/json", body)
        else:
            name = re.sub(r".*/resolve/[^/]+/", "", place)
            data = FILES[name] if name in FILES else (self.folder / Path(place).name).read_bytes()
            self._send_file(data, how, int(number), body)

    def _tree(self) -> list[dict]:
        files = FILES.items()
        return [{"type": "file", "path": name, "size": len(data), "oid": git_blob(data)} for name, data in files]

    def _info(self) -> dict:
        siblings = [{"rfilename": name, "size": len(data), "blobId": git_blob(data)} for name, data in FILES.items()]
        return {"id": "a/b", "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "private": False}

    def _send(self, data: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _send_file(self, data: bytes, how: str, number: int, body: bool) -> None:
        if how == "error":
            return self.send_error(500 + number % 4)
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{git_blob(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        position = number % len(data)
        if not body:
            return None
        if how == "other":
            data = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        self.wfile.write(data[:position] if how in ("cut", "stall") else data)
        if how == "stall":
            self.wfile.flush()
            time.sleep(3 * PATIENCE)
        return None


def git_blob(data: bytes) -> str:
    """The name that git, and so the hub, gives a file's content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Server:
    """The server, in a process of its own while the block lasts. `folder` gets the wheel that it sends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "served"

    def __enter__(self) -> Server:
        self.folder.mkdir(parents=True, exist_ok=True)
        handler = type("Handler", (_Handler,), {"folder": self.folder})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        self._process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
        self._process.start()
        server.socket.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def lost(workshop: Workshop, chance: random.Random, way: str) -> Outcome:
    """One download through a bad network, then one through a good one."""
    where, how = way.split(": ")
    number = chance.randrange(1, 60_000)
    root = workshop.copy()
    source = WHEEL if where == "wheel" else DATASET
    row = load_sources(Layout(root).sources)[source]
    target = Layout(root).source(row)
    if target.is_file():
        shutil.copy(target, workshop.server.folder)
        target.unlink()
    before = Snapshot.of(root)
    what = f"{source} fetched, {how} {number}"
    delay = chance.uniform(0.1, 4) if how == "kill" else None
    fault = "ok-0" if how == "kill" else f"{how}-{number}"
    status, output = _fetch(root, source, f"{workshop.server.address}/{fault}", delay)
    after = Snapshot.of(root).files
    gone = [name for name, state in before.files.items() if after.get(name) != state]
    if gone:
        raise Bad(LOST, f"{what}: changed {gone}")
    verdict = SAME
    if status == 0:
        _require_whole(root, target, f"{what}, reported as well", USED)
    elif how != "kill":
        require_named_refusal(Ended(status, None, output, 0, 0), source)
        verdict = REFUSED
        if target.exists() or leftovers(root):
            raise Bad(LOST, f"{what}: left behind {leftovers(root)}")
    status, again = _fetch(root, source, f"{workshop.server.address}/ok-0")
    if status != 0:
        raise Bad(LOST, f"{what}: the next try fails: {again[-1500:]}")
    _require_whole(root, target, what, LOST)
    if leftovers(root):
        raise Bad(LOST, f"{what}: left behind {leftovers(root)}")
    return Outcome(what, verdict, output[-500:])


def _require_whole(root: Path, target: Path, what: str, verdict: str) -> None:
    """What arrived is what was to be sent."""
    if target.suffix == ".whl":
        same = target.read_bytes() == (root.parent / "base" / target.relative_to(root)).read_bytes()
    else:
        same = all((target / name).is_file() and (target / name).read_bytes() == data for name, data in FILES.items())
    if not same:
        raise Bad(verdict, f"{what}: {target.name} is not what was sent")


def _fetch(root: Path, source: str, address: str, kill_after: float | None = None) -> tuple[int, str]:
    """Run the verb as a user does; everything that it started is ended with it."""
    ours = ("HF_", "PIP_", "TRANSFORMERS_")  # what keeps the harness itself off the network
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "PYTHONPATH": str(PACKAGE.parent),
        "HF_ENDPOINT": address,
        "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE),
        "HF_HUB_ETAG_TIMEOUT": str(PATIENCE),
        "HF_HOME": str(root.parent / "hub-home"),
        "HF_HUB_DISABLE_XET": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{address}/simple",
        "PIP_RETRIES": "1",
        "PIP_TIMEOUT": str(PATIENCE),
        "NO_PROXY": "127.0.0.1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mobie", "fetch", source],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=kill_after or 300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own: pip and all
        output, _ = process.communicate()
    return process.returncode, output
