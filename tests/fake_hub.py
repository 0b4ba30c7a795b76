"""A hub on loopback: the requests huggingface_hub makes, answered from a directory, and counted."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One repository: its commits by sha, its branches and tags, and who may read it."""

    commits: dict[str, Path]
    refs: dict[str, str]
    token: str | None = None
    gated: bool = False


@dataclass
class Request:
    method: str
    repo: str
    revision: str
    file: str
    authorization: str | None
    range: str | None
    status: int = 0
    sent: int = 0


@dataclass
class FakeHub:
    """Use as a context manager; `endpoint` is what HF_ENDPOINT has to be.

    Attributes
    ----------
    requests : list of Request
        What was asked and how many bytes of content were sent, in order.
    serves_ranges : bool
        Set to False to answer range requests with whole files, as some mirrors do.
    break_after : int or None
        Close the connection of the next range request after so many bytes.
    """

    repositories: dict[str, Repository]
    requests: list[Request] = field(default_factory=list)
    serves_ranges: bool = True
    break_after: int | None = None

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def sent(self, suffix: str = ".safetensors") -> int:
        """Bytes of content sent of files with this ending."""
        return sum(request.sent for request in self.requests if request.file.endswith(suffix))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            self._error(404, "EntryNotFound")
            return
        repo, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        request = Request(
            self.command, repo, revision, file, self.headers.get("Authorization"), self.headers.get("Range")
        )
        self.hub.requests.append(request)
        request.status = self._file(request)

    def _file(self, request: Request) -> int:
        repository = self.hub.repositories.get(request.repo)
        allowed = repository is not None and request.authorization in (
            (None, f"Bearer {repository.token}") if repository.token is None else (f"Bearer {repository.token}",)
        )
        if repository is None or not (allowed or repository.gated):
            return self._error(401, "RepoNotFound")
        if not allowed:
            return self._error(403, "GatedRepo")
        commit = repository.refs.get(request.revision, request.revision)
        if commit not in repository.commits:
            return self._error(404, "RevisionNotFound")
        path = repository.commits[commit] / request.file
        if not path.is_file():
            return self._error(404, "EntryNotFound", commit)
        return self._send(path, commit, request)

    def _send(self, path: Path, commit: str, request: Request) -> int:
        size = path.stat().st_size
        start, end, status = 0, size, 200
        if request.range and self.hub.serves_ranges:
            first, _, last = request.range.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last) + 1 if last else size, size), 206
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{hashlib.sha1(str(path).encode(), usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return status
        broken, self.hub.break_after = (
            (self.hub.break_after, None) if status == 206 else (None, self.hub.break_after)
        )
        with path.open("rb") as opened:
            opened.seek(start)
            data = opened.read(end - start if broken is None else broken)
        request.sent = len(data)
        self.wfile.write(data)
        if broken is not None:
            self.close_connection = True
        return status

    def _error(self, status: int, code: str, commit: str | None = None) -> int:
        body = json.dumps({"error": code}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", str(len(body)))
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return status
