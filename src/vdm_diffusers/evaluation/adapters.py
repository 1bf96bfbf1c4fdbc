"""Pipelines, networks and arguments of Diffusers' users, as the estimators of `vdm_diffusers.likelihood` take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vdm_diffusers.decoders import PIXEL_ENCODINGS, PixelEncoding
from vdm_diffusers.evaluation.images import check_size, data_ndim, load_images, load_labels
from vdm_diffusers.evaluation.latent_space import PromptedNetwork
from vdm_diffusers.likelihood import DenoisingModel
from vdm_diffusers.models.calling import call_network, device_and_dtype
from vdm_diffusers.models.labels import num_classes
from vdm_diffusers.numerics import expand_to, linear_combination

_BATCH_ELEMENTS = 1 << 18  # of the default batch size: keeps the CPU's caches and a small GPU's memory in view


def prepare(
    network: Callable[..., Any],
    scheduler: Any,
    images: Any,
    class_labels: Any,
    num_levels: int | None,
    pixel_encoding: PixelEncoding,
    model_kwargs: dict[str, Any] | None,
    batch_size: int | None,
    learned: Literal["learned", "learned_range"] | None,
    clip_denoised: bool,
) -> tuple[Tensor, DenoisingModel, torch.device, int]:
    """The images as integers, the network as the core calls it, its device, and how many evaluations to do at a
    time.
    """
    if not isinstance(network, PromptedNetwork):  # which is told what the pipeline tells it
        check_kwargs(model_kwargs)
    levels, labels = load_images(images, class_labels, num_levels, data_ndim(network))
    check_size(network, levels)
    if class_labels is None and num_classes(network) is None:
        labels = None  # those that came with the images mean nothing to the network
    labels = load_labels(network, labels, len(levels))
    device, _ = device_and_dtype(network)
    if batch_size is None:
        batch_size = max(1, min(512, _BATCH_ELEMENTS // levels[0].numel()))
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    denoiser = DenoisingModel(
        predict=Predictor(network, scheduler, device, labels, model_kwargs or {}, len(levels)),
        prediction_type=scheduler.timeline.on_vp(torch.zeros(1).double(), scheduler.config.prediction_type)[0],
        num_levels=num_levels,
        pixel_encoding=pixel_encoding,
        learned_variance=learned,
        clip_denoised=clip_denoised,
    )
    return levels, denoiser, device, batch_size


def unpack(
    model: Any, scheduler: Any, num_levels: int | str | None, pixel_encoding: str
) -> tuple[Callable[..., Any], Any, int | None, PixelEncoding]:
    """Network, scheduler, levels and encoding of a pipeline or of a model with its scheduler."""
    components = getattr(model, "components", None)
    own: dict[str, Any] = {"num_levels": 256, "pixel_encoding": "bin_center"}
    if isinstance(components, dict):
        latent = [name for name in ("vae", "vqvae", "movq", "prior_prior") if components.get(name) is not None]
        if latent:
            raise ValueError(
                f"`model` is a {type(model).__name__} with `{latent[0]}`, a model of latents. The likelihood of "
                "pixels under it would need "
                "the autoencoder's own likelihood: a pixel decoder on latents gives a number that means nothing. For "
                "the likelihood of the "
                "latents, in nats, pass space='latent'."
            )
        if components.get("unet") is None:
            raise ValueError(
                f"`model`, a {type(model).__name__}, has no `unet`. Pass the network itself, with `scheduler`."
            )
        scheduler = components.get("scheduler") if scheduler is None else scheduler
        if "num_levels" in model.config and "pixel_encoding" in model.config:
            own = {"num_levels": model.config.num_levels, "pixel_encoding": model.config.pixel_encoding}
            if num_levels not in ("auto", own["num_levels"]):
                raise ValueError(
                    f"`num_levels` must be the pipeline's own, {own['num_levels']}, got {num_levels}: its decoder has "
                    "as many. "
                    "Leave it out."
                )
        else:
            own["pixel_encoding"] = "endpoint"
        model = components["unet"]
    if scheduler is None:
        raise ValueError("`scheduler` is needed with a model that is no pipeline: what the model was trained with.")
    if not callable(model):
        raise ValueError(f"`model` must be a pipeline or a callable (sample, timestep), got {type(model).__name__}.")
    levels = own["num_levels"] if num_levels == "auto" else num_levels
    encoding = own["pixel_encoding"] if pixel_encoding == "auto" else pixel_encoding
    if levels is not None and (not isinstance(levels, int) or isinstance(levels, bool) or levels < 2):
        raise ValueError(
            f"`num_levels` must be a whole number of at least 2 (None for continuous data), got {levels!r}."
        )
    if encoding not in PIXEL_ENCODINGS:
        raise ValueError(f"`pixel_encoding` must be one of {', '.join(PIXEL_ENCODINGS)}, got {encoding!r}.")
    return model, scheduler, levels, cast(PixelEncoding, encoding)


class Predictor:
    """The network as the estimators call it: (z_t, log_snr, index of the images) -> output.

    The estimators' z_t is the variance-preserving path's. A network of another path gets it rescaled to its own, and
    its output is made one of that path: every path is the same Gaussian diffusion in other units (`timelines`).
    """

    def __init__(
        self,
        network: Callable[..., Any],
        scheduler: Any,
        device: torch.device,
        labels: Tensor | None,
        model_kwargs: dict[str, Any],
        num_images: int,
    ):
        self.network, self.scheduler, self.device = network, scheduler, device
        self.per_image = {} if labels is None else {"class_labels": labels.to(device)}
        self.shared: dict[str, Any] = {}
        for name, value in model_kwargs.items():
            if isinstance(value, Tensor) and value.ndim and len(value) in (1, num_images):
                self.per_image[name] = value.to(device).expand(num_images, *value.shape[1:])
            else:
                self.shared[name] = value

    def __call__(self, z_t: Tensor, log_snr: Tensor, index: Tensor) -> Tensor:
        arguments = {name: value[index.to(self.device)] for name, value in self.per_image.items()}
        timeline = self.scheduler.timeline
        timestep = timeline.timestep(log_snr)
        if timeline.path == "vp":
            return call_network(self.network, z_t, timestep, **arguments, **self.shared)
        scaled = z_t * expand_to(timeline.input_scale(log_snr).to(z_t), z_t)
        output = call_network(self.network, scaled, timestep, **arguments, **self.shared)
        _, from_z, from_output = timeline.on_vp(log_snr, self.scheduler.config.prediction_type)
        return linear_combination(from_z, z_t, from_output, output)


@contextmanager
def eval_mode(network: Callable[..., Any]) -> Iterator[None]:
    modes = {m: m.training for m in network.modules()} if isinstance(network, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_kwargs(model_kwargs: dict[str, Any] | None) -> None:
    guidance = [name for name in model_kwargs or {} if "guidance" in name]
    if guidance:
        raise ValueError(
            f"`model_kwargs` holds {guidance[0]!r}. Guidance changes the samples, not the likelihood that the model "
            "was trained for: "
            "the guided network's bound is of another, unnormalised model."
        )
