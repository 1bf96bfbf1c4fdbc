"""How many steps does a chain need for a bound within 0.01 bits/dim of its limit? By step grid and reverse variance.

The network is exact: the denoiser of a mixture of Gaussians, in 64 and in 3072 dimensions. Its E|x - x_hat|^2 in each
band of the cosine transform is measured on fresh images at 257 log SNRs; a chain's expected diffusion term then
follows without further sampling,

    sum over the steps and frequencies of 1/2 [r - 1 - ln r + (coefficient of x)^2 mse_t / variance],    r = posterior
    variance / variance

with the variances that the library's table gives: 64 log SNRs measured on other images, as `estimate_optimal_variance`
does, which the grids of the dynamic programming see too. The limit is the integral 1/2 SNR mse, and is compared with
the mutual information. Prior and reconstruction are the same for all chains with the same two ends.

    python benchmarks/steps_for_gap.py [--num_samples 512] [--output steps_for_gap.json]
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

from vdm_diffusers.frequency import RadialBands
from vdm_diffusers.gaussian import posterior_coefficients
from vdm_diffusers.noise_schedules import CosineSchedule, TabulatedNoiseSchedule
from vdm_diffusers.reverse_variance import OptimalVariance, continuous_nats, shortest_path, step_costs

LOG_SNR_MAX, LOG_SNR_MIN, GAP = 13.3, -5.0, 0.01
VARIANCES = ("posterior", "optimal", "per frequency")


def measure(data: SpectralMixture, num_knots: int, num_samples: int, seed: int) -> OptimalVariance:
    """E|x - x_hat|^2 of every band, as E Var[x | z_t], with the same images and noise at all log SNRs."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(data.variance.shape)
    bands = RadialBands.of(*shape[1:])
    knots = torch.linspace(LOG_SNR_MIN, LOG_SNR_MAX, num_knots, dtype=torch.float64)
    sums = torch.zeros(num_knots, shape[0], len(bands.counts), dtype=torch.float64)
    for part in torch.arange(num_samples).split(256):
        x = data.sample(len(part), generator)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for i, log_snr in enumerate(knots):
            alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
            variance = data.posterior_variance(alpha * x + sigma * noise, log_snr.expand(len(x)))
            sums[i] += bands.sums(variance.sum(0))
    return OptimalVariance(knots, sums / num_samples / bands.counts, shape)


def information(data: SpectralMixture, num_samples: int, seed: int) -> tuple[float, float]:
    """I(x; z_0) - I(x; z_1) in nats for each dimension, which is what the limit should be, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    x = data.sample(num_samples, generator)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    values = []
    for log_snr in (torch.tensor(LOG_SNR_MAX), torch.tensor(LOG_SNR_MIN)):
        log_snr = log_snr.double().expand(num_samples)
        alpha, sigma = torch.sigmoid(log_snr[0]).sqrt(), torch.sigmoid(-log_snr[0]).sqrt()
        # E ln q(z | x) is known; the noise's own length would only add to the error
        given_x = -0.5 * data.num_dims * (1 + math.log(2 * math.pi) + 2 * float(sigma.log()))
        values.append(given_x - data.log_density(alpha * x + sigma * noise, log_snr))
    difference = (values[0] - values[1]) / data.num_dims
    return float(difference.mean()), float(difference.std()) / math.sqrt(num_samples)


def chain_nats(grid: Tensor, truth: OptimalVariance, table: OptimalVariance | None) -> float:
    """The expected diffusion term of a chain for one dimension, in nats: with the table's variances, or the
    posterior's.
    """
    s, t = grid[:-1], grid[1:]
    if table is None:
        return float(truth.step_nats(s, t, "posterior").sum())
    posterior = posterior_coefficients(t, s)
    least, square = posterior.variance[:, None, None], posterior.x[:, None, None] ** 2
    variance = table.variance(s, t)
    if table.shape is None:
        variance = variance[:, None, None]
    r = least / variance
    return float(truth.mean(0.5 * (r - 1 - r.log() + square * truth.at(t) / variance)).sum())


def smallest(cost: Callable[[int], float], limit: float, most: int) -> int | None:
    """The smallest number of steps whose cost is within `GAP` bits of the limit; None if not even `most` are
    enough.
    """
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
    truth = measure(data, 257, num_samples, seed=1)
    by_band = measure(data, 64, num_samples, seed=2)
    tables = {"posterior": None, "optimal": by_band.overall, "per frequency": by_band}
    limit = continuous_nats(truth, LOG_SNR_MAX, LOG_SNR_MIN)
    exact, error = information(data, num_samples, seed=3)
    print(
        f"\n{math.prod(shape)} dimensions: the limit is {limit / math.log(2):.4f} bits/dim "
        f"(information: {exact / math.log(2):.4f} +- {error / math.log(2):.4f})"
    )

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
    costs = {
        kind: step_costs(by_band if kind == "per frequency" else by_band.overall, candidates, variance)
        for kind, variance in zip(VARIANCES, ("posterior", "optimal", "optimal"), strict=True)
    }
    grids = {
        "time, linear beta": lambda n, kind: within(linear_table, n),
        "time, cosine": lambda n, kind: within(cosine, n),
        "log SNR": lambda n, kind: uniform_log_snr(n),
        "dynamic programming": lambda n, kind: candidates[shortest_path(costs[kind], n)],
    }
    table: dict[str, dict[str, int | None]] = {}
    for name, grid in grids.items():
        most = 600 if name == "dynamic programming" else 20_000
        table[name] = {
            kind: smallest(lambda n, g=grid, k=kind: chain_nats(g(n, k), truth, tables[k]), limit, most)
            for kind in VARIANCES
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num_samples", type=int, default=512, help="images that the mean squared errors are measured on"
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 3072], choices=[64, 3072])
    parser.add_argument("--output", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()
    results = {}
    for shape in ((1, 8, 8), (3, 32, 32)):
        num_dims = math.prod(shape)
        if num_dims not in arguments.dims:
            continue
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
