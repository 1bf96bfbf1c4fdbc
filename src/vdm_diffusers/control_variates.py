r"""Control variates for the diffusion term: what can be known of a network's loss without calling the network.

The loss |eps - eps_hat|^2 at (x, log_snr, eps) is compared with that of a linear denoiser at the same noise. For data taken to be
Gaussian, N(mean, diag(lambda)) in some orthonormal basis, the best denoiser is linear (Wiener's), and

    eps - eps_hat = rho eps - kappa d,   rho = alpha^2 lambda / (alpha^2 lambda + sigma^2),   kappa = alpha sigma / (alpha^2 lambda + sigma^2),

with d = x - mean, so that its loss has the expectation sum rho^2 + kappa^2 d^2 for this very x, whatever the data really are. A
surrogate of the network's loss,

    c_0 D + c_1 E[Wiener loss] + c_2 (|eps|^2 - D) + c_3 (Wiener loss - E[Wiener loss]),

with coefficients that are functions of log SNR fitted to other evaluations, has a known expectation and a known integral over log SNR:
only the rest needs Monte Carlo. Bad coefficients cost variance, never bias.

Source: control variates are classical (Owen, "Monte Carlo theory, methods and examples", chapter 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import alpha_sigma

_FULL_BASIS = 512  # up to so many dimensions the basis is that of the data's own covariance
_PRIOR_WEIGHT = 8.0  # images that the smooth prior of the variances counts for
NUM_FEATURES = 4


@dataclass(frozen=True, eq=False)
class WienerDenoiser:
    """The linear denoiser of N(mean, basis^T diag(variance) basis).

    Attributes:
        mean: (C, ...) of an image.
        axes: one orthonormal matrix for each axis of an image: the transform is their product.
        full: (D, D) orthonormal matrix applied afterwards, or None.
        variance: (D,) in the transformed coordinates.
    """

    mean: Tensor
    axes: tuple[Tensor, ...]
    full: Tensor | None
    variance: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> WienerDenoiser:
        """From images (N, C, ...), one at least: their mean and their variances by frequency, shrunk where N is small.

        Axes are the principal directions of the channels and the cosine transform (DCT-II); small images go on to
        the principal axes of their own covariance.
        """
        x = x.double()
        count, shape = len(x), x.shape[1:]
        pixels = x.transpose(0, 1).flatten(1)  # (C, N ...)
        center = pixels.mean(1)
        mean = center.reshape(-1, *[1] * (x.ndim - 2)).expand(shape).clone()
        mean += count / (count + _PRIOR_WEIGHT) * (x.mean(0) - mean)
        channels = torch.linalg.eigh((pixels - center[:, None]) @ (pixels - center[:, None]).T)[1].T
        axes = (channels, *(cosine_transform(n) for n in shape[1:]))
        d = _transform(x - mean, axes)
        square = (d**2).mean(0)
        # prior: the mean over coordinates of about the same frequency in the same channel direction
        radius = torch.zeros(shape, dtype=torch.float64)
        for axis, n in enumerate(shape[1:], start=1):
            frequency = torch.arange(n, dtype=torch.float64) / n
            radius += (frequency**2).reshape([n if a == axis else 1 for a in range(len(shape))])
        resolution = max([*shape[1:], 1])
        band = (radius.sqrt() * resolution).round().long()
        band = (band + torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * (int(band.max()) + 1)).flatten()
        sums = torch.zeros(int(band.max()) + 1, dtype=torch.float64).index_add_(0, band, square)
        smooth = (sums / band.bincount(minlength=len(sums)).clamp(min=1))[band]
        variance = (count * square + _PRIOR_WEIGHT * smooth) / (count + _PRIOR_WEIGHT)
        full = None
        if square.numel() <= _FULL_BASIS:
            covariance = (d.T @ d + _PRIOR_WEIGHT * torch.diag(smooth)) / (count + _PRIOR_WEIGHT)
            variance, vectors = torch.linalg.eigh(covariance)
            full = vectors.T
        return cls(mean, axes, full, variance.clamp(min=1e-12))

    def deviations(self, x: Tensor) -> Tensor:
        """The coordinates (M, D) of x - mean for images (M, C, ...), in x's dtype."""
        return self.directions(x - self.mean.to(x))

    def directions(self, noise: Tensor) -> Tensor:
        """The coordinates (M, D) of a difference of images, or of noise, which stays standard normal."""
        coordinates = _transform(noise, tuple(axis.to(noise) for axis in self.axes))
        return coordinates if self.full is None else coordinates @ self.full.to(noise).T

    def loss(self, d: Tensor, noise: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """|eps - eps_hat|^2 and its expectation, (M,) float64 on the CPU, from coordinates (M, D) of x - mean and eps."""
        rho, kappa = self._gains(log_snr)
        rho, kappa = rho.to(d), kappa.to(d)
        loss = ((rho * noise - kappa * d) ** 2).sum(1)
        expected = (rho**2).sum(1) + (kappa**2 * d**2).sum(1)
        return loss.to("cpu", torch.float64), expected.to("cpu", torch.float64)

    def expected_sum(self, log_snr: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k weight_k E[loss at log_snr_k] for any image, as (a, b): it is a + (x - mean)^2 . b in coordinates; (), (D,)."""
        rho, kappa = self._gains(log_snr)
        return (weight * (rho**2).sum(1)).sum(), weight @ kappa**2

    def _gains(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha_sigma(log_snr)
        alpha, sigma = alpha[:, None], sigma[:, None]
        total = alpha**2 * self.variance + sigma**2
        return alpha**2 * self.variance / total, alpha * sigma / total


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The surrogate of the loss in units of |eps - eps_hat|^2.

    Attributes:
        knots: (B,) increasing log SNRs, between which the coefficients are linear.
        coefficients: (B, 4) of the features D, E[Wiener loss], |eps|^2 - D, Wiener loss - E[Wiener loss].
    """

    knots: Tensor
    coefficients: Tensor

    @classmethod
    def fit(cls, knots: Tensor, log_snr: Tensor, features: Tensor, loss: Tensor, weight: Tensor) -> Surrogate:
        """Weighted least squares: log_snr, loss, weight (M,), features (M, 4)."""
        hats = hat_weights(knots, log_snr)
        design = (hats[:, :, None] * features[:, None, :]).flatten(1)
        weighted = design * weight[:, None]
        gram = weighted.T @ design
        diagonal = gram.diagonal()
        size = diagonal.clamp(min=1e-12 * float(diagonal.max()) + 1e-300).sqrt()  # features differ much in size
        gram = gram / size[:, None] / size + 1e-6 * torch.eye(len(gram), dtype=torch.float64)
        solution = torch.linalg.solve(gram, weighted.T @ loss / size) / size
        return cls(knots, solution.reshape(len(knots), NUM_FEATURES))

    def at(self, log_snr: Tensor) -> Tensor:
        """The coefficients at log SNRs of any shape: (..., 4)."""
        return (
            hat_weights(self.knots, log_snr.flatten()).matmul(self.coefficients).reshape(*log_snr.shape, NUM_FEATURES)
        )


def hat_weights(knots: Tensor, log_snr: Tensor) -> Tensor:
    """Weights (M, B) of linear interpolation between increasing knots, constant outside."""
    if len(knots) == 1:
        return torch.ones(len(log_snr), 1, dtype=torch.float64)
    inside = torch.maximum(torch.minimum(log_snr, knots[-1]), knots[0])
    right = torch.searchsorted(knots, inside).clamp(1, len(knots) - 1)
    fraction = (inside - knots[right - 1]) / (knots[right] - knots[right - 1])
    weights = torch.zeros(len(log_snr), len(knots), dtype=torch.float64)
    rows = torch.arange(len(log_snr))
    weights[rows, right - 1] = 1 - fraction
    weights[rows, right] = fraction
    return weights


def cosine_transform(n: int) -> Tensor:
    """The orthonormal DCT-II matrix, (n, n) float64: row k holds cos(pi k (j + 1/2) / n)."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (j + 0.5) / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def gauss_legendre(edges: Tensor, order: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on every interval between increasing edges, float64."""
    # Golub & Welsch: nodes are the eigenvalues of the Jacobi matrix, weights come from its eigenvectors
    k = torch.arange(1, order, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    half = edges.diff()[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * nodes).flatten(), (half * 2 * vectors[0] ** 2).flatten()


def _transform(x: Tensor, axes: tuple[Tensor, ...]) -> Tensor:
    for position, matrix in enumerate(axes, start=1):
        x = torch.tensordot(x, matrix, dims=([position], [1])).movedim(-1, position)
    return x.flatten(1)
