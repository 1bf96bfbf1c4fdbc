"""The pipeline of latent diffusion with a likelihood: a VAE whose prior is a variational diffusion model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from vdm_diffusers.decoders import decode_pixels, discretized_logistic_log_likelihood, encode_pixels
from vdm_diffusers.elbo import Bound, continuous_weight, prior_kl, squared_error
from vdm_diffusers.elbo_forms import Normal
from vdm_diffusers.gaussian import alpha_sigma, diffuse
from vdm_diffusers.models.calling import call_network
from vdm_diffusers.numerics import at_least_float32, expand_to, noise_like
from vdm_diffusers.pipelines.checkpoint_mixin import CheckpointMixin
from vdm_diffusers.pipelines.images import levels_to_images
from vdm_diffusers.pipelines.pipeline_vdm import FORMAT_VERSION, OUTPUT_TYPES, VDMPipeline
from vdm_diffusers.prediction import convert
from vdm_diffusers.time_sampling import low_discrepancy


@dataclass(frozen=True, eq=False)
class LatentBound:
    """The joint bound on -ln p(k) of a VAE with a diffusion prior, every part (B,) in nats.

    Attributes:
        image: -ln p(k | z), of the integers given the latents.
        entropy: E ln q(y | x), the negative entropy of the encoder's scaled latents y, in closed form.
        latent: the three terms of the diffusion model's bound on -ln p(y).
    """

    image: Tensor
    entropy: Tensor
    latent: Bound

    @property
    def nats(self) -> Tensor:
        """The estimate of the joint bound, (B,)."""
        return self.image + self.entropy + self.latent.nats

    @property
    def terms(self) -> Bound:
        """As three terms: the prior's, the rest of what the latents cost (entropy included), and the image's."""
        rest = self.entropy + self.latent.diffusion + self.latent.reconstruction
        return Bound(prior=self.latent.prior, diffusion=rest, reconstruction=self.image)


class LatentVDMPipeline(CheckpointMixin, DiffusionPipeline):
    r"""A VAE with a variational diffusion model as the prior of its latents, and one bound in bits/dim of the image:

        -ln p(k) <= E_q(z|x)[ -ln p(k | z) + ln q(z | x) + L(z) ],   L(z) >= -ln p(z) the diffusion model's own bound.

    The diffusion model sees y = (z - shift_factor) scaling_factor, the VAE's own two factors; entropy and L are those
    of y, since the Jacobian stands in both and cancels. As y is continuous, the last step of the diffusion is decoded
    by p(y | z_0) = N(z_0 / alpha_0, sigma_0^2 / alpha_0^2).

    `bound` is differentiable in everything: train the VAE on its own first and then the prior (with
    `vae.requires_grad_(False)`), or both at once, the encoder through the prior's bound.

    Args:
        vae ([`VariationalAutoencoder`] or Diffusers' `AutoencoderKL`).
        unet ([`VDMUNet2DModel`] or [`UNet2DModel`]): of the latents' channels and size.
        scheduler ([`VDMScheduler`]): with a schedule given in log SNR.
        num_levels, pixel_encoding: of the images, as in [`VDMPipeline`]; `None`: the VAE's own, else 256 and
        `"endpoint"`. decoder_scale (`float`): an `AutoencoderKL` has no likelihood; with this scale it is a
            discretised logistic around the decoded image. See `fit_decoder_scale`.
        format_version (`int`): of the checkpoint's layout; leave it alone.

    Raises:
        ValueError: if the unet's channels are not the latents', the schedule is a table of betas, or levels or
            encoding contradict the VAE's.

    Source: Vahdat, Kreis & Kautz 2021, "Score-based generative modeling in latent space" (the joint bound); Rombach et
        al. 2022 (two stages); Kingma et al. 2021 (the prior).
    """

    __module__ = "vdm_diffusers"

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        vae: ModelMixin,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        num_levels: int | None = None,
        pixel_encoding: str | None = None,
        decoder_scale: float | None = None,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        own_levels, own_encoding = vae.config.get("num_levels"), vae.config.get("pixel_encoding")
        for name, given, own in (
            ("num_levels", num_levels, own_levels),
            ("pixel_encoding", pixel_encoding, own_encoding),
        ):
            if None not in (given, own) and given != own:
                raise ValueError(f"`{name}` must be the VAE's own, {own!r}, got {given!r}.")
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"`unet` must have as many channels as the VAE's latents, {vae.config.latent_channels}, got "
                f"{unet.config.in_channels}."
            )
        if not getattr(scheduler, "is_log_snr_schedule", False):
            raise ValueError(
                "`scheduler` must be a VDMScheduler with a schedule in log SNR, for instance "
                "beta_schedule='log_snr_linear': a "
                "table of betas ends at x_1, from where continuous latents have no density."
            )
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_levels=num_levels or own_levels or 256,
            pixel_encoding=pixel_encoding or own_encoding or "endpoint",
            decoder_scale=decoder_scale,
            format_version=format_version,
        )

    # --- the VAE's side ----------------------------------------------------------------------------------------------

    @property
    def scaling_factor(self) -> float:
        """What multiplies the VAE's latents: 1 for a VAE that does not say."""
        return self.vae.config.get("scaling_factor") or 1.0

    @property
    def shift_factor(self) -> float:
        """What is subtracted from the VAE's latents first: 0 for a VAE that does not say."""
        return self.vae.config.get("shift_factor") or 0.0

    def _posterior(self, levels: Tensor) -> Normal:
        """q(y | x), of the scaled latents."""
        x = encode_pixels(levels, self.config.num_levels, self.config.pixel_encoding).to(
            self.vae.device, self.vae.dtype
        )
        distribution = self.vae.encode(x).latent_dist
        dtype = at_least_float32(distribution.mean.dtype)
        mean = (distribution.mean.to(dtype) - self.shift_factor) * self.scaling_factor
        return Normal(mean, distribution.var.to(dtype) * self.scaling_factor**2)

    def _unscaled(self, y: Tensor) -> Tensor:
        return y / self.scaling_factor + self.shift_factor

    def encode(self, levels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Integer images `(B, C, H, W)` as scaled latents: the encoder's mean, or with `generator` a draw."""
        posterior = self._posterior(levels)
        return posterior.mean if generator is None else posterior.draw(noise_like(posterior.mean, generator))

    def _decoded(self, z: Tensor) -> Tensor:
        """The VAE's image of unscaled latents, computed in the VAE's dtype, in float32 or better."""
        sample = self.vae.decode(z.to(self.vae.dtype)).sample
        return sample.to(at_least_float32(sample.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents as integer images: the levels nearest to the decoded image, int64."""
        return decode_pixels(
            self._decoded(self._unscaled(latents)), self.config.num_levels, self.config.pixel_encoding
        )

    def log_likelihood(self, levels: Tensor, latents: Tensor) -> Tensor:
        """ln p(k | z) of integer images given scaled latents: (B,) nats.

        Raises:
            ValueError: for a VAE without a likelihood and no `decoder_scale`.
        """
        z = self._unscaled(latents)
        if "likelihood" in self.vae.config:
            return self.vae.log_likelihood(levels, z)
        if self.config.decoder_scale is None:
            raise ValueError(
                f"a {type(self.vae).__name__} has no likelihood of integers: pass `decoder_scale`, or call "
                "`fit_decoder_scale(images)`."
            )
        return self._logistic(levels, self._decoded(z), self.config.decoder_scale)

    def _logistic(self, levels: Tensor, mean: Tensor, scale: float) -> Tensor:
        return discretized_logistic_log_likelihood(
            levels, mean, scale, num_levels=self.config.num_levels, pixel_encoding=self.config.pixel_encoding
        )

    @torch.no_grad()
    def fit_latent_scale(self, levels: Tensor) -> None:
        """Set the VAE's `scaling_factor` and `shift_factor` so that the latents of these images have mean 0 and
        variance 1.
        """
        posterior = self._posterior(levels)
        z_mean, z_variance = (
            self._unscaled(posterior.mean).double(),
            posterior.variance.double() / self.scaling_factor**2,
        )
        deviation = float((z_mean.var() + z_variance.mean()).sqrt())
        self.vae.register_to_config(scaling_factor=1 / deviation, shift_factor=float(z_mean.mean()))

    @torch.no_grad()
    def fit_decoder_scale(self, levels: Tensor, *, generator: torch.Generator | None = None) -> float:
        """Set `decoder_scale` to what makes these images most likely given draws of their latents, and return it."""
        y = self.encode(levels, generator=generator or torch.Generator().manual_seed(0))
        mean = self._decoded(self._unscaled(y))
        scales = torch.logspace(math.log10(1e-2 / self.config.num_levels), 0, 60, dtype=torch.float64).tolist()
        best = max(scales, key=lambda scale: float(self._logistic(levels, mean, scale).mean()))
        self.register_to_config(decoder_scale=best)
        return best

    # --- the bound ---------------------------------------------------------------------------------------------------

    def bound(self, levels: Tensor, *, generator: torch.Generator | None = None) -> LatentBound:
        """An unbiased estimate of the joint bound from one draw of the latents, one time and one noise for each image.

        Differentiable in the VAE and the unet. The times are stratified over the batch.

        Args:
            levels: `(B, C, H, W)` integers.
        """
        posterior = self._posterior(levels)
        y = posterior.draw(noise_like(posterior.mean, generator))
        entropy = -0.5 * (posterior.variance.log() + math.log(2 * math.pi * math.e)).flatten(1).sum(1)
        latent = self.latent_bound(y, generator=generator)
        return LatentBound(image=-self.log_likelihood(levels, y), entropy=entropy, latent=latent)

    def latent_bound(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Bound:
        """The diffusion model's bound on -ln p(y) of scaled latents, a density: three terms, each (B,) in nats."""
        schedule = self.scheduler.noise_schedule
        t = low_discrepancy(len(latents), generator=generator)
        log_snr = schedule.log_snr(t)
        noise = noise_like(latents, generator)
        y_t = diffuse(latents, noise, log_snr)
        timestep = self.scheduler.timestep_from_log_snr(log_snr).to(latents.device, torch.float32)
        output = call_network(self.unet, y_t, timestep)
        eps_hat = convert(output, y_t, log_snr, source=self.scheduler.config.prediction_type, target="epsilon")
        error = squared_error(noise, eps_hat)
        # p(y | z_0) = N(z_0 / alpha_0, sigma_0^2 / alpha_0^2) at z_0 = alpha_0 y + sigma_0 eps: the expectation is a
        # constant
        reconstruction = 0.5 * latents[0].numel() * (math.log(2 * math.pi * math.e) - schedule.log_snr_max)
        return Bound(
            prior=prior_kl(latents, schedule.log_snr_min).to(error),
            diffusion=expand_to(continuous_weight(schedule.derivative(t)), error) * error,
            reconstruction=torch.full_like(error, reconstruction),
        )

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images. Arguments as in [`VDMPipeline`]; `output_type="latent"` returns the scaled latents y.

        Raises:
            ValueError: as in [`VDMPipeline`].
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        inner = VDMPipeline(self.unet, self.scheduler)
        inner.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        (z_0,) = inner(
            batch_size, num_inference_steps, class_labels, latents, generator, output_type="latent", return_dict=False
        )
        y = self._clean(z_0)
        images = (
            y if output_type == "latent" else levels_to_images(self.decode(y), self.config.num_levels, output_type)
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        num_images: int = 8,
        *,
        noise_level: float = 0.0,
        num_inference_steps: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images on the way from one image to another: `(num_images, C, H, W)` integer levels.

        Latents are mixed linearly. With `noise_level` > 0 the mixtures are noised (all by the same noise) to that
        share of the grid and denoised again, which draws them back to where the prior has its mass (Ho et al. 2020,
        figure 8).

        Args:
            first, second: `(1, C, H, W)` integers.
            noise_level: in [0, 1].
        Raises:
            ValueError: a noise_level outside of [0, 1].
        """
        if not 0 <= noise_level <= 1:
            raise ValueError(f"`noise_level` must lie in [0, 1], got {noise_level}.")
        weight = torch.linspace(0, 1, num_images, device=self.vae.device, dtype=self.vae.dtype).view(-1, 1, 1, 1)
        y = (1 - weight) * self.encode(first) + weight * self.encode(second)
        self.scheduler.set_timesteps(num_inference_steps, device=y.device)
        timesteps = self.scheduler.timesteps[num_inference_steps - round(noise_level * num_inference_steps) :]
        if not len(timesteps):
            return self.decode(y)
        z = diffuse(y, noise_like(y[:1], generator).expand_as(y), self.scheduler.log_snr(timesteps[0].cpu()))
        for t in timesteps:
            output = call_network(self.unet, z, t)
            z = self.scheduler.step(output, t, z, generator=generator, return_dict=False)[0]
        return self.decode(self._clean(z))

    def _clean(self, z_0: Tensor) -> Tensor:
        """The last latents of the grid as y: the mean z_0 / alpha_0 of p(y | z_0) where the schedule ends at z_0."""
        if self.scheduler.config.final_step != "latent":
            return z_0
        return z_0 / expand_to(alpha_sigma(self.scheduler.noise_schedule.log_snr_max)[0], z_0)
