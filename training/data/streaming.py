"""Images from data sets larger than the memory, or the disk: read in passing, in an order that can be taken up again.

A process reads its shards of the data set (in an order drawn anew for each epoch), block by block, and shuffles within
a block. `datasets`' own shuffle buffer is lost when a stream is resumed; here the place of a block and the images
taken from it say everything, and a resumed run reads the block again. The next block is read and decoded by threads
while this one is used.
"""

from __future__ import annotations

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from arguments import DataArguments
from randomness import generator_for, seed_for
from torch import Tensor

from .decoding import UNDECODABLE, decoded, same_kind
from .images import DataError, ImageSet, labels_of
from .reading import check_number_left_out, file_name
from .sources import as_images, find_split, image_column, label_column, open_splits, source_of

NUM_EVAL_IMAGES = 1024  # of a streamed split, where --eval_max_images does not say


@dataclass(frozen=True)
class _Block:
    """Some images in the order they are used in, and the place where they were read."""

    place: dict[str, Any]
    images: Tensor
    labels: Tensor | None


class ImageStream:
    """An endless stream of integer images: this process's part of it.

    With as many shards as processes, or a multiple, a process reads every num_processes-th of them; else all of them,
    and decodes every num_processes-th image. So the images of a global batch depend on the number of processes, other
    than those of data sets in memory.

    Attributes:
        first: an `ImageSet` of the first image: shape, levels, classes.
        epoch: passes through the data begun, less one.
    Raises:
        DataError: no such split or column, no images, images of several sizes or modes, one that cannot be decoded.
    """

    _block: _Block
    _offset: int  # images of it that were taken
    _next: Future[_Block]

    def __init__(
        self,
        args: DataArguments,
        split: str,
        seed: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.args, self.seed, self.device = args, seed, torch.device(device)
        self._process_index, self._num_processes = process_index, num_processes
        dataset = find_split(open_splits(args, streaming=True), split)
        if dataset.features is None:
            dataset = dataset._resolve_features()
        self._image_column = image_column(dataset, args.image_column)
        self._label_column, class_names = label_column(dataset, args.label_column)
        self._num_classes = None if class_names is None else len(class_names)
        import datasets

        dataset = as_images(dataset, self._image_column, decode=False)
        self._feature = datasets.Image()
        self._left_out: dict[tuple[int, int], str] = {}  # by shard and image: what was wrong with it
        self._dataset, self._num_shards = dataset, dataset.num_shards
        self._divided = self._num_shards % num_processes == 0
        self._pool = ThreadPoolExecutor(args.dataloader_num_workers or os.cpu_count() or 1)
        self._reader = ThreadPoolExecutor(1, "stream")
        self.first = self._first_image(split, class_names)
        self._start({"epoch": 0, "shard": 0, "index": 0, "source": None}, 0)

    def _first_image(self, split: str, class_names: tuple[str, ...] | None) -> ImageSet:
        """The first image that can be decoded, as a set of its own."""
        example, source = None, source_of(self.args)
        for index, example in enumerate(self._dataset):
            result = self._decode((example, (0, 0, index)))
            if result is not None:
                break
        else:
            what = "holds no image that can be decoded" if example else "is empty"
            raise DataError(f"the split {split!r} of {source} {what}.")
        name = f"{source}, split {split}: streamed from {self._num_shards} shard(s)"
        images, labels = torch.from_numpy(result[0])[None], self._labels([example])
        return ImageSet(images, labels, result[1], self._num_classes, source, name, class_names=class_names)

    def _labels(self, examples: list[dict[str, Any]]) -> Tensor | None:
        if self._label_column is None:
            return None
        return labels_of([example[self._label_column] for example in examples], self._num_classes, self._label_column)

    @property
    def block_size(self) -> int:
        """Images of the block that is used now."""
        return len(self._block.images)

    @property
    def epoch(self) -> int:
        return self._block.place["epoch"]

    def __call__(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The next `count` images and labels; `start` is their place in a stream that is read in order, and not
        looked at.
        """
        parts = []
        while count:
            if self._offset == len(self._block.images):
                self._block, self._offset = self._next.result(), 0
                self._next = self._reader.submit(self._read)
            here = slice(self._offset, min(self._offset + count, len(self._block.images)))
            parts.append((self._block.images[here], None if self._block.labels is None else self._block.labels[here]))
            count -= here.stop - here.start
            self._offset = here.stop
        images = torch.cat([images for images, _ in parts])
        if self.device.type == "cuda":
            images = images.pin_memory()
        labels = [labels for _, labels in parts if labels is not None]
        return images, torch.cat(labels) if labels else None

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands, in JSON."""
        return {"place": self._block.place, "taken": self._offset, "num_processes": self._num_processes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state["num_processes"] != self._num_processes:
            raise DataError(
                f"the stream was divided among {state['num_processes']} processes and can go on among as many alone, "
                f"not {self._num_processes}."
            )
        self._next.result()  # the thread must not read on while its place is moved
        self._start(state["place"], state["taken"])

    def close(self) -> None:
        """Stop the threads."""
        self._reader.shutdown(cancel_futures=True)
        self._pool.shutdown()

    def _start(self, place: dict[str, Any], taken: int) -> None:
        self._seek(place)
        self._block, self._offset = self._read(), taken
        self._next = self._reader.submit(self._read)

    def _seek(self, place: dict[str, Any]) -> None:
        self._place = copy.deepcopy(place)
        order = torch.randperm(self._num_shards, generator=generator_for(self.seed, "shards", place["epoch"]))
        mine = order[self._process_index :: self._num_processes] if self._divided else order
        self._shards = mine.tolist()
        self._open = self._dataset.shard(self._num_shards, self._shards[place["shard"]])
        if place["source"] is not None:
            self._open.load_state_dict(copy.deepcopy(place["source"]))
        self._iterator = iter(self._open)

    def _read(self) -> _Block:
        """The next block, from one epoch."""
        found: list[tuple[dict[str, Any], tuple[int, int, int]]] = []
        empty_epochs = 0
        self._place["source"] = copy.deepcopy(self._open.state_dict())
        place = copy.deepcopy(self._place)
        while len(found) < self.args.shuffle_buffer_size:
            example = next(self._iterator, None)
            if example is not None:
                index = self._place["index"]
                if self._divided or index % self._num_processes == self._process_index:
                    found.append((example, (self._place["epoch"], self._shards[self._place["shard"]], index)))
                self._place["index"] += 1
                continue
            if self._place["shard"] + 1 < len(self._shards):
                self._seek({**self._place, "shard": self._place["shard"] + 1, "index": 0, "source": None})
                continue
            self._seek({"epoch": self._place["epoch"] + 1, "shard": 0, "index": 0, "source": None})
            if found:
                break
            empty_epochs += 1
            if empty_epochs == 2:
                raise DataError(f"process {self._process_index} finds no images in its part of the data.")
            place = {**copy.deepcopy(self._place), "source": copy.deepcopy(self._open.state_dict())}
        order = torch.randperm(
            len(found),
            generator=generator_for(
                self.seed, "stream", self._process_index, place["epoch"], place["shard"], place["index"]
            ),
        )
        found = [found[index] for index in order]
        decoded_ = list(self._pool.map(self._decode, found))
        there = [(where, result) for where, result in zip(found, decoded_, strict=True) if result is not None]
        if not there:
            raise DataError(f"no image of a block of {len(found)} can be decoded; see --shuffle_buffer_size.")
        images = torch.stack([torch.from_numpy(self._checked(*pair)) for pair in there])
        return _Block(place, images, self._labels([example for (example, _), _ in there]))

    def _checked(self, where: tuple[Any, tuple[int, int, int]], result: tuple[np.ndarray, int]) -> np.ndarray:
        _, (_, shard, index) = where
        first = (self.first.images[0].numpy(), self.first.num_levels)
        same_kind(first, result, "the first image", f"image {index} of shard {shard}")
        if self.args.num_levels is not None and int(result[0].max()) >= self.args.num_levels:
            raise DataError(
                f"--num_levels {self.args.num_levels}: image {index} of shard {shard} holds {result[0].max()}."
            )
        return result[0]

    def _decode(self, where: tuple[dict[str, Any], tuple[int, int, int]]) -> tuple[np.ndarray, int] | None:
        """The levels of an image; None where it cannot be decoded and --skip_damaged allows for it."""
        example, (epoch, shard, index) = where
        crop_seed = None if self.args.center_crop else seed_for(self.seed, "crop", epoch, shard)
        stored, name = example[self._image_column], f"image {index} of shard {shard}"
        image = stored
        if isinstance(stored, dict):
            try:
                image = self._feature.decode_example(stored)
            except UNDECODABLE as error:
                what = f"{name}{file_name(stored)} cannot be decoded: {error}".rstrip(".")
                self._left_out[shard, index] = what
                check_number_left_out(self._left_out, self.args)
                return None
        return decoded(image, index, name, self.args, crop_seed)


def first_images(args: DataArguments, split: str, count: int | None) -> ImageSet:
    """Some images of a streamed split, held in memory: what is evaluated while training.

    The same ones at every call.
    """
    count = NUM_EVAL_IMAGES if count is None else count
    stream = ImageStream(replace(args, shuffle_buffer_size=count, center_crop=True), split, seed=0)
    images, labels = stream(0, min(count, stream.block_size))
    stream.close()
    name = f"{stream.first.source}, split {split}: {len(images)} images of it"
    return replace(stream.first, images=images, labels=labels, name=name)
