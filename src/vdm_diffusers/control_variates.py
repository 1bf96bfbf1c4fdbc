r"""Control variates for the diffusion term: what can be known of a network's loss without calling the network.

The loss |eps - eps_hat|^2 at (x, log_snr, eps) is compared with the losses of two cheap denoisers at the same noise.

The linear one (Wiener's). For data taken to be Gaussian, N(mean, diag(lambda)) in some orthonormal basis, the best
denoiser is linear, and

    eps - eps_hat = rho eps - kappa d,   rho = alpha^2 lambda / (alpha^2 lambda + sigma^2),   kappa = alpha sigma /
    (alpha^2 lambda + sigma^2),

with d = x - mean, so that its loss has the expectation sum rho^2 + kappa^2 d^2 for this very x, whatever the data
really are.

The one by pixels. It knows that a pixel is one of L levels, and how frequent they are, but looks at no other pixel:
x_hat_i = E[x_i | z_i]. Where the noise is as small as the levels' distance, networks gain most from the same
knowledge. The expectation of its loss is one integral over a normal variable for each level, tabulated against log
SNR.

A surrogate of the network's loss,

    c_0 D + c_1 E[linear loss] + c_2 E[pixels' loss] + c_3 (linear loss - its E) + sum_w c_w sum_i w_i (eps_i^2 - 1)
        + sum_w c'_w sum_i w_i (pixel i's loss - its E),

with weights w_i in {1, s_i, |x_i|, s_i |x_i|} that are known for an image (s: the standard deviation in a
neighbourhood of 3 pixels a side), and coefficients that are functions of log SNR fitted to other evaluations, has a
known expectation and a known integral over log SNR: only the rest needs Monte Carlo. The known integral is exact where
the quadrature is: it has an edge wherever a mean jumps (`Controls.jumps`). Then bad coefficients cost variance, not
bias.

Source: control variates are classical (Owen, "Monte Carlo theory, methods and examples", chapter 8).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .frequency import cosine_transform
from .gaussian import alpha_sigma

_FULL_BASIS = 512  # up to so many dimensions the basis is that of the data's own covariance
_PRIOR_WEIGHT = 8.0  # images that the smooth prior of the variances counts for
_WINDOW = 49  # levels that the denoiser by pixels weighs; of so few it knows the frequencies too
_LEAST_DISTANCE = 0.25  # of two levels, in deviations of the noise: with less the window would not hold +-6 deviations
_RIDGE = (
    0.05  # the residual's variance in units of the squared loss, about: what an evaluation counts against the prior
)
_SPACING = 0.05  # of the table of expected losses, in log SNR: cubic interpolation of logarithms is good to 1e-6


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
        """|eps - eps_hat|^2 and its expectation, (M,) float64 on the CPU, from coordinates (M, D) of x - mean and
        eps.
        """
        rho, kappa = self._gains(log_snr)
        rho, kappa = rho.to(d), kappa.to(d)
        loss = ((rho * noise - kappa * d) ** 2).sum(1)
        expected = (rho**2).sum(1) + (kappa**2 * d**2).sum(1)
        return loss.to("cpu", torch.float64), expected.to("cpu", torch.float64)

    def expected_sum(self, log_snr: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k weight_k E[loss at log_snr_k] for any image, as (a, b): it is a + (x - mean)^2 .

        b in coordinates; (), (D,).
        """
        rho, kappa = self._gains(log_snr)
        return (weight * (rho**2).sum(1)).sum(), weight @ kappa**2

    def _gains(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha_sigma(log_snr)
        alpha, sigma = alpha[:, None], sigma[:, None]
        total = alpha**2 * self.variance + sigma**2
        return alpha**2 * self.variance / total, alpha * sigma / total


@dataclass(frozen=True, eq=False)
class PixelDenoiser:
    """x_hat_i = E[x_i | z_i] of a pixel that has one of L equally spaced levels, with given frequencies.

    Beyond `_WINDOW` levels the frequencies are taken to be equal, and only the nearest levels are weighed; the
    denoiser is then left aside where the noise hides the levels (`active`).

    Attributes:
        values: (L,) of the levels, as x.
        log_weight: (min(L, _WINDOW),) logarithms of the frequencies.
        knots, log_loss: (G,) increasing log SNRs, (G, K) ln E|x_hat - x|^2 of a pixel of every kind (see `kind`).
    """

    values: Tensor
    log_weight: Tensor
    knots: Tensor
    log_loss: Tensor

    @classmethod
    def fit(cls, values: Tensor, counts: Tensor, log_snr_max: float, log_snr_min: float) -> PixelDenoiser:
        """From the values of the levels and how often they occur (both (L,)), for log SNRs in a range."""
        if len(values) > _WINDOW:
            return _pixel_denoiser(len(values), float(values[0]), float(values[-1]), None, log_snr_max, log_snr_min)
        frequencies = tuple(((counts.double() + 0.5) / (counts.max() + 0.5)).tolist())
        return _pixel_denoiser(len(values), float(values[0]), float(values[-1]), frequencies, log_snr_max, log_snr_min)

    def active(self, log_snr: Tensor) -> Tensor:
        """Where the denoiser is used: bool, of log_snr's shape."""
        return (log_snr >= self.knots[0]) | (len(self.values) <= _WINDOW)

    def denoise(self, y: Tensor, log_snr: Tensor) -> Tensor:
        """x_hat from y = z / alpha, of y's shape; log_snr broadcasts with it."""
        width, first_value, distance = len(self.log_weight), float(self.values[0]), self._distance
        position = (y - first_value) / distance
        first = (position.round() - width // 2).clamp(0, len(self.values) - width)
        nearest = first_value + distance * torch.minimum(torch.maximum(position.round(), first), first + width - 1)
        first = first_value + distance * first
        half_snr = 0.5 * log_snr.exp().to(y)
        total, weighted = torch.zeros_like(y), torch.zeros_like(y)
        for number, log_weight in enumerate(self.log_weight.tolist()):
            value = first + distance * number
            weight = torch.exp(log_weight - half_snr * (nearest - value) * (2 * y - value - nearest))
            total += weight
            weighted += weight * value
        return weighted / total

    def kind(self, levels: Tensor) -> Tensor:
        """Rows of the table for levels: one for each, but levels far from the ends are all alike, and the ends
        mirrored.
        """
        if len(self.values) <= _WINDOW:
            return levels.long()
        return torch.minimum(levels.long(), len(self.values) - 1 - levels.long()).clamp(max=self._num_kinds - 1)

    def expected_loss(self, log_snr: Tensor) -> Tensor:
        """E|x_hat - x|^2 of a pixel of every kind, (M, K) float64; 0 where not active."""
        position = ((log_snr - self.knots[0]) / _SPACING).clamp(0, len(self.knots) - 1)
        left = position.floor().clamp(1, len(self.knots) - 3)
        p = (position - left)[:, None]
        rows = left.long()
        logarithm = (  # Lagrange's cubic through four neighbours
            -p * (p - 1) * (p - 2) / 6 * self.log_loss[rows - 1]
            + (p + 1) * (p - 1) * (p - 2) / 2 * self.log_loss[rows]
            - (p + 1) * p * (p - 2) / 2 * self.log_loss[rows + 1]
            + (p + 1) * p * (p - 1) / 6 * self.log_loss[rows + 2]
        )
        return logarithm.exp() * self.active(log_snr)[:, None]

    @property
    def _distance(self) -> float:
        return float(self.values[-1] - self.values[0]) / (len(self.values) - 1)

    def log_snr_at(self, distance: float) -> float:
        """Where two levels are so many deviations of the noise apart."""
        return 2 * math.log(distance / self._distance)

    def exact_loss(self, log_snr: float) -> Tensor:
        """E|x_hat - x|^2 of every kind of level, (K,), by the trapezoidal rule, whose error falls exponentially for
        such functions.
        """
        deviation = math.exp(-log_snr / 2)
        step = min(0.5, deviation / self._distance)
        e = torch.arange(-math.ceil(9 / step), math.ceil(9 / step) + 1, dtype=torch.float64) * step
        density = torch.exp(-(e**2) / 2) * (step / math.sqrt(2 * math.pi))
        x = self.values[: self._num_kinds, None]
        x_hat = self.denoise(x + deviation * e, torch.tensor(log_snr, dtype=torch.float64))
        return (x_hat - x) ** 2 @ density

    @property
    def _num_kinds(self) -> int:
        if len(self.values) <= _WINDOW:
            return len(self.values)
        # the window and nine deviations of the noise away from an end
        return min((len(self.values) + 1) // 2, _WINDOW // 2 + math.ceil(9 / _LEAST_DISTANCE) + 1)


@functools.lru_cache(maxsize=8)
def _pixel_denoiser(
    num_levels: int,
    first: float,
    last: float,
    frequencies: tuple[float, ...] | None,
    log_snr_max: float,
    log_snr_min: float,
) -> PixelDenoiser:
    """A `PixelDenoiser` with its table, which takes a while to compute."""
    values = torch.linspace(first, last, num_levels, dtype=torch.float64)
    weights = (
        torch.ones(min(num_levels, _WINDOW)).double()
        if frequencies is None
        else torch.tensor(frequencies, dtype=torch.float64)
    )
    denoiser = PixelDenoiser(values, weights.log(), torch.empty(0), torch.empty(0))
    high, low = min(log_snr_max, denoiser.log_snr_at(25.0)), max(log_snr_min, -20.0)
    if num_levels > _WINDOW:
        low = max(low, denoiser.log_snr_at(_LEAST_DISTANCE))
    number = max(4, math.ceil((max(high, low) - low) / _SPACING) + 1)
    knots = low + _SPACING * torch.arange(number, dtype=torch.float64)
    log_loss = torch.stack([denoiser.exact_loss(float(knot)) for knot in knots]).clamp(min=1e-30).log()
    return replace(denoiser, knots=knots, log_loss=log_loss)


@dataclass(frozen=True, eq=False)
class Controls:
    """The features of the surrogate: first the means, whose integrals are known, then what has the expectation zero.

    Attributes:
        wiener: the linear denoiser. pixel: the one by pixels, or None for continuous data.
    """

    wiener: WienerDenoiser
    pixel: PixelDenoiser | None

    @property
    def num_means(self) -> int:
        return 2 if self.pixel is None else 3

    @property
    def jumps(self) -> Tensor:
        """Log SNRs at which a mean is not continuous: where the denoiser by pixels begins to be used."""
        ends = [] if self.pixel is None or len(self.pixel.values) <= _WINDOW else [float(self.pixel.knots[0])]
        return torch.tensor(ends, dtype=torch.float64)

    @property
    def num_features(self) -> int:
        return 7 if self.pixel is None else 12

    def features(self, x: Tensor, levels: Tensor, noise: Tensor, z_t: Tensor, log_snr: Tensor) -> Tensor:
        """(F, M) float64 on the CPU, from images x (M, C, ...), their levels, noise and z_t; log_snr: (M,) on the
        CPU.
        """
        loss, expected = self.wiener.loss(self.wiener.deviations(x), self.wiener.directions(noise), log_snr)
        weights = _pixel_weights(x)
        excess = noise.flatten(1) ** 2 - 1
        means = [torch.full_like(expected, x[0].numel()), expected]
        centered = [loss - expected, *_weighted_sums(weights, excess)]
        if self.pixel is not None:
            snr = log_snr.exp()
            ell = log_snr.reshape(-1, *[1] * (x.ndim - 1)).to(x)
            alpha = alpha_sigma(log_snr)[0].clamp(min=1e-6)  # with less the loss counts for nothing
            x_hat = self.pixel.denoise(z_t / alpha.reshape(ell.shape).to(x), ell)
            table = self.pixel.expected_loss(log_snr).to(x)
            mean = table.gather(1, self.pixel.kind(levels).flatten(1))
            square = ((x_hat - x) ** 2).flatten(1) * self.pixel.active(log_snr)[:, None].to(x)
            means.append(snr * mean.sum(1).to("cpu", torch.float64))
            centered += [snr * part for part in _weighted_sums(weights, square - mean)]
        return torch.stack([*means, *centered])

    def known_sum(self, x: Tensor, levels: Tensor, log_snr: Tensor, weight: Tensor) -> Tensor:
        """sum_k of weight_k (K, num_means) times the means at log_snr_k (K,), of images (M, C, ...): (M,) float64."""
        offset, vector = self.wiener.expected_sum(log_snr, weight[:, 1])
        known = weight[:, 0].sum() * x[0].numel() + offset + self.wiener.deviations(x.double()) ** 2 @ vector
        if self.pixel is not None:
            snr = log_snr.exp()
            known = known + ((weight[:, 2] * snr) @ self.pixel.expected_loss(log_snr))[
                self.pixel.kind(levels)
            ].flatten(1).sum(1)
        return known


def _pixel_weights(x: Tensor) -> tuple[Tensor, ...]:
    """Functions of an image that say where its pixels are hard: (M, D) each; the first, 1, is left out."""

    def box(v: Tensor) -> Tensor:
        for axis in range(2, v.ndim):
            n = v.shape[axis]
            place = torch.arange(n, device=v.device)
            v = (
                v + v.index_select(axis, (place - 1).clamp(min=0)) + v.index_select(axis, (place + 1).clamp(max=n - 1))
            ) / 3
        return v

    deviation = (box(x**2) - box(x) ** 2).clamp(min=0).sqrt().flatten(1)
    size = x.flatten(1).abs()
    return deviation, size, deviation * size


def _weighted_sums(weights: tuple[Tensor, ...], values: Tensor) -> list[Tensor]:
    """sum_i w_i v_i for the weight 1 and the given ones: float64 on the CPU."""
    parts = [values, *(weight * values for weight in weights)]
    return [part.sum(1).to("cpu", torch.float64) for part in parts]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The surrogate of the loss in units of |eps - eps_hat|^2.

    Attributes:
        knots: (B,) increasing log SNRs, between which the coefficients are linear.
        coefficients: (B, F) of the features of `Controls`.
    """

    knots: Tensor
    coefficients: Tensor

    @classmethod
    def fit(cls, knots: Tensor, log_snr: Tensor, features: Tensor, loss: Tensor, weight: Tensor) -> Surrogate:
        """Weighted least squares: log_snr, loss, weight (M,), features (M, F).

        A feature's part of the loss is expected to be as large as the loss is in the mean over all log SNRs: a feature
        that all but vanishes somewhere (as the pixels' loss does, double exponentially) has no large coefficient
        there, which would be a spike between two knots.
        """
        size = (weight @ features**2 / weight.sum()).sqrt()
        size = size.clamp(min=1e-12 * float(size.max()) + 1e-300)
        scale = (weight @ loss**2 / weight.sum()).sqrt().clamp(min=1e-300)
        design = (hat_weights(knots, log_snr)[:, :, None] * (features / size)[:, None, :]).flatten(1)
        weighted = design * weight[:, None]
        gram = weighted.T @ design + _RIDGE * torch.eye(design.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, weighted.T @ (loss / scale)).reshape(len(knots), -1) * scale / size
        return cls(knots, solution)

    def at(self, log_snr: Tensor) -> Tensor:
        """The coefficients at log SNRs of any shape: (..., F)."""
        return (
            hat_weights(self.knots, log_snr.flatten())
            .matmul(self.coefficients)
            .reshape(*log_snr.shape, self.coefficients.shape[1])
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


def gauss_legendre(edges: Tensor, order: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on every interval between increasing edges, float64."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(order))
    half = edges.diff()[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * nodes).flatten(), (half * weights).flatten()


def _transform(x: Tensor, axes: tuple[Tensor, ...]) -> Tensor:
    for position, matrix in enumerate(axes, start=1):
        x = torch.tensordot(x, matrix, dims=([position], [1])).movedim(-1, position)
    return x.flatten(1)
