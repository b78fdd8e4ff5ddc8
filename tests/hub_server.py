"""A small model hub on loopback: what huggingface_hub asks of the real one, and faults at will.

Source of the protocol: huggingface_hub's requests, https://huggingface.co/docs/hub/api and the
Git LFS batch API.
"""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".bin")


@dataclass
class Repository:
    """Commits by their hash, and the branches that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    token: str | None = None

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; returns the hash of the commit."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        content = {**before, **files}
        seed = repr((len(self.commits), sorted(content.items()))).encode()
        name = hashlib.sha1(seed).hexdigest()
        self.commits[name] = content
        self.branches[branch] = name
        return name


class Hub:
    """The server and what a test wants of it.

    Attributes:
        repositories: by ``org/name``.
        sent: bytes of content sent, by file name.
        requests: method and path of all requests, in order.
        tokens: the tokens that came along.
        break_after: send so many bytes of a file once, then cut the connection.
        damaged: names of files whose content goes out with one byte changed.
        short: names of files of which the last byte is not sent.
        status: answer everything with this.
        writer: the token that may write.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.sent: dict[str, int] = {}
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self.break_after: int | None = None
        self.damaged: set[str] = set()
        self.short: set[str] = set()
        self.status: int | None = None
        self.writer: str | None = None
        self.objects: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def repository(self, name: str, files: Mapping[str, bytes], **how: Any) -> Repository:
        """Make a repository with one commit on ``main``."""
        made = self.repositories[name] = Repository(**how)
        made.commit(files)
        return made

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        self._token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if self._token:
            self.hub.tokens.append(self._token)
        if self.hub.status is not None:
            self._fail(self.hub.status)
        elif self.command == "PUT":
            self.hub.objects[path.rsplit("/", 1)[1]] = body
            self._json({})
        elif self.command == "POST":
            self._write(path, body)
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._describe(name, revision or "main")
        else:
            name, _, rest = path[1:].partition("/resolve/")
            self._file(name, rest)

    def _readable(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._fail(404, "RepoNotFound")
        elif repository.gated and self._token != repository.token:
            self._fail(403, "GatedRepo")
        elif repository.token is not None and self._token != repository.token:
            self._fail(401, "RepoNotFound")
        else:
            return repository
        return None

    def _describe(self, name: str, revision: str) -> None:
        repository = self._readable(name)
        if repository is None:
            return
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._fail(404, "RevisionNotFound")
            return
        siblings = []
        for file, content in repository.commits[commit].items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(content)}
            entry["blobId"] = _git_sha1(content)
            if file.endswith(LFS_ENDINGS):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        self._json({"id": name, "sha": commit, "siblings": siblings, "private": repository.private})

    def _file(self, name: str, rest: str) -> None:
        repository = self._readable(name)
        if repository is None:
            return
        known = {**dict.fromkeys(repository.commits), **repository.branches}
        revision = next((r for r in known if rest.startswith(f"{r}/")), None)
        if revision is None:
            self._fail(404, "RevisionNotFound")
            return
        commit = repository.branches.get(revision, revision)
        file = rest.removeprefix(f"{revision}/")
        content = repository.commits[commit].get(file)
        if content is None:
            self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        lfs = file.endswith(LFS_ENDINGS)
        etag = hashlib.sha256(content).hexdigest() if lfs else _git_sha1(content)
        if file in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if file in self.hub.short and self.command == "GET":
            content = content[:-1]
        self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, file)

    def _send(self, content: bytes, headers: dict[str, str], file: str) -> None:
        asked = self.headers.get("Range")
        start, end = 0, len(content)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        part = content[start:end]
        cut = self.hub.break_after
        if cut is not None and cut < len(part):
            self.hub.break_after = None
            part = part[:cut]
            self.close_connection = True
        self.wfile.write(part)
        self.hub.sent[file] = self.hub.sent.get(file, 0) + len(part)

    def _write(self, path: str, body: bytes) -> None:
        if self.hub.writer is None or self._token != self.hub.writer:
            self._fail(403 if self._token else 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.hub.repositories:
                self._json({"url": f"{self.hub.url}/{name}"}, 409)
                return
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.repository(name, {}, private=private)
            self._json({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
            commit = self.hub.repositories[name].commit(files, branch)
            url = f"{self.hub.url}/{name}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "success": True})
        else:
            self._fail(404)

    def _fail(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._json({"error": code}, status, {**(headers or {}), "X-Error-Code": code})

    def _json(
        self, answer: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
