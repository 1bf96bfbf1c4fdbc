r"""The variance of the reverse transitions p(z_s | z_t), which the ELBO and ancestral sampling share.

The mean of p(z_s | z_t) is the posterior's with x_hat in place of x. Its variance is a choice:

    posterior     sigma_s^2 c, the variance of q(z_s | z_t, x)                     "fixed_small" of DDPM
    forward       sigma_t^2 c, the variance of q(z_t | z_s)                        "fixed_large"
    optimal       posterior + (coefficient of x)^2 E|x - x_hat|^2 / D              minimises the ELBO's step
    learned       the network's logarithm of it, or an interpolation of the logarithms of posterior and forward

with c = 1 - SNR_t / SNR_s. With the optimal variance a step costs, in expectation, D/2 ln(1 + (SNR_s - SNR_t) mse_t) nats instead
of D/2 (SNR_s - SNR_t) mse_t, mse_t = E|x - x_hat|^2 / D, for any network. The first two bracket the optimum for data of unit variance; the third lies between them.

Source: Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, equation 15; Bao et al. 2022, "Analytic-DPM", theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .gaussian import posterior_coefficients, transition_coefficients
from .numerics import as_float64, compute_dtype, expand_to

ReverseVariance = Literal["posterior", "forward", "optimal", "learned", "learned_range"]
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


@dataclass(frozen=True, eq=False)
class OptimalVariance:
    """mse(log_snr) = E|x - x_hat|^2 / D of a network, from which the optimal reverse variance follows.

    Attributes:
        log_snr: (K,) increasing. mse: (K,), not negative: linear in between, constant outside.
    Raises:
        ValueError: lists that do not fit, log SNRs that are not distinct and finite, or a negative mse.
    """

    log_snr: Tensor
    mse: Tensor

    def __post_init__(self) -> None:
        log_snr, mse = as_float64(self.log_snr).cpu(), as_float64(self.mse).cpu()
        if log_snr.ndim != 1 or log_snr.shape != mse.shape or len(mse) == 0 or not bool(log_snr.isfinite().all()):
            raise ValueError("`log_snr` and `mse` must be two lists of one length, of finite numbers.")
        log_snr, order = log_snr.sort()
        mse = mse[order]
        if not (bool((mse >= 0).all()) and bool((log_snr.diff() > 0).all())):
            raise ValueError("`log_snr` must be distinct, and `mse` not negative.")
        object.__setattr__(self, "log_snr", log_snr)
        object.__setattr__(self, "mse", mse)

    @classmethod
    def from_config(cls, config: Mapping[str, Sequence[float]]) -> OptimalVariance:
        """From the scheduler's config key `optimal_variance`: {"log_snr": [...], "mse": [...]}."""
        return cls(*(torch.tensor(config[key], dtype=torch.float64) for key in ("log_snr", "mse")))

    def to_config(self) -> dict[str, list[float]]:
        """JSON primitives for the scheduler's config."""
        return {"log_snr": self.log_snr.tolist(), "mse": self.mse.tolist()}

    def at(self, log_snr: Tensor) -> Tensor:
        """The mse at log SNRs of any shape, infinite ones included."""
        inside = log_snr.clamp(float(self.log_snr[0]), float(self.log_snr[-1]))
        if len(self.log_snr) == 1:
            return self.mse.expand(log_snr.shape)
        right = torch.searchsorted(self.log_snr, inside.contiguous()).clamp(1, len(self.log_snr) - 1)
        fraction = (inside - self.log_snr[right - 1]) / (self.log_snr[right] - self.log_snr[right - 1])
        return torch.lerp(self.mse[right - 1], self.mse[right], fraction)

    def variance(self, log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
        """posterior variance + (coefficient of x)^2 mse(log_snr_t), float64."""
        coefficients = posterior_coefficients(log_snr_t, log_snr_s)
        return coefficients.variance + coefficients.x**2 * self.at(as_float64(log_snr_t))


def expected_step_nats(
    log_snr_s: Tensor, log_snr_t: Tensor, mse_t: Tensor, variance: Literal["posterior", "optimal"] = "optimal"
) -> Tensor:
    """A step's expected KL for one dimension, in nats: 1/2 ln(1 + x) or 1/2 x, x = (SNR_s - SNR_t) mse_t.

    Arguments broadcast; log_snr_s >= log_snr_t. Source: Bao et al. 2022, "Analytic-DPM", theorem 1 and section 4.
    """
    x = torch.exp(log_snr_s) * -torch.expm1(log_snr_t - log_snr_s) * mse_t
    return 0.5 * (torch.log1p(x) if variance == "optimal" else x)


def continuous_nats(
    optimal: OptimalVariance, log_snr_max: float, log_snr_min: float, num_points: int = 20_000
) -> float:
    """The limit of many steps for one dimension, 1/2 integral of SNR mse d log_snr, by the midpoint rule: nats."""
    edges = torch.linspace(log_snr_min, log_snr_max, num_points + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    return float((middle.exp() * optimal.at(middle)).mean()) * (log_snr_max - log_snr_min) / 2


def optimal_grid(
    optimal: OptimalVariance,
    num_steps: int,
    candidates: Tensor,
    *,
    variance: Literal["posterior", "optimal"] = "optimal",
) -> Tensor:
    """The `num_steps` steps through `candidates` whose bound is smallest in expectation: (num_steps + 1,) log SNRs.

    Dynamic programming over the candidates: cost_k(t) = min over s < t of cost_{k-1}(s) + KL(s, t). Both ends are kept.

    Arguments:
        optimal: the mse that the costs are computed from.
        candidates: (M,) decreasing log SNRs, M > num_steps; memory and time grow with M^2.
    Raises:
        ValueError: fewer candidates than steps need.
    Source: Bao et al. 2022, "Analytic-DPM", section 4; Watson et al. 2021.
    """
    candidates = as_float64(candidates)
    count = len(candidates)
    if not 1 <= num_steps < count:
        raise ValueError(
            f"`num_steps` must lie in 1..{count - 1}, one less than there are candidates, got {num_steps}."
        )
    step = expected_step_nats(candidates[:, None], candidates, optimal.at(candidates), variance)
    step = torch.where(torch.ones(count, count, dtype=torch.bool).triu(1), step, math.inf)  # s before t
    cost, previous = step[0], []
    for _ in range(num_steps - 1):
        cost, best = (cost[:, None] + step).min(dim=0)
        previous.append(best)
    path = [count - 1]
    for best in reversed(previous):
        path.append(int(best[path[-1]]))
    return candidates[torch.tensor([0, *reversed(path)])]
