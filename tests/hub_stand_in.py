"""A hub on this machine: models and data sets as folders, over the hub's own HTTP interface, as far as its client asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves ``root/models/<owner>/<name>`` and ``root/datasets/<owner>/<name>``; names in ``gated`` are refused."""

    def __init__(self, root: Path, gated: tuple[str, ...] = ()) -> None:
        self.root, self.gated = root, gated
        self.asked: list[str] = []
        self.address = ""

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self, has_body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = [part for part in path.split("/") if part]
        is_api = parts[:1] == ["api"]
        parts = parts[is_api:]
        kind = parts.pop(0) if parts[:1] in (["datasets"], ["models"]) else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.hub.root / kind / name
        if name in self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}", has_body)
        elif not folder.is_dir():
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}", has_body)
        elif is_api:
            self._api(folder, name, rest, has_body)
        else:
            self._file(folder / "/".join(rest[2:]), rest, has_body)

    def _api(self, folder: Path, name: str, rest: list[str], has_body: bool) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] in (["revision"], ["tree"], ["paths-info"]) and rest[1] not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}", has_body)
            return
        if rest[:1] in (["tree"], ["paths-info"]):
            below = "/".join(rest[2:])
            found = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _digest(file)}
                for file in files
                if str(file.relative_to(folder)).startswith(below)
            ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(found).encode(), has_body)
            return
        siblings = [{"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), has_body)

    def _file(self, file: Path, rest: list[str], has_body: bool) -> None:
        if rest[1] not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"", has_body)
        elif not file.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", has_body)
        else:
            headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/octet-stream"}
            self._send(200, headers, file.read_bytes(), has_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, has_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
