"""`--model vae` and `--model hvae`: what `train.py` does otherwise for models with a learned encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from config import Arguments
from data import DataError, ImageSet
from diffusers.models.modeling_utils import ModelMixin
from diffusion import Losses, Rows
from randomness import generator_for
from torch import Tensor

from vdm_diffusers import HierarchicalVAE, VariationalAutoencoder, evaluate_latent_likelihood
from vdm_diffusers.elbo import bits_per_dim

MODEL_CLASSES = {"vae": VariationalAutoencoder, "hvae": HierarchicalVAE}


def make_latent_model(args: Arguments, images: ImageSet, num_levels: int) -> ModelMixin:
    """A freshly initialised VAE or hierarchical VAE that fits the images.

    Raises:
        DataError: an argument that belongs to diffusion networks.
        ValueError: sizes that cannot be.
    """
    model = args.model
    if model.class_conditional or model.model_config_name_or_path is not None:
        raise DataError(f"--model {model.model} takes neither --class_conditional nor --model_config_name_or_path.")
    channels, height, width = images.images.shape[1:]
    common: dict[str, Any] = {
        "sample_size": (height, width),
        "in_channels": channels,
        "latent_channels": model.latent_channels,
        "block_out_channels": model.block_out_channels,
        "norm_num_groups": model.norm_num_groups,
        "likelihood": model.likelihood,
        "num_levels": num_levels,
        "pixel_encoding": args.diffusion.pixel_encoding,
    }
    return (
        VariationalAutoencoder(**common)
        if model.model == "vae"
        else HierarchicalVAE(num_layers=model.num_layers, **common)
    )


class LatentTask:
    """The bound of integer images, in bits/dim, as `DiffusionTask` gives its loss; noise is a function of (seed, step, row)."""

    discrete = False

    def __init__(self, model: ModelMixin, *, seed: int, device: torch.device, random_flip: bool = False) -> None:
        self.model, self.seed, self.device, self.random_flip = model, seed, device, random_flip

    def losses(self, model: Any, levels: Tensor, labels: Tensor | None, rows: Rows) -> Losses:
        """The bound of every row: (count,) bits/dim."""
        generator = generator_for(self.seed, "latents", rows.step, rows.first)
        levels = levels.to(self.device, non_blocking=True).long()
        if self.random_flip:
            flipped = (torch.rand(len(levels), generator=generator) < 0.5).to(self.device)[:, None, None, None]
            levels = torch.where(flipped, levels.flip(-1), levels)
        nats = self.model.bound(levels, generator=generator).nats
        return Losses(nats / (levels[0].numel() * math.log(2)), times=None)


def latent_bits_per_dim(
    model: ModelMixin, images: ImageSet, *, seed: int, num_samples: int, batch_size: int
) -> dict[str, Any]:
    """Bits/dim of `images` by the ELBO, with the entries of `evaluating.bits_per_dim`."""
    device = next(model.parameters()).device
    report = evaluate_latent_likelihood(
        lambda levels, generator: model.bound(levels.to(device), generator=generator),
        images.images.long(),
        num_repeats=num_samples,
        batch_size=batch_size,
        seed=seed,
    )
    result = report.to_dict()
    for term in ("prior", "diffusion", "reconstruction"):
        result[term] = float(bits_per_dim(getattr(report, term).mean(), report.num_dims))
    return {name: value for name, value in result.items() if name not in ("loss_curve", "num_dims")}


def sampled_levels(model: ModelMixin, num_images: int, *, seed: int, batch_size: int) -> Tensor:
    """Sampled images as integer levels (N, C, H, W) on the CPU, the same for the same seed."""
    starts = range(0, num_images, batch_size)
    return torch.cat(
        [
            model.sample(min(batch_size, num_images - start), generator=generator_for(seed, "samples", start)).cpu()
            for start in starts
        ]
    )
