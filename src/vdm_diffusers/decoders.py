r"""From integers to the space of the diffusion and back: pixel encodings and the likelihood of the integers.

Images are integers k = 0..L-1 (L = 256 for 8 bits). Two encodings put them into [-1, 1]:

    encoding      x_k                    bin width     used by
    bin_center    2 (k + 1/2) / L - 1    2 / L         VDM
    endpoint      2 k / (L - 1) - 1      2 / (L - 1)   Diffusers, DDPM (k / 127.5 - 1 for 8 bits)

Two decoders of diffusion models give p(k | z), factorised over the dimensions:

    VDM    p(k | z_0) proportional to N(z_0 / alpha_0; x_k, sigma_0^2 / alpha_0^2): a softmax over the L levels
    DDPM   p(k | x_1) = the mass of N(mean, variance) in bin k, the two outer bins open

and two more serve variational autoencoders: the mass of a logistic distribution in bin k, and Bernoulli's for two
levels.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .gaussian import Path, alpha_sigma
from .numerics import as_float64, expand_to, on_host, shown, sum_except_batch

PixelEncoding = Literal["bin_center", "endpoint"]
PIXEL_ENCODINGS: tuple[str, ...] = get_args(PixelEncoding)
_CHUNK = 1 << 22  # logits held at a time by the softmax over levels


def encode_pixels(
    levels: Tensor,
    num_levels: int = 256,
    pixel_encoding: PixelEncoding = "bin_center",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integers k in 0..num_levels-1 -> x_k in [-1, 1], of any shape, rounded once to `dtype`.

    Raises:
        ValueError: fewer than two levels, unknown encoding, or values that are not integers 0..num_levels-1 (range: on
            the CPU).
    """
    _check(num_levels, pixel_encoding)
    if levels.is_floating_point() or levels.dtype == torch.bool:
        raise ValueError(
            f"`levels` must hold integers 0..{num_levels - 1}, got dtype {levels.dtype}. For images in [0, 1] pass "
            "(images * (num_levels - 1)).round().long()."
        )
    check_range(levels, num_levels)
    # (2 k + 1 - L) / L and (2 k - (L - 1)) / (L - 1): the numerators are exact, so there is one rounding
    working = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    exact = num_levels <= 2**22  # for float32 too, which takes a pass over the pixels less than integers
    numerator = 2 * (levels.to(working) if exact else levels.long())
    numerator = numerator.add_(1 - num_levels).to(working)
    return numerator.div_(num_levels if pixel_encoding == "bin_center" else num_levels - 1).to(dtype)


def decode_pixels(x: Tensor, num_levels: int = 256, pixel_encoding: PixelEncoding = "bin_center") -> Tensor:
    """The nearest level of x, clamped to 0..num_levels-1: int64, of x's shape. The mode of both decoders.

    Raises:
        ValueError: fewer than two levels, unknown encoding, or an x that is not finite (on the CPU).
    """
    _check(num_levels, pixel_encoding)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if on_host(x) and not bool(x.isfinite().all()):
        raise ValueError("`x` holds values that are not finite: the sampling or the network has diverged.")
    if pixel_encoding == "bin_center":  # level k owns [k, k + 1) / L
        return ((x + 1) / 2 * num_levels).floor().clamp(0, num_levels - 1).long()
    return ((x + 1) / 2 * (num_levels - 1)).round().clamp(0, num_levels - 1).long()


def level_values(
    num_levels: int = 256, pixel_encoding: PixelEncoding = "bin_center", dtype: torch.dtype = torch.float64
) -> Tensor:
    """All x_k, k = 0..num_levels-1: (num_levels,)."""
    return encode_pixels(torch.arange(num_levels), num_levels, pixel_encoding, dtype)


def bin_width(num_levels: int, pixel_encoding: PixelEncoding) -> float:
    """The distance of two neighbouring x_k."""
    _check(num_levels, pixel_encoding)
    return 2 / num_levels if pixel_encoding == "bin_center" else 2 / (num_levels - 1)


def softmax_log_likelihood(
    levels: Tensor,
    z_0: Tensor,
    log_snr_0: Tensor | float,
    *,
    num_levels: int = 256,
    pixel_encoding: PixelEncoding = "bin_center",
    path: Path = "vp",
) -> Tensor:
    """VDM's decoder: ln p(k | z_0) = sum over dimensions of ln softmax_k [-1/2 e^{log_snr_0} (z_0 / alpha_0 - x_k)^2].

    Arguments:
        levels: (B, ...) integers k. z_0: (B, ...) latents at log_snr_0.
        log_snr_0: () or (B,), finite.
    Returns:
        (B,) nats, differentiable in z_0 and log_snr_0. Dimensions are taken in chunks, whose logits the backward pass
        computes again, so that memory stays bounded.
    Raises:
        ValueError: levels outside 0..num_levels-1, a log_snr_0 that is not finite (both: on the CPU), shapes that
            differ.
    Source: Kingma et al. 2021, equation 8 (section 3.3): p(x_i | z_0,i) proportional to q(z_0,i | x_i).
    """
    check_levels(levels, num_levels, z_0)
    log_snr_0 = as_float64(log_snr_0)
    if on_host(log_snr_0) and not bool(log_snr_0.isfinite().all()):
        raise ValueError(f"`log_snr_0` must be finite for the decoder to be a distribution, got {shown(log_snr_0)}.")
    alpha, _ = alpha_sigma(log_snr_0, path)
    dtype = _accurate_dtype(z_0)
    ratio = (z_0.to(dtype) / expand_to(alpha, z_0, dtype)).flatten()
    half_snr = (expand_to(log_snr_0.exp() / 2, z_0, dtype) + torch.zeros_like(z_0, dtype=dtype)).flatten()
    values = level_values(num_levels, pixel_encoding).to(device=z_0.device, dtype=dtype)
    own = values[levels.flatten().to(z_0.device).long()]
    size = max(1, _CHUNK // num_levels)
    parts = []
    for r, h, x in zip(ratio.split(size), half_snr.split(size), own.split(size), strict=True):
        parts.append(checkpoint(_log_softmax_of, x, r, h, values, use_reentrant=False, preserve_rng_state=False))
    return sum_except_batch(torch.cat(parts).reshape(z_0.shape))


def _log_softmax_of(x: Tensor, ratio: Tensor, half_snr: Tensor, values: Tensor) -> Tensor:
    """ln softmax of -half_snr (ratio - x_k)^2 at x_k = x, elementwise over the first three, of shape (n,)."""
    # (r - x_k)^2 - (r - x)^2 = (x - x_k) (2 r - x - x_k): the true level's logit is exactly 0
    logits = -half_snr[:, None] * (x[:, None] - values) * (2 * ratio[:, None] - x[:, None] - values)
    return -torch.logsumexp(logits, dim=1)


def discretized_gaussian_log_likelihood(
    levels: Tensor,
    mean: Tensor,
    variance: Tensor | float,
    *,
    num_levels: int = 256,
    pixel_encoding: PixelEncoding = "endpoint",
) -> Tensor:
    """DDPM's decoder: ln of the mass that N(mean, variance) has in the bins of the integers, the outer bins open.

    ln p(k | mean, variance) = sum over dimensions of ln [Phi((x_k + h - mean) / s) - Phi((x_k - h - mean) / s)], h
    half a bin width, s = sqrt(variance), with -inf and +inf for the outer edges.

    Arguments:
        levels: (B, ...) integers. mean: (B, ...).
        variance: a number, (B,), or of the data's shape; positive.
    Returns:
        (B,) nats, from the exact normal distribution function (no tanh approximation, no floor on the probability).
    Raises:
        ValueError: levels outside 0..num_levels-1, a variance that is not positive (both: on the CPU), shapes that
            differ.
    Source: Ho et al. 2020, equation 13.
    """
    check_levels(levels, num_levels, mean)
    dtype = _accurate_dtype(mean)
    levels = levels.to(mean.device).long()
    variance = as_float64(variance)
    if on_host(variance) and not bool((variance > 0).all()):
        raise ValueError(
            f"`variance` must be positive, got {float(variance.min())}: a discrete decoder needs a density."
        )
    deviation = expand_to(variance.sqrt(), mean, dtype)
    center = level_values(num_levels, pixel_encoding).to(device=mean.device, dtype=dtype)[levels] - mean.to(dtype)
    half = bin_width(num_levels, pixel_encoding) / 2
    upper = torch.where(levels == num_levels - 1, math.inf, (center + half) / deviation)
    lower = torch.where(levels == 0, -math.inf, (center - half) / deviation)
    return sum_except_batch(log_normal_mass(lower, upper))


def discretized_logistic_log_likelihood(
    levels: Tensor,
    mean: Tensor,
    scale: Tensor | float,
    *,
    num_levels: int = 256,
    pixel_encoding: PixelEncoding = "bin_center",
) -> Tensor:
    """ln of the mass that a logistic distribution has in the bins of the integers, the outer bins open.

    ln p(k | mean, scale) = sum over dimensions of ln [S((x_k + h - mean) / scale) - S((x_k - h - mean) / scale)], S
    the logistic function, h half a bin width, with -inf and +inf for the outer edges. Computed as ln S(u) + ln S(-l) +
    ln(1 - e^(l - u)), in which nothing cancels.

    Arguments:
        levels: (B, ...) integers. mean: (B, ...).
        scale: a number, (B,), or of the data's shape; positive. The standard deviation is pi / sqrt(3) times it.
    Returns:
        (B,) nats.
    Raises:
        ValueError: levels outside 0..num_levels-1, a scale that is not positive (both: on the CPU), shapes that
            differ.
    Source: Kingma et al. 2016, "Inverse autoregressive flow", appendix; Salimans et al. 2017, "PixelCNN++", equation
        2.
    """
    check_levels(levels, num_levels, mean)
    dtype = _accurate_dtype(mean)
    levels = levels.to(mean.device).long()
    scale = as_float64(scale)
    if on_host(scale) and not bool((scale > 0).all()):
        raise ValueError(f"`scale` must be positive, got {float(scale.min())}: a discrete decoder needs a density.")
    scale = expand_to(scale, mean, dtype)
    center = level_values(num_levels, pixel_encoding).to(device=mean.device, dtype=dtype)[levels] - mean.to(dtype)
    half = bin_width(num_levels, pixel_encoding) / 2
    upper = torch.where(levels == num_levels - 1, math.inf, (center + half) / scale)
    lower = torch.where(levels == 0, -math.inf, (center - half) / scale)
    # the distance of the edges is the bin's width exactly; a difference of the two would not be
    inside = (levels > 0) & (levels < num_levels - 1)
    log_width = torch.where(inside, torch.log(-torch.expm1(-2 * half / scale)), 0.0)
    return sum_except_batch(F.logsigmoid(upper) + F.logsigmoid(-lower) + log_width)


def bernoulli_log_likelihood(levels: Tensor, logits: Tensor) -> Tensor:
    """ln p(k | logits) of binary data, k in {0, 1}, p(k = 1) = sigmoid(logit): sum over dimensions, (B,) nats.

    Arguments:
        levels: (B, ...) integers 0 or 1. logits: (B, ...).
    Raises:
        ValueError: levels other than 0 and 1 (on the CPU), shapes that differ.
    """
    check_levels(levels, 2, logits)
    sign = 2 * levels.to(logits.device).to(_accurate_dtype(logits)) - 1
    return sum_except_batch(F.logsigmoid(sign * logits))


def log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """ln [Phi(upper) - Phi(lower)] for lower < upper, elementwise, accurate in the tails and for narrow intervals."""
    # by symmetry work in the left tail, where Phi is small and its logarithm keeps its precision
    flip = lower + upper > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_high: Tensor = torch.special.log_ndtr(high)
    finite = low.isfinite()
    log_low = torch.special.log_ndtr(torch.where(finite, low, -1.0))
    ratio = torch.where(finite, log_low - log_high, -1.0)  # ln [Phi(low) / Phi(high)] < 0
    return log_high + torch.where(finite, torch.log(-torch.expm1(ratio)), 0.0)


def check_levels(levels: Tensor, num_levels: int, like: Tensor) -> None:
    """Raise ValueError unless `levels` are integers of `like`'s shape in 0..num_levels-1 (values: on the CPU)."""
    if levels.shape != like.shape:
        raise ValueError(f"`levels` must have the data's shape {tuple(like.shape)}, got {tuple(levels.shape)}.")
    if levels.is_floating_point():
        raise ValueError(f"`levels` must be integers, got {levels.dtype}: likelihoods are of integers, not of floats.")
    check_range(levels, num_levels)


def check_range(levels: Tensor, num_levels: int) -> None:
    """Raise ValueError unless all `levels` (on the CPU) lie in 0..num_levels-1."""
    if on_host(levels) and levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < num_levels:
        raise ValueError(
            f"`levels` must lie in 0..{num_levels - 1}, got {int(levels.min())}..{int(levels.max())}. Is `num_levels` "
            "right?"
        )


def _accurate_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _check(num_levels: int, pixel_encoding: str) -> None:
    if num_levels < 2:
        raise ValueError(f"`num_levels` must be at least 2, got {num_levels}.")
    if pixel_encoding not in PIXEL_ENCODINGS:
        raise ValueError(f"`pixel_encoding` must be one of {', '.join(PIXEL_ENCODINGS)}, got {pixel_encoding!r}.")
