"""A hub on this machine: models and data sets as folders, over the hub's own HTTP interface, as
far as its client asks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Writes:
    """What a hub does for who uploads: repositories, large files (LFS), commits. One token is
    known, one user's names are free.
    """

    TOKEN, USER = "hf_good", "me"

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}  # large files by their digest
        self.private: dict[str, bool] = {}  # of each repository that was made
        self.messages: list[str] = []

    def answer(
        self, path: str, body: bytes, token: str | None, hub: Hub
    ) -> tuple[int, object] | None:
        """Status and body for a question that writes; None for any other."""
        parts = [part for part in path.split("/") if part]
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        is_write = (
            parts[:2] == ["api", "repos"]
            or parts[-1] == "batch"
            or parts[4:5] in (["preupload"], ["commit"])
        )
        if not is_write:
            return None
        if token != f"Bearer {self.TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if parts[-1] == "batch":
            return 200, self._batch(json.loads(body), hub)
        asked = json.loads(body.splitlines()[0])
        if parts[:2] == ["api", "repos"]:
            name = f"{asked.get('organization') or self.USER}/{asked['name']}"
            if not name.startswith(f"{self.USER}/"):
                return 403, {
                    "error": "You don't have the rights to create a model under this namespace"
                }
            (hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
            if name in self.private:
                return 409, {
                    "error": "You already created this model repo",
                    "url": f"{hub.address}/{name}",
                }
            self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return 200, {"url": f"{hub.address}/{name}", "name": name, "id": name}
        folder = hub.root / "models" / "/".join(parts[2:4])
        if parts[4] == "preupload":
            large = (".safetensors",)
            modes = [
                "lfs" if file["path"].endswith(large) else "regular" for file in asked["files"]
            ]
            files = zip(asked["files"], modes, strict=True)
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                    for f, mode in files
                ]
            }
        return 200, self._commit(folder, body, hub)

    def _batch(self, asked: dict, hub: Hub) -> dict:
        where = [(one, f"{hub.address}/stored/{one['oid']}") for one in asked["objects"]]
        found = [
            {**one, "actions": {"upload": {"href": href, "header": {}}}} for one, href in where
        ]
        return {"transfer": "basic", "objects": found}

    def _commit(self, folder: Path, body: bytes, hub: Hub) -> dict:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
                continue
            file = folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            data = (
                base64.b64decode(value["content"])
                if line["key"] == "file"
                else self.stored[value["oid"]]
            )
            file.write_bytes(data)
        return {
            "success": True,
            "commitOid": COMMIT,
            "commitUrl": f"{hub.address}/{folder.parent.name}/{folder.name}/commit/{COMMIT}",
        }


class Hub:
    """Serves ``root/models/<owner>/<name>`` and ``root/datasets/<owner>/<name>``; names in
    ``gated`` are refused.
    """

    def __init__(self, root: Path, gated: tuple[str, ...] = ()) -> None:
        self.root, self.gated = root, gated
        self.asked: list[str] = []
        self.writes = Writes()
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
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if (
            answer := self.hub.writes.answer(
                path, body, self.headers.get("Authorization"), self.hub
            )
        ) is None:
            self._answer()
        else:
            self.hub.asked.append(f"POST {path}")
            self._send(
                answer[0],
                {"Content-Type": "application/json"},
                json.dumps(answer[1]).encode(),
                True,
            )

    def do_PUT(self) -> None:
        self.hub.writes.stored[urlsplit(self.path).path.rsplit("/", 1)[-1]] = self._body()
        self._send(200, {}, b"", True)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

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
            self._send(
                403,
                {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"},
                b"{}",
                has_body,
            )
        elif not folder.is_dir():
            self._send(
                404,
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
                b"{}",
                has_body,
            )
        elif is_api:
            self._api(folder, name, rest, has_body)
        else:
            self._file(folder / "/".join(rest[2:]), rest, has_body)

    def _api(self, folder: Path, name: str, rest: list[str], has_body: bool) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] in (["revision"], ["tree"], ["paths-info"]) and rest[1] not in ("main", COMMIT):
            self._send(
                404,
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"},
                b"{}",
                has_body,
            )
            return
        if rest[:1] in (["tree"], ["paths-info"]):
            below = "/".join(rest[2:])
            found = [
                {
                    "type": "file",
                    "path": str(file.relative_to(folder)),
                    "size": file.stat().st_size,
                    "oid": _digest(file),
                }
                for file in files
                if str(file.relative_to(folder)).startswith(below)
            ]
            self._send(
                200, {"Content-Type": "application/json"}, json.dumps(found).encode(), has_body
            )
            return
        siblings = [
            {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size}
            for file in files
        ]
        info = {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "private": self.hub.writes.private.get(name, False),
            "tags": [],
            "downloads": 0,
        }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), has_body)

    def _file(self, file: Path, rest: list[str], has_body: bool) -> None:
        if rest[1] not in ("main", COMMIT):
            self._send(
                404,
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"},
                b"",
                has_body,
            )
        elif not file.is_file():
            self._send(
                404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", has_body
            )
        else:
            headers = {
                "ETag": f'"{_digest(file)}"',
                "X-Repo-Commit": COMMIT,
                "Content-Type": "application/octet-stream",
            }
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
