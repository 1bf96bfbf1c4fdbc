"""All images of a split: decoded once by threads, into memory or into a file that is mapped to it."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import DataArguments
from torch import Tensor

from .decoding import UNDECODABLE, decoded, same_kind
from .images import DataError
from .sources import as_images
from .storage import held_images, keeps_on_disk, mapped_images

FORMAT_OF_DECODED = 2  # another one makes files of decoded images anew
_CHUNK = 256  # images that a thread takes at once


@dataclass(frozen=True)
class Read:
    """The images of a split.

    Attributes:
        images: (N, C, H, W) levels. num_levels: of a pixel. highest: the highest that is there.
        left_out: what was wrong with the images that are missing here (--skip_damaged), by their place among those
            asked for.
    """

    images: Tensor
    num_levels: int
    highest: int
    left_out: dict[int, str]


def read_images(dataset: Any, column: str, args: DataArguments, crop_seed: int | None, rows: Tensor | None) -> Read:
    """All images of a split, decoded.

    The first image that can be decoded decides the array's shape and type; threads fill it, since PIL decodes outside
    Python's lock.

    Arguments:
        rows: (N,) where the images stand in the split, for messages; None: where they stand here.
    Raises:
        DataError: there are none, they are of several kinds, or more than --skip_damaged cannot be decoded.
    """
    if not len(dataset):
        raise DataError("the split is empty.")
    files = as_images(dataset, column, decode=False)

    def name(index: int) -> str:
        return f"image {index if rows is None else int(rows[index])} of the split"

    def levels(index: int, image: Any = None) -> tuple[np.ndarray, int] | _Damaged:
        try:
            image = dataset[index][column] if image is None else image
        except UNDECODABLE as error:
            what = f"{name(index)}{file_name(files[index][column])} cannot be decoded: {error}"
            return _Damaged(f"{what}".rstrip("."))
        return decoded(image, index, name(index), args, crop_seed)

    left_out: dict[int, str] = {}
    start = 0
    first = levels(0)
    while isinstance(first, _Damaged):
        left_out[start] = first.what
        check_number_left_out(left_out, args)
        start += 1
        if start == len(dataset):
            raise DataError("no image of the split can be decoded.")
        first = levels(start)

    def fill(images: np.ndarray) -> dict[str, Any]:
        def fill_some(begin: int) -> int:
            end, highest = min(begin + _CHUNK, len(dataset)), 0
            try:
                found = dataset[begin:end][column]
            except UNDECODABLE:  # one by one, to say which
                found = [None] * (end - begin)
            for index, image in enumerate(found, begin):
                result = levels(index, image)
                if isinstance(result, _Damaged):
                    left_out[index] = result.what
                    check_number_left_out(left_out, args)
                    continue
                same_kind(first, result, name(start), name(index))
                images[index] = result[0]
                highest = max(highest, int(result[0].max()))
            return highest

        with ThreadPoolExecutor(args.dataloader_num_workers or os.cpu_count() or 1) as pool:
            highest = max(pool.map(fill_some, range(0, len(dataset), _CHUNK)))
        _close_gaps(images, left_out)
        return {"highest": highest, "left_out": sorted(left_out.items())}

    shape, dtype = (len(dataset), *first[0].shape), torch.uint8 if first[1] <= 256 else torch.int32
    if not keeps_on_disk(args.decoded_images, math.prod(shape) * dtype.itemsize, args.memory_share):
        images, facts = held_images(shape, dtype, fill)
    else:
        import datasets

        folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "decoded"
        choices = [args.resolution, args.image_mode, args.preserve_input_precision, args.array_channels, crop_seed]
        key = (FORMAT_OF_DECODED, dataset._fingerprint, column, *choices)
        images, facts = mapped_images(folder, key, shape, dtype, fill)
    left_out = dict(facts["left_out"])
    check_number_left_out(left_out, args)
    return Read(images[: len(dataset) - len(left_out)], first[1], facts["highest"], left_out)


@dataclass(frozen=True)
class _Damaged:
    """An image that cannot be decoded; `what` says which and why."""

    what: str


def check_number_left_out(left_out: dict[Any, str], args: DataArguments) -> None:
    """Raise DataError that names the last one if more images than --skip_damaged had to be left out."""
    if len(left_out) > args.skip_damaged:
        what = left_out[max(left_out)]
        allowed = "" if not args.skip_damaged else f" It is one more than --skip_damaged {args.skip_damaged} allows."
        raise DataError(f"{what}.{allowed} Mend it, leave it out of the data, or allow for some with --skip_damaged.")


def file_name(stored: Any) -> str:
    """The name of an image's file in brackets, where it has one."""
    path = stored.get("path") if isinstance(stored, dict) else None
    return f" ({path})" if path else ""


def _close_gaps(images: np.ndarray, gaps: dict[int, str]) -> None:
    """Move the images that are there together, in place and in their order; what lies behind them is left."""
    if gaps:
        target = 0
        for index in range(len(images)):
            if index not in gaps:
                if target != index:
                    images[target] = images[index]
                target += 1
