"""Draws the figures of docs/theory.md into docs/figures: python docs/make_figures.py (about a minute on one core)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from elbo_forms import NUM_LEVELS, digits, exact_denoiser, measure

from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.gaussian import alpha_sigma
from vdm_diffusers.noise_schedules import LinearLogSNRSchedule
from vdm_diffusers.objectives import output_weight
from vdm_diffusers.score import tweedie_covariance, tweedie_mean

Axes = plt.Axes


def draw_forms(axes: Axes) -> None:
    """Variance of one drawn term of either form, and of whole trajectories, by the number of steps."""
    data = digits("train")
    denoise = exact_denoiser(encode_pixels(data, NUM_LEVELS, dtype=torch.float64))
    schedule = LinearLogSNRSchedule(8.0, -5.0)
    steps = [4, 8, 16, 32, 64, 128]
    rows = [measure(data[:24], denoise, schedule, t, 8) for t in steps]
    for form, colour in (("consistency", "C1"), ("matching", "C0")):
        axes.plot(steps, [row[form]["variance_one_term"] for row in rows], f"{colour}o-", label=f"{form}, one term")
        axes.plot(
            steps, [row[form]["variance_trajectory"] for row in rows], f"{colour}x:", label=f"{form}, trajectory"
        )
    axes.set(xscale="log", yscale="log", xlabel="steps T", ylabel="variance, (bits/dim)$^2$")
    axes.legend(fontsize=8)


def draw_weights(axes: Axes) -> None:
    """The ELBO's weight on the squared error of each kind of prediction."""
    log_snr = torch.linspace(-5, 13.3, 200, dtype=torch.float64)
    for prediction_type in ("sample", "epsilon", "v_prediction", "score", "flow_prediction"):
        weight = output_weight(log_snr, "elbo", prediction_type, elbo_weight=0.5)
        axes.plot(log_snr, weight, label=prediction_type)
    axes.set(yscale="log", xlabel="log SNR", ylabel="weight of the squared error")
    axes.legend(fontsize=8)


def draw_tweedie(axes: Axes) -> None:
    """E[x | z] and its standard deviation for x = +-1 with a little noise, from the score alone."""
    variance, log_snr = 0.02, 0.0
    alpha, sigma = alpha_sigma(log_snr)

    def score(z: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        v = alpha**2 * variance + sigma**2
        return (alpha * torch.tanh(alpha * z / v) - z) / v  # of an equal mixture of N(-alpha, v) and N(alpha, v)

    z = torch.linspace(-3, 3, 201, dtype=torch.float64)[:, None]
    mean = tweedie_mean(z, score(z, torch.tensor(log_snr)), log_snr)[:, 0]
    deviation = tweedie_covariance(score, z, log_snr)[:, 0, 0].sqrt()
    axes.plot(z[:, 0], mean, label="E[x | z]")
    axes.fill_between(z[:, 0], mean - deviation, mean + deviation, alpha=0.25, label="$\\pm$ sd[x | z]")
    axes.plot(z[:, 0], score(z, torch.tensor(log_snr))[:, 0], "k:", label="score of q(z)")
    axes.set(xlabel="z at log SNR 0")
    axes.legend(fontsize=8)


FIGURES = {"elbo_forms": draw_forms, "weights": draw_weights, "tweedie": draw_tweedie}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
        FIGURES[name](axes)
        figure.savefig(args.output / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
