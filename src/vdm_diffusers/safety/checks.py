"""A checkpoint looked over as a whole: a folder, a repository before it is downloaded, a single model."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from vdm_diffusers.safety.configs import (
    COMPONENTS,
    MAX_JSON_BYTES,
    UnsafeCheckpointError,
    check_config,
    check_layers,
    component_class,
    component_entries,
    parse_json,
    read_json,
)
from vdm_diffusers.safety.locations import cache_if_unreachable, check_location
from vdm_diffusers.safety.weights import MAX_HEADER_BYTES, build_empty, check_shapes, expected_shapes, weight_headers

logger = logging.get_logger(__name__)


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
    index = read_json(folder / "model_index.json", folder)
    check_config("pipeline", index)
    for name, (library, class_name) in component_entries(index, pipeline, passed).items():
        config = read_json(folder / name / COMPONENTS[name][1], folder)
        if trust_remote_code and (folder / name / f"{library}.py").is_file():
            continue
        component = component_class(name, library, class_name)
        check_config(name, config)
        if name == "scheduler":
            build_empty(component, config)
        else:
            for tensors in weight_headers(folder / name, folder).values():
                check_shapes(component, config, tensors)


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
    """Raise `UnsafeCheckpointError` for a repository whose list of files or whose configs are refused; no weights are
    fetched.

    What weights there are must not be larger than what the config describes needs in float64.
    Raises huggingface_hub's own errors where the repository cannot be read.
    """
    sizes, read = _repository(repo_id, revision, token, cache_dir)
    index = read("model_index.json")
    check_config("pipeline", index)
    for name, (library, class_name) in component_entries(index, pipeline, passed).items():
        config = read(f"{name}/{COMPONENTS[name][1]}")
        if trust_remote_code and f"{name}/{library}.py" in sizes:
            continue
        component = component_class(name, library, class_name)
        check_config(name, config)
        if name == "scheduler":
            build_empty(component, config)
        else:
            _check_sizes(
                component, config, {p: size for p, size in sizes.items() if p.startswith(f"{name}/")}, repo_id
            )


def check_model(
    component: type, source: str | os.PathLike[str], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Raise `UnsafeCheckpointError` for a model by itself that is refused, in a folder or, before its weights are
    fetched, on the Hub.

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
                check_config(name, config)
                beside = {p: size for p, size in sizes.items() if p.rpartition("/")[0] == subfolder}
                _check_sizes(component, config, beside, str(source))
        # By its branch, which the cache then knows. What is checked below is what is loaded, whatever was pushed
        # meanwhile.
        patterns = [f"{subfolder}/{kind}" if subfolder else kind for kind in ("*.json", "*.safetensors")]
        source = snapshot_download(str(source), allow_patterns=patterns, **cached, **place)
    folder = pathlib.Path(source) / subfolder
    config = read_json(folder / "config.json", folder)
    _check_class(name, config)
    check_config(name, config)
    for tensors in weight_headers(folder, folder).values():
        check_shapes(component, config, tensors)
    return str(source), {**options, "use_safetensors": True}


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
    check_layers(config, max(weights.values()) // 4)  # a tensor takes four bytes of the file at the very least
    needed = sum(math.prod(shape) for shape in expected_shapes(component, config).values())
    for path, size in weights.items():
        if size > 8 * needed + MAX_HEADER_BYTES:
            raise UnsafeCheckpointError(
                f"{path} of {repo_id} has {size} bytes, the model that its config describes has {needed} weights."
            )
