"""What an error bar costs: model evaluations for a standard error of 0.01 bits/dim on one data point, by estimator.

On a network (a checkpoint, or a small one trained here on the 8x8 digits) and on the exact denoisers of two mixtures of Gaussians, in 64 and
3072 dimensions, whose density is known, so that the last column is a bias. All figures come from evaluate_likelihood's own
standard errors, which come from independent shifts: evaluations = (standard error / 0.01)^2 x all evaluations x images.

    python benchmarks/likelihood.py [--checkpoint FOLDER] [--train_steps 600] [--num_images 48] [--output likelihood.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mixtures import SpectralMixture
from torch import Tensor

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel, evaluate_likelihood
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.elbo import continuous_weight
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import low_discrepancy

TARGET = 0.01


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Training images and others, integers 0..16 of 8x8."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[count:], images[:count]


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
        "continuous, low-discrepancy (VDM)": {"method": "continuous", "variance_reduction": False, "num_samples": 64},
        "continuous, default": {"method": "continuous", "num_samples": 64},
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


def measure(
    model: Callable[..., Any], images: Tensor, truth: float | None, num_dims: int, common: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for name, kwargs in estimators(num_dims).items():
        start = time.perf_counter()
        report = evaluate_likelihood(
            model,
            images,
            generator=torch.Generator().manual_seed(0),
            progress_bar=False,
            batch_size=512,
            **common,
            **kwargs,
        )
        evaluations = (report.standard_error / TARGET) ** 2 * report.num_model_evaluations
        rows.append(
            {
                "estimator": name,
                "bits_per_dim": report.bits_per_dim,
                "standard_error": report.standard_error,
                "evaluations_for_target": evaluations,
                "seconds": time.perf_counter() - start,
                "excess": None if truth is None else report.bits_per_dim - truth,
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{title}\n\n| estimator | bits/dim | evaluations for ±{TARGET} on one image | bits/dim above the truth |\n|---|---|---|---|"
    )
    for row in rows:
        excess = "" if row["excess"] is None else f"{row['excess']:+.4f}"
        figure = f"{row['bits_per_dim']:.4f} ± {row['standard_error']:.4f}"
        print(f"| {row['estimator']} | {figure} | {row['evaluations_for_target']:.0f} | {excess} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a VDMPipeline of the digits; none: a small one is trained here")
    parser.add_argument("--train_steps", type=int, default=600, help="of that one")
    parser.add_argument("--num_images", type=int, default=48, help="evaluated")
    parser.add_argument("--output", type=Path, help="write the rows as JSON too")
    arguments = parser.parse_args()
    results = {}

    train_images, test_images = digits(arguments.num_images)
    pipeline = (
        VDMPipeline.from_pretrained(arguments.checkpoint)
        if arguments.checkpoint
        else train(train_images, arguments.train_steps)
    )
    results["network"] = measure(pipeline, test_images, None, 64, {})
    show("A network on the 8x8 digits", results["network"])

    scheduler = VDMScheduler(beta_schedule="log_snr_linear")
    for shape in ((1, 8, 8), (3, 32, 32)):
        data = SpectralMixture.make(shape)
        x = data.sample(arguments.num_images, torch.Generator().manual_seed(1)).float()
        infinity = torch.full((len(x),), math.inf, dtype=torch.float64)
        truth = -float(data.log_density(x, infinity).mean()) / data.num_dims / math.log(2)
        model = Exact(data, scheduler)
        common = {"scheduler": scheduler, "num_levels": None}
        results[f"mixture {data.num_dims}"] = rows = measure(model, x, truth, data.num_dims, common)
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
