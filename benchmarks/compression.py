"""How large is a file, and is it the bound? A table, and a picture of where the bits are spent.

    python benchmarks/compression.py --files 6                                    # the digits: the table of
    docs/compression.md python benchmarks/compression.py --model model_cards/mnist-elbo --dataset ylecun/mnist
    --num_images 500 --chains optimal:64:optimal

A chain is variance:steps:grid. The optimal variance is measured on training images, the sizes on test images. JPEG XL
needs `pip install imagecodecs`.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import time
from pathlib import Path

import numpy as np
import torch

from vdm_diffusers import VDMPipeline, VDMScheduler, estimate_optimal_variance, evaluate_likelihood
from vdm_diffusers.compression import compress_with_report, decompress

ROOT = Path(__file__).resolve().parent.parent
CHAINS = ["fixed_small:10:time", "fixed_small:50:time", "fixed_small:250:time",
          "optimal:10:time", "optimal:50:time", "optimal:20:optimal"]  # fmt: skip


def data(name: str, number: int, training: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images and test images, (N, 1, H, W) integers."""
    if name == "digits":
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images).long()[:, None]
        return images[:training], images[-297:][:number]
    from datasets import load_dataset

    parts = load_dataset(name)
    train, test = parts["train"].shuffle(seed=0).select(range(training)), parts["test"].select(range(number))
    return tuple(torch.from_numpy(np.stack([np.asarray(i) for i in part["image"]])).long()[:, None] for part in (train, test))  # fmt: skip


def comparison():
    """`sizes_elsewhere` of examples/compress.py."""
    spec = importlib.util.spec_from_file_location("compress_example", ROOT / "examples" / "compress.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.sizes_elsewhere


def picture(path: Path, steps: dict[str, tuple[float, ...]]) -> None:
    """Bits for a dimension, summed from the clean end on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, bits in steps.items():
        share = np.arange(len(bits)) / (len(bits) - 1)
        axes.plot(share, np.cumsum(bits), label=name, drawstyle="steps-post")
    axes.set(xlabel="share of the chain, from the image to noise", ylabel="bits/dim on the stack so far")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "model_cards" / "digits-elbo"))
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--num_images", type=int, default=297)
    parser.add_argument("--training_images", type=int, default=600)
    parser.add_argument("--num_samples", type=int, default=32, help="evaluations an image for the optimal variance")
    parser.add_argument("--chains", nargs="+", default=CHAINS)
    parser.add_argument(
        "--files", type=int, default=1, help="average over so many files, each of which draws another path"
    )
    parser.add_argument("--no_bound", action="store_true", help="do not evaluate the chains' bounds")
    parser.add_argument("--figure", type=Path, help="file for the picture")
    args = parser.parse_args()
    pipe = VDMPipeline.from_pretrained(args.model)
    levels = pipe.config.num_levels
    train, test = data(args.dataset, args.num_images, args.training_images)
    plain = VDMScheduler.from_config(pipe.scheduler.config, stochasticity=1.0)
    generator = torch.Generator().manual_seed(0)
    table = None
    if any(chain.startswith("optimal") for chain in args.chains):
        table = estimate_optimal_variance(
            pipe, train, num_samples=args.num_samples, generator=generator, progress_bar=False
        )
    print(f"{len(test)} images of {args.dataset}, {args.model}, {torch.get_num_threads()} threads")
    print(
        "| reverse variance | steps | grid | bits/dim | bound | difference | whole file | bits to begin with | "
        "seconds | back |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    by_step = {}
    for chain in args.chains:
        variance, number, grid = chain.split(":")
        options = {"variance_type": variance, "optimal_variance": table} if variance == "optimal" else {}
        model = VDMPipeline(pipe.unet, VDMScheduler.from_config(plain.config, **options), num_levels=levels)
        packed, report = compress_with_report(model, test, num_steps=int(number), grid=grid, progress_bar=False)
        start = time.perf_counter()
        assert torch.equal(decompress(model, packed, progress_bar=False), test)
        back, bound = time.perf_counter() - start, "-"
        difference, found = "-", None
        if not args.no_bound:
            found = evaluate_likelihood(
                model, test, method="discrete", num_steps=int(number), grid=grid,
                num_samples=max(16, min(8 * int(number), 500)), generator=torch.Generator().manual_seed(0), progress_bar=False,
            )  # fmt: skip
            bound = f"{found.bits_per_dim:.4f} ± {found.standard_error:.4f}"
        rates = [report.net_bits]
        for seed in range(1, args.files):  # other bits to begin with, and so other paths
            initial = np.random.default_rng(seed).bytes(report.initial_bits // 4)
            options = {"num_steps": int(number), "grid": grid, "initial": initial, "progress_bar": False}
            rates.append(compress_with_report(model, test, **options)[1].net_bits)
        rate, error = (
            float(np.mean(rates)),
            float(np.std(rates, ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0.0,
        )
        if found is not None:
            difference = f"{100 * (rate / found.bits_per_dim - 1):+.2f} ± {100 * error / rate:.2f}%"
        by_step[f"{variance}, {number} steps, {grid}"] = report.bits_by_step
        print(
            f"| {variance} | {number} | {grid} | {rate:.4f} | {bound} | {difference} | {report.total_bits:.4f} | "
            f"{report.initial_bits} | {report.seconds:.1f} | {back:.1f} |",
            flush=True,
        )
    print("\n| format | bits/dim | as one mosaic |\n|---|---|---|")
    for name, (alone, mosaic) in comparison()(test.to(torch.uint8)).items():
        print(f"| {name} | {8 * alone / test.numel():.3f} | {8 * mosaic / test.numel():.3f} |")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.figure is not None:
        picture(args.figure, by_step)


if __name__ == "__main__":
    main()
