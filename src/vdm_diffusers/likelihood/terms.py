r"""The diffusion term, as a sum over the steps of a chain or as an integral over log SNR."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control_variates import gauss_legendre, hat_weights
from ..elbo import discrete_weight_x
from ..frequency import RadialBands
from ..gaussian import posterior_coefficients, variance_divergence
from ..numerics import as_float64, expand_to
from ..reverse_variance import OptimalVariance, ReverseVariance, forward_variance, posterior_variance
from .denoising_model import learned_variance_of, sum64

_LONGEST_INTERVAL = 0.5  # of log SNR, for Gauss's rule: the means of the controls are smooth, but not flat


class DiffusionTerm(ABC):
    """The diffusion term of a bound, as a sum or an integral over sites."""

    @abstractmethod
    def place(self, u: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        """Points of [0, 1) -> sites (float64, of u's shape) and the inverse of their density.

        Without a profile (the standard deviation of the loss that is to be averaged) a fixed density is used.
        """

    @abstractmethod
    def scale(self, site: Tensor) -> Tensor:
        """Nats for a unit of |eps - eps_hat|^2 at a site; 0 where there is no signal.

        (For learned variances: about.)
        """

    @abstractmethod
    def constant(self, site: Tensor, num_dims: int) -> Tensor:
        """The part of the integrand that does not depend on the network."""

    @abstractmethod
    def quadrature(self, knots: Tensor) -> tuple[Tensor, Tensor]:
        """Sites and weights that sum or integrate smooth functions (piecewise between knots in log SNR) over the
        term.
        """

    @abstractmethod
    def log_snr(self, site: Tensor) -> Tensor:
        """Log SNR of z_t at a site."""

    @abstractmethod
    def log_snr_range(self) -> tuple[float, float]:
        """The highest and the lowest log SNR."""

    @abstractmethod
    def nats(self, site: Tensor, error: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        """The integrand: (M,) nats, from the error (M, C, ...) and its factor (see `DenoisingModel.error`)."""


@dataclass(frozen=True)
class ContinuousTerm(DiffusionTerm):
    """L_inf = 1/2 integral over log SNR of E|eps - eps_hat|^2, between the two end points (VDM equation 18).

    A site is a log SNR. The value does not depend on how a schedule runs from one end to the other.
    """

    log_snr_max: float
    log_snr_min: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.log_snr_max) and math.isfinite(self.log_snr_min)):
            raise ValueError(
                f"the continuous-time bound needs finite end points, got log_snr from {self.log_snr_max} to "
                f"{self.log_snr_min}. "
                "With zero terminal SNR take method='discrete'."
            )

    def place(self, u: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        edges = torch.linspace(self.log_snr_max, self.log_snr_min, 2 if profile is None else 1025, dtype=torch.float64)
        width = float(edges[0] - edges[1])
        mass = torch.ones(len(edges) - 1, dtype=torch.float64)
        if profile is not None:
            mass = _mixed(profile.at((edges[1:] + edges[:-1]) / 2), mass)
        mass = mass / mass.sum()
        end = mass.cumsum(0)
        cell = torch.searchsorted(end, u.contiguous(), right=True).clamp(max=len(mass) - 1)
        inside = ((u - (end - mass)[cell]) / mass[cell]).clamp(0, 1)
        return edges[cell] - inside * width, width / mass[cell]

    def scale(self, site: Tensor) -> Tensor:
        return torch.full_like(site, 0.5)

    def constant(self, site: Tensor, num_dims: int) -> Tensor:
        return torch.zeros_like(site)

    def quadrature(self, knots: Tensor) -> tuple[Tensor, Tensor]:
        inside = knots[(knots > self.log_snr_min) & (knots < self.log_snr_max)]
        number = math.ceil((self.log_snr_max - self.log_snr_min) / _LONGEST_INTERVAL) + 1
        even = torch.linspace(self.log_snr_min, self.log_snr_max, number, dtype=torch.float64)
        return gauss_legendre(torch.cat([even, inside]).unique())

    def log_snr(self, site: Tensor) -> Tensor:
        return site

    def log_snr_range(self) -> tuple[float, float]:
        return self.log_snr_max, self.log_snr_min

    def nats(self, site: Tensor, error: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        return 0.5 * site.exp() * to_x * sum64(error**2)


@dataclass(frozen=True, eq=False)
class DiscreteTerm(DiffusionTerm):
    """L_T = sum over the steps of KL(q(z_s | z_t, x) || p(z_s | z_t)) on a grid of log SNRs; a site is a step 1..K.

    Attributes:
        grid: (K + 1,) decreasing log SNRs, from the decoder's to the prior's; the last may be -inf.
        reverse_variance: 'posterior', 'forward', 'optimal', or what the network's second half of channels means:
            'learned', 'learned_range'.
        optimal: the mean squared errors that 'optimal' needs. With one for each band of frequencies the reverse
            variance is diagonal in the cosine transform, in whose coordinates both Gaussians of a step's KL factorise.
    """

    grid: Tensor
    reverse_variance: ReverseVariance = "posterior"
    optimal: OptimalVariance | None = None

    def __post_init__(self) -> None:
        if self.grid.ndim != 1 or len(self.grid) < 2 or not bool((self.grid.diff() < 0).all()):
            raise ValueError("`grid` must hold at least two decreasing log SNRs.")
        if (self.reverse_variance == "optimal") != (self.optimal is not None):
            raise ValueError("`optimal` goes with reverse_variance='optimal', and only with that.")

    @property
    def num_steps(self) -> int:
        return len(self.grid) - 1

    def probabilities(self, profile: Profile | None = None) -> Tensor:
        """(K,) with which a step is chosen: in proportion to its weight times the profile, but for one part in ten."""
        default = _mixed(
            torch.expm1((self.grid[:-1] - self.grid[1:]).clamp(max=3.0)), torch.ones(self.num_steps).double()
        )
        if profile is None:
            return default
        steps = torch.arange(1, self.num_steps + 1)
        weight = self.scale(steps.double()) * profile.at(self.grid[steps])
        return _mixed(weight, default)

    def place(self, u: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        probabilities = self.probabilities(profile)
        index = torch.searchsorted(probabilities.cumsum(0), u.contiguous(), right=True).clamp(max=self.num_steps - 1)
        return index.double() + 1, 1 / probabilities[index]

    def log_snr(self, site: Tensor) -> Tensor:
        return self.grid[site.long()]

    def log_snr_range(self) -> tuple[float, float]:
        return float(self.grid[0]), float(self.grid[-1])

    def quadrature(self, knots: Tensor) -> tuple[Tensor, Tensor]:
        sites = torch.arange(1.0, self.num_steps + 1, dtype=torch.float64)
        return sites, torch.ones_like(sites)

    @property
    def bands(self) -> RadialBands | None:
        """The bands of frequencies that have reverse variances of their own."""
        return None if self.optimal is None or self.optimal.shape is None else self.optimal.bands

    def coordinates(self, error: Tensor) -> Tensor:
        """Differences of images (M, C, ...) in coordinates in which the reverse variance is diagonal, float64 where
        there is one.
        """
        if self.optimal is None or self.bands is None:
            return as_float64(error)
        self.optimal.check_shape(error.shape[1:])
        return self.bands.transform(as_float64(error))

    def _weight_x(self, site: Tensor) -> Tensor:
        """Nats for a unit of (x - x_hat)^2 in any coordinate: (M,), or (M, C, bands)."""
        s, t = self.grid[site.long() - 1], self.grid[site.long()]
        if self.reverse_variance in ("posterior", "learned", "learned_range"):  # 1/2 (SNR_s - SNR_t)
            return discrete_weight_x(s, t)
        variance = self.variance(site)
        return 0.5 * (posterior_coefficients(t, s).x ** 2).reshape(-1, *[1] * (variance.ndim - 1)) / variance

    def _scale_x(self, site: Tensor) -> Tensor:
        """Nats for a unit of |x - x_hat|^2, (M,): in the mean, where frequencies differ."""
        weight = self._weight_x(site)
        if self.optimal is None or self.bands is None:
            return weight
        mse = self.optimal.at(self.grid[site.long()])
        mse = mse + 1e-12 * mse.amax((1, 2), keepdim=True) + 1e-300  # an exact network of known images has none
        return self.optimal.mean(weight * mse) / self.optimal.mean(mse)

    def variance(self, site: Tensor) -> Tensor:
        """The reverse variance at sites (M,), of learned ones the posterior's: (M,), or (M, C, bands)."""
        s, t = self.grid[site.long() - 1], self.grid[site.long()]
        if self.optimal is not None:
            return self.optimal.variance(s, t)
        return forward_variance(s, t) if self.reverse_variance == "forward" else posterior_variance(s, t)

    def scale(self, site: Tensor) -> Tensor:
        t = self.grid[site.long()]
        return torch.where(t == -math.inf, 0.0, self._scale_x(site) * torch.exp(-t))

    def constant(self, site: Tensor, num_dims: int) -> Tensor:
        if self.reverse_variance in ("posterior", "learned", "learned_range"):
            return torch.zeros_like(site)
        variance = self.variance(site)
        posterior = posterior_variance(self.grid[site.long() - 1], self.grid[site.long()])
        divergence = variance_divergence(posterior.reshape(-1, *[1] * (variance.ndim - 1)), variance)
        return 0.5 * num_dims * (divergence if self.optimal is None else self.optimal.mean(divergence))

    def nats(self, site: Tensor, error: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        if self.bands is not None:
            sums = self.bands.sums(self.coordinates(error) ** 2).to("cpu", torch.float64)
            return self.constant(site, error[0].numel()) + to_x * (self._weight_x(site) * sums).sum((1, 2))
        if self.reverse_variance not in ("learned", "learned_range"):
            return self.constant(site, error[0].numel()) + self._scale_x(site) * to_x * sum64(error**2)
        if variance is None:
            raise ValueError("a learned reverse variance needs a network that predicts it.")
        s, t = self.grid[site.long() - 1], self.grid[site.long()]
        posterior = posterior_coefficients(t, s)
        reverse = learned_variance_of(variance, self.reverse_variance, posterior.variance, forward_variance(s, t))
        ratio = expand_to(posterior.variance, reverse) / reverse
        return 0.5 * sum64(ratio - 1 - ratio.log() + expand_to(posterior.x**2 * to_x, reverse) * error**2 / reverse)


@dataclass(frozen=True, eq=False)
class Profile:
    """A positive function of log SNR, its logarithm linear between knots: where evaluations are worth most.

    Attributes:
        knots: (B,) increasing log SNRs. values: (B,).
        decoder_share: of the evaluations, for a decoder that needs the network.
    """

    knots: Tensor
    values: Tensor
    decoder_share: float = 0.125

    def at(self, log_snr: Tensor) -> Tensor:
        return torch.exp(hat_weights(self.knots, log_snr) @ self.values.log())


def _mixed(weight: Tensor, default: Tensor) -> Tensor:
    """Nine parts in proportion to `weight`, one part `default`; sums to one.

    No density falls too low, whatever the pilot said.
    """
    return 0.9 * weight / weight.sum() + 0.1 * default / default.sum()
