"""What evaluate.py leaves behind besides its figure: a table of images, plots, and a block for the model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import ImageSet
from plots import image_grid

TERMS = ("prior", "diffusion", "reconstruction")


def write_per_image(path: Path, result: dict[str, Any], images: ImageSet) -> None:
    """A parquet file with one row for each image in the split's order: index, bits_per_dim, and its terms in
    bits/dim.
    """
    import pyarrow
    import pyarrow.parquet

    to_bits = 1 / (images.num_dims * math.log(2))
    columns: dict[str, Any] = {"index": list(range(len(images)))}
    for name, values in result["per_image"].items():
        columns["bits_per_dim" if name == "nats" else name] = (np.asarray(values) * to_bits).tolist()
    unfinished = path.with_suffix(".tmp")
    pyarrow.parquet.write_table(pyarrow.table(columns), unfinished)
    unfinished.replace(path)


def extreme_images(path: Path, result: dict[str, Any], images: ImageSet, num_levels: int, number: int = 10) -> None:
    """Two rows of images: above the most likely ones, below the least likely."""
    order = torch.tensor(result["per_image"]["nats"]).argsort()
    number = min(number, len(order))
    chosen = torch.cat([order[:number], order.flip(0)[:number]])
    image_grid(images.images[chosen], num_levels, columns=number).save(path)


def plot_terms(path: Path, result: dict[str, Any], num_dims: int) -> None:
    """How each term is distributed over the images, in bits/dim."""
    axes, save = _figure(path)
    to_bits = 1 / (num_dims * math.log(2))
    names = [name for name in ("nats", *TERMS) if name in result["per_image"]]
    values = [np.asarray(result["per_image"][name]) * to_bits for name in names]
    axes.boxplot(values, showfliers=False)
    axes.set_xticks(range(1, len(names) + 1), ["sum" if name == "nats" else name for name in names])
    axes.set_ylabel("bits/dim")
    axes.set_yscale("symlog", linthresh=0.1)
    if min(column.min() for column in values) >= 0:
        axes.set_ylim(bottom=0)
    save()


def plot_steps(path: Path, rows: list[dict[str, float]]) -> None:
    """Bits/dim of chains against their number of steps."""
    axes, save = _figure(path)
    steps = [row["num_steps"] for row in rows]
    axes.errorbar(
        steps, [row["bits_per_dim"] for row in rows], [row["standard_error"] for row in rows], marker="o", capsize=3
    )
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(number) for number in steps])
    axes.minorticks_off()
    axes.set_xlabel("steps of the chain")
    axes.set_ylabel("bits/dim")
    save()


def plot_weights(path: Path, profile: list[dict[str, float]]) -> None:
    """The network's own loss per dimension beside what the bound makes of it per unit of each axis."""
    axes, save = _figure(path)
    log_snr = np.array([point["log_snr"] for point in profile])
    mse = np.array([point["mse"] for point in profile])
    axes.plot(log_snr, mse, label=r"with the bound's weight, SNR: E$|\epsilon - \hat\epsilon|^2$ / D")
    axes.plot(log_snr, mse * np.exp(-log_snr), "--", label=r"without it: E$|x - \hat x|^2$ / D")
    axes.set_yscale("log")
    axes.set_xlabel("log SNR")
    axes.set_ylabel("mean squared error")
    axes.legend()
    save()


def markdown_block(result: dict[str, Any]) -> str:
    """The figure with everything that it takes to compare it with another, for a model card."""
    settings = result["settings"]
    rows = [
        ("bits/dim", f"{result['bits_per_dim']:.4f}{' (upper bound)' if result['is_bound'] else ''}"),
        ("error of the estimate", f"{result['standard_error']:.4f}"),
        (
            "error of the sample of images",
            "-" if math.isnan(result["sampling_error"]) else f"{result['sampling_error']:.4f}",
        ),
        *((name, f"{result[name]:.4f}") for name in TERMS if name in result),
        ("images", f"{result['images']}, split {result['split']}, {result['num_images']} images, each once"),
        (
            "estimator",
            f"{result['method']}, {result['num_model_evaluations']} network evaluations, seed {result['seed']}",
        ),
        *((name.replace("_", " "), str(value)) for name, value in settings.items() if value is not None),
        ("checkpoint", result["checkpoint"]),
        ("images' fingerprint", f"blake2b {result['fingerprint']}"),
        ("software", ", ".join(f"{name} {version}" for name, version in result["provenance"]["versions"].items())),
        ("machine", result["provenance"]["machine"]),
        ("date", result["provenance"]["date"]),
        ("command", f"`{result['provenance']['command']}`"),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["### Likelihood", "", "| | |", "|---|---|", *lines, ""])


def _figure(path: Path) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return axes, lambda: figure.savefig(path, dpi=150)
