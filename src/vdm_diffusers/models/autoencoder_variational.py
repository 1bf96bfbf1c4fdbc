"""A variational autoencoder for images of integer levels: the hierarchy of one layer, and the encoder of latent
diffusion.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_diffusers.decoders import (
    PixelEncoding,
    bernoulli_log_likelihood,
    bin_width,
    decode_pixels,
    discretized_gaussian_log_likelihood,
    discretized_logistic_log_likelihood,
    encode_pixels,
)
from vdm_diffusers.elbo_forms import (
    Form,
    HierarchicalBound,
    Hierarchy,
    Normal,
    hierarchical_bound,
    multi_sample_bound,
)
from vdm_diffusers.models.calling import in_own_dtype
from vdm_diffusers.numerics import at_least_float32, noise_like
from vdm_diffusers.safety import check_model

Likelihood = Literal["discretized_logistic", "discretized_gaussian", "bernoulli"]
LIKELIHOODS: tuple[str, ...] = get_args(Likelihood)


class VariationalAutoencoder(ModelMixin, ConfigMixin):
    r"""A VAE with a likelihood of integers: q(z | x) and p(z) Gaussian, p(k | z) discretised logistic or Gaussian, or
    Bernoulli.

        -ln p(k) <= E_q(z|x)[-ln p(k | z)] + KL(q(z | x) || N(0, I))

    Encoder and decoder are convolutional residual networks. The latents are `(latent_channels, H / f, W / f)` with
    `f = 2^(len(block_out_channels) - 1)`; enough blocks bring them down to one pixel, a plain vector.

    `encode` and `decode` answer as those of Diffusers' `AutoencoderKL` do (`.latent_dist`, `.sample`), so that
    pipelines written for it take this one. Inputs of `encode` are in [-1, 1] by `pixel_encoding`; `levels` are
    integers.

    Args:
        sample_size: height and width of the images, multiples of f.
        in_channels: of the images.
        latent_channels: of the latents.
        block_out_channels: width at every resolution, from the finest on; each but the last is followed by halving.
        layers_per_block: ResNet blocks at every resolution.
        norm_num_groups: of every GroupNorm; divides all widths.
        likelihood: `"discretized_logistic"` or `"discretized_gaussian"` (mean and scale of every pixel by the
            decoder), or `"bernoulli"` for two levels.
        num_levels, pixel_encoding: of the images; see `vdm_diffusers.decoders`.
        scaling_factor, shift_factor: latents for another model's use are `(z - shift_factor) scaling_factor`, as in
            Diffusers' `AutoencoderKL`; nothing in here applies them.
        dropout: in the residual blocks, while training.

    Raises:
        ValueError: sizes that do not divide as said, an unknown likelihood, or Bernoulli with other than two levels.

    Source: Kingma & Welling 2014, "Auto-encoding variational Bayes"; Rezende et al. 2014.
    """

    __module__ = "vdm_diffusers"

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        likelihood: Likelihood = "discretized_logistic",
        num_levels: int = 256,
        pixel_encoding: PixelEncoding = "bin_center",
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder, self.decoder = image_networks(self.config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> VariationalAutoencoder:
        """Load from a folder or the Hub, as [`ModelMixin.from_pretrained`] does, once the files have been looked over.

        Raises:
            UnsafeCheckpointError (a ValueError): the checkpoint is damaged, hostile, or contradicts itself.
        """
        folder, kwargs = check_model(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(folder, **kwargs)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of one image."""
        return latent_shape(self.config.latent_channels, self.config.sample_size, self.config.block_out_channels)

    # --- the interface of Diffusers' autoencoders --------------------------------------------------------------------

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """q(z | x) of images in [-1, 1], `(B, C, H, W)`, as `.latent_dist` with `.mean`, `.std`, `.sample()`,
        `.mode()`.
        """
        posterior = self._posterior(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """The most likely image in [-1, 1] given latents `(B, latent_channels, h, w)`, as `.sample`, not rounded to
        levels.
        """
        sample = self._mean(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Encode and decode images in [-1, 1], from the posterior's mode or from a sample of it."""
        posterior = self._posterior(sample)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(in_own_dtype(self.encoder, x))

    def _mean(self, z: Tensor) -> Tensor:
        parameters = in_own_dtype(self.decoder, z)
        if self.config.likelihood != "bernoulli":
            return parameters.chunk(2, dim=1)[0]
        low, high = encode_pixels(torch.tensor([0, 1]), 2, self.config.pixel_encoding).tolist()
        return low + (high - low) * torch.sigmoid(parameters)  # p(k = 1), between the values of the two levels

    # --- the bound ---------------------------------------------------------------------------------------------------

    def log_likelihood(self, levels: Tensor, z: Tensor) -> Tensor:
        """ln p(k | z) of integer images `(B, C, H, W)`: (B,) nats."""
        return parameters_log_likelihood(
            levels,
            in_own_dtype(self.decoder, z),
            self.config.likelihood,
            self.config.num_levels,
            self.config.pixel_encoding,
        )

    def hierarchy(self) -> Hierarchy:
        """The model as a Markovian hierarchy of one layer."""

        def encode(layer: int, x: Tensor) -> Normal:
            distribution = self._posterior(x)
            return Normal(distribution.mean, distribution.var)

        def decode(layer: int, z: Tensor) -> Normal:
            raise ValueError("a VAE has one layer: its decoder is the likelihood.")

        return Hierarchy(1, encode, decode)

    def bound(
        self, levels: Tensor, *, form: Form = "consistency", generator: torch.Generator | None = None
    ) -> HierarchicalBound:
        """The ELBO's terms for integer images `(B, C, H, W)` from one draw of the encoder, each (B,) in nats.

        Args:
            form: `"consistency"`: the KL divergence in closed form; `"log_ratio"`: by Monte Carlo, from the same draw.
        """
        return hierarchical_bound(*self._bound_arguments(levels), form=form, generator=generator)

    def importance_weighted_bound(
        self, levels: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The bound of `num_samples` draws, (B,) nats. See `elbo_forms.multi_sample_bound`."""
        return multi_sample_bound(*self._bound_arguments(levels), num_samples, generator=generator)

    def _bound_arguments(self, levels: Tensor) -> tuple[Hierarchy, Tensor, Callable[[Tensor], Tensor]]:
        x = encode_pixels(levels, self.config.num_levels, self.config.pixel_encoding, at_least_float32(self.dtype))
        return self.hierarchy(), x, lambda z: self.log_likelihood(levels, z)

    # --- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, levels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Integer images through the encoder's mean (with `generator`: a draw) and back, `(B, C, H, W)` int64."""
        x = encode_pixels(levels, self.config.num_levels, self.config.pixel_encoding, at_least_float32(self.dtype))
        posterior = self._posterior(x)
        z = posterior.mode() if generator is None else posterior.sample(generator=generator)
        return self.decode_levels(z)

    @torch.no_grad()
    def sample(self, num_images: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Images of the model: the most likely levels given z ~ N(0, I), `(num_images, C, H, W)` int64."""
        like = torch.empty(num_images, *self.latent_shape, device=self.device, dtype=at_least_float32(self.dtype))
        return self.decode_levels(noise_like(like, generator))

    @torch.no_grad()
    def latent_traversal(
        self, levels: Tensor, values: Sequence[float], dimensions: Sequence[int] | None = None
    ) -> Tensor:
        """One image decoded with one latent dimension at a time set to each of `values`.

        Args:
            levels: `(1, C, H, W)`, the image whose mean latents are the starting point.
            values: in standard deviations of the prior.
            dimensions: flat indices of latents; `None`: the eight which the posterior has narrowed down most.
        Returns:
            `(len(dimensions), len(values), C, H, W)` int64.
        """
        x = encode_pixels(levels, self.config.num_levels, self.config.pixel_encoding, at_least_float32(self.dtype))
        posterior = self._posterior(x)
        if dimensions is None:
            dimensions = posterior.std.flatten().argsort()[:8].tolist()
        rows = []
        for dimension in dimensions:
            z = posterior.mean.repeat(len(values), 1, 1, 1)
            z.view(len(values), -1)[:, dimension] = torch.tensor(list(values)).to(z)
            rows.append(self.decode_levels(z))
        return torch.stack(rows)

    def decode_levels(self, z: Tensor) -> Tensor:
        """The decoder's most likely image (of its means) in integer levels, int64."""
        return decode_pixels(self._mean(z), self.config.num_levels, self.config.pixel_encoding)


def parameters_log_likelihood(
    levels: Tensor, parameters: Tensor, likelihood: Likelihood, num_levels: int, pixel_encoding: PixelEncoding
) -> Tensor:
    """ln p(k | parameters) of a decoder's output `(B, C or 2 C, H, W)`: mean and raw log scale, or logits.

    (B,) nats.
    """
    if likelihood == "bernoulli":
        return bernoulli_log_likelihood(levels, parameters)
    mean, raw = parameters.chunk(2, dim=1)
    # At a twentieth of a bin all mass lies in one: a narrower scale gains nothing, and its gradient explodes.
    scale = bin_width(num_levels, pixel_encoding) / 20 + F.softplus(raw)
    if likelihood == "discretized_logistic":
        return discretized_logistic_log_likelihood(
            levels, mean, scale, num_levels=num_levels, pixel_encoding=pixel_encoding
        )
    return discretized_gaussian_log_likelihood(
        levels, mean, scale**2, num_levels=num_levels, pixel_encoding=pixel_encoding
    )


def num_parameters(likelihood: Likelihood) -> int:
    """Output channels of a decoder for each channel of the image."""
    return 1 if likelihood == "bernoulli" else 2


def check_likelihood(likelihood: str, num_levels: int) -> None:
    """Raise ValueError for an unknown likelihood, or Bernoulli with more than two levels."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"`likelihood` must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}.")
    if likelihood == "bernoulli" and num_levels != 2:
        raise ValueError(
            f"`likelihood='bernoulli'` is for `num_levels=2`, got {num_levels}: take 'discretized_logistic'."
        )


def check_sizes(sample_size: int | Sequence[int], block_out_channels: Sequence[int], norm_num_groups: int) -> None:
    """Raise ValueError unless the image can be halved between all blocks, and the groups divide the widths."""
    size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    factor = 2 ** (len(block_out_channels) - 1)
    if not block_out_channels or any(n < factor or n % factor for n in size):
        raise ValueError(
            f"`sample_size` must be a multiple of {factor} for {len(block_out_channels)} blocks, got {sample_size}."
        )
    if any(width % norm_num_groups for width in block_out_channels):
        raise ValueError(
            f"`norm_num_groups` must divide all widths, got {norm_num_groups} and {list(block_out_channels)}."
        )


def latent_shape(
    channels: int, sample_size: int | Sequence[int], block_out_channels: Sequence[int]
) -> tuple[int, int, int]:
    """(channels, H / f, W / f), f = 2^(blocks - 1)."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    factor = 2 ** (len(block_out_channels) - 1)
    return (channels, height // factor, width // factor)


def image_networks(config: Mapping[str, Any]) -> tuple[ConvEncoder, ConvDecoder]:
    """Encoder and decoder between images and latents, from the arguments that VAE and hierarchical VAE share.

    Raises:
        ValueError: sizes that do not divide, an unknown likelihood, or Bernoulli with other than two levels.
    """
    widths, groups = tuple(config["block_out_channels"]), config["norm_num_groups"]
    check_sizes(config["sample_size"], widths, groups)
    check_likelihood(config["likelihood"], config["num_levels"])
    latents, outputs = config["latent_channels"], config["in_channels"] * num_parameters(config["likelihood"])
    sizes = (widths, config["layers_per_block"], groups, config["dropout"])
    encoder = ConvEncoder(config["in_channels"], 2 * latents, *sizes)
    # Latents that are mostly noise at first are soon ignored for good: a narrow posterior lets the decoder notice
    # them.
    nn.init.constant_(encoder.get_parameter(f"{len(encoder) - 1}.bias")[latents:], -4.0)
    return encoder, ConvDecoder(latents, outputs, *sizes)


def zero_(layer: nn.Module) -> None:
    """Set all parameters to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the identity (or a 1x1 convolution) when newly made."""

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        zero_(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class ConvEncoder(nn.Sequential):
    """Images `(B, C, H, W)` to `(B, out_channels, H / f, W / f)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        dropout: float,
    ):
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        width = widths[0]
        for i, new_width in enumerate(widths):
            if i:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            for _ in range(layers_per_block):
                layers.append(ResnetBlock(width, new_width, norm_num_groups, dropout))
                width = new_width
        layers += [nn.GroupNorm(norm_num_groups, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1)]
        super().__init__(*layers)


class ConvDecoder(nn.Sequential):
    """Latents `(B, C, h, w)` to `(B, out_channels, f h, f w)`, the encoder in reverse."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        dropout: float,
    ):
        width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
        for i, new_width in enumerate(reversed(widths)):
            if i:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
            for _ in range(layers_per_block):
                layers.append(ResnetBlock(width, new_width, norm_num_groups, dropout))
                width = new_width
        layers += [nn.GroupNorm(norm_num_groups, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1)]
        super().__init__(*layers)
