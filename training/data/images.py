"""Images of integer levels, held together with what they are and where they are from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

UNLABELLED = -1  # the class of an image that has none, as in `datasets`
BYTES_COMPARED = 2 << 30  # of training images that others are looked for among


class DataError(ValueError):
    """The data cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Images of integer levels, all of one size.

    Attributes:
        images: (N, C, H, W) uint8 or int32, values 0..num_levels-1.
        labels: (N,) int64 in 0..num_classes-1, or `UNLABELLED`; None where the data have no class labels.
        source: the data set. name: what the images are, for people: data set, split, how many.
        known_highest: the highest level, where it is known without reading all images.
        class_names: what the classes are called, where the data say it.
        warnings: what people should know about them.
    """

    images: Tensor
    labels: Tensor | None
    num_levels: int
    num_classes: int | None
    source: str
    name: str
    known_highest: int | None = None
    class_names: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_dims(self) -> int:
        """Dimensions of one image: C H W."""
        return self.images[0].numel()

    @property
    def highest(self) -> int:
        """The highest level of a pixel."""
        return int(self.images.max()) if self.known_highest is None else self.known_highest

    @property
    def num_unlabelled(self) -> int:
        """How many images have no class although the data have classes."""
        return 0 if self.labels is None else int((self.labels == UNLABELLED).sum())

    def fingerprint(self) -> str:
        """A checksum of the pixels: what "the same data" means, whatever they are called."""
        digest = hashlib.blake2b(repr((tuple(self.images.shape), self.num_levels)).encode(), digest_size=8)
        digest.update(self.images.numpy().data)
        return digest.hexdigest()

    def first(self, count: int) -> ImageSet:
        """The first `count` images."""
        if count >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, images=self.images[:count], labels=labels, name=f"{self.name}, the first {count}")

    def number_among(self, others: ImageSet) -> int:
        """How many of these images are among `others`, pixel for pixel; of large sets the first `BYTES_COMPARED` are
        looked at.
        """
        if self.images.shape[1:] != others.images.shape[1:]:
            return 0
        count = max(1, BYTES_COMPARED // max(1, others.images[0].nbytes))
        known = set(_digests(others.images[:count]))
        return sum(digest in known for digest in _digests(self.images))


def _digests(images: Tensor) -> list[bytes]:
    pixels = np.ascontiguousarray(images.to(torch.int32) if images.dtype != torch.uint8 else images)
    return [hashlib.blake2b(image, digest_size=16).digest() for image in pixels]


def labels_of(values: list[object], num_classes: int | None, column: str) -> Tensor:
    """Class labels (N,) int64 from a column of the data; None is `UNLABELLED`.

    Arguments:
        num_classes: labels are 0..num_classes-1; None: they say themselves how many there are.
    Raises:
        DataError: they are no classes. The message names the first that is none, and says what to do.
    """
    labels = np.empty(len(values), np.int64)
    for index, value in enumerate(values):
        number = UNLABELLED if value is None else value
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)):
            raise DataError(
                f"--label_column {column}: class labels are integers, and that of image {index} is {value!r} "
                f"({type(value).__name__}). Number the classes first, e.g. by datasets' "
                f"class_encode_column({column!r})."
            )
        if number < UNLABELLED or (num_classes is not None and number >= num_classes):
            known = "0, 1, 2, ..." if num_classes is None else f"0..{num_classes - 1}"
            raise DataError(
                f"--label_column {column}: classes are {known}, or {UNLABELLED} for an image without one; that of "
                "image "
                f"{index} is {number}."
            )
        labels[index] = number
    return torch.from_numpy(labels)
