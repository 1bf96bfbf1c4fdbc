"""A Hugging Face Hub on loopback: what the real clients call, answered from memory, with faults on demand.

    with HubDouble() as hub:
        hub.put("someone/model", {"config.json": "{}"})              # prepare a repository without a client
        hub.fail_next("PUT /cdn/", status=500, times=2)               # the next two uploads fail
        done = hub.client(tmp_path / "home", "import huggingface_hub as h; h.snapshot_download('someone/model')")
        hub.commits("someone/model"), hub.files("someone/model"), hub.requests("GET .*/resolve/")

It listens on three ports, as the Hub does on three hosts: `hub.url`, which wants tokens; a content server for large
files (`hub.cdn`: signed addresses, and like S3 it refuses a request that also carries a token, so a leaked token fails
loudly); and the server of Xet storage (`hub.cas`, with tokens of its own). Large files travel by LFS for clients with
HF_HUB_DISABLE_XET=1, by Xet for the others: `hub.env(xet=True)`. huggingface_hub reads its environment when imported,
so each client runs in an interpreter of its own, with a cache of its own (`hub.env`, `hub.client`). By hand:

    python tests/hub_double.py --port 0
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import fnmatch
import hashlib
import json
import math
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from xet_double import XetStore, byte_range

LFS_FROM = 10 * 2**20  # bytes: what is larger travels by LFS, whatever its name
LFS_NAMES = (
    "*.arrow *.bin *.ckpt *.gz *.h5 *.npy *.npz *.onnx *.parquet *.pkl *.pt *.pth *.safetensors *.tar *.zip *.zst"
)
GITATTRIBUTES = re.sub(r"(\S+) ?", r"\1 filter=lfs diff=lfs merge=lfs -text\n", LFS_NAMES)


# --- what a Hub holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One version of one file. A hostile Hub may claim another size (in bytes) than it sends."""

    content: bytes
    lfs: bool = False
    claimed_size: int | None = None

    @property
    def size(self) -> int:
        return len(self.content) if self.claimed_size is None else self.claimed_size

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A snapshot: nothing in it changes after it is made."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    date: str
    status: str
    base: str | None  # of a pull request: the commit it was opened from
    events: list[dict[str, Any]] = field(default_factory=list)
    merged_as: str | None = None


@dataclass
class Repo:
    id: str
    kind: str = "model"  # "model", "dataset" or "space"
    private: bool = False
    gated: Any = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit
    lfs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content, committed or not
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def ref(self, revision: str) -> str:
        """The full name of the reference that `revision` names."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return name
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request, a commit id, or at least 7 letters of one."""
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[found[0] if len(found) == 1 else self.refs[self.ref(revision)]]

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def commit(
        self, ref: str, files: Mapping[str, File], title: str, message: str = "", author: str = "system"
    ) -> Commit:
        parent = self.refs.get(ref)
        tree = sorted((path, file.git_oid) for path, file in files.items())
        oid = hashlib.sha1(repr((self.path, len(self.commits), parent, title, tree)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author, now(), dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def open_discussion(self, title: str, author: str, status: str, base: str | None) -> Discussion:
        self.discussions.append(Discussion(len(self.discussions) + 1, title, author, now(), status, base))
        if base is not None:
            self.refs[f"refs/pr/{len(self.discussions)}"] = base
        return self.discussions[-1]


@dataclass(frozen=True)
class User:
    name: str
    role: str  # of the token: "write" or "read"
    orgs: tuple[str, ...] = ()

    def belongs(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.orgs)


@dataclass
class Fault:
    """What goes wrong with a request whose "METHOD /path?query" `match` (a regular expression) finds."""

    match: str
    status: int = 0  # answer this, and do nothing
    times: int = 1
    skip: int = 0  # let so many matching requests pass first
    retry_after: int | None = None  # seconds
    headers: dict[str, str] = field(default_factory=dict)  # override those of the answer
    body: bytes | None = None  # overrides that of the answer
    truncate_to: int | None = None  # a shorter body of matching Content-Length
    drop_upload_after: int | None = None  # close the connection after reading so many bytes of the body
    drop_download_after: int | None = None  # close it after sending so many bytes of the body
    lose_response: bool = False  # do what is asked, then close the connection without a word
    delay: float = 0.0  # seconds
    hits: int = 0


@dataclass(frozen=True)
class Call:
    """A request as it arrived, and in `hub.log` as it was answered (`status` 0: the connection was dropped)."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # lower-case names
    body: bytes = b""
    host: str = ""  # "", "cdn" or "cas"
    user: User | None = None
    status: int = 0

    @property
    def token(self) -> str | None:
        return bearer(self.headers)

    @property
    def target(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Reply:
    content: Any = b""  # bytes, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is not what was asked for."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] = {}, body: Mapping[str, str] = {}
    ):
        super().__init__(message)
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.reply = Reply({"error": message, **body}, status, named)


def bearer(headers: Mapping[str, str]) -> str | None:
    return headers.get("authorization", "").removeprefix("Bearer ") or None


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# --- the server -----------------------------------------------------------------------------------------------------


class HubDouble:
    """The Hub, the users it knows (`token` writes, `read_token` reads, both of `user`), and a log of what it was
    asked.
    """

    def __init__(self, port: int = 0, user: str = "someone", part_size: int = 6 * 2**20, page_size: int = 1000):
        self.user, self.part_size, self.page_size = user, part_size, page_size
        self.repos: dict[str, Repo] = {}  # by path: "ns/model", "datasets/ns/data"
        self.log: list[Call] = []
        self.faults: list[Fault] = []
        self.crashes: list[str] = []  # errors of the double itself; leaving the context reports them
        self.uploads: dict[str, SimpleNamespace] = {}
        self.users: dict[str, User] = {}
        self.token, self.read_token = self.add_user(user), self.add_user(user, role="read")
        self.lock = threading.RLock()
        self.secret = secrets.token_hex(8)  # stands for the signature in the content server's addresses
        self.xet = XetStore()
        self.xet_tokens: dict[str, str] = {}  # token of the Xet server -> path of the repository
        self.servers = [_Server(("127.0.0.1", p), _Handler) for p in (port, 0, 0)]
        self.url, self.cdn, self.cas = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server, host in zip(self.servers, ("", "cdn", "cas"), strict=True):
            server.hub, server.host = self, host

    def __enter__(self) -> HubDouble:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        if self.crashes and error[0] is None:
            raise AssertionError("the Hub's double failed:\n" + "\n".join(self.crashes))

    def add_user(self, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """A new token of user `name`."""
        token = f"hf_{secrets.token_hex(12)}"
        self.users[token] = User(name, role, orgs)
        return token

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes | str | File | None] | Path,
        message: str = "Put",
        revision: str = "main",
        private: bool = False,
    ) -> str:
        """Commit `files` (a folder, or contents by path; None deletes) as no client would have to, unchecked; its
        id.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        with self.lock:
            if repo not in self.repos:
                kind, _, name = ("model", "", repo) if repo.count("/") == 1 else repo.partition("s/")
                self.create(Repo(name, kind, private=private))
            held = self.repos[repo]
            tree = dict(held.at(revision).files)
            for path, content in files.items():
                if content is None:
                    del tree[path]
                    continue
                content = content.encode() if isinstance(content, str) else content
                if not isinstance(content, File):
                    content = File(content, by_lfs(path, len(content), content[:512], tree))
                if content.lfs:
                    held.lfs[content.sha256] = content.content
                tree[path] = content
            return held.commit(held.ref(revision), tree, message, author=self.user).oid

    def create(self, repo: Repo) -> None:
        repo.commit("refs/heads/main", {".gitattributes": File(GITATTRIBUTES.encode())}, "initial commit")
        self.repos[repo.path] = repo

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        held = self.repos[repo]
        return list(held.history(held.at(revision)))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repos[repo].at(revision).files.items()}

    def requests(self, match: str = "") -> list[Call]:
        """What was asked so far, where "METHOD /path" holds the regular expression `match`."""
        return [call for call in list(self.log) if re.search(match, call.target)]

    def fail_next(self, match: str = "", **how: Any) -> Fault:
        """Arm a `Fault`; its `hits` says how often it struck."""
        self.faults.append(Fault(match, **how))
        return self.faults[-1]

    def env(self, home: Path, token: str | None = "", xet: bool = False) -> dict[str, str]:
        """The environment of a client with the fresh cache `home`; `token` None is nobody, "" the owner."""
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|DIFFUSERS_|(https?|all|no)_proxy$", re.IGNORECASE)
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_XET_CACHE": str(Path(home) / "xet"),
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            **({} if token is None else {"HF_TOKEN": token or self.token}),
        }
        return {name: value for name, value in os.environ.items() if not foreign.match(name)} | ours

    def client(
        self,
        home: Path,
        code: str,
        *args: object,
        token: str | None = "",
        timeout: float = 120,
        xet: bool = False,
        **env: str,
    ) -> Any:
        """Run `code` in a fresh interpreter against this Hub; what its last printed line says in JSON, if anything."""
        command = [sys.executable, "-c", code, *map(str, args)]
        done = subprocess.run(
            command, env=self.env(home, token, xet) | env, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise AssertionError(f"the client failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None

    # What follows serves the handlers.

    def find(self, call: Call, kind: str, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id if kind == "model" else f"{kind}s/{repo_id}")
        if repo is None or (repo.private and not (call.user and call.user.belongs(repo.id))):
            # The Hub does not tell a stranger whether a private repository exists.
            if call.user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def must_write(self, call: Call, repo_id: str, proposes: bool = False) -> User:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if call.user.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not proposes and not call.user.belongs(repo_id):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return call.user

    def answer(self, call: Call) -> Reply:
        try:
            if call.host == "cdn" and call.token:
                raise Refusal(400, "Only one auth mechanism allowed; the request has a signature and a token.")
            if call.host == "cas" and call.token not in self.xet_tokens:
                raise Refusal(401, "No token of the Xet server")
            if not call.host and call.token and call.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, handler, access in ROUTES:
                found = re.fullmatch(pattern, call.path)
                if found is None or call.host != {"/cdn": "cdn", "/cas": "cas"}.get(pattern[:4], ""):
                    continue
                if method != call.method and not (method == "GET" and call.method == "HEAD"):
                    continue
                url = SimpleNamespace(**{name: unquote(part or "") for name, part in found.groupdict().items()})
                with self.lock:
                    if not access:
                        return handler(self, call, url)
                    repo = self.find(call, url.kind or "model", url.id)
                    if access == "write":
                        self.must_write(call, repo.id, "create_pr" in call.query or url.rev.startswith("refs/pr/"))
                    return handler(self, call, url, repo)
            return Reply({"error": f"no such page: {call.target}"}, 404)
        except Refusal as refusal:
            return refusal.reply
        except Exception:
            self.crashes.append(f"{call.target}\n{traceback.format_exc()}")
            return Reply({"error": "the double failed"}, 500)

    def take_fault(self, target: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, target):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times, fault.hits = fault.times - 1, fault.hits + 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64
    hub: HubDouble
    host: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client went away
            super().handle()

    def read_body(self, limit: int | None) -> bytes:
        length, most = int(self.headers.get("Content-Length", 0)), sys.maxsize if limit is None else limit
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(min(length, most))
        body = b""
        while (size := int(self.rfile.readline().split(b";")[0], 16)) and len(body) < most:
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def one_request(self) -> None:
        hub, split = self.server.hub, urlsplit(self.path)
        at = "/cas" if self.server.host == "cas" else ""
        fault = hub.take_fault(f"{self.command} {at}{self.path}") or Fault("")
        body = self.read_body(fault.drop_upload_after)
        headers = {name.lower(): value for name, value in self.headers.items()}
        user = hub.users.get(bearer(headers) or "")
        call = Call(self.command, at + split.path, parse_qs(split.query), headers, body, self.server.host, user)
        if fault.delay:
            time.sleep(fault.delay)
        if fault.drop_upload_after is not None:
            reply = Reply(status=0)
        elif fault.status:
            retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            reply = Refusal(fault.status, f"fault {fault.status}", headers=retry).reply
        else:
            reply = hub.answer(call)
        content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        content = content if fault.body is None else fault.body
        content = content[: fault.truncate_to]
        dropped = reply.status == 0 or fault.lose_response
        hub.log.append(replace(call, status=0 if dropped else reply.status))
        if dropped:
            self.close_connection = True
            return
        self.send_response(reply.status)
        json_type = {} if isinstance(reply.content, bytes) else {"Content-Type": "application/json; charset=utf-8"}
        sent = {"Content-Length": str(len(content)), **json_type, **reply.headers, **fault.headers}
        for name, value in sent.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: fault.drop_download_after])
            self.close_connection = self.close_connection or fault.drop_download_after is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = one_request


# --- the pages ------------------------------------------------------------------------------------------------------

ROUTES: list[tuple[str, str, Callable[..., Reply], str]] = []
REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"
REV, PATH = r"/(?P<rev>[^/]+)", r"/(?P<path>.+)"


def page(method: str, pattern: str, access: str = "") -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a page; with `access` "read" or "write" it is given the repository, and only callers who may."""

    def register(handler: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, pattern if "<rev>" in pattern else pattern + "(?P<rev>)", handler, access))
        return handler

    return register


def by_lfs(path: str, size: int, sample: bytes, tree: Mapping[str, File]) -> bool:
    """Whether the Hub stores a file as LFS: too large, binary, or matched by .gitattributes."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
        binary = b"\0" in sample
    except UnicodeDecodeError:
        binary = True
    rules = tree[".gitattributes"].content.decode().splitlines() if ".gitattributes" in tree else []
    patterns = [rule.split()[0] for rule in rules if "filter=lfs" in rule]
    return size > 0 and (size > LFS_FROM or binary or matches(path, patterns))


def matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in patterns for name in (path, path.rsplit("/", 1)[-1]))


def card_metadata(text: str) -> tuple[dict[str, Any], list[str]]:
    """A card's YAML and what the Hub finds wrong with it."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return {}, ["The card's metadata must be a mapping"]
    errors: list[str] = []

    def require(held: Any, where: str, *names: str) -> None:
        errors.extend(f'"{where}.{name}" is required' for name in names if (held or {}).get(name) is None)

    for m, model in enumerate(data.get("model-index") or []):
        require(model, f"model-index[{m}]", "name")
        for r, result in enumerate(model.get("results") or [{}]):
            at = f"model-index[{m}].results[{r}]"
            require(result.get("task"), f"{at}.task", "type")
            require(result.get("dataset"), f"{at}.dataset", "type", "name")
            for k, metric in enumerate(result.get("metrics") or [{}]):
                require(metric, f"{at}.metrics[{k}]", "type", "value")
    return data, errors


def lfs_info(file: File, sha: str) -> dict[str, Any]:
    return {"lfs": {sha: file.sha256, "size": file.size, "pointerSize": len(file.pointer)}} if file.lfs else {}


def repo_info(repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    readme = commit.files.get("README.md")
    card = card_metadata(readme.content.decode("utf-8", "replace"))[0] if readme else {}
    tags = [*(card.get("tags") or []), *([f"license:{card['license']}"] if "license" in card else [])]
    siblings = []
    for path, file in sorted(commit.files.items()):
        details = {"size": file.size, "blobId": file.git_oid, **lfs_info(file, "sha256")} if blobs else {}
        siblings.append({"rfilename": path, **details})
    shown = {name: card.get(name) for name in ("library_name", "pipeline_tag", "model-index")}
    dates = {"createdAt": next(iter(repo.commits.values())).date, "lastModified": commit.date}
    access = {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
    identity = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid}
    return identity | dates | access | shown | {"tags": tags, "cardData": card, "siblings": siblings}


def listing(hub: HubDouble, repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """Every file and folder by path, described."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        parts = path.split("/")
        for folder in ("/".join(parts[:n]) for n in range(1, len(parts))):
            inside = sorted(f.git_oid for p, f in commit.files.items() if p.startswith(folder + "/"))
            oid = hashlib.sha1("".join([folder, *inside]).encode()).hexdigest()
            entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        entries[path] = {"type": "file", "oid": file.git_oid, "size": file.size, "path": path, **lfs_info(file, "oid")}
        if file.lfs:
            entries[path]["xetHash"] = hub.xet.put(file.content)
    line = list(repo.history(commit)) if expand else []
    for path, entry in entries.items() if expand else ():
        versions = [{p: f.git_oid for p, f in c.files.items() if f"{p}/".startswith(f"{path}/")} for c in line]
        pairs = zip(line, versions, [*versions[1:], {}], strict=True)
        last = next(commit for commit, version, before in pairs if version != before)
        entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return entries


def paged(hub: HubDouble, call: Call, items: list[Any], size: int) -> Reply:
    start = int(call.query.get("cursor", ["0"])[0])
    rest = "&".join(f"{k}={quote(v)}" for k, vs in call.query.items() if k != "cursor" for v in vs)
    link = f'<{hub.url}{call.path}?{rest}&cursor={start + size}>; rel="next"'
    return Reply(items[start : start + size], headers={"Link": link} if start + size < len(items) else {})


def ranged(call: Call, file: File, headers: dict[str, str]) -> Reply:
    """The bytes asked for by a Range header, or all."""
    headers, content = headers | {"Accept-Ranges": "bytes"}, file.content
    if call.method == "HEAD":
        return Reply(headers=headers | {"Content-Length": str(file.size)})
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if not found:
        return Reply(content, headers=headers)
    first, last = found.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        raise Refusal(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Reply(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def flag(call: Call, name: str) -> bool:
    return call.query.get(name, ["0"])[0].lower() in ("1", "true")


@page("GET", "/api/whoami-v2")
def whoami(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.user.role}}
    orgs = [{"type": "org", "name": org} for org in call.user.orgs]
    return Reply({"type": "user", "name": call.user.name, "fullname": call.user.name, "orgs": orgs, "auth": auth})


@page("POST", "/api/validate-yaml")
def validate_yaml(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    data, errors = card_metadata(json.loads(call.body)["content"])
    warnings = [] if data or errors else [{"message": "empty or missing yaml metadata in repo card"}]
    return Reply({"errors": [{"message": e} for e in errors], "warnings": warnings}, 400 if errors else 200)


@page("GET", r"/api/(?P<kind>model|dataset|space)s")
def list_repos(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    author, search = (call.query.get(name, [""])[0] for name in ("author", "search"))
    seen = [
        r
        for r in hub.repos.values()
        if r.kind == url.kind and search in r.id and r.id.startswith(author and f"{author}/")
    ]
    seen = [r for r in seen if not r.private or (call.user and call.user.belongs(r.id))]
    return paged(hub, call, [repo_info(r, r.at("main")) for r in seen], hub.page_size)


@page("POST", "/api/repos/create")
def create_repo(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    asked = json.loads(call.body)
    kind, owner = asked.get("type") or "model", asked.get("organization") or (call.user and call.user.name)
    repo = Repo(
        f"{owner}/{asked['name']}", kind, private=bool(asked.get("private")) or asked.get("visibility") == "private"
    )
    hub.must_write(call, repo.id)
    where = {"url": f"{hub.url}/{repo.path}", "name": repo.id}
    if repo.path in hub.repos:
        raise Refusal(409, f"You already created this {kind} repo", body=where)
    hub.create(repo)
    return Reply(where)


@page("DELETE", "/api/repos/delete")
def delete_repo(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    asked = json.loads(call.body)
    repo = hub.find(call, asked.get("type") or "model", f"{asked.get('organization') or hub.user}/{asked['name']}")
    hub.must_write(call, repo.id)
    del hub.repos[repo.path]
    return Reply({})


@page("PUT", REPO + "/settings", "write")
def settings(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    asked = json.loads(call.body)
    repo.private = asked.get("private", {"private": True, "public": False}.get(asked.get("visibility"), repo.private))
    repo.gated = asked.get("gated", repo.gated)
    return Reply({"private": repo.private, "gated": repo.gated})


@page("GET", REPO, "read")
@page("GET", REPO + "/revision" + REV, "read")
def info(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    return Reply(repo_info(repo, repo.at(url.rev or "main"), blobs=flag(call, "blobs")))


@page("GET", REPO + "/refs", "read")
def refs(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    groups = {"branches": "refs/heads/", "converts": "refs/convert/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    return Reply({
        group: [{"name": r.removeprefix(at), "ref": r, "targetCommit": oid} for r, oid in repo.refs.items() if r.startswith(at)]
        for group, at in groups.items()
    })  # fmt: skip


@page("GET", REPO + "/commits" + REV, "read")
def commits(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    line = repo.history(repo.at(url.rev))
    described = [
        {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
        for c in line
    ]
    return paged(hub, call, described, hub.page_size)


@page("GET", REPO + "/tree" + REV + f"(?:{PATH})?", "read")
def tree(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    commit, expand = repo.at(url.rev), flag(call, "expand")
    entries, under = listing(hub, repo, commit, expand), f"{url.path}/" if url.path else ""
    if url.path and entries.get(url.path, {}).get("type") != "directory":
        raise Refusal(404, f"{url.path} does not exist on {url.rev}", "EntryNotFound")
    wanted = [
        e
        for p, e in entries.items()
        if p.startswith(under) and (flag(call, "recursive") or "/" not in p[len(under) :])
    ]
    return paged(hub, call, wanted, min(50, hub.page_size) if expand else hub.page_size)


@page("POST", REPO + "/paths-info" + REV, "read")
def paths_info(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    asked = parse_qs(call.body.decode())
    entries = listing(hub, repo, repo.at(url.rev), asked.get("expand", ["false"])[0].lower() == "true")
    return Reply([entries[path] for path in asked.get("paths", []) if path in entries])


@page("POST", REPO + "/branch/(?P<name>[^/]+)", "write")
def create_branch(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    if url.name.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {url.name}")
    return new_ref(repo, f"refs/heads/{url.name}", json.loads(call.body or b"{}").get("startingPoint", "main"))


@page("POST", REPO + "/tag" + REV, "write")
def create_tag(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    return new_ref(repo, f"refs/tags/{json.loads(call.body)['tag']}", url.rev)


def new_ref(repo: Repo, name: str, revision: str) -> Reply:
    if name in repo.refs:
        raise Refusal(409, f"Reference {name} already exists")
    repo.refs[name] = repo.at(revision).oid
    return Reply({})


@page("DELETE", REPO + "/(?P<what>branch|tag)/(?P<name>[^/]+)", "write")
def delete_ref(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    name = {"branch": "refs/heads/", "tag": "refs/tags/"}[url.what] + url.name
    if name == "refs/heads/main":
        raise Refusal(403, "The main branch cannot be deleted")
    del repo.refs[repo.ref(name)]
    return Reply({})


@page("POST", REPO + "/preupload" + REV, "write")
def preupload(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    asked, held = json.loads(call.body), repo.at(url.rev).files
    ignored, answers = [line for line in asked.get("gitIgnore", "").split() if line[0] != "#"], []
    for file in asked["files"]:
        path, lfs = file["path"], by_lfs(file["path"], file["size"], base64.b64decode(file["sample"]), held)
        same = held[path] if path in held and held[path].lfs is lfs else None
        oid = {"oid": same.sha256 if lfs else same.git_oid} if same else {}
        answers.append(
            {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": matches(path, ignored), **oid}
        )
    return Reply({"files": answers})


@page("POST", REPO + "/commit" + REV, "write")
def commit(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    head, header, lines = repo.at(url.rev), {}, [json.loads(line) for line in call.body.splitlines() if line.strip()]
    files = dict(head.files)
    for key, value in ((line["key"], line["value"]) for line in lines):
        path = value.get("path", "")
        if path.startswith("/") or {"..", ".git"} & set(path.split("/")):
            raise Refusal(400, f"Invalid path: {path}")
        if key == "header":
            header = value
        elif key == "file":
            files[path] = File(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            if value["oid"] in hub.xet.hashes:
                xet = hub.xet.hashes[value["oid"]]
                repo.lfs[value["oid"]] = b"".join(
                    chunk for term in hub.xet.files[xet] for chunk in hub.xet.chunks(term)
                )
            if value["oid"] not in repo.lfs:
                raise Refusal(400, f"LFS pointer of {path} pointed to a file that does not exist: {value['oid']}")
            files[path] = File(repo.lfs[value["oid"]], lfs=True)
        else:  # deletedFile, deletedFolder
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for p in gone:
                del files[p]
    if header.get("parentCommit", head.oid) != head.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    if "README.md" in files and (errors := card_metadata(files["README.md"].content.decode("utf-8", "replace"))[1]):
        raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors).replace("\n", " "))
    author, pull = call.user.name if call.user else "", None
    if flag(call, "create_pr"):
        pull = repo.open_discussion(header["summary"], author, "open", head.oid)
    ref = repo.ref(f"refs/pr/{pull.num}" if pull else url.rev)
    if ref.startswith("refs/tags/"):
        raise Refusal(400, f"Cannot commit to a tag: {url.rev}")
    made = repo.commit(ref, files, header["summary"], header.get("description", ""), author)
    request = f"{hub.url}/{repo.path}/discussions/{pull.num}" if pull else None
    where = f"{hub.url}/{repo.path}/commit/{made.oid}"
    return Reply({"success": True, "commitOid": made.oid, "commitUrl": where, "pullRequestUrl": request})


# Large files: the batch page hands out signed addresses of the content server, for one PUT or for numbered parts.


@page("POST", GIT + r"\.git/info/lfs/objects/batch", "read")
def lfs_batch(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    asked, objects = json.loads(call.body), []
    ref = asked.get("ref", {}).get("name", "refs/pr/")  # a client that opens a pull request names none
    hub.must_write(call, repo.id, proposes=ref.startswith("refs/pr/"))
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        objects.append({"oid": oid, "size": size})
        if oid in repo.lfs or "xet" in asked["transfers"]:
            continue
        upload = secrets.token_hex(12)
        hub.uploads[upload] = SimpleNamespace(repo=repo, oid=oid, size=size, parts={})
        put, header = {"href": f"{hub.cdn}/cdn/upload/{upload}/0?signature={hub.secret}"}, {}
        if size > hub.part_size and "multipart" in asked["transfers"]:
            numbers = range(1, math.ceil(size / hub.part_size) + 1)
            header = {str(n): f"{hub.cdn}/cdn/upload/{upload}/{n}?signature={hub.secret}" for n in numbers}
            put = {"href": f"{hub.url}/api/complete_multipart?uploadId={upload}"}
            header["chunk_size"] = str(hub.part_size)
        verify = {"href": f"{hub.url}/{repo.path}.git/info/lfs/objects/verify", "header": {}}
        objects[-1]["actions"] = {"upload": put | {"header": header}, "verify": verify}
    return Reply({"transfer": "xet" if "xet" in asked["transfers"] else "basic", "objects": objects})


@page("PUT", r"/cdn/upload/(?P<upload>\w+)/(?P<part>\d+)")
def lfs_put(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    signed(hub, call)
    hub.uploads[url.upload].parts[int(url.part)] = call.body
    if url.part == "0":
        store(hub, url.upload)
    return Reply(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@page("POST", "/api/complete_multipart")
def lfs_complete(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    upload, asked = call.query["uploadId"][0], json.loads(call.body)
    held = hub.uploads[upload].parts
    etags = {part["partNumber"]: part["etag"].strip('"') for part in asked["parts"]}
    if etags != {n: hashlib.md5(part).hexdigest() for n, part in held.items()}:
        raise Refusal(400, "Parts are missing or differ from what was uploaded")
    store(hub, upload)
    return Reply({})


def store(hub: HubDouble, upload: str) -> None:
    held = hub.uploads[upload]
    content = b"".join(part for _, part in sorted(held.parts.items()))
    if (hashlib.sha256(content).hexdigest(), len(content)) != (held.oid, held.size):
        raise Refusal(400, "The content does not match its SHA-256 or its size")
    held.repo.lfs[held.oid] = content
    held.parts.clear()


@page("POST", GIT + r"\.git/info/lfs/objects/verify", "read")
def lfs_verify(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    asked = json.loads(call.body)
    if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(404, f"No such object: {asked['oid']}")
    return Reply({})


def signed(hub: HubDouble, call: Call) -> None:
    if call.query.get("signature") != [hub.secret]:
        raise Refusal(403, "The signature is missing or wrong")


@page("GET", GIT + "/resolve" + REV + PATH, "read")
def resolve(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    if repo.gated and not (call.user and call.user.belongs(repo.id)):
        raise Refusal(403 if call.user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
    commit = repo.at(url.rev)
    at = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(url.path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers=at)
    if not file.lfs:
        return ranged(call, file, at | {"ETag": f'"{file.git_oid}"'})
    # As on the Hub, the metadata of a large file stands on the redirect, and its bytes are elsewhere.
    place = f"{hub.cdn}/cdn/blob/{repo.kind}/{repo.id}/{commit.oid}/{quote(url.path)}?signature={hub.secret}"
    linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"', "ETag": f'"{file.git_oid}"'}
    token = f"{hub.url}/api/{repo.kind}s/{repo.id}/xet-read-token/{commit.oid}"
    xet = {"X-Xet-Hash": hub.xet.put(file.content), "Link": f'<{token}>; rel="xet-auth"'}
    return Reply(b"", 302, at | linked | xet | {"Location": place})


@page("GET", r"/cdn/blob/(?P<kind>\w+)/(?P<id>[^/]+/[^/]+)" + REV + PATH)
def blob(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    signed(hub, call)
    file = hub.repos[url.id if url.kind == "model" else f"{url.kind}s/{url.id}"].commits[url.rev].files[url.path]
    return ranged(call, file, {"ETag": f'"{file.sha256}"'})


# Xet: tokens are the Hub's, xorbs and shards go to the Xet server, and the bytes of xorbs come from the content
# server.


@page("GET", REPO + "/xet-(?P<what>read|write)-token" + REV, "read")
def xet_token(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    if url.what == "write":
        hub.must_write(call, repo.id, proposes=flag(call, "create_pr") or url.rev.startswith("refs/pr/"))
    elif repo.gated and not (call.user and call.user.belongs(repo.id)):
        raise Refusal(403, f"Access to model {repo.id} is restricted.", "GatedRepo")
    token = f"xet_{url.what}_{secrets.token_hex(12)}"
    hub.xet_tokens[token] = repo.path
    answer = {"casUrl": hub.cas, "exp": int(time.time()) + 3600, "accessToken": token}
    named = {"X-Xet-Cas-Url": hub.cas, "X-Xet-Token-Expiration": str(answer["exp"]), "X-Xet-Access-Token": token}
    return Reply(answer, headers=named)


@page("POST", r"/cas(?:/v1)?/xorbs/default/(?P<xorb>\w{64})")
def add_xorb(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    new = url.xorb not in hub.xet.xorbs
    hub.xet.xorbs[url.xorb] = call.body
    return Reply({"was_inserted": new})


@page("POST", r"/cas(?:/v1)?/shards")
def add_shard(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    hub.xet.add_shard(call.body)
    return Reply({"result": 1})


@page("GET", r"/cas(?:/v1)?/reconstructions/(?P<file>\w{64})")
def reconstruct(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    if url.file not in hub.xet.files:
        raise Refusal(404, f"No such file: {url.file}")
    place = f"{hub.cdn}/cdn/xorb/{{}}?signature={hub.secret}"
    answer = hub.xet.reconstruction(url.file, place, *byte_range(call.headers.get("range", "")))
    if answer is None:
        raise Refusal(416, "Range Not Satisfiable")
    return Reply(answer)


@page("GET", r"/cdn/xorb/(?P<xorb>\w{64})")
def fetch_xorb(hub: HubDouble, call: Call, url: SimpleNamespace) -> Reply:
    signed(hub, call)
    return ranged(call, File(hub.xet.xorbs[url.xorb]), {})


def described(repo: Repo, talk: Discussion) -> dict[str, Any]:
    shown = {
        "num": talk.num,
        "title": talk.title,
        "status": talk.status,
        "createdAt": talk.date,
        "events": talk.events,
    }
    shown |= {"author": {"name": talk.author}, "repo": {"name": repo.id, "type": repo.kind}}
    changes = {"base": "refs/heads/main", "mergeCommitId": talk.merged_as}
    return shown | {"isPullRequest": talk.base is not None, "changes": changes, "filesWithConflicts": [], "diff": ""}


def tell(talk: Discussion, kind: str, author: str, **data: Any) -> dict[str, Any]:
    """Add an event to a discussion."""
    about = {"id": secrets.token_hex(8), "createdAt": now(), "author": {"name": author}}
    talk.events.append({"type": kind, "data": data, **about})
    return talk.events[-1]


@page("GET", REPO + "/discussions", "read")
def discussions(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    kind = {"pull_request": True, "discussion": False}.get(call.query.get("type", ["all"])[0])
    found = [described(repo, t) for t in repo.discussions if kind in (None, t.base is not None)]
    return Reply({"discussions": found, "count": len(found), "start": 0})


@page("POST", REPO + "/discussions", "read")
def discuss(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    user, asked = hub.must_write(call, repo.id, proposes=True), json.loads(call.body)
    base = repo.at("main").oid if asked["pullRequest"] else None
    talk = repo.open_discussion(asked["title"], user.name, "draft" if base else "open", base)
    tell(talk, "comment", user.name, edited=False, hidden=False, latest={"raw": asked["description"]})
    return Reply({"num": talk.num})


@page("GET", REPO + r"/discussions/(?P<num>\d+)", "read")
@page("POST", REPO + r"/discussions/(?P<num>\d+)/(?P<what>comment|title|status|merge)", "read")
def discussion(hub: HubDouble, call: Call, url: SimpleNamespace, repo: Repo) -> Reply:
    talk = next((talk for talk in repo.discussions if talk.num == int(url.num)), None)
    if talk is None:
        raise Refusal(404, f"There is no discussion {url.num}")
    if call.method != "POST":
        return Reply(described(repo, talk))
    user = hub.must_write(call, repo.id, proposes=url.what == "comment")
    asked = json.loads(call.body or b"null") or {}
    if url.what == "comment":
        said = tell(talk, "comment", user.name, edited=False, hidden=False, latest={"raw": asked["comment"]})
        return Reply({"newMessage": said})
    if url.what == "title":
        before, talk.title = talk.title, asked["title"]
        return Reply({"newTitle": tell(talk, "title-change", user.name, **{"from": before, "to": talk.title})})
    if url.what == "merge":
        if talk.base is None or talk.merged_as:
            raise Refusal(400, f"Discussion {talk.num} cannot be merged")
        base, head = repo.commits[talk.base].files, repo.at(f"refs/pr/{talk.num}").files
        kept = {path: file for path, file in repo.at("main").files.items() if path in head or path not in base}
        changed = {path: file for path, file in head.items() if base.get(path) != file}
        made = repo.commit("refs/heads/main", kept | changed, f"{talk.title} (#{talk.num})", author=user.name)
        talk.merged_as = made.oid
    talk.status = "merged" if url.what == "merge" else asked["status"]
    return Reply({"newStatus": tell(talk, "status-change", user.name, status=talk.status)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a Hugging Face Hub on loopback, in memory, until interrupted.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    with HubDouble(port=parser.parse_args().port) as hub:
        print(hub.url, flush=True)
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
