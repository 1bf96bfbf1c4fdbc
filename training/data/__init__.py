"""Images as integers: read once, decoded once, held in memory or in a mapped file as (N, C, H, W) levels until the
device.

Nothing here turns an integer into a float: that is done on the device, batch by batch, by the pixel encoding that the
likelihood knows about.
"""

from .images import UNLABELLED, DataError, ImageSet
from .sources import is_digits, open_splits
from .splits import (
    HELD_OUT,
    default_test_split,
    evaluation_split,
    figure_name,
    kind_of_images,
    load_split,
    load_splits,
    overlap,
)
from .streaming import ImageStream, first_images

__all__ = [
    "HELD_OUT",
    "UNLABELLED",
    "DataError",
    "ImageSet",
    "ImageStream",
    "default_test_split",
    "evaluation_split",
    "figure_name",
    "first_images",
    "is_digits",
    "kind_of_images",
    "load_split",
    "load_splits",
    "open_splits",
    "overlap",
]
