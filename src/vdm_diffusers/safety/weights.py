"""Weight files of a checkpoint: safetensors headers within limits, and the tensors that the config asks for."""

from __future__ import annotations

import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vdm_diffusers.safety.configs import UnsafeCheckpointError, check_cost, check_inside, check_layers, read_json

MAX_HEADER_BYTES = 16 * 2**20
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")


def weight_headers(component: pathlib.Path, folder: pathlib.Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors' shapes by variant ("" is none), from the headers of all files of a component."""
    variants: dict[str, dict[str, tuple[int, ...]]] = {}
    headers: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in sorted(component.glob("*.safetensors")):
        found = _WEIGHTS.fullmatch(path.name)
        if found:
            check_inside(path, folder)
            if not path.is_file():
                raise UnsafeCheckpointError(f"{path.name} is no file.")
            headers[path.name] = read_header(path)
            variants.setdefault(found["variant"] or "", {}).update(headers[path.name])
    for index in component.glob("*.index*.json"):
        _check_index(index.name, read_json(index, folder), headers)
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
    """Name -> shape of the tensors in a safetensors file, of which only the header is read, or
    `UnsafeCheckpointError`.

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
            f"{path.name} has {size} bytes and says that its header alone has {length}: it is cut short or no "
            "safetensors."
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UnsafeCheckpointError(f"{path.name} is damaged, cut short or no safetensors file: {error}.") from error


def build_empty(component: type, config: Mapping[str, Any]) -> Any:
    check_cost(component, config)
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


def expected_shapes(component: type, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes without memory
        model = build_empty(component, config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(component: type, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    check_layers(config, len(tensors))
    expected = expected_shapes(component, config)
    for name, shape in expected.items():
        if tensors.get(name, shape) != shape:
            raise UnsafeCheckpointError(
                f"`{name}` has the shape {list(tensors[name])} in the weights and {list(shape)} by the network's "
                "config."
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
