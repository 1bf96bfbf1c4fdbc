"""Class labels between the data and a network: which are allowed, and what is meant by an image without one."""

from __future__ import annotations

from typing import Any

import torch
from data import UNLABELLED, DataError, ImageSet
from networks import no_class_label
from torch import Tensor

from vdm_diffusers.models.labels import is_class_conditional, null_label, num_classes


def check_labels(network: Any, train: ImageSet, evaluated: ImageSet, *, class_dropout: float) -> None:
    """Make sure before the first step that the labels of both sets are ones that a class-conditional network will
    know.

    Raises:
        DataError: labels beyond its classes, or images without one where it never learns what that means.
    """
    if not is_class_conditional(network):
        return
    if evaluated.labels is None:
        raise DataError(
            f"--class_conditional needs class labels, and the images evaluated have none: {evaluated.name}."
        )
    for images in (train, evaluated):
        _check_range(network, images)
    no_class = no_class_label(network, train)
    if train.num_unlabelled and no_class is None:
        raise DataError(
            f"{train.num_unlabelled} training images have no class (label {UNLABELLED}), and the network has no label "
            "left for that: "
            f"give it {(train.num_classes or 0) + 1} classes, or leave these images out."
        )
    learns = null_label(network) is not None and (class_dropout > 0 or train.num_unlabelled > 0)
    if evaluated.num_unlabelled and not learns:
        raise DataError(
            f"{evaluated.num_unlabelled} of the images evaluated have no class (label {UNLABELLED}), and the network "
            "does not learn what "
            "that means: give another --eval_split, or --class_dropout."
        )


def labels_to_evaluate(network: Any, images: ImageSet, *, trained_without: bool | None = None) -> Tensor | None:
    """The labels that a network is evaluated with, its own for "no class" where an image has none; None for one
    without classes.

    Arguments:
        trained_without: whether it was trained on images without a class too; None: that is not known, and believed.
    Raises:
        DataError: labels beyond its classes, or images without one where it knows no such thing.
    """
    if not is_class_conditional(network):
        return None
    labels = torch.full((len(images),), UNLABELLED) if images.labels is None else images.labels
    _check_range(network, images)
    without = labels == UNLABELLED
    if not bool(without.any()):
        return labels
    null = null_label(network)
    if null is None or trained_without is False:
        raise DataError(
            f"{int(without.sum())} of the images have no class, and the model, of {num_classes(network)} classes, was "
            "not trained without: "
            "name the column of their labels with --label_column, or take another split."
        )
    return torch.where(without, null, labels)


def _check_range(network: Any, images: ImageSet) -> None:
    classes = num_classes(network) or 0
    if images.labels is not None and len(images) and int(images.labels.max()) >= classes:
        raise DataError(
            f"the network has {classes} classes, 0..{classes - 1}, and an image of {images.name} has label "
            f"{int(images.labels.max())}: "
            "see --label_column."
        )
