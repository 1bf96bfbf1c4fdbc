"""The published models: they load in three lines, have the figures of their cards, and what they draw are digits."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from arguments import DataArguments
from data import ImageSet, load_split
from huggingface_hub import ModelCard
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from vdm_diffusers import VDMPipeline, evaluate_likelihood

CARDS = Path(__file__).parent.parent / "model_cards"
ALL = sorted(path.parent.name for path in CARDS.glob("*/model_index.json"))


def load(name: str) -> VDMPipeline:
    pipe = VDMPipeline.from_pretrained(CARDS / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def digits() -> dict[str, ImageSet]:
    return {split: load_split(DataArguments(), split, seed=0) for split in ("train", "test")}


def histogram_bits_per_dim(train: torch.Tensor, test: torch.Tensor, num_levels: int = 17) -> float:
    """Independent pixels, each with its own histogram of the training images (one count added to each level)."""
    counts = torch.nn.functional.one_hot(train.long(), num_levels).sum(0).double() + 1
    log_probability = (counts / counts.sum(-1, keepdim=True)).log2()
    levels = test.long().unsqueeze(-1)
    return -float(log_probability.expand(len(test), *log_probability.shape).gather(-1, levels).mean())


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("digits")])
def test_a_cards_figure_is_found_again_and_far_below_the_histogram_baseline(name, digits):
    pipe, images = load(name), digits["test"].images
    labels = digits["test"].labels if pipe.unet.config.num_class_embeds else None
    baseline = histogram_bits_per_dim(digits["train"].images, images)
    report = evaluate_likelihood(
        pipe, images, class_labels=labels, num_samples=4, generator=torch.Generator().manual_seed(1)
    )
    assert report.is_bound
    assert report.bits_per_dim < 1.75 < baseline - 0.5
    (result,) = ModelCard.load(CARDS / name / "README.md").data.eval_results
    assert result.metric_args["num_images"] == len(images)
    assert result.metric_args["data_version"] == f"blake2b {digits['test'].fingerprint()}"
    error = (report.standard_error**2 + result.metric_args["standard_error"] ** 2) ** 0.5
    assert abs(report.bits_per_dim - result.metric_value) < 5 * error  # other noise, the same images


@pytest.mark.parametrize(
    "name", [name if name == "digits-elbo" else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_the_cards_code_runs_as_printed(name, monkeypatch):
    monkeypatch.chdir(CARDS.parent)
    blocks = re.findall(r"```python\n(.*?)```", (CARDS / name / "README.md").read_text(encoding="utf-8"), re.S)
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert len(namespace["images"]) == 8 and namespace["report"].bits_per_dim > 2  # the bits of noise


@pytest.mark.slow
def test_samples_are_digits(digits):
    """A classifier of real digits is nearly as sure of the samples as of held-out digits; all classes; nothing
    copied.
    """
    images, labels = digits["train"].images, digits["train"].labels
    classifier = CalibratedClassifierCV(SVC(), ensemble=False).fit(images.flatten(1).numpy() / 16, labels.numpy())
    held_out = classifier.predict_proba(digits["test"].images.flatten(1).numpy() / 16).max(1).mean()

    generator = torch.Generator().manual_seed(0)
    drawn = load("digits-elbo")(batch_size=500, num_inference_steps=250, generator=generator, output_type="np").images
    levels = np.rint(drawn * 16).astype(int).reshape(500, -1)
    assert levels.min() == 0 and levels.max() == 16
    probabilities = classifier.predict_proba(levels / 16)
    assert probabilities.max(1).mean() > held_out - 0.1
    assert set(probabilities.argmax(1)) == set(range(10))
    real = {tuple(image) for image in images.flatten(1).tolist()}
    assert not any(tuple(sample) in real for sample in levels.tolist())
