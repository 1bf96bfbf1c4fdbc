"""The images to train on and those to evaluate on: which they are, and what may be said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from arguments import DataArguments
from randomness import generator_for
from torch import Tensor

from .images import DataError, ImageSet, labels_of
from .reading import read_images
from .sources import as_images, find_split, image_column, is_digits, label_column, open_splits, source_of

HELD_OUT = "held_out"  # name of the share of the training split that is held out when there is no split for it
DIGITS = "scikit-learn digits (8x8, 17 grey levels)"
DIGITS_SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1500), "test": slice(1500, 1797)}


def load_splits(args: DataArguments, seed: int) -> tuple[ImageSet, ImageSet]:
    """The images to train on and those to evaluate on while training; the name of the second says where it is from."""
    return load_split(args, args.train_split, seed), load_split(args, evaluation_split(args), seed)


def load_split(args: DataArguments, split: str, seed: int) -> ImageSet:
    """One split: of the data set itself, or `HELD_OUT`.

    Without --eval_split the training split is divided by a permutation seeded with `seed`: the held-out share is
    `HELD_OUT`, and asking for the training split gives the rest.

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
                drawn = torch.randperm(len(chosen), generator=generator_for(seed, "subset"))
                chosen = chosen[drawn[: args.max_train_samples]]
                notes.append(f"{len(chosen)} of them drawn with seed {seed}")
        return None if chosen is None else chosen.sort().values

    source = args.train_split if split == HELD_OUT else split
    result = _read_split(args, source, None if split != args.train_split or args.center_crop else seed, choose)
    return replace(result, name=f"{', '.join([result.name, *notes])}: {len(result)} images")


def default_test_split(args: DataArguments) -> str:
    """The split for a final figure: the data set's own test split, unless it was trained on, else that held out while
    training.
    """
    names = list(DIGITS_SPLITS) if is_digits(args) else list(open_splits(args))
    own = [name for name in ("test", "validation", "valid") if name in names and name != args.train_split]
    return own[0] if own else evaluation_split(args)


def evaluation_split(args: DataArguments) -> str:
    """The split that is evaluated while training."""
    if args.eval_split is not None:
        return args.eval_split
    return "validation" if is_digits(args) and args.train_split != "validation" else HELD_OUT


def kind_of_images(args: DataArguments, split: str) -> str:
    """What a figure on a split is a figure of: "held-out" images, or "training" images where the split is the one
    trained on.
    """
    return "training" if split == args.train_split else "held-out"


def figure_name(args: DataArguments, split: str, *, conditional: bool = False) -> str:
    """What bits/dim on a split are called: of which images, and whether of p(x | y), given the class, which is
    another figure.
    """
    return f"{kind_of_images(args, split)} bits/dim{' given the class' if conditional else ''}"


def overlap(train: ImageSet, evaluated: ImageSet) -> str | None:
    """A warning if images that are evaluated are also trained on."""
    number = evaluated.number_among(train)
    if not number:
        return None
    return (
        f"warning: {number} of the {len(evaluated)} images evaluated are also among those trained on: their "
        "figure is not held out"
    )


def _read_split(
    args: DataArguments, split: str, crop_seed: int | None, choose: Callable[[int], Tensor | None]
) -> ImageSet:
    """Read the images of a split that `choose` chooses, given their number (None: all)."""
    if is_digits(args):
        return _digits(split, choose)
    dataset = find_split(open_splits(args), split)
    column = image_column(dataset, args.image_column)
    labels_column, class_names = label_column(dataset, args.label_column)
    chosen = choose(len(dataset))
    labels, num_classes = None, None if class_names is None else len(class_names)
    if labels_column is not None:
        labels = labels_of(dataset[labels_column][:], num_classes, labels_column)
        num_classes = max(1, int(labels.max()) + 1) if num_classes is None and len(labels) else num_classes
    if chosen is not None:
        dataset = dataset.select(chosen.tolist())
        labels = None if labels is None else labels[chosen]
    read = read_images(as_images(dataset, column, decode=True), column, args, crop_seed, chosen)
    if read.left_out:
        kept = torch.ones(len(dataset), dtype=torch.bool)
        kept[list(read.left_out)] = False
        labels = None if labels is None else labels[kept]
    return ImageSet(
        read.images,
        labels,
        read.num_levels,
        num_classes,
        source_of(args),
        f"{source_of(args)}, split {split}",
        read.highest,
        class_names,
        tuple(f"left out: {what}" for what in read.left_out.values()),
    )


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
    labels = torch.from_numpy(digits.target.astype(np.int64)[indices])
    names = tuple(map(str, range(10)))
    return ImageSet(images, labels, 17, 10, DIGITS, f"{DIGITS}, split {split}", class_names=names)
