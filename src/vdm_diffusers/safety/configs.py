"""Configs of a checkpoint: JSON within limits, classes that are known, sizes that can be built."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_DEPTH = 16
MAX_TIMESTEPS = 10**6
MAX_SAMPLE_SIZE = 2**14
MAX_LAYERS = 4096
MAX_STOCK_TIMESTEPS = 20_000  # of Diffusers' schedulers, some of which walk through their table step by step
MAX_POSITIONS = 2**25  # entries of a transformer's table of positions, which no header counts
MAX_INTEGER = 2**24  # of any other entry of a config
COMPONENTS = {
    "unet": (ModelMixin, "config.json"),
    "scheduler": (SchedulerMixin, "scheduler_config.json"),
    "vae": (ModelMixin, "config.json"),
}
_PIPELINES = {"VDMPipeline": ("unet", "scheduler"), "LatentVDMPipeline": ("vae", "unet", "scheduler")}


class UnsafeCheckpointError(ValueError):
    """A checkpoint is damaged, hostile, or says things that do not go together."""


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


def read_json(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if not path.is_file():
        raise UnsafeCheckpointError(f"{folder} is no whole checkpoint: it has no {name}.")
    check_inside(path, folder)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsafeCheckpointError(f"{name} has {path.stat().st_size} bytes, a config has at most {MAX_JSON_BYTES}.")
    return parse_json(path.read_bytes(), name)


def check_inside(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Raise for a link that leads out of `folder`, other than to where huggingface_hub's cache keeps the contents of
    files.
    """
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


def component_entries(index: Mapping[str, Any], pipeline: str, passed: Collection[str]) -> dict[str, tuple[str, str]]:
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
            f"model_index.json must have the components {', '.join(_PIPELINES[pipeline])}, got "
            f"{', '.join(listed) or 'none'}."
        )
    for name, value in listed.items():
        if len(value) != 2 or not all(isinstance(v, str) and re.fullmatch(r"[A-Za-z_][\w.]*", v) for v in value):
            raise UnsafeCheckpointError(f"model_index.json must say [library, class] for {name}, got {value!r}.")
    return {name: (value[0], value[1]) for name, value in listed.items() if name not in passed}


def component_class(name: str, library: str, class_name: str) -> type:
    """The class, of a module that is already imported: a checkpoint does not choose what is."""
    base = COMPONENTS[name][0]
    module = importlib.import_module("diffusers") if library == "diffusers" else sys.modules.get(library)
    found = getattr(module, class_name, None) if module is not None and "." not in class_name else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UnsafeCheckpointError(
            f"model_index.json asks for `{class_name}` of `{library}` as {name}, and that is no {base.__name__} known "
            "here. A "
            "class of your own: import its module first. Code that comes with a checkpoint runs only with "
            "trust_remote_code=True."
        )
    return found


def check_config(name: str, config: Mapping[str, Any]) -> None:
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


def check_cost(component: type, config: Mapping[str, Any]) -> None:
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
                f"`sample_size` {size} in patches of {patch} makes a table of {math.prod(numbers)} entries for the "
                "positions, at most "
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


def check_layers(config: Mapping[str, Any], num_tensors: int) -> None:
    """A network of many layers is slow to build and large even without weights: it must have as many tensors at
    least.
    """
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
            f"the network's config describes {layers * max(1, blocks)} layers or more; its weights have room for "
            f"{num_tensors} tensors, "
            f"and at most {MAX_LAYERS} layers are accepted."
        )
