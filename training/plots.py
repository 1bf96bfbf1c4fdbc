"""Pictures: grids of samples, and the loss against log SNR."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from vdm_diffusers.pictures import image_grid as image_grid


def plot_loss_by_log_snr(points: list[dict[str, float]], path: Path, *, title: str, label: str) -> None:
    """The diffusion term per unit of log SNR; the area under the curve is the term itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log_snr = [point["log_snr"] for point in points]
    loss = np.array([point["bits_per_dim_per_log_snr"] for point in points])
    error = np.array([point["standard_error"] for point in points])
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(log_snr, loss, label=label)
    axes.fill_between(log_snr, loss - error, loss + error, alpha=0.3, linewidth=0)
    axes.set_xlabel("log SNR")
    axes.set_ylabel("bits/dim per unit of log SNR")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)


def plot_training(entries: list[dict], path: Path, *, title: str, weighs_by_elbo: bool) -> None:
    """The course of a run, from the entries of metrics.jsonl: bits/dim held out with error bars, and the loss if it
    is in bits/dim.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if weighs_by_elbo:
        logged = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        axes.plot(*zip(*logged, strict=True), linewidth=0.8, alpha=0.6, label="training, with dropout if any")
    looks = [entry for entry in entries if "eval/bits_per_dim" in entry]
    bits = [entry["eval/bits_per_dim"] for entry in looks]
    errors = [math.hypot(entry["eval/standard_error"], entry["eval/sampling_error"] or 0) for entry in looks]
    axes.errorbar(
        [entry["step"] for entry in looks], bits, errors, marker="o", capsize=3, label="held out, averaged weights"
    )
    axes.set_ylim(min(bits) - 0.1, max(bits) + 0.4)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("bits/dim")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
