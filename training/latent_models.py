"""`--model vae`, `hvae` and `latent_vdm`: what `train.py` does otherwise for models with a learned encoder.

A VAE with a diffusion prior is trained in up to three stages (`--latent_stages`, shares of the optimiser steps): the
VAE by its own bound, the prior on the latents of the VAE as it then is, and both by the joint bound, the encoder
through the prior's. `0 0 1` is end to end from the start, `0 1 0` the prior of a given `--vae`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from arguments import Arguments
from data import DataError, ImageSet
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusion import Losses, Rows, make_scheduler
from evaluating import combined_result, draw_samples
from randomness import generator_for
from torch import Tensor, nn

from vdm_diffusers import (
    HierarchicalVAE,
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_latent_likelihood,
)
from vdm_diffusers.likelihood import LikelihoodReport

LatentModel = VariationalAutoencoder | HierarchicalVAE | LatentVDMPipeline
_VAES = {"VariationalAutoencoder": VariationalAutoencoder, "AutoencoderKL": AutoencoderKL}
_CLASSES = {"vae": VariationalAutoencoder, "hvae": HierarchicalVAE, "latent_vdm": LatentVDMPipeline}
_IMAGES_TO_FIT = 1024  # for the scale of latents and decoder
_END_TO_END_RATE = 0.2  # of the learning rate, once the parts have been trained


class BoundModel(nn.Module):
    """What is trained, as one module: called with integer images it gives the bound of a stage, (B,) nats.

    Attributes:
        vae: the VAE or hierarchical VAE. unet, scheduler: of the prior; None without one.
    """

    def __init__(
        self,
        vae: ModelMixin,
        unet: ModelMixin | None = None,
        scheduler: VDMScheduler | None = None,
        **pipeline_config: Any,
    ) -> None:
        super().__init__()
        self.vae, self.unet = vae, unet
        self.pipeline: Any = None if unet is None else LatentVDMPipeline(vae, unet, scheduler, **pipeline_config)
        for part in vae.children():  # under autocast the networks alone are in half precision, not the likelihoods
            for network in part.values() if isinstance(part, nn.ModuleDict) else [part]:
                network.register_forward_hook(_in_full)

    @classmethod
    def of(cls, saved: LatentModel) -> BoundModel:
        """Of what `save_pretrained` wrote and `from_pretrained` read."""
        if not isinstance(saved, LatentVDMPipeline):
            return cls(saved)
        config = {name: saved.config[name] for name in ("num_levels", "pixel_encoding", "decoder_scale")}
        return cls(saved.vae, saved.unet, saved.scheduler, **config)

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` makes another one of."""
        parts = [self.vae] if self.pipeline is None else [self.vae, self.unet, self.pipeline.scheduler]
        names = ("num_levels", "pixel_encoding", "decoder_scale")
        return {
            "parts": [(type(part), part.config) for part in parts],
            "pipeline": {} if self.pipeline is None else {name: self.pipeline.config[name] for name in names},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BoundModel:
        """One of the same parts, freshly initialised."""
        return cls(*(kind.from_config(part) for kind, part in config["parts"]), **config["pipeline"])

    @property
    def published(self) -> LatentModel:
        """What is saved, evaluated and sampled."""
        return self.vae if self.pipeline is None else self.pipeline

    def forward(self, levels: Tensor, generator: torch.Generator, stage: str = "joint") -> Tensor:
        if stage == "prior":
            with torch.no_grad():
                latents = self.pipeline.encode(levels, generator=generator)
            return self.pipeline.latent_bound(latents, generator=generator).nats
        return (self.vae if stage == "vae" else self.published).bound(levels, generator=generator).nats

    def begin_prior(self, levels: Tensor, average: BoundModel | None) -> None:
        """Before the prior's first step: take over the averaged VAE, and fix the scales that it does not bring
        along.
        """
        if average is not None:  # at the first step of a run they are the same
            self.vae.load_state_dict(average.vae.state_dict())
        levels = levels[:_IMAGES_TO_FIT].long()
        training, _ = self.training, self.eval()  # without dropout, also in a run that is resumed here
        if self.pipeline.scaling_factor == 1 and self.pipeline.shift_factor == 0:
            self.pipeline.fit_latent_scale(levels)
        if "likelihood" not in self.vae.config and self.pipeline.config.decoder_scale is None:
            self.pipeline.fit_decoder_scale(levels)
        scales = [
            self.vae.config.get("scaling_factor"),
            self.vae.config.get("shift_factor"),
            self.pipeline.config.decoder_scale,
        ]
        broadcast_object_list(scales)  # threads may round differently; there is one model
        self.vae.register_to_config(scaling_factor=scales[0], shift_factor=scales[1])
        self.pipeline.register_to_config(decoder_scale=scales[2])
        self.train(training)
        if average is not None:
            average.take_scales(self)

    def take_scales(self, other: BoundModel) -> None:
        """The scales of latents and decoder, which are in the configs and not among the weights."""
        if self.pipeline is not None:
            factors = {name: other.vae.config.get(name) for name in ("scaling_factor", "shift_factor")}
            self.vae.register_to_config(**factors)
            self.pipeline.register_to_config(decoder_scale=other.pipeline.config.decoder_scale)


def _in_full(module: nn.Module, arguments: Any, output: Any) -> Any:
    half = (
        isinstance(output, Tensor)
        and output.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled(output.device.type)
    )
    return output.float() if half else output


class Stage(NamedTuple):
    """Optimiser steps first..end-1, in which `name` says whose bound is lowered; rate: a factor of the learning
    rate.
    """

    name: str
    first: int
    end: int
    rate: float = 1.0


def make_stages(args: Arguments, num_steps: int) -> list[Stage]:
    """The stages of a run, none of them empty."""
    if args.model.model != "latent_vdm":
        return [Stage("joint", 0, num_steps)]
    shares = args.model.latent_stages
    ends = [round(num_steps * sum(shares[: i + 1]) / sum(shares)) for i in range(3)]
    rates = (1.0, 1.0, 1.0 if shares[2] == sum(shares) else _END_TO_END_RATE)
    stages = zip(("vae", "prior", "joint"), [0, *ends[:2]], ends, rates, strict=True)
    return [Stage(*stage) for stage in stages if stage[1] < stage[2]]


def make_latent_model(args: Arguments, images: ImageSet, num_levels: int) -> BoundModel:
    """A freshly initialised VAE, hierarchical VAE, or VAE (a given one, with `--vae`) with a prior, that fits the
    images.

    Raises:
        DataError: a VAE of other images.
        ValueError: sizes that cannot be.
    """
    model = args.model
    channels, height, width = images.images.shape[1:]
    common: dict[str, Any] = {
        "sample_size": (height, width),
        "in_channels": channels,
        "latent_channels": model.latent_channels,
        "block_out_channels": model.block_out_channels,
        "norm_num_groups": model.norm_num_groups,
        "dropout": model.dropout,
        "likelihood": model.likelihood,
        "num_levels": num_levels,
        "pixel_encoding": args.diffusion.pixel_encoding,
    }
    if model.model == "hvae":
        return BoundModel(HierarchicalVAE(num_layers=model.num_layers, **common))
    vae = VariationalAutoencoder(**common) if model.vae is None else load_vae(model.vae, images, num_levels)
    if model.model == "vae":
        return BoundModel(vae)
    with torch.no_grad():
        latents, *size = vae.encode(torch.zeros(1, channels, height, width)).latent_dist.mean.shape[1:]
    unet = VDMUNet2DModel(
        sample_size=tuple(size),
        in_channels=latents,
        hidden_channels=model.hidden_channels,
        layers_per_block=model.layers_per_block,
        num_train_timesteps=args.diffusion.ddpm_num_steps,
        fourier_exponents=(),  # latents have no fine structure of levels
        residual_connection=args.diffusion.prediction_type == "epsilon",
        add_attention=model.add_attention,
        attention_head_dim=model.attention_head_dim,
        dropout=model.dropout,
        norm_num_groups=model.norm_num_groups,
    )
    encoding = vae.config.get("pixel_encoding", args.diffusion.pixel_encoding)
    return BoundModel(vae, unet, make_scheduler(args.diffusion), num_levels=num_levels, pixel_encoding=encoding)


def load_vae(source: str, images: ImageSet, num_levels: int) -> ModelMixin:
    """A `VariationalAutoencoder` or Diffusers' `AutoencoderKL`, from its folder or repository, or from a pipeline's
    folder.

    Raises:
        DataError: it is neither, or of other images.
    """
    subfolder = "vae" if (Path(source) / "vae").is_dir() else None
    config = VariationalAutoencoder.load_config(source, subfolder=subfolder)
    kind = _VAES.get(config["_class_name"])
    if kind is None:
        raise DataError(f"--vae {source} is of a {config['_class_name']}, and must be one of {', '.join(_VAES)}.")
    channels, levels = config["in_channels"], config.get("num_levels", num_levels)
    if (channels, levels) != (images.images.shape[1], num_levels):
        raise DataError(
            f"--vae {source} is of images of {channels} channel(s) and {levels} levels; these have "
            f"{images.images.shape[1]} and {num_levels}."
        )
    return kind.from_pretrained(source, subfolder=subfolder, use_safetensors=True)


def load_saved(kind: str, folder: Path) -> BoundModel:
    """What a run of `--model kind` has saved."""
    return BoundModel.of(_CLASSES[kind].from_pretrained(folder))


class LatentTask:
    """The bound of integer images, in bits/dim, as `DiffusionTask` gives its loss; noise is a function of (seed,
    step, row).
    """

    discrete = False

    def __init__(self, stages: list[Stage], *, seed: int, device: torch.device, random_flip: bool = False) -> None:
        self.stages, self.seed, self.device, self.random_flip = stages, seed, device, random_flip

    def stage(self, step: int) -> Stage:
        """The stage of an optimiser step."""
        return next(stage for stage in self.stages if step < stage.end)

    def losses(self, model: Any, levels: Tensor, labels: Tensor | None, rows: Rows) -> Losses:
        """The bound of every row: (count,) bits/dim."""
        generator = generator_for(self.seed, "latents", rows.step, rows.first)
        levels = levels.to(self.device, non_blocking=True).long()
        if self.random_flip:
            flipped = (torch.rand(len(levels), generator=generator) < 0.5).to(self.device)[:, None, None, None]
            levels = torch.where(flipped, levels.flip(-1), levels)
        nats = model(levels, generator=generator, stage=self.stage(rows.step).name)
        return Losses(nats / (levels[0].numel() * math.log(2)), times=None)


# --- looking at it ---------------------------------------------------------------------------------------------------


def latent_report(
    model: LatentModel, levels: Tensor, *, seed: int, num_samples: int, batch_size: int, importance_samples: int = 1
) -> LikelihoodReport:
    """The bound of integer images in `num_samples` passes; with `importance_samples` above 1 a VAE's bound of so many
    samples.
    """
    device = next((model.vae if isinstance(model, LatentVDMPipeline) else model).parameters()).device
    tighter: dict[str, Any] = {}
    if importance_samples > 1:
        if isinstance(model, LatentVDMPipeline):
            raise ValueError(
                "the bound of several samples needs a density of the latents, which a diffusion prior only bounds."
            )
        tighter = {
            "importance_weighted_bound": lambda batch, number, generator: model.importance_weighted_bound(
                batch.to(device), number, generator=generator
            ),
            "importance_samples": importance_samples,
        }
    return evaluate_latent_likelihood(
        lambda batch, generator: model.bound(batch.to(device), generator=generator),
        levels.long(),
        num_repeats=num_samples,
        batch_size=batch_size,
        seed=seed,
        **tighter,
    )


def latent_bits_per_dim(
    model: LatentModel,
    images: ImageSet,
    *,
    seed: int,
    num_samples: int,
    batch_size: int,
    importance_samples: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Bits/dim of `images`, with the entries of `evaluating.bits_per_dim`; the images are shared out among the
    processes.
    """
    mine = torch.arange(process_index, len(images), num_processes)
    report = None
    if len(mine):
        options = {"num_samples": num_samples, "batch_size": batch_size, "importance_samples": importance_samples}
        report = latent_report(model, images.images[mine], seed=seed + process_index, **options)
    return combined_result(report, mine, images, num_processes)


def latent_samples(
    model: LatentModel, num_images: int, *, seed: int, batch_size: int, num_inference_steps: int
) -> Tensor:
    """Sampled images as integer levels (N, C, H, W) on the CPU, the same for the same seed."""
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    if isinstance(model, LatentVDMPipeline):
        return draw_samples(model, num_images, num_inference_steps=num_inference_steps, **common)
    starts = range(0, num_images, batch_size)
    drawn = [
        model.sample(min(batch_size, num_images - start), generator=generator_for(seed, "samples", start)).cpu()
        for start in starts
    ]
    return torch.cat(drawn)


def latent_pictures(model: LatentModel, levels: Tensor, *, seed: int) -> dict[str, tuple[Tensor, int]]:
    """Integer images in rows, as name -> (images, columns): `reconstructions` below what they are of; `traversal`, one
    latent of a VAE changed in each row; `interpolations` of a diffusion prior's."""
    levels = levels[:16].long()
    count = min(8, len(levels))
    if isinstance(model, LatentVDMPipeline):
        levels = levels.to(model.vae.device)
        again = model.decode(model.encode(levels))
        generator = generator_for(seed, "interpolation")
        pairs = list(zip(levels[0::2].split(1), levels[1::2].split(1), strict=False))[:4]
        rows = [model.interpolate(a, b, count, generator=generator).cpu() for a, b in pairs]
        more = {"interpolations": (torch.cat(rows), count)} if rows else {}
    else:
        levels = levels.to(model.device)
        again, more = model.reconstruct(levels), {}
        if isinstance(model, VariationalAutoencoder):
            values = torch.linspace(-3, 3, 7).tolist()
            more = {"traversal": (model.latent_traversal(levels[:1], values).flatten(0, 1).cpu(), len(values))}
    both = [torch.cat(pair).cpu() for pair in zip(levels.split(count), again.split(count), strict=True)]
    return {"reconstructions": (torch.cat(both), count), **more}
