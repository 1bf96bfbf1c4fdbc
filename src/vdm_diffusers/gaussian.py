r"""Gaussian diffusion in closed form: paths, marginals, transitions, posteriors, KL divergences.

A path turns log SNR into the coefficients of

    z_t = alpha_t x + sigma_t eps,   eps ~ N(0, I),   ln(alpha_t^2 / sigma_t^2) = log_snr_t.

    path    alpha                        sigma
    vp      sqrt(sigmoid(log_snr))       sqrt(sigmoid(-log_snr))     alpha^2 + sigma^2 = 1
    ve      1                            exp(-log_snr / 2)
    flow    sigmoid(log_snr / 2)         sigmoid(-log_snr / 2)       alpha + sigma = 1

Everything else is one transition between any two times s < t, that is log_snr_s > log_snr_t, neighbours or not.
log_snr_s = +inf (clean data) and, for vp and flow, log_snr_t = -inf (zero terminal SNR) are ordinary values.

Arguments called log_snr are floats or tensors of shape () or (B,); data have shape (B, ...). Coefficients are computed
in log_snr's precision (float64 for floats) and cast once. Order of times is checked where the values lie on the CPU.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .numerics import as_float64, expand_to, linear_combination, minus_log1p, on_host, shown

Path = Literal["vp", "ve", "flow"]


class PosteriorCoefficients(NamedTuple):
    """q(z_s | z_t, x) = N(z * z_t + x * x_0, variance I): three tensors of the log SNRs' shape."""

    z: Tensor
    x: Tensor
    variance: Tensor


def alpha_sigma(log_snr: Tensor | float, path: Path = "vp") -> tuple[Tensor, Tensor]:
    """The coefficients (alpha, sigma) of z = alpha x + sigma eps at `log_snr`, in float64, of its shape.

    Raises:
        ValueError: unknown path; log_snr = -inf on the ve path, whose sigma would be infinite.
    """
    log_snr = as_float64(log_snr)
    if path == "vp":
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    if path == "flow":
        return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
    if path == "ve":
        if on_host(log_snr) and bool((log_snr == -math.inf).any()):
            raise ValueError("`log_snr` must be finite at the noisy end of the ve path, got -inf: use vp or flow.")
        return torch.ones_like(log_snr), torch.exp(-log_snr / 2)
    raise ValueError(f"`path` must be 'vp', 've' or 'flow', got {path!r}.")


def marginal(x: Tensor, log_snr: Tensor | float, *, path: Path = "vp") -> tuple[Tensor, Tensor]:
    """q(z_t | x) = N(alpha_t x, sigma_t^2 I). Returns the mean, of x's shape, and the variance, of log_snr's."""
    alpha, sigma = alpha_sigma(log_snr, path)
    return (expand_to(alpha, x) * x).to(x.dtype), sigma**2


def diffuse(x: Tensor, noise: Tensor, log_snr: Tensor | float, *, path: Path = "vp") -> Tensor:
    """A draw of q(z_t | x) made from standard normal `noise`: z_t = alpha_t x + sigma_t eps.

    Raises:
        ValueError: x and noise of different shapes, or a log_snr that is not one number or one for each sample.
    """
    alpha, sigma = alpha_sigma(log_snr, path)
    return linear_combination(alpha, x, sigma, noise)


def transition_coefficients(
    log_snr_s: Tensor | float, log_snr_t: Tensor | float, *, path: Path = "vp"
) -> tuple[Tensor, Tensor]:
    """q(z_t | z_s) = N(alpha_{t|s} z_s, sigma_{t|s}^2 I) for s < t. Returns (alpha_{t|s}, sigma_{t|s}^2).

    alpha_{t|s} = alpha_t / alpha_s, sigma_{t|s}^2 = sigma_t^2 (1 - SNR_t / SNR_s).
    Source: Kingma et al. 2021, equations 20 to 22 (appendix A.1).
    """
    log_snr_s, log_snr_t = _ordered(log_snr_s, log_snr_t)
    (alpha_s, _), (alpha_t, sigma_t) = alpha_sigma(log_snr_s, path), alpha_sigma(log_snr_t, path)
    return alpha_t / alpha_s, sigma_t**2 * -torch.expm1(log_snr_t - log_snr_s)


def transition(
    z_s: Tensor, log_snr_s: Tensor | float, log_snr_t: Tensor | float, *, path: Path = "vp"
) -> tuple[Tensor, Tensor]:
    """q(z_t | z_s): its mean, of z_s's shape, and its variance, of the log SNRs' shape.

    See `transition_coefficients`.
    """
    scale, variance = transition_coefficients(log_snr_s, log_snr_t, path=path)
    return (expand_to(scale, z_s) * z_s).to(z_s.dtype), variance


def posterior_coefficients(
    log_snr_t: Tensor | float, log_snr_s: Tensor | float, *, path: Path = "vp"
) -> PosteriorCoefficients:
    """The three coefficients of q(z_s | z_t, x) for any s < t, float64.

    With c = 1 - SNR_t / SNR_s = -expm1(log_snr_t - log_snr_s):
    mean = (alpha_t / alpha_s) (sigma_s / sigma_t)^2 z_t + alpha_s c x, variance = sigma_s^2 c.

    Raises:
        ValueError: times in the wrong order, unknown path.
    Source: Kingma et al. 2021, equations 23 to 25 and 32 (appendix A); Ho et al. 2020, equations 6 and 7, for
        neighbouring steps.
    """
    log_snr_s, log_snr_t = _ordered(log_snr_s, log_snr_t)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(log_snr_s, path), alpha_sigma(log_snr_t, path)
    c = -torch.expm1(log_snr_t - log_snr_s)
    return PosteriorCoefficients(
        z=alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, x=alpha_s * c, variance=sigma_s**2 * c
    )


def posterior(
    z_t: Tensor, x: Tensor, log_snr_t: Tensor | float, log_snr_s: Tensor | float, *, path: Path = "vp"
) -> tuple[Tensor, Tensor]:
    """q(z_s | z_t, x): its mean, of z_t's shape and dtype, and its variance, float64, of the log SNRs' shape.

    Arguments:
        z_t, x: (B, ...) the noisy and the clean data.
        log_snr_t, log_snr_s: () or (B,), log_snr_s >= log_snr_t; log_snr_s may be +inf, log_snr_t -inf (vp, flow).
    Raises and source: see `posterior_coefficients`.
    """
    coefficients = posterior_coefficients(log_snr_t, log_snr_s, path=path)
    return linear_combination(coefficients.z, z_t, coefficients.x, x), coefficients.variance


def gaussian_kl(
    mean_q: Tensor | float, variance_q: Tensor | float, mean_p: Tensor | float, variance_p: Tensor | float
) -> Tensor:
    """KL(N(mean_q, variance_q) || N(mean_p, variance_p)), elementwise, in nats (all arguments broadcast).

    KL = 1/2 [r - 1 - ln r + (mean_q - mean_p)^2 / variance_p], r = variance_q / variance_p. Equal variances, the
    posterior's case in diffusion, leave the last term exactly.
    """
    mean_q, variance_q, mean_p, variance_p = (
        v if isinstance(v, Tensor) else as_float64(v) for v in (mean_q, variance_q, mean_p, variance_p)
    )
    return 0.5 * (variance_divergence(variance_q, variance_p) + (mean_q - mean_p) ** 2 / variance_p)


def variance_divergence(variance_q: Tensor, variance_p: Tensor) -> Tensor:
    """r - 1 - ln r of r = variance_q / variance_p: twice the KL between two normals of equal means, elementwise."""
    excess = (variance_q - variance_p) / variance_p  # r - 1, small where the two variances nearly agree
    near = excess.abs() < 0.5  # further away r - 1 has lost digits of r, and ln r has no cancellation to fear
    return torch.where(near, minus_log1p(torch.where(near, excess, 0.0)), excess - torch.log(variance_q / variance_p))


def _ordered(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> tuple[Tensor, Tensor]:
    log_snr_s, log_snr_t = as_float64(log_snr_s), as_float64(log_snr_t)
    if on_host(log_snr_s, log_snr_t):
        if not bool((log_snr_s >= log_snr_t).all()):
            raise ValueError(
                "s must come before t, that is log_snr_s >= log_snr_t, got "
                f"log_snr_s = {shown(log_snr_s)} and log_snr_t = {shown(log_snr_t)}. Are the two swapped?"
            )
        if bool(((log_snr_s == log_snr_t) & log_snr_s.isinf()).any()):
            raise ValueError("log_snr_s and log_snr_t are the same infinity: no transition is defined between them.")
    return log_snr_s, log_snr_t
