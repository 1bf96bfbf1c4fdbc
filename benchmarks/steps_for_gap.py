"""How many steps does a chain need for a bound within 0.01 bits/dim of its limit? By step grid and reverse variance.

The network is exact: the denoiser of a mixture of Gaussians, in 64 and in 3072 dimensions. Its E|x - x_hat|^2 is measured once against
log SNR, with noise that the grids share; a chain's expected diffusion term then follows without further sampling,

    sum over the steps of D/2 (SNR_s - SNR_t) mse_t        with the posterior variance,
    sum over the steps of D/2 ln(1 + (SNR_s - SNR_t) mse_t) with the optimal scalar variance,
    the same sum over the frequencies of a cosine transform  with the optimal variance of each radial band,

and the limit is the integral. Prior and reconstruction are the same for all chains with the same two ends.

    python benchmarks/steps_for_gap.py [--num_samples 256] [--output steps_for_gap.json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from mixtures import SpectralMixture
from torch import Tensor

from vdm_diffusers.noise_schedules import CosineSchedule, TabulatedNoiseSchedule
from vdm_diffusers.reverse_variance import OptimalVariance, expected_step_nats, optimal_grid

LOG_SNR_MAX, LOG_SNR_MIN, GAP = 13.3, -5.0, 0.01


def band_index(shape: tuple[int, int, int], bands: int = 32) -> Tensor:
    """(D,) the radial band of every coefficient of the cosine transform, counted by channel."""
    channels, height, width = shape
    radius = torch.sqrt(
        (torch.arange(height)[:, None] / height) ** 2 + (torch.arange(width) / width) ** 2
    ) / math.sqrt(2)
    band = (radius * min(bands, max(height, width))).floor().long().clamp(max=bands - 1).flatten()
    return torch.cat([band + channel * bands for channel in range(channels)])


def measure(data: SpectralMixture, log_snrs: Tensor, num_samples: int, band: Tensor) -> tuple[Tensor, Tensor]:
    """E|x - x_hat|^2 / D at log SNRs (K,): (K,) and by band (K, bands), with the same images and noise at all of them."""
    generator = torch.Generator().manual_seed(1)
    x = data.sample(num_samples, generator)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    counts = band.bincount().clamp(min=1)
    by_band = []
    for log_snr in log_snrs:
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        error = data.transform(data.denoise(alpha * x + sigma * noise, log_snr.expand(len(x))) - x)
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, band, (error.flatten(1) ** 2).mean(0))
        by_band.append(sums / counts)
    result = torch.stack(by_band)
    return result @ (counts / counts.sum()).double(), result


def smallest(cost: Callable[[int], float], limit: float, most: int) -> int | None:
    """The smallest number of steps whose cost is within `GAP` bits of the limit; None if not even `most` are enough."""
    enough = lambda steps: (cost(steps) - limit) / math.log(2) < GAP  # noqa: E731
    if not enough(most):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def run(shape: tuple[int, int, int], num_samples: int) -> dict[str, dict[str, int | None]]:
    """Steps by grid and variance."""
    data = SpectralMixture.make(shape)
    band = band_index(shape)
    counts = band.bincount().double()
    knots = torch.linspace(LOG_SNR_MIN, LOG_SNR_MAX, 200, dtype=torch.float64)
    mse, by_band = measure(data, knots, num_samples, band)
    scalar = OptimalVariance(knots, mse)
    bands = [OptimalVariance(knots, by_band[:, i]) for i in range(len(counts)) if counts[i] > 0]
    share = counts[counts > 0] / counts.sum()
    fine = torch.linspace(LOG_SNR_MAX, LOG_SNR_MIN, 200_001, dtype=torch.float64)
    value = fine.exp() * scalar.at(fine)
    limit = float(torch.trapezoid(value.flip(0), fine.flip(0)) / 2)

    def uniform_log_snr(steps: int) -> Tensor:
        return torch.linspace(LOG_SNR_MAX, LOG_SNR_MIN, steps + 1, dtype=torch.float64)

    def within(schedule, steps: int) -> Tensor:
        """Uniform in the schedule's time, between the times of the two common ends, so that the limit is the same."""
        first, last = float(schedule.inverse(LOG_SNR_MAX)), float(schedule.inverse(LOG_SNR_MIN))
        inner = schedule.log_snr(torch.linspace(first, last, steps + 1, dtype=torch.float64)[1:-1])
        ends = torch.tensor([LOG_SNR_MAX, LOG_SNR_MIN], dtype=torch.float64)
        return torch.cat([ends[:1], inner.clamp(LOG_SNR_MIN, LOG_SNR_MAX), ends[1:]])

    # the continuous schedule whose beta grows linearly from 0.1 to 20: -ln alpha_bar = 0.1 t + 9.95 t^2
    t = torch.linspace(1e-6, 1, 400_001, dtype=torch.float64)
    exponent = 0.1 * t + 9.95 * t**2
    linear_table = TabulatedNoiseSchedule(-exponent - torch.log(-torch.expm1(-exponent)))
    cosine = CosineSchedule(math.inf, -math.inf)
    candidates = uniform_log_snr(1536)

    def per_step(grid: Tensor, kind: str) -> float:
        s, t = grid[:-1], grid[1:]
        if kind == "per frequency":
            return float(sum(w * expected_step_nats(s, t, b.at(t)).sum() for w, b in zip(share, bands, strict=True)))
        return float(expected_step_nats(s, t, scalar.at(t), kind).sum())

    grids = {
        "time, linear beta": lambda n, kind: within(linear_table, n),
        "time, cosine": lambda n, kind: within(cosine, n),
        "log SNR": lambda n, kind: uniform_log_snr(n),
        "dynamic programming": lambda n, kind: optimal_grid(
            scalar, n, candidates, variance="posterior" if kind == "posterior" else "optimal"
        ),
    }
    table: dict[str, dict[str, int | None]] = {}
    for name, grid in grids.items():
        most = 600 if name == "dynamic programming" else 20_000
        table[name] = {
            kind: smallest(lambda n, g=grid, k=kind: per_step(g(n, k), k), limit, most)
            for kind in ("posterior", "optimal", "per frequency")
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num_samples", type=int, default=256, help="images that the mean squared errors are measured on"
    )
    parser.add_argument("--output", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()
    results = {}
    for shape in ((1, 8, 8), (3, 32, 32)):
        num_dims = math.prod(shape)
        results[str(num_dims)] = table = run(shape, arguments.num_samples)
        print(
            f"\nsteps for a gap below {GAP} bits/dim, {num_dims} dimensions (-: more than 20000, DP: more than 600)\n"
        )
        print("| grid | posterior | optimal | optimal per frequency |\n|---|---|---|---|")
        for name, row in table.items():
            print(f"| {name} | " + " | ".join("-" if steps is None else str(steps) for steps in row.values()) + " |")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
