"""One image, as a file or an array holds it, to integer levels (C, H, W)."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from arguments import DataArguments
from randomness import seed_for

from .images import DataError

# What PIL raises for files that are cut off, are no images, or would unfold to more pixels than anybody means.
UNDECODABLE = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)
# PIL mode -> (mode to read it in, levels); palettes are looked up, bilevel images keep their two levels.
_MODES = {
    "1": ("1", 2),
    "L": ("L", 256),
    "LA": ("LA", 256),
    "RGB": ("RGB", 256),
    "RGBA": ("RGBA", 256),
    "CMYK": ("CMYK", 256),
    "YCbCr": ("YCbCr", 256),
    "HSV": ("HSV", 256),
    "P": ("RGB", 256),
    "PA": ("RGBA", 256),
    "I;16": ("I;16", 65536),
}
_NO_RANGE = {"I": "32-bit integers", "F": "floating point numbers"}  # no file says what is black and what is white
_MOST_CHANNELS = 4  # of an array whose axes are told apart by their sizes


def decoded(image: Any, index: int, name: str, args: DataArguments, crop_seed: int | None) -> tuple[np.ndarray, int]:
    """One image -> its levels (C, H, W) and their number.

    Arguments:
        index: chooses the crop. name: for messages.
    Raises:
        DataError: its levels are not known, or it is neither an image nor integers.
    """
    if not isinstance(image, PIL.Image.Image):
        return _array_levels(image, name, args)
    image, num_levels = _in_mode(image, name, args)
    if args.resolution is not None:
        if image.mode == "1":
            image, num_levels = image.convert("L"), 256
        image = _resize(image, args.resolution, None if crop_seed is None else seed_for(crop_seed, "crop", index))
    pixels = np.asarray(image)
    if num_levels == 65536 and not args.preserve_input_precision:
        pixels, num_levels = (pixels >> 8).astype(np.uint8), 256
    pixels = pixels.astype(np.uint8 if num_levels <= 256 else np.int32)
    return (pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)), num_levels


def _in_mode(image: PIL.Image.Image, name: str, args: DataArguments) -> tuple[PIL.Image.Image, int]:
    """The image in the mode that it is read in, --image_mode if that is given, and the number of its levels.

    PIL itself cuts 16-bit levels off at 255 where it converts them: they are scaled down first.
    """
    deep = image.mode.startswith("I;16")
    if image.mode in _NO_RANGE:
        raise DataError(
            f"{name} has PIL mode {image.mode}: {_NO_RANGE[image.mode]}, of which no file says the range. Write the "
            "files anew with "
            "8 or 16 bits, scaled as you mean them."
        )
    if image.mode not in _MODES and not deep:
        raise DataError(
            f"{name} has PIL mode {image.mode}, whose levels are not known: give --image_mode, e.g. L or RGB."
        )
    if args.image_mode is not None and not (deep and args.image_mode == "I;16"):
        if deep:
            if args.preserve_input_precision:
                raise DataError(
                    f"{name} has 16 bits, which --preserve_input_precision keeps and --image_mode {args.image_mode} "
                    "does not "
                    "have: give one of the two."
                )
            image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(args.image_mode)
    mode, num_levels = _MODES["I;16" if image.mode.startswith("I;16") else image.mode]
    return (image if mode in (image.mode, "I;16") else image.convert(mode)), num_levels


def _array_levels(image: Any, name: str, args: DataArguments) -> tuple[np.ndarray, int]:
    """Nested lists or an array, (H, W), (C, H, W) or (H, W, C), of 8-bit integers."""
    pixels = np.asarray(image)
    if args.resolution is not None or args.image_mode is not None:
        raise DataError("--resolution and --image_mode are for image files; this column holds arrays.")
    fits = pixels.dtype.kind in "iu" and pixels.ndim in (2, 3) and pixels.size
    if not fits or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            f"{name} must be an image, or integers 0..255 of shape (H, W), (C, H, W) or (H, W, C); it is "
            f"{type(image).__name__} "
            f"of {pixels.dtype} with shape {pixels.shape}."
        )
    levels = pixels.astype(np.uint8)
    if levels.ndim == 2:
        return levels[None], 256
    return (np.moveaxis(levels, -1, 0) if _channels_come_last(levels.shape, name, args) else levels), 256


def _channels_come_last(shape: tuple[int, ...], name: str, args: DataArguments) -> bool:
    """Which axis of an array of three is that of the channels: --array_channels, or the only one of at most four."""
    if args.array_channels != "auto":
        return args.array_channels == "last"
    first, last = shape[0] <= _MOST_CHANNELS, shape[-1] <= _MOST_CHANNELS
    if first == last:
        raise DataError(
            f"{name} is an array of shape {shape}, of which the sizes do not tell whether the channels come first or "
            "last: "
            "give --array_channels first or last."
        )
    return last


def same_kind(first: tuple[np.ndarray, int], other: tuple[np.ndarray, int], first_name: str, name: str) -> None:
    """Raise DataError unless two images have one shape and one number of levels."""
    if other[0].shape != first[0].shape:
        raise DataError(
            f"images have several sizes or modes: {first_name} is {_describe(first[0])}, {name} is "
            f"{_describe(other[0])}. "
            "Give --resolution (and --image_mode, e.g. RGB) to bring them to one."
        )
    if other[1] != first[1]:
        raise DataError(f"{first_name} has {first[1]} levels, {name} has {other[1]}; give --image_mode.")


def _resize(image: PIL.Image.Image, resolution: int, crop_seed: int | None) -> PIL.Image.Image:
    """Shorter side to `resolution` (bilinear with antialiasing), then a square: in the centre, or at a seeded
    place.
    """
    width, height = image.size
    if (width, height) == (resolution, resolution):
        return image
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    image = image.resize(size, PIL.Image.Resampling.BILINEAR)
    spare = (size[0] - resolution, size[1] - resolution)
    if crop_seed is None:
        left, top = spare[0] // 2, spare[1] // 2
    else:
        left, top = (int(v) for v in np.random.default_rng(crop_seed).integers(0, np.array(spare) + 1))
    return image.crop((left, top, left + resolution, top + resolution))


def _describe(levels: np.ndarray) -> str:
    channels, height, width = np.shape(levels)
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
