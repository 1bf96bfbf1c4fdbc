r"""Sampling under conditions: guidance towards a class, images to start from, regions that are known.

Known regions. The diffusion of the known pixels needs no network: given their values x, q(z_s | z_t, x) is a Gaussian
in closed form, and their whole path is drawn from it, exactly. What is left is to let the unknown pixels follow.
Putting the known path into the sample at every step (`num_particles=1`) is the usual approximation: the unknown pixels
see where the known ones are, but not where they are going. With K particles that share the known path, weighted by how
well each of them foretold its next step,

    w_k proportional to p(z_s^known | z_t^k) = N(z_s^known; mean(z_t^k), variance),

and resampled, the samples tend to the model's own conditional distribution as K grows.

Source: Lugmayr et al. 2022, "RePaint" (replacement); Trippe et al. 2023, "Diffusion probabilistic modeling of protein
backbones", algorithm 2 (particles); Ho & Salimans 2022, "Classifier-free diffusion guidance"; Meng et al. 2022,
"SDEdit" (image to image).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from vdm_diffusers.gaussian import alpha_sigma, posterior

Images = torch.Tensor | np.ndarray | PIL.Image.Image | Sequence[PIL.Image.Image]


def image_values(image: Images, num_levels: int) -> torch.Tensor:
    """Images as float64 `(B, C, H, W)` in [0, 1].

    Args:
        image: PIL images; a float array `(B, H, W, C)` or tensor `(B, C, H, W)` in [0, 1], as `VDMPipeline` returns
            them (values between the levels are kept); or an integer tensor of levels.

    Raises:
        ValueError: another shape or range.
    """
    if isinstance(image, PIL.Image.Image):
        image = [image]
    if isinstance(image, (list, tuple)):
        image = np.stack([np.asarray(one, dtype=np.float64) / 255 for one in image])
        image = image[..., None] if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 1)
    if not isinstance(image, torch.Tensor) or image.ndim != 4:
        raise ValueError("`image` must be PIL images, an array (B, H, W, C) or a tensor (B, C, H, W).")
    values = image.double() if image.is_floating_point() else image.double() / (num_levels - 1)
    if not 0 <= float(values.min()) <= float(values.max()) <= 1:
        raise ValueError(
            f"`image` must hold floats in [0, 1] or whole levels 0..{num_levels - 1}, got {float(image.min())} to "
            f"{float(image.max())}."
        )
    return values


def mask_tensor(mask: torch.Tensor | np.ndarray | PIL.Image.Image) -> torch.Tensor:
    """A mask as a tensor of zeros and ones, whichever way it was made.

    Raises:
        ValueError: another type, or values that are neither 0 nor 1 (255 in 8-bit images), NaN among them.
    """
    if isinstance(mask, PIL.Image.Image):
        mask = np.array(mask.convert("L"))
    if not isinstance(mask, (torch.Tensor, np.ndarray)):
        raise ValueError(f"`mask` must be a tensor, an array or a PIL image, got {type(mask).__name__}.")
    values = torch.as_tensor(mask)
    if values.dtype == torch.uint8 and int(values.max()) == 255:
        values = values / 255
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError(
            "`mask` must hold 1 where pixels are to be made and 0 where `image` holds, and nothing else: no NaN, no "
            "soft edges."
        )
    return values


def image_tensor(image: Images, num_levels: int, pixel_encoding: str) -> torch.Tensor:
    """Images as the diffusion sees them, encoded into [-1, 1]: float64 `(B, C, H, W)`; see `image_values`."""
    values = image_values(image, num_levels)
    if pixel_encoding == "bin_center":  # 2 (k + 1/2) / L - 1
        return (2 * values * (num_levels - 1) + 1) / num_levels - 1
    return 2 * values - 1


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, num_channels: int) -> torch.Tensor:
    """`unconditional + scale (conditional - unconditional)`, in whatever the network predicts; its variance is the
    conditional one's.

    All prediction types are affine functions of each other at one z_t, and the weights add up to 1: the guided x_hat,
    eps_hat and score are each the same combination of the two.
    """
    mean, negative = conditional[:, :num_channels], unconditional[:, :num_channels]
    return torch.cat([torch.lerp(negative, mean, scale), conditional[:, num_channels:]], dim=1)


def slerp(first: torch.Tensor, second: torch.Tensor, fraction: float) -> torch.Tensor:
    """Between two standard normal `latents`, along the arc that keeps them so: sin((1-f) w) a + sin(f w) b over sin
    w, (B, ...).
    """
    a, b = first.flatten(1), second.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b).clamp(-1, 1).reshape(-1, *[1] * (first.ndim - 1))
    angle = cosine.acos()
    arc = torch.where(angle.sin() < 1e-6, 1.0, angle.sin())
    weights = [torch.where(angle.sin() < 1e-6, f, (f * angle).sin() / arc) for f in (1 - fraction, fraction)]
    return weights[0] * first + weights[1] * second


class KnownRegion:
    """Keeps the known pixels of a sampling loop on an exact draw of their own diffusion.

    Args:
        scheduler: with its timesteps set.
        x: `(B, C, H, W)` the images; known where `mask` is 0.
        mask: broadcastable to x; 1 where pixels are to be made.
        num_particles: K, consecutive in the batch of latents `(B K, C, H, W)`.
        generator: of the known path's noise and of the resampling.
    """

    def __init__(
        self,
        scheduler: Any,
        x: torch.Tensor,
        mask: torch.Tensor,
        num_particles: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ):
        self.scheduler, self.x, self.num_particles, self.generator = scheduler, x, num_particles, generator
        self.chance = None if isinstance(generator, list) else generator  # several particles have one generator
        self.unknown = mask.to(x.device).bool().expand_as(x)
        self.exact = getattr(scheduler, "is_log_snr_schedule", None) is not None  # a VDMScheduler
        self.log_weights = torch.zeros(len(x), num_particles, dtype=torch.float64, device=x.device)
        self.known = x

    def begin(self, latents: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
        """The latents of the first timestep, with the known path's beginning in it: that of each image's first
        particle.

        Args:
            latents: where the unknown pixels begin. noised: draws of q(z_t | x) at the first timestep.
        """
        self.known = noised[:: self.num_particles]
        return self._insert(latents)

    def condition(
        self, index: int, before: torch.Tensor, model_output: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """`after`, the latents of the step from `timesteps[index]`, with the known pixels in it and the particles
        resampled.
        """
        timesteps = self.scheduler.timesteps
        t, last = timesteps[index], index + 1 == len(timesteps)
        if not self.exact:  # any other scheduler: fresh noise at every level, which has the right marginals
            noise = self._noise()
            self.known = (
                self.x if last else self.scheduler.add_noise(self.x, noise, timesteps[index + 1].expand(len(self.x)))
            )
            return self._insert(after)
        log_snr_t, log_snr_s = self.scheduler.log_snr(t.cpu()), self._log_snr_after(index)
        mean, variance = posterior(self.known, self.x, log_snr_t, log_snr_s)
        self.known = mean + float(variance) ** 0.5 * self._noise()
        if self.num_particles > 1:
            self._weigh(t, before, model_output)
            after = self._resample(after)
        if last:  # what the decoder reads as the given pixels, without the noise that z_0 has
            self.known = float(alpha_sigma(log_snr_s)[0]) * self.x
        return self._insert(after)

    def choose(self, latents: torch.Tensor) -> torch.Tensor:
        """One particle of each image, `(B, C, H, W)`, drawn by its weight."""
        if self.num_particles == 1:
            return latents
        chosen = torch.multinomial(self.log_weights.softmax(1).cpu(), 1, generator=self.chance)[:, 0]
        return latents[torch.arange(len(self.x)) * self.num_particles + chosen]

    def _log_snr_after(self, index: int) -> torch.Tensor:
        timesteps = self.scheduler.timesteps
        if index + 1 < len(timesteps):
            return self.scheduler.log_snr(timesteps[index + 1].cpu())
        latent = self.scheduler.is_log_snr_schedule and self.scheduler.config.final_step == "latent"
        end = self.scheduler.noise_schedule.log_snr_max if latent else math.inf
        return torch.tensor(end, dtype=torch.float64)

    def _noise(self) -> torch.Tensor:
        return randn_tensor(self.x.shape, generator=self.generator, device=self.x.device, dtype=self.x.dtype)

    def _insert(self, latents: torch.Tensor) -> torch.Tensor:
        k = self.num_particles
        return torch.where(self.unknown.repeat_interleave(k, 0), latents, self.known.repeat_interleave(k, 0))

    def _weigh(self, t: torch.Tensor, before: torch.Tensor, model_output: torch.Tensor) -> None:
        """Multiply the weights by p(z_s^known | z_t), the model's own density of the step that the known pixels
        take.
        """
        variance = float(self.scheduler._get_variance(t.cpu()))
        if variance == 0:  # to clean data: no density, and nothing comes after it
            return
        mean = self.scheduler.batch_step_no_noise(model_output, t.expand(len(before)), before)
        square = (self.known.repeat_interleave(self.num_particles, 0) - mean).double() ** 2
        square = torch.where(self.unknown.repeat_interleave(self.num_particles, 0), 0.0, square).flatten(1).sum(1)
        self.log_weights = self.log_weights - 0.5 * square.view_as(self.log_weights) / variance

    def _resample(self, latents: torch.Tensor) -> torch.Tensor:
        """Systematic resampling of the images whose effective number of particles has fallen below half."""
        weights, k = self.log_weights.softmax(1), self.num_particles
        poor = 1 / (weights**2).sum(1) < k / 2
        shift = torch.rand(len(weights), 1, generator=self.chance, dtype=torch.float64).to(weights)
        places = (torch.arange(k, device=weights.device) + shift) / k
        chosen = torch.searchsorted(weights.cumsum(1), places).clamp(max=k - 1)
        own = torch.arange(k, device=weights.device).expand_as(chosen)
        chosen = torch.where(poor[:, None], chosen, own)
        self.log_weights = torch.where(poor[:, None], 0.0, self.log_weights)
        return latents[(chosen + k * torch.arange(len(chosen), device=weights.device)[:, None]).flatten()]
