"""The network to train, from the arguments or from somebody's config."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from arguments import Arguments
from data import DataError, ImageSet
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from diffusion import make_scheduler
from torch import nn

from vdm_diffusers import AnalyticStartModel, VDMUNet2DModel, fit_analytic_start
from vdm_diffusers.models.fourier import FourierFeaturesUNet
from vdm_diffusers.models.labels import is_class_conditional, null_label, num_classes

_CLASSES = {
    c.__name__: c
    for c in (UNet2DModel, VDMUNet2DModel, FourierFeaturesUNet, DiTTransformer2DModel, AnalyticStartModel)
}
_SPIKE = 0.25  # of all pixels on one level: the network moves this level's odds by themselves
_MEASURED_IMAGES = 20_000  # that an analytic start's tables are taken from


def make_network(args: Arguments, images: ImageSet) -> ModelMixin:
    """A freshly initialised network that fits the images.

    Raises:
        DataError: the network of --model_config_name_or_path does not fit them, or labels are wanted and missing.
    """
    model = args.model
    channels, height, width = images.images.shape[1:]
    if model.class_conditional and images.labels is None:
        raise DataError("--class_conditional needs class labels: name their column with --label_column.")
    if model.pretrained_model_name_or_path is not None:
        return _from_config(model.pretrained_model_name_or_path, args, images, weights=True)
    if model.model_config_name_or_path is not None:
        return _from_config(model.model_config_name_or_path, args, images)
    exponents = model.fourier_exponents
    if exponents is None:  # the analytic start knows the levels already
        exponents = [] if model.analytic_start else octaves(images.num_levels)
    network = VDMUNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=3 * channels if model.analytic_start else channels,
        out_channels=_out_channels(args, channels, images),
        hidden_channels=model.hidden_channels,
        layers_per_block=model.layers_per_block,
        num_train_timesteps=args.diffusion.ddpm_num_steps,
        fourier_exponents=exponents,
        residual_connection=args.diffusion.prediction_type == "epsilon" and not model.analytic_start,
        add_attention=model.add_attention,
        attention_head_dim=model.attention_head_dim,
        num_class_embeds=images.num_classes if model.class_conditional else None,
        dropout=model.dropout,
        norm_num_groups=model.norm_num_groups,
    )
    return _with_analytic_start(network, args, images) if model.analytic_start else network


def _with_analytic_start(network: ModelMixin, args: Arguments, images: ImageSet) -> AnalyticStartModel:
    """`network` inside the analytic denoiser of the training images."""
    diffusion, scheduler = args.diffusion, make_scheduler(args.diffusion)
    if scheduler.timeline.entries is None and diffusion.path == "vp":  # log SNR is linear in the network's timestep
        timesteps = [-1.0, diffusion.ddpm_num_steps - 1.0]
        log_snr = [diffusion.log_snr_max, diffusion.log_snr_min]
    else:
        timesteps = [float(step) for step in range(diffusion.ddpm_num_steps)]
        log_snr = scheduler.log_snr(torch.tensor(timesteps, dtype=torch.float64)).clamp(-30, 30).tolist()
    generator = torch.Generator().manual_seed(args.optimization.seed)
    chosen = torch.randperm(len(images), generator=generator)[:_MEASURED_IMAGES]
    return fit_analytic_start(
        network,
        images.images[chosen],
        knots=timesteps,
        log_snr=log_snr,
        num_levels=args.data.num_levels or images.num_levels,
        pixel_encoding=diffusion.pixel_encoding,
        prediction_type=diffusion.prediction_type,
        path=diffusion.path,
    )


def octaves(num_levels: int) -> list[float]:
    """1, 2, ..., log2 of the number of levels, rounded up: from the whole range of pixels down to the distance of two
    levels.
    """
    return [float(n) for n in range(1, max(1, math.ceil(math.log2(num_levels))) + 1)]


def no_class_label(network: ModelMixin, images: ImageSet) -> int | None:
    """The label that means "no class" while training: the network's own, or its last one if no image has it; else
    None.
    """
    own, classes = null_label(network), num_classes(network)
    return own if own is not None or classes is None or classes <= (images.num_classes or 0) else classes - 1


def compile_network(network: nn.Module, device: torch.device, num_pixels: int) -> None:
    """torch.compile, in place.

    On a CPU PyTorch's fused attention takes longer than what the compiler makes of matrix products and a softmax (in
    bf16; in float32 as long). These keep the matrix of N x N weights for N pixels, so small images alone get them. The
    weights and the function are the same.
    """
    if device.type == "cpu" and num_pixels <= 32 * 32:
        for module in network.modules():
            if isinstance(module, Attention) and isinstance(module.processor, AttnProcessor2_0):
                module.set_processor(AttnProcessor())
    network.compile()


def _out_channels(args: Arguments, channels: int, images: ImageSet) -> int:
    if args.model.analytic_start:
        levels = images.images[: _MEASURED_IMAGES // 10].flatten().long()
        share = float(levels.bincount().max()) / len(levels)
        return (3 if share > _SPIKE and (args.data.num_levels or images.num_levels) > 2 else 2) * channels
    return channels if args.diffusion.variance_type == "fixed_small" else 2 * channels


def _from_config(source: str, args: Arguments, images: ImageSet, *, weights: bool = False) -> ModelMixin:
    """The network of a config, made afresh or with its weights."""
    path = Path(source)
    asked = f"--{'pretrained_model' if weights else 'model_config'}_name_or_path {source}"
    subfolder = None
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        else:
            subfolder = "unet" if (path / "unet" / "config.json").is_file() else None
            config = UNet2DModel.load_config(source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise DataError(f"{asked} cannot be read: {str(error).splitlines()[0]}") from error
    name = config.get("_class_name", "UNet2DModel")
    if name not in _CLASSES:
        raise DataError(f"{asked} is of a {name}; this script trains {' or '.join(_CLASSES)}.")
    if weights:
        if path.is_file():
            raise DataError(f"{asked} is a file: the folder that holds config and weights is wanted.")
        try:
            network = _CLASSES[name].from_pretrained(source, subfolder=subfolder, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{asked} cannot be loaded: {str(error).splitlines()[0]}") from error
    else:
        network = _CLASSES[name].from_config(config)
    channels, height, width = images.images.shape[1:]
    start = args.model.analytic_start
    takes = 3 * channels if start else channels
    returns = _out_channels(args, channels, images)
    wanted = (
        f" (with --analytic_start it takes 3 for each of theirs and returns {returns // channels})" if start else ""
    )
    size = network.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size or (height, width))
    problems = [
        (
            network.config.in_channels != takes,
            f"takes {network.config.in_channels} channels, not {takes}: the images have {channels}{wanted}",
        ),
        (
            (network.config.out_channels or channels) != returns,
            f"returns {network.config.out_channels or channels} channels, not {returns}{wanted}",
        ),
        (size != (height, width), f"has sample_size {size}, the images {(height, width)} (see --resolution)"),
        (
            name == "VDMUNet2DModel" and network.config.num_train_timesteps != args.diffusion.ddpm_num_steps,
            f"has num_train_timesteps {network.config.get('num_train_timesteps')}, --ddpm_num_steps is "
            f"{args.diffusion.ddpm_num_steps}",
        ),
        (
            is_class_conditional(network) != args.model.class_conditional,
            "must have classes if --class_conditional is given, else none (a DiT: num_embeds_ada_norm 1)",
        ),
        (
            args.model.class_conditional and (num_classes(network) or 0) < (images.num_classes or 0),
            f"has {num_classes(network)} classes, the data {images.num_classes}",
        ),
        (
            args.model.class_dropout > 0 and no_class_label(network, images) is None,
            "has no label left for 'no class', which --class_dropout needs: give it "
            f"{(images.num_classes or 0) + 1} classes",
        ),
    ]
    found = [text for wrong, text in problems if wrong]
    if found:
        raise DataError(f"the network of {asked} {'; and '.join(found)}.")
    return _with_analytic_start(network, args, images) if start else network
