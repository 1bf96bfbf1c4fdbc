r"""The evidence lower bound of a diffusion model and its three terms.

    -ln p(x) <= KL(q(z_1 | x) || p(z_1))  +  L_T or L_inf  +  E[-ln p(x | z_0)]
                prior                        diffusion        reconstruction

every term (B,), in nats. With T steps t_i = i / T the diffusion term is a sum of T Gaussian KL divergences,

    L_T = sum_i KL(q(z_s | z_t, x) || p(z_s | z_t)) = sum_i 1/2 (SNR_s - SNR_t) E|x - x_hat|^2
        = sum_i 1/2 expm1(log_snr_s - log_snr_t) E|eps - eps_hat|^2,                      (VDM equations 13 and 14)

for the reverse variance sigma_s^2 c of the posterior itself; T -> infinity gives

    L_inf = -1/2 integral_0^1 (d log_snr / dt) E|eps - eps_hat|^2 dt,                     (VDM equation 17)

which depends on the schedule's end points alone. Clipping belongs to sampling: nothing here clips.

Source: Kingma et al. 2021, "Variational Diffusion Models"; Sohl-Dickstein et al. 2015; Ho et al. 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gaussian import Path, alpha_sigma, variance_divergence
from .numerics import as_float64, compute_dtype, expand_to, minus_log1p, sum_except_batch


@dataclass(frozen=True)
class Bound:
    """The three terms of the bound, each (B,) in nats."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def nats(self) -> Tensor:
        """The bound on -ln p(x): the sum of the three terms, (B,)."""
        return self.prior + self.diffusion + self.reconstruction


def bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor:
    """Nats of a whole image -> bits for each of its `num_dims` dimensions: nats / (num_dims ln 2)."""
    return as_float64(nats) / (num_dims * math.log(2))


def prior_kl(x: Tensor, log_snr_1: Tensor | float, *, path: Path = "vp") -> Tensor:
    """KL(q(z_1 | x) || p(z_1)) with p(z_1) = N(0, I) for vp and flow, N(0, sigma_1^2 I) for ve: (B,) nats.

    vp, flow: 1/2 sum [sigma_1^2 - 1 - ln sigma_1^2 + alpha_1^2 x^2]; ve: 1/2 sum x^2 / sigma_1^2.

    Source: Kingma et al. 2021, the first term of equation 11.
    """
    log_snr_1 = as_float64(log_snr_1)
    alpha, sigma = alpha_sigma(log_snr_1, path)
    if path == "ve":
        excess, precision = torch.zeros_like(sigma), 1 / sigma**2
    else:
        # sigma^2 - 1 from alpha: no difference from a rounded sigma^2. Where sigma is small ln sigma^2 comes from log
        # SNR
        less_one = -(alpha**2) if path == "vp" else -alpha * (1 + sigma)
        scale = 1 if path == "vp" else 2
        near = less_one > -0.5
        far = less_one - scale * F.logsigmoid(-log_snr_1 / scale)
        excess = torch.where(near, minus_log1p(torch.where(near, less_one, 0.0)), far)
        precision = torch.ones_like(sigma)
    x = as_float64(x)
    return 0.5 * sum_except_batch(expand_to(alpha**2 * precision, x) * x**2 + expand_to(excess, x))


def discrete_weight(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
    """1/2 expm1(log_snr_s - log_snr_t): weight of |eps - eps_hat|^2 in one step's KL. Float64, of the log SNRs' shape.

    Infinite at log_snr_s = +inf (a step to clean data is the decoder's) and at log_snr_t = -inf (use
    `discrete_weight_x`).
    """
    return 0.5 * torch.expm1(as_float64(log_snr_s) - as_float64(log_snr_t))


def discrete_weight_x(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
    """1/2 (SNR_s - SNR_t): weight of |x - x_hat|^2 in one step's KL; finite at log_snr_t = -inf too."""
    log_snr_s, log_snr_t = as_float64(log_snr_s), as_float64(log_snr_t)
    return 0.5 * log_snr_s.exp() * -torch.expm1(log_snr_t - log_snr_s)


def continuous_weight(log_snr_derivative: Tensor | float) -> Tensor:
    """-1/2 d log_snr / dt: weight of |eps - eps_hat|^2 in continuous time."""
    return -0.5 * as_float64(log_snr_derivative)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 summed over all dimensions but the first: (B,), in at least float32.

    Raises:
        ValueError: tensors of different shapes, which would broadcast to a wrong number.
    """
    if a.shape != b.shape:
        raise ValueError(f"the two tensors must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    dtype = compute_dtype(a, b)
    return sum_except_batch((a.to(dtype) - b.to(dtype)) ** 2)


def step_kl(
    error_x: Tensor,
    coefficient_x: Tensor | float,
    posterior_variance: Tensor | float,
    variance: Tensor | float,
    num_dims: int,
) -> Tensor:
    """KL(q(z_s | z_t, x) || N(mean(x_hat), variance I)) for any scalar reverse variance: (B,) nats.

    1/2 [D (r - 1 - ln r) + coefficient_x^2 |x - x_hat|^2 / variance], r = posterior variance / variance.
    The optimal variance is posterior_variance + coefficient_x^2 E|x - x_hat|^2 / D.

    Arguments:
        error_x: (B,) |x - x_hat|^2. coefficient_x: the posterior mean's coefficient of x.
    Source: Nichol & Dhariwal 2021, equation 4; Bao et al. 2022, "Analytic-DPM", theorem 1.
    """
    coefficient_x, posterior_variance, variance = map(as_float64, (coefficient_x, posterior_variance, variance))
    error = as_float64(error_x)
    divergence = variance_divergence(posterior_variance, variance).to(error)
    return 0.5 * (num_dims * divergence + (coefficient_x**2 / variance).to(error) * error)
