"""The whole family on one data set, with the same budget: VAE, hierarchical VAE (2, 4 layers), VDM, VAE with a VDM prior.

Every model is trained by its own bound for the same time on one core (seconds of processor time, so that other work on the machine does
not count), with the same optimiser, batch and averaging of weights, and evaluated on the test split in bits/dim. `--models`
also knows VDMs whose networks predict the data, the noise, or the score, all with ELBO weighting.

    python benchmarks/family.py                                                # the digits that come with scikit-learn
    python benchmarks/family.py --dataset_name ylecun/mnist --budget 600       # MNIST, 8 bits
    python benchmarks/family.py --models vdm_sample vdm_epsilon vdm_score      # three prediction types
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from config import DataArguments
from data import load_split

from vdm_diffusers import (
    HierarchicalVAE,
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_latent_likelihood,
    evaluate_likelihood,
)
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.elbo import continuous_weight
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.likelihood import LikelihoodReport
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import low_discrepancy

FAMILY = ("vae", "hvae2", "hvae4", "vdm", "latent_vdm")
PREDICTIONS = ("vdm_sample", "vdm_epsilon", "vdm_score")
NAMES = {
    "vae": "VAE",
    "hvae2": "hierarchical VAE, 2 layers",
    "hvae4": "hierarchical VAE, 4 layers",
    "vdm": "VDM",
    "latent_vdm": "VAE with VDM prior",
    "vdm_sample": "VDM, predicts x",
    "vdm_epsilon": "VDM, predicts eps (no residual)",
    "vdm_score": "VDM, predicts the score",
}
BATCH = 64


def train(
    modules: list[nn.Module],
    loss: Callable[[Tensor, torch.Generator], Tensor],
    levels: Tensor,
    budget: float,
    lr: float,
) -> int:
    """Minimise `loss(levels, generator)` for `budget` seconds of processor time; leaves averaged weights. Returns the steps."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        module.train()
    start, step = time.process_time(), 0
    while (spent := (time.process_time() - start) / budget) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent))
        value = loss(levels[torch.randint(len(levels), (BATCH,), generator=generator)], generator)
        if not bool(value.isfinite()):
            raise RuntimeError(f"the loss is {float(value.detach())} in step {step}")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step)))
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)
    for module in modules:
        module.eval()
    return step


def sizes(levels: Tensor) -> dict:
    """Widths by the size of the images: both are small networks."""
    small = levels.shape[-1] <= 8
    return {"block_out_channels": (32, 64) if small else (32, 64, 64), "latent_channels": 4}


def make_unet(
    channels: int, size: tuple[int, int], hidden: int, fourier: tuple[float, ...], residual: bool
) -> VDMUNet2DModel:
    return VDMUNet2DModel(
        sample_size=size,
        in_channels=channels,
        hidden_channels=hidden,
        layers_per_block=2,
        fourier_exponents=fourier,
        residual_connection=residual,
        norm_num_groups=8,
        dropout=0.0,
        add_attention=size[0] <= 8,
    )


def run(name: str, train_levels: Tensor, test_levels: Tensor, num_levels: int, budget: float, repeats: int) -> dict:
    """Train and evaluate one model: its row of the table, and the model as `model` for pictures."""
    torch.manual_seed(0)
    channels, size = train_levels.shape[1], tuple(train_levels.shape[2:])
    common = {"sample_size": size, "in_channels": channels, "num_levels": num_levels, **sizes(train_levels)}
    num_dims = train_levels[0].numel()
    to_bits = 1 / (num_dims * math.log(2))
    tighter = None

    def mean_bits(bound: Callable) -> Callable[[Tensor, torch.Generator], Tensor]:
        return lambda levels, generator: bound(levels, generator=generator).nats.mean() * to_bits

    report: LikelihoodReport
    if name in ("vae", "hvae2", "hvae4"):
        model = (
            VariationalAutoencoder(**common) if name == "vae" else HierarchicalVAE(num_layers=int(name[4:]), **common)
        )
        steps = train([model], mean_bits(model.bound), train_levels, budget, 2e-3)
        report = evaluate_latent_likelihood(model.bound, test_levels, num_repeats=repeats)
        tighter = evaluate_latent_likelihood(
            model.bound,
            test_levels,
            importance_weighted_bound=model.importance_weighted_bound,
            importance_samples=16,
            num_repeats=2,
        )
        parameters = model.num_parameters()
    elif name == "latent_vdm":
        vae = VariationalAutoencoder(**common)
        scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=8.0, log_snr_min=-6.0)
        unet = make_unet(common["latent_channels"], vae.latent_shape[1:], 48, (), True)
        model = LatentVDMPipeline(vae, unet, scheduler)
        steps = train([vae], mean_bits(vae.bound), train_levels, 0.4 * budget, 2e-3)
        model.fit_latent_scale(train_levels[:1024])
        vae.requires_grad_(False)

        def prior_loss(levels: Tensor, generator: torch.Generator) -> Tensor:
            return (
                model.latent_bound(model.encode(levels, generator=generator), generator=generator).nats.mean()
                * to_bits
            )

        steps += train([unet], prior_loss, train_levels, 0.4 * budget, 3e-3)
        vae.requires_grad_(True)
        steps += train([vae, unet], mean_bits(model.bound), train_levels, 0.2 * budget, 5e-4)  # end to end
        report = evaluate_latent_likelihood(model.bound, test_levels, num_repeats=4 * repeats)
        parameters = vae.num_parameters() + unet.num_parameters()
    else:
        prediction = name.removeprefix("vdm_") if name != "vdm" else "epsilon"
        scheduler = VDMScheduler(
            beta_schedule="log_snr_linear",
            log_snr_max=8.0 if num_levels <= 32 else 13.3,
            log_snr_min=-5.0,
            prediction_type=prediction,
        )
        octave = math.log2(num_levels)
        fourier = (octave - 2, octave - 1, octave)
        unet = make_unet(channels, size, 48 if num_dims <= 64 else 24, fourier, name == "vdm")
        model = VDMPipeline(unet, scheduler, num_levels=num_levels)
        schedule = scheduler.noise_schedule

        def vdm_loss(levels: Tensor, generator: torch.Generator) -> Tensor:
            x = encode_pixels(levels, num_levels)
            noise = torch.randn(x.shape, generator=generator)
            t = low_discrepancy(len(x), generator=generator)
            log_snr = schedule.log_snr(t)
            output = unet(diffuse(x, noise, log_snr), scheduler.timestep_from_log_snr(log_snr).float()).sample
            weight = continuous_weight(schedule.derivative(t))
            return diffusion_loss(output, x, noise, log_snr, prediction_type=prediction, elbo_weight=weight).mean()

        steps = train([unet], vdm_loss, train_levels, budget, 4e-3)
        report = evaluate_likelihood(model, test_levels, num_samples=repeats, progress_bar=False)
        parameters = unet.num_parameters()
    three = [report.prior, report.diffusion, report.reconstruction]
    return {
        "name": name,
        "parameters": parameters,
        "steps": steps,
        "bits_per_dim": report.bits_per_dim,
        "standard_error": report.standard_error,
        "sampling_error": report.sampling_error,
        "terms": [float(term.double().mean()) * to_bits for term in three],
        "importance_weighted_16": None if tighter is None else tighter.bits_per_dim,
        "model": model,
    }


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | parameters | steps | bits/dim | prior | middle | reconstruction | 16 samples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = math.hypot(row["standard_error"], row["sampling_error"])
        terms = " | ".join(f"{term:.3f}" for term in row["terms"])
        tighter = "" if row["importance_weighted_16"] is None else f"{row['importance_weighted_16']:.3f}"
        lines.append(
            f"| {NAMES[row['name']]} | {row['parameters']:,} | {row['steps']} | {row['bits_per_dim']:.3f} +- {error:.3f} | {terms} | {tighter} |"
        )
    return "\n".join(lines)


def grid(images: Tensor, num_levels: int, columns: int) -> Tensor:
    """(N, C, H, W) levels as one picture in [0, 1], (H', W') of the first channel, with a thin border."""
    padded = nn.functional.pad(images[:, 0].float() / (num_levels - 1), (1, 1, 1, 1), value=0.5)
    rows = [torch.cat(list(row), 1) for row in padded.split(columns)]
    return torch.cat(rows, 0)


def draw(model: object, test_levels: Tensor, num_levels: int, path: Path) -> None:
    """Samples; and for models with an encoder reconstructions and, for the VAE, a traversal of its latents."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(0)
    panels = {}
    if isinstance(model, (VDMPipeline, LatentVDMPipeline)):
        model.set_progress_bar_config(disable=True)
        sampled = model(32, 100, generator=generator, output_type="pt").images
        panels["samples"] = grid((sampled * (num_levels - 1)).round(), num_levels, 8)
    else:
        panels["samples"] = grid(model.sample(32, generator=generator), num_levels, 8)
        pairs = torch.stack([test_levels[:16], model.reconstruct(test_levels[:16])], 1).flatten(0, 1)
        panels["images, reconstructions"] = grid(pairs, num_levels, 8)
    if isinstance(model, VariationalAutoencoder):
        traversal = model.latent_traversal(test_levels[:1], [-3, -2, -1, 0, 1, 2, 3])
        panels["latent traversal"] = grid(traversal.flatten(0, 1), num_levels, 7)
    if isinstance(model, LatentVDMPipeline):
        rows = [model.interpolate(*test_levels[i : i + 2].split(1), 8, generator=generator) for i in (0, 2, 4, 6)]
        panels["interpolations"] = grid(torch.cat(rows), num_levels, 8)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False)
    for axis, (title, picture) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(FAMILY), choices=[*FAMILY, *PREDICTIONS])
    parser.add_argument("--dataset_name", help="as in train.py; none: the digits that come with scikit-learn")
    parser.add_argument("--budget", type=float, default=120, help="seconds of processor time to train each model")
    parser.add_argument("--max_test_images", type=int, default=1000)
    parser.add_argument("--num_repeats", type=int, default=16, help="evaluations of each test image")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/family"), help="folder of the table, the models and the pictures"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = DataArguments(dataset_name=args.dataset_name)
    train_set, test_set = load_split(data, "train", 0), load_split(data, "test", 0)
    test_levels = test_set.images[: args.max_test_images].long()
    train_levels, num_levels = train_set.images.long(), train_set.num_levels
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.models:
        row = run(name, train_levels, test_levels, num_levels, args.budget, args.num_repeats)
        model = row.pop("model")
        model.save_pretrained(args.output / name)
        draw(model, test_levels, num_levels, args.output / f"{name}.png")
        rows.append(row)
        print(f"{NAMES[name]}: {row['bits_per_dim']:.3f} bits/dim", flush=True)
        (args.output / "family.json").write_text(
            json.dumps(
                {"budget": args.budget, "data": test_set.name, "images": len(test_levels), "rows": rows},
                indent=1,
            )
        )
    print(
        f"\n{test_set.name}: {len(test_levels)} images; {args.budget:g} s of processor time for each model\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
