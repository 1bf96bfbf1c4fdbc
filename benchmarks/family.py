"""The whole family on one data set, with the same budget: VAE, hierarchical VAE (2, 4 layers), VDM, VAE with a VDM
prior.

Every model is trained by its own bound for the same time on one core, by its recipe's optimiser, batch and averaging
of weights. Time is the processor's (on an accelerator the clock's), so that other work on the machine counts little.
At every tenth of the budget the averaged weights are looked at on images held out of training, and the best are kept:
no model loses by a budget that is too long for it. The result is bits/dim on the test split. `--models` also knows
VDMs whose networks predict the data, the noise, or the score, all with ELBO weighting.

Finished models stand in family.json in --output and are not trained again; a run that was cut off goes on with the
next one.

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
from arguments import DIGITS_RECIPE, RECIPES, Arguments, parse_arguments
from checkpoints import write_json
from data import ImageSet, default_test_split, load_split, load_splits
from diffusion import DiffusionTask, Rows, make_scheduler
from ema import ema_decay
from latent_models import latent_report, make_latent_model, make_stages
from networks import make_network
from optimizers import make_optimizer

from vdm_diffusers import (
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMPipeline,
    VDMUNet2DModel,
    evaluate_latent_likelihood,
    evaluate_likelihood,
)
from vdm_diffusers.likelihood import LikelihoodReport

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
LOOKS = 10  # at the held-out images, while training

Loss = Callable[[Tensor, int], Tensor]  # integer images and the step -> (B,) bits/dim


def arguments(name: str, dataset_name: str | None, small: bool) -> Arguments:
    """What `train.py` would be given: the recipe of the digits, or for larger images MNIST's, with what the model
    needs.
    """
    tokens = ["--config", str(DIGITS_RECIPE if small else RECIPES / "mnist.yaml")]
    if dataset_name is not None:
        tokens += ["--dataset_name", dataset_name, "--image_mode", "L"]
    if not small:
        tokens += ["--block_out_channels", "32", "64", "64"]
    kind = name.rstrip("0123456789")
    if kind in ("vae", "hvae"):
        tokens += ["--model", kind, "--num_layers", name[4:] or "1"]
    elif name == "latent_vdm":
        tokens += [
            "--model",
            name,
            "--log_snr_max",
            "8",
            "--log_snr_min",
            "-6",
            "--log_snr_table",
            "8",
            "-6",
            "--hidden_channels",
            "48",
        ]
    elif name in PREDICTIONS:
        tokens += ["--prediction_type", name.removeprefix("vdm_")]
    return parse_arguments(tokens)


def train(
    name: str,
    modules: list[nn.Module],
    loss: Loss,
    train_levels: Tensor,
    held_out: Tensor,
    args: Arguments,
    budget: float,
    *,
    scale: float = 1.0,
) -> int:
    """Minimise the loss for `budget` seconds; leaves the averaged weights that are best on held-out images. Returns
    the steps.

    Arguments:
        scale: of the recipe's learning rate.
    """
    recipe = args.optimization
    named = [(key, p) for module in modules for key, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    device = parameters[0].device
    average, best, best_bits = [p.detach().clone() for p in parameters], None, math.inf
    optimizer = make_optimizer(
        recipe.optimizer,
        named,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.adam_weight_decay,
        eps=recipe.adam_epsilon,
        fused=device.type in ("cpu", "cuda"),
    )
    generator = torch.Generator().manual_seed(0)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for module in modules:
        module.train()
    start, step, looks = clock(), 0, 0
    while best is None or (clock() - start) / budget < 1:
        spent = min((clock() - start) / budget, 1.0)
        for group in optimizer.param_groups:
            warm_up = min(1, (step + 1) / recipe.lr_warmup_steps)
            group["lr"] = scale * recipe.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * spent))
        index = torch.randint(len(train_levels), (recipe.train_batch_size,), generator=generator)
        value = loss(train_levels[index].to(device), step).mean()
        if not bool(value.isfinite()):
            raise RuntimeError(f"{name}: the loss is {float(value.detach())} in step {step}")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        step += 1
        decay = ema_decay(step, inv_gamma=recipe.ema_inv_gamma, power=recipe.ema_power, max_decay=recipe.ema_max_decay)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        if (clock() - start) / budget * LOOKS >= looks + 1:  # looking costs nothing of the budget
            began, looks = clock(), int((clock() - start) / budget * LOOKS)
            bits = look(modules, parameters, average, loss, held_out)
            if bits < best_bits:
                best, best_bits = [mean.clone() for mean in average], bits
            print(f"  {name}: {looks * 10}% of the budget, {step} steps, held-out loss {bits:.3f}", flush=True)
            start += clock() - began
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    for module in modules:
        module.eval()
    return step


@torch.no_grad()
def look(
    modules: list[nn.Module], parameters: list[nn.Parameter], average: list[Tensor], loss: Loss, levels: Tensor
) -> float:
    """The loss of the averaged weights on held-out images, with the same noise at every call."""
    trained = [p.clone() for p in parameters]
    torch._foreach_copy_(parameters, average)
    for module in modules:
        module.eval()
    batches = levels.to(parameters[0].device).split(100)
    total = sum(
        float(loss(batch, -1 - i - repeat * len(batches)).sum())
        for repeat in range(4)
        for i, batch in enumerate(batches)
    )
    torch._foreach_copy_(parameters, trained)
    for module in modules:
        module.train()
    return total / (4 * len(levels))


def run(
    name: str,
    args: Arguments,
    splits: tuple[ImageSet, ImageSet, Tensor],
    budget: float,
    repeats: int,
    device: torch.device,
) -> dict:
    """Train and evaluate one model: its row of the table, and the model as `model` for pictures."""
    torch.manual_seed(0)
    train_set, held_out_set, test_levels = splits
    train_levels, held_out = train_set.images.long(), held_out_set.images[:300].long()
    num_levels, num_dims = train_set.num_levels, train_set.num_dims
    to_bits = 1 / (num_dims * math.log(2))
    test_levels = test_levels.to(device)
    common = {"held_out": held_out, "args": args, "train_levels": train_levels}
    tighter = None

    report: LikelihoodReport
    if name == "latent_vdm" or name in ("vae", "hvae2", "hvae4"):
        network = make_latent_model(args, train_set, num_levels).to(device)
        model, steps = network.published, 0
        for stage in make_stages(args, 1000):  # as shares of the budget
            if stage.name == "prior":
                network.begin_prior(train_levels, None)
            # what a stage does not reach
            network.vae.requires_grad_(stage.name != "prior")
            if network.unet is not None:
                network.unet.requires_grad_(stage.name != "vae")

            def loss(levels: Tensor, step: int, name: str = stage.name) -> Tensor:
                return network(levels, torch.Generator().manual_seed(2**20 + step), name) * to_bits

            share = budget * (stage.end - stage.first) / 1000
            steps += train(f"{name} {stage.name}", [network], loss, budget=share, scale=stage.rate, **common)
        network.requires_grad_(True)
        passes = 4 * repeats if name == "latent_vdm" else repeats  # one time a pass
        report = evaluate_latent_likelihood(model.bound, test_levels, num_repeats=passes)
        if name != "latent_vdm":
            tighter = latent_report(model, test_levels, seed=0, num_samples=2, batch_size=256, importance_samples=16)
        parameters = sum(p.numel() for p in network.parameters())
    else:
        unet = make_network(args, train_set)
        if name in PREDICTIONS:  # the residual connection would help the noise alone
            unet = VDMUNet2DModel.from_config({**unet.config, "residual_connection": False})
        model = VDMPipeline(unet.to(device), make_scheduler(args.diffusion), num_levels=num_levels)
        task = DiffusionTask(args.diffusion, model.scheduler, num_levels=num_levels, seed=0, device=device)
        loss = lambda levels, step: task.losses(unet, levels, None, Rows(step, 0, len(levels), len(levels))).weighted  # noqa: E731
        steps = train(name, [unet], loss, budget=budget, **common)
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
            f"| {NAMES[row['name']]} | {row['parameters']:,} | {row['steps']} | {row['bits_per_dim']:.3f} +- "
            f"{error:.3f} | {terms} | {tighter} |"
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
    parser.add_argument("--budget", type=float, default=120, help="seconds to train each model")
    parser.add_argument("--max_test_images", type=int, default=1000)
    parser.add_argument("--num_repeats", type=int, default=16, help="evaluations of each test image")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/family"), help="folder of the table, the models and the pictures"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = arguments("vdm", args.dataset_name, small=True).data
    train_set, held_out_set = load_splits(data, 0)
    test_set = load_split(data, default_test_split(data), 0).first(args.max_test_images)
    test_levels, small = test_set.images.long(), test_set.images.shape[-1] <= 8
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "family.json"
    settings = {
        "budget": args.budget,
        "data": test_set.name,
        "num_repeats": args.num_repeats,
        "device": args.device.type,
    }
    done: dict[str, dict] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            parser.error(f"{path} holds results with other settings: {before['settings']}. Give another --output.")
        done = {row["name"]: row for row in before["rows"]}
    for name in args.models:
        if name in done:
            print(f"{NAMES[name]}: {done[name]['bits_per_dim']:.3f} bits/dim, from {path}", flush=True)
            continue
        run_args = arguments(name, args.dataset_name, small)
        row = run(name, run_args, (train_set, held_out_set, test_levels), args.budget, args.num_repeats, args.device)
        model = row.pop("model")
        model.to("cpu").save_pretrained(args.output / name)
        draw(model, test_levels, test_set.num_levels, args.output / f"{name}.png")
        done[name] = row
        write_json(path, {"settings": settings, "rows": list(done.values())})
        print(f"{NAMES[name]}: {row['bits_per_dim']:.3f} bits/dim", flush=True)
    print(f"\n{test_set.name}; {args.budget:g} s for each model\n\n{table([done[name] for name in args.models])}")


if __name__ == "__main__":
    main()
