"""How good are the samplers? An exact denoiser takes the network out of the question.

The data are a mixture of Gaussians on 8x8 images with a 1/f^2 spectrum, whose denoiser E[x | z] is known in closed
form at every log SNR. What a sampler returns is compared with fresh data by the sliced Wasserstein distance after
whitening (every direction of the data counts alike, the faint fine detail too). The floor is the distance of two sets
of fresh data.

    python benchmarks/sampler_quality.py                    # the table of docs/scheduler.md
    python benchmarks/sampler_quality.py --steps 10 --repeats 3 --only 2M
    python benchmarks/sampler_quality.py --optimal --samples 16384 --repeats 4   # the table of the optimal variance

The optimal variance is measured beforehand on draws of their own, once for each radial band of the cosine transform of
the images, which is the basis that the mixture is diagonal in; their mean is the scalar one.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from vdm_diffusers import VDMScheduler
from vdm_diffusers.frequency import RadialBands
from vdm_diffusers.reverse_variance import OptimalVariance

SIDE = 8
BANDS = RadialBands.of(SIDE, SIDE)


@dataclass(frozen=True)
class Mixture:
    """Equally probable Gaussians N(means[k], basis diag(spectrum) basis^T), everything held in the basis."""

    means: Tensor  # (K, D)
    spectrum: Tensor  # (D,)

    @classmethod
    def image_like(cls, components: int = 32, inside: float = 0.25, deviation: float = 0.5) -> Mixture:
        """A 1/f^2 power spectrum with standard deviation 0.5 a pixel, a quarter of the power inside the components."""
        f = torch.arange(SIDE, dtype=torch.float64)
        power = 1 / (1 + f[:, None] ** 2 + f[None] ** 2).flatten()
        power = power / power.mean() * deviation**2
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(components, SIDE * SIDE, generator=generator, dtype=torch.float64)
        means = (means - means.mean(0)) * (power * (1 - inside)).sqrt()
        return cls(means.float(), (power * inside).float())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        component = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[component] + self.spectrum.sqrt() * torch.randn(n, SIDE * SIDE, generator=generator)

    def denoise(self, z: Tensor, log_snr: float) -> Tensor:
        """E[x | z] at z = alpha x + sigma eps."""
        alpha, sigma2 = math.sqrt(1 / (1 + math.exp(-log_snr))), 1 / (1 + math.exp(log_snr))
        variance = alpha**2 * self.spectrum + sigma2
        scaled, centres = z / variance.sqrt(), alpha * self.means / variance.sqrt()
        weights = torch.softmax(scaled @ centres.T - centres.square().sum(1) / 2, dim=1)
        mean = weights @ self.means
        return mean + alpha * self.spectrum / variance * (z - alpha * mean)

    def posterior_variance(self, z: Tensor, log_snr: float) -> Tensor:
        """Var[x | z] of every coordinate, whose mean over z is E|x - x_hat|^2."""
        alpha, sigma2 = math.sqrt(1 / (1 + math.exp(-log_snr))), 1 / (1 + math.exp(log_snr))
        variance = alpha**2 * self.spectrum + sigma2
        scaled, centres = z / variance.sqrt(), alpha * self.means / variance.sqrt()
        weights = torch.softmax(scaled @ centres.T - centres.square().sum(1) / 2, dim=1)
        between = (weights @ self.means**2 - (weights @ self.means) ** 2).clamp(min=0)
        return self.spectrum * sigma2 / variance + between * (sigma2 / variance) ** 2

    def optimal_variance(self, n: int = 4096, knots: int = 64) -> OptimalVariance:
        """The optimal variance of every band from `n` draws."""
        generator = torch.Generator().manual_seed(7)
        x, noise = self.draw(n, generator), torch.randn(n, SIDE * SIDE, generator=generator)
        log_snrs = torch.linspace(-5.0, 13.3, knots, dtype=torch.float64)
        rows = []
        for log_snr in log_snrs.tolist():
            alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
            variance = self.posterior_variance(alpha * x + sigma * noise, log_snr).double().mean(0)
            rows.append(BANDS.sums(variance.reshape(1, SIDE, SIDE)) / BANDS.counts)
        return OptimalVariance(log_snrs, torch.stack(rows), (1, SIDE, SIDE))

    def whiten(self, x: Tensor) -> Tensor:
        total = torch.diag(self.spectrum) + (self.means.T @ self.means) / len(self.means)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(total), (x - self.means.mean(0)).T, upper=False).T


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean over directions of the Wasserstein-1 distance of the projections."""
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean())


def sample(
    scheduler,
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_evaluations: int,
    seed: int,
    end: float | None = None,
) -> Tensor:
    """The loop of Diffusers' pipelines; a sampler of order 2 without memory gets half the steps.

    With `end` the steps are equally spaced in log SNR up to it, whence the last one goes to x_hat.
    """
    steps = max(1, num_evaluations // scheduler.order)
    if end is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(
            log_snrs=torch.linspace(float(scheduler.log_snr(999)), end, steps, dtype=torch.float64)
        )
    has_generator = "generator" in inspect.signature(scheduler.step).parameters
    kwargs = {"generator": torch.manual_seed(seed)} if has_generator else {}
    x = noise * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **kwargs).prev_sample
    return x


def samplers() -> dict[str, tuple[Callable, VDMScheduler, float | None]]:
    """Name -> (a new scheduler, the schedule that its model was trained on, the log SNR of the last evaluation if
    chosen).
    """
    log_snr = {"beta_schedule": "log_snr_linear", "final_step": "mean"}
    vdm = VDMScheduler(**log_snr)
    linear = VDMScheduler(beta_schedule="linear", clip_sample=False)
    cosine = VDMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    ours = {
        "VDMScheduler 2M": {"stochasticity": 0.0, "multistep_order": 2},
        "VDMScheduler 2M, stochasticity 1": {"multistep_order": 2},
        "VDMScheduler deterministic": {"stochasticity": 0.0},
        "VDMScheduler ancestral": {},
    }
    peers = [
        ("DDPMScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ]
    two_m = ours["VDMScheduler 2M"]
    result = {
        "VDMScheduler 2M, log_snrs to 8 | log SNR": (lambda: VDMScheduler(**log_snr, **two_m), vdm, 8.0),
        **{f"{name} | log SNR": (lambda c=c: VDMScheduler(**log_snr, **c), vdm, None) for name, c in ours.items()},
    }
    for schedule, table in (("linear", linear), ("squaredcos_cap_v2", cosine)):
        c = {"clip_sample": False, "beta_schedule": schedule, "timestep_spacing": "trailing", **two_m}
        result[f"VDMScheduler 2M, log_snrs to 8 | {schedule}"] = (lambda c=c: VDMScheduler(**c), table, 8.0)
        result[f"VDMScheduler 2M, trailing | {schedule}"] = (lambda c=c: VDMScheduler(**c), table, None)
    for name, options in peers:
        label = name + "".join(f", {v if isinstance(v, str) else k}" for k, v in options.items())
        for schedule, table in (("linear", linear), ("squaredcos_cap_v2", cosine)):
            if "use_" in str(options) and schedule != "linear":
                continue  # row 16 of the defects: fails on this table
            c = {**options, "beta_schedule": schedule}
            if "clip_sample" in inspect.signature(getattr(diffusers, name).__init__).parameters:
                c["clip_sample"] = False
            result[f"{label} | {schedule}"] = (lambda name=name, c=c: getattr(diffusers, name)(**c), table, None)
    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        result[f"{name}, trailing | as_discrete"] = (
            lambda name=name: getattr(diffusers, name).from_config(vdm.as_discrete().config),
            vdm,
            None,
        )
    return result


def measure(
    mixture: Mixture,
    sampler: tuple[Callable, VDMScheduler, float | None],
    num_evaluations: int,
    n: int,
    repeat: int,
) -> float:
    """The distance of one set of samples to one set of fresh data."""
    make, schedule, end = sampler
    generator = torch.Generator().manual_seed(1000 + repeat)
    fresh, noise = mixture.draw(n, generator), torch.randn(n, SIDE * SIDE, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(SIDE * SIDE, 128, generator=generator), dim=0)
    last = schedule.timesteps.max()

    def model(z: Tensor, t: Tensor) -> Tensor:
        log_snr = schedule.log_snr(t.clamp(0, last))
        alpha, sigma = float(log_snr.sigmoid().sqrt()), float((-log_snr).sigmoid().sqrt())
        return (z - alpha * mixture.denoise(z, float(log_snr))) / sigma  # epsilon

    out = sample(make(), model, noise, num_evaluations, repeat, end)
    return sliced_wasserstein(mixture.whiten(out), mixture.whiten(fresh), directions)


def ancestral_samplers(table: OptimalVariance) -> dict[str, Callable[[], VDMScheduler]]:
    """Name -> a new scheduler, all ancestral from log SNR -5 to 13.3."""
    base = {"beta_schedule": "log_snr_linear", "final_step": "mean"}
    scalar, by_band = ({"variance_type": "optimal", "optimal_variance": t.to_config()} for t in (table.overall, table))
    return {
        "posterior | log SNR": lambda: VDMScheduler(**base),
        "optimal | log SNR": lambda: VDMScheduler(**base, **scalar, step_grid="log_snr"),
        "optimal | dynamic programming": lambda: VDMScheduler(**base, **scalar),
        "optimal per frequency | log SNR": lambda: VDMScheduler(**base, **by_band, step_grid="log_snr"),
        "optimal per frequency | dynamic programming": lambda: VDMScheduler(**base, **by_band),
    }


def measure_ancestral(mixture: Mixture, scheduler: VDMScheduler, num_steps: int, n: int, repeat: int) -> float:
    """As `measure`, but the sampler works on the images whose cosine transform the mixture describes."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    fresh, noise = mixture.draw(n, generator), torch.randn(n, SIDE * SIDE, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(SIDE * SIDE, 128, generator=generator), dim=0)
    scheduler.set_timesteps(num_steps)
    z = BANDS.inverse(noise.reshape(n, 1, SIDE, SIDE))
    sampling = torch.Generator().manual_seed(repeat)
    for t in scheduler.timesteps:
        log_snr = float(scheduler.log_snr(t))
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
        coordinates = BANDS.transform(z).flatten(1)
        epsilon = (coordinates - alpha * mixture.denoise(coordinates, log_snr)) / sigma
        z = scheduler.step(BANDS.inverse(epsilon.reshape(z.shape)), t, z, generator=sampling).prev_sample
    out = BANDS.transform(z).flatten(1)
    return sliced_wasserstein(mixture.whiten(out), mixture.whiten(fresh), directions)


def floor(mixture: Mixture, n: int, repeat: int) -> float:
    generator = torch.Generator().manual_seed(2000 + repeat)
    a, b = mixture.draw(n, generator), mixture.draw(n, generator)
    directions = torch.nn.functional.normalize(torch.randn(SIDE * SIDE, 128, generator=generator), dim=0)
    return sliced_wasserstein(mixture.whiten(a), mixture.whiten(b), directions)


def summary(values: list[float]) -> str:
    values = torch.tensor(values, dtype=torch.float64)
    return f"{float(values.mean()):.4f} +- {float(values.std() / math.sqrt(len(values))):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, nargs="+", help="model evaluations: 5 10 20 50, of --optimal 10 25 50 100"
    )
    parser.add_argument("--optimal", action="store_true", help="compare the reverse variances of ancestral sampling")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="independent sets, for the error bars")
    parser.add_argument("--only", default="", help="samplers whose name contains this")
    arguments = parser.parse_args()

    mixture = Mixture.image_like()
    print(f"floor: {summary([floor(mixture, arguments.samples, r) for r in range(2 * arguments.repeats)])}")
    if arguments.optimal:
        rows = {
            name: lambda steps, r, make=make: measure_ancestral(mixture, make(), steps, arguments.samples, r)
            for name, make in ancestral_samplers(mixture.optimal_variance()).items()
        }
    else:
        rows = {
            name: lambda steps, r, sampler=sampler: measure(mixture, sampler, steps, arguments.samples, r)
            for name, sampler in samplers().items()
        }
    columns = arguments.steps or ([10, 25, 50, 100] if arguments.optimal else [5, 10, 20, 50])
    print(
        f"| {'variance | grid' if arguments.optimal else 'sampler | schedule'} | "
        + " | ".join(map(str, columns))
        + " |"
    )
    print("|---" * (2 + len(columns)) + "|")
    for name, distance in rows.items():
        if arguments.only in name:
            cells = [summary([distance(n, r) for r in range(arguments.repeats)]) for n in columns]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
