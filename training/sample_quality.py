"""FID and KID of samples against images, by torchmetrics, with Inception's weights where they lie on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_FILE = (
    "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's conversion of the network that FID is defined by
)
SUBSET_SIZE = 1000  # of KID, as published, where there are so many images


class SampleQualityError(RuntimeError):
    """FID cannot be computed here; the message says what is missing."""


@dataclass(frozen=True)
class SampleQuality:
    """Distances of samples from images in a network's features.

    Attributes:
        fid: Frechet distance of the features' Gaussians. Biased upwards with few images: compare figures of equal
            numbers.
        kid: mean over subsets of the squared maximum mean discrepancy with a cubic kernel; unbiased. kid_deviation:
            over the subsets.
        num_images: images, and as many samples.

    Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule"; Binkowski et al. 2018, "Demystifying
    MMD GANs".
    """

    fid: float
    kid: float
    kid_deviation: float
    num_images: int


def inception(weights: str | None = None) -> nn.Module:
    """The Inception network of FID, (N, 3, H, W) uint8 -> (N, 2048), with weights from a file; nothing is downloaded.

    Arguments:
        weights: the file; None: `WEIGHTS_FILE` in the folder where torch.hub keeps checkpoints.
    Raises:
        SampleQualityError: a package or the file is missing.
    """
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        raise SampleQualityError(
            f"--fid needs the weights of FID's Inception network, and {path} does not exist. Get {WEIGHTS_FILE} from "
            "the releases of "
            "torch-fidelity on GitHub, and put it there or name it with --fid_weights."
        )
    _require_torchmetrics()
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    except ModuleNotFoundError as error:
        raise SampleQualityError(f"--fid needs torch-fidelity: pip install torch-fidelity. ({error})") from error


def _require_torchmetrics() -> None:
    try:
        import torchmetrics.image  # noqa: F401
    except ModuleNotFoundError as error:
        raise SampleQualityError(
            "--fid needs torchmetrics and torch-fidelity: pip install 'vdm-diffusers[fid]'."
        ) from error


def sample_quality(
    images: Tensor,
    samples: Tensor,
    num_levels: int,
    *,
    feature: nn.Module,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> SampleQuality:
    """FID and KID of samples against as many images.

    Arguments:
        images, samples: (N, C, H, W) levels 0..num_levels-1, one or three channels; brought to 256 levels and three
            channels.
        feature: a network (N, 3, H, W) uint8 -> (N, features): `inception()`, or another one.
        seed: of KID's subsets.
    Raises:
        SampleQualityError: torchmetrics is not installed, fewer than two images, or two or more than three channels.
    """
    _require_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    number = min(len(images), len(samples))
    if number < 2:
        raise SampleQualityError(f"FID needs at least 2 images and 2 samples, got {number}.")
    if images.shape[1] not in (1, 3):
        raise SampleQualityError(f"FID is of images with one or three channels, these have {images.shape[1]}.")
    metrics: list[Any] = [
        FrechetInceptionDistance(feature=feature),
        KernelInceptionDistance(feature=feature, subset_size=min(SUBSET_SIZE, number)),
    ]
    for metric in metrics:
        metric.to(device)
        for real, levels in ((True, images), (False, samples)):
            for batch in levels[:number].split(batch_size):
                pixels = (batch.double() * (255 / (num_levels - 1))).round().to(torch.uint8)
                metric.update(pixels.expand(-1, 3, -1, -1).to(device), real=real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kid, deviation = metrics[1].compute()
    return SampleQuality(float(metrics[0].compute()), float(kid), float(deviation), number)
