r"""Estimators of the likelihood of integer data under a diffusion model, with an error bar that can be trusted.

The bound of `vdm_diffusers.elbo` has three terms. The prior's is closed form. VDM's reconstruction term is an integral over
one normal variable for each level of a pixel, done here by quadrature; DDPM's needs the network at x_1. The diffusion term is
a sum (or an integral) over log SNR of an expectation over noise, and is estimated by Monte Carlo:

    L = sum over the sites of w(site) E|x - x_hat|^2 + constant(site)    ~    mean_j f(site_j, eps_j) / density(site_j)

Sites are placed by a randomly shifted lattice over all images of a group and all their evaluations, folded (`time_sampling.fold`)
and passed through the inverse of a cumulative density. Every image has several lattices with independent shifts and noise:
they are replicates, and their scatter gives the error of the estimate for these very images. (The scatter of the points of one
lattice says nothing of the lattice's error, which may be a hundred times smaller.)

Evaluations of an image at neighbouring sites have noise from one Latin hypercube: each pixel has one of them in each quarter of the normal
distribution, and what single pixels add to the loss averages out (Stein 1987, "Large sample properties of simulations using Latin
hypercube sampling"). More of them at a time would lie too far apart in log SNR.

Everything here is in torch alone. `vdm_diffusers.evaluate_likelihood` adapts pipelines, schedulers and data sets to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .control_variates import Controls, PixelDenoiser, Surrogate, WienerDenoiser, gauss_legendre, hat_weights
from .decoders import (
    PixelEncoding,
    bin_width,
    decode_pixels,
    discretized_gaussian_log_likelihood,
    encode_pixels,
    level_values,
    softmax_log_likelihood,
)
from .elbo import discrete_weight_x, prior_kl
from .frequency import RadialBands
from .gaussian import alpha_sigma, diffuse, posterior_coefficients, variance_divergence
from .numerics import as_float64, expand_to, sum_except_batch
from .prediction import PredictionType, convert, loss_weight_ratio, prediction_target
from .repetitions import Budget, Runner, mix_seed, repeat, run_all
from .reverse_variance import (
    OptimalVariance,
    ReverseVariance,
    forward_variance,
    learned_range_variance,
    posterior_variance,
)
from .time_sampling import fold, latin_hypercube

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t (M, C, ...), log_snr (M,) float64 on the CPU, index (M,) of the images) -> the network's output (M, C or 2 C, ...)."""

_GROUPS = 32  # groups of images with shifts of their own: the degrees of freedom of the error bar
_FITTED = 200_000  # evaluations that control variates are fitted to, at most
_KNOTS = 32  # of the functions of log SNR that are learned, at most
_NOISE_BLOCK = 16  # evaluations of one image whose noise comes from one seed
_LONGEST_INTERVAL = 0.5  # of log SNR, for Gauss's rule: the means of the controls are smooth, but not flat
_LEAST_FREEDOM = 24  # degrees of freedom of an error that decides how many evaluations follow
_STRATA = 4  # evaluations of one image, neighbours in log SNR, whose noises are stratified together


@dataclass(frozen=True, eq=False)
class LikelihoodReport:
    """What an estimator found: a bound on -ln p(x) (or an estimate of it) for each image, with the error of their mean.

    Attributes:
        method: name of the estimator.
        nats: (N,) float64, -ln p(x) of every image, or a bound on it from above.
        prior, diffusion, reconstruction: (N,) nats, the terms of the bound; None where the method has no such term.
        num_dims: D, dimensions of an image (pixels times channels).
        standard_error: bits/dim, one standard deviation of the estimator of `bits_per_dim` for these very images: what more
            evaluations would reduce.
        is_bound: whether `nats` bounds -ln p(x) from above in expectation.
        num_model_evaluations: how many times the network was applied to one image.
        settings: how the figure came about: number of steps, decoder, levels, ... (JSON primitives).
        loss_curve: the network's loss against log SNR: lists `log_snr` (centre of a bin), `mse` (mean |eps - eps_hat|^2 / D),
            `count`; None where no such loss was measured.
    """

    method: str
    nats: Tensor
    prior: Tensor | None
    diffusion: Tensor | None
    reconstruction: Tensor | None
    num_dims: int
    standard_error: float
    is_bound: bool
    num_model_evaluations: int
    settings: dict[str, Any] = field(default_factory=dict)
    loss_curve: dict[str, list[float]] | None = None

    @property
    def bits_per_dim(self) -> float:
        """The mean over the images, in bits for each dimension."""
        return self._bits(self.nats)

    @property
    def nats_per_dim(self) -> float:
        """The mean over the images, in nats for each dimension: the usual unit for continuous data."""
        return float(self.nats.double().mean()) / self.num_dims

    @property
    def sampling_error(self) -> float:
        """bits/dim, std / sqrt(N) between the images: how far another sample of N images would differ. NaN for one image."""
        if len(self.nats) < 2:
            return math.nan
        return float(self.nats.std()) / math.sqrt(len(self.nats)) / (self.num_dims * math.log(2))

    @property
    def total_error(self) -> float:
        """bits/dim, sqrt(standard_error^2 + sampling_error^2): of the mean over all images that might have been drawn."""
        return math.hypot(self.standard_error, self.sampling_error)

    def to_dict(self, per_image: bool = False) -> dict[str, Any]:
        """JSON primitives: means in bits/dim, errors, counts and settings; with `per_image` the lists of nats as well."""
        terms = {"prior": self.prior, "diffusion": self.diffusion, "reconstruction": self.reconstruction}
        summary: dict[str, Any] = {
            "method": self.method,
            "bits_per_dim": self.bits_per_dim,
            "standard_error": self.standard_error,
            "sampling_error": None if math.isnan(self.sampling_error) else self.sampling_error,
            "total_error": None if math.isnan(self.total_error) else self.total_error,
            **{name: None if term is None else self._bits(term) for name, term in terms.items()},
            "is_bound": self.is_bound,
            "num_images": len(self.nats),
            "num_dims": self.num_dims,
            "num_model_evaluations": self.num_model_evaluations,
            "settings": dict(self.settings),
            "loss_curve": self.loss_curve,
        }
        if per_image:
            terms = {"nats": self.nats, **terms}
            summary["per_image"] = {name: term.tolist() for name, term in terms.items() if term is not None}
        return summary

    def _bits(self, nats: Tensor) -> float:
        return float(nats.double().mean()) / (self.num_dims * math.log(2))

    def __str__(self) -> str:
        bound = " (upper bound)" if self.is_bound else ""
        is_density = self.settings.get("num_levels", 0) is None  # continuous data, whose usual unit is nats
        value, unit, scale = (
            (self.nats_per_dim, "nats", math.log(2)) if is_density else (self.bits_per_dim, "bits", 1.0)
        )
        images = f" +- {self.sampling_error * scale:.4f} (images)" if len(self.nats) > 1 else ""
        return (
            f"{value:.4f} {unit}/dim{bound}, {self.method}, {len(self.nats)} image{'s' if len(self.nats) > 1 else ''}: "
            f"+- {self.standard_error * scale:.4f} (estimator){images}"
        )


@dataclass(frozen=True, eq=False)
class DenoisingModel:
    """A network and what its output means.

    Attributes:
        predict: see `Predict`.
        prediction_type: what the (first half of the channels of the) output predicts.
        num_levels, pixel_encoding: how integer data are put into [-1, 1]; num_levels=None: the data are continuous, as they are.
        learned_variance: None, or the meaning of the output's second half of channels.
        clip_denoised: clamp x_hat to [-1, 1]. The bound holds for any x_hat: this is another model, not another estimate.
    """

    predict: Predict
    prediction_type: PredictionType
    num_levels: int | None = 256
    pixel_encoding: PixelEncoding = "bin_center"
    learned_variance: Literal["learned", "learned_range"] | None = None
    clip_denoised: bool = False

    def check(self, levels: Tensor) -> None:
        """Raise ValueError unless there are images, whose values fit."""
        if len(levels) == 0:
            raise ValueError("`images` holds no image.")
        if self.num_levels is None:
            return
        low, high = int(levels.min()), int(levels.max())
        if not 0 <= low <= high < self.num_levels:
            raise ValueError(
                f"`images` must hold levels in 0..{self.num_levels - 1}, got {low}..{high}. Is `num_levels` right?"
            )

    def encode(self, data: Tensor) -> Tensor:
        """Integers, or continuous data, as the diffusion sees them: float32."""
        return data.float() if self.num_levels is None else encode_pixels(data, self.num_levels, self.pixel_encoding)

    def outputs(self, z_t: Tensor, log_snr: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's prediction (M, C, ...) and its variance channels (M, C, ...) or None.

        Raises:
            ValueError: an output of another shape, or one that is not finite.
        """
        output = self.predict(z_t, log_snr, index)
        channels = z_t.shape[1]
        if output.shape[2:] != z_t.shape[2:] or output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model's output must have the sample's shape {tuple(z_t.shape)} (or twice its channels, with a variance), "
                f"got {tuple(output.shape)}."
            )
        if self.learned_variance is not None and output.shape[1] != 2 * channels:
            raise ValueError(
                f"the scheduler says variance_type={self.learned_variance!r}, but the model's output has no channels for a "
                f"variance: {channels} in, {output.shape[1]} out. Pass variance_type='fixed_small' or 'fixed_large'."
            )
        if not bool(output.isfinite().all()):
            raise ValueError(
                "the model's output is not finite: a diverged training, or half precision that overflows. No likelihood "
                "can be computed."
            )
        value = output[:, :channels].to(torch.promote_types(output.dtype, torch.float32))
        return value, output[:, channels:] if self.learned_variance is not None else None

    def denoised(self, value: Tensor, z_t: Tensor, log_snr: Tensor) -> Tensor:
        """x_hat of a prediction made at z_t."""
        x_hat = convert(value, z_t, log_snr, source=self.prediction_type, target="sample")
        return x_hat.clamp(-1, 1) if self.clip_denoised else x_hat

    def error(self, value: Tensor, x: Tensor, noise: Tensor, z_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """The elementwise error of the prediction, (M, C, ...), and the factor (M,) that makes its square one of x_hat.

        The error is formed in the network's own terms, where it suffers no cancellation.
        """
        if self.clip_denoised:
            return self.denoised(value, z_t, log_snr) - x, torch.ones_like(log_snr)
        target = prediction_target(x, noise, log_snr, self.prediction_type)
        return value - target, loss_weight_ratio(log_snr, source=self.prediction_type, target="sample")


# --- the diffusion term ------------------------------------------------------------------------------------------------


class DiffusionTerm(ABC):
    """The diffusion term of a bound, as a sum or an integral over sites."""

    @abstractmethod
    def place(self, u: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        """Points of [0, 1) -> sites (float64, of u's shape) and the inverse of their density.

        Without a profile (the standard deviation of the loss that is to be averaged) a fixed density is used.
        """

    @abstractmethod
    def scale(self, site: Tensor) -> Tensor:
        """Nats for a unit of |eps - eps_hat|^2 at a site; 0 where there is no signal. (For learned variances: about.)"""

    @abstractmethod
    def constant(self, site: Tensor, num_dims: int) -> Tensor:
        """The part of the integrand that does not depend on the network."""

    @abstractmethod
    def quadrature(self, knots: Tensor) -> tuple[Tensor, Tensor]:
        """Sites and weights that sum or integrate smooth functions (piecewise between knots in log SNR) over the term."""

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
                f"the continuous-time bound needs finite end points, got log_snr from {self.log_snr_max} to {self.log_snr_min}. "
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
        optimal: the mean squared errors that 'optimal' needs. With one for each band of frequencies the reverse variance is diagonal
            in the cosine transform, in whose coordinates both Gaussians of a step's KL factorise.
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
        """Differences of images (M, C, ...) in coordinates in which the reverse variance is diagonal, float64 where there is one."""
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


# --- decoders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxDecoder:
    """VDM's decoder p(k | z_0), whose expectation over z_0 is exact: no network, no sampling."""

    log_snr_0: float


@dataclass(frozen=True)
class GaussianDecoder:
    """DDPM's decoder p(k | x_1): the mass of N(x_hat(x_1), variance) in each pixel's bin.

    Attributes:
        log_snr_1: of x_1, the first entry of the chain.
        variance: of the decoder; DDPM takes the posterior variance of the second step. With `learned` it is the lower end
            of the range (learned_range) or not used (learned).
        upper_variance: the upper end of the range, beta_1.
        learned: None, or what the network's second half of channels means.
    Source: Ho et al. 2020, equation 13, and section 3.2 of Nichol & Dhariwal 2021 for learned variances.
    """

    log_snr_1: float
    variance: float
    upper_variance: float = math.nan
    learned: Literal["learned", "learned_range"] | None = None

    def nats(self, model: DenoisingModel, levels: Tensor, x_hat: Tensor, variance: Tensor | None) -> Tensor:
        """-ln p(k | x_1), (M,), from x_hat at x_1."""
        used: Tensor | float = self.variance
        if self.learned is not None:
            if variance is None:
                raise ValueError("a learned decoder variance needs a network that predicts it.")
            used = learned_variance_of(
                variance, self.learned, as_float64(self.variance), as_float64(self.upper_variance)
            )
        if model.num_levels is None:
            raise ValueError("continuous data have no levels that DDPM's decoder could weigh: use DensityDecoder.")
        return -discretized_gaussian_log_likelihood(
            levels, x_hat, used, num_levels=model.num_levels, pixel_encoding=model.pixel_encoding
        )


@dataclass(frozen=True)
class DensityDecoder:
    """The Gaussian density N(x; z_0 / alpha_0, (sigma_0 / alpha_0)^2) of continuous data: no network, no sampling."""

    log_snr_0: float


Decoder = SoftmaxDecoder | GaussianDecoder | DensityDecoder


def expected_reconstruction(model: DenoisingModel, decoder: SoftmaxDecoder | DensityDecoder, levels: Tensor) -> Tensor:
    """E[-ln p(x | z_0)], exactly: (N,) nats."""
    if isinstance(decoder, DensityDecoder):
        per_dim = 0.5 * (math.log(2 * math.pi * math.e) - decoder.log_snr_0)
        return torch.full((len(levels),), levels[0].numel() * per_dim, dtype=torch.float64)
    if model.num_levels is None:
        raise ValueError("continuous data have no levels that a softmax could decode: use DensityDecoder.")
    table = expected_softmax_nats(decoder.log_snr_0, model.num_levels, model.pixel_encoding)
    return torch.cat([sum_except_batch(table[part.long()]) for part in levels.split(1024)])


def expected_softmax_nats(log_snr_0: float, num_levels: int, pixel_encoding: PixelEncoding) -> Tensor:
    """E[-ln p(k | z_0)] over z_0 ~ q(z_0 | x_k) for every level k: (L,) float64 nats, the exact reconstruction term of a pixel.

    With z_0 / alpha_0 = x_k + sigma_0 / alpha_0 e, e ~ N(0, 1), and delta = bin width alpha_0 / sigma_0, the logits are
    -m delta (2 e + m delta) / 2 for the level m places away, and the expectation is one integral over e, done
    by the trapezoidal rule, whose error falls exponentially for such functions (below 1e-13 here).
    """
    delta = min(bin_width(num_levels, pixel_encoding) * math.exp(log_snr_0 / 2), 25.0)  # beyond 25: below 1e-33 nats
    step = min(0.25, 0.5 / delta)
    e = torch.arange(-math.ceil(10 / step), math.ceil(10 / step) + 1, dtype=torch.float64) * step
    density = torch.exp(-(e**2) / 2) * (step / math.sqrt(2 * math.pi))
    reach = min(num_levels - 1, math.ceil(30 / delta))  # farther levels have less than e^-130 of the mass
    m = torch.arange(1, reach + 1, dtype=torch.float64) * delta
    zero = torch.zeros(len(e), 1, dtype=torch.float64)
    # log-sum-exp over the 0..reach levels above (with the level itself) and below, for every number of them
    above = torch.cat([zero, -m * (2 * e[:, None] + m) / 2], dim=1).logcumsumexp(dim=1)
    below = torch.cat([zero - math.inf, -m * (-2 * e[:, None] + m) / 2], dim=1).logcumsumexp(dim=1)
    k = torch.arange(num_levels)
    left, right = k.clamp(max=reach), (num_levels - 1 - k).clamp(max=reach)
    table = torch.empty(num_levels, dtype=torch.float64)
    for part in torch.arange(num_levels).split(1024):
        table[part] = density @ torch.logaddexp(above[:, right[part]], below[:, left[part]])
    return table


# --- the estimator -----------------------------------------------------------------------------------------------------


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
    """Nine parts in proportion to `weight`, one part `default`; sums to one. No density falls too low, whatever the pilot said."""
    return 0.9 * weight / weight.sum() + 0.1 * default / default.sum()


@dataclass(frozen=True, eq=False)
class _Layout:
    """What each of an image's evaluations is for: (n,) its replicate, and whether it belongs to the decoder."""

    replicate: Tensor
    is_decoder: Tensor

    @property
    def num_replicates(self) -> int:
        return int(self.replicate[-1]) + 1

    @property
    def strata(self) -> Tensor:
        """(n,) the block that a column belongs to: up to `_STRATA` neighbours for the same use in the same replicate; ascending."""
        use = 2 * self.replicate + ~self.is_decoder
        columns = torch.arange(len(use))
        return use * len(use) + (columns - torch.searchsorted(use, use)) // _STRATA

    @classmethod
    def of(cls, num_images: int, num_samples: int, decoder: Decoder, share: float) -> _Layout:
        least = _fewest_samples(decoder)
        if num_samples < 2 * least:
            raise ValueError(
                f"`num_samples` must be at least {2 * least}, got {num_samples}: the error bar comes from two independent "
                f"estimates{', each with the network at x_1 and at another step' if least > 1 else ''}."
            )
        own = least - 1  # evaluations that the decoder needs in each replicate
        groups = math.ceil(num_images / _group_size(num_images))
        replicates = max(2, min(8, math.ceil(16 / groups) + 1, num_samples // (2 * least)))
        sizes = [num_samples // replicates + (r < num_samples % replicates) for r in range(replicates)]
        decoders = [own * max(1, min(size - 1, round(share * size))) for size in sizes]
        replicate = torch.repeat_interleave(torch.arange(replicates), torch.tensor(sizes))
        is_decoder = torch.cat([torch.arange(size) < first for size, first in zip(sizes, decoders, strict=True)])
        return cls(replicate, is_decoder)

    def place(
        self, num_images: int, term: DiffusionTerm, profile: Profile | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Sites (m, n) of a group of images and the inverse of their density; 1 and 1 for the decoder's evaluations."""
        sites = torch.ones(num_images, len(self.replicate), dtype=torch.float64)
        inverse_density = torch.ones_like(sites)
        for r in range(self.num_replicates):
            columns = ((self.replicate == r) & ~self.is_decoder).nonzero()[:, 0]
            n = len(columns)
            # one lattice over all images of the group, dealt to them at random
            order = torch.randperm(num_images, generator=generator)
            shift = torch.rand((), generator=generator, dtype=torch.float64)
            lattice = (order[:, None] + num_images * torch.arange(n)).double()
            u = fold((lattice / (num_images * n) + shift) % 1.0)
            sites[:, columns], inverse_density[:, columns] = term.place(u, profile)
        return sites, inverse_density


@dataclass(frozen=True, eq=False)
class _Round:
    """Evaluations (N, n) of all images: sites, what the network's answers cost there, and the features of the surrogate."""

    layout: _Layout
    site: Tensor
    inverse_density: Tensor
    log_snr: Tensor
    nats: Tensor
    features: Tensor  # (N, n, F)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Everything that stays the same from round to round."""

    model: DenoisingModel
    levels: Tensor
    term: DiffusionTerm
    decoder: Decoder
    controls: Controls
    variance_reduction: bool
    batch_size: int
    seed: int
    device: torch.device
    progress: Callable[[int], object] | None
    runner: Runner
    curve: _LossCurve

    @property
    def groups(self) -> Tensor:
        """(N,) the group of every image."""
        return torch.arange(len(self.levels)) // _group_size(len(self.levels))

    @property
    def num_dims(self) -> int:
        return self.levels[0].numel()

    @property
    def no_surrogate(self) -> Surrogate:
        return Surrogate(
            torch.zeros(1, dtype=torch.float64), torch.zeros(1, self.controls.num_features, dtype=torch.float64)
        )

    def encode(self, rows: Tensor | slice) -> Tensor:
        return self.model.encode(self.levels[rows])


def evaluate_bound(
    model: DenoisingModel,
    levels: Tensor,
    term: DiffusionTerm,
    decoder: Decoder,
    prior_log_snr: float,
    *,
    num_samples: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    variance_reduction: bool = True,
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner = run_all,
) -> LikelihoodReport:
    """The bound for integer images from `num_samples` evaluations of the network for each, stratified.

    The steps of a `DiscreteTerm` are strata too: they are drawn in proportion to what they add to the error, and not each once.

    A first round of evaluations (an eighth of them, if there are enough) is placed by a fixed density, and shows where the rest is
    worth most: at log SNRs in proportion to the standard deviation of what is to be averaged. Control variates
    (`control_variates`) are fitted to all evaluations, for each half of the images on the other half (cross-fitting), so
    that the estimate stays unbiased.

    Arguments:
        levels: (N, C, ...) integers 0..num_levels-1, on the CPU.
        term: `ContinuousTerm` or `DiscreteTerm`: the diffusion term that is estimated.
        decoder: `SoftmaxDecoder` (at z_0) or `GaussianDecoder` (at x_1, with a part of the evaluations).
        prior_log_snr: log SNR of z_1.
        num_samples: evaluations of the network for an image.
        batch_size: evaluations at a time. The result does not depend on it (but for rounding in the network).
        seed: of the noise and the shifts. Every image has noise of its own, whatever its place in a batch.
        variance_reduction: use importance sampling, stratified noise and control variates; False leaves the plain average over the
            lattices.
        target_standard_error: bits/dim; go on with further rounds until the estimate's error should be at most this. Independent
            evaluations decide it, the first `num_samples` and later an eighth, and are left out of the estimate, which is therefore
            unbiased. The error that is reported is the estimate's own, and may come out a little above the target.
        max_model_evaluations: stop before more than these, reached or not. `num_samples` for each image come first.
        progress: called with the number of evaluations done, after every batch.
        runner: see `Runner`.
    Raises:
        ValueError: no images, too few samples, levels outside the range, a network whose output does not fit.
    """
    model.check(levels)
    count = len(levels)
    budget = Budget(target_standard_error, max_model_evaluations)
    budget.check(num_samples * count, f"{num_samples} x {count}")
    some = torch.linspace(0, count - 1, min(count, 4096), dtype=torch.float64).round().long()
    problem = _Problem(
        model=model,
        levels=levels,
        term=term,
        decoder=decoder,
        controls=_fit_controls(model, levels[some], term),
        variance_reduction=variance_reduction,
        batch_size=batch_size,
        seed=seed,
        device=torch.device(device),
        progress=progress,
        runner=runner,
        curve=_LossCurve(),
    )
    rounds, deciding = _evaluate_rounds(problem, num_samples, budget)
    estimate = _estimate(problem, rounds, deciding)
    scale = problem.num_dims * math.log(2) * count
    prior = torch.cat(
        [prior_kl(problem.encode(part), prior_log_snr) for part in torch.arange(count).split(1024)]
    ).double()
    reconstruction = (
        estimate.decoder if isinstance(decoder, GaussianDecoder) else expected_reconstruction(model, decoder, levels)
    )
    return LikelihoodReport(
        method="discrete" if isinstance(term, DiscreteTerm) else "continuous",
        nats=prior + estimate.diffusion + reconstruction,
        prior=prior,
        diffusion=estimate.diffusion,
        reconstruction=reconstruction,
        num_dims=problem.num_dims,
        standard_error=math.sqrt(estimate.variance) / scale,
        is_bound=True,
        num_model_evaluations=count * sum(r.nats.shape[1] for r in (*rounds, *deciding)),
        loss_curve=problem.curve.to_dict(problem.num_dims),
    )


def _evaluate_rounds(problem: _Problem, num_samples: int, budget: Budget) -> tuple[list[_Round], list[_Round]]:
    """The rounds that are reported, and those that decided how many they are; the latter only where a target is asked for.

    Losses are skewed: where an estimate happens to be low its error is low too. Going on until the error of an estimate is small
    therefore stops at low estimates. So independent rounds, the first ones and later an eighth, say what an evaluation is worth.
    """
    count, decoder = len(problem.levels), problem.decoder
    scale = problem.num_dims * math.log(2) * count
    least = 2 * _fewest_samples(decoder)
    rounds: list[_Round] = []
    deciding: list[_Round] = []
    profile = None

    def evaluate(size: int, into: list[_Round]) -> None:
        nonlocal profile
        into.append(_evaluate(problem, size, profile, [*deciding, *rounds]))
        if problem.variance_reduction:
            profile = _learned_profile(problem, [*deciding, *rounds])

    for size in _round_sizes(count, num_samples, decoder, problem.variance_reduction):
        evaluate(size, deciding)
    if budget.target_standard_error is None:
        return deciding, []
    groups = int(problem.groups[-1]) + 1
    while True:
        done, decided = (sum(r.nats.shape[1] for r in part) for part in (rounds, deciding))
        freedom = groups * sum(r.layout.num_replicates - 1 for r in deciding)
        if freedom < _LEAST_FREEDOM or decided < done // 8:
            size, into = max(8 * least, (done // 8 - decided) // least * least), deciding
        else:
            variance = _estimate(problem, deciding, rounds).variance * decided
            size = budget.next_round(math.sqrt(variance) / scale, done, max(done, decided), least)
            into = rounds
        room = budget.room(count, done + decided) // least * least
        if size > 0 and room > 0:
            evaluate(min(size, room), into)
        if (
            size == 0 or size >= room
        ):  # the target, or the limit; by which the part is reported that has more evaluations
            done, decided = (sum(r.nats.shape[1] for r in part) for part in (rounds, deciding))
            return (rounds, deciding) if size == 0 or done >= decided else (deciding, rounds)


def _fit_controls(model: DenoisingModel, levels: Tensor, term: DiffusionTerm) -> Controls:
    """The cheap denoisers, fitted to images."""
    wiener = WienerDenoiser.fit(model.encode(levels))
    if model.num_levels is None:
        return Controls(wiener, None)
    values = level_values(model.num_levels, model.pixel_encoding)
    counts = levels.flatten().long().bincount(minlength=model.num_levels)
    ends = term.log_snr_range()
    return Controls(wiener, PixelDenoiser.fit(values, counts, *ends))


def _fewest_samples(decoder: Decoder) -> int:
    """Evaluations that one replicate needs."""
    return 2 if isinstance(decoder, GaussianDecoder) else 1


def _round_sizes(count: int, num_samples: int, decoder: Decoder, adaptive: bool) -> list[int]:
    """Evaluations of an image in the pilot and in the main round, or in the only one if there is nothing to learn."""
    least = 2 * _fewest_samples(decoder)
    pilot = max(least, num_samples // 8, min(num_samples // 4, math.ceil(512 / count)))
    if not adaptive or pilot * count < 192 or num_samples - pilot < least:
        return [num_samples]
    return [pilot, num_samples - pilot]


def _evaluate(problem: _Problem, num_samples: int, profile: Profile | None, before: list[_Round]) -> _Round:
    """A round: `num_samples` further evaluations of every image."""
    count, term, number = len(problem.levels), problem.term, len(before)
    share = 0.125 if profile is None else profile.decoder_share
    layout = _Layout.of(count, num_samples, problem.decoder, share)
    groups = torch.arange(count).split(_group_size(count))
    placed = [
        layout.place(
            len(rows), term, profile, torch.Generator().manual_seed(mix_seed(problem.seed, "shift", number, i))
        )
        for i, rows in enumerate(groups)
    ]
    site, inverse_density = (torch.cat(parts) for parts in zip(*placed, strict=True))
    log_snr = term.log_snr(site)
    if isinstance(problem.decoder, GaussianDecoder):
        log_snr = torch.where(layout.is_decoder, problem.decoder.log_snr_1, log_snr)
    per_block = max(1, problem.batch_size // num_samples)  # a block is what a runner runs or keeps
    blocks = torch.arange(count).split(per_block)
    sizes = "-".join(str(n) for n in (*(r.nats.shape[1] for r in before), num_samples))
    work = [
        (f"{sizes}-{i}", partial(_evaluate_block, problem, layout, rows, site, log_snr, number))
        for i, rows in enumerate(blocks)
    ]
    nats, loss, *features = torch.cat(problem.runner(work), dim=1)
    if not bool(nats.isfinite().all()):
        raise ValueError(
            f"the loss is not finite at log_snr = {float(log_snr[~nats.isfinite()][0]):.3g}: the network's outputs are too large for "
            "float32, as of a diverged training. No likelihood can be computed."
        )
    problem.curve.add(log_snr, loss)
    return _Round(layout, site, inverse_density, log_snr, nats, torch.stack(features, dim=-1))


def _evaluate_block(
    problem: _Problem, layout: _Layout, rows: Tensor, site: Tensor, log_snr: Tensor, number: int
) -> Tensor:
    """(2 + F, m, n) of the images `rows`: nats, |eps - eps_hat|^2, and the features of the surrogate."""
    n = site.shape[1]
    model, decoder, device = problem.model, problem.decoder, problem.device
    strata = layout.strata if problem.variance_reduction else None
    result = torch.empty(2 + problem.controls.num_features, len(rows), n, dtype=torch.float64)
    for flat in torch.arange(len(rows) * n).split(problem.batch_size):
        row, column = flat // n, flat % n
        index = rows[row]
        k = problem.levels[index].to(device)
        x = model.encode(k)
        noise = _noise(index, column, x.shape[1:], problem.seed, number, strata).to(device)
        own, at, ell = layout.is_decoder[column], site[index, column], log_snr[index, column]
        z_t = diffuse(x, noise, ell)
        value, variance = model.outputs(z_t, ell, index)
        error, to_x = model.error(value, x, noise, z_t, ell)
        nats = problem.term.nats(at, error, to_x, variance)
        if isinstance(decoder, GaussianDecoder) and bool(own.any()):
            mine = own.to(device)
            nats[own] = decoder.nats(
                model,
                k[mine],
                model.denoised(value[mine], z_t[mine], ell[own]),
                None if variance is None else variance[mine],
            ).to("cpu", torch.float64)
        features = problem.controls.features(x, k, noise, z_t, ell)
        result[:, row, column] = torch.cat([torch.stack([nats, ell.exp() * to_x * sum64(error**2)]), features])
        if problem.progress is not None:
            problem.progress(len(flat))
    return result


# --- from evaluations to an estimate -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Estimate:
    diffusion: Tensor  # (N,) nats
    decoder: Tensor  # (N,) nats; zero if the decoder needs no network
    variance: float  # of the sum over the images, nats^2


def _folds(problem: _Problem, layout: _Layout) -> Tensor:
    """(N, n) of 0 and 1. Cross-fitting: the surrogate that is subtracted in fold f is fitted to fold 1 - f.

    The two folds have independent noise and shifts, so that the estimate stays unbiased.
    """
    groups = problem.groups
    if int(groups[-1]) > 0:
        return (groups % 2)[:, None].expand(-1, len(layout.replicate))
    return (layout.replicate % 2).expand(len(groups), -1)


def _records(problem: _Problem, rounds: list[_Round], fold: int | None, of_decoder: bool) -> tuple[Tensor, ...]:
    """Evaluations to fit to, those of a fold or all: log SNR, features, loss, its weight in the estimate."""
    parts = []
    for r in rounds:
        chosen = (r.layout.is_decoder == of_decoder).expand(r.nats.shape)
        if fold is not None:
            chosen = chosen & (_folds(problem, r.layout) == fold)
        if of_decoder:
            loss, weight = r.nats[chosen], torch.ones_like(r.nats[chosen])
        else:
            site = r.site[chosen]
            scale = problem.term.scale(site)
            loss = torch.where(
                scale > 0, (r.nats[chosen] - problem.term.constant(site, problem.num_dims)) / scale, 0.0
            )
            weight = scale * r.inverse_density[chosen]
        parts.append((r.log_snr[chosen], r.features[chosen], loss, weight, chosen.nonzero()[:, 0]))
    log_snr, features, loss, weight, image = (torch.cat(values) for values in zip(*parts, strict=True))
    if of_decoder:
        # one site for all: what an image's evaluations have in common is no business of the controls
        means = problem.controls.num_means
        features = torch.cat([torch.zeros_like(features[:, :means]), features[:, means:]], dim=1)
        both = torch.cat([loss[:, None], features], dim=1)
        sums = torch.zeros(len(problem.levels), both.shape[1], dtype=torch.float64).index_add_(0, image, both)
        both = both - (sums / image.bincount(minlength=len(sums)).clamp(min=1)[:, None])[image]
        loss, features = both[:, 0], both[:, 1:]
    keep = (weight > 0).nonzero()[:, 0]
    if len(keep) > _FITTED:
        keep = keep[torch.linspace(0, len(keep) - 1, _FITTED, dtype=torch.float64).round().long()]
    return log_snr[keep], features[keep], loss[keep], weight[keep]


def _fit(problem: _Problem, rounds: list[_Round], fold: int | None, of_decoder: bool) -> Surrogate:
    """The surrogate fitted to one fold; of zeros if there is too little to fit to."""
    log_snr, features, loss, weight = _records(problem, rounds, fold, of_decoder)
    if len(loss) < 4 * problem.controls.num_features:
        return problem.no_surrogate
    number = 1 if of_decoder else max(1, min(_KNOTS, len(loss) // (6 * problem.controls.num_features)))
    knots = torch.linspace(float(log_snr.min()), float(log_snr.max()), number, dtype=torch.float64)
    if number > 1 and not bool((knots.diff() > 0).all()):
        knots = knots[:1]
    return Surrogate.fit(knots, log_snr, features, loss, (weight / weight.mean()) ** 2)


def _learned_profile(problem: _Problem, rounds: list[_Round]) -> Profile:
    """The standard deviation of what the surrogate leaves of the loss, against log SNR, and the decoder's part."""
    surrogates = [_fit(problem, rounds, 1 - fold, of_decoder=False) for fold in (0, 1)]
    parts = [_records(problem, rounds, fold, of_decoder=False) for fold in (0, 1)]
    log_snr = torch.cat([part[0] for part in parts])
    rest = torch.cat([loss - (s.at(ell) * f).sum(-1) for s, (ell, f, loss, _) in zip(surrogates, parts, strict=True)])
    number = max(2, min(_KNOTS, len(rest) // 32))
    knots = torch.linspace(float(log_snr.min()), float(log_snr.max()) + 1e-9, number, dtype=torch.float64)
    hats = hat_weights(knots, log_snr)
    overall = rest.square().mean()
    # two evaluations' worth of the overall mean keeps an empty neighbourhood finite
    values = torch.sqrt((hats.T @ rest.square() + 2e-3 * overall) / (hats.sum(0) + 2e-3)).clamp(min=1e-150)
    profile = Profile(knots, values)
    if not isinstance(problem.decoder, GaussianDecoder):
        return profile
    # the best shares are in proportion to the deviations of a single evaluation of either kind
    decoded = [
        loss - (_fit(problem, rounds, 1 - fold, of_decoder=True).at(ell) * f).sum(-1)
        for fold in (0, 1)
        for ell, f, loss, _ in [_records(problem, rounds, fold, of_decoder=True)]
    ]
    sd_decoder = float(torch.cat(decoded).square().mean().sqrt())
    site, weight = problem.term.quadrature(knots)
    contribution = weight * problem.term.scale(site) * profile.at(problem.term.log_snr(site))
    sd_diffusion = float(contribution.sum())
    return replace(profile, decoder_share=sd_decoder / max(sd_decoder + sd_diffusion, 1e-300))


def _estimate(problem: _Problem, rounds: list[_Round], others: Sequence[_Round] = ()) -> _Estimate:
    """What `rounds` together say of every image, and the variance of their sum. Surrogates are fitted to the `others` too."""
    num_dims = problem.num_dims
    surrogates = {
        (fold, own): _fit(problem, [*rounds, *others], 1 - fold, own)
        if problem.variance_reduction
        else problem.no_surrogate
        for fold in (0, 1)
        for own in ((False, True) if isinstance(problem.decoder, GaussianDecoder) else (False,))
    }
    known = torch.stack([_known_part(problem, surrogates[fold, False]) for fold in (0, 1)])  # (2, N)
    means, weights = [], []
    for r in rounds:
        fold = _folds(problem, r.layout)
        rest = torch.zeros_like(r.nats)
        first = torch.zeros_like(r.nats)  # the part of the integrand whose mean or integral is known
        for (f, own), surrogate in surrogates.items():
            chosen = (fold == f) & (r.layout.is_decoder == own)
            coefficients, features = surrogate.at(r.log_snr[chosen]), r.features[chosen]
            surrogate_loss = (coefficients * features).sum(-1)
            if own:
                rest[chosen] = r.nats[chosen] - surrogate_loss  # whose coefficients of means are zero
            else:
                site = r.site[chosen]
                reference = problem.term.constant(site, num_dims) + problem.term.scale(site) * surrogate_loss
                rest[chosen] = (r.nats[chosen] - reference) * r.inverse_density[chosen]
                first[chosen] = known[f][:, None].expand(r.nats.shape)[chosen]
        total = rest + first
        means.append(torch.stack([_replicate_means(total, r.layout, own) for own in (False, True)]))  # (2, N, R)
        # not by the inverse of a variance seen in the same losses: where these are skewed, a low mean comes with a low variance
        weights.append(rest.shape[1])
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    diffusion, decoder = sum(w * m.mean(2) for w, m in zip(share, means, strict=True))
    variance = 0.0
    for w, m in zip(share.tolist(), means, strict=True):
        sums = torch.zeros(int(problem.groups[-1]) + 1, m.shape[2], dtype=torch.float64)
        sums.index_add_(0, problem.groups, m.sum(0))
        variance += w**2 * float(sums.var(1).sum()) / m.shape[2]
    return _Estimate(diffusion, decoder, variance)


def _known_part(problem: _Problem, surrogate: Surrogate) -> Tensor:
    """(N,) the sum or integral over all sites of the constant and of the surrogate's expectation."""
    term = problem.term
    site, weight = term.quadrature(torch.cat([surrogate.knots, problem.controls.jumps]))
    log_snr = term.log_snr(site)
    coefficients = (weight * term.scale(site))[:, None] * surrogate.at(log_snr)[:, : problem.controls.num_means]
    constant = (weight * term.constant(site, problem.num_dims)).sum()
    parts = torch.arange(len(problem.levels)).split(1024)
    sums = [problem.controls.known_sum(problem.encode(p), problem.levels[p], log_snr, coefficients) for p in parts]
    return constant + torch.cat(sums)


def _replicate_means(nats: Tensor, layout: _Layout, of_decoder: bool) -> Tensor:
    """Means over the columns of each replicate: (N, n) -> (N, R); zero where the decoder has no columns."""
    chosen = layout.is_decoder == of_decoder
    member = (layout.replicate == torch.arange(layout.num_replicates)[:, None]) & chosen
    return nats @ (member / member.sum(1, keepdim=True).clamp(min=1)).double().T


def sample_chain(
    model: DenoisingModel,
    levels: Tensor,
    grid: Tensor,
    *,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """As many samples as there are in `levels`, of its shape and dtype, by ancestral sampling with the posterior variance.

    Arguments:
        levels: (N, C, ...) says how many, how large, and whether integers are wanted. Its values do not matter.
        grid: (K + 1,) decreasing log SNRs. The last step, from grid[0], returns x_hat, rounded to the nearest level.
    """
    parts = []
    for index in torch.arange(len(levels)).split(batch_size):
        generators = [torch.Generator().manual_seed(mix_seed(seed, "sample", i)) for i in index.tolist()]
        z = _draw(generators, levels.shape[1:]).to(device)
        for i in range(len(grid) - 1, -1, -1):
            log_snr = grid[i].expand(len(index))
            value, _ = model.outputs(z, log_snr, index)
            x_hat = model.denoised(value, z, log_snr)
            if i > 0:
                c = posterior_coefficients(grid[i], grid[i - 1])
                z = (
                    float(c.z) * z
                    + float(c.x) * x_hat
                    + float(c.variance.sqrt()) * _draw(generators, levels.shape[1:]).to(device)
                )
            if progress is not None:
                progress(len(index))
        parts.append(x_hat.float().cpu())
    x = torch.cat(parts)
    return x if model.num_levels is None else decode_pixels(x, model.num_levels, model.pixel_encoding).to(levels.dtype)


def measure_mse(
    model: DenoisingModel,
    levels: Tensor,
    knots: Tensor,
    *,
    num_samples: int,
    per_frequency: bool = False,
    analytic: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> OptimalVariance:
    r"""E|x - x_hat|^2 / D at the given log SNRs (K,), each averaged over equally many evaluations, `num_samples` an image.

    Arguments:
        per_frequency: for each radial band of the cosine transform of each channel of images (N, C, H, W), not for all together.
        analytic: from the network's answers alone, as if it were exact: E Cov[x | z_t] = sigma^2/alpha^2 (1 - E eps_hat^2), clipped
            to what data in [-1, 1] can have. The 1 is estimated by the square of the noise that is in z_t, which takes most of the
            variance away. Otherwise from the errors of x_hat, which is right for every network.
    Raises:
        ValueError: fewer evaluations than knots; per_frequency and images that are not (N, C, H, W).
    Source: Bao et al. 2022, "Analytic-DPM", theorem 1 (analytic); Bao et al. 2022, "Estimating the Optimal Covariance with Imperfect
        Mean", theorem 3 (errors).
    """
    count, total = len(levels), len(levels) * num_samples
    if total < len(knots):
        raise ValueError(
            f"{len(knots)} log SNRs need as many evaluations at least, got {count} images x {num_samples}."
        )
    if per_frequency and levels.ndim != 4:
        raise ValueError(f"`per_frequency` needs images (N, C, H, W), got shape {tuple(levels.shape)}.")
    bands = RadialBands.of(*levels.shape[2:]) if per_frequency else None

    def squares(value: Tensor) -> Tensor:
        """(M,), or (M, C, bands) float64 on the CPU."""
        if bands is None:
            return sum64(value**2)
        return bands.sums(bands.transform(as_float64(value)) ** 2).to("cpu", torch.float64)

    # An image's evaluations are spread over the knots, and every knot sees images from everywhere. An image has the same noise at
    # each: a curve whose neighbouring values err alike tells a grid where it falls, and not where it happened to come out low.
    repeats = max(1, num_samples // len(knots))
    position = torch.arange(total).reshape(num_samples, count).T.flatten()
    index_of_knot = position * len(knots) // total
    shape = (len(knots),) if bands is None else (len(knots), levels.shape[1], len(bands.counts))
    sums, number = torch.zeros(shape, dtype=torch.float64), index_of_knot.bincount(minlength=len(knots))
    for flat in torch.arange(total).split(batch_size):
        index, column = flat // num_samples, flat % num_samples
        k = levels[index].to(device)
        x = model.encode(k)
        noise = _noise(index, column % repeats, x.shape[1:], seed, -1).to(device)
        log_snr = knots[index_of_knot[flat]]
        z_t = diffuse(x, noise, log_snr)
        value, _ = model.outputs(z_t, log_snr, index)
        if analytic:
            eps_hat = convert(value, z_t, log_snr, source=model.prediction_type, target="epsilon")
            square, to_x = squares(noise) - squares(eps_hat), torch.exp(-log_snr)
        else:
            error, to_x = model.error(value, x, noise, z_t, log_snr)
            square = squares(error)
        sums.index_add_(0, index_of_knot[flat], to_x.reshape(-1, *[1] * (square.ndim - 1)) * square)
        if progress is not None:
            progress(len(flat))
    mse = sums / number.reshape(-1, *[1] * (sums.ndim - 1)) / (levels[0].numel() if bands is None else bands.counts)
    if analytic:  # a frequency of H W pixels in [-1, 1] may hold the power of all of them
        largest = math.inf if model.num_levels is None else 1 if bands is None else levels[0, 0].numel()
        mse = mse.clamp(0, largest)
    return OptimalVariance(
        knots, mse, None if bands is None else cast("tuple[int, int, int]", tuple(levels.shape[1:]))
    )


def evaluate_importance_weighted(
    model: DenoisingModel,
    levels: Tensor,
    term: DiscreteTerm,
    decoder: Decoder,
    prior_log_snr: float,
    *,
    num_samples: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner = run_all,
) -> LikelihoodReport:
    """The K-sample bound -ln p(x) <= -E ln 1/K sum_k w_k, w = p(x, z_0..z_T) / q(z_0..z_T | x), over the whole chain.

    Chains are drawn backwards, z_T from q(z_T | x), then q(z_s | z_t, x), and every step adds its sampled log ratio. Two independent bounds of
    K = num_samples // 2 chains give the error, and further ones of the same K make it smaller. For K = 1 it is the discrete bound; it
    falls as K grows. Every chain has noise of its own, whatever its batch.

    Arguments: as of `evaluate_bound`.
    Raises:
        ValueError: fewer than two samples, a budget that does not allow them, data or outputs that do not fit.
    Source: Burda et al. 2016, "Importance weighted autoencoders", equation 8.
    """
    model.check(levels)
    if num_samples < 2:
        raise ValueError(
            f"`num_samples` must be at least 2, got {num_samples}: the error bar comes from two independent bounds."
        )
    samples, num_dims = num_samples // 2, levels[0].numel()
    cost = samples * (term.num_steps + isinstance(decoder, GaussianDecoder))

    def draw(images: Tensor, repetitions: Tensor) -> Tensor:
        chains = torch.arange(len(images) * samples)
        log_weights = []
        for flat in chains.split(batch_size):
            row = flat // samples
            index, number = images[row], flat % samples
            seeds = [("chain", *part) for part in torch.stack([index, repetitions[row], number]).T.tolist()]
            generators = [torch.Generator().manual_seed(mix_seed(seed, *part)) for part in seeds]
            log_weights.append(
                _chain_log_weights(model, levels, term, decoder, prior_log_snr, index, generators, device, progress)
            )
        bounds = math.log(samples) - torch.cat(log_weights).reshape(-1, samples).logsumexp(1)
        return torch.stack([torch.full_like(bounds, cost), bounds])

    found = repeat(
        draw,
        len(levels),
        num_dims,
        2,
        batch_size=max(1, batch_size // samples),
        budget=Budget(target_standard_error, max_model_evaluations),
        cost=cost,
        runner=runner,
    )
    return LikelihoodReport(
        method="importance_weighted",
        nats=found.values[0],
        prior=None,
        diffusion=None,
        reconstruction=None,
        num_dims=num_dims,
        standard_error=found.standard_error,
        is_bound=True,
        num_model_evaluations=found.num_model_evaluations,
        settings={"num_importance_samples": samples, "num_repetitions": found.number},
    )


def _chain_log_weights(
    model: DenoisingModel,
    levels: Tensor,
    term: DiscreteTerm,
    decoder: Decoder,
    prior_log_snr: float,
    index: Tensor,
    generators: list[torch.Generator],
    device: torch.device | str,
    progress: Callable[[int], object] | None,
) -> Tensor:
    """ln p(x, z_0..z_T) - ln q(z_0..z_T | x) of one chain for each row: (M,) float64."""
    k = levels[index].to(device)
    x = model.encode(k)

    def draw() -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(device)

    noise = draw()
    log_snr = torch.full((len(x),), prior_log_snr, dtype=torch.float64)
    z = diffuse(x, noise, log_snr)
    log_sigma = 0.5 * float(torch.nn.functional.logsigmoid(-as_float64(prior_log_snr)))
    log_weight = 0.5 * sum64(noise**2) - 0.5 * sum64(z**2) + x[0].numel() * log_sigma
    for site in range(term.num_steps, 0, -1):
        at = torch.full((len(x),), float(site), dtype=torch.float64)
        s, t = term.grid[site - 1], term.grid[site]
        log_snr = t.expand(len(x))
        value, output = model.outputs(z, log_snr, index)
        difference = x - model.denoised(value, z, log_snr)
        posterior = posterior_coefficients(t, s)
        if output is not None:
            reverse = learned_variance_of(output, term.reverse_variance, posterior.variance, forward_variance(s, t))
        else:
            reverse = term.variance(at[:1]).to(difference.device)
            reverse = expand_to(reverse, difference) if term.bands is None else term.bands.spread(reverse)
        noise = draw()
        excess = term.coordinates(
            float(posterior.variance.sqrt()) * as_float64(noise) + float(posterior.x) * as_float64(difference)
        )
        ratio = float(posterior.variance) / reverse + torch.zeros_like(excess)
        log_weight += 0.5 * sum64(as_float64(noise) ** 2 - excess**2 / reverse + ratio.log())
        z = float(posterior.z) * z + float(posterior.x) * x + float(posterior.variance.sqrt()) * noise
        if progress is not None:
            progress(len(x))
    at_0 = torch.full((len(x),), float(term.grid[0]), dtype=torch.float64)
    if isinstance(decoder, GaussianDecoder):
        value, output = model.outputs(z, at_0, index)
        log_weight -= decoder.nats(model, k, model.denoised(value, z, at_0), output).to("cpu", torch.float64)
        if progress is not None:
            progress(len(x))
    elif isinstance(decoder, SoftmaxDecoder) and model.num_levels is not None:
        log_weight += softmax_log_likelihood(
            k, z, at_0, num_levels=model.num_levels, pixel_encoding=model.pixel_encoding
        ).to("cpu", torch.float64)
    else:
        alpha, _ = alpha_sigma(at_0)
        rest = as_float64(x) - as_float64(z) / expand_to(alpha, as_float64(z))
        log_weight -= 0.5 * (
            math.exp(decoder.log_snr_0) * sum64(rest**2) + x[0].numel() * (math.log(2 * math.pi) - decoder.log_snr_0)
        )
    return log_weight


class _LossCurve:
    """Sums of |eps - eps_hat|^2 in bins of log SNR half a unit wide."""

    def __init__(self) -> None:
        self.bins: dict[int, tuple[float, int]] = {}

    def add(self, log_snr: Tensor, squared_error: Tensor) -> None:
        finite = log_snr.isfinite() & squared_error.isfinite()
        keys, inverse = (log_snr[finite] * 2).floor().long().unique(return_inverse=True)
        sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, squared_error[finite])
        for key, total, count in zip(
            keys.tolist(), sums.tolist(), inverse.bincount(minlength=len(keys)).tolist(), strict=True
        ):
            old = self.bins.get(key, (0.0, 0))
            self.bins[key] = (old[0] + total, old[1] + count)

    def to_dict(self, num_dims: int) -> dict[str, list[float]]:
        items = sorted(self.bins.items())
        return {
            "log_snr": [(key + 0.5) / 2 for key, _ in items],
            "mse": [total / count / num_dims for _, (total, count) in items],
            "count": [count for _, (_, count) in items],
        }


def _group_size(num_images: int) -> int:
    """Images that share their lattices: few enough for about `_GROUPS` independent groups, and no more than useful."""
    return min(_GROUPS, math.ceil(num_images / _GROUPS))


def _noise(
    index: Tensor, column: Tensor, shape: torch.Size, seed: int, number: int, strata: Tensor | None = None
) -> Tensor:
    """Standard normal noise of a round's evaluations (image, column), whatever batch they are in: (M, *shape) float32.

    Arguments:
        strata: (n,) ascending, of all columns: those with the same number share a Latin hypercube. None: independent noise.
    """
    if strata is None:
        block, place = column // _NOISE_BLOCK, column % _NOISE_BLOCK
    else:
        block, place = strata[column], column - torch.searchsorted(strata, strata[column])
    noise = torch.empty(len(index), *shape)
    keys, inverse = torch.stack([index, block]).unique(dim=1, return_inverse=True)
    for i, (image, part) in enumerate(keys.T.tolist()):
        generator = torch.Generator().manual_seed(mix_seed(seed, "noise", number, image, part))
        if strata is None:
            drawn = torch.randn(_NOISE_BLOCK, *shape, generator=generator)
        else:
            drawn = latin_hypercube(int((strata == part).sum()), shape, generator)
        mine = inverse == i
        noise[mine] = drawn[place[mine]]
    return noise


def _draw(generators: Sequence[torch.Generator], shape: torch.Size) -> Tensor:
    """Standard normal noise (M, *shape) float32, each row from a generator of its own."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def learned_variance_of(output: Tensor, kind: str, low: Tensor, high: Tensor) -> Tensor:
    """The reverse variance that the network's variance channels mean: (M, C, ...), float64 where the device has it."""
    return as_float64(output).exp() if kind == "learned" else learned_range_variance(as_float64(output), low, high)


def sum64(square: Tensor) -> Tensor:
    """Sums over all dimensions but the first, float64 on the CPU."""
    return sum_except_batch(square.double() if square.device.type != "mps" else square).to("cpu", torch.float64)
