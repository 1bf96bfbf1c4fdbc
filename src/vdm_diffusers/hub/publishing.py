"""Pushing to the Hub: who may, what is sent, and what happens where a push breaks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cache

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from vdm_diffusers.hub.cards import PICTURES, class_name, index_file, short_card, with_usage
from vdm_diffusers.hub.measurements import TOKEN
from vdm_diffusers.hub.travelling import CODE_PATHS, travelling_code
from vdm_diffusers.safety import HTTP_ERROR

logger = logging.get_logger(__name__)
HUB_ERRORS = (OSError, ValueError, HTTP_ERROR)
"""What a push may fail with: no connection, an answer that is an error, nobody logged in, a name that is none, no
right to push.
"""
_WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)\S*\.(?:safetensors|bin|index\S*\.json|safetensors\.index\S*\.json)"
)
_UPLOAD_TRIES = 3


def check_hub_access(
    repo_id: str, *, private: bool | None = None, token: str | None = None, create_pr: bool = False
) -> str:
    """Make sure that `repo_id` can be pushed to, and create it if it does not exist: before hours are spent on
    training.

    Arguments:
        repo_id: "namespace/name", or "name" for the user's own namespace.
        private: of a new repository; None: as the namespace has it. True refuses an existing public one.
        token: None: the one that `hf auth login` or HF_TOKEN left.
        create_pr: a pull request is to be opened, which anybody may do in anybody's repository that exists.
    Returns:
        The full "namespace/name".
    Raises:
        LocalTokenNotFoundError: nobody is logged in.
        HfHubHTTPError: the token is not valid.
        PermissionError: the token may not write there, or a private repository was asked for and there is a public
            one.
    """
    api = HfApi(token=token)
    user = api.whoami()
    namespace = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(
            f"`token` may only read, pushing to {repo_id!r} needs one that may write: hf auth login."
        )
    if create_pr and "/" in repo_id:
        return api.repo_info(repo_id).id
    if namespace not in (user["name"], *(org["name"] for org in user.get("orgs", []))):
        raise PermissionError(
            f"{user['name']} may not push to {repo_id!r}: {namespace} is neither that user nor an own organisation. "
            "To propose a change, pass create_pr=True."
        )
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(full_id).private:
        raise PermissionError(
            f"a private repository was asked for and {full_id!r} exists and is public: make it private on the Hub, or "
            "choose "
            "another name."
        )
    return full_id


def publish_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str = "Upload VDMPipeline",
    token: str | None = None,
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Push the checkpoint in `folder`, its card and its pictures as one commit, together with the code that loads it.

    Files that the repository already holds are not sent again, and where nothing has changed no commit is made. So a
    broken upload is resumed by calling this again. Folders of training state, logs and everything else stay behind.

    Arguments:
        folder: what `VDMPipeline.save_pretrained` wrote. Without a README.md in it or in the repository a short card
            is made.
        repo_id, private, token: as in `check_hub_access`.
        revision: branch to push to, created if it does not exist; None: "main".
        create_pr: open a pull request instead.
        tag: given to the commit. One that exists and is not the branch's head is refused before anything is sent.
        run_as_future: return at once; the folder is copied first, so that training may overwrite it. Pushes queue up
            in order.
    Returns:
        The commit, or a future of it.
    Raises:
        ValueError: no checkpoint in `folder`, weights that are no safetensors, something that looks like a token, or a
            tag that is taken.
        as `check_hub_access`, and huggingface_hub's own errors when the upload fails for good.
    """
    folder = pathlib.Path(folder)
    api = HfApi(token=token)
    files = _publishable(folder, token)
    if run_as_future:
        copy = pathlib.Path(tempfile.mkdtemp(prefix="vdm-diffusers-"))
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy / name)

        def push_and_clean() -> CommitInfo:
            try:
                return _push(api, copy, files, repo_id, private, revision, create_pr, tag, commit_message)
            finally:
                shutil.rmtree(copy, ignore_errors=True)

        return _uploads().run_as_future(push_and_clean)
    return _push(api, folder, files, repo_id, private, revision, create_pr, tag, commit_message)


@cache
def _uploads() -> HfApi:
    return HfApi()  # one queue for the process: two checkpoints never overtake each other


def _push(
    api: HfApi,
    folder: pathlib.Path,
    files: list[str],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    tag: str | None,
    commit_message: str,
) -> CommitInfo:
    token = api.token if isinstance(api.token, str) else None
    repo_id = check_hub_access(repo_id, private=private, token=token, create_pr=create_pr)
    refs = api.list_repo_refs(repo_id)
    if revision is not None and not create_pr and revision not in {branch.name for branch in refs.branches}:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    content: dict[str, bytes | str] = {name: str(folder / name) for name in files}
    readme = folder / "README.md"
    if readme.exists():
        content["README.md"] = with_usage(readme.read_text(encoding="utf-8"), repo_id, folder).encode()
    elif not api.file_exists(repo_id, "README.md", revision=None if create_pr else revision):
        content["README.md"] = short_card(repo_id, folder).encode()
    if class_name(folder) == "VDMPipeline":
        content.update(dict.fromkeys(CODE_PATHS, travelling_code().encode()))
    base = None if create_pr else revision
    stale = _stale_weights(api.list_repo_files(repo_id, revision=base), content)
    tags = {held.name: held.target_commit for held in refs.tags}
    if tag in tags:
        head = api.repo_info(repo_id, revision=revision).sha
        if tags[tag] != head or stale or not _is_held(api, repo_id, revision, content):
            raise ValueError(
                f"`tag` {tag!r} exists in {repo_id} and is another commit ({tags[tag]}): choose a new one. Nothing "
                "was sent."
            )
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in sorted(content.items())]
    for tries_left in reversed(range(_UPLOAD_TRIES)):
        try:
            api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=create_pr)
            break
        except RuntimeError:  # how older clients, which do not try again themselves, report a connection that broke
            if not tries_left:
                raise
    commit = api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
    if tag is not None and tag not in tags:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _stale_weights(held: Sequence[str], content: Mapping[str, object]) -> list[str]:
    """Weight files of the pushed components and variants that the push does not replace.

    A leftover index would keep the old weights in force.
    """
    pushed = (pathlib.PurePosixPath(name) for name in content if name.endswith(".safetensors"))
    fresh = {(path.parent, _variant(path)) for path in pushed}
    paths = (pathlib.PurePosixPath(name) for name in held if name not in content)
    return [str(p) for p in paths if _WEIGHT_FILE.fullmatch(p.name) and (p.parent, _variant(p)) in fresh]


def _is_held(api: HfApi, repo_id: str, revision: str | None, content: Mapping[str, bytes | str]) -> bool:
    """Whether the repository holds exactly these files already."""
    held = {info.path: info for info in api.get_paths_info(repo_id, list(content), revision=revision)}
    for name, value in content.items():
        data = value if isinstance(value, bytes) else pathlib.Path(value).read_bytes()
        info = held.get(name)
        if not isinstance(info, RepoFile):
            return False
        if info.lfs is not None:
            same = info.lfs.sha256 == hashlib.sha256(data).hexdigest()
        else:
            same = info.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if not same:
            return False
    return True


@contextlib.contextmanager
def replacing_weights(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever the block saves into a pipeline's folder replaces the weights of its components whole, of the same
    variant.

    Weights that were saved in shards before leave an index, which would keep the old ones in force.
    """

    def weights() -> dict[pathlib.Path, tuple[int, int]]:
        found = (path for path in pathlib.Path(folder).glob("*/*") if _WEIGHT_FILE.fullmatch(path.name))
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    before = weights()
    yield
    after = weights()
    fresh = {(path.parent, _variant(path)) for path, state in after.items() if before.get(path) != state}
    for path, state in before.items():
        if after.get(path) == state and (path.parent, _variant(path)) in fresh:
            path.unlink()


def _variant(path: pathlib.PurePath) -> str:
    """The variant in a weight file's name, "" for none: model.fp16.safetensors,
    model.fp16-00001-of-00002.safetensors, ...
    """
    name = re.sub(r"-\d{5}-of-\d{5}|\.index|\.safetensors|\.bin|\.json", "", path.name)
    return name.partition(".")[2]


def _publishable(folder: pathlib.Path, token: str | None) -> list[str]:
    """Paths of what is pushed, relative to `folder`."""
    index = index_file(folder)
    if not index.is_file():
        raise ValueError(
            f"`folder` must hold a pipeline or a model, got {str(folder)!r} without model_index.json or config.json: "
            "save_pretrained first."
        )
    parts = [path for path in folder.glob("diffusion_pytorch_model*") if index.name == "config.json"]
    if index.name == "model_index.json":
        listed = json.loads(index.read_text(encoding="utf-8"))
        components = [name for name, value in listed.items() if isinstance(value, list)]
        parts = [path for name in components for path in (folder / name).glob("*") if path.is_file()]
    pickled = [path.name for path in parts if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickled:
        raise ValueError(f"weights are published as safetensors only, got {pickled[0]}: save_pretrained writes them.")
    files = [index, *(path for path in parts if path.suffix in (".safetensors", ".json"))]
    files += [path for path in folder.iterdir() if path.name == "README.md" or path.suffix.lower() in PICTURES]
    own = token or get_token()
    for path in files:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link that leads out of the folder: nothing was uploaded. Put the file itself there."
            )
        if path.suffix in (".json", ".md", ".svg"):
            text = path.read_bytes().decode("utf-8", errors="replace")  # a picture may be in another encoding
            if TOKEN.search(text) or (own and own in text):
                raise ValueError(
                    f"{path} holds what looks like an access token: nothing was uploaded. Remove it, and revoke it."
                )
    return sorted(path.relative_to(folder).as_posix() for path in files)
