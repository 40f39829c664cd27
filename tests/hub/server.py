"""A small Hub on 127.0.0.1: repositories with commits, LFS objects, a search; and faults that a test asks for.

It speaks what huggingface_hub's client speaks over HTTP, without Xet. Like the Hub it never serves a commit of which an
object is missing, and an object is kept only whole.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".png", ".bin")


@dataclass
class Repo:
    """Commits by their hash, oldest first: files by path, each its bytes and whether they are an LFS object."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def add(self, files: dict[str, tuple[bytes, bool]], message: str) -> str:
        content = repr((len(self.commits), message, sorted((p, oid(*f)) for p, f in files.items())))
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = files
        self.messages.append(message)
        return name


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD path` matches."""

    match: str
    kind: str  # a status such as "503"; cut: the answer stops half way; drop: the connection closes in mid-request;
    # lost: done, but the answer is never sent; etag: another hash is named; garble: other bytes of the same length
    times: int = 1
    body: str = ""


def oid(data: bytes, lfs: bool) -> str:
    """As git and LFS name a file's content."""
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """The server; `with Hub() as hub` starts it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {"hf_" + "a" * 34: "ann"}
        self.role = "write"
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "Hub":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, match: str, kind: str, times: int = 1, body: str = "") -> None:
        self.faults.append(Fault(match, kind, times, body))

    def take(self, call: str) -> Fault | None:
        with self.lock:
            self.calls.append(call)
            for fault in self.faults:
                if fault.times and re.search(fault.match, call):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    fault: Fault | None

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):  # the client or a fault has closed the connection
            self.close_connection = True

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.fault = self.hub.take(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.kind == "drop":
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(size)
        if self.fault and self.fault.kind.isdigit():
            echo = self.fault.body.replace("{authorization}", self.headers.get("Authorization") or "")
            self.send(int(self.fault.kind), {"error": echo or "asked for"})
            return
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command.replace("HEAD", "GET") and found:
                action(self, body, *found.groups())
                return
        self.send(404, {"error": f"no route for {self.command} {path}"})

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault and self.fault.kind == "lost":
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.fault and self.fault.kind == "cut":
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

    def user(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def repo(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository, or None when an error has been sent instead."""
        repo, mine = self.hub.repos.get(name), self.user() == name.partition("/")[0]
        if write and self.user() is None:
            self.send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid username or password."})
        elif repo is None or (repo.private and not mine):
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif write and not mine:
            self.send(403, {"error": "You don't have the rights"})
        else:
            return repo
        return None

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        found = repo.head if revision == "main" else revision
        if found in repo.commits:
            return found
        self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def whoami(self, body: bytes) -> None:
        user = self.user()
        if user is None:
            self.send(401, {"error": "Invalid credentials"})
        else:
            self.send(200, {"type": "user", "name": user, "auth": {"accessToken": {"role": self.hub.role}}})

    def create(self, body: bytes) -> None:
        asked, user = json.loads(body), self.user()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if user is None:
            self.send(401, {"error": "Invalid credentials"})
        elif name.partition("/")[0] != user:
            self.send(403, {"error": f"You don't have the rights to create a model under {asked['organization']}"})
        elif name in self.hub.repos:
            self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            repo = Repo(private=asked.get("visibility") == "private" or asked.get("private", False))
            repo.add({".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}, "initial")
            self.hub.repos[name] = repo
            self.send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.S)
        try:
            read = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            self.send(400, {"errors": [{"message": str(error)}]})
            return
        named = all("name" in model for model in read.get("model-index", []))
        self.send(200, {"errors": [], "warnings": [] if named else [{"message": "model-index without names"}]})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        commit = repo and self.commit_of(repo, revision)
        if repo and commit:
            siblings = [{"rfilename": path} for path in repo.commits[commit]]
            self.send(200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})

    def preupload(self, body: bytes, name: str) -> None:
        repo = self.repo(name, write=True)
        if repo:
            files, held = [], repo.commits[repo.head]
            for file in json.loads(body)["files"]:
                path = file["path"]
                row = {"path": path, "shouldIgnore": False, "uploadMode": "lfs" if path.endswith(LFS) else "regular"}
                files.append({**row, "oid": oid(*held[path]) if path in held else None})
            self.send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.repo(name, write=True):
            objects = []
            for asked in json.loads(body)["objects"]:
                if asked["oid"] not in self.hub.objects:
                    actions = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}?signature=s3cret"}}
                    asked = {**asked, "actions": actions}
                objects.append(asked)
            self.send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, name: str) -> None:
        if hashlib.sha256(body).hexdigest() != name:
            self.send(400, {"error": "checksum"})
        else:
            self.hub.objects[name] = body
            self.send(200)

    def commit(self, body: bytes, name: str) -> None:
        repo = self.repo(name, write=True)
        if repo is None:
            return
        rows = [json.loads(line) for line in body.splitlines()]
        header = rows[0]["value"]
        files = dict(repo.commits[repo.head])
        if header.get("parentCommit", repo.head) != repo.head:
            self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.send(400, {"error": f"LFS pointer of {value['path']} points to a file that does not exist"})
                    return
                files[value["path"]] = (self.hub.objects[value["oid"]], True)
            else:
                self.send(400, {"error": f"unknown operation {row['key']}"})
                return
        oid = repo.add(files, header["summary"])
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repo = self.repo(name)
        commit = repo and self.commit_of(repo, revision)
        if repo and commit:
            self.send(200, [_entry(path, *file) for path, file in repo.commits[commit].items()])

    def no_folder(self, body: bytes, name: str, revision: str, folder: str) -> None:
        """Datasets here have their files at the top; that is asked for a folder `data` all the same."""
        self.send(404, {}, {"X-Error-Code": "EntryNotFound"})

    def paths(self, body: bytes, name: str, revision: str) -> None:
        repo = self.repo(name)
        commit = repo and self.commit_of(repo, revision)
        if repo and commit:
            wanted, files = parse_qs(body.decode())["paths"], repo.commits[commit]
            self.send(200, [_entry(path, *files[path]) for path in wanted if path in files])

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        commit = repo and self.commit_of(repo, revision)
        if not repo or not commit:
            return
        if path not in repo.commits[commit]:
            self.send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data, lfs = repo.commits[commit][path]
        named = oid(data, lfs)
        if self.fault and self.fault.kind == "etag":
            named = named[::-1]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{named}"'}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{named}"', "X-Linked-Size": str(len(data))}
        if self.fault and self.fault.kind == "garble":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            at, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers |= {"Content-Range": f"bytes {at}-{last}/{len(data)}"}
            self.send(206, data[at : last + 1], headers)
        else:
            self.send(200, data, headers)

    def search(self, body: bytes) -> None:
        rows = []
        for name, repo in self.hub.repos.items():
            card = repo.commits[repo.head].get("README.md", (b"", False))[0].decode()
            head = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
            tags = [*head.get("tags", []), head.get("library_name"), head.get("pipeline_tag")]
            if head.get("base_model"):
                tags += [f"base_model:{head['base_model']}", f"base_model:adapter:{head['base_model']}"]
            wanted = [*self.query.get("filter", []), *self.query.get("pipeline_tag", [])]
            text = self.query.get("search", [""])[0].lower()
            if not repo.private and set(wanted) <= set(tags) and text in name.lower():
                tags = [tag for tag in tags if tag]
                rows.append({"id": name, "tags": tags, "pipeline_tag": head.get("pipeline_tag"), "downloads": 3})
        self.send(200, rows)


def _entry(path: str, data: bytes, lfs: bool) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": oid(data, False)}
    return {**entry, "lfs": {"oid": oid(data, True), "size": len(data), "pointerSize": 134}} if lfs else entry


_NAME = r"([\w.-]+/[\w.-]+)"
_DATASET = r"(datasets/[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", "/api/models", Handler.search),
    ("GET", f"/api/models/{_NAME}", Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/([^/]+)", Handler.info),
    ("POST", f"/api/models/{_NAME}/preupload/main", Handler.preupload),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.put),
    ("POST", f"/api/models/{_NAME}/commit/main", Handler.commit),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{_NAME}/paths-info/([^/]+)", Handler.paths),
    ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", f"/api/{_DATASET}", Handler.info),
    ("GET", f"/api/{_DATASET}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/{_DATASET}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/{_DATASET}/tree/([^/]+)/(.+)", Handler.no_folder),
    ("POST", f"/api/{_DATASET}/paths-info/([^/]+)", Handler.paths),
    ("GET", f"/{_DATASET}/resolve/([^/]+)/(.+)", Handler.resolve),
]
