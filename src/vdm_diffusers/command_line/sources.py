"""Images that a user names on the command line: a folder of files, an array, a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vdm_diffusers.evaluation.images import to_levels

_SUFFIXES = {".png", ".bmp", ".gif", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


class InputError(ValueError):
    """What was named cannot be used; the message says what to do."""


@dataclass(frozen=True, eq=False)
class NamedImages:
    """Images with what the user calls them.

    Attributes:
        levels: (N, C, H, W) integers.
        names: of the files, or the numbers of the rows.
        labels: (N,) or None.
    """

    levels: Tensor
    names: list[str]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def part(self, start: int, stop: int) -> NamedImages:
        """The images from `start` up to `stop`."""
        labels = None if self.labels is None else self.labels[start:stop]
        return NamedImages(self.levels[start:stop], self.names[start:stop], labels)


def read_images(
    source: str,
    num_levels: int,
    channels: int | None,
    *,
    split: str = "test",
    label_column: str | None = None,
    max_images: int | None = None,
) -> NamedImages:
    """The images of `source`.

    Args:
        source: "digits" (scikit-learn's, the last 297), a folder of image files (subfolders are classes, in
            alphabetical order), an array `.npy` or `.npz` (`images`, `labels`) of integers, or a data set that
            `datasets.load_dataset` reads.
        num_levels: of the model. Files of 256 levels are not converted to fewer.
        channels: of the model, to which files are converted (1: grey, 3: RGB); None: as they are.
        split, label_column: of a data set.
        max_images: the first so many; None: all.
    Raises:
        InputError: nothing there, images of different sizes, or what cannot be read.
    """
    path = Path(source).expanduser()
    if source == "digits":
        images = _digits()
    elif path.suffix in (".npy", ".npz"):
        images = _array(path, num_levels)
    elif path.is_dir() and (files := _image_files(path)):
        return _folder(path, files[:max_images], num_levels, channels)
    else:
        return _data_set(source, num_levels, channels, split, label_column, max_images)
    return images.part(0, len(images) if max_images is None else max_images)


def _digits() -> NamedImages:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("'digits' are scikit-learn's: pip install scikit-learn.") from error
    data = load_digits()
    held_out = torch.from_numpy(data.images).to(torch.uint8)[1500:, None]
    return NamedImages(held_out, [str(n) for n in range(1500, 1797)], torch.from_numpy(data.target)[1500:].long())


def _array(path: Path, num_levels: int) -> NamedImages:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an array: {str(error).splitlines()[0]}.") from error
    labels = None
    if isinstance(loaded, np.lib.npyio.NpzFile):
        if "images" not in loaded:
            raise InputError(f"{path} has no array 'images', only {', '.join(loaded.files) or 'nothing'}.")
        labels = torch.from_numpy(loaded["labels"]).long() if "labels" in loaded else None
        loaded = loaded["images"]
    levels = to_levels(loaded, num_levels)
    return NamedImages(levels, [str(n) for n in range(len(levels))], labels)


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _folder(folder: Path, files: list[Path], num_levels: int, channels: int | None) -> NamedImages:
    parts: list[Tensor] = []
    for file in files:
        try:
            with PIL.Image.open(file) as image:
                parts.append(_levels_of(image, num_levels, channels))
        except OSError as error:
            raise InputError(f"{file} cannot be read as an image: {error}. Leave it out, or mend it.") from error
        if parts[-1].shape != parts[0].shape:
            sizes = " and ".join("x".join(map(str, p.shape[1:])) for p in (parts[0], parts[-1]))
            raise InputError(
                f"{file} is of another size than {files[0].name}, {sizes}: resize them as the model's were."
            )
    names = [f.relative_to(folder).as_posix() for f in files]
    kinds = sorted({name.split("/")[0] for name in names if "/" in name})
    labels = None
    if kinds and all("/" in name for name in names):
        labels = torch.tensor([kinds.index(name.split("/")[0]) for name in names])
    return NamedImages(torch.cat(parts), names, labels)


def _levels_of(image: PIL.Image.Image, num_levels: int, channels: int | None) -> Tensor:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels or 0)
    return to_levels(image if mode is None or image.mode == mode else image.convert(mode), num_levels)


def _data_set(
    source: str, num_levels: int, channels: int | None, split: str, label_column: str | None, max_images: int | None
) -> NamedImages:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source} is no folder of images and no array; for a data set install datasets: pip install "
            "'vdm-diffusers[data]'."
        ) from error
    try:
        data = datasets.load_dataset(os.path.expanduser(source), split=split)
    except Exception as error:  # datasets raises a dozen kinds
        raise InputError(f"{source} (split {split}) cannot be read: {str(error).splitlines()[0]}") from error
    data = data if max_images is None else data.select(range(min(max_images, len(data))))
    column = next((n for n, f in data.features.items() if type(f).__name__ == "Image"), None)
    if column is None:
        raise InputError(f"{source} has no column of images, only {', '.join(data.column_names)}.")
    kinds = [n for n, f in data.features.items() if type(f).__name__ == "ClassLabel"]
    label_column = label_column or (kinds[0] if len(kinds) == 1 else None)
    if label_column is not None and label_column not in data.column_names:
        raise InputError(f"{source} has no column {label_column!r}, only {', '.join(data.column_names)}.")
    levels = torch.cat([_levels_of(row[column], num_levels, channels) for row in data.select_columns([column])])
    labels = None if label_column is None else torch.tensor(data[label_column]).long()
    return NamedImages(levels, [str(n) for n in range(len(levels))], labels)


def network_channels(pipeline: Any) -> int | None:
    """How many channels a pipeline's images have."""
    return getattr(getattr(pipeline, "unet", pipeline).config, "in_channels", None)
