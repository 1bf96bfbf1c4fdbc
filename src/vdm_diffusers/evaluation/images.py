"""Images and labels in every form that users have them in, as one tensor of integer levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from vdm_diffusers.models.labels import default_label, num_classes

_PIL_LEVELS = {"L": 256, "RGB": 256, "RGBA": 256, "LA": 256, "1": 2}


def load_images(images: Any, class_labels: Any, num_levels: int | None) -> tuple[Tensor, Any]:
    """All images as one integer tensor (N, C, H, W), and the labels, read from the data set if they name a column."""
    if isinstance(images, PIL.Image.Image):
        images = [images]
    if _is_dataset(images):
        column = _image_column(images)
        if isinstance(class_labels, str):
            class_labels = list(images[class_labels])
        images = (row[column] for row in images.select_columns([column]))
    elif isinstance(class_labels, str):
        raise ValueError(f"`class_labels` names a column, {class_labels!r}, but `images` is no datasets.Dataset.")
    batches = [images] if isinstance(images, Tensor) else images
    if not isinstance(batches, Iterable):
        raise ValueError(
            "`images` must be an integer tensor (N, C, H, W), batches of them, PIL images, or a datasets.Dataset, got "
            f"{type(images).__name__}."
        )
    parts: list[Tensor] = []
    for batch in batches:
        part = to_levels(batch, num_levels)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"all of `images` must have one size, got {tuple(parts[0].shape[1:])} and {tuple(part.shape[1:])}: resize them "
                "as the model's training data were."
            )
        parts.append(part)
    levels = torch.cat(parts) if parts else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    if len(levels) == 0:
        raise ValueError("`images` holds no image.")
    return levels, class_labels


def to_levels(batch: Any, num_levels: int | None) -> Tensor:
    """One tensor batch or PIL image as integers (B, C, H, W) on the CPU, in the smallest dtype."""
    if num_levels is None:
        if not (
            isinstance(batch, Tensor)
            and batch.is_floating_point()
            and batch.ndim == 4
            and bool(batch.isfinite().all())
        ):
            raise ValueError(
                "with `num_levels=None` `images` must be finite floats (N, C, H, W), as the model takes them."
            )
        return batch.detach().cpu().float()
    if isinstance(batch, PIL.Image.Image):
        mode_levels = _PIL_LEVELS.get(batch.mode)
        if mode_levels is None:
            raise ValueError(
                f"`images` holds a PIL image of mode {batch.mode!r}, whose values are no levels 0..255: convert it to 'L' or 'RGB', "
                "or pass integer tensors."
            )
        if mode_levels != num_levels:
            raise ValueError(
                f"`images` holds PIL images of {mode_levels} levels, but `num_levels` is {num_levels}: pass integer tensors of levels "
                f"0..{num_levels - 1}."
            )
        width, height = batch.size
        data = bytearray(batch.convert("L").tobytes() if batch.mode == "1" else batch.tobytes())
        tensor = torch.frombuffer(data, dtype=torch.uint8).reshape(1, height, width, -1).permute(0, 3, 1, 2)
        return tensor.clamp(max=1) if batch.mode == "1" else tensor.contiguous()
    if not isinstance(batch, Tensor):
        raise ValueError(f"`images` must hold integer tensors (N, C, H, W) or PIL images, got {type(batch).__name__}.")
    if batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise ValueError(
            f"`images` must be integers 0..{num_levels - 1}, got {batch.dtype}. Likelihoods in bits/dim are of integers; for images in "
            f"[0, 1] pass (images * {num_levels - 1}).round().to(torch.uint8)."
        )
    if batch.ndim != 4:
        raise ValueError(f"`images` must have shape (N, C, H, W), got {tuple(batch.shape)}.")
    batch = batch.detach().cpu()
    if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < num_levels:
        raise ValueError(
            f"`images` must hold levels in 0..{num_levels - 1}, got {int(batch.min())}..{int(batch.max())}. Is `num_levels` right?"
        )
    return batch.to(torch.uint8 if num_levels <= 256 else torch.int32)


def _is_dataset(images: Any) -> bool:
    return all(hasattr(images, name) for name in ("features", "column_names", "select_columns"))


def _image_column(dataset: Any) -> str:
    """The column of a datasets.Dataset that holds images, found by its feature type."""
    columns = [name for name, feature in dataset.features.items() if type(feature).__name__ == "Image"]
    if len(columns) != 1:
        raise ValueError(
            f"`images` must have one column of images, got {columns or 'none'} among {dataset.column_names}: choose with "
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
    if size is not None:
        expected = (size, size) if isinstance(size, int) else tuple(size)
        if expected != tuple(levels.shape[2:]):
            raise ValueError(
                f"`images` must have the model's size {expected[0]}x{expected[1]}, got {levels.shape[2]}x{levels.shape[3]}: a bound at "
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
    return labels.long().expand(num_images)
