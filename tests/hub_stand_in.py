"""A stand-in for the hub on loopback: repositories in memory, and the ways in which a hub can fail."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """The files of one repository at one commit, and who may read them."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    token: str | None = None  # needed to read it, when set
    lfs: bool = False  # its files are named by their sha256
    private: bool = False  # as the hub does, it is hidden from whoever has not that token

    @property
    def commit(self) -> str:
        """A commit id of 40 hexadecimal digits that follows from the content."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What the stand-in serves, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    endpoint: str = ""
    status: int | None = None  # answered to everything, when set
    cut_downloads_at: int | None = None  # bytes of an answer after which the connection is closed, when set
    piece_pause_s: float = 0.0  # between pieces of 1 kB
    may_go_on: Event = field(default_factory=Event)  # no answer has a body before this is set
    cuts: list[int] = field(default_factory=list)  # the same for the next downloads, one by one
    damage_downloads: bool = False
    requests: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)  # where downloads went on

    def downloaded(self) -> set[str]:
        """The names of the files whose bytes were asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in self.requests if path.startswith("GET /") and
                "/resolve/" in path}  # fmt: skip


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                hub.may_go_on.wait()
                step = 1024 if hub.piece_pause_s else len(body) or 1
                for start in range(0, len(body), step):
                    time.sleep(hub.piece_pause_s)
                    self.wfile.write(body[start : start + step])

        def _answer_json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _repository(self, name: str) -> Repository | None:
            repository = hub.repositories.get(name)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if repository is None:
                self._refuse(404, "RepoNotFound")
            elif repository.private and token != repository.token:
                # The hub says 401 to those without a token and 404 to those with one: there is no such repository.
                self._refuse(404 if token else 401, "RepoNotFound")
                return None
            elif repository.gated and token != repository.token:
                self._refuse(401, "GatedRepo")
            elif repository.token is not None and token != repository.token:
                self._refuse(403, "")
            else:
                return repository
            return None

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.status is not None:
                self._answer(hub.status)
            elif path.startswith("/api/models/"):
                self._serve_api(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                self._serve_file(*path.removeprefix("/").split("/resolve/"))
            else:
                self._answer(404)

        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):  # whoever asked has left
                self._serve()

        do_HEAD = do_GET

        def _serve_api(self, path: str) -> None:
            name, kind, revision = path, "", "main"
            for word in ("revision", "tree"):
                if f"/{word}/" in path:
                    name, revision = path.split(f"/{word}/")
                    kind = word
            repository = self._repository(name)
            if repository is None:
                return
            if revision not in (*repository.revisions, repository.commit):
                self._refuse(404, "RevisionNotFound")
            elif kind == "tree":
                self._answer_json([
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in repository.files.items()
                ])  # fmt: skip
            else:
                self._answer_json({
                    "id": name,
                    "sha": repository.commit,
                    "siblings": [{"rfilename": file} for file in repository.files],
                    "private": repository.private,
                    "gated": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                })  # fmt: skip

        def _serve_file(self, name: str, place: str) -> None:
            repository = self._repository(name)
            if repository is None:
                return
            content = repository.files.get(place.split("/", 1)[1])
            if content is None:
                self._refuse(404, "EntryNotFound")
                return
            status, start = 200, 0
            headers = {
                "ETag": f'"{(hashlib.sha256 if repository.lfs else hashlib.sha1)(content).hexdigest()}"',
                "X-Repo-Commit": repository.commit,
                "Accept-Ranges": "bytes",
            }
            if "Range" in self.headers:
                status, start = 206, int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
                hub.resumed_at.append(start)
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers["Content-Length"] = str(len(content) - start)
            if self.command == "GET" and hub.damage_downloads:
                content = bytes(len(content))
            cut = hub.cuts.pop(0) if self.command == "GET" and hub.cuts else hub.cut_downloads_at
            if self.command == "GET" and cut is not None:
                content = content[: start + cut]
                self.close_connection = True
            self._answer(status, content[start:], headers)

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub without repositories on a free port of 127.0.0.1."""
    hub = Hub()
    hub.may_go_on.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.may_go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
