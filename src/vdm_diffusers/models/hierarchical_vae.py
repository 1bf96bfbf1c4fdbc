"""The Markovian hierarchical VAE: a chain of latents above the image; restricted in three ways it is a diffusion
model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_diffusers.decoders import PixelEncoding, decode_pixels, encode_pixels, softmax_log_likelihood
from vdm_diffusers.elbo_forms import (
    Form,
    HierarchicalBound,
    Hierarchy,
    Normal,
    diffusion_hierarchy,
    hierarchical_bound,
    multi_sample_bound,
    sample_hierarchy,
)
from vdm_diffusers.gaussian import alpha_sigma
from vdm_diffusers.models.autoencoder_variational import (
    Likelihood,
    ResnetBlock,
    check_sizes,
    image_networks,
    latent_shape,
    num_parameters,
    parameters_log_likelihood,
    zero_,
)
from vdm_diffusers.models.calling import in_own_dtype
from vdm_diffusers.numerics import at_least_float32, noise_like
from vdm_diffusers.prediction import convert
from vdm_diffusers.safety import check_model

KEEP = math.sqrt(0.5)  # of a latent, in the next one, when newly made
MIN_FACTOR = 1e-4  # nowhere is a variance so small that its density explodes


class HierarchicalVAE(ModelMixin, ConfigMixin):
    r"""A Markovian hierarchical VAE of L layers for images of integer levels.

        q(z_1..L | x) = prod_l q(z_l | z_{l-1})        p(k, z_1..L) = N(z_L; 0, I) prod_{l>1} p(z_{l-1} | z_l)  p(k |
        z_1)

    Encoder and decoder are learned, every layer with networks of its own; all latents have the shape of the first,
    `(latent_channels, H / f, W / f)` with `f = 2^(len(block_out_channels) - 1)`. One layer is a
    `VariationalAutoencoder`.

    With `encoder_log_snrs` the three restrictions apply that make a hierarchy a diffusion model: latents have the size
    of the image, the encoder is the fixed linear Gaussian of the given log SNRs, and the last latent is standard
    normal. Then p(z_{l-1} | z_l) = q(z_{l-1} | z_l, x = x_hat(z_l)), with a network for each layer that predicts the
    noise, p(k | z_1) is VDM's softmax, and the same `bound` is the discrete ELBO of a diffusion model of L - 1 steps,
    term by term.

    Args:
        sample_size: height and width of the images, multiples of f.
        in_channels: of the images.
        num_layers: L.
        latent_channels: of every latent.
        block_out_channels, layers_per_block, norm_num_groups: of the networks between image and z_1, as in
            [`VariationalAutoencoder`]; the networks between latents have the last of the widths.
        likelihood: p(k | z_1), as in [`VariationalAutoencoder`].
        num_levels, pixel_encoding: of the images.
        encoder_log_snrs: L decreasing log SNRs: the restricted hierarchy, to which `latent_channels` and `likelihood`
            do not apply and in which nothing is downsampled.
        dropout: in the residual blocks, while training.

    Raises:
        ValueError: sizes that do not divide, an unknown likelihood, or another number of log SNRs than layers.

    Source: Luo 2022, "Understanding Diffusion Models: A Unified Perspective", the sections on hierarchical VAEs and on
    variational diffusion models; Sønderby et al. 2016, "Ladder variational autoencoders" (the chain as baseline).
    """

    __module__ = "vdm_diffusers"

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        num_layers: int = 2,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        likelihood: Likelihood = "discretized_logistic",
        num_levels: int = 256,
        pixel_encoding: PixelEncoding = "bin_center",
        encoder_log_snrs: Sequence[float] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {num_layers}.")
        widths = tuple(block_out_channels)
        above = range(2, num_layers + 1)
        if encoder_log_snrs is not None:
            if len(encoder_log_snrs) != num_layers:
                raise ValueError(
                    f"`encoder_log_snrs` must be one for each of the {num_layers} layers, got {len(encoder_log_snrs)}."
                )
            check_sizes(sample_size, widths[-1:], norm_num_groups)
            self.decoders = nn.ModuleDict(
                {str(i): LatentNetwork(in_channels, in_channels, widths[-1], norm_num_groups, dropout) for i in above}
            )
            return
        self.encoder, self.decoder = image_networks(self.config)
        self.encoders, self.decoders = (
            nn.ModuleDict(
                {
                    str(i): LatentNetwork(latent_channels, 2 * latent_channels, widths[-1], norm_num_groups, dropout)
                    for i in above
                }
            )
            for _ in range(2)
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> HierarchicalVAE:
        """Load from a folder or the Hub, as [`ModelMixin.from_pretrained`] does, once the files have been looked over.

        Raises:
            UnsafeCheckpointError (a ValueError): the checkpoint is damaged, hostile, or contradicts itself.
        """
        folder, kwargs = check_model(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(folder, **kwargs)

    @property
    def is_diffusion(self) -> bool:
        """Whether the three restrictions apply."""
        return self.config.encoder_log_snrs is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every latent of one image."""
        if self.is_diffusion:
            return latent_shape(self.config.in_channels, self.config.sample_size, [1])
        return latent_shape(self.config.latent_channels, self.config.sample_size, self.config.block_out_channels)

    def hierarchy(self) -> Hierarchy:
        """The model's encoder and decoder as `elbo_forms` takes them."""
        if self.is_diffusion:
            return diffusion_hierarchy(self.config.encoder_log_snrs, self._denoise)

        def encode(layer: int, z: Tensor) -> Normal:
            if layer == 1:
                posterior = DiagonalGaussianDistribution(in_own_dtype(self.encoder, z))
                return Normal(posterior.mean, posterior.var)
            return _conditional(self.encoders[str(layer)], z)

        return Hierarchy(self.config.num_layers, encode, lambda layer, z: _conditional(self.decoders[str(layer)], z))

    def log_likelihood(self, levels: Tensor, z: Tensor) -> Tensor:
        """ln p(k | z_1) of integer images `(B, C, H, W)`: (B,) nats."""
        if self.is_diffusion:
            return softmax_log_likelihood(
                levels,
                z,
                self.config.encoder_log_snrs[0],
                num_levels=self.config.num_levels,
                pixel_encoding=self.config.pixel_encoding,
            )
        return parameters_log_likelihood(
            levels,
            in_own_dtype(self.decoder, z),
            self.config.likelihood,
            self.config.num_levels,
            self.config.pixel_encoding,
        )

    def bound(
        self, levels: Tensor, *, form: Form | None = None, generator: torch.Generator | None = None
    ) -> HierarchicalBound:
        """The ELBO's terms, layer by layer, from one draw of the encoder, each (B,) in nats.

        Args:
            levels: `(B, C, H, W)` integers.
            form: see `vdm_diffusers.elbo_forms`; `None`: `"matching"` where the encoder can be inverted, else
                `"consistency"`.
        """
        form = form or ("matching" if self.is_diffusion else "consistency")
        return hierarchical_bound(*self._bound_arguments(levels), form=form, generator=generator)

    def importance_weighted_bound(
        self, levels: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The bound of `num_samples` draws, (B,) nats. See `elbo_forms.multi_sample_bound`."""
        return multi_sample_bound(*self._bound_arguments(levels), num_samples, generator=generator)

    def forward(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The bound on -ln p of integer images `(B, C, H, W)`: (B,) nats. (What data-parallel wrappers call.)"""
        return self.bound(levels, generator=generator).nats

    @torch.no_grad()
    def sample(self, num_images: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Images of the model: the most likely levels given a draw of z_1, `(num_images, C, H, W)` int64."""
        like = torch.empty(num_images, *self.latent_shape, device=self.device, dtype=at_least_float32(self.dtype))
        z = sample_hierarchy(self.hierarchy(), noise_like(like, generator), generator=generator)
        return self.decode_levels(z)

    @torch.no_grad()
    def reconstruct(self, levels: Tensor) -> Tensor:
        """Integer images to the mean of q(z_1 | x) and back, int64."""
        return self.decode_levels(self.hierarchy().encode(1, self._encoded(levels)).mean)

    def decode_levels(self, z: Tensor) -> Tensor:
        """The most likely image (of the decoder's means) given z_1, in integer levels."""
        if self.is_diffusion:
            x = z / float(alpha_sigma(self.config.encoder_log_snrs[0])[0])
        else:
            x = in_own_dtype(self.decoder, z).chunk(num_parameters(self.config.likelihood), dim=1)[0]
            if self.config.likelihood == "bernoulli":
                return (x > 0).long()
        return decode_pixels(x, self.config.num_levels, self.config.pixel_encoding)

    def _denoise(self, z: Tensor, log_snr: Tensor) -> Tensor:
        layer = self.config.encoder_log_snrs.index(float(log_snr)) + 1
        eps_hat = z + in_own_dtype(self.decoders[str(layer)], z)
        return convert(eps_hat, z, log_snr, source="epsilon", target="sample")

    def _encoded(self, levels: Tensor) -> Tensor:
        return encode_pixels(levels, self.config.num_levels, self.config.pixel_encoding, at_least_float32(self.dtype))

    def _bound_arguments(self, levels: Tensor) -> tuple[Hierarchy, Tensor, Callable[[Tensor], Tensor]]:
        return self.hierarchy(), self._encoded(levels), lambda z: self.log_likelihood(levels, z)


class LatentNetwork(nn.Sequential):
    """Two ResNet blocks between latents of one resolution; zero when newly made."""

    def __init__(self, in_channels: int, out_channels: int, width: int, norm_num_groups: int, dropout: float):
        last = nn.Conv2d(width, out_channels, 3, padding=1)
        zero_(last)
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            ResnetBlock(width, width, norm_num_groups, dropout),
            ResnetBlock(width, width, norm_num_groups, dropout),
            nn.GroupNorm(norm_num_groups, width),
            nn.SiLU(),
            last,
        )


def _conditional(network: nn.Module, z: Tensor) -> Normal:
    """N(keep z + change, (1 - keep^2) factor), where a new network gives change 0 and factor 1.

    Used in both directions, a new layer is reversible: N(z_{l-1}; 0, I) q(z_l | z_{l-1}) = N(z_l; 0, I) p(z_{l-1} |
    z_l). Its part of the bound's log ratio cancels for every draw, so that a deep chain starts as a VAE does, without
    even its noise.
    """
    change, raw = in_own_dtype(network, z).chunk(2, dim=1)
    factor = MIN_FACTOR + F.softplus(raw + math.log(math.expm1(1 - MIN_FACTOR)))
    return Normal(KEEP * z + change, (1 - KEEP**2) * factor)
