"""One picture of a model: what it draws, what it finds likely, how it removes noise, and where its bits are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from class_labels import labels_to_evaluate
from data import ImageSet
from randomness import generator_for
from torch import Tensor

from vdm_diffusers import VDMPipeline
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.evaluation.adapters import Predictor
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.models.labels import default_label
from vdm_diffusers.pictures import image_grid
from vdm_diffusers.prediction import convert

_COLUMNS = 8  # images in a row of the strips
_INK, _ACCENT = "#222222", "#0072b2"  # of the colour-blind safe palette of Okabe and Ito


def overview(
    path: Path,
    pipeline: VDMPipeline,
    images: ImageSet,
    nats: list[float],
    profile: list[dict[str, float]],
    samples: Tensor,
    *,
    title: str,
    seed: int,
) -> None:
    """Draw `path`: samples, held-out images with their bits, one image at several noise levels, the loss by log SNR.

    Args:
        nats: of each image, as of `evaluating.bits_per_dim`.
        profile: as of `evaluating.loss_by_log_snr`.
        samples: (N, C, H, W) levels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels, to_bits = pipeline.config.num_levels, 1 / (images.num_dims * math.log(2))
    figure = Figure(figsize=(11, 7.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=_INK)
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[1, 1.25]))
    above, below = left.subfigures(2, 1, height_ratios=[1.5, 1])
    axes = above.add_subplot()
    side = max(1, math.isqrt(len(samples)))
    axes.imshow(_pixels(image_grid(samples[: side * side], levels)), cmap="gray")
    axes.set_title("samples, not selected", fontsize=10)
    axes.set_axis_off()

    curve = below.add_subplot()
    log_snr = [point["log_snr"] for point in profile]
    loss = np.array([point["bits_per_dim_per_log_snr"] for point in profile])
    curve.fill_between(log_snr, 0, loss, color=_ACCENT, alpha=0.25, linewidth=0)
    curve.plot(log_snr, loss, color=_ACCENT)
    curve.set_xlabel("log SNR (noise on the left, detail on the right)", fontsize=9)
    curve.set_ylabel("bits/dim per unit", fontsize=9)
    curve.set_title("where the bits are: the area is the diffusion term", fontsize=10)
    curve.set_ylim(bottom=0)
    curve.grid(alpha=0.3)

    order = torch.tensor(nats).argsort()
    middle = order[torch.linspace(0, len(order) - 1, min(_COLUMNS, len(order))).round().long()]
    noise = _denoising(pipeline, images, int(order[len(order) // 2]), seed)
    strips = [
        ("most likely", images.images[order[:_COLUMNS]], [nats[i] * to_bits for i in order[:_COLUMNS].tolist()]),
        ("from the most to the least likely", images.images[middle], [nats[i] * to_bits for i in middle.tolist()]),
        (
            "least likely",
            images.images[order.flip(0)[:_COLUMNS]],
            [nats[i] * to_bits for i in order.flip(0)[:_COLUMNS].tolist()],
        ),
    ]
    rows = right.subfigures(len(strips) + 2, 1)
    for place, (text, shown, bits) in zip(rows, strips, strict=False):
        tiles = [_pixels(image_grid(image[None], levels, smallest_side=1))[1:-1, 1:-1] for image in shown]
        _strip(place, f"held-out images, {text} (bits/dim)", tiles, [f"{value:.2f}" for value in bits], 255)
    log_snrs, *parts = noise
    for place, (text, part) in zip(rows[len(strips) :], parts, strict=True):
        _strip(place, text, [_shown(image) for image in part], [f"{value:+.1f}" for value in log_snrs], 1)
    figure.savefig(path, dpi=110)


def _strip(place: Any, text: str, tiles: list[Any], labels: list[str], highest: float) -> None:
    """A row of small pictures under a heading, each with a number above it."""
    place.suptitle(text, x=0.02, ha="left", fontsize=10)
    for axis, tile, label in zip(place.subplots(1, _COLUMNS), tiles, labels, strict=False):
        axis.imshow(tile, cmap="gray", vmin=0, vmax=highest)
        axis.set_title(label, fontsize=8, pad=2)
    for axis in place.axes:
        axis.set_axis_off()


@torch.no_grad()
def _denoising(pipeline: VDMPipeline, images: ImageSet, chosen: int, seed: int) -> Any:
    """Log SNRs, and two rows of pictures in [-1, 1]: one image with noise, and what the network makes of it."""
    schedule, device = pipeline.scheduler.noise_schedule, pipeline.device
    high, low = min(schedule.log_snr_max, 8.0), max(schedule.log_snr_min, -4.0)
    log_snr = torch.linspace(high, low, _COLUMNS, dtype=torch.float64)
    one = images.images[chosen : chosen + 1]
    x = encode_pixels(one, pipeline.config.num_levels, pipeline.config.pixel_encoding).expand(_COLUMNS, -1, -1, -1)
    z = diffuse(x, torch.randn(x.shape, generator=generator_for(seed, "overview")), log_snr).to(device)
    labels = labels_to_evaluate(pipeline.unet, images)
    if labels is None and (own := default_label(pipeline.unet)) is not None:
        labels = torch.full((len(images),), own)
    predict = Predictor(pipeline.unet, pipeline.scheduler, device, labels, {}, len(images))
    source = pipeline.scheduler.timeline.on_vp(torch.zeros(1).double(), pipeline.scheduler.config.prediction_type)[0]
    output = predict(z, log_snr, torch.full((_COLUMNS,), chosen))[:, : x.shape[1]]
    x_hat = convert(output, z, log_snr, source=source, target="sample")
    return log_snr.tolist(), ("one image with noise (log SNR)", z.cpu()), ("what the network makes of it", x_hat.cpu())


def _pixels(picture: Any) -> Any:
    return np.asarray(picture)


def _shown(image: Tensor) -> Any:
    """(C, H, W) in [-1, 1] as matplotlib takes it: grey, or colour."""
    scaled = ((image + 1) / 2).clamp(0, 1).float()
    return scaled[0].numpy() if len(scaled) < 3 else scaled[:3].permute(1, 2, 0).numpy()
