"""The two forms of the diffusion ELBO: the same value, and the variance of each by the number of steps T.

    first form    consistency terms    ln q(z_l | z_{l-1}) - ln p(z_l | z_{l+1})            over (z_{l-1}, z_l,
    z_{l+1}) second form   denoising matching   KL(q(z_l | z_{l+1}, x) || p(z_l | z_{l+1}))          over z_{l+1}

on the 8x8 digits that come with scikit-learn, with the exact denoiser of the 1200 training images (data that are N
images with equal probability) or with a saved network. Two estimators: one drawn term, times their number (what
training uses), and the sum over a whole trajectory.

    python benchmarks/elbo_forms.py                                    # the exact denoiser
    python benchmarks/elbo_forms.py --checkpoint outputs/digits        # a trained network (VDMPipeline)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from arguments import DataArguments
from data import load_split

from vdm_diffusers import VDMPipeline
from vdm_diffusers.decoders import encode_pixels, softmax_log_likelihood
from vdm_diffusers.elbo_forms import diffusion_hierarchy, hierarchical_bound
from vdm_diffusers.gaussian import alpha_sigma
from vdm_diffusers.noise_schedules import LinearLogSNRSchedule, NoiseSchedule
from vdm_diffusers.prediction import convert

NUM_LEVELS = 17
Denoiser = Callable[[Tensor, Tensor], Tensor]


def digits(split: str) -> Tensor:
    """The digits of one of train.py's splits: (N, 1, 8, 8) integers 0..16."""
    return load_split(DataArguments(), split, 0).images.long()


def exact_denoiser(data: Tensor) -> Denoiser:
    """E[x | z] when x is one of the images in `data` with equal probability: a softmax over them."""

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        alpha, sigma = (float(c) for c in alpha_sigma(log_snr))
        # |z - alpha x|^2 without its part that all images share
        logits = (
            alpha * z.flatten(1) @ data.flatten(1).T - 0.5 * alpha**2 * data.flatten(1).square().sum(1)
        ) / sigma**2
        return (torch.softmax(logits, 1) @ data.flatten(1)).view_as(z)

    return denoise


def network_denoiser(pipeline: VDMPipeline) -> Denoiser:
    """x_hat of a checkpoint's network."""
    scheduler = pipeline.scheduler

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        timestep = scheduler.timestep_from_log_snr(log_snr).float().expand(len(z))
        output = pipeline.unet(z.float(), timestep).sample.to(z.dtype)
        return convert(output, z, log_snr, source=scheduler.config.prediction_type, target="sample")

    return denoise


@torch.no_grad()
def measure(levels: Tensor, denoise: Denoiser, schedule: NoiseSchedule, num_steps: int, repeats: int) -> dict:
    """Mean bits/dim of both forms with its error, and the variance (of one image) of both estimators of each."""
    x = encode_pixels(levels, NUM_LEVELS, dtype=torch.float64)
    log_snr = schedule.log_snr(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
    hierarchy = diffusion_hierarchy(log_snr, denoise)
    to_bits = 1 / (x[0].numel() * math.log(2))

    def decoder(z: Tensor) -> Tensor:
        return softmax_log_likelihood(levels, z, log_snr[0], num_levels=NUM_LEVELS)

    row: dict = {"num_steps": num_steps}
    totals = {}
    for seed, form in enumerate(("consistency", "matching")):
        generator = torch.Generator().manual_seed(seed)
        terms = torch.stack(
            [
                torch.stack(hierarchical_bound(hierarchy, x, decoder, form=form, generator=generator).layers)
                for _ in range(repeats)
            ]
        )  # (repeats, layers, images)
        terms = terms * to_bits
        total = terms.sum(1)
        totals[form] = total
        mean = total.mean(0)  # of each image; layers are drawn with equal probability
        one_term = terms.shape[1] * terms.square().mean(0).sum(0) - mean**2
        row[form] = {
            "bits_per_dim": float(total.mean()),
            "standard_error": float(total.std(0).square().mean().sqrt()) / math.sqrt(total.numel()),
            "variance_one_term": float(one_term.mean()),
            "variance_trajectory": float(total.var(0).mean()),
        }
    first, second = row["consistency"], row["matching"]
    row["difference_in_errors"] = (first["bits_per_dim"] - second["bits_per_dim"]) / math.hypot(
        first["standard_error"], second["standard_error"]
    )
    return row


def table(rows: list[dict]) -> str:
    """The rows in Markdown. Variances in (bits/dim)^2."""
    lines = [
        "| T | first form | second form | difference / its error | variance, one term: first | second | ratio | whole trajectory: first | second |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row["consistency"], row["matching"]
        values = " | ".join(f"{form['bits_per_dim']:.4f} +- {form['standard_error']:.4f}" for form in (a, b))
        one, two = a["variance_one_term"], b["variance_one_term"]
        lines.append(
            f"| {row['num_steps']} | {values} | {row['difference_in_errors']:+.1f} | {one:.3g} | {two:.3g} | "
            f"{one / two:.3g} | "
            f"{a['variance_trajectory']:.3g} | {b['variance_trajectory']:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="folder of a VDMPipeline trained on the digits; none: the exact denoiser")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[4, 16, 64, 256, 1000])
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--num_repeats", type=int, default=16, help="trajectories of each image")
    parser.add_argument("--output", type=Path, help="JSON file of the table")
    args = parser.parse_args()
    schedule: NoiseSchedule = LinearLogSNRSchedule(8.0, -5.0)
    if args.checkpoint:
        pipeline = VDMPipeline.from_pretrained(args.checkpoint)
        schedule, denoise = pipeline.scheduler.noise_schedule, network_denoiser(pipeline)
        levels = digits("test")[: args.num_images]
    else:
        data = digits("train")
        denoise = exact_denoiser(encode_pixels(data, NUM_LEVELS, dtype=torch.float64))
        levels = data[: args.num_images]
    rows = [measure(levels, denoise, schedule, t, args.num_repeats) for t in args.num_steps]
    print(table(rows))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
