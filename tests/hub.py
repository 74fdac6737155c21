"""A local server that plays the hub for one model and one data set, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by kind and id: ``models/owner/name`` or ``datasets/owner/name`` to a folder."""

    repositories: dict[str, Path]
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        if path.startswith("/api/"):
            return self._api(path.removeprefix("/api/"))
        kind, rest = ("datasets", path[10:]) if path.startswith("/datasets/") else ("models", path[1:])
        owner, name, route, _, *parts = [*rest.split("/"), "", "", ""]
        folder = self.repositories.get(f"{kind}/{owner}/{name}")
        file = folder.joinpath(*[p for p in parts if p]) if folder and route == "resolve" else None
        if file is None or not file.is_file():
            return 404, {"X-Error-Code": "RepoNotFound" if folder is None else "EntryNotFound"}, b""
        body = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if file.suffix in (".safetensors", ".parquet"):
            # As the hub does for large files: they are to be had from its other storage as well, which no mirror has.
            headers["X-Xet-Hash"] = hashlib.sha256(body).hexdigest()
            headers["Link"] = f'<{self.url}/xet-read-token>; rel="xet-auth"'
        return 200, headers, body

    def _api(self, path: str) -> tuple[int, dict[str, str], bytes]:
        kind, owner, name, *rest = [*path.split("/"), "", ""]
        folder = self.repositories.get(f"{kind}/{owner}/{name}")
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        found: Any
        if rest[0] == "tree":
            below = "/".join(part for part in rest[2:] if part)
            found = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": hashlib.sha256(p.read_bytes()).hexdigest()}
                for n, p in zip(names, files, strict=True)
                if n.startswith(below)
            ]
        elif rest[0] == "paths-info":
            found = []
        else:
            found = {
                "id": f"{owner}/{name}", "sha": COMMIT, "private": False, "disabled": False, "gated": False,
                "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": n} for n in names],
            }  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


@contextmanager
def playing(repositories: dict[str, Path]) -> Iterator[Hub]:
    """The hub on a free port of this machine."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(path)
            status, headers, body = hub.answer(path)
            if self.command == "POST":
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
