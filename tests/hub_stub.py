"""A Hugging Face Hub for tests: one process, in memory, standard library only.

It answers what `huggingface_hub` asks when it creates a repository or a branch, commits files (git blobs, and LFS objects in
one part or several), lists them, and downloads them. It keeps every request, and fails on request.

    with HUB:  # HF_ENDPOINT=HUB.url, HF_HUB_DISABLE_XET=1 before huggingface_hub is imported: tests/conftest.py
        HUB.fail("PUT /lfs", 503, times=2)

Not here: the xet protocol, rate limits, redirects to a CDN.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DROP, CUT = "drop", "cut"  # close the connection without an answer; in the middle of the body
EMPTY = "0" * 40  # the commit of an empty repository
Files = dict[str, tuple[bytes, str | None]]  # by path: content, and the LFS oid if it is an LFS file


def git_oid(content: bytes) -> str:
    """The name that git gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Branches point to commits; a commit is a whole table of files."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=lambda: {EMPTY: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})

    def at(self, revision: str | None = None) -> tuple[str, Files] | None:
        """-> the commit and its files; None for a revision that does not exist."""
        sha = self.branches.get(revision or "main", revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def commit(self, files: Files, branch: str = "main") -> str:
        """A new commit on the branch, with these files and no others."""
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def add(self, **files: bytes) -> str:
        """A commit that adds small files to main."""
        return self.commit(self.at()[1] | {name: (content, None) for name, content in files.items()})


@dataclass(frozen=True)
class Request:
    """One that the stub was sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """What to answer to requests that the pattern is found in. status: a status of HTTP, DROP or CUT."""

    pattern: re.Pattern
    status: int | str
    times: int


class HubStub(AbstractContextManager):
    """token: the only one that may write, and read private repositories. theirs: a namespace that it has no rights in."""

    def __init__(self, token: str, lfs_threshold: int = 20 * 1024, part_size: int | None = None) -> None:
        self.token, self.lfs_threshold, self.part_size = token, lfs_threshold, part_size
        self.theirs = "theirs"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.repos: dict[str, Repo] = {}
        self.gated: set[str] = set()  # repositories that nobody may read yet
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.on_commit: Callable[[Repo], object] = lambda repo: None  # called after each commit

    def fail(self, pattern: str, status: int | str = 500, times: int = 1) -> None:
        """Answer the next `times` requests whose "METHOD /path" has the pattern in it with an error."""
        self.faults.append(Fault(re.compile(pattern), status, times))

    def count(self, pattern: str) -> int:
        """Requests whose "METHOD /path" has the pattern in it."""
        return sum(bool(re.search(pattern, f"{r.method} {r.path}")) for r in self.requests)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository by path."""
        return {path: content for path, (content, _) in self.repos[repo].at(revision)[1].items()}

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubStub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    REPO = r"(?P<repo>[^/]+/[^/]+?)"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", "create_branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", rf"/api/models/{REPO}(?:/revision/(?P<rev>[^/]+))?", "repo_info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_put_part"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET|HEAD", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        self.body, split = self.read_body(), urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.cut = False
        self.hub.requests.append(Request(self.command, path, dict(self.headers), self.body))
        for fault in self.hub.faults:
            if fault.times > 0 and fault.pattern.search(f"{self.command} {path}"):
                fault.times -= 1
                if fault.status == DROP:
                    self.close_connection = True
                    return None
                if fault.status != CUT:
                    return self.reply({"error": "injected"}, fault.status)
                self.cut = True
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return self.answer(name, match.groupdict())
        return self.reply({"error": f"the stub has no {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def answer(self, name: str, arguments: dict) -> None:
        """Check rights and existence, then call the method of the route."""
        authorized = self.headers["Authorization"] == f"Bearer {self.hub.token}"
        repo = arguments.get("repo")
        write = self.command == "POST" and (repo or name == "create_repo")
        if write and not authorized:
            return self.reply({"error": "Invalid username or password."}, 401)
        if repo and write and repo.startswith(f"{self.hub.theirs}/"):
            return self.reply({"error": "You don't have the required permissions"}, 403)
        if repo:
            stored = self.hub.repos.get(repo)
            if stored is None or (stored.private and not authorized):
                return self.missing("RepoNotFound")
            if repo in self.hub.gated:
                return self.missing("GatedRepo")
            if name not in ("create_branch", "lfs_batch") and stored.at(arguments.get("rev")) is None:
                return self.missing("RevisionNotFound")
            arguments["repo"] = stored
        return getattr(self, name)(**arguments)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, payload: object, status: int = 200, **headers: object) -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for key, value in ({"Content_Type": "application/json", "Content_Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.close_connection = True

    def name_of(self, repo: Repo) -> str:
        return next(name for name, stored in self.hub.repos.items() if stored is repo)

    def missing(self, code: str, **headers: object) -> None:
        self.reply({"error": code}, 404, X_Error_Code=code, X_Error_Message=code, **headers)

    def log_message(self, *args: object) -> None:
        pass

    # -- writing ------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.reply({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo = f"{request['organization'] or 'tester'}/{request['name']}"
        if repo in self.hub.repos:
            return self.reply({"url": f"{self.hub.url}/{repo}", "id": repo}, 409)
        if repo.startswith(f"{self.hub.theirs}/"):
            return self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        self.hub.repos[repo] = Repo(private=request.get("visibility") == "private" or bool(request.get("private")))
        return self.reply({"url": f"{self.hub.url}/{repo}", "id": repo})

    def create_branch(self, repo: Repo, branch: str) -> None:
        exists = branch in repo.branches
        repo.branches.setdefault(branch, repo.branches["main"])
        self.reply({}, 409 if exists else 200)

    def validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def preupload(self, repo: Repo, rev: str) -> None:
        files = repo.at(rev)[1]
        answer = []
        for file in json.loads(self.body)["files"]:
            content, lfs = files.get(file["path"], (None, None))
            mode = "lfs" if file["size"] > self.hub.lfs_threshold else "regular"
            oid = None if content is None else lfs or git_oid(content)  # the client then leaves unchanged files out
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answer})

    def lfs_batch(self, repo: Repo) -> None:
        objects, part = [], self.hub.part_size
        for entry in json.loads(self.body)["objects"]:
            oid, size, href = entry["oid"], entry["size"], f"{self.hub.url}/lfs/{entry['oid']}"
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:  # an object that is here gets no `actions`: a second upload resumes the first
                upload: dict = {"href": href}
                if part and size > part:
                    urls = {str(i): f"{href}/{i}" for i in range(1, -(-size // part) + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(part), **urls}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        self.reply({"transfer": "multipart" if part else "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply({"error": "sha256 mismatch"}, 400)
        self.hub.blobs[oid] = self.body
        return self.reply({})

    def lfs_put_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.body
        self.reply({}, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def lfs_complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        self.lfs_put(oid)

    def lfs_verify(self, oid: str) -> None:
        size = json.loads(self.body)["size"]
        self.reply({}, 200 if len(self.hub.blobs.get(oid, b"")) == size else 404)

    def commit(self, repo: Repo, rev: str) -> None:
        files = dict(repo.at(rev)[1])
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), None)
            elif key == "lfsFile" and value["oid"] not in self.hub.blobs:
                return self.reply({"error": "LFS pointer to a missing object"}, 400)
            elif key == "lfsFile":
                files[value["path"]] = (self.hub.blobs[value["oid"]], value["oid"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.commit(files, rev)
        self.hub.on_commit(repo)
        url = f"{self.hub.url}/{self.name_of(repo)}/commit/{sha}"
        return self.reply({"success": True, "commitOid": sha, "commitUrl": url})

    # -- reading ------------------------------------------------------------------------------------------------------

    def repo_info(self, repo: Repo, rev: str | None) -> None:
        sha, files = repo.at(rev)
        name = self.name_of(repo)
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", (b"", None))[0].decode(), re.DOTALL)
        siblings = [{"rfilename": path} for path in files]
        data = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
        self.reply(data | ({"cardData": yaml.safe_load(card[1])} if card else {}))

    def tree(self, repo: Repo, rev: str, path: str | None) -> None:
        rows = []
        for name, (content, lfs) in sorted(repo.at(rev)[1].items()):
            if path and not name.startswith(f"{path}/"):
                continue
            row = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            rows.append(row | ({"lfs": {"oid": lfs, "size": len(content), "pointerSize": 134}} if lfs else {}))
        if path and not rows:
            return self.missing("EntryNotFound")
        return self.reply(rows)

    def resolve(self, repo: Repo, rev: str, path: str) -> None:
        sha, files = repo.at(rev)
        if path not in files:
            return self.missing("EntryNotFound", X_Repo_Commit=sha)
        content, lfs = files[path]
        headers = {
            "ETag": f'"{lfs or git_oid(content)}"',
            "X_Repo_Commit": sha,
            "Content_Type": "application/octet-stream",
        }
        begin = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range") or "")
        if begin is None:
            return self.reply(content, **headers)
        start = int(begin[1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.reply(content[start:], 206, Content_Range=span, **headers)


TOKEN = "hf_canaryCanaryCanaryCanary"  # looked for in all that is written, printed and sent
HUB = HubStub(TOKEN)
