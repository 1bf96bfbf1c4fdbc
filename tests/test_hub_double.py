"""The Hub's double as real clients see it: huggingface_hub itself, in fresh interpreters with fresh caches."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_double
import numpy as np
import pytest
from hub_double import File, HubDouble

WEIGHTS = np.random.default_rng(0).bytes(200_001)  # *.safetensors: LFS in one PUT
LARGE = b"text, but large\n" * 700_000  # 11.2 MB of text: LFS for its size, in two parts
SMALL = {"README.md": b"---\nlicense: apache-2.0\ntags: [vdm]\n---\n# A card\n", "sub/config.json": b'{"a": 1}\n'}

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

PRELUDE = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, hf_hub_download, snapshot_download
api = HfApi()
def name_of_error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return "none"
def show(value):
    print(json.dumps(value))
"""


@pytest.fixture
def hub():
    with HubDouble() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    for name, content in {**SMALL, "weights.safetensors": WEIGHTS, "sub/large.txt": LARGE}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def run(hub: HubDouble, home: Path, code: str, *args: object, **options: object):
    return hub.client(home, PRELUDE + code, *args, **options)


def contents(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if name != ".gitattributes"}


def test_push_and_pull_return_the_same_bytes_and_an_unchanged_push_makes_no_commit(hub, folder, tmp_path):
    pushed = run(hub, tmp_path / "writer", """
repo = api.create_repo("m", private=True)
again = api.create_repo("someone/m", exist_ok=True)
first = api.upload_folder(repo_id=repo.repo_id, folder_path=sys.argv[1], commit_message="one")
second = api.upload_folder(repo_id=repo.repo_id, folder_path=sys.argv[1], commit_message="two")
show([repo.repo_id, again.repo_id, first.oid, second.oid, name_of_error(api.create_repo, "m")])
""", folder)  # fmt: skip
    (oid, _initial) = hub.commits("someone/m")
    assert pushed == ["someone/m", "someone/m", oid.oid, oid.oid, "HfHubHTTPError"]
    assert (oid.title, oid.author) == ("one", "someone")

    held = hub.repos["someone/m"].at("main").files
    assert {name for name, file in held.items() if file.lfs} == {"weights.safetensors", "sub/large.txt"}
    puts = hub.requests("PUT")
    assert len(puts) == 3 and all(call.host == "cdn" and call.token is None for call in puts)  # one, and two parts
    assert sorted(len(call.body) for call in puts) == sorted([len(WEIGHTS), hub.part_size, len(LARGE) - hub.part_size])

    pulled = run(hub, tmp_path / "reader", """
path = snapshot_download("someone/m", max_workers=2)
info = api.model_info("someone/m", files_metadata=True)
tree = {e.path: [type(e).__name__, getattr(e, "size", 0), e.lfs.sha256 if getattr(e, "lfs", None) else None]
        for e in api.list_repo_tree("someone/m", recursive=True, expand=True)}
flat = [e.path for e in api.list_repo_tree("someone/m")]
paths = {e.path: e.blob_id for e in api.get_paths_info("someone/m", ["README.md", "none", "sub/large.txt"])}
show([path, {s.rfilename: s.size for s in info.siblings}, tree, info.sha, flat, paths, info.private, info.tags])
""", token=hub.read_token)  # fmt: skip
    path, sizes, tree, sha, flat, paths, private, tags = pulled
    assert contents(Path(path)) == contents(folder) and sha == oid.oid and private
    assert {name: len(content) for name, content in hub.files("someone/m").items()} == sizes
    assert tree["sub/large.txt"] == ["RepoFile", len(LARGE), hashlib.sha256(LARGE).hexdigest()]
    assert tree["sub"][0] == "RepoFolder" and tree["README.md"][2] is None
    assert flat == [".gitattributes", "README.md", "sub", "weights.safetensors"]
    git = subprocess.run(["git", "hash-object", "README.md"], cwd=folder, capture_output=True, text=True, check=True)
    assert paths["README.md"] == git.stdout.strip() and set(paths) == {"README.md", "sub/large.txt"}
    assert tags == ["vdm", "license:apache-2.0"]
    downloads = hub.requests("GET /cdn/blob/")
    assert len(downloads) == 2 and all(call.host == "cdn" and call.token is None for call in downloads)
    assert all(call.token in (hub.token, hub.read_token) for call in hub.requests("/api/models/"))


def test_who_may_do_what(hub, tmp_path):
    hub.put("someone/secret", {"a.txt": "a"}, private=True)
    hub.put("someone/open", {"a.txt": "a"})
    hub.put("someone/gated", {"a.txt": "a"})
    hub.repos["someone/gated"].gated = "manual"
    stranger = hub.add_user("stranger")
    code = """
def get(repo, file="a.txt", **kwargs):
    return hf_hub_download(repo, file, **kwargs)
def add(repo, **kwargs):
    return api.upload_file(repo_id=repo, path_or_fileobj=b"b", path_in_repo="b.txt", **kwargs)
def who():
    return api.whoami()["name"]
show({
    "secret": name_of_error(get, "someone/secret"), "open": name_of_error(get, "someone/open"),
    "gated": name_of_error(get, "someone/gated"), "info": name_of_error(api.model_info, "someone/secret"),
    "snapshot": name_of_error(snapshot_download, "someone/secret"), "none": name_of_error(api.model_info, "someone/none"),
    "write": name_of_error(add, "someone/open"), "create": name_of_error(api.create_repo, "someone/new"),
    "propose": name_of_error(add, "someone/open", create_pr=True), "who": name_of_error(who),
    "listed": [m.id for m in api.list_models(author="someone")],
})
"""
    homes = iter(tmp_path / str(n) for n in range(9))
    reads = {"open": "none", "who": "none"}
    missing = {"none": "RepositoryNotFoundError"}
    refused = dict.fromkeys(("secret", "info"), "RepositoryNotFoundError")
    forbidden = {"write": "HfHubHTTPError", "create": "HfHubHTTPError"}
    gated, public = {"gated": "GatedRepoError"}, {"listed": ["someone/open", "someone/gated"]}
    with ThreadPoolExecutor(2) as pool:
        tokens = {"nobody": None, "stranger": stranger, "reader": hub.read_token}
        got = dict(zip(tokens, pool.map(lambda t: run(hub, next(homes), code, token=t), tokens.values()), strict=True))
    nobody, other, reader = got["nobody"], got["stranger"], got["reader"]
    unknown = dict.fromkeys(("write", "propose", "create"), "RepositoryNotFoundError")
    assert nobody == {**refused, **missing, **gated, **public, **unknown, "snapshot": nobody["snapshot"],
                      "open": "none", "who": "LocalTokenNotFoundError"}  # fmt: skip
    assert nobody["snapshot"] == other["snapshot"] == "RepositoryNotFoundError"
    assert other == {**refused, **missing, **gated, **public, **reads, **forbidden, "propose": "none",
                     "snapshot": other["snapshot"]}  # fmt: skip
    assert reader == {**reads, **missing, **forbidden, "propose": "HfHubHTTPError", "secret": "none", "info": "none",
                      "gated": "none", "snapshot": "none",
                      "listed": ["someone/secret", "someone/open", "someone/gated"]}  # fmt: skip
    assert [c.title for c in hub.commits("someone/open")] == ["Put", "initial commit"]
    assert "b.txt" in hub.files("someone/open", "refs/pr/1")

    wrong = run(hub, tmp_path / "wrong", """
try:
    api.model_info("someone/open")
except errors.HfHubHTTPError as error:
    show([type(error).__name__, error.response.status_code, "Invalid credentials" in str(error)])
""", token="hf_wrong")  # fmt: skip
    assert wrong == ["HfHubHTTPError", 401, True]


def test_revisions_are_pinned_and_what_is_missing_is_named(hub, tmp_path):
    first, second = hub.put("someone/m", {"a.txt": "1"}), hub.put("someone/m", {"a.txt": "2"})
    got = run(hub, tmp_path, """
m, first, second = "someone/m", *sys.argv[1:]
def text(revision):
    return open(hf_hub_download(m, "a.txt", revision=revision)).read()
api.create_tag(m, tag="v1", revision=first)
api.create_tag(m, tag="v1", revision=second, exist_ok=True)
api.create_branch(m, branch="dev/x", revision=first)
api.upload_file(repo_id=m, path_or_fileobj=b"3", path_in_repo="a.txt", revision="dev/x")
pull = api.upload_file(repo_id=m, path_or_fileobj=b"4", path_in_repo="a.txt", create_pr=True)
texts = [text(r) for r in (first, first[:10], "v1", "dev/x", "refs/pr/1", None)]
refs = api.list_repo_refs(m, include_pull_requests=True)
names = [[r.name for r in group] for group in (refs.branches, refs.tags)] + [[r.ref for r in refs.pull_requests]]
talk = api.get_discussion_details(m, pull.pr_num)
api.merge_pull_request(m, pull.pr_num)
merged = open(hf_hub_download(m, "a.txt")).read()
hello = api.create_discussion(m, "A question", description="why?")
api.comment_discussion(m, hello.num, "because")
api.delete_tag(m, tag="v1")
api.delete_branch(m, branch="dev/x")
api.update_repo_settings(m, private=True)
show({
    "texts": texts, "merged": merged, "names": names, "talk": [talk.status, talk.is_pull_request, pull.pr_revision],
    "status": [[d.num, d.status] for d in api.get_repo_discussions(m)],
    "comments": [e.content for e in api.get_discussion_details(m, hello.num).events],
    "commits": [c.title for c in api.list_repo_commits(m)],
    "stale": name_of_error(api.create_commit, m, [CommitOperationAdd("b", b"b")], commit_message="b", parent_commit=first),
    "gone": name_of_error(text, "v1"), "revision": name_of_error(snapshot_download, m, revision="none"),
    "no_revision": name_of_error(api.model_info, m, revision="none"),
    "file": name_of_error(hf_hub_download, m, "none.txt"), "repo": name_of_error(api.list_repo_files, "someone/none"),
    "delete": name_of_error(api.delete_file, "none.txt", m), "exists": [api.file_exists(m, "a.txt"), api.file_exists(m, "b")],
    "yaml": name_of_error(api.upload_file, repo_id=m, path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md"),
    "up": name_of_error(api.create_commit, m, [CommitOperationAdd("c", b"c"), CommitOperationDelete("a.txt")], commit_message="c"),
    "files": sorted(api.list_repo_files(m)),
})
api.delete_repo(m)
api.delete_repo(m, missing_ok=True)
""", first, second)  # fmt: skip
    assert got == {
        "texts": ["1", "1", "1", "3", "4", "2"],
        "merged": "4",
        "names": [["main", "dev/x"], ["v1"], ["refs/pr/1"]],
        "talk": ["open", True, "refs/pr/1"],
        "status": [[1, "merged"], [2, "open"]],
        "comments": ["why?", "because"],
        "commits": ["Upload a.txt with huggingface_hub (#1)", "Put", "Put", "initial commit"],
        "stale": "HfHubHTTPError",
        "gone": "RevisionNotFoundError",
        "revision": "RevisionNotFoundError",
        "no_revision": "RevisionNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "repo": "RepositoryNotFoundError",
        "delete": "RemoteEntryNotFoundError",
        "exists": [True, False],
        "yaml": "ValueError",
        "up": "none",
        "files": [".gitattributes", "c"],
    }
    assert not hub.repos


def test_broken_uploads_are_retried_and_what_arrived_is_not_sent_again(hub, folder, tmp_path):
    dropped = hub.fail_next(r"PUT /cdn/upload/\w+/2", drop_upload_after=100_000)
    failed = hub.fail_next(r"PUT /cdn/upload/\w+/0", status=500)
    limited = hub.fail_next("POST .*/objects/batch", status=429, retry_after=0)
    lost = hub.fail_next("POST .*/objects/verify", lose_response=True)
    refused = hub.fail_next("POST .*/commit/", status=500)
    errors = run(hub, tmp_path / "home", """
api.create_repo("someone/m")
errors = []
while errors[-1:] != ["none"] and len(errors) < 5:
    errors.append(name_of_error(api.upload_folder, repo_id="someone/m", folder_path=sys.argv[1]))
show(errors)
""", folder)  # fmt: skip
    # The client retries everything but the commit (older ones less); its next run finds the large files already there.
    assert errors[-2:] == ["HfHubHTTPError", "none"]
    assert [fault.hits for fault in (dropped, failed, limited, lost, refused)] == [1] * 5
    assert [call.status for call in hub.requests(r"PUT /cdn/upload/\w+/2")] == [0, 200]
    assert [call.status for call in hub.requests(r"PUT /cdn/upload/\w+/0")] == [500, 200]
    assert len(hub.commits("someone/m")) == 2 and hub.files("someone/m").items() >= contents(folder).items()


def test_broken_downloads_are_resumed_or_refused(hub, tmp_path):
    """The client writes 10 MB at a time, so only a larger file can be resumed where it broke."""
    broken = LARGE[: 10 * 2**20 + 999]
    hub.put("someone/m", {"large.bin": LARGE, "t.txt": "text", "cut.txt": "0123456789", "late.txt": "late"})
    hub.put("someone/m", {"liar.bin": File(b"short", lfs=True, claimed_size=10**13)})
    dropped = hub.fail_next("GET /cdn/blob/.*large", drop_download_after=len(broken))
    limited = hub.fail_next("GET .*/t.txt", status=429, retry_after=0)
    hub.fail_next("GET .*/cut.txt", truncate_to=4)
    late = hub.fail_next("HEAD .*/late.txt", status=500)
    got = run(hub, tmp_path, """
try:
    path = hf_hub_download("someone/m", "large.bin")
except Exception:  # older clients resume when asked again
    path = hf_hub_download("someone/m", "large.bin")
show([path, *[name_of_error(hf_hub_download, "someone/m", f"{n}") for n in ("t.txt", "late.txt", "cut.txt", "liar.bin")]])
""")  # fmt: skip
    assert Path(got[0]).read_bytes() == LARGE
    assert got[1:] == ["none", "none", "OSError", "ValueError"]
    assert (dropped.hits, limited.hits, late.hits) == (1, 1, 1)
    ranges = [call.headers.get("range") for call in hub.requests("GET /cdn/blob/.*large")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_two_clients_at_once_make_a_commit_each(hub, tmp_path):
    hub.put("someone/m", {"a.txt": "a"})
    code = """
for n in range(4):
    api.upload_file(repo_id="someone/m", path_or_fileobj=sys.argv[1].encode() * 1000, path_in_repo=f"{sys.argv[1]}{n}.bin")
"""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: run(hub, tmp_path / name, code, name), "xy"))
    assert len(hub.commits("someone/m")) == 10
    assert set(hub.files("someone/m")) == {".gitattributes", "a.txt", *(f"{c}{n}.bin" for c in "xy" for n in range(4))}


def test_the_double_is_strict(hub, tmp_path):
    """What clients would not do, and must not: leaked tokens, unsigned addresses, content that is not its hash."""

    def ask(url, data=None, method="GET", **headers):
        request = urllib.request.Request(
            url, data, {k.replace("_", "-"): v for k, v in headers.items()}, method=method
        )
        try:
            with OPENER.open(request, timeout=10) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    commit = hub.put("someone/m", {"w.safetensors": b"0123456789", "t.txt": "0123456789"})
    assert hub.commits("someone/m")[0].oid == commit and len(commit) == 40
    signed = f"{hub.cdn}/cdn/blob/model/someone/m/{commit}/w.safetensors?signature={hub.secret}"
    auth = {"Authorization": f"Bearer {hub.token}"}
    assert ask(signed)[:2] == (200, b"0123456789")
    assert ask(signed, **auth)[0] == 400
    assert ask(signed.split("?")[0])[0] == 403
    assert ask(signed.replace(hub.cdn, hub.url))[0] == 404
    for wanted, status, content in (
        ("2-4", 206, b"234"),
        ("7-", 206, b"789"),
        ("-2", 206, b"89"),
        ("5-99", 206, b"56789"),
        ("10-", 416, None),
    ):
        got = ask(f"{hub.url}/someone/m/resolve/main/t.txt", Range=f"bytes={wanted}")
        assert got[0] == status and content in (got[1], None)
    status, body, headers = ask(f"{hub.url}/someone/m/resolve/main/none", method="HEAD")
    assert (status, body, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, b"", "EntryNotFound", commit)

    sha = hashlib.sha256(b"right").hexdigest()
    batch = json.dumps(
        {"transfers": ["basic"], "objects": [{"oid": sha, "size": 5}], "ref": {"name": "main"}}
    ).encode()
    answer = json.loads(ask(f"{hub.url}/someone/m.git/info/lfs/objects/batch", batch, "POST", **auth)[1])
    place = answer["objects"][0]["actions"]["upload"]["href"]
    pointer = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": {"path": "x", "oid": sha}}]
    lines, commits = "\n".join(map(json.dumps, pointer)).encode(), f"{hub.url}/api/models/someone/m/commit/main"
    assert ask(place, b"wrong", "PUT")[0] == 400 and ask(commits, lines, "POST", **auth)[0] == 400
    assert ask(place, b"right", "PUT")[0] == 200 and ask(commits, lines, "POST", **auth)[0] == 200
    assert hub.files("someone/m")["x"] == b"right"
    traversal = lines.replace(b'"x"', b'"../x"')
    assert ask(commits, traversal, "POST", **auth)[0] == 400
    card = b"---\nmodel-index:\n- name: m\n  results:\n  - task: {type: t}\n    metrics: [{type: b, value: 1}]\n---\n"
    asked = json.dumps({"content": card.decode(), "repoType": "model"}).encode()
    status, body, _ = ask(f"{hub.url}/api/validate-yaml", asked, "POST", **auth)
    found = [error["message"] for error in json.loads(body)["errors"]]
    assert status == 400 and found == [
        f'"model-index[0].results[0].dataset.{n}" is required' for n in ("type", "name")
    ]
    hub.page_size = 2
    pages = ask(f"{hub.url}/api/models/someone/m/tree/main?recursive=true")
    assert len(json.loads(pages[1])) == 2 and 'cursor=2>; rel="next"' in pages[2]["Link"]
    names = "print(*[e.path for e in __import__('huggingface_hub').list_repo_tree('someone/m')])"
    shown = subprocess.run(
        [sys.executable, "-c", names], env=hub.env(tmp_path), capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == [".gitattributes", "t.txt", "w.safetensors", "x"]


def test_an_error_of_the_double_itself_is_reported(monkeypatch):
    monkeypatch.setattr(hub_double, "listing", None)
    with pytest.raises(AssertionError, match="the Hub's double failed"), HubDouble() as hub:
        hub.put("someone/m", {})
        with pytest.raises(urllib.error.HTTPError):
            OPENER.open(f"{hub.url}/api/models/someone/m/tree/main", timeout=10)


def test_it_runs_by_hand(tmp_path):
    with subprocess.Popen(
        [sys.executable, hub_double.__file__, "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            url = server.stdout.readline().strip()
            with OPENER.open(f"{url}/api/models", timeout=10) as answer:
                assert json.load(answer) == []
        finally:
            server.terminate()
