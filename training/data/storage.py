"""Where decoded images are kept: in memory, or in a file that is mapped to memory, written once and shared by all
processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from arguments import Storage
from torch import Tensor

from .images import DataError

Facts = dict[str, Any]  # what is known of the images, in JSON
Fill = Callable[[np.ndarray], Facts]  # writes all images into an array


def keeps_on_disk(storage: Storage, num_bytes: int, memory_share: float) -> bool:
    """Whether decoded images of `num_bytes` belong in a file: auto, if all processes' copies would exceed the share
    of the memory.
    """
    if storage != "auto":
        return storage == "disk"
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes on this machine
    return copies * num_bytes > memory_share * psutil.virtual_memory().total


def held_images(shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> tuple[Tensor, Facts]:
    """The images in memory, and what `fill` says of them."""
    images = torch.empty(shape, dtype=dtype)
    return images, fill(images.numpy())


def mapped_images(
    folder: Path, key: object, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill
) -> tuple[Tensor, Facts]:
    """The images in a file of `folder`, and what `fill` said of them; decoded if no file of this key is there.

    A file appears under its name when it is whole; several processes or machines may make it at once.

    Arguments:
        key: what the pixels are a function of; its `repr` names the file.
    Raises:
        DataError: the folder cannot be written, or its disk has no room: said before anything is decoded.
    """
    digest = hashlib.blake2b(repr((key, shape, str(dtype))).encode(), digest_size=16).hexdigest()
    path, about = folder / f"{digest}.npy", folder / f"{digest}.json"
    if not about.is_file():  # it comes second
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(folder).free
        except OSError as error:
            raise DataError(
                f"decoded images cannot be kept in {folder} ({error.strerror}): see --cache_dir."
            ) from error
        if number > free:
            raise DataError(
                f"the decoded images need {number / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}: see "
                "--cache_dir, "
                "--streaming."
            )
        temporary = folder / f".{digest}-{os.getpid()}"
        try:
            kind = np.uint8 if dtype == torch.uint8 else np.int32
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape)
            facts = fill(images)
            images.flush()
            del images
            temporary.replace(path)
            temporary.write_text(json.dumps({"facts": facts, "shape": shape, "key": repr(key)}), encoding="utf-8")
            temporary.replace(about)
        finally:
            temporary.unlink(missing_ok=True)
    # copy on write: nothing here writes, and torch wants arrays that could be written
    images = np.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(images), json.loads(about.read_text(encoding="utf-8"))["facts"]
