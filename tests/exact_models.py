"""Data distributions whose exact denoiser and exact -ln p are known, so that truth is computable.

Everything here is written from the definitions, in float64, and uses nothing of the package: alpha and sigma are given
by the caller's log SNR through `alpha_sigma` below, the denoiser is the mean of an explicit posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def alpha_sigma(log_snr: Tensor | float, path: str = "vp") -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha^2 / sigma^2 = e^log_snr, normalised as the path says."""
    log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
    if path == "vp":
        return (1 + torch.exp(-log_snr)) ** -0.5, (1 + torch.exp(log_snr)) ** -0.5
    if path == "flow":
        return 1 / (1 + torch.exp(-log_snr / 2)), 1 / (1 + torch.exp(log_snr / 2))
    if path == "ve":
        return torch.ones_like(log_snr), torch.exp(-log_snr / 2)
    raise ValueError(path)


@dataclass(frozen=True)
class GaussianMixture:
    """p(x) = sum_k weight_k N(x; mean_k, variance_k I). A variance of 0 is a point.

    means: (K, ...) float64; variances, weights: (K,).
    """

    means: Tensor
    variances: Tensor
    weights: Tensor

    @staticmethod
    def points(x: Tensor) -> GaussianMixture:
        """A data set of N images with equal probability: -log p = log N for each, where they differ. x: (N, ...)."""
        n = len(x)
        zeros = torch.zeros(n, dtype=torch.float64)
        return GaussianMixture(x.double(), zeros, torch.full_like(zeros, 1 / n))

    @staticmethod
    def gaussian(mean: Tensor, variance: float) -> GaussianMixture:
        """One Gaussian N(mean, variance I). mean: the shape of one image."""
        one = torch.ones(1, dtype=torch.float64)
        return GaussianMixture(mean.double()[None], one * variance, one)

    @property
    def num_dims(self) -> int:
        return self.means[0].numel()

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """(num_samples, ...) float64."""
        k = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, *self.means.shape[1:], generator=generator, dtype=torch.float64)
        return self.means[k] + self._expand(self.variances[k]).sqrt() * noise

    def component_log_densities(self, z: Tensor, log_snr: Tensor | float, path: str = "vp") -> Tensor:
        """ln [weight_k N(z; alpha mean_k, (alpha^2 variance_k + sigma^2) I)]: (B, K). log_snr: () or (B,)."""
        alpha, sigma = alpha_sigma(log_snr, path)
        alpha, sigma = alpha.expand(len(z)), sigma.expand(len(z))
        flat, means = z.double().flatten(1), self.means.flatten(1)
        variance = alpha[:, None] ** 2 * self.variances + sigma[:, None] ** 2
        square = ((flat[:, None] - alpha[:, None, None] * means) ** 2).sum(-1)
        return self.weights.log() - 0.5 * (square / variance + self.num_dims * torch.log(2 * math.pi * variance))

    def log_marginal(self, z: Tensor, log_snr: Tensor | float, path: str = "vp") -> Tensor:
        """ln q(z_t): (B,)."""
        return self.component_log_densities(z, log_snr, path).logsumexp(1)

    def nats(self, x: Tensor) -> Tensor:
        """The exact -ln p(x) of a density, or of a mass where all components are points: (B,)."""
        if bool((self.variances == 0).all()):
            same = (x.double().flatten(1)[:, None] == self.means.flatten(1)).all(-1)
            return -torch.where(same, self.weights, 0.0).sum(1).log()
        return -self.log_marginal(x, math.inf)

    def denoise(self, z: Tensor, log_snr: Tensor | float, path: str = "vp") -> Tensor:
        """E[x | z_t], float64, of z's shape: the posterior mean of each component, weighted by its responsibility."""
        alpha, sigma = alpha_sigma(log_snr, path)
        alpha, sigma = alpha.expand(len(z)), sigma.expand(len(z))
        responsibility = self.component_log_densities(z, log_snr, path).softmax(1)
        variance = alpha[:, None] ** 2 * self.variances + sigma[:, None] ** 2
        gain = torch.where(self.variances > 0, alpha[:, None] * self.variances / variance, 0.0)
        flat, means = z.double().flatten(1), self.means.flatten(1)
        each = means + gain[..., None] * (flat[:, None] - alpha[:, None, None] * means)
        return (responsibility[..., None] * each).sum(1).reshape(z.shape)

    def predict(self, z: Tensor, log_snr: Tensor | float, prediction_type: str, path: str = "vp") -> Tensor:
        """What an exact network of the given type answers, float64 (formulas written out, one for each type)."""
        x = self.denoise(z, log_snr, path)
        alpha, sigma = (self._expand(v.expand(len(z))) for v in alpha_sigma(log_snr, path))
        eps = (z.double() - alpha * x) / sigma
        return {
            "sample": lambda: x,
            "epsilon": lambda: eps,
            "v_prediction": lambda: alpha * eps - sigma * x,
            "score": lambda: -eps / sigma,
            "flow_prediction": lambda: eps - x,
        }[prediction_type]()

    def as_model(
        self, log_snr_of_timestep: Callable[[Tensor], Tensor], prediction_type: str = "epsilon", path: str = "vp"
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A model(sample, timestep) -> tensor of the sample's dtype, for evaluators and samplers."""

        def model(sample: Tensor, timestep: Tensor) -> Tensor:
            log_snr = log_snr_of_timestep(torch.as_tensor(timestep))
            return self.predict(sample, log_snr, prediction_type, path).to(sample.dtype)

        return model

    def information(self, log_snr: float, num_samples: int, generator: torch.Generator) -> tuple[float, float]:
        """Monte Carlo estimate of I(x; z_t) in nats, and its standard error (a set of points: at most ln N)."""
        x = self.sample(num_samples, generator)
        alpha, sigma = alpha_sigma(log_snr)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        z = alpha * x + sigma * noise
        log_likelihood = -0.5 * (noise**2).flatten(1).sum(1) - self.num_dims * torch.log(
            sigma * math.sqrt(2 * math.pi)
        )
        value = log_likelihood - self.log_marginal(z, log_snr)
        return float(value.mean()), float(value.std() / math.sqrt(num_samples))

    def _expand(self, coefficient: Tensor) -> Tensor:
        return coefficient.reshape(-1, *[1] * (self.means.ndim - 1))
