"""A model hub on 127.0.0.1: what huggingface_hub, transformers and datasets ask of one, served from directories."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from toolkit.runtime import hub as hub_module


@dataclass
class Repository:
    """Files under one commit; every revision that is asked for has to be that commit or ``main``."""

    files: Path
    commit: str
    gated: bool = False


@dataclass
class StubHub:
    """Repositories by ``models/org/name`` or ``datasets/org/name``, and how the server behaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request that came."""
    moved: dict[str, str] = field(default_factory=dict)
    """``org/name`` of renamed repositories, and what they are called now."""
    hangs_on: str | None = None
    """Requests whose path contains it get no answer until the server ends."""
    stalls_on: str | None = None
    """Downloads whose path contains it get the first half of their bytes."""
    status: int | None = None
    """Every answer has this status."""
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stub_hub(repositories: dict[str, Repository]) -> Iterator[StubHub]:
    """Serve the repositories until the block ends."""
    hub = StubHub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let this process ask the hub at ``url``; the libraries read these when they are imported."""
    import datasets
    from huggingface_hub import HfApi, HfFileSystem, constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: HfApi(endpoint=url))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.load._dataset_viewer, "get_session", _no_session)  # another host
    HfFileSystem.clear_instance_cache()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_module, "_HOSTS", hub_module._Hosts())


def _no_session() -> None:
    raise OSError


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        form = self.rfile.read(length).decode()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.hangs_on is not None and self.hub.hangs_on in path:
            self.close_connection = True
            self.hub.ended.wait()
            return None
        if self.hub.status is not None:
            return self._send(self.hub.status, b"", {}, body)
        if path.startswith("/cdn/"):
            return self._file(Path("/" + path.removeprefix("/cdn/")), {}, body)
        kind, name, rest = _split(path)
        if name in self.hub.moved:
            return self._send(307, b"", {"Location": self.path.replace(name, self.hub.moved[name])}, body)
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            return self._error(401, "RepoNotFound", "Repository Not Found", body)
        action, _, rest = rest.partition("/")
        revision, _, rest = rest.partition("/")
        if action and revision not in ("main", repository.commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id", body)
        if action == "resolve":
            return self._resolve(repository, rest, body)
        found = sorted(file for file in repository.files.rglob("*") if file.is_file())
        entries = [_entry(file, repository.files) for file in found]
        if action == "tree":
            return self._json([entry for entry in entries if entry["path"].startswith(rest)], body)
        if action == "paths-info":
            wanted = parse_qs(form).get("paths", []) or json.loads(form or "{}").get("paths", [])
            return self._json([entry for entry in entries if entry["path"] in wanted], body)
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        about = {"id": name, "sha": repository.commit, "siblings": siblings, "private": False, "tags": []}
        return self._json({**about, "gated": "auto" if repository.gated else False, "downloads": 0, "likes": 0}, body)

    def _resolve(self, repository: Repository, name: str, body: bool) -> None:
        file = repository.files / name
        if repository.gated and not self.headers.get("Authorization"):
            return self._error(401, "GatedRepo", "Access to model is restricted", body)
        if not file.is_file():
            commit = {"X-Repo-Commit": repository.commit}
            return self._error(404, "EntryNotFound", "Entry not found", body, commit)
        sha, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{sha}"'}
        if file.suffix in (".safetensors", ".parquet"):  # large files lie elsewhere
            linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(size)}
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost") + f"/cdn{file}"
            return self._send(302, b"", {**headers, **linked, "Location": elsewhere}, body)
        return self._file(file, headers, body)

    def _file(self, file: Path, headers: dict[str, str], body: bool) -> None:
        content = file.read_bytes()
        headers = {**headers, "Accept-Ranges": "bytes"}
        status, total = 200, len(content)
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status, content = 206, content[start:]
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if body and self.hub.stalls_on is not None and self.hub.stalls_on in self.path:
            self._send(status, content[: len(content) // 2], {**headers, "Content-Length": str(len(content))}, True)
            self.hub.ended.wait()
            return
        self._send(status, content, headers, body)

    def _json(self, value: Any, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _error(self, status: int, code: str, text: str, body: bool, more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": text, **(more or {})}
        self._send(status, json.dumps({"error": text}).encode(), headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
            self.wfile.flush()


def _split(path: str) -> tuple[str, str, str]:
    """Kind, ``org/name`` and what follows, of an API path or of one to a file."""
    parts = path.strip("/").split("/")
    kind = "models"
    if parts[0] == "api":
        kind, parts = parts[1], parts[2:]
    elif parts[0] == "datasets":
        kind, parts = "datasets", parts[1:]
    return kind, "/".join(parts[:2]), "/".join(parts[2:])


def _entry(file: Path, root: Path) -> dict[str, Any]:
    oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
    return {"type": "file", "path": str(file.relative_to(root)), "size": file.stat().st_size, "oid": oid}
