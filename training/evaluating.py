"""What is looked at while and after training: bits/dim by term, loss against log SNR, samples.

Shared by both scripts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from class_labels import labels_to_evaluate
from data import ImageSet
from randomness import generator_for
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel, evaluate_likelihood, fit_analytic_start
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.elbo import squared_error
from vdm_diffusers.evaluation import Method
from vdm_diffusers.evaluation.adapters import Predictor
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.likelihood import LikelihoodReport
from vdm_diffusers.models.labels import default_label
from vdm_diffusers.prediction import convert

TERMS = ("prior", "diffusion", "reconstruction")


def bits_per_dim(
    pipeline: VDMPipeline,
    images: ImageSet,
    *,
    seed: int,
    num_samples: int,
    batch_size: int,
    method: Method | None = None,
    num_steps: int | None = None,
    options: dict[str, Any] | None = None,
    progress_bar: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Bits/dim of `images` by the ELBO, its terms and its errors; the images are shared out among the processes.

    Arguments:
        options: further arguments of evaluate_likelihood.
    Returns:
        bits_per_dim, standard_error (of the estimate for these images), sampling_error (between images), prior,
        diffusion, reconstruction (bits/dim, where the method has them), num_images, method, num_model_evaluations,
        settings, and per_image: nats and terms of each image, in nats and in the images' order.
    """
    mine = torch.arange(process_index, len(images), num_processes)
    report = None
    labels = labels_to_evaluate(pipeline.unet, images)
    if method is None and str(pipeline.scheduler.config.variance_type).startswith("learned"):
        method = "discrete"  # in continuous time there is no variance to learn
    if len(mine):
        report = evaluate_likelihood(
            pipeline,
            images.images[mine],
            class_labels=labels[mine] if labels is not None else None,
            generator=generator_for(seed, "evaluation", process_index),
            num_samples=num_samples,
            batch_size=batch_size,
            method=method,
            num_steps=num_steps,
            progress_bar=progress_bar,
            **(options or {}),
        )
    return combined_result(report, mine, images, num_processes)


def combined_result(
    report: LikelihoodReport | None, mine: Tensor, images: ImageSet, num_processes: int
) -> dict[str, Any]:
    """The reports of all processes, each of its own images `mine` (None: of none), as `bits_per_dim` returns them."""
    parts: list[dict[str, Any]] = []
    if report is not None:
        part = {"nats": report.nats.tolist(), "error": report.standard_error * len(mine), "method": report.method}
        part |= {"evaluations": report.num_model_evaluations, "is_bound": report.is_bound}
        part |= {"settings": report.settings, "index": mine.tolist()}
        for term in TERMS:
            values = getattr(report, term)
            part[term] = None if values is None else values.tolist()
        parts.append(part)
    if num_processes > 1:
        parts = gather_object(parts)
    to_bits = 1 / (images.num_dims * math.log(2))
    nats = np.concatenate([part["nats"] for part in parts])
    result = {
        "bits_per_dim": float(nats.mean() * to_bits),
        "standard_error": math.sqrt(sum(part["error"] ** 2 for part in parts)) / len(nats),
        "sampling_error": float(nats.std(ddof=1) / math.sqrt(len(nats)) * to_bits) if len(nats) > 1 else math.nan,
    }
    order = np.argsort(np.concatenate([part["index"] for part in parts]))
    per_image = {"nats": nats[order].tolist()}
    for term in TERMS:
        if parts[0][term] is not None:
            values = np.concatenate([part[term] for part in parts])
            result[term] = float(values.mean() * to_bits)
            per_image[term] = values[order].tolist()
    return result | {
        "settings": parts[0]["settings"],
        "per_image": per_image,
        "num_images": len(nats),
        "method": parts[0]["method"],
        "is_bound": parts[0]["is_bound"],
        "num_model_evaluations": sum(part["evaluations"] for part in parts),
    }


@torch.no_grad()
def loss_by_log_snr(
    pipeline: VDMPipeline,
    images: ImageSet,
    *,
    seed: int,
    num_points: int = 40,
    max_images: int = 512,
    batch_size: int = 64,
    progress_bar: bool = False,
) -> list[dict[str, float]]:
    """The diffusion term per unit of log SNR, 1/2 E|eps - eps_hat|^2 in bits/dim, at evenly spaced log SNRs.

    Its integral over log SNR is the diffusion term in continuous time (VDM equation 18), whatever the schedule.

    Returns:
        One entry for each point: log_snr, mse (mean |eps - eps_hat|^2 per dimension), bits_per_dim_per_log_snr,
            standard_error.
    """
    chosen = torch.randperm(len(images), generator=generator_for(seed, "profile"))[:max_images]
    scheduler, config, device = pipeline.scheduler, pipeline.config, pipeline.device
    schedule = scheduler.noise_schedule
    highest, lowest = schedule.log_snr_max, max(schedule.log_snr_min, -20.0)  # below, nothing is left to predict
    width = (highest - lowest) / num_points
    labels = labels_to_evaluate(pipeline.unet, images)
    if labels is None and (own := default_label(pipeline.unet)) is not None:
        labels = torch.full((len(images),), own)
    predict = Predictor(pipeline.unet, scheduler, device, labels, {}, len(images))
    source = scheduler.timeline.on_vp(torch.zeros(1).double(), scheduler.config.prediction_type)[0]
    points = []
    for index in tqdm(range(num_points), desc="loss by log SNR", disable=not progress_bar):
        log_snr = highest - (index + 0.5) * width
        generator, errors = generator_for(seed, "profile", index), []
        for batch in chosen.split(batch_size):
            x = encode_pixels(images.images[batch], config.num_levels, config.pixel_encoding).to(device)
            noise = torch.randn(x.shape, generator=generator).to(device)
            z_t = diffuse(x, noise, log_snr)
            output = predict(z_t, torch.full((len(x),), log_snr, dtype=torch.float64), batch)
            eps_hat = convert(output[:, : x.shape[1]], z_t, log_snr, source=source, target="epsilon")
            errors.append(squared_error(noise, eps_hat).cpu() / images.num_dims)
        mse = torch.cat(errors).double()
        bits = mse / (2 * math.log(2))
        error = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else math.nan
        points.append(
            {
                "log_snr": log_snr,
                "mse": float(mse.mean()),
                "bits_per_dim_per_log_snr": float(bits.mean()),
                "standard_error": error,
            }
        )
    return points


def draw_samples(
    pipeline: VDMPipeline,
    num_images: int,
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    num_classes: int | None = None,
) -> Tensor:
    """Sampled images as integer levels (N, C, H, W), the same for the same seed on any device.

    A class-conditional model draws its classes in turn.
    """
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, num_images, batch_size):
        count = min(batch_size, num_images - start)
        labels = None if num_classes is None else (torch.arange(start, start + count) % num_classes)
        output: Any = pipeline(
            batch_size=count,
            num_inference_steps=num_inference_steps,
            class_labels=labels,
            generator=generator_for(seed, "samples", start),
            output_type="pt",
        )
        drawn.append((output.images.cpu() * (pipeline.config.num_levels - 1)).round().long())
    return torch.cat(drawn)


def histogram_bits_per_dim(train: ImageSet, test: ImageSet) -> float:
    """The baseline that a model must beat: each pixel an independent histogram of the training images (plus one
    count).
    """
    if train.images.shape[1:] != test.images.shape[1:] or train.num_levels != test.num_levels:
        raise ValueError("training and test images must have the same size and number of levels.")
    total = 0.0
    for level_train, level_test in zip(train.images.flatten(1).T, test.images.flatten(1).T, strict=True):
        counts = torch.bincount(level_train.long(), minlength=train.num_levels).double() + 1
        total -= float((counts / counts.sum()).log2()[level_test.long()].sum())
    return total / test.images.numel()


def analytic_bits_per_dim(
    train: ImageSet,
    test: ImageSet,
    *,
    seed: int,
    num_images: int = 256,
    num_samples: int = 8,
    progress_bar: bool = False,
) -> dict[str, dict[str, float]]:
    """Two bounds that need no training, of the first `num_images` test images: what a network's figure should be
    compared with.

    `wiener`: the linear denoiser of Gaussian data with the training images' mean and covariance. `wiener_and_levels`:
    that denoiser, told how frequent each level of a pixel is (`models.analytic_start`). Each is a dict of bits_per_dim
    and standard_error.
    """
    encoding: Any = "bin_center"
    # VDM's ends for 256 levels; of fewer, which lie further apart, the noise of z_0 hides as little
    log_snr_max, log_snr_min = 13.3 + 2 * math.log(train.num_levels / 256), -5.0
    ends = {"log_snr_max": log_snr_max, "log_snr_min": log_snr_min}
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", **ends)
    steps = scheduler.config.num_train_timesteps
    chosen = torch.randperm(len(train), generator=generator_for(seed, "analytic"))[:20_000]
    images, channels = train.images[chosen], train.images.shape[1]
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False}
    found = {}
    for name, num_levels in (("wiener", None), ("wiener_and_levels", train.num_levels)):
        network = VDMUNet2DModel(  # a new one answers zero, and so changes nothing
            in_channels=3 * channels,
            out_channels=2 * channels,
            fourier_exponents=(),
            residual_connection=False,
            **sizes,
        )
        model = fit_analytic_start(
            network,
            images if num_levels else encode_pixels(images, train.num_levels, encoding),
            knots=[-1.0, steps - 1.0],
            log_snr=[log_snr_max, log_snr_min],
            num_levels=num_levels,
            pixel_encoding=encoding,
        )
        report = evaluate_likelihood(
            VDMPipeline(model, scheduler, num_levels=train.num_levels, pixel_encoding=encoding),
            test.images[:num_images],
            num_samples=num_samples,
            generator=generator_for(seed, "analytic"),
            progress_bar=progress_bar,
        )
        found[name] = {"bits_per_dim": report.bits_per_dim, "standard_error": report.total_error}
    return found


def combined_error(errors: Sequence[float]) -> float:
    """Independent errors together: the root of the sum of squares, leaving out what is not defined."""
    return math.sqrt(sum(error**2 for error in errors if math.isfinite(error)))
