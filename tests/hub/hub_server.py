"""As much of the Hub as publishing and loading asks for: repositories with commits, LFS files, and bad days."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_ThisIsTheTestsOwnSecret"
_LFS = (".safetensors", ".pt", ".parquet")
_DATASETS = "datasets/"


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    """(id, message, all files) of each, the newest last."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha

    def at(self, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By user/name, those of datasets by datasets/user/name."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded whole, by its SHA-256."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each."""
    down: bool = False
    """Answer 503 to everything."""
    failing: float = 0.0
    """This share of all requests is answered by 503, no answer at all, or half of one."""
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    outage: int = 0
    """So many requests that come next are answered by 503."""
    num_failed: int = 0
    drops: int = 0
    """So many uploads are cut off in their middle."""
    drop_commits: int = 0
    """So many commits are cut off before anything is done."""
    refuses_writes: bool = False
    hold: threading.Event | None = None
    """Uploads wait for it."""

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to standard error."""

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if self.command == "PUT":
            return self.upload(path.rpartition("/")[2])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.down:
            return self.answer(503, b"", {"X-Error-Message": "maintenance"})
        if hub.outage or hub.chance.random() < hub.failing:
            return self.fail()
        if path == "/api/validate-yaml":
            return self.validate(**json.loads(body))
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}" and not hub.refuses_writes
        reads = "/paths-info/" in path
        if ((self.command == "POST" and not reads) or path.endswith("/auth-check/write")) and not may_write:
            return self.answer(
                403 if hub.refuses_writes else 401, b"", {"X-Error-Message": "no write access"}
            )
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        for kind, prefix in (("models", ""), ("datasets", _DATASETS)):
            if path.startswith(f"/api/{kind}/"):
                return self.api(prefix, path.removeprefix(f"/api/{kind}/").split("/"), body)
        prefix = _DATASETS if path.startswith(f"/{_DATASETS}") else ""
        return self.resolve(prefix, path.removeprefix(f"/{prefix}").split("/", 4))

    def answer(self, code: int, body: bytes | Any, headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        length = str(len(body))
        for name, value in {"Content-Length": length, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self) -> None:
        """As a server on a bad day: an answer that says so, none, or one that breaks off."""
        hub = self.hub
        hub.num_failed += 1
        kind = 0 if hub.outage else hub.chance.randrange(3)
        hub.outage = max(0, hub.outage - 1)
        if kind == 0:
            return self.answer(503, b"", {"X-Error-Message": "overloaded"})
        if kind == 1 and self.command != "HEAD":
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"[" * 50_000)
        return self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def create(self, asked: dict[str, Any]) -> None:
        prefix = _DATASETS if asked.get("type") == "dataset" else ""
        repo_id = f"{prefix}{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return self.answer(409, url)
        repository = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        repository.commit("initial commit", {".gitattributes": b""})
        self.hub.repositories[repo_id] = repository
        return self.answer(200, url)

    def validate(self, content: str, repoType: str) -> None:
        head = yaml.safe_load(content.split("---\n")[1])
        keys = ("library_name", "license") if repoType == "model" else ()
        wrong = [key for key in keys if not isinstance(head.get(key), str) or head[key] == "no-such"]
        self.answer(
            200 if not wrong else 400, {"errors": [{"message": key} for key in wrong], "warnings": []}
        )

    def batch(self, asked: dict[str, Any]) -> None:
        assert "xet" not in asked["transfers"]
        objects = []
        for wanted in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else {"actions": upload}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        hub, size = self.hub, int(self.headers["Content-Length"])
        if hub.hold is not None:
            hub.hold.wait(60)
        if hub.drops:
            hub.drops -= 1
            self.rfile.read(size // 2)
            return self.hang_up()
        content = self.rfile.read(size)
        if hub.down or len(content) < size or hashlib.sha256(content).hexdigest() != oid:
            return self.answer(503, b"")
        hub.objects[oid] = content
        return self.answer(200, b"")

    def api(self, prefix: str, parts: list[str], body: bytes) -> None:
        repo_id = prefix + "/".join(parts[:2])
        repository = self.visible(repo_id)
        if repository is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        what, revision = (*parts[2:4], "", "main")[:2]
        if what == "auth-check":
            return self.answer(200, b"")
        commit = repository.at(revision or "main")
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sha, _, files = commit
        if what in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            facts = {
                "id": "/".join(parts[:2]),
                "sha": sha,
                "private": repository.private,
                "siblings": siblings,
            }
            return self.answer(200, facts)
        if what == "tree":
            return self.tree(
                files, "/".join(parts[4:]), "recursive=true" in urlsplit(self.path).query.lower()
            )
        if what == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return self.answer(200, [self.entry(name, files[name]) for name in asked if name in files])
        if what == "preupload":
            return self.preupload(files, json.loads(body)["files"])
        assert what == "commit" and revision == "main"
        return self.commit(repository, repo_id, [json.loads(line) for line in body.splitlines()])

    def visible(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        hidden = repository is not None and repository.private
        return None if hidden and self.headers.get("Authorization") != f"Bearer {TOKEN}" else repository

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        below = {
            name: content
            for name, content in files.items()
            if f"/{name}".startswith(f"/{folder}".rstrip("/") + "/")
        }
        if not below and folder:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        depth = len(folder.split("/")) + 1 if folder else 1
        direct = {name: content for name, content in below.items() if recursive or name.count("/") < depth}
        folders = {"/".join(name.split("/")[:depth]): None for name in below if name not in direct}
        oid = hashlib.sha1(folder.encode()).hexdigest()
        entries = [{"type": "directory", "path": name, "oid": oid} for name in folders]
        return self.answer(200, entries + [self.entry(name, content) for name, content in direct.items()])

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        if name.endswith(_LFS):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return entry

    def preupload(self, files: dict[str, bytes], asked: list[dict[str, Any]]) -> None:
        modes = []
        for file in asked:
            name, lfs = file["path"], file["path"].endswith(_LFS)
            mode = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if name in files:
                entry = self.entry(name, files[name])
                mode["oid"] = entry["lfs"]["oid"] if lfs else entry["oid"]
            modes.append(mode)
        self.answer(200, {"files": modes})

    def commit(self, repository: Repository, repo_id: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.drop_commits:
            self.hub.drop_commits -= 1
            return self.hang_up()
        files, message = dict(repository.files), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        sha = repository.commit(message, files)
        return self.answer(
            200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}
        )

    def resolve(self, prefix: str, parts: list[str]) -> None:
        """user, name, "resolve", revision, path."""
        repository = self.visible(prefix + "/".join(parts[:2]))
        if repository is None or len(parts) < 5:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repository.at(parts[3])
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sha, _, files = commit
        if parts[4] not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = files[parts[4]]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first >= len(content):
            return self.answer(416, b"")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], headers)


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub without repositories, on a port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
