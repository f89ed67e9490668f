"""As much of the Hub as loading a model asks for: one repository, from a folder, over HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Serve `folder` as REPOSITORY; yields the endpoint and the requests so far, (method, path) each."""
    requests: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing to standard error."""

        def do_HEAD(self) -> None:
            requests.append((self.command, self.path))
            for revision in ("main", COMMIT):
                prefix = f"/{REPOSITORY}/resolve/{revision}/"
                file = folder / self.path.removeprefix(prefix)
                if self.path.startswith(prefix) and file.is_file():
                    return self.answer(200, file.read_bytes())
            if self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                return self.answer(404, b"", "EntryNotFound")
            if self.path.startswith(f"/api/models/{REPOSITORY}"):
                return self.answer(
                    200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode()
                )
            return self.answer(404, b"", "EntryNotFound")

        def do_GET(self) -> None:
            self.do_HEAD()

        def answer(self, code: int, body: bytes, error: str = "") -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
