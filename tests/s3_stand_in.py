"""A stand-in on loopback for S3 and for a gateway that tells places in it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from loraplex_models.s3_access import S3Access


class Bucket:
    """What the stand-in serves, and how it fails."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = objects or {}
        self.told: dict[str, tuple[str, dict[str, str]]] = {}  # path → the token it needs and what is answered
        self.status: int | None = None
        self.cut_at: int | None = None
        self.asked: list[tuple[str, str | None]] = []


@contextmanager
def running_s3(bucket: Bucket) -> Iterator[S3Access]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            bucket.asked.append((f"{self.command} {self.path}", self.headers["range"]))
            if self.path.startswith("/v2/"):
                self.tell()
                return
            content = bucket.objects.get(self.path)
            status = bucket.status or (404 if content is None else 200)
            if "Credential=key/" not in self.headers.get("authorization", ""):
                status = 403
            if status != 200 or content is None:
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            start = int((self.headers["range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("content-length", str(len(content) - start))
            self.send_header("etag", f'"{hashlib.md5(content).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                stop = len(content) if bucket.cut_at is None else start + bucket.cut_at
                self.wfile.write(content[start:stop])

        do_HEAD = do_GET

        def tell(self) -> None:
            token, answer = bucket.told.get(self.path, ("", {}))
            body = json.dumps(answer).encode()
            self.send_response(200 if answer and self.headers["authorization"] == f"Bearer {token}" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        yield S3Access(endpoint=address, access_key="key", secret_key="secret")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
