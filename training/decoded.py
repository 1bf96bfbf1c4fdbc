"""Where decoded images are kept: in memory, or in a file that is mapped to memory, written once and shared by all processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

Storage = Literal["auto", "memory", "disk"]
Fill = Callable[[np.ndarray], int]  # writes all images into an array, and returns the highest level


def keeps_on_disk(storage: Storage, num_bytes: int, memory_share: float) -> bool:
    """Whether decoded images of `num_bytes` belong in a file: auto, if all processes' copies would exceed the share of the memory."""
    if storage != "auto":
        return storage == "disk"
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes on this machine
    return copies * num_bytes > memory_share * psutil.virtual_memory().total


def held_images(shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> tuple[Tensor, int]:
    """The images in memory, and their highest level."""
    images = torch.empty(shape, dtype=dtype)
    return images, fill(images.numpy())


def mapped_images(
    folder: Path, key: object, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill
) -> tuple[Tensor, int]:
    """The images in a file of `folder`, and their highest level; decoded if no file of this key is there.

    A file appears under its name when it is whole; several processes or machines may make it at once.

    Arguments:
        key: what the pixels are a function of; its `repr` names the file.
    Raises:
        OSError: the disk has no room: said before anything is decoded.
    """
    digest = hashlib.blake2b(repr((key, shape, str(dtype))).encode(), digest_size=16).hexdigest()
    path, facts = folder / f"{digest}.npy", folder / f"{digest}.json"
    if not facts.is_file():  # it comes second
        folder.mkdir(parents=True, exist_ok=True)
        number = int(np.prod(shape)) * dtype.itemsize
        free = shutil.disk_usage(folder).free
        if number > free:
            raise OSError(
                28, f"the decoded images need {number / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}"
            )
        temporary = folder / f".{digest}-{os.getpid()}"
        try:
            kind = np.uint8 if dtype == torch.uint8 else np.int32
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape)
            highest = fill(images)
            images.flush()
            del images
            temporary.replace(path)
            temporary.write_text(json.dumps({"highest": highest, "shape": shape, "key": repr(key)}), encoding="utf-8")
            temporary.replace(facts)
        finally:
            temporary.unlink(missing_ok=True)
    # copy on write: nothing here writes, and torch wants arrays that could be written
    images = np.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(images), int(json.loads(facts.read_text(encoding="utf-8"))["highest"])
