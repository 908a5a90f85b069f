"""A server on this machine that answers as the hub does, for repositories that are folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `root/owner/name` at its revision "main"; those in `gated` only to look at."""

    def __init__(self, root: Path, gated: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.gated = root, gated
        self.sent: list[str] = []  # the files that were downloaded

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, rest = "/".join(parts[2:4]), parts[4:] or ["revision", "main"]
        else:
            repository, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.root / repository
        if not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        if len(rest) < 2 or rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path for path in files}
        if rest[0] == "revision":
            siblings = [{"rfilename": name} for name in names]
            return self.answer({"id": repository, "sha": COMMIT, "siblings": siblings})
        if rest[0] == "tree":
            return self.answer(
                [
                    {"type": "file", "oid": digest(path), "size": path.stat().st_size, "path": name}
                    for name, path in names.items()
                ]
            )
        if repository in self.server.gated:
            return self.refuse(403, "GatedRepo")
        name = "/".join(rest[2:])
        if name not in names:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.sent.append(name)
        return self.answer(names[name].read_bytes(), ETag=f'"{digest(names[name])}"')

    def answer(self, content: object, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def hub_server(root: Path, gated: tuple[str, ...] = ()) -> Iterator[Hub]:
    server = Hub(root, gated)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
