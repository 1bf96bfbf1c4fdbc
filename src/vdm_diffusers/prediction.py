r"""Prediction types: what a denoising network's output means, and how to turn one meaning into another.

Each type is a row (a, b): the network's target is y = a x + b eps.

    prediction type     a        b
    sample              1        0            the clean data
    epsilon             0        1            the noise
    v_prediction        -sigma   alpha        Salimans & Ho 2022, "Progressive distillation", appendix D
    score               0        -1/sigma     the score of q(z_t | x); in expectation that of q(z_t)
    flow_prediction     -1       1            the velocity eps - x of the straight path, Liu et al. 2022

Together with z = alpha x + sigma eps a row is a 2x2 system. Its determinant det = alpha b - sigma a is one term, or a
sum of two of one sign, for every type, so that nothing cancels: x = (b z - sigma y) / det, eps = (alpha y - a z) /
det, and the target of another row (a', b') is y' = [(a' b - b' a) z + det' y] / det. N types are N rows, not N^2
functions.

Where det = 0 a type says nothing of another one: epsilon at log_snr = -inf nothing of x, sample at +inf nothing of
eps. There `convert` raises (for values on the CPU) rather than return a number.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .gaussian import Path, alpha_sigma
from .numerics import as_float64, expand_to, linear_combination, on_host

PredictionType = Literal["sample", "epsilon", "v_prediction", "score", "flow_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def target_coefficients(
    log_snr: Tensor | float, prediction_type: PredictionType, *, path: Path = "vp"
) -> tuple[Tensor, Tensor]:
    """The row (a, b) of a prediction type at `log_snr`: its target is y = a x + b eps. Float64, of log_snr's shape.

    Raises:
        ValueError: an unknown type.
    """
    alpha, sigma = alpha_sigma(log_snr, path)
    return _row(prediction_type, alpha, sigma)


def prediction_target(
    x: Tensor, noise: Tensor, log_snr: Tensor | float, prediction_type: PredictionType, *, path: Path = "vp"
) -> Tensor:
    """What a network of the given type should answer at z_t = alpha x + sigma eps: y = a x + b eps, of x's shape.

    For `sample` and `epsilon` it is x or the noise itself, not a copy.
    """
    a, b = target_coefficients(log_snr, prediction_type, path=path)
    if prediction_type in ("sample", "epsilon") and (x.shape, x.dtype) == (noise.shape, noise.dtype):
        expand_to(a, x)  # raises where log_snr does not go with the data
        return x if prediction_type == "sample" else noise
    return linear_combination(a, x, b, noise)


def conversion_coefficients(
    log_snr: Tensor | float, *, source: PredictionType, target: PredictionType, path: Path = "vp"
) -> tuple[Tensor, Tensor]:
    """(A, B) with target = A z_t + B source, float64, of log_snr's shape.

    A = (a' b - b' a) / det, B = det' / det, for the source's row (a, b), the target's (a', b'), det = alpha b - sigma
    a.

    Raises:
        ValueError: an unknown type, or a log_snr (on the CPU) at which the source does not determine the target.
    """
    log_snr = as_float64(log_snr)
    alpha, sigma = alpha_sigma(log_snr, path)
    a, b = _row(source, alpha, sigma)
    a_target, b_target = _row(target, alpha, sigma)
    if source == target:
        return torch.zeros_like(log_snr), torch.ones_like(log_snr)
    if source in ("epsilon", "score") and target in ("epsilon", "score"):  # parallel rows: a plain rescaling
        z_coefficient = torch.zeros_like(log_snr)
        value_coefficient = -sigma if source == "score" else b_target
        undefined = sigma == 0
    elif source == "score":  # its row is infinite at sigma = 0, where -sigma score = eps is not
        z_coefficient, value_coefficient = _solve(0 * alpha, 0 * alpha + 1, a_target, b_target, alpha, sigma)
        value_coefficient = value_coefficient * -sigma
        undefined = (alpha == 0) | ((sigma == 0) & (b_target != 0))
    elif target == "score":
        z_coefficient, value_coefficient = _solve(a, b, 0 * alpha, 0 * alpha + 1, alpha, sigma)
        z_coefficient, value_coefficient = -z_coefficient / sigma, -value_coefficient / sigma
        undefined = (alpha * b - sigma * a == 0) | (sigma == 0)
    else:
        z_coefficient, value_coefficient = _solve(a, b, a_target, b_target, alpha, sigma)
        undefined = alpha * b - sigma * a == 0
    if on_host(undefined) and bool(undefined.any()):
        where = "+inf" if bool((sigma == 0).any()) else "-inf"
        raise ValueError(
            f"a prediction of type {source!r} does not determine {target!r} at log_snr = {where}. At zero terminal "
            "SNR use a "
            "network that predicts v, flow or the sample, or leave that step out."
        )
    return z_coefficient, value_coefficient


def convert(
    value: Tensor,
    z_t: Tensor,
    log_snr: Tensor | float,
    *,
    source: PredictionType,
    target: PredictionType,
    path: Path = "vp",
) -> Tensor:
    """A prediction of type `source`, made at z_t, as one of type `target`.

    Arguments:
        value: (B, ...) the network's output, of type `source`.
        z_t: (B, ...) the noisy data that the network saw.
        log_snr: () or (B,) log SNR of z_t.
        source, target: 'sample', 'epsilon', 'v_prediction', 'score' or 'flow_prediction'.
        path: 'vp', 've' or 'flow'.
    Returns:
        (B, ...); `value` itself where source == target.
    Raises:
        ValueError: an unknown type or path, shapes that do not fit, or a log_snr at which the result is undefined.
    """
    if source == target and source in PREDICTION_TYPES:
        return value
    z_coefficient, value_coefficient = conversion_coefficients(log_snr, source=source, target=target, path=path)
    return linear_combination(z_coefficient, z_t, value_coefficient, value)


def loss_weight_ratio(
    log_snr: Tensor | float, *, source: PredictionType, target: PredictionType, path: Path = "vp"
) -> Tensor:
    """|y'_hat - y'|^2 / |y_hat - y|^2 for the same network read as `target` (y') and as `source` (y): (det' / det)^2.

    So a loss weight on the error of `target` times this ratio is one on the error of `source`. Float64, of log_snr's
    shape.
    """
    return conversion_coefficients(log_snr, source=source, target=target, path=path)[1] ** 2


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless `prediction_type` is one of the five."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}.")


def _row(prediction_type: PredictionType, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    check_prediction_type(prediction_type)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "sample":
        return one, zero
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "score":
        return zero, -1 / sigma
    if prediction_type == "v_prediction":
        return -sigma, alpha
    if prediction_type == "flow_prediction":
        return -one, one
    raise ValueError(f"the row of prediction type {prediction_type!r} is missing here.")


def _solve(
    a: Tensor, b: Tensor, a_target: Tensor, b_target: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    det = alpha * b - sigma * a
    return (a_target * b - b_target * a) / det, (alpha * b_target - sigma * a_target) / det
