"""The variance of the bits/dim estimate by noise schedule, on one trained network; the learned schedule is trained
here.

The network stays as it is. A `LearnedNoiseSchedule` is trained on it by its own gradient (VDM, appendix I.2), and
compared with the schedules of VDM's ablation between the same end points, and with the optimum computed from a
measured profile of the loss. In continuous time all of them have the same expected bits/dim; what differs is the
scatter of

    one sample      one (image, t, noise), t independent: bits/dim of a single evaluation of the network
    stratified      the mean of a batch with stratified t, times the batch size

    python training/train.py --output_dir outputs/digits
    python benchmarks/schedule_variance.py --checkpoint outputs/digits
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from arguments import ARGUMENTS_FILE, DataArguments
from data import load_split

from vdm_diffusers import LearnedNoiseSchedule, VDMPipeline
from vdm_diffusers.adaptive_time_sampling import AdaptiveTimeSampler
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.elbo import continuous_weight
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.noise_schedules import (
    CosineSchedule,
    LinearLogSNRSchedule,
    NoiseSchedule,
    TabulatedNoiseSchedule,
)
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import low_discrepancy, uniform

PAPER = {"learned": 0.53, "linear in log SNR": 6.35, "linear beta": 31.6, "cosine": 31.1}


def linear_beta(log_snr_max: float, log_snr_min: float) -> NoiseSchedule:
    """DDPM's linear betas in continuous time, log_snr = -ln expm1(a + b t^2), between these end points."""
    first, last = (math.log1p(math.exp(-log_snr)) for log_snr in (log_snr_max, log_snr_min))
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    return TabulatedNoiseSchedule(-torch.log(torch.expm1(first + (last - first) * t**2)))


@dataclass
class Estimator:
    """Draws of the diffusion term in bits/dim, of one network on one set of images."""

    pipeline: VDMPipeline
    levels: Tensor
    generator: torch.Generator

    def __call__(self, log_snr: Tensor, weight: Tensor) -> Tensor:
        """(B,) bits/dim for random images at the given log SNRs, differentiable in both arguments."""
        pipe = self.pipeline
        index = torch.randint(len(self.levels), (len(log_snr),), generator=self.generator)
        x = encode_pixels(self.levels[index], pipe.config.num_levels, pipe.config.pixel_encoding)
        noise = torch.randn(x.shape, generator=self.generator)
        z_t = diffuse(x, noise, log_snr)
        output = pipe.unet(z_t, pipe.scheduler.timestep_from_log_snr(log_snr).float()).sample
        kind = pipe.scheduler.config.prediction_type
        return diffusion_loss(output, x, noise, log_snr, prediction_type=kind, elbo_weight=weight)

    @torch.no_grad()
    def at(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        return self(schedule.log_snr(t), continuous_weight(schedule.derivative(t)))


def train_schedule(estimate: Estimator, ends: tuple[float, float], steps: int, batch: int) -> LearnedNoiseSchedule:
    """A schedule learned on the frozen network."""
    schedule = LearnedNoiseSchedule(*ends)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.03, betas=(0.9, 0.99))
    estimate.pipeline.unet.requires_grad_(False)
    for step in tqdm(range(steps), desc="learning the schedule"):
        cut = schedule.cut(uniform(batch, generator=estimate.generator))
        losses = estimate(cut.log_snr, cut.elbo_weight)
        losses.mean().backward()
        cut.backward(losses, scale=1 / batch)
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return schedule


def measured_optimum(estimate: Estimator, ends: tuple[float, float], batches: int, batch: int) -> NoiseSchedule:
    """The schedule whose density of log SNR follows the root of the mean squared loss, measured in 48 bins."""
    linear = LinearLogSNRSchedule(*ends)
    sampler = AdaptiveTimeSampler(linear, num_bins=48, decay=0.999, uniform_share=0.001)
    for _ in tqdm(range(batches), desc="measuring the profile"):
        t, _ = sampler.place(low_discrepancy(batch, generator=estimate.generator))
        sampler.update(sampler.sums(t, estimate.at(linear, t)))
    u = torch.linspace(0, 1, 4001, dtype=torch.float64).clamp(max=1 - 1e-12)
    return TabulatedNoiseSchedule(linear.log_snr(sampler.place(u)[0]))


def measure(estimate: Estimator, schedule: NoiseSchedule, batches: int, batch: int) -> dict[str, float]:
    """Mean and the two variances, with their standard errors, from independent batches."""

    def draws(times: Callable[..., Tensor]) -> Tensor:
        return torch.stack(
            [
                estimate.at(schedule, times(batch, generator=estimate.generator)).double()
                for _ in tqdm(range(batches), leave=False)
            ]
        )

    single, stratified = draws(uniform).flatten(), draws(low_discrepancy).mean(1)
    square = (single - single.mean()) ** 2
    return {
        "bits_per_dim": float(stratified.mean()),
        "bits_per_dim_error": float(stratified.std()) / math.sqrt(batches),
        "one_sample": float(square.mean()),
        "one_sample_error": float(square.std()) / math.sqrt(len(square)),
        "stratified": float(stratified.var()) * batch,
        "stratified_error": float(stratified.var()) * batch * math.sqrt(2 / (batches - 1)),
    }


def main() -> None:
    """Print the table, and write it as JSON with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="outputs/digits", help="folder that train.py wrote")
    parser.add_argument("--schedule_steps", type=int, default=400, help="training steps of the schedule")
    parser.add_argument("--batches", type=int, default=60, help="independent batches for each figure")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="file for the figures")
    args = parser.parse_args()
    trained = json.loads((Path(args.checkpoint) / ARGUMENTS_FILE).read_text(encoding="utf-8"))["arguments"]
    data = DataArguments(**{name: trained[name] for name in DataArguments.__dataclass_fields__ if name in trained})
    train_images, test_images = (load_split(data, split, trained["seed"]) for split in ("train", "test"))
    pipeline = VDMPipeline.from_pretrained(args.checkpoint)
    pipeline.unet.eval()
    envelope = pipeline.scheduler.noise_schedule
    ends = (envelope.log_snr_max, envelope.log_snr_min)

    generator = torch.Generator().manual_seed(args.seed)
    on_train, on_test = (Estimator(pipeline, split.images, generator) for split in (train_images, test_images))
    schedules = {
        "learned": train_schedule(on_train, ends, args.schedule_steps, args.batch),
        "measured optimum": measured_optimum(on_train, ends, args.schedule_steps // 2, args.batch),
        "linear in log SNR": LinearLogSNRSchedule(*ends),
        "linear beta": linear_beta(*ends),
        "cosine": CosineSchedule(*ends),
    }
    print(
        f"{args.checkpoint} on {test_images.name}, log SNR {ends[0]} to {ends[1]}, {args.batches} x {args.batch} draws"
    )
    print(f"{'schedule':<18} {'bits/dim':>16} {'one sample':>19} {'stratified':>19} {'VDM, CIFAR-10':>14}")
    results = {}
    for name, schedule in schedules.items():
        found = results[name] = measure(on_test, schedule, args.batches, args.batch)
        print(
            f"{name:<18} {found['bits_per_dim']:>7.3f} +- {found['bits_per_dim_error']:.3f} "
            f"{found['one_sample']:>9.3f} +- {found['one_sample_error']:>6.3f} "
            f"{found['stratified']:>9.4f} +- {found['stratified_error']:>6.4f} {PAPER.get(name, ''):>13}"
        )
    if args.output is not None:
        args.output.write_text(json.dumps({"arguments": {**vars(args), "output": None}, "results": results}, indent=2))


if __name__ == "__main__":
    main()
