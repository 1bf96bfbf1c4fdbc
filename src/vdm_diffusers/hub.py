"""Publishing on the Hugging Face Hub: who may push, what is pushed, the code that travels with it, and the model card.

    check_hub_access("me/my-model", private=True)          # before the first training step
    publish_folder("outputs/run", "me/my-model")           # or run_as_future=True, while training goes on
    write_model_card("outputs/run", ModelDescription(...))

A card states figures as `Measurement`s. Each carries its error bars, the data it was measured on, how, and a `Provenance`; there
is no way to write a number without them. What is pushed is the model, its card and its pictures, and nothing that looks like a
token; weights are safetensors.

A published repository loads in three ways: with this package, through Diffusers with this package imported, and without it, by
the code files that `publish_folder` adds (`travelling_code`): the package's own sources in one file, made when publishing.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata

import torch
from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

logger = logging.get_logger(__name__)

HUB_NAMESPACE: str | None = None
"""Where the models of `model_cards/` live on the Hub. While it is None they are loaded from that folder of a checkout."""

HUB_ERRORS = (OSError, ValueError, HfHubHTTPError.__bases__[0])
"""What a push may fail with: no connection, an answer that is an error, nobody logged in, a name that is none, no right to push."""

CODE_FILE = "vdm_diffusers.py"
CODE_PATHS = (CODE_FILE, f"unet/{CODE_FILE}", f"scheduler/{CODE_FILE}")
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif")
# of users, of organisations, and those that the Hub gives to apps and jobs
_TOKEN = re.compile(r"\b(?:hf_(?:oauth_|jwt_)|api_org_|hf_)[A-Za-z0-9][\w.-]{15,}")
_WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)\S*\.(?:safetensors|bin|index\S*\.json|safetensors\.index\S*\.json)"
)
_UPLOAD_TRIES = 3


def model_location(name: str) -> str:
    """What `from_pretrained` is given for the model of `model_cards/<name>`: its Hub id once published, else the folder."""
    return f"{HUB_NAMESPACE}/{name}" if HUB_NAMESPACE else f"model_cards/{name}"


# --- pushing ----------------------------------------------------------------------------------------------------------


def check_hub_access(
    repo_id: str, *, private: bool | None = None, token: str | None = None, create_pr: bool = False
) -> str:
    """Make sure that `repo_id` can be pushed to, and create it if it does not exist: before hours are spent on training.

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
        PermissionError: the token may not write there, or a private repository was asked for and there is a public one.
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
            f"a private repository was asked for and {full_id!r} exists and is public: make it private on the Hub, or choose "
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
        folder: what `VDMPipeline.save_pretrained` wrote. Without a README.md in it or in the repository a short card is made.
        repo_id, private, token: as in `check_hub_access`.
        revision: branch to push to, created if it does not exist; None: "main".
        create_pr: open a pull request instead.
        tag: given to the commit. One that exists and is not the branch's head is refused before anything is sent.
        run_as_future: return at once; the folder is copied first, so that training may overwrite it. Pushes queue up in order.
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
        content["README.md"] = _with_usage(readme.read_text(encoding="utf-8"), repo_id, folder).encode()
    elif not api.file_exists(repo_id, "README.md", revision=None if create_pr else revision):
        content["README.md"] = _short_card(repo_id, folder).encode()
    if _class_name(folder) == "VDMPipeline":
        content.update(dict.fromkeys(CODE_PATHS, travelling_code().encode()))
    base = None if create_pr else revision
    stale = _stale_weights(api.list_repo_files(repo_id, revision=base), content)
    tags = {held.name: held.target_commit for held in refs.tags}
    if tag in tags:
        head = api.repo_info(repo_id, revision=revision).sha
        if tags[tag] != head or stale or not _is_held(api, repo_id, revision, content):
            raise ValueError(
                f"`tag` {tag!r} exists in {repo_id} and is another commit ({tags[tag]}): choose a new one. Nothing was sent."
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
    """Whatever the block saves into a pipeline's folder replaces the weights of its components whole, of the same variant.

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
    """The variant in a weight file's name, "" for none: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ..."""
    name = re.sub(r"-\d{5}-of-\d{5}|\.index|\.safetensors|\.bin|\.json", "", path.name)
    return name.partition(".")[2]


def _index(folder: pathlib.Path) -> pathlib.Path:
    """What names the class: a pipeline's model_index.json, or a model's config.json."""
    pipeline = folder / "model_index.json"
    return pipeline if pipeline.is_file() else folder / "config.json"


def _class_name(folder: pathlib.Path) -> str:
    return str(json.loads(_index(folder).read_text(encoding="utf-8"))["_class_name"])


def _publishable(folder: pathlib.Path, token: str | None) -> list[str]:
    """Paths of what is pushed, relative to `folder`."""
    index = _index(folder)
    if not index.is_file():
        raise ValueError(
            f"`folder` must hold a pipeline or a model, got {str(folder)!r} without model_index.json or config.json: save_pretrained first."
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
            if _TOKEN.search(text) or (own and own in text):
                raise ValueError(
                    f"{path} holds what looks like an access token: nothing was uploaded. Remove it, and revoke it."
                )
    return sorted(path.relative_to(folder).as_posix() for path in files)


# --- the code that travels --------------------------------------------------------------------------------------------

_TRAVELLERS = ("models/unet_vdm", "schedulers/scheduling_vdm", "pipelines/pipeline_vdm")  # with all that they import


def has_travelled() -> bool:
    """Whether this very code was loaded from a repository instead of the installed package."""
    return pathlib.Path(__file__).name == CODE_FILE


@cache
def travelling_code() -> str:
    """One self-contained module with the network, the scheduler and the pipeline, made of the package's own sources.

    Diffusers imports each code file of a repository as a module of its own, and those in folders under one and the same
    name: so a repository carries three copies of one file. In a copy that has travelled this returns the copy, and what was
    loaded from a repository can be published again.
    """
    if has_travelled():
        return pathlib.Path(__file__).read_text(encoding="utf-8")
    package = pathlib.Path(__file__).parent
    sources: dict[str, str] = {}

    def collect(module: str) -> None:
        if module in sources:
            return
        source = (package / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if (own := _own_module(node, module)) is not None:
                collect(own)
        sources[module] = source  # after what it needs

    for module in _TRAVELLERS:
        collect(module)
    header = (
        f"# vdm-diffusers {metadata.version('vdm-diffusers')} (Apache-2.0) in one file, for those who load this repository without the\n"
        "# package: made from the package's sources when the model was published, not to be edited.\n"
    )
    return header + _joined(sources)


def write_travelling_code(folder: str | os.PathLike[str]) -> None:
    """Write `travelling_code` where a repository carries it, so that the folder loads without this package."""
    for name in CODE_PATHS:
        path = pathlib.Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(travelling_code(), encoding="utf-8")


def _own_module(node: ast.AST, module: str) -> str | None:
    """The module of this package that an import statement of `module` names, as a path such as "models/fourier"."""
    if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vdm_diffusers" for alias in node.names):
        raise ValueError(
            f"{module} says `{ast.unparse(node)}`: in code that travels write `from .module import name`."
        )
    if not isinstance(node, ast.ImportFrom):
        return None
    parts = (node.module or "").split(".") if node.module else []
    if node.level:
        parents = module.split("/")[:-1]
        parts = [*parents[: len(parents) - node.level + 1], *parts]
    elif parts[:1] != ["vdm_diffusers"]:
        return None
    else:
        parts = parts[1:]
    if not (pathlib.Path(__file__).parent / "/".join(parts)).with_suffix(".py").is_file():
        raise ValueError(
            f"{module} says `{ast.unparse(node)}`: code that travels imports names from modules, not from packages."
        )
    return "/".join(parts)


def _joined(sources: Mapping[str, str]) -> str:
    """The modules one after another, the imports of each other resolved and the others gathered at the top.

    A private name that two modules define is made unique. Raises ValueError for a public one, and for an import of a
    module of the package inside a function.
    """
    imports: dict[str, tuple[str | None, str]] = {}  # name -> module it comes from (None: is one), name there
    bodies: list[str] = []
    taken: dict[str, str] = {}  # name in the joined file -> the statement that defines it
    names: dict[str, dict[str, str]] = {}  # module -> its top-level names -> their names in the joined file
    for module, source in sources.items():
        tree, lines = ast.parse(source), source.splitlines()
        drop: set[int] = set()
        renamed: dict[str, str] = {}
        names[module] = {}
        top_imports = set()
        for index, node in enumerate(tree.body):
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            docstring = index == 0 and isinstance(node, ast.Expr)
            if docstring or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                drop.update(span)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                drop.update(span)
                top_imports.add(node)
                own = _own_module(node, module)
                for alias in node.names:
                    if own is not None:
                        final = names[own].get(alias.name, alias.name)
                        if final != (alias.asname or alias.name):
                            renamed[alias.asname or alias.name] = final
                    else:
                        source_module = node.module if isinstance(node, ast.ImportFrom) else None
                        if imports.setdefault(alias.asname or alias.name, (source_module, alias.name)) != (
                            source_module,
                            alias.name,
                        ):
                            raise ValueError(
                                f"{module} imports another {alias.asname or alias.name!r} than a module before it."
                            )
            for name in set(_defined(node)) - set(names[module]):
                statement, final = ast.unparse(node), name
                if taken.get(name) == statement:
                    drop.update(span)  # the same thing said twice, such as a logger
                elif name in taken and name.startswith("_"):
                    final = renamed[name] = f"_{module.rpartition('/')[2]}{name}"
                elif name in taken:
                    raise ValueError(
                        f"{name!r} of {module} is defined in another module too: code that travels needs one."
                    )
                taken.setdefault(final, statement)
                names[module][name] = final
        for inner in ast.walk(tree):
            nested = isinstance(inner, (ast.Import, ast.ImportFrom)) and inner not in top_imports
            if nested and _own_module(inner, module):
                raise ValueError(f"{module} imports from the package inside a function: code that travels cannot.")
        kept = "\n".join("" if number in drop else line for number, line in enumerate(lines, 1))
        bodies.append(f"# --- {module} ---\n\n{_rename(kept, renamed).strip()}\n")
    if both := sorted(set(imports) & set(taken)):
        raise ValueError(
            f"{', '.join(both)} is imported in one module and defined in another: code that travels needs one name each."
        )
    return _import_lines(imports) + "\n\n\n" + "\n\n".join(re.sub(r"\n{4,}", "\n\n\n", body) for body in bodies)


def _import_lines(imports: Mapping[str, tuple[str | None, str]]) -> str:
    plain: list[str] = []
    grouped: dict[str, list[str]] = {}
    for name, (module, original) in sorted(imports.items()):
        said = original if name == original else f"{original} as {name}"
        if module is None:
            plain.append(f"import {said}")
        else:
            grouped.setdefault(module, []).append(said)
    lines = {module: f"from {module} import {', '.join(said)}" for module, said in sorted(grouped.items())}
    return "\n".join([lines.pop("__future__"), *plain, *lines.values()])


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _rename(source: str, names: Mapping[str, str]) -> str:
    """`source` with every use of a name (not of an attribute) replaced."""
    if not names:
        return source
    lines = source.splitlines()
    previous = ""
    edits = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in names and previous != ".":
            edits.append((token.start, token.end, names[token.string]))
        previous = token.string
    for (row, start), (_, end), new in reversed(edits):
        lines[row - 1] = lines[row - 1][:start] + new + lines[row - 1][end:]
    return "\n".join(lines)


# --- the model card ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """How a number or a file came about: enough to make it again. Every field is required, and none may be empty.

    Arguments:
        command: as typed; tokens in it are blotted out. seed: of the run.
        versions: of python and the packages that matter. machine: what it ran on. date: ISO 8601, UTC.
    """

    command: str
    seed: int
    versions: Mapping[str, str]
    machine: str
    date: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", redact(self.command))
        _require_text(self, "command", "machine", "date")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"`seed` must be a whole number, got {self.seed!r}.")
        missing = {"vdm-diffusers", "torch", "diffusers"} - set(self.versions)
        if missing:
            raise ValueError(f"`versions` must name {', '.join(sorted(missing))} too.")

    @classmethod
    def of_this_run(cls, seed: int, command: str | None = None) -> Provenance:
        """This process, now: `command` None stands for what it was started with."""
        packages = ("vdm-diffusers", "torch", "diffusers", "numpy")
        accelerators = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return cls(
            command=command or shlex.join(["python", *map(_without_place, sys.argv)]),
            seed=seed,
            versions={"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
            machine=", ".join([f"{os.cpu_count()} CPU cores ({platform.machine()})", *sorted(accelerators)]),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _without_place(argument: str) -> str:
    """A command's argument for other machines: a path below this folder from here on, another one of the whole disk by its last part."""
    if not os.path.isabs(argument):
        return argument
    below = os.path.relpath(argument)
    return os.path.basename(argument.rstrip(os.sep)) if below.startswith(os.pardir) else below


@dataclass(frozen=True)
class EvaluationData:
    """The data of a figure: name for people, identifier (a Hub dataset, or what provides it), version, split, images used."""

    name: str
    identifier: str
    version: str
    split: str
    num_images: int
    config: str | None = None

    def __post_init__(self) -> None:
        _require_text(self, "name", "identifier", "version", "split")
        if self.num_images < 1:
            raise ValueError(f"`num_images` must be at least 1, got {self.num_images}.")


@dataclass(frozen=True)
class Measurement:
    """Bits/dim, and all that one must know to believe it. Every field without a default is required.

    Arguments:
        bits_per_dim: mean over the images.
        standard_error: of the estimator, for these images. sampling_error: between images, std / sqrt(N); None for one image.
        method: for people, such as "ELBO in continuous time". is_bound: an upper bound, or the likelihood itself.
        num_steps: of the discrete chain or the solver; None in continuous time.
        log_snr_max, log_snr_min: the end points of the schedule; None for a model without one.
        num_model_evaluations: in all, or for each image, as the evaluator counts.
        data, provenance: what was measured, and how.
        prior, diffusion, reconstruction: the terms of the bound in bits/dim, None where the method has none.
    """

    bits_per_dim: float
    standard_error: float
    sampling_error: float | None
    method: str
    is_bound: bool
    num_steps: int | None
    log_snr_max: float | None
    log_snr_min: float | None
    num_model_evaluations: int
    data: EvaluationData
    provenance: Provenance
    prior: float | None = None
    diffusion: float | None = None
    reconstruction: float | None = None

    def __post_init__(self) -> None:
        _require_text(self, "method")
        one_image = isinstance(self.data, EvaluationData) and self.data.num_images == 1
        for name in ("bits_per_dim", "standard_error", "sampling_error", "log_snr_max", "log_snr_min"):
            value = getattr(self, name)
            if value is None and name.startswith("log_snr") and self.log_snr_max is self.log_snr_min:
                continue
            if name == "sampling_error" and value is None and one_image:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        if min(self.standard_error, self.sampling_error or 0) < 0:
            raise ValueError(
                f"`standard_error` and `sampling_error` must not be negative, got {self.standard_error} and {self.sampling_error}."
            )
        for name, kind in (("data", EvaluationData), ("provenance", Provenance)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"`{name}` must be {kind.__name__}, got {getattr(self, name)!r}: no figure without it."
                )

    @property
    def error(self) -> float:
        """Both errors combined."""
        return math.hypot(self.standard_error, self.sampling_error or 0)


@dataclass(frozen=True)
class ModelDescription:
    """What a model card says.

    Arguments:
        title: of the card. summary: a sentence or two. license: SPDX identifier in the Hub's spelling, such as "apache-2.0".
        training: how it was trained, in prose; training_data: identifiers. provenance: of the weights. duration: of the training.
        measurements: the figures. limitations: at least one.
        location: what `from_pretrained` is given; see `model_location`.
        images: file in the folder -> caption: the sample grid, curves.
        num_inference_steps: for the examples.
    """

    title: str
    summary: str
    license: str
    training: str
    training_data: Sequence[str]
    provenance: Provenance
    duration: str
    measurements: Sequence[Measurement]
    limitations: Sequence[str]
    location: str
    images: Mapping[str, str] = field(default_factory=dict)
    num_inference_steps: int = 250
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        _require_text(self, "title", "summary", "license", "training", "duration", "location")
        if not isinstance(self.provenance, Provenance):
            raise ValueError(f"`provenance` must be a Provenance, got {self.provenance!r}.")
        if not all(isinstance(m, Measurement) for m in self.measurements):
            raise ValueError("`measurements` must be Measurements: a bare number has no provenance.")
        if not self.limitations:
            raise ValueError("`limitations` must name at least one: every model has them.")


def redact(text: str) -> str:
    """`text` without access tokens: whatever looks like one, and whatever follows an option such as --hub_token."""
    text = re.sub(r"(--?\w*token)(=|\s+)(?!-)(\S+)", r"\1\2***", text)
    return _TOKEN.sub("***", text)


def write_model_card(folder: str | os.PathLike[str], description: ModelDescription) -> pathlib.Path:
    """Write README.md into the folder of a saved `VDMPipeline`: metadata with the model-index, figures, usage, provenance.

    The code in the section on usage runs as printed where `description.location` can be loaded; `publish_folder` puts the
    repository's name there. Raises ValueError if an image is not in the folder.
    """
    folder = pathlib.Path(folder)
    missing = [name for name in description.images if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"`images` must be files in {folder}, got {missing}.")
    data = _card_data(description.license, description.tags)
    data.datasets = list(description.training_data) or None
    data.model_name = description.title
    data.eval_results = [_eval_result(m) for m in description.measurements] or None
    sections = [
        f"# {description.title}",
        description.summary,
        *(f"![{caption}]({name})\n\n*{caption}*" for name, caption in description.images.items()),
        *(["## Likelihood", _figures(description.measurements)] if description.measurements else []),
        "## Usage",
        f"{_USAGE[0]}\n{_usage(description.location, folder, description.num_inference_steps, published=False)}\n{_USAGE[1]}",
        "## Training",
        description.training,
        _provenance_table(description.provenance, {"time": description.duration}),
        "## Limitations",
        "\n".join(f"- {limitation}" for limitation in description.limitations),
    ]
    path = folder / "README.md"
    card = redact(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")))
    if (kept := _set_aside(path)) is not None:
        logger.warning(f"{path} was changed by hand: it is kept as {kept.name}.")
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text(f"{card}\n{_MARK.format(_digest(card))}\n", encoding="utf-8")
    temporary.replace(path)
    return path


_MARK = "<!-- written by vdm_diffusers, {} -->"


def _digest(card: str) -> str:
    return hashlib.blake2b(card.strip().encode(), digest_size=8).hexdigest()


def _set_aside(card: pathlib.Path) -> pathlib.Path | None:
    """Rename a card that somebody wrote, or changed since it was written here; the new name, or None."""
    if not card.is_file():
        return None
    text = card.read_bytes().decode("utf-8", errors="replace").rstrip()
    body, _, last = text.rpartition("\n")
    if last == _MARK.format(_digest(body)):
        return None
    number = 1
    while (kept := card.with_name(f"README.kept-{number}.md")).exists():
        number += 1
    return card.rename(kept)


_USAGE = ("<!-- usage: written by vdm_diffusers -->", "<!-- end of usage -->")


def _card_data(license: str | None, tags: Sequence[str] = ()) -> ModelCardData:
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=sorted({"diffusers", "vdm-diffusers", "variational-diffusion-model", *tags}),
    )


def _eval_result(m: Measurement) -> EvalResult:
    return EvalResult(
        task_type="unconditional-image-generation",
        task_name="Density estimation",
        dataset_type=m.data.identifier,
        dataset_name=m.data.name,
        dataset_config=m.data.config,
        dataset_split=m.data.split,
        dataset_revision=m.data.version
        if re.fullmatch(r"[0-9a-f]{40}", m.data.version)
        else None,  # a commit, or none
        metric_type="bits_per_dim",
        metric_name=f"bits/dim ({m.method}{', upper bound' if m.is_bound else ''})",
        metric_value=round(float(m.bits_per_dim), 6),
        metric_args={
            "standard_error": float(m.standard_error),
            "sampling_error": None if m.sampling_error is None else float(m.sampling_error),
            "method": m.method,
            "is_bound": m.is_bound,
            "num_steps": "continuous time" if m.num_steps is None else m.num_steps,
            **({} if m.log_snr_max is None else {"log_snr_max": float(m.log_snr_max)}),
            **({} if m.log_snr_min is None else {"log_snr_min": float(m.log_snr_min)}),
            "num_images": m.data.num_images,
            "data_version": m.data.version,
            "num_model_evaluations": m.num_model_evaluations,
            "command": m.provenance.command,
            "seed": m.provenance.seed,
            "versions": dict(m.provenance.versions),
            "machine": m.provenance.machine,
            "date": m.provenance.date,
        },
    )


def _figures(measurements: Sequence[Measurement]) -> str:
    rows = [
        "| data | bits/dim | prior + diffusion + reconstruction | method | end points (log SNR) |",
        "|---|---|---|---|---|",
    ]
    for m in measurements:
        terms = (m.prior, m.diffusion, m.reconstruction)
        split = " + ".join(f"{term:.4f}" for term in terms if term is not None) or "-"
        steps = "" if m.num_steps is None else f", {m.num_steps} steps"
        data = _cell(f"{m.data.name} {m.data.version}, {m.data.split}, {m.data.num_images} images")
        bound = "≤ " if m.is_bound else ""
        ends = "-" if m.log_snr_max is None else f"{m.log_snr_max:g}, {m.log_snr_min:g}"
        rows.append(f"| {data} | {bound}{m.bits_per_dim:.4f} ± {m.error:.4f} | {split} | {m.method}{steps} | {ends} |")
    errors = [
        (
            f"The error is the estimator's own: one image says nothing of others ({m.standard_error:.2g}).\n\n"
            if m.sampling_error is None
            else f"The error combines the estimator's own ({m.standard_error:.2g}) with that between images ({m.sampling_error:.2g}).\n\n"
        )
        + _provenance_table(m.provenance, {"model evaluations": str(m.num_model_evaluations)})
        for m in measurements
    ]
    return "\n".join(rows) + "\n\n" + "\n\n".join(errors)


def _provenance_table(provenance: Provenance, more: Mapping[str, str]) -> str:
    rows = {
        "command": f"`{provenance.command}`",
        "seed": str(provenance.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
        "machine": provenance.machine,
        "date": provenance.date,
        **more,
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())


def _cell(text: str) -> str:
    """Text that keeps to its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _usage(location: str, folder: pathlib.Path, num_inference_steps: int, published: bool) -> str:
    """How to sample and to evaluate, as code that runs."""
    index = json.loads(_index(folder).read_text(encoding="utf-8"))
    class_name = index["_class_name"]
    if class_name in ("VariationalAutoencoder", "HierarchicalVAE"):
        size = index["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return "\n".join(
            [
                "With the package `vdm-diffusers` installed:",
                "```python",
                "import torch",
                f"from vdm_diffusers import {class_name}, evaluate_latent_likelihood",
                "",
                f'model = {class_name}.from_pretrained("{location}")',
                f"levels = model.sample(4)  # integers 0 to {index['num_levels'] - 1}",
                f"images = torch.randint({index['num_levels']}, (8, {index['in_channels']}, {height}, {width}))  # yours in place of noise",
                "report = evaluate_latent_likelihood(model.bound, images)",
                "print(report.bits_per_dim, report.standard_error)",
                "```",
            ]
        )
    if class_name != "VDMPipeline":
        library = "vdm_diffusers" if class_name == "LatentVDMPipeline" else "diffusers"
        load = f'pipe = {class_name}.from_pretrained("{location}")'
        return f"```python\nfrom {library} import {class_name}\n\n{load}\nimages = pipe(batch_size=4).images\n```"
    network = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    size = network.get("sample_size") or 32
    height, width = (size, size) if isinstance(size, int) else size
    classes = network.get("num_class_embeds")
    labels = "class_labels=[0, 0, 0, 0], " if classes else ""
    sample = f"pipe(batch_size=4, {labels}num_inference_steps={num_inference_steps})"
    levels, encoding = index.get("num_levels", 256), index.get("pixel_encoding", "bin_center")
    label_argument = ", class_labels=torch.zeros(8, dtype=torch.long)" if classes else ""
    blocks = [
        "With the package `vdm-diffusers` installed:",
        "```python",
        "from vdm_diffusers import VDMPipeline",
        "",
        f'pipe = VDMPipeline.from_pretrained("{location}")',
        f"images = {sample}.images  # PIL images",
        "```",
        f"Its likelihood of your own images, integers 0 to {levels - 1} (the model knows them as `{encoding}`):",
        "```python",
        "import torch",
        "from vdm_diffusers import evaluate_likelihood",
        "",
        f"images = torch.randint({levels}, (8, {network.get('in_channels', 3)}, {height}, {width}))  # yours in place of noise",
        f"report = evaluate_likelihood(pipe, images{label_argument})",
        "print(report.bits_per_dim, report.standard_error)",
        "```",
    ]
    if published:
        blocks += [
            "Without it, by the code in this repository (read it first: `trust_remote_code` runs it):",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{location}", custom_pipeline="vdm_diffusers", trust_remote_code=True)',
            f"images = {sample}.images",
            "```",
        ]
    return "\n".join(blocks)


def _with_usage(card: str, repo_id: str, folder: pathlib.Path) -> str:
    """The card with its section on usage made for the repository; a card without the marks is left as it is."""
    start, end = card.find(_USAGE[0]), card.find(_USAGE[1])
    if min(start, end) < 0:
        return card
    steps = re.search(r"num_inference_steps=(\d+)", card[start:end])
    usage = _usage(repo_id, folder, int(steps[1]) if steps else 250, published=True)
    return f"{card[: start + len(_USAGE[0])]}\n{usage}\n{card[end:]}"


def _short_card(repo_id: str, folder: pathlib.Path) -> str:
    """For a repository that would have no card: what it is and how to use it, and not one figure."""
    return str(
        ModelCard(
            f"---\n{_card_data(None).to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\nA variational diffusion model.\n\n## Usage\n\n"
            f"{_USAGE[0]}\n{_usage(repo_id, folder, 250, published=True)}\n{_USAGE[1]}\n"
        )
    )


def _require_text(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{name}` of {type(record).__name__} must be text, got {value!r}.")
