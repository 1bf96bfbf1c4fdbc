"""What the difference of two models costs, and what a class costs: evaluations for an error, by estimator.

`pairs`: for two checkpoints, evaluations of both networks for a standard error of 0.001 bits/dim of their difference
on these images:

- independent pairs: each model's loss at times and noise of its own, uniform in log SNR (what two logged losses are);
- a script with a fixed seed: the same times and noise for both, uniform in log SNR;
- two reports of `evaluate_likelihood`;
- `compare_likelihood`.

Each estimator is run once; evaluations = (its standard error / 0.001)^2 x those it took, from the scatter of
independent replicates.

`classes`: accuracy on the digits' test split against evaluations for each class: independent noise, shared noise at
uniform times (Li et al. 2023), `classify` without what it learns, and `classify`.

    python benchmarks/comparison.py [--only pairs,classes] [--a FOLDER --b FOLDER] [--num_images 100] [--repeats 3]
    [--output comparison.json]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers import classify, compare_likelihood, evaluate_likelihood
from vdm_diffusers.evaluation.candidates import Candidate
from vdm_diffusers.likelihood.rounds import Side
from vdm_diffusers.loading import load_model

TARGET = 0.001
CARDS = Path(__file__).resolve().parents[1] / "model_cards"
PAIRS = [("digits-elbo", "digits-simple"), ("digits-elbo", "digits-elbo + 2% noise in the last layer")]


def digits(count: int) -> tuple[Tensor, Tensor]:
    """`count` images of the test split of training/train.py, and their classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))[1500 : 1500 + count]
    return torch.from_numpy(data.images[order]).to(torch.uint8)[:, None], torch.from_numpy(data.target[order])


def model_named(name: str) -> Any:
    """A model of model_cards/, or a folder; "+ 2% ..." changes its last layer."""
    base = name.split(" + ")[0]
    pipe = load_model(str(CARDS / base if (CARDS / base).is_dir() else base))
    if base != name:
        weight = pipe.unet.conv_out.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    return pipe


@torch.no_grad()
def plain_losses(pipe: Any, levels: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
    """The diffusion term's integrand times the width of its range, in nats: one evaluation for each image."""
    c = Candidate.of(pipe, levels, method="continuous", options={})
    assert c.term is not None
    highest, lowest = c.term.log_snr_range()
    side = Side(c.denoiser, c.term, c.decoder)
    return side.evaluate(
        levels, noise, torch.arange(len(levels)), log_snr, log_snr, torch.zeros(len(levels), dtype=bool)
    )[0] * (highest - lowest)


def pair(a: Any, b: Any, levels: Tensor, repeats: int) -> dict[str, float]:
    """Evaluations (of both networks, over all images) for TARGET, by estimator."""
    scale, count = levels[0].numel() * math.log(2), len(levels)
    schedule = a.scheduler.noise_schedule
    lowest, width = schedule.log_snr_min, schedule.log_snr_max - schedule.log_snr_min
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        return lowest + width * u, torch.randn(levels.shape, generator=generator)

    independent, shared = [], []
    for _ in range(16):
        one, other = draw(), draw()
        first = plain_losses(a, levels, *one)
        independent.append(first - plain_losses(b, levels, *other))
        shared.append(first - plain_losses(b, levels, *one))
    found = {}
    for name, parts in (("independent pairs", independent), ("fixed seed, uniform times", shared)):
        variance = torch.stack(parts).var(0).mean()  # of one evaluation of the difference, for one image
        found[name] = float(variance / count / (scale * TARGET) ** 2) * 2 * count
    squares: dict[str, list[float]] = {"two reports": [], "compare_likelihood": []}
    for seed in range(repeats):
        options: dict[str, Any] = {"num_samples": 32, "progress_bar": False}
        reports = [evaluate_likelihood(m, levels, generator=2 * seed + i, **options) for i, m in enumerate((a, b))]
        spent = sum(r.num_model_evaluations for r in reports)
        squares["two reports"].append(sum(r.standard_error**2 for r in reports) / TARGET**2 * spent)
        report = compare_likelihood(a, b, levels, generator=seed, **options)
        squares["compare_likelihood"].append(report.standard_error**2 / TARGET**2 * report.num_model_evaluations)
    return found | {name: float(np.mean(values)) for name, values in squares.items()}


@torch.no_grad()
def class_nats(pipe: Any, levels: Tensor, number: int, *, shared: bool, seed: int) -> Tensor:
    """(N, 10) averages of `number` evaluations at uniform log SNRs."""
    schedule, generator = pipe.scheduler.noise_schedule, torch.Generator().manual_seed(seed)
    c = Candidate.of(pipe, levels, method="continuous", options={}, class_labels=0)
    assert c.term is not None
    predict = c.denoiser.predict
    total = torch.zeros(len(levels), 10, dtype=torch.float64)
    for _ in range(number):
        for k in range(10):
            if k == 0 or not shared:
                u = torch.rand(len(levels), generator=generator, dtype=torch.float64)
                log_snr = schedule.log_snr_min + (schedule.log_snr_max - schedule.log_snr_min) * u
                noise = torch.randn(levels.shape, generator=generator)
            predict.per_image["class_labels"] = torch.full((len(levels),), k)
            rows, none = torch.arange(len(levels)), torch.zeros(len(levels), dtype=bool)
            total[:, k] += Side(c.denoiser, c.term, c.decoder).evaluate(levels, noise, rows, log_snr, log_snr, none)[0]
    return total


def classes(levels: Tensor, labels: Tensor, repeats: int) -> dict[str, dict[int, float]]:
    """Accuracy by evaluations for each class, by estimator."""
    pipe = load_model(str(CARDS / "digits-class"))
    found: dict[str, dict[int, float]] = {}
    for number in tqdm((1, 2, 4, 8, 16), desc="classes"):
        for name in ("independent", "shared, uniform times", "shared, stratified", "classify"):
            right = []
            for seed in range(repeats):
                if name in ("independent", "shared, uniform times"):
                    best = class_nats(pipe, levels, number, shared=name != "independent", seed=seed).argmin(1)
                else:
                    options: dict[str, Any] = {"learn_density": name == "classify", "drop_unlikely": False}
                    report = classify(pipe, levels, num_samples=number, generator=seed, progress_bar=False, **options)
                    best = report.best
                right.append(float((best == labels).float().mean()))
            found.setdefault(name, {})[number] = float(np.mean(right))
    return found


def main() -> None:
    """Print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="pairs,classes")
    parser.add_argument("--a", help="a checkpoint of digits, with --b: instead of the two pairs of model_cards/")
    parser.add_argument("--b")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("comparison.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if "pairs" in args.only:
        levels, _ = digits(args.num_images)
        for a, b in [(args.a, args.b)] if args.a and args.b else PAIRS:
            found = pair(model_named(a), model_named(b), levels, args.repeats)
            results[f"{a} - {b}"] = found
            best = found["compare_likelihood"]
            print(f"\n{a} against {b}, {len(levels)} images: evaluations for +- {TARGET} bits/dim of the difference")
            for name, number in found.items():
                print(f"  {name:28} {number:14,.0f}   {number / best:10,.1f} x")
    if "classes" in args.only:
        levels, labels = digits(297)
        results["classes"] = classes(levels, labels, args.repeats)
        print("\naccuracy on the 297 test digits, by evaluations a class")
        print(f"  {'':24}" + "".join(f"{n:>7}" for n in (1, 2, 4, 8, 16)))
        for name, row in results["classes"].items():
            print(f"  {name:24}" + "".join(f"{value:7.3f}" for value in row.values()))
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
