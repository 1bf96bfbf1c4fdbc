r"""One reverse step from t to s < t in closed form: its coefficients as functions of the two log SNRs.

Any path, any two times. With c = 1 - SNR_t / SNR_s, q = sqrt(SNR_t / SNR_s) and stochasticity eta,

    z_s = (sigma_s / sigma_t) r z_t + alpha_s (1 - q r) x_hat + eta sqrt(variance) noise,    r = sqrt(1 - eta^2 c).

eta = 1 is the posterior q(z_s | z_t, x_hat) of Ho et al. 2020 and Kingma et al. 2021 (r = q), eta = 0 the
deterministic step of DDIM, and all of them have the same marginals (Song et al. 2021, "Denoising Diffusion Implicit
Models", equation 12). So do those above 1, which take out more of the noise in z_t and put in more of their own, as a
Langevin corrector does: errors of earlier steps are forgotten sooner. At eta = 1/sqrt(c) nothing of z_t's noise is
left, and that is where eta stops. No difference of near-equal numbers is formed: 1 - q r = c (1 + eta^2 (1 - c)) / (1
+ q r).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gaussian import Path, alpha_sigma


class ReverseCoefficients(NamedTuple):
    """z_s = z * z_t + x * x_hat + noise; float64 tensors of the log SNRs' shape."""

    z: Tensor
    x: Tensor
    posterior_variance: Tensor  # of q(z_s | z_t, x), the smallest that a reverse step may have
    forward_variance: Tensor  # of q(z_t | z_s), DDPM's beta_t, the largest
    stochasticity: Tensor  # eta of this step


def reverse_coefficients(
    log_snr_t: Tensor, log_snr_s: Tensor, stochasticity: float = 1.0, *, path: Path = "vp"
) -> ReverseCoefficients:
    """The coefficients of the step from t to s. log_snr_s = +inf is clean data, log_snr_t = -inf pure noise (vp,
    flow).

    Where no step is defined (both the same infinity, NaN in the schedule) the coefficients are NaN.
    """
    (alpha_s, sigma_s), (_, sigma_t) = alpha_sigma(log_snr_s, path), alpha_sigma(log_snr_t, path)
    difference = log_snr_t - log_snr_s
    c, one_minus_c, q = -torch.expm1(difference), torch.exp(difference), torch.exp(difference / 2)
    eta2 = torch.minimum(torch.full_like(c, stochasticity**2), 1 / c.abs())  # -0.0 where both times are one
    r = torch.sqrt(((1 - eta2) + eta2 * one_minus_c).clamp(min=0))
    return ReverseCoefficients(
        z=sigma_s / sigma_t * r,
        x=alpha_s * c * (1 + eta2 * one_minus_c) / (1 + q * r),
        posterior_variance=sigma_s**2 * c,
        forward_variance=sigma_t**2 * c,
        stochasticity=eta2.sqrt(),
    )


def multistep_weights(log_snrs: Tensor) -> Tensor:
    """k_i of the second-order multistep update on a grid: x_hat is replaced by x_hat_i + k_i (x_hat_i - x_hat_{i-1}).

    x_hat as a function of lambda = log_snr / 2 is extrapolated linearly from the last two evaluations to the middle of
    the step: k_i = h_i / (2 h_{i-1}), h_i the step in lambda. Zero for the first step and next to infinite ones.

    Arguments:
        log_snrs: (n + 1,) ascending log SNRs of the grid and of the end of its last step.
    Returns:
        (n,) float64.
    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M); with noise, its SDE variant in appendix.
    """
    h = log_snrs.diff()
    k = torch.cat([torch.zeros_like(h[:1]), h[1:] / (2 * h[:-1])])
    return torch.where(k.isfinite(), k, 0.0)


def velocity_weights(log_snrs: Tensor) -> Tensor:
    """k_i of the second-order multistep update of a flow's velocity v: v is replaced by v_i + k_i (v_i - v_{i-1}).

    v as a function of sigma is extrapolated linearly to the middle of the step, h_i long: k_i = h_i / (2 h_{i-1}).
    Zero for the first.

    Arguments:
        log_snrs: (n + 1,) ascending log SNRs on the flow path, of the grid and of the end of its last step.
    Returns:
        (n,) float64.
    Source: the two-step method of Adams and Bashforth for steps of any length (Hairer et al. 1993, section III.5).
    """
    h = torch.sigmoid(-log_snrs / 2).diff()
    k = torch.cat([torch.zeros_like(h[:1]), h[1:] / (2 * h[:-1])])
    return torch.where(k.isfinite(), k, 0.0)


def factored(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a z + b y as scale (first + ratio * second) with |ratio| <= 1. Returns (swap, ratio, scale); swap: y comes
    first.

    One fused multiply-add and one scaling: what cancels does so inside the first kernel, in at least float32 precision
    even for half-precision tensors, and only a rounding relative to the result is left.
    """
    swap = b.abs() > a.abs()
    large, small = torch.where(swap, b, a), torch.where(swap, a, b)
    return swap.to(a.dtype), small / large, large
