"""A small hub of this machine: the endpoints that the hub's client asks when it lists and downloads repositories."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from reliability.fault.network import git_blob

LARGE = (".safetensors", ".parquet", ".gz")  # kept by the hub outside git, with their SHA-256


@dataclass
class HubRepository:
    """A repository at one commit, and who may read it."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    gated: bool = False

    @classmethod
    def of(cls, folder: Path, **state: Any) -> HubRepository:
        """The files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return cls(files, **state)


@dataclass
class Hub:
    """The hub while the block lasts. Keys of `repositories`: `models/OWNER/NAME`, `datasets/OWNER/NAME`."""

    repositories: dict[str, HubRepository] = field(default_factory=dict)
    token: str | None = None  # the only one that is right
    cut: dict[str, list[int]] = field(default_factory=dict)  # file → bytes after which the next answers break off
    down: bool = False  # it lists, and fails when a file is asked for
    flipped: set[str] = field(default_factory=set)  # files that arrive with another byte than is listed
    sent: dict[str, int] = field(default_factory=dict)  # file → bytes sent in all
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def connect(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process talk to a hub, with no token but a test's own: what HF_ENDPOINT does at import."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    """Answers as the hub documents it."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        place = unquote(self.path.split("?")[0]).lstrip("/")
        self.hub.requests.append(f"{self.command} {place}")
        if found := re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)(/.*)?", place):
            key, rest = found[1], found[2] or ""
        elif found := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)(/resolve/.*)", place):
            key, rest = f"{found[1] or 'models/'}{found[2]}", found[3]
        else:
            return self._refuse(404, "")
        sender = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(key)
        if sender and sender != self.hub.token:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repository is None:
            return self._refuse(404 if sender else 401, "RepoNotFound", "Repository not found")
        closed = repository.gated and not sender
        if closed and (rest == "/auth-check" or rest.startswith("/resolve/")):
            return self._refuse(403, "GatedRepo", "Access to this resource is restricted")
        return self._of_repository(key.split("/", 1)[1], repository, rest)

    def _of_repository(self, name: str, repository: HubRepository, rest: str) -> None:
        if found := re.fullmatch(r"/(revision|tree|resolve)/([^/]+)/?(.*)", rest):
            if found[2] not in (repository.commit, "main"):
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {found[2]}")
            if found[1] == "tree":
                return self._send_json(self._tree(repository, found[3]))
            if found[1] == "resolve" and self.hub.down:
                return self._refuse(503, "")
            if found[1] == "resolve":
                return self._send_file(repository, found[3])
        return self._send_json({"id": name, "sha": repository.commit, "siblings": [], "tags": [], "private": False})

    def _tree(self, repository: HubRepository, folder: str) -> list[dict[str, Any]]:
        recursive = re.search("recursive=true", self.path, re.IGNORECASE) is not None
        entries = []
        for path, data in sorted(repository.files.items()):
            below = path.removeprefix(f"{folder}/") if folder else path
            if (folder and below == path) or (not recursive and "/" in below):
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _send_file(self, repository: HubRepository, name: str) -> None:
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = repository.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else git_blob(data)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.end_headers()
        if self.command == "GET":
            ends = self.hub.cut.get(name)
            self.close_connection = bool(ends)
            part = data[start : ends.pop(0) if ends else None]
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(part)
            self.wfile.write(bytes([part[0] ^ 1]) + part[1:] if name in self.hub.flipped else part)
        return None

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
