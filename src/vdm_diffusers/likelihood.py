r"""Estimators of the likelihood of integer data under a diffusion model, with an error bar that can be trusted.

The bound of `vdm_diffusers.elbo` has three terms. The prior's is closed form. VDM's reconstruction term is an integral over
one normal variable for each level of a pixel, done here by quadrature; DDPM's needs the network at x_1. The diffusion term is
a sum (or an integral) over log SNR of an expectation over noise, and is estimated by Monte Carlo:

    L = sum over the sites of w(site) E|x - x_hat|^2 + constant(site)    ~    mean_j f(site_j, eps_j) / density(site_j)

Sites are placed by a randomly shifted lattice over all images of a group and all their evaluations, folded (`time_sampling.fold`)
and passed through the inverse of a cumulative density. Every image has several lattices with independent shifts and noise:
they are replicates, and their scatter gives the error of the estimate for these very images. (The scatter of the points of one
lattice says nothing of the lattice's error, which may be a hundred times smaller.)

Everything here is in torch alone. `vdm_diffusers.evaluate_likelihood` adapts pipelines, schedulers and data sets to it.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .decoders import PixelEncoding, bin_width, discretized_gaussian_log_likelihood, encode_pixels
from .elbo import prior_kl
from .gaussian import diffuse, posterior_coefficients
from .numerics import as_float64, expand_to, sum_except_batch
from .prediction import PredictionType, convert, loss_weight_ratio, prediction_target
from .reverse_variance import ReverseVariance, forward_variance, learned_range_variance
from .time_sampling import fold

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t (M, C, ...), log_snr (M,) float64 on the CPU, index (M,) of the images) -> the network's output (M, C or 2 C, ...)."""

_GROUPS = 32  # groups of images with shifts of their own: the degrees of freedom of the error bar
_NOISE_BLOCK = 16  # evaluations of one image whose noise comes from one seed


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
        return (
            f"{self.bits_per_dim:.4f} bits/dim{bound}, {self.method}, {len(self.nats)} images: "
            f"+- {self.standard_error:.4f} (estimator) +- {self.sampling_error:.4f} (images)"
        )


@dataclass(frozen=True, eq=False)
class DenoisingModel:
    """A network and what its output means.

    Attributes:
        predict: see `Predict`.
        prediction_type: what the (first half of the channels of the) output predicts.
        num_levels, pixel_encoding: how integer data are put into [-1, 1].
        learned_variance: None, or the meaning of the output's second half of channels.
        clip_denoised: clamp x_hat to [-1, 1]. The bound holds for any x_hat: this is another model, not another estimate.
    """

    predict: Predict
    prediction_type: PredictionType
    num_levels: int = 256
    pixel_encoding: PixelEncoding = "bin_center"
    learned_variance: Literal["learned", "learned_range"] | None = None
    clip_denoised: bool = False

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

    def squared_error(
        self, value: Tensor, x: Tensor, noise: Tensor, z_t: Tensor, log_snr: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The elementwise squared error of the prediction, (M, C, ...), and the factor (M,) that makes it one of x_hat.

        The error is formed in the network's own terms, where it suffers no cancellation.
        """
        if self.clip_denoised:
            return (self.denoised(value, z_t, log_snr) - x) ** 2, torch.ones_like(log_snr)
        target = prediction_target(x, noise, log_snr, self.prediction_type)
        return (value - target) ** 2, loss_weight_ratio(log_snr, source=self.prediction_type, target="sample")


# --- the diffusion term ------------------------------------------------------------------------------------------------


class DiffusionTerm(ABC):
    """The diffusion term of a bound, as a sum or an integral over sites."""

    @abstractmethod
    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Points of [0, 1) -> sites (float64, of u's shape) and the inverse of their density."""

    @abstractmethod
    def log_snr(self, site: Tensor) -> Tensor:
        """Log SNR of z_t at a site."""

    @abstractmethod
    def nats(self, site: Tensor, square: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        """The integrand: (M,) nats, from the squared error (M, C, ...) and its factor (see `squared_error`)."""


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

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        width = self.log_snr_max - self.log_snr_min
        return self.log_snr_max - u * width, torch.full_like(u, width)

    def log_snr(self, site: Tensor) -> Tensor:
        return site

    def nats(self, site: Tensor, square: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        return 0.5 * site.exp() * to_x * _sum64(square)


@dataclass(frozen=True, eq=False)
class DiscreteTerm(DiffusionTerm):
    """L_T = sum over the steps of KL(q(z_s | z_t, x) || p(z_s | z_t)) on a grid of log SNRs; a site is a step 1..K.

    Attributes:
        grid: (K + 1,) decreasing log SNRs, from the decoder's to the prior's; the last may be -inf.
        reverse_variance: 'posterior', 'forward', or what the network's second half of channels means: 'learned',
            'learned_range'.
    """

    grid: Tensor
    reverse_variance: ReverseVariance = "posterior"

    def __post_init__(self) -> None:
        if self.grid.ndim != 1 or len(self.grid) < 2 or not bool((self.grid.diff() < 0).all()):
            raise ValueError("`grid` must hold at least two decreasing log SNRs.")

    @property
    def num_steps(self) -> int:
        return len(self.grid) - 1

    @property
    def probabilities(self) -> Tensor:
        """(K,) with which a step is chosen: nine parts in proportion to its weight, one part uniform."""
        weight = torch.expm1((self.grid[:-1] - self.grid[1:]).clamp(max=3.0))
        return 0.9 * weight / weight.sum() + 0.1 / self.num_steps

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        cumulative = self.probabilities.cumsum(0)
        index = torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp(max=self.num_steps - 1)
        return index.double() + 1, 1 / self.probabilities[index]

    def log_snr(self, site: Tensor) -> Tensor:
        return self.grid[site.long()]

    def nats(self, site: Tensor, square: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        s, t = self.grid[site.long() - 1], self.grid[site.long()]
        if self.reverse_variance == "posterior":  # 1/2 (SNR_s - SNR_t) |x - x_hat|^2
            return 0.5 * s.exp() * -torch.expm1(t - s) * to_x * _sum64(square)
        coefficients = posterior_coefficients(t, s)
        if self.reverse_variance == "forward":
            reverse = forward_variance(s, t)
            excess = (coefficients.variance - reverse) / reverse
            num_dims = square[0].numel()
            return 0.5 * (
                num_dims * (excess - torch.log1p(excess)) + coefficients.x**2 / reverse * to_x * _sum64(square)
            )
        if variance is None:
            raise ValueError("a learned reverse variance needs a network that predicts it.")
        reverse = _learned_variance(variance, self.reverse_variance, coefficients.variance, forward_variance(s, t))
        ratio = expand_to(coefficients.variance, reverse) / reverse
        return 0.5 * _sum64(ratio - 1 - ratio.log() + expand_to(coefficients.x**2 * to_x, reverse) * square / reverse)


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
            used = _learned_variance(
                variance, self.learned, as_float64(self.variance), as_float64(self.upper_variance)
            )
        return -discretized_gaussian_log_likelihood(
            levels, x_hat, used, num_levels=model.num_levels, pixel_encoding=model.pixel_encoding
        )


Decoder = SoftmaxDecoder | GaussianDecoder


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
class _Layout:
    """What each of an image's evaluations is for: (n,) its replicate, and whether it belongs to the decoder."""

    replicate: Tensor
    is_decoder: Tensor
    whole_sums: bool

    @property
    def num_replicates(self) -> int:
        return int(self.replicate[-1]) + 1

    @classmethod
    def of(cls, num_images: int, num_samples: int, term: DiffusionTerm, decoder: Decoder) -> _Layout:
        own = int(isinstance(decoder, GaussianDecoder))  # evaluations that the decoder needs in each replicate
        if num_samples < 2 * (1 + own):
            raise ValueError(
                f"`num_samples` must be at least {2 * (1 + own)}, got {num_samples}: the error bar comes from two independent "
                f"estimates{', each with the network at x_1 and at another step' if own else ''}."
            )
        whole_sums = isinstance(term, DiscreteTerm) and num_samples >= term.num_steps + own
        if isinstance(term, DiscreteTerm) and whole_sums:
            replicates = num_samples // (term.num_steps + own)
            sizes, decoders = [term.num_steps + own] * replicates, [own] * replicates
        else:
            groups = math.ceil(num_images / _group_size(num_images))
            replicates = max(2, min(8, math.ceil(16 / groups) + 1, num_samples // (2 * (1 + own))))
            sizes = [num_samples // replicates + (r < num_samples % replicates) for r in range(replicates)]
            decoders = [max(own, own * (size // 8)) for size in sizes]
        replicate = torch.repeat_interleave(torch.arange(replicates), torch.tensor(sizes))
        is_decoder = torch.cat([torch.arange(size) < first for size, first in zip(sizes, decoders, strict=True)])
        return cls(replicate, is_decoder, whole_sums)

    def place(self, num_images: int, term: DiffusionTerm, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sites (m, n) of a group of images and the inverse of their density; those of the decoder are not used."""
        sites = torch.ones(num_images, len(self.replicate), dtype=torch.float64)
        inverse_density = torch.ones_like(sites)
        for r in range(self.num_replicates):
            columns = ((self.replicate == r) & ~self.is_decoder).nonzero()[:, 0]
            n = len(columns)
            if self.whole_sums:
                sites[:, columns] = torch.arange(1.0, n + 1, dtype=torch.float64)
                inverse_density[:, columns] = n
                continue
            # one lattice over all images of the group, dealt to them at random
            order = torch.randperm(num_images, generator=generator)
            shift = torch.rand((), generator=generator, dtype=torch.float64)
            lattice = (order[:, None] + num_images * torch.arange(n)).double()
            u = fold((lattice / (num_images * n) + shift) % 1.0)
            sites[:, columns], inverse_density[:, columns] = term.place(u)
        return sites, inverse_density


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
    progress: Callable[[int], None] | None = None,
) -> LikelihoodReport:
    """The bound for integer images from `num_samples` evaluations of the network for each, stratified.

    Arguments:
        levels: (N, C, ...) integers 0..num_levels-1, on the CPU.
        term: `ContinuousTerm` or `DiscreteTerm`: the diffusion term that is estimated.
        decoder: `SoftmaxDecoder` (at z_0) or `GaussianDecoder` (at x_1, with an eighth of the evaluations).
        prior_log_snr: log SNR of z_1.
        num_samples: evaluations of the network for an image. If they suffice for every step of a `DiscreteTerm`, whole sums
            are computed, as many as they allow.
        batch_size: evaluations at a time. The result does not depend on it (but for rounding in the network).
        seed: of the noise and the shifts. Every image has noise of its own, whatever its place in a batch.
        progress: called with the number of evaluations done, after every batch.
    Raises:
        ValueError: no images, too few samples, levels outside the range, a network whose output does not fit.
    """
    if len(levels) == 0:
        raise ValueError("`images` holds no image.")
    low, high = int(levels.min()), int(levels.max())
    if not 0 <= low <= high < model.num_levels:
        raise ValueError(
            f"`images` must hold levels in 0..{model.num_levels - 1}, got {low}..{high}. Is `num_levels` right?"
        )
    layout = _Layout.of(len(levels), num_samples, term, decoder)
    n, size = len(layout.replicate), _group_size(len(levels))
    groups = torch.arange(len(levels)).split(size)
    per_block = max(1, batch_size // (size * n))
    diffusion, decoded = [], []
    curve = _LossCurve()
    squared_errors = 0.0
    for first in range(0, len(groups), per_block):
        block = groups[first : first + per_block]
        placed = [
            layout.place(len(rows), term, torch.Generator().manual_seed(_mix(seed, "shift", first + i)))
            for i, rows in enumerate(block)
        ]
        rows = torch.cat(block)
        site, inverse_density = (torch.cat(parts) for parts in zip(*placed, strict=True))
        nats = _evaluate(model, levels, rows, layout, site, term, decoder, batch_size, seed, device, progress, curve)
        nats = nats * inverse_density
        means = torch.stack([_replicate_means(nats, layout, own) for own in (False, True)])  # (2, rows, R)
        diffusion.append(means[0].mean(1))
        decoded.append(means[1].mean(1))
        for part in torch.arange(len(rows)).split([len(group) for group in block]):
            squared_errors += _squared_error(means[:, part].sum((0, 1)), nats[part], layout)
    num_dims = levels[0].numel()
    prior = torch.cat(
        [
            prior_kl(encode_pixels(part, model.num_levels, model.pixel_encoding), prior_log_snr)
            for part in levels.split(1024)
        ]
    ).double()
    if isinstance(decoder, SoftmaxDecoder):
        table = expected_softmax_nats(decoder.log_snr_0, model.num_levels, model.pixel_encoding)
        reconstruction = torch.cat([sum_except_batch(table[part.long()]) for part in levels.split(1024)])
    else:
        reconstruction = torch.cat(decoded)
    terms_diffusion = torch.cat(diffusion)
    nats = prior + terms_diffusion + reconstruction
    standard_error = math.sqrt(squared_errors) / len(levels)
    if layout.num_replicates == 1 and len(levels) > 1:  # both are upper limits
        standard_error = min(standard_error, float(nats.std()) / math.sqrt(len(levels)))
    return LikelihoodReport(
        method="discrete" if isinstance(term, DiscreteTerm) else "continuous",
        nats=nats,
        prior=prior,
        diffusion=terms_diffusion,
        reconstruction=reconstruction,
        num_dims=num_dims,
        standard_error=standard_error / (num_dims * math.log(2)),
        is_bound=True,
        num_model_evaluations=len(levels) * n,
        loss_curve=curve.to_dict(num_dims),
    )


def _evaluate(
    model: DenoisingModel,
    levels: Tensor,
    rows: Tensor,
    layout: _Layout,
    site: Tensor,
    term: DiffusionTerm,
    decoder: Decoder,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None,
    curve: _LossCurve,
) -> Tensor:
    """The integrand at the sites (m, n) of the images `rows`, the decoder's nats in its columns: (m, n) float64."""
    n = site.shape[1]
    nats = torch.empty(site.shape, dtype=torch.float64)
    for flat in torch.arange(site.numel()).split(batch_size):
        row, column = flat // n, flat % n
        index = rows[row]
        k = levels[index].to(device)
        x = encode_pixels(k, model.num_levels, model.pixel_encoding)
        noise = _noise(index, column, x.shape[1:], seed).to(device)
        own = layout.is_decoder[column]
        at = site[row, column]
        log_snr = term.log_snr(at)
        if isinstance(decoder, GaussianDecoder):
            log_snr = torch.where(own, decoder.log_snr_1, log_snr)
        z_t = diffuse(x, noise, log_snr)
        value, variance = model.outputs(z_t, log_snr, index)
        square, to_x = model.squared_error(value, x, noise, z_t, log_snr)
        part = term.nats(at, square, to_x, variance)
        curve.add(log_snr, log_snr.exp() * to_x * _sum64(square))
        if isinstance(decoder, GaussianDecoder) and bool(own.any()):
            mine = own.to(device)
            part[own] = decoder.nats(
                model,
                k[mine],
                model.denoised(value[mine], z_t[mine], log_snr[own]),
                None if variance is None else variance[mine],
            ).to("cpu", torch.float64)
        nats[row, column] = part
        if progress is not None:
            progress(len(flat))
    return nats


def _replicate_means(nats: Tensor, layout: _Layout, of_decoder: bool) -> Tensor:
    """Means over the columns of each replicate: (m, n) -> (m, R); zero where the decoder has no columns."""
    chosen = layout.is_decoder == of_decoder
    member = (layout.replicate == torch.arange(layout.num_replicates)[:, None]) & chosen
    return nats @ (member / member.sum(1, keepdim=True).clamp(min=1)).double().T


def _squared_error(sums: Tensor, nats: Tensor, layout: _Layout) -> float:
    """The variance of a group's summed estimate, from its replicates' sums (R,) or from its evaluations (m, n).

    Without a second replicate every step was evaluated once. Then neighbouring steps stand for two draws of the same (the
    method of collapsed strata), which can only overstate the variance.
    """
    if layout.num_replicates > 1:
        return float(sums.var() / len(sums))
    steps = nats / torch.where(layout.is_decoder, 1, (~layout.is_decoder).sum())
    pairs = steps[:, : steps.shape[1] // 2 * 2].unflatten(1, (-1, 2)).diff(dim=2)
    variance = float(pairs.square().sum())
    if steps.shape[1] % 2:
        variance += float((steps[:, -1:] - steps[:, -2:-1]).square().sum())
    return variance


class _LossCurve:
    """Sums of |eps - eps_hat|^2 in bins of log SNR half a unit wide."""

    def __init__(self) -> None:
        self.bins: dict[int, tuple[float, int]] = {}

    def add(self, log_snr: Tensor, squared_error: Tensor) -> None:
        finite = log_snr.isfinite()
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


def _noise(index: Tensor, column: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Standard normal noise of the evaluations (image, column), whatever batch they are in: (M, *shape) float32."""
    block, position = column // _NOISE_BLOCK, column % _NOISE_BLOCK
    noise = torch.empty(len(index), *shape)
    keys, inverse = torch.stack([index, block]).unique(dim=1, return_inverse=True)
    for i, (image, number) in enumerate(keys.T.tolist()):
        generator = torch.Generator().manual_seed(_mix(seed, "noise", image, number))
        mine = inverse == i
        noise[mine] = torch.randn(_NOISE_BLOCK, *shape, generator=generator)[position[mine]]
    return noise


def _mix(seed: int, *parts: int | str) -> int:
    """A seed made of several: the same on every machine, and unrelated for neighbouring parts."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _learned_variance(output: Tensor, kind: str, low: Tensor, high: Tensor) -> Tensor:
    """The reverse variance that the network's variance channels mean: (M, C, ...), float64 where the device has it."""
    return as_float64(output).exp() if kind == "learned" else learned_range_variance(as_float64(output), low, high)


def _sum64(square: Tensor) -> Tensor:
    """Sums over all dimensions but the first, float64 on the CPU."""
    return sum_except_batch(square.double() if square.device.type != "mps" else square).to("cpu", torch.float64)
