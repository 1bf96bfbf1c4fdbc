"""Images and labels in every form that users have them in, as one tensor of integer levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vdm_diffusers.models.labels import default_label, null_label, num_classes

_CHANNELS = (1, 2, 3, 4)  # of an image, by which an array (..., H, W, C) is told from one (..., C, H, W)
_SHAPES = {2: "(N, D)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
_PIL_LEVELS = {"L": 256, "RGB": 256, "RGBA": 256, "LA": 256, "1": 2}


def data_ndim(network: Any) -> int | None:
    """Dimensions of a batch for a network whose class says it: 2 for vectors, 3 for audio, 4 for images, 5 for video;
    else None.
    """
    name, config = type(network).__name__, getattr(network, "config", None)
    if config is None:
        return None
    for marks, ndim in ((("MLP",), 2), (("1D",), 3), (("3D", "Video"), 5)):
        if any(mark in name for mark in marks):
            return ndim
    return 4 if config.get("sample_size") is not None else None


def load_images(images: Any, class_labels: Any, num_levels: int | None, ndim: int | None = None) -> tuple[Tensor, Any]:
    """All images as one integer tensor (N, C, H, W), or data of another shape (N, ...), and their labels.

    `ndim`: of a batch, where the network says it. Without it a tensor of three dimensions is one image of integers, or
    a batch (N, C, L) of numbers.

    Labels are read from the data set if `class_labels` names a column, and from batches of (images, labels) if it is
    None.
    """
    if isinstance(images, PIL.Image.Image):
        images = [images]
    if _is_dataset(images):
        column = _image_column(images)
        if isinstance(class_labels, str):
            class_labels = list(images[class_labels])
        images = (row[column] for row in images.select_columns([column]))
    elif isinstance(class_labels, str):
        raise ValueError(f"`class_labels` names a column, {class_labels!r}, but `images` is no datasets.Dataset.")
    batches = [images] if isinstance(images, (Tensor, np.ndarray)) else images
    if not isinstance(batches, Iterable):
        raise ValueError(
            "`images` must be an integer tensor (N, C, H, W), batches of them, PIL images, or a datasets.Dataset, got "
            f"{type(images).__name__}."
        )
    parts: list[Tensor] = []
    own_labels: list[Tensor] = []
    for batch in batches:
        if (
            isinstance(batch, (list, tuple))
            and len(batch) == 2
            and isinstance(batch[1], Tensor)
            and batch[1].ndim == 1
        ):
            batch, labels = batch
            own_labels.append(labels)
        part = to_levels(batch, num_levels, ndim)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"all of `images` must have one size, got {tuple(parts[0].shape[1:])} and {tuple(part.shape[1:])}: "
                "resize them "
                "as the model's training data were."
            )
        parts.append(part)
    levels = torch.cat(parts) if parts else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    if len(levels) == 0:
        raise ValueError("`images` holds no image.")
    return levels, torch.cat(own_labels) if own_labels and class_labels is None else class_labels


def read_once(images: Any) -> Any:
    """The same images, in a form that can be read again in the same order: batches of a loader become a list."""
    if isinstance(images, (Tensor, np.ndarray, PIL.Image.Image, list, tuple)) or _is_dataset(images):
        return images
    return list(images) if isinstance(images, Iterable) else images


def _as_batch(value: Any, ndim: int | None) -> Any:
    """Arrays, nested lists and single images as a tensor (B, C, H, W); anything else, and data of another `ndim`, as
    it is.
    """
    if ndim not in (None, 4):
        return torch.as_tensor(value) if isinstance(value, (np.ndarray, list, tuple)) else value
    if isinstance(value, (np.ndarray, list, tuple)) and not any(isinstance(one, Tensor) for one in value):
        array = np.asarray(value)
        last_is_channel = array.ndim in (3, 4) and array.shape[-1] in _CHANNELS and array.shape[-1] < array.shape[-3]
        array = np.moveaxis(array, -1, -3) if last_is_channel else array
        value = torch.from_numpy(np.ascontiguousarray(array)) if array.dtype != object else value
    elif isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) for one in value):
        value = torch.stack(list(value))
    return value[None] if isinstance(value, Tensor) and value.ndim == 3 else value


def to_levels(batch: Any, num_levels: int | None, ndim: int | None = None) -> Tensor:
    """A batch, or one image, as integers (B, C, H, W) on the CPU, in the smallest dtype; data of another shape
    likewise.
    """
    if (
        isinstance(batch, Tensor)
        and ndim is None
        and (batch.ndim in (2, 5) or (num_levels is None and batch.ndim == 3))
    ):
        ndim = batch.ndim
    batch = batch if isinstance(batch, PIL.Image.Image) else _as_batch(batch, ndim)
    shape = _SHAPES.get(ndim or 4, "(N, ...)")
    if num_levels is None:
        fits = isinstance(batch, Tensor) and batch.is_floating_point() and batch.ndim == (ndim or 4)
        if not (fits and bool(batch.isfinite().all())):
            raise ValueError(
                f"with `num_levels=None` `images` must be finite floats {shape}, as the model takes them."
            )
        return batch.detach().cpu().float()
    if isinstance(batch, PIL.Image.Image):
        mode_levels = _PIL_LEVELS.get(batch.mode)
        if mode_levels is None:
            raise ValueError(
                f"`images` holds a PIL image of mode {batch.mode!r}, whose values are no levels 0..255: convert it to "
                "'L' or 'RGB', "
                "or pass integer tensors."
            )
        if mode_levels != num_levels:
            raise ValueError(
                f"`images` holds PIL images of {mode_levels} levels, but `num_levels` is {num_levels}: pass integer "
                "tensors of levels "
                f"0..{num_levels - 1}."
            )
        width, height = batch.size
        data = bytearray(batch.convert("L").tobytes() if batch.mode == "1" else batch.tobytes())
        tensor = torch.frombuffer(data, dtype=torch.uint8).reshape(1, height, width, -1).permute(0, 3, 1, 2)
        return tensor.clamp(max=1) if batch.mode == "1" else tensor.contiguous()
    if not isinstance(batch, Tensor):
        raise ValueError(f"`images` must hold integer tensors (N, C, H, W) or PIL images, got {type(batch).__name__}.")
    if batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        top, dtype = num_levels - 1, "torch.uint8" if num_levels <= 256 else "torch.int32"
        low, high = (
            (float(v) for v in (batch.min(), batch.max())) if batch.is_floating_point() and batch.numel() else (0, 1)
        )
        known = {(0, 1): f"(images * {top})", (-1, 1): f"((images + 1) / 2 * {top})"}
        scaled = next((text for (a, b), text in known.items() if a <= low <= high <= b), None)
        raise ValueError(
            f"`images` must be integers 0..{top}, got {batch.dtype} from {low:g} to {high:g}. Likelihoods in "
            "bits/dim are of integers" + (f": pass {scaled}.round().to({dtype})." if scaled else ".")
        )
    if batch.ndim != (ndim or 4):
        raise ValueError(f"`images` must have shape {shape}, got {tuple(batch.shape)}.")
    batch = batch.detach().cpu()
    batch = batch.to(torch.int64) if batch.dtype in (torch.uint16, torch.uint32, torch.uint64) else batch
    if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < num_levels:
        raise ValueError(
            f"`images` must hold levels in 0..{num_levels - 1}, got {int(batch.min())}..{int(batch.max())}. Is "
            "`num_levels` right?"
        )
    return batch.to(torch.uint8 if num_levels <= 256 else torch.int32)


def _is_dataset(images: Any) -> bool:
    return all(hasattr(images, name) for name in ("features", "column_names", "select_columns"))


def _image_column(dataset: Any) -> str:
    """The column of a datasets.Dataset that holds images, found by its feature type."""
    columns = [name for name, feature in dataset.features.items() if type(feature).__name__ in ("Image", "Array3D")]
    if len(columns) != 1:
        raise ValueError(
            f"`images` must have one column of images, got {columns or 'none'} among {dataset.column_names}: choose "
            "with "
            "dataset.select_columns(...), or cast_column(name, datasets.Image())."
        )
    return columns[0]


def check_size(network: Callable[..., Any], levels: Tensor) -> None:
    """Raise ValueError unless the images have the size that the model's config states."""
    config = getattr(network, "config", None)
    channels, size = (
        (config.get(key) for key in ("in_channels", "sample_size")) if config is not None else (None, None)
    )
    if channels is not None and channels != levels.shape[1]:
        raise ValueError(f"`images` must have the model's {channels} channels, got shape {tuple(levels.shape)}.")
    if size is not None and levels.ndim == 4:
        expected = (size, size) if isinstance(size, int) else tuple(size)
        if expected != tuple(levels.shape[2:]):
            raise ValueError(
                f"`images` must have the model's size {expected[0]}x{expected[1]}, got "
                f"{levels.shape[2]}x{levels.shape[3]}: a bound at "
                "another size is one of a model that nobody trained. Resize the images as the training data were."
            )


def load_labels(network: Callable[..., Any], class_labels: Any, num_images: int) -> Tensor | None:
    classes, default = num_classes(network), default_label(network)
    if class_labels is None:
        if default is not None:
            return torch.full((num_images,), default)
        if classes is not None:
            raise ValueError(f"`class_labels` are needed: the model has {classes} classes.")
        return None
    labels = torch.as_tensor(class_labels)
    if labels.is_floating_point() or labels.ndim > 1 or (labels.ndim == 1 and len(labels) != num_images):
        raise ValueError(
            f"`class_labels` must be one whole number, or one for each of the {num_images} images, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}."
        )
    highest = max(
        [-1 if classes is None else classes - 1, *(k for k in (default, null_label(network)) if k is not None)]
    )
    if classes is not None and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= highest:
        raise ValueError(
            f"`class_labels` must lie in 0..{highest}, the model's own, got {int(labels.min())}..{int(labels.max())}."
        )
    return labels.long().expand(num_images)
