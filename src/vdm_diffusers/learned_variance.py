r"""Training a network that also predicts the variance of its reverse transitions: the bound with the mean held fixed,
and the hybrid loss.

A network of learned variance has twice the sample's channels: a prediction, and for each dimension a number v that
says how large the variance of p(z_s | z_t) is (`reverse_variance`: "learned" is its logarithm, "learned_range"
interpolates between the logarithms of the posterior's and the forward step's). `objectives` trains the prediction and
never sees v. The bound does:

    L_t = KL(q(z_s | z_t, x) || N(mean(x_hat), variance)) = 1/2 sum_i [r_i - 1 - ln r_i + r_i c_x^2 (x - x_hat)_i^2 /
    posterior variance]

with r_i = posterior variance / variance_i and c_x the posterior mean's coefficient of x. Its gradient is too noisy to
train the prediction, which is therefore detached: L_hybrid = L_simple + lambda L_vlb trains the prediction by the
first term and v by the second.

Source: Nichol & Dhariwal 2021, "Improved DDPM", section 3.1 (equations 15 and 16).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .decoders import PixelEncoding, discretized_gaussian_log_likelihood
from .gaussian import diffuse, posterior_coefficients
from .numerics import as_float64, compute_dtype, expand_to, sum_except_batch
from .objectives import Objective, diffusion_loss
from .prediction import PredictionType, convert, loss_weight_ratio, prediction_target
from .reverse_variance import forward_variance

LearnedVariance = Literal["learned", "learned_range"]


def split_variance(model_output: Tensor, num_channels: int) -> tuple[Tensor, Tensor]:
    """The prediction and the variance channels of a network's output, each (B, num_channels, ...).

    Raises:
        ValueError: the output does not have twice as many channels.
    """
    if model_output.shape[1] != 2 * num_channels:
        raise ValueError(
            f"`model_output` must have {2 * num_channels} channels, a prediction and a variance for each of the "
            f"{num_channels} of the "
            f"data, got {model_output.shape[1]}. Make the network with out_channels={2 * num_channels}."
        )
    prediction, variance = model_output.chunk(2, dim=1)
    return prediction, variance


def variance_bound(
    model_output: Tensor,
    x: Tensor,
    noise: Tensor,
    log_snr_s: Tensor | float,
    log_snr_t: Tensor | float,
    *,
    prediction_type: PredictionType,
    variance_type: LearnedVariance = "learned_range",
) -> Tensor:
    """L_t, the KL divergence of one reverse step, as a function of the variance channels alone: (B,) nats.

    The prediction is detached: backpropagation reaches the second half of the channels and nothing else.

    Arguments:
        model_output: (B, 2 C, ...) the network's answer at z_t = alpha x + sigma eps.
        x, noise: (B, C, ...).
        log_snr_s, log_snr_t: () or (B,), log_snr_s > log_snr_t. log_snr_s = +inf, a step to clean data, is the
            decoder's: see `decoder_bound`.
        variance_type: what the second half of the channels means.
    Raises:
        ValueError: the wrong number of channels, log SNRs in the wrong order.
    Source: Nichol & Dhariwal 2021, equations 4, 15 and 16.
    """
    prediction, channels = split_variance(model_output, x.shape[1])
    dtype = compute_dtype(x, model_output)
    coefficients = posterior_coefficients(log_snr_t, log_snr_s)
    low, high = coefficients.variance.log(), forward_variance(log_snr_s, log_snr_t).log()
    log_ratio = expand_to(low, channels, dtype) - _log_variance(channels, variance_type, low, high, dtype)
    target = prediction_target(x.to(dtype), noise.to(dtype), log_snr_t, prediction_type)
    square = (prediction.detach().to(dtype) - target) ** 2
    to_x = loss_weight_ratio(log_snr_t, source=prediction_type, target="sample")
    scale = expand_to(coefficients.x**2 * to_x / coefficients.variance, square, dtype)
    # r - 1 - ln r from ln r, and r times the error of the mean
    return 0.5 * sum_except_batch(torch.expm1(log_ratio) - log_ratio + scale * square * log_ratio.exp())


def decoder_bound(
    model_output: Tensor,
    x: Tensor,
    noise: Tensor,
    levels: Tensor,
    log_snr_1: Tensor | float,
    log_snr_2: Tensor | float,
    *,
    prediction_type: PredictionType,
    variance_type: LearnedVariance = "learned_range",
    num_levels: int = 256,
    pixel_encoding: PixelEncoding = "endpoint",
) -> Tensor:
    """-ln p(k | x_1) of a DDPM chain, its step to clean data, as a function of the variance channels alone: (B,) nats.

    The decoder is the mass of N(x_hat(x_1), variance) in the integers' bins. "learned_range" interpolates between the
    posterior variance of the second step (that of the first is 0) and beta_1.

    Arguments:
        model_output, x, noise: as in `variance_bound`, at x_1.
        levels: (B, C, ...) the integers. log_snr_1, log_snr_2: of x_1 and x_2.
    Raises:
        ValueError: the wrong number of channels; levels that do not fit.
    Source: Ho et al. 2020, equation 13; Nichol & Dhariwal 2021, section 3.1.
    """
    prediction, channels = split_variance(model_output, x.shape[1])
    dtype = compute_dtype(x, model_output)
    x_1 = diffuse(x.to(dtype), noise.to(dtype), log_snr_1)
    x_hat = convert(prediction.detach().to(dtype), x_1, log_snr_1, source=prediction_type, target="sample")
    low = posterior_coefficients(log_snr_2, log_snr_1).variance.log()
    high = forward_variance(math.inf, log_snr_1).log()
    variance = _log_variance(channels, variance_type, low, high, dtype).exp()
    return -discretized_gaussian_log_likelihood(
        levels, x_hat, variance, num_levels=num_levels, pixel_encoding=pixel_encoding
    )


def hybrid_loss(
    model_output: Tensor,
    x: Tensor,
    noise: Tensor,
    log_snr: Tensor | float,
    bound: Tensor,
    num_steps: int,
    *,
    prediction_type: PredictionType,
    objective: Objective = "simple",
    vlb_weight: float = 0.001,
) -> Tensor:
    """L_hybrid = L_simple + lambda L_vlb at a random step of a chain: (B,), to be averaged and backpropagated.

    L_vlb is the estimate T L_t of the whole chain's bound, in bits/dim: with lambda = 0.001 and T = 1000 the two terms
    are of like size.

    Arguments:
        model_output: (B, 2 C, ...). log_snr: of z_t.
        bound: (B,) nats, L_t by `variance_bound` or, for steps to clean data, `decoder_bound`.
        num_steps: T.
        objective: the loss of the prediction, one that needs no ELBO weight.
        vlb_weight: lambda.
    Raises:
        ValueError: the wrong number of channels; an objective that needs a weight.
    Example:
        bound = variance_bound(output, x, noise, log_snr_s, log_snr_t, prediction_type="epsilon")
        hybrid_loss(output, x, noise, log_snr_t, bound, 1000, prediction_type="epsilon").mean().backward()
    Source: Nichol & Dhariwal 2021, equation 16.
    """
    prediction, _ = split_variance(model_output, x.shape[1])
    loss = diffusion_loss(prediction, x, noise, log_snr, prediction_type=prediction_type, objective=objective)
    return loss + vlb_weight * num_steps / (x[0].numel() * math.log(2)) * bound.to(loss)


def _log_variance(
    channels: Tensor, variance_type: LearnedVariance, low: Tensor, high: Tensor, dtype: torch.dtype
) -> Tensor:
    """The logarithm of the variance that the channels stand for, between the logarithms `low` and `high`,
    elementwise.
    """
    if variance_type == "learned":
        return channels.to(dtype)
    if variance_type != "learned_range":
        raise ValueError(f"`variance_type` must be 'learned' or 'learned_range', got {variance_type!r}.")
    low, width = as_float64(low), as_float64(high) - as_float64(low)
    return expand_to(low, channels, dtype) + expand_to(width / 2, channels, dtype) * (channels.to(dtype) + 1)
