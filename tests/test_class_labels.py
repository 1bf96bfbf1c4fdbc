"""Labels that a network does not know are refused before the first step; images without one are trained on, or
refused.
"""

from dataclasses import replace

import pytest
import torch
from arguments import DataArguments, DiffusionArguments
from class_labels import check_labels, labels_to_evaluate
from data import DataError, figure_name, load_split, overlap
from diffusers import UNet2DModel
from diffusion import DiffusionTask, Rows, make_scheduler

from vdm_diffusers import VDMUNet2DModel

SIZES = {"hidden_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "fourier_exponents": ()}


@pytest.fixture(scope="module")
def network():
    return VDMUNet2DModel(sample_size=8, in_channels=1, num_class_embeds=10, **SIZES)


@pytest.fixture(scope="module")
def digits():
    return load_split(DataArguments(), "test", 0).first(20)


def with_labels(images, *values):
    labels = images.labels.clone()
    labels[: len(values)] = torch.tensor(values)
    return replace(images, labels=labels)


@pytest.mark.parametrize("where", ["trained on", "evaluated"])
@pytest.mark.parametrize("label", [10, 11])
def test_labels_beyond_the_classes_are_refused(where, label, network, digits):
    wrong = with_labels(digits, label)
    sets = (wrong, digits) if where == "trained on" else (digits, wrong)
    with pytest.raises(DataError, match=rf"10 classes, 0\.\.9, and an image of .* has label {label}"):
        check_labels(network, *sets, class_dropout=0.5)
    with pytest.raises(DataError, match=f"has label {label}"):
        labels_to_evaluate(network, wrong)


def test_images_without_a_class(network, digits):
    some = with_labels(digits, -1, 3, -1)
    check_labels(network, digits, digits, class_dropout=0.0)
    check_labels(network, some, some, class_dropout=0.0)  # learned from the images themselves
    check_labels(network, digits, some, class_dropout=0.1)
    with pytest.raises(DataError, match=r"2 of the images evaluated have no class .*--class_dropout"):
        check_labels(network, digits, some, class_dropout=0.0)
    with pytest.raises(DataError, match="the images evaluated have none"):
        check_labels(network, digits, replace(digits, labels=None), class_dropout=0.5)
    assert labels_to_evaluate(network, some)[:3].tolist() == [10, 3, 10]
    with pytest.raises(DataError, match="was not trained without"):
        labels_to_evaluate(network, some, trained_without=False)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    stock = UNet2DModel(8, 1, 1, num_class_embeds=10, norm_num_groups=4, layers_per_block=1, **blocks)
    with pytest.raises(DataError, match="no label left for that: give it 11 classes"):
        check_labels(stock, some, digits, class_dropout=0.0)


def test_an_image_without_a_class_is_trained_on_as_no_class(network, digits):
    args = DiffusionArguments()
    common = {"num_levels": 17, "num_classes": 10, "seed": 0, "device": torch.device("cpu")}
    task, seen = DiffusionTask(args, make_scheduler(args), **common), []

    def model(z_t, timestep, class_labels, return_dict):
        seen.append(class_labels.tolist())
        return (z_t,)

    task.losses(model, digits.images[:3], torch.tensor([4, -1, 0]), Rows(0, 0, 3, 3))
    assert seen == [[4, 10, 0]]


def test_figures_are_called_what_they_are(digits):
    assert figure_name(DataArguments(), "validation") == "held-out bits/dim"
    assert figure_name(DataArguments(eval_split="train"), "train") == "training bits/dim"
    assert figure_name(DataArguments(), "test", conditional=True) == "held-out bits/dim given the class"
    assert overlap(load_split(DataArguments(), "train", 0), digits) is None
    assert "20 of the 20 images evaluated are also among those trained on" in overlap(digits, digits)
