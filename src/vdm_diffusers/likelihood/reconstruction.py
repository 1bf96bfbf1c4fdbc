"""The reconstruction term: three decoders, and the two whose expectation needs no network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..decoders import PixelEncoding, bin_width, discretized_gaussian_log_likelihood
from ..numerics import as_float64, sum_except_batch
from .denoising_model import DenoisingModel, learned_variance_of


@dataclass(frozen=True)
class SoftmaxDecoder:
    """VDM's decoder p(k | z_0), whose expectation over z_0 is exact: no network, no sampling."""

    log_snr_0: float


@dataclass(frozen=True)
class GaussianDecoder:
    """DDPM's decoder p(k | x_1): the mass of N(x_hat(x_1), variance) in each pixel's bin.

    Attributes:
        log_snr_1: of x_1, the first entry of the chain.
        variance: of the decoder; DDPM takes the posterior variance of the second step. With `learned` it is the lower
            end of the range (learned_range) or not used (learned).
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
    """E[-ln p(k | z_0)] over z_0 ~ q(z_0 | x_k) for every level k: (L,) float64 nats, the exact reconstruction term of
    a pixel.

    With z_0 / alpha_0 = x_k + sigma_0 / alpha_0 e, e ~ N(0, 1), and delta = bin width alpha_0 / sigma_0, the logits
    are -m delta (2 e + m delta) / 2 for the level m places away, and the expectation is one integral over e, done
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
