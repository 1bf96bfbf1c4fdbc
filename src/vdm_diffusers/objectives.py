r"""Training objectives, each written once, as a weight on |eps - eps_hat|^2 that is a function of log SNR.

Whatever a network predicts, its error is turned into one of eps by (alpha / det)^2 (`prediction.loss_weight_ratio`),
so every objective applies to every prediction type.

    objective        weight of |eps - eps_hat|^2 at a sampled time            source
    elbo             -1/2 d log_snr/dt, or T/2 expm1(log_snr_s - log_snr_t)   Kingma et al. 2021, equations 17, 14
    sigmoid          elbo's times sigmoid(bias - log_snr)                     Kingma & Gao 2023; Hoogeboom et al. 2024
    edm              elbo's times N(log_snr; 2.4, 2.4^2) (1/SNR + 1/4)        Kingma & Gao 2023, table 1
    simple           1                                                        Ho et al. 2020, equation 14
    min_snr          min(1, gamma / SNR), which is min(SNR, gamma) on x       Hang et al. 2023
    truncated_snr    max(1, 1 / SNR), which is max(SNR, 1) on x               Salimans & Ho 2022
    mse              none: the plain error of the network's own output

`elbo` comes out in bits/dim, ready to be backpropagated and read; with the prior and reconstruction terms, which a
fixed schedule makes constant, it is the bound. All others are means over the dimensions.

The first three carry the factor d log_snr / dt, so their expectation depends on the log-SNR range and not on how a
schedule runs through it; the others weigh what the schedule happens to visit. VDM++ (Kingma & Gao 2023) shows more:
a weighting w(log_snr) of the elbo that falls as log SNR rises (sigmoid does) is an ELBO too, of data augmented
with Gaussian noise whose level is drawn with the distribution function w: a model trained with it maximises the
likelihood of slightly noisy data. `edm` is not monotone, so it is no ELBO.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .elbo import squared_error
from .gaussian import Path
from .numerics import as_float64, expand_to
from .prediction import PredictionType, conversion_coefficients, prediction_target

Objective = Literal["elbo", "simple", "mse", "min_snr", "truncated_snr", "sigmoid", "edm"]
ELBO_WEIGHTED = ("elbo", "sigmoid", "edm")  # those that weigh by the ELBO's own weight
OBJECTIVES: tuple[str, ...] = get_args(Objective)


def epsilon_weight(
    log_snr: Tensor | float,
    objective: Objective,
    *,
    elbo_weight: Tensor | float | None = None,
    min_snr_gamma: float = 5.0,
    sigmoid_bias: float = 0.0,
) -> Tensor:
    """The weight of |eps - eps_hat|^2 in an objective, float64, of log_snr's shape (see the module's table).

    Arguments:
        elbo_weight: the ELBO's own weight at this time, needed by elbo, sigmoid and edm: `elbo.continuous_weight(
            schedule.derivative(t))`, or T times `elbo.discrete_weight(log_snr_s, log_snr_t)` for one of T steps drawn.
    Raises:
        ValueError: unknown objective, `mse` (it has no weight of its own), or a missing elbo_weight.
    """
    log_snr = as_float64(log_snr)
    if objective in ELBO_WEIGHTED:
        if elbo_weight is None:
            raise ValueError(
                f"objective {objective!r} needs `elbo_weight`: pass elbo.continuous_weight(schedule.derivative(t)), "
                "or "
                "T * elbo.discrete_weight(log_snr_s, log_snr_t) for a chain of T steps."
            )
        weight = as_float64(elbo_weight) * torch.ones_like(log_snr)
        if objective == "sigmoid":
            return weight * torch.sigmoid(sigmoid_bias - log_snr)
        if objective == "edm":
            density = torch.exp(-0.5 * ((log_snr - 2.4) / 2.4) ** 2) / (2.4 * math.sqrt(2 * math.pi))
            return weight * density * (torch.exp(-log_snr) + 0.25)
        return weight
    if objective == "simple":
        return torch.ones_like(log_snr)
    if objective == "min_snr":
        if not min_snr_gamma > 0:
            raise ValueError(f"`min_snr_gamma` must be positive, got {min_snr_gamma}.")
        return (min_snr_gamma * torch.exp(-log_snr)).clamp(max=1.0)
    if objective == "truncated_snr":
        return torch.exp(-log_snr).clamp(min=1.0)
    raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)} (mse has no weight), got {objective!r}.")


def output_weight(
    log_snr: Tensor | float,
    objective: Objective,
    prediction_type: PredictionType,
    *,
    elbo_weight: Tensor | float | None = None,
    path: Path = "vp",
    min_snr_gamma: float = 5.0,
    sigmoid_bias: float = 0.0,
) -> Tensor:
    """The weight of |y - y_hat|^2, the error of the network's own output: epsilon's weight times (alpha / det)^2.

    Float64, of log_snr's shape. `mse` gives 1. At zero terminal SNR the weights of `min_snr` and `truncated_snr` are
    the limits, finite for predictions that are defined there.

    Raises:
        ValueError: unknown objective or prediction type, a missing elbo_weight, or (on the CPU) a log_snr at which the
            objective's error cannot be told from the network's output.
    """
    log_snr = as_float64(log_snr)
    if objective == "mse":
        return torch.ones_like(log_snr)
    if objective in ("min_snr", "truncated_snr"):
        # in x form: min(SNR, gamma) and max(SNR, 1) are finite at log_snr = -inf, where epsilon's weight is not
        if objective == "min_snr" and not min_snr_gamma > 0:
            raise ValueError(f"`min_snr_gamma` must be positive, got {min_snr_gamma}.")
        snr = log_snr.exp()
        weight_x = snr.clamp(max=min_snr_gamma) if objective == "min_snr" else snr.clamp(min=1.0)
        return weight_x * conversion_coefficients(log_snr, source=prediction_type, target="sample", path=path)[1] ** 2
    weight = epsilon_weight(
        log_snr, objective, elbo_weight=elbo_weight, min_snr_gamma=min_snr_gamma, sigmoid_bias=sigmoid_bias
    )
    return weight * conversion_coefficients(log_snr, source=prediction_type, target="epsilon", path=path)[1] ** 2


def diffusion_loss(
    model_output: Tensor,
    x: Tensor,
    noise: Tensor,
    log_snr: Tensor | float,
    *,
    prediction_type: PredictionType,
    objective: Objective = "elbo",
    elbo_weight: Tensor | float | None = None,
    path: Path = "vp",
    min_snr_gamma: float = 5.0,
    sigmoid_bias: float = 0.0,
) -> Tensor:
    """The loss of a network's output at z_t = alpha x + sigma eps: (B,), to be averaged and backpropagated.

    Arguments:
        model_output: (B, ...) the network's answer at z_t, of type `prediction_type`.
        x, noise: (B, ...) the clean data and the standard normal noise that made z_t.
        log_snr: () or (B,) log SNR of z_t.
        elbo_weight: see `epsilon_weight`; needed by elbo, sigmoid, edm.
    Returns:
        (B,) in float32 or better; bits/dim for `elbo` (the diffusion term's unbiased estimate), else a weighted mean
        over the dimensions.
    Raises:
        ValueError: unknown objective or prediction type, a missing elbo_weight, shapes that differ, or (on the CPU) a
            log_snr at which the objective's error cannot be told from the network's output.
    Example (a loop of one's own):
        t = low_discrepancy(len(x))
        log_snr = schedule.log_snr(t)
        z_t = diffuse(x, noise, log_snr)
        loss = diffusion_loss(model(z_t, timestep), x, noise, log_snr, prediction_type="epsilon",
                              elbo_weight=continuous_weight(schedule.derivative(t))).mean()
    """
    weight = output_weight(
        log_snr,
        objective,
        prediction_type,
        elbo_weight=elbo_weight,
        path=path,
        min_snr_gamma=min_snr_gamma,
        sigmoid_bias=sigmoid_bias,
    )
    dtype = torch.promote_types(x.dtype, torch.float32)
    target = prediction_target(x.to(dtype), noise.to(dtype), log_snr, prediction_type, path=path)
    error = squared_error(model_output, target)
    num_dims = model_output[0].numel()
    scale = num_dims * math.log(2) if objective == "elbo" else num_dims
    return expand_to(weight / scale, error) * error
