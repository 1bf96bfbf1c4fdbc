r"""The variance of the reverse transitions p(z_s | z_t), which the ELBO and ancestral sampling share.

The mean of p(z_s | z_t) is the posterior's with x_hat in place of x. Its variance is a choice:

    posterior     sigma_s^2 c, the variance of q(z_s | z_t, x)                     "fixed_small" of DDPM
    forward       sigma_t^2 c, the variance of q(z_t | z_s)                        "fixed_large"
    optimal       posterior + (coefficient of x)^2 E|x - x_hat|^2 / D              minimises the ELBO's step
    learned       the network's logarithm of it, or an interpolation of the logarithms of posterior and forward

with c = 1 - SNR_t / SNR_s. The first two bracket the optimum for data of unit variance; the third lies between them.

Source: Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, equation 15; Bao et al. 2022, "Analytic-DPM", theorem 1.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from .gaussian import posterior_coefficients, transition_coefficients
from .numerics import as_float64, compute_dtype, expand_to

ReverseVariance = Literal["posterior", "forward", "learned", "learned_range"]
REVERSE_VARIANCES: tuple[str, ...] = get_args(ReverseVariance)


def posterior_variance(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
    """The variance sigma_s^2 (1 - SNR_t / SNR_s) of q(z_s | z_t, x), float64, of the log SNRs' shape."""
    return posterior_coefficients(log_snr_t, log_snr_s).variance


def forward_variance(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
    """The variance sigma_t^2 (1 - SNR_t / SNR_s) of q(z_t | z_s), beta of a DDPM chain, float64."""
    return transition_coefficients(log_snr_s, log_snr_t)[1]


def learned_range_variance(fraction: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """exp(v ln high + (1 - v) ln low), v = (fraction + 1) / 2: a network's output in [-1, 1] as a variance, elementwise.

    Arguments:
        fraction: (B, ...) the network's second half of channels. low, high: () or (B,), the two ends of the range.
    Source: Nichol & Dhariwal 2021, equation 15, in the convention of Diffusers and improved-diffusion.
    """
    low, high = as_float64(low).log(), as_float64(high).log()
    v = (fraction.to(compute_dtype(fraction)) + 1) / 2
    return (v * expand_to(high, v) + (1 - v) * expand_to(low, v)).exp()
