"""What an error bar costs: model evaluations for a standard error of 0.01 bits/dim on one data point, by estimator.

On a network (a checkpoint, or a small one trained here on the 8x8 digits) and on the exact denoisers of two mixtures
of Gaussians, in 64 and 3072 dimensions, whose density is known, so that the last column is a bias. All figures come
from evaluate_likelihood's own standard errors, which come from independent shifts: evaluations = (standard error /
0.01)^2 x all evaluations x images. They count everything, also the first part that shows where further evaluations are
worth most.

Then the usual sum over a DDPM chain (`ddpm_sum`), on the same mixtures seen as 8-bit images, and one table for all
estimators with a truth in it: continuous mixtures, and data that are N known images, whose -ln p is ln N.

    python benchmarks/likelihood.py [--checkpoint FOLDER] [--train_steps 600] [--num_images 48] [--seeds 1] [--output
                                    likelihood.json] [--only network,mixtures,chain,order] [--estimators continuous]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixtures import SpectralMixture
from torch import Tensor

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel, evaluate_likelihood
from vdm_diffusers.decoders import decode_pixels, discretized_gaussian_log_likelihood, encode_pixels
from vdm_diffusers.elbo import continuous_weight, prior_kl
from vdm_diffusers.gaussian import alpha_sigma, diffuse, posterior_coefficients
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.prediction import convert
from vdm_diffusers.reverse_variance import posterior_variance
from vdm_diffusers.time_sampling import low_discrepancy

TARGET = 0.01
PLAIN, DEFAULT = "continuous, low-discrepancy (VDM)", "continuous, default"


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Training images and `count` others, integers 0..16 of 8x8: the split of training/train.py, so that a checkpoint
    knows no other.
    """
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return images[order[:1200]], images[order[1500 : 1500 + count]]


def train(images: Tensor, steps: int) -> VDMPipeline:
    """A small VDM, trained for the bound: enough to be a network with errors of its own."""
    torch.manual_seed(0)
    model = VDMUNet2DModel(
        8, 1, hidden_channels=32, layers_per_block=2, norm_num_groups=8, fourier_exponents=(3, 4), dropout=0.0
    )
    scheduler = VDMScheduler(beta_schedule="log_snr_linear")
    schedule, optimizer = scheduler.noise_schedule, torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        x = encode_pixels(images[torch.randint(len(images), (64,))], 17)
        t, noise = low_discrepancy(len(x)), torch.randn_like(x)
        log_snr = schedule.log_snr(t)
        output = model(diffuse(x, noise, log_snr), scheduler.timestep_from_log_snr(log_snr).float()).sample
        weight = continuous_weight(schedule.derivative(t))
        loss = diffusion_loss(output, x, noise, log_snr, prediction_type="epsilon", elbo_weight=weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return VDMPipeline(model.eval(), scheduler, num_levels=17)


def estimators(num_dims: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments of evaluate_likelihood by name."""
    found: dict[str, dict[str, Any]] = {
        PLAIN: {"method": "continuous", "variance_reduction": False, "num_samples": 64},
        DEFAULT: {"method": "continuous", "num_samples": 64},
        "discrete T=1000, subset": {"method": "discrete", "variance_reduction": False, "num_samples": 64},
        "discrete T=1000, subset, default": {"method": "discrete", "num_samples": 64},
    }
    if num_dims <= 64:
        found |= {
            "discrete T=100, every step": {"method": "discrete", "num_steps": 100, "num_samples": 200},
            "importance-weighted T=100, K=4": {"method": "importance_weighted", "num_steps": 100, "num_samples": 8},
        }
        found["ODE, Hutchinson"] = {"method": "ode", "num_samples": 4, "tolerance": 1e-4}
    return found


def ddpm_sum(
    model: Callable[[Tensor, Tensor], Tensor], levels: Tensor, scheduler: VDMScheduler, generator: torch.Generator
) -> Tensor:
    """The bound as the scripts of DDPM's time add it up: (N,) nats.

    From x_T to x_1 every step draws one x_t, clips the predicted image to [-1, 1], and adds the KL of the two
    Gaussians with the posterior variance; at x_1 the discretised Gaussian has that of the second step. One noise for
    each image and step, no error bar.

    Source: the procedure of Ho et al. 2020, equation 5, and of Nichol & Dhariwal 2021, section 4 (evaluation of
    L_vlb).
    """
    x = encode_pixels(levels, 256, "endpoint")
    log_snrs = scheduler.log_snr(torch.arange(scheduler.config.num_train_timesteps))
    total = prior_kl(x, float(log_snrs[-1]))
    for i in range(len(log_snrs) - 1, -1, -1):
        noise = torch.randn(x.shape, generator=generator)
        ell = log_snrs[i].double().expand(len(x))
        z_t = diffuse(x, noise, ell)
        eps_hat = model(z_t, torch.full((len(x),), i))
        x_hat = convert(eps_hat, z_t, ell, source="epsilon", target="sample").clamp(-1, 1)
        if i == 0:
            variance = float(posterior_variance(log_snrs[0].double(), log_snrs[1].double()))
            total = total - discretized_gaussian_log_likelihood(
                levels, x_hat, variance, num_levels=256, pixel_encoding="endpoint"
            )
        else:
            posterior = posterior_coefficients(log_snrs[i].double(), log_snrs[i - 1].double())
            distance = (float(posterior.x) * (x - x_hat).double()).square().flatten(1).sum(1)
            total = total + distance / (2 * float(posterior.variance))
    return total.double()


def chain_rows(shape: tuple[int, int, int], num_images: int) -> list[dict[str, Any]]:
    """The sum over DDPM's own chain and ours of the same chain and in continuous time, on a mixture seen as 8-bit
    images.
    """
    data = SpectralMixture.make(shape, deviation=0.2)  # five deviations to the end of the range: nothing is cut off
    levels = decode_pixels(data.sample(num_images, torch.Generator().manual_seed(1)), 256, "endpoint")
    x = encode_pixels(levels, 256, "endpoint", torch.float64)
    infinity = torch.full((len(x),), math.inf, dtype=torch.float64)
    # the density varies little over a bin of 2/255: its mass is density times volume, in the mean
    truth = -float(data.log_density(x, infinity).mean()) / data.num_dims / math.log(2) - math.log2(2 / 255)
    table = VDMScheduler(beta_schedule="linear", clip_sample=False)
    per_image = ddpm_sum(Exact(data, table), levels, table, torch.Generator().manual_seed(0))
    again = ddpm_sum(Exact(data, table), levels, table, torch.Generator().manual_seed(1))
    # of one image's sum: from two sums with independent noise
    one = float((per_image - again).square().mean() / 2) ** 0.5 / data.num_dims / math.log(2)
    mean = float(per_image.mean()) / data.num_dims / math.log(2)
    rows = [row("sum over DDPM's 1000 steps, clipped", mean, one / math.sqrt(num_images), 1000 * num_images, truth)]
    rows[0]["standard_error_of_one_image"] = one
    continuous = VDMScheduler(beta_schedule="log_snr_linear")
    for name, scheduler, kwargs in (
        ("ours, the same chain", table, {"method": "discrete", "num_samples": 64}),
        ("ours, continuous", continuous, {"method": "continuous", "num_samples": 64}),
    ):
        report = evaluate_likelihood(
            Exact(data, scheduler),
            levels,
            scheduler=scheduler,
            pixel_encoding="endpoint",
            generator=torch.Generator().manual_seed(0),
            progress_bar=False,
            **kwargs,
        )
        rows.append(row(name, report.bits_per_dim, report.standard_error, report.num_model_evaluations, truth))
    # the denoiser knows a density, not the levels: half a bit and more is lost to the decoder, unless the density
    # itself is evaluated
    report = evaluate_likelihood(
        Exact(data, continuous),
        x.float(),
        scheduler=continuous,
        num_levels=None,
        num_samples=64,
        generator=torch.Generator().manual_seed(0),
        progress_bar=False,
    )
    bits = report.bits_per_dim - math.log2(2 / 255)
    rows.append(
        row("ours, the density times the bin", bits, report.standard_error, report.num_model_evaluations, truth)
    )
    return rows


def row(
    name: str, bits: float, error: float, evaluations: float, truth: float | None, seconds: float = 0.0
) -> dict[str, Any]:
    return {
        "estimator": name,
        "bits_per_dim": bits,
        "standard_error": error,
        "evaluations_for_target": (error / TARGET) ** 2 * evaluations,
        "seconds": seconds,
        "excess": None if truth is None else bits - truth,
    }


class KnownImages(torch.nn.Module):
    """The exact denoiser of data that are N known images with equal probability: -ln p = ln N for each."""

    def __init__(self, x: Tensor, scheduler: VDMScheduler):
        super().__init__()
        self.scheduler = scheduler
        self.register_buffer("x", x.double())
        self.register_parameter("dtype_and_device", torch.nn.Parameter(torch.zeros(1)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = (v[:, None] for v in alpha_sigma(self.scheduler.log_snr(timestep)))
        z, x = sample.double().flatten(1), self.x.flatten(1)
        square = ((z[:, None] - alpha[..., None] * x) ** 2).sum(2) / (2 * sigma**2)
        x_hat = (-square).softmax(1) @ x
        return ((z - alpha * x_hat) / sigma).reshape(sample.shape).to(sample.dtype)


def order(
    model: torch.nn.Module,
    images: Tensor,
    scheduler: VDMScheduler,
    truth: float,
    num_levels: int | None,
    samples: int,
    steps: int = 50,
) -> list[dict[str, Any]]:
    """All estimators of one model, least first: the truth, the ODE, continuous time, the K-sample bounds of a chain,
    its ELBO.

    Arguments:
        truth: bits/dim. samples: evaluations of an image, for the cheaper ones.
    """
    chain = {"num_steps": steps, "grid": "log_snr"}
    estimators: dict[str, dict[str, Any]] = {
        "ODE, Hutchinson": {"method": "ode", "num_samples": 4, "tolerance": 1e-4},
        "continuous": {"method": "continuous", "num_samples": samples},
        f"importance-weighted T={steps}, K=16": {"method": "importance_weighted", "num_samples": 32} | chain,
        f"importance-weighted T={steps}, K=2": {"method": "importance_weighted", "num_samples": 4} | chain,
        f"discrete T={steps}": {"method": "discrete", "num_samples": max(2 * steps, samples)} | chain,
    }
    rows = []
    for name, kwargs in estimators.items():
        start = time.perf_counter()
        report = evaluate_likelihood(
            model,
            images,
            scheduler=scheduler,
            num_levels=num_levels,
            generator=torch.Generator().manual_seed(0),
            progress_bar=False,
            **kwargs,
        )
        seconds = time.perf_counter() - start
        rows.append(
            row(name, report.bits_per_dim, report.standard_error, report.num_model_evaluations, truth, seconds)
        )
    return rows


def order_of_mixture(shape: tuple[int, int, int], num_images: int, samples: int = 64) -> list[dict[str, Any]]:
    """`order` on a continuous mixture with its exact denoiser."""
    scheduler, data = VDMScheduler(beta_schedule="log_snr_linear"), SpectralMixture.make(shape)
    x = data.sample(num_images, torch.Generator().manual_seed(1)).float()
    infinity = torch.full((len(x),), math.inf, dtype=torch.float64)
    truth = -float(data.log_density(x, infinity).mean()) / data.num_dims / math.log(2)
    return order(Exact(data, scheduler), x, scheduler, truth, None, samples)


def order_of_known_images(num_images: int, samples: int = 64) -> list[dict[str, Any]]:
    """`order` on digits, which are all that the model knows: -log2 p = log2 N for each.

    The ODE's flow is another model.
    """
    scheduler = VDMScheduler(beta_schedule="log_snr_linear")
    _, levels = digits(num_images)
    levels = levels * 15  # of 256
    model = KnownImages(encode_pixels(levels), scheduler)
    return order(model, levels, scheduler, math.log2(num_images) / 64, 256, samples)


def measure(
    model: Callable[..., Any],
    images: Tensor,
    truth: float | None,
    num_dims: int,
    common: dict[str, Any],
    wanted: str = "",
    seeds: int = 1,
) -> list[dict[str, Any]]:
    """A row for every estimator whose name contains `wanted`: means over seeds, of the squared standard errors too
    (those of one seed).
    """
    rows = []
    for name, kwargs in estimators(num_dims).items():
        if wanted not in name:
            continue
        start = time.perf_counter()
        reports = [
            evaluate_likelihood(
                model,
                images,
                generator=torch.Generator().manual_seed(seed),
                progress_bar=False,
                batch_size=512,
                **common,
                **kwargs,
            )
            for seed in range(seeds)
        ]
        seconds = (time.perf_counter() - start) / seeds
        bits = sum(report.bits_per_dim for report in reports) / seeds
        error = math.sqrt(sum(report.standard_error**2 for report in reports) / seeds)
        evaluations = sum(report.num_model_evaluations for report in reports) / seeds
        rows.append(row(name, bits, error, evaluations, truth, seconds))
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{title}\n\n| estimator | bits/dim | evaluations for ±{TARGET} on one image | bits/dim above the truth "
        "|\n|---|---|---|---|"
    )
    for r in rows:
        excess = "" if r["excess"] is None else f"{r['excess']:+.4f}"
        figure = f"{r['bits_per_dim']:.4f} ± {r['standard_error']:.4f}"
        if "standard_error_of_one_image" in r:
            figure += f" ({r['standard_error_of_one_image']:.4f} for one image)"
        print(f"| {r['estimator']} | {figure} | {r['evaluations_for_target']:.0f} | {excess} |", flush=True)
    cost = {r["estimator"]: r["evaluations_for_target"] for r in rows}
    if PLAIN in cost and DEFAULT in cost:
        print(
            f"\nThe default takes {cost[DEFAULT] / cost[PLAIN]:.3f} of the evaluations of VDM's plain estimate.",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a VDMPipeline of the digits; none: a small one is trained here")
    parser.add_argument("--train_steps", type=int, default=600, help="of that one")
    parser.add_argument("--num_images", type=int, default=48, help="evaluated")
    parser.add_argument(
        "--seeds", type=int, default=1, help="of network and mixtures: error bars are the mean over so many runs"
    )
    parser.add_argument("--output", type=Path, help="write the rows as JSON too")
    parser.add_argument("--only", default="network,mixtures,chain,order", help="parts, with commas")
    parser.add_argument("--estimators", default="", help="of network and mixtures: those whose name contains this")
    arguments = parser.parse_args()
    results, parts = {}, arguments.only.split(",")
    shapes = ((1, 8, 8), (3, 32, 32))

    if "network" in parts:
        train_images, test_images = digits(arguments.num_images)
        pipeline = (
            VDMPipeline.from_pretrained(arguments.checkpoint)
            if arguments.checkpoint
            else train(train_images, arguments.train_steps)
        )
        results["network"] = measure(pipeline, test_images, None, 64, {}, arguments.estimators, arguments.seeds)
        show("A network on the 8x8 digits", results["network"])

    for shape in shapes if "chain" in parts else ():
        name = f"chain {math.prod(shape)}"
        results[name] = chain_rows(shape, min(arguments.num_images, 16))
        show(f"DDPM's chain on a mixture in {math.prod(shape)} dimensions, as 8-bit images", results[name])

    if "order" in parts:
        for shape in shapes:
            name = f"order {math.prod(shape)}"
            results[name] = order_of_mixture(shape, 24 if math.prod(shape) == 64 else 4)
            show(f"In order: a continuous mixture in {math.prod(shape)} dimensions", results[name])
        results["order of known images"] = order_of_known_images(32)
        show("In order: 32 known digits, -log2 p = 5 bits for each", results["order of known images"])

    scheduler = VDMScheduler(beta_schedule="log_snr_linear")
    for shape in shapes if "mixtures" in parts else ():
        data = SpectralMixture.make(shape)
        x = data.sample(arguments.num_images, torch.Generator().manual_seed(1)).float()
        infinity = torch.full((len(x),), math.inf, dtype=torch.float64)
        truth = -float(data.log_density(x, infinity).mean()) / data.num_dims / math.log(2)
        model = Exact(data, scheduler)
        common = {"scheduler": scheduler, "num_levels": None}
        results[f"mixture {data.num_dims}"] = rows = measure(
            model, x, truth, data.num_dims, common, arguments.estimators, arguments.seeds
        )
        show(f"The exact denoiser of a mixture in {data.num_dims} dimensions, -ln p = {truth:.4f} bits/dim", rows)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


class Exact(torch.nn.Module):
    """A mixture's exact denoiser as a network that predicts the noise."""

    def __init__(self, data: SpectralMixture, scheduler: VDMScheduler):
        super().__init__()
        self.data, self.scheduler = data, scheduler
        self.register_parameter("dtype_and_device", torch.nn.Parameter(torch.zeros(1)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.data.epsilon(sample, self.scheduler.log_snr(timestep))


if __name__ == "__main__":
    main()
