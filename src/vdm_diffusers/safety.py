"""Looks at a checkpoint before anything is built from it: what may be refused is refused before memory or disk is spent.

Nothing of a checkpoint is executed here or imported because the checkpoint names it, and no tensor is read: of safetensors
only the header. Sizes are compared three ways: what the configs describe, what the headers say, and what the files hold.
The pipelines' `from_pretrained` call this for folders, and for repositories before their weights are downloaded; the VAEs' for themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_DEPTH = 16
MAX_HEADER_BYTES = 16 * 2**20
MAX_TIMESTEPS = 10**6
MAX_SAMPLE_SIZE = 2**14
MAX_LAYERS = 4096
MAX_STOCK_TIMESTEPS = 20_000  # of Diffusers' schedulers, some of which walk through their table step by step
MAX_POSITIONS = 2**25  # entries of a transformer's table of positions, which no header counts
MAX_INTEGER = 2**24  # of any other entry of a config

_COMPONENTS = {
    "unet": (ModelMixin, "config.json"),
    "scheduler": (SchedulerMixin, "scheduler_config.json"),
    "vae": (ModelMixin, "config.json"),
}
_PIPELINES = {"VDMPipeline": ("unet", "scheduler"), "LatentVDMPipeline": ("vae", "unet", "scheduler")}
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")


logger = logging.get_logger(__name__)


HTTP_ERROR = HfHubHTTPError.__bases__[
    0
]  # of the library that huggingface_hub uses: no connection, and answers that are errors
OWN_FOLDERS = ("outputs/", "model_cards/")  # of this project's commands: no owner of repositories


class UnsafeCheckpointError(ValueError):
    """A checkpoint is damaged, hostile, or says things that do not go together."""


def check_checkpoint(
    folder: str | os.PathLike[str],
    *,
    pipeline: str = "VDMPipeline",
    passed: Collection[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Raise `UnsafeCheckpointError` unless `folder` holds a whole pipeline whose parts go together.

    Arguments:
        pipeline: the class that it must name.
        passed: components that the caller brings along, and that are not loaded from the folder.
        trust_remote_code: the caller's word that classes may come from code files of the checkpoint.
    """
    folder = pathlib.Path(folder)
    index = _read_json(folder / "model_index.json", folder)
    _check_config("pipeline", index)
    for name, (library, class_name) in _components(index, pipeline, passed).items():
        config = _read_json(folder / name / _COMPONENTS[name][1], folder)
        if trust_remote_code and (folder / name / f"{library}.py").is_file():
            continue
        component = _component_class(name, library, class_name)
        _check_config(name, config)
        if name == "scheduler":
            _build(component, config)
        else:
            for tensors in _weights(folder / name, folder).values():
                _check_shapes(component, config, tensors)


def check_repository(
    repo_id: str,
    *,
    pipeline: str = "VDMPipeline",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    passed: Collection[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Raise `UnsafeCheckpointError` for a repository whose list of files or whose configs are refused; no weights are fetched.

    What weights there are must not be larger than what the config describes needs in float64.
    Raises huggingface_hub's own errors where the repository cannot be read.
    """
    sizes, read = _repository(repo_id, revision, token, cache_dir)
    index = read("model_index.json")
    _check_config("pipeline", index)
    for name, (library, class_name) in _components(index, pipeline, passed).items():
        config = read(f"{name}/{_COMPONENTS[name][1]}")
        if trust_remote_code and f"{name}/{library}.py" in sizes:
            continue
        component = _component_class(name, library, class_name)
        _check_config(name, config)
        if name == "scheduler":
            _build(component, config)
        else:
            _check_sizes(
                component, config, {p: size for p, size in sizes.items() if p.startswith(f"{name}/")}, repo_id
            )


def check_model(
    component: type, source: str | os.PathLike[str], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Raise `UnsafeCheckpointError` for a model by itself that is refused, in a folder or, before its weights are fetched, on the Hub.

    Arguments:
        component: its class. source, options: what `from_pretrained` was given.
    Returns:
        The folder that was checked, and the options with `use_safetensors=True`: what to load.
    """
    if options.get("use_safetensors") is False:  # None is what a pipeline passes on
        raise ValueError("`use_safetensors` must be True: a pickled checkpoint runs code when it is loaded.")
    name, subfolder = component.__name__, options.get("subfolder") or ""
    check_location(source)
    if not os.path.isdir(source):
        place = {key: options.get(key) for key in ("revision", "token", "cache_dir")}
        cached = {"local_files_only": bool(options.get("local_files_only"))}
        if not cached["local_files_only"]:
            with cache_if_unreachable(str(source)) as cached:
                sizes, read = _repository(str(source), **place)
                prefix = f"{subfolder}/" if subfolder else ""
                config = read(f"{prefix}config.json")
                _check_class(name, config)
                _check_config(name, config)
                beside = {p: size for p, size in sizes.items() if p.rpartition("/")[0] == subfolder}
                _check_sizes(component, config, beside, str(source))
        # By its branch, which the cache then knows. What is checked below is what is loaded, whatever was pushed meanwhile.
        patterns = [f"{subfolder}/{kind}" if subfolder else kind for kind in ("*.json", "*.safetensors")]
        source = snapshot_download(str(source), allow_patterns=patterns, **cached, **place)
    folder = pathlib.Path(source) / subfolder
    config = _read_json(folder / "config.json", folder)
    _check_class(name, config)
    _check_config(name, config)
    for tensors in _weights(folder, folder).values():
        _check_shapes(component, config, tensors)
    return str(source), {**options, "use_safetensors": True}


def check_location(location: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError for what looks like a path and is not there: the Hub is asked for names alone."""
    text = os.fspath(location)
    looks = (
        not isinstance(location, str) or text.startswith((".", "/", "~", "\\", *OWN_FOLDERS)) or text.count("/") > 1
    )
    if looks and not os.path.isdir(text):
        raise FileNotFoundError(
            f"there is no folder {text!r}. (It looks like a path, so the Hub was not asked: a repository is called 'owner/name'.)"
        )


@contextlib.contextmanager
def cache_if_unreachable(repo_id: str) -> Iterator[dict[str, bool]]:
    """Leave the block, with one line of warning, where the Hub cannot be reached or has too much to do: the cache may do.

    Yields the further arguments of a download: local_files_only=True once the block was left.
    """
    options: dict[str, bool] = {}
    try:
        yield options
    except OfflineModeIsEnabled:
        return  # which the client knows itself
    except HTTP_ERROR as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None and status != 429 and status < 500:
            raise
        options["local_files_only"] = True
        logger.warning(
            f"the Hub does not answer ({status or type(error).__name__}): {repo_id} is looked for in the cache."
        )


def _check_class(name: str, config: Mapping[str, Any]) -> None:
    if config.get("_class_name") != name:
        raise UnsafeCheckpointError(
            f"config.json is of a {config.get('_class_name')!r}, not of a {name}: load it as that."
        )


def _repository(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[dict[str, int], Callable[[str], dict[str, Any]]]:
    """Path -> bytes of a repository's files, and a function that reads a config of it."""
    info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    for path in sizes:
        if (
            pathlib.PurePosixPath(path).is_absolute()
            or ".." in pathlib.PurePosixPath(path).parts
            or "\\" in path
            or ":" in path
        ):
            raise UnsafeCheckpointError(f"{repo_id} has a file whose path leads out of it: {path!r}.")

    def read(path: str) -> dict[str, Any]:
        if path not in sizes:
            raise UnsafeCheckpointError(f"{repo_id} is no whole checkpoint: it has no {path}.")
        if sizes[path] > MAX_JSON_BYTES:
            raise UnsafeCheckpointError(
                f"{path} of {repo_id} has {sizes[path]} bytes, a config has at most {MAX_JSON_BYTES}."
            )
        local = hf_hub_download(repo_id, path, revision=info.sha, token=token, cache_dir=cache_dir)
        return parse_json(pathlib.Path(local).read_bytes(), path)

    return sizes, read


def _check_sizes(component: type, config: Mapping[str, Any], sizes: Mapping[str, int], repo_id: str) -> None:
    """Raise unless the weight files of a component on the Hub are about as large as its config says."""
    weights = {path: size for path, size in sizes.items() if path.endswith(".safetensors")}
    if not weights:
        raise UnsafeCheckpointError(
            f"{repo_id} has no weights as safetensors of {component.__name__}: pickled ones are not loaded."
        )
    _check_layers(config, max(weights.values()) // 4)  # a tensor takes four bytes of the file at the very least
    needed = sum(math.prod(shape) for shape in _expected_shapes(component, config).values())
    for path, size in weights.items():
        if size > 8 * needed + MAX_HEADER_BYTES:
            raise UnsafeCheckpointError(
                f"{path} of {repo_id} has {size} bytes, the model that its config describes has {needed} weights."
            )


# --- configs ----------------------------------------------------------------------------------------------------------


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object of bounded size and depth with finite numbers, or `UnsafeCheckpointError`."""
    if len(data) > MAX_JSON_BYTES:
        raise UnsafeCheckpointError(f"{name} has {len(data)} bytes, a config has at most {MAX_JSON_BYTES}.")
    # counted before parsing: the parser itself recurses
    text = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", text):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_JSON_DEPTH:
        raise UnsafeCheckpointError(f"{name} is nested {deepest} deep, a config at most {MAX_JSON_DEPTH}.")

    def refuse(constant: str) -> NoReturn:
        raise UnsafeCheckpointError(f"{name} holds {constant}, which is no number of JSON.")

    def real(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits[:20])

    def whole(digits: str) -> int:
        return int(digits) if len(digits) < 20 else refuse(f"{digits[:20]}...")

    try:
        value = json.loads(data, parse_constant=refuse, parse_float=real, parse_int=whole)
    except UnicodeDecodeError as error:
        raise UnsafeCheckpointError(f"{name} is not text in UTF-8: {error}.") from error
    except json.JSONDecodeError as error:
        raise UnsafeCheckpointError(f"{name} is not JSON: {error}. Was the download cut short?") from error
    if not isinstance(value, dict):
        raise UnsafeCheckpointError(f"{name} must hold an object, got {type(value).__name__}.")
    return value


def _read_json(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if not path.is_file():
        raise UnsafeCheckpointError(f"{folder} is no whole checkpoint: it has no {name}.")
    _check_inside(path, folder)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsafeCheckpointError(f"{name} has {path.stat().st_size} bytes, a config has at most {MAX_JSON_BYTES}.")
    return parse_json(path.read_bytes(), name)


def _check_inside(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Raise for a link that leads out of `folder`, other than to where huggingface_hub's cache keeps the contents of files."""
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise UnsafeCheckpointError(f"{path} is a link that leads nowhere: {error}.") from error
    if real.is_relative_to(root):
        return
    # a snapshot, of which a component is a folder, is made of links to the contents that the cache holds
    for snapshot in (root, root.parent):
        repository = snapshot.parent.parent
        if snapshot.parent.name != "snapshots" or "--" not in repository.name:
            continue
        # contents by Xet hash are shared by all repositories of a cache: blobs/ab/ab..., 64 hexadecimal digits
        name, two = real.name, real.name[:2]
        shared = re.fullmatch("[0-9a-f]{64}", name) and real.parent == repository.parent / "blobs" / two
        if shared or real.is_relative_to(repository / "blobs"):
            return
    raise UnsafeCheckpointError(f"{path} leads out of the checkpoint, to {real}.")


def _components(index: Mapping[str, Any], pipeline: str, passed: Collection[str]) -> dict[str, tuple[str, str]]:
    class_name = index.get("_class_name")
    if class_name != pipeline:
        right = (
            f"Load it by {class_name}.from_pretrained."
            if isinstance(class_name, str) and class_name in _PIPELINES
            else "A pipeline of Diffusers is adopted by VDMPipeline.from_pipe(DiffusionPipeline.from_pretrained(...))."
        )
        raise UnsafeCheckpointError(f"model_index.json must say `_class_name` {pipeline}, got {class_name!r}. {right}")
    listed = {name: value for name, value in index.items() if isinstance(value, list)}
    if set(listed) != set(_PIPELINES[pipeline]):
        raise UnsafeCheckpointError(
            f"model_index.json must have the components {', '.join(_PIPELINES[pipeline])}, got {', '.join(listed) or 'none'}."
        )
    for name, value in listed.items():
        if len(value) != 2 or not all(isinstance(v, str) and re.fullmatch(r"[A-Za-z_][\w.]*", v) for v in value):
            raise UnsafeCheckpointError(f"model_index.json must say [library, class] for {name}, got {value!r}.")
    return {name: (value[0], value[1]) for name, value in listed.items() if name not in passed}


def _component_class(name: str, library: str, class_name: str) -> type:
    """The class, of a module that is already imported: a checkpoint does not choose what is."""
    base = _COMPONENTS[name][0]
    module = importlib.import_module("diffusers") if library == "diffusers" else sys.modules.get(library)
    found = getattr(module, class_name, None) if module is not None and "." not in class_name else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UnsafeCheckpointError(
            f"model_index.json asks for `{class_name}` of `{library}` as {name}, and that is no {base.__name__} known here. A "
            "class of your own: import its module first. Code that comes with a checkpoint runs only with trust_remote_code=True."
        )
    return found


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    for key, value in _entries(config):
        limit = MAX_TIMESTEPS if "timesteps" in key else MAX_SAMPLE_SIZE if key == "sample_size" else MAX_INTEGER
        if isinstance(value, float) and limit != MAX_INTEGER:
            raise UnsafeCheckpointError(f"`{key}` of the {name}'s config must be a whole number, got {value}.")
        if isinstance(value, int) and abs(value) > limit:
            raise UnsafeCheckpointError(f"`{key}` of the {name}'s config is {value}, at most {limit} is accepted.")
        if isinstance(value, list) and len(value) > MAX_TIMESTEPS:
            raise UnsafeCheckpointError(
                f"`{key}` of the {name}'s config has {len(value)} entries, at most {MAX_TIMESTEPS}."
            )


def _check_cost(component: type, config: Mapping[str, Any]) -> None:
    """Raise for what would take long to build, or memory that no header speaks of."""
    steps, own = config.get("num_train_timesteps"), component.__name__ == "VDMScheduler"
    if isinstance(steps, int) and steps > MAX_STOCK_TIMESTEPS and not own:
        raise UnsafeCheckpointError(
            f"`num_train_timesteps` of a {component.__name__} is {steps}, at most {MAX_STOCK_TIMESTEPS} is accepted."
        )
    size, patch = config.get("sample_size"), config.get("patch_size")
    if size is not None and patch is not None:
        sides = [entry for entry in (size if isinstance(size, list) else [size, size]) if isinstance(entry, int)]
        width = [config.get(key) for key in ("num_attention_heads", "attention_head_dim")]
        numbers = [max(1, side // patch) for side in sides if isinstance(patch, int) and patch > 0]
        numbers += [entry for entry in width if isinstance(entry, int)]
        if math.prod(numbers) > MAX_POSITIONS:
            raise UnsafeCheckpointError(
                f"`sample_size` {size} in patches of {patch} makes a table of {math.prod(numbers)} entries for the positions, at most "
                f"{MAX_POSITIONS} are accepted."
            )


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            yield from _entries(entry, inner)
    elif isinstance(value, list):
        for entry in value:
            yield from _entries(entry, key)


def _check_layers(config: Mapping[str, Any], num_tensors: int) -> None:
    """A network of many layers is slow to build and large even without weights: it must have as many tensors at least."""
    layers = 1
    for key, value in _entries(config):
        if isinstance(value, int) and re.search(r"layers|depth|num_blocks", key):
            layers *= max(1, value)
    blocks = max(
        (len(v) for _, v in _entries(config) if isinstance(v, list) and all(isinstance(e, str) for e in v)), default=1
    )
    limit = min(num_tensors, MAX_LAYERS)
    if layers * max(1, blocks) > limit:
        raise UnsafeCheckpointError(
            f"the network's config describes {layers * max(1, blocks)} layers or more; its weights have room for {num_tensors} tensors, "
            f"and at most {MAX_LAYERS} layers are accepted."
        )


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(component: pathlib.Path, folder: pathlib.Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors' shapes by variant ("" is none), from the headers of all files of a component."""
    variants: dict[str, dict[str, tuple[int, ...]]] = {}
    headers: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in sorted(component.glob("*.safetensors")):
        found = _WEIGHTS.fullmatch(path.name)
        if found:
            _check_inside(path, folder)
            if not path.is_file():
                raise UnsafeCheckpointError(f"{path.name} is no file.")
            headers[path.name] = read_header(path)
            variants.setdefault(found["variant"] or "", {}).update(headers[path.name])
    for index in component.glob("*.index*.json"):
        _check_index(index.name, _read_json(index, folder), headers)
    if not variants:
        others = sorted(p.name for p in component.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        hint = f" {others[0]} is a pickle, which runs code when it is loaded: it is not." if others else ""
        raise UnsafeCheckpointError(f"{component} has no weights as safetensors.{hint}")
    return variants


def _check_index(name: str, index: Mapping[str, Any], headers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise unless an index of shards names the tensors that its shards hold, each where it is."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(index.get("metadata"), dict):
        raise UnsafeCheckpointError(f"{name} must have a `weight_map` that is not empty, and `metadata`.")
    for tensor, shard in shards.items():
        if shard not in headers:
            raise UnsafeCheckpointError(
                f"{name} names the shard {str(shard)[:80]!r}, which is no weight file beside it."
            )
        if tensor not in headers[shard]:
            raise UnsafeCheckpointError(f"{name} says that {tensor[:80]!r} is in {shard}, and it is not.")
    unnamed = sorted({tensor for shard in set(shards.values()) for tensor in headers[shard]} - set(shards))
    if unnamed:
        raise UnsafeCheckpointError(f"{name} leaves out {unnamed[0][:80]!r}, which is in the shards.")


def read_header(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, of which only the header is read, or `UnsafeCheckpointError`.

    The library checks that tensors lie in the file one after another, without gap or overlap, and fill it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise UnsafeCheckpointError(f"{path.name} cannot be read: {error.strerror}.") from error
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise UnsafeCheckpointError(
            f"{path.name} has {size} bytes and says that its header alone has {length}: it is cut short or no safetensors."
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UnsafeCheckpointError(f"{path.name} is damaged, cut short or no safetensors file: {error}.") from error


def _build(component: type, config: Mapping[str, Any]) -> Any:
    _check_cost(component, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it will be built again for use, and may warn then
            return component.from_config(dict(config))  # type: ignore[attr-defined]
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UnsafeCheckpointError(f"no {component.__name__} can be built from its config: {error}") from error


def _expected_shapes(component: type, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes without memory
        model = _build(component, config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_shapes(component: type, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    _check_layers(config, len(tensors))
    expected = _expected_shapes(component, config)
    for name, shape in expected.items():
        if tensors.get(name, shape) != shape:
            raise UnsafeCheckpointError(
                f"`{name}` has the shape {list(tensors[name])} in the weights and {list(shape)} by the network's config."
            )
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    # Diffusers renames tensors of its own old checkpoints while it loads them: then the count agrees
    renamed = len(tensors) == len(expected) and not component.__module__.startswith("vdm_diffusers")
    if missing and not renamed:
        raise UnsafeCheckpointError(f"the weights lack {len(missing)} tensors of the network, such as `{missing[0]}`.")
    if unknown and component.__module__.startswith("vdm_diffusers"):
        raise UnsafeCheckpointError(
            f"the weights hold {len(unknown)} tensors that the network does not have, such as `{unknown[0]}`."
        )
