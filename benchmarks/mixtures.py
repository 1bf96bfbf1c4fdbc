"""Mixtures of Gaussians that look like images to a diffusion model, with their exact denoiser and density.

Components share a covariance that is diagonal in the cosine transform, with a spectrum that falls with frequency;
their means have such a spectrum too. So some directions are resolved early and some late, as in images, and the best
linear denoiser is not the best denoiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_diffusers.frequency import cosine_transform


@dataclass(frozen=True, eq=False)
class SpectralMixture:
    """p(x) = 1/K sum_k N(x; means_k, T^T diag(variance) T), T the cosine transform of height and width.

    means: (K, C, H, W) in the transformed coordinates; variance: (C, H, W).
    """

    means: Tensor
    variance: Tensor

    @staticmethod
    def make(
        shape: tuple[int, int, int], components: int = 16, seed: int = 0, deviation: float = 0.4
    ) -> SpectralMixture:
        """Pixels of a standard deviation: two thirds of it (in variance) between components, one third within."""
        generator = torch.Generator().manual_seed(seed)
        _, height, width = shape
        f = torch.arange(height, dtype=torch.float64)[:, None] ** 2 + torch.arange(width, dtype=torch.float64) ** 2
        spectrum = (1 / (1 + f)).expand(shape)
        means = torch.randn(components, *shape, generator=generator, dtype=torch.float64) * spectrum.sqrt()
        means *= math.sqrt(2 / 3) * deviation / means.square().mean().sqrt()
        variance = spectrum / spectrum.mean() * deviation**2 / 3
        return SpectralMixture(means, variance + 0.01**2)

    @property
    def num_dims(self) -> int:
        return self.variance.numel()

    def transform(self, x: Tensor) -> Tensor:
        _, height, width = self.variance.shape
        return torch.einsum("nchw,ih,jw->ncij", x.double(), cosine_transform(height), cosine_transform(width))

    def inverse(self, x: Tensor) -> Tensor:
        _, height, width = self.variance.shape
        return torch.einsum("ncij,ih,jw->nchw", x, cosine_transform(height), cosine_transform(width))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        k = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, *self.variance.shape, generator=generator, dtype=torch.float64)
        return self.inverse(self.means[k] + self.variance.sqrt() * noise)

    def log_components(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """ln [N(z; alpha mean_k, alpha^2 variance + sigma^2) / K] in transformed coordinates, (N, K); log_snr:
        (N,).
        """
        alpha, sigma = self._alpha_sigma(log_snr)
        total = (alpha**2 * self.variance + sigma**2).flatten(1)
        z = z.flatten(1)
        columns = [
            -0.5 * ((z - alpha.flatten(1) * mean.flatten()) ** 2 / total + torch.log(2 * math.pi * total)).sum(1)
            for mean in self.means
        ]
        return torch.stack(columns, dim=1) - math.log(len(self.means))

    def log_density(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """ln q(z_t) of pixels, (N,); log_snr = +inf gives ln p(x)."""
        return self.log_components(self.transform(z), log_snr).logsumexp(1)

    def denoise(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """E[x | z_t] of pixels (N, C, H, W), float64; log_snr: (N,)."""
        alpha, sigma = self._alpha_sigma(log_snr)
        z = self.transform(z)
        mean = torch.einsum("nk,kchw->nchw", self.log_components(z, log_snr).softmax(1), self.means)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.inverse(mean + gain * (z - alpha * mean))

    def posterior_variance(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """Var[x | z_t] of every transformed coordinate, (N, C, H, W): its mean over z_t is E|x - x_hat|^2, with far
        less noise.
        """
        alpha, sigma = self._alpha_sigma(log_snr)
        weights = self.log_components(self.transform(z), log_snr).softmax(1)
        mean, square = (torch.einsum("nk,kchw->nchw", weights, power) for power in (self.means, self.means**2))
        total = alpha**2 * self.variance + sigma**2
        return self.variance * sigma**2 / total + (sigma**2 / total) ** 2 * (square - mean**2).clamp(min=0)

    def epsilon(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """The exact network's prediction of the noise, in z's dtype."""
        alpha, sigma = self._alpha_sigma(log_snr)
        return ((z.double() - alpha * self.denoise(z, log_snr)) / sigma).to(z.dtype)

    def _alpha_sigma(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = log_snr.double()[:, None, None, None]
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
