"""Images as integers: read once, decoded once, held in memory or in a mapped file as (N, C, H, W) levels until the device.

Nothing here turns an integer into a float: that is done on the device, batch by batch, by the pixel encoding that the
likelihood knows about.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from config import DataArguments
from decoded import held_images, keeps_on_disk, mapped_images
from randomness import generator_for, seed_for
from torch import Tensor

FORMAT_OF_DECODED = 1  # another one makes files of decoded images anew
NUM_LOCAL_SHARDS = 64  # that a data set on the disk is streamed in: any number of processes up to it has its own
UNDECODABLE = (OSError, SyntaxError, ValueError)  # what PIL raises for files that are cut off or no images
HELD_OUT = "held_out"  # name of the share of the training split that is held out when there is no split for it
DIGITS = "scikit-learn digits (8x8, 17 grey levels)"
DIGITS_SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1500), "test": slice(1500, 1797)}
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


class DataError(ValueError):
    """The data cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Images of integer levels, all of one size.

    Attributes:
        images: (N, C, H, W) uint8 or int32, values 0..num_levels-1.
        labels: (N,) int64, or None where the data have no class labels.
        source: the data set. name: what the images are, for people: data set, split, how many.
        known_highest: the highest level, where it is known without reading all images.
    """

    images: Tensor
    labels: Tensor | None
    num_levels: int
    num_classes: int | None
    source: str
    name: str
    known_highest: int | None = None

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

    def fingerprint(self) -> str:
        """A checksum of the pixels: what "the same data" means, whatever they are called."""
        digest = hashlib.blake2b(repr((tuple(self.images.shape), self.num_levels)).encode(), digest_size=8)
        digest.update(self.images.numpy())
        return digest.hexdigest()

    def first(self, count: int) -> ImageSet:
        """The first `count` images."""
        if count >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, images=self.images[:count], labels=labels, name=f"{self.name}, the first {count}")


def load_splits(args: DataArguments, seed: int) -> tuple[ImageSet, ImageSet]:
    """The images to train on and those to evaluate on while training; the name of the second says where it is from."""
    return load_split(args, args.train_split, seed), load_split(args, evaluation_split(args), seed)


def load_split(args: DataArguments, split: str, seed: int) -> ImageSet:
    """One split: of the data set itself, or `HELD_OUT`.

    Without --eval_split the training split is divided by a permutation seeded with `seed`: the held-out share is `HELD_OUT`, and
    asking for the training split gives the rest.

    Raises:
        DataError: no such split, no image column, images of several sizes or modes.
    """
    notes: list[str] = []

    def choose(num_images: int) -> Tensor | None:
        chosen = None
        if split == HELD_OUT or (split == args.train_split and evaluation_split(args) == HELD_OUT):
            num_held_out = max(1, round(args.eval_fraction * num_images))
            if num_held_out >= num_images:
                raise DataError(
                    f"--eval_fraction {args.eval_fraction} of {num_images} images leaves nothing to train on."
                )
            order = torch.randperm(num_images, generator=generator_for(seed, "held out"))
            chosen = order[:num_held_out] if split == HELD_OUT else order[num_held_out:]
            kept = "held out" if split == HELD_OUT else "the rest held out"
            notes.append(f"a share of {len(chosen) / num_images:.3g} ({kept}, seed {seed})")
        if split == args.train_split and args.max_train_samples is not None:
            chosen = torch.arange(num_images) if chosen is None else chosen
            if args.max_train_samples < len(chosen):
                chosen = chosen[
                    torch.randperm(len(chosen), generator=generator_for(seed, "subset"))[: args.max_train_samples]
                ]
                notes.append(f"{len(chosen)} of them drawn with seed {seed}")
        return None if chosen is None else chosen.sort().values

    source = args.train_split if split == HELD_OUT else split
    result = _read_split(args, source, None if split != args.train_split or args.center_crop else seed, choose)
    return replace(result, name=f"{', '.join([result.name, *notes])}: {len(result)} images")


def is_digits(args: DataArguments) -> bool:
    """Whether the data are the embedded digits."""
    return args.dataset_name is None and args.train_data_dir is None


def default_test_split(args: DataArguments) -> str:
    """The split for a final figure: the data set's own test split if it has one, else the one held out while training."""
    if is_digits(args):
        return "test"
    names = list(open_splits(args))
    return next((name for name in ("test", "validation", "valid") if name in names), evaluation_split(args))


def evaluation_split(args: DataArguments) -> str:
    """The split that is evaluated while training."""
    if args.eval_split is not None:
        return args.eval_split
    return "validation" if is_digits(args) else HELD_OUT


def _read_split(
    args: DataArguments, split: str, crop_seed: int | None, choose: Callable[[int], Tensor | None]
) -> ImageSet:
    """Read the images of a split that `choose` chooses, given their number (None: all)."""
    if is_digits(args):
        return _digits(split, choose)
    splits = open_splits(args)
    if split not in splits:
        raise DataError(
            f"the data have no split {split!r}, only {', '.join(map(repr, splits))}: see --train_split, --eval_split."
        )
    dataset = splits[split]
    column = image_column(dataset, args.image_column)
    labels_column, num_classes = label_column(dataset, args.label_column)
    chosen = choose(len(dataset))
    if chosen is not None:
        dataset = dataset.select(chosen.tolist())
    images, num_levels, highest = _decode(_as_images(dataset, column), column, args, crop_seed, chosen)
    labels = None if labels_column is None else torch.as_tensor(np.asarray(dataset[labels_column][:], dtype=np.int64))
    source = args.dataset_name or str(args.train_data_dir)
    return ImageSet(images, labels, num_levels, num_classes, source, f"{source}, split {split}", highest)


def _digits(split: str, choose: Callable[[int], Tensor | None]) -> ImageSet:
    from sklearn.datasets import load_digits

    if split not in DIGITS_SPLITS:
        raise DataError(f"the digits have no split {split!r}, only {', '.join(DIGITS_SPLITS)}.")
    digits = load_digits()
    indices = np.random.default_rng(0).permutation(1797)[DIGITS_SPLITS[split]]
    chosen = choose(len(indices))
    if chosen is not None:
        indices = indices[chosen.numpy()]
    images = torch.from_numpy(digits.images.round().astype(np.uint8)[indices])[:, None]
    return ImageSet(
        images, torch.from_numpy(digits.target.astype(np.int64)[indices]), 17, 10, DIGITS, f"{DIGITS}, split {split}"
    )


def open_splits(args: DataArguments, *, streaming: bool = False) -> Any:
    """The data set's splits by name: datasets.DatasetDict, or IterableDatasetDict that is read in passing."""
    import datasets

    datasets.disable_progress_bars()
    common = {"cache_dir": args.cache_dir, "streaming": streaming}
    if args.dataset_name is None:
        return datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, **common)
    if args.dataset_name.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files={"train": args.dataset_name}, **common)
    if Path(args.dataset_name).is_dir() and (Path(args.dataset_name) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(args.dataset_name)  # what DatasetDict.save_to_disk wrote
        shards = {name: min(NUM_LOCAL_SHARDS, len(split)) for name, split in splits.items()}
        return {n: s.to_iterable_dataset(num_shards=shards[n]) for n, s in splits.items()} if streaming else splits
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name, **common)


def image_column(dataset: Any, name: str | None) -> str:
    import datasets

    if name is not None:
        if name not in dataset.column_names:
            raise DataError(f"--image_column {name}: the columns are {', '.join(dataset.column_names)}.")
        return name
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    # a parquet file that somebody else wrote has the struct of an image without its name
    found = found or [c for c, f in dataset.features.items() if isinstance(f, dict) and set(f) == {"bytes", "path"}]
    if len(found) != 1:
        raise DataError(
            f"{'no column' if not found else 'more than one column (' + ', '.join(found) + ')'} of the data holds images; name one of "
            f"{', '.join(dataset.column_names)} with --image_column."
        )
    return found[0]


def label_column(dataset: Any, name: str | None) -> tuple[str | None, int | None]:
    import datasets

    if name is not None:
        if name not in dataset.column_names:
            raise DataError(f"--label_column {name}: the columns are {', '.join(dataset.column_names)}.")
        feature = dataset.features[name]
        is_class = isinstance(feature, datasets.ClassLabel)
        if not is_class and isinstance(dataset, datasets.IterableDataset):
            raise DataError(
                f"--label_column {name} must be a ClassLabel in a data set that is streamed, not {feature}."
            )
        return name, feature.num_classes if is_class else int(max(dataset[name][:])) + 1
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return (found[0], dataset.features[found[0]].num_classes) if len(found) == 1 else (None, None)


def _as_images(dataset: Any, column: str) -> Any:
    """The data set with `column` as undecoded image files where that is what it holds."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, (datasets.Image, dict)):
        return dataset.cast_column(column, datasets.Image(decode=True))
    return dataset


def _decode(
    dataset: Any, column: str, args: DataArguments, crop_seed: int | None, rows: Tensor | None
) -> tuple[Tensor, int, int]:
    """All images of a split, decoded: (N, C, H, W) levels, in memory or in a file mapped to it; their number; the highest.

    The first image decides the array's shape and type; threads fill it, since PIL decodes outside Python's lock.

    Arguments:
        rows: (N,) where the images stand in the split, for messages; None: where they stand here.
    """
    if not len(dataset):
        raise DataError("the split is empty.")

    def name(index: int) -> str:
        return f"image {index if rows is None else int(rows[index])} of the split"

    def levels(image: Any, index: int) -> tuple[np.ndarray, int]:
        return decoded(image, index, name(index), args, crop_seed)

    first, num_levels = levels(_one(dataset, column, 0, name(0)), 0)

    def fill(images: np.ndarray) -> int:
        def fill_some(start: int) -> int:
            stop, highest = min(start + 256, len(dataset)), 0
            try:
                found = dataset[start:stop][column]
            except UNDECODABLE:  # one by one, to say which
                found = [_one(dataset, column, index, name(index)) for index in range(start, stop)]
            for index, image in enumerate(found, start):
                result = levels(image, index)
                same_kind((first, num_levels), result, name(0), name(index))
                images[index] = result[0]
                highest = max(highest, int(result[0].max()))
            return highest

        with ThreadPoolExecutor(args.dataloader_num_workers or os.cpu_count() or 1) as pool:
            return max(pool.map(fill_some, range(0, len(dataset), 256)))

    shape, dtype = (len(dataset), *first.shape), torch.uint8 if num_levels <= 256 else torch.int32
    if not keeps_on_disk(args.decoded_images, math.prod(shape) * dtype.itemsize, args.memory_share):
        images, highest = held_images(shape, dtype, fill)
    else:
        import datasets

        folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "decoded"
        choices = [args.resolution, args.image_mode, args.preserve_input_precision, crop_seed]
        key = (FORMAT_OF_DECODED, dataset._fingerprint, column, *choices)
        images, highest = mapped_images(folder, key, shape, dtype, fill)
    return images, num_levels, highest


def _one(dataset: Any, column: str, index: int, name: str) -> Any:
    try:
        return dataset[index][column]
    except UNDECODABLE as error:
        raise DataError(f"{name} cannot be decoded: {error}. Mend it, or leave it out of the data.") from error


def same_kind(first: tuple[np.ndarray, int], other: tuple[np.ndarray, int], first_name: str, name: str) -> None:
    """Raise DataError unless two images have one shape and one number of levels."""
    if other[0].shape != first[0].shape:
        raise DataError(
            f"images have several sizes or modes: {first_name} is {_describe(first[0])}, {name} is {_describe(other[0])}. "
            "Give --resolution (and --image_mode, e.g. RGB) to bring them to one."
        )
    if other[1] != first[1]:
        raise DataError(f"{first_name} has {first[1]} levels, {name} has {other[1]}; give --image_mode.")


def decoded(image: Any, index: int, name: str, args: DataArguments, crop_seed: int | None) -> tuple[np.ndarray, int]:
    """One image -> its levels (C, H, W) and their number; `index` chooses the crop, `name` is for messages."""
    if not isinstance(image, PIL.Image.Image):
        return _array_levels(image, name, args)
    if args.image_mode is not None:
        image = image.convert(args.image_mode)
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise DataError(
            f"{name} has PIL mode {image.mode}, whose levels are not known: give --image_mode, e.g. L or RGB."
        )
    mode, num_levels = _MODES[image.mode if image.mode in _MODES else "I;16"]
    if mode != image.mode and mode != "I;16":
        image = image.convert(mode)
    if args.resolution is not None:
        if mode == "1":
            image, num_levels = image.convert("L"), 256
        image = _resize(image, args.resolution, None if crop_seed is None else seed_for(crop_seed, "crop", index))
    pixels = np.asarray(image)
    if num_levels == 65536 and not args.preserve_input_precision:
        pixels, num_levels = (pixels >> 8).astype(np.uint8), 256
    pixels = pixels.astype(np.uint8 if num_levels <= 256 else np.int32)
    return (pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)), num_levels


def _array_levels(image: Any, name: str, args: DataArguments) -> tuple[np.ndarray, int]:
    """Nested lists or an array, (H, W) or (C, H, W), of 8-bit integers."""
    pixels = np.asarray(image)
    if args.resolution is not None or args.image_mode is not None:
        raise DataError("--resolution and --image_mode are for image files; this column holds arrays.")
    if pixels.dtype.kind not in "iu" or pixels.ndim not in (2, 3) or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            f"{name} must be an image, or integers 0..255 of shape (H, W) or (C, H, W); it is {type(image).__name__} of "
            f"{pixels.dtype} with shape {pixels.shape}."
        )
    return (pixels[None] if pixels.ndim == 2 else pixels).astype(np.uint8), 256


def _resize(image: PIL.Image.Image, resolution: int, crop_seed: int | None) -> PIL.Image.Image:
    """Shorter side to `resolution` (bilinear with antialiasing), then a square: in the centre, or at a seeded place."""
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
