r"""The variance of the reverse transitions p(z_s | z_t), which the ELBO and ancestral sampling share.

The mean of p(z_s | z_t) is the posterior's with x_hat in place of x. Its variance is a choice:

    posterior     sigma_s^2 c, the variance of q(z_s | z_t, x)                     "fixed_small" of DDPM
    forward       sigma_t^2 c, the variance of q(z_t | z_s)                        "fixed_large"
    optimal       posterior + (coefficient of x)^2 E|x - x_hat|^2 / D              minimises the ELBO's step
    learned       the network's logarithm of it, or an interpolation of the logarithms of posterior and forward

with c = 1 - SNR_t / SNR_s. With the optimal variance a step costs, in expectation, D/2 ln(1 + (SNR_s - SNR_t) mse_t)
nats instead of D/2 (SNR_s - SNR_t) mse_t, mse_t = E|x - x_hat|^2 / D, for any network. The first two bracket the
optimum for data of unit variance; the third lies between them.

Source: Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, equation 15; Bao et al. 2022, "Analytic-DPM", theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from .frequency import RadialBands
from .gaussian import posterior_coefficients, transition_coefficients
from .numerics import as_float64, compute_dtype, expand_to

ReverseVariance = Literal["posterior", "forward", "optimal", "learned", "learned_range"]
REVERSE_VARIANCES: tuple[str, ...] = get_args(ReverseVariance)
VARIANCE_TYPES: dict[str, ReverseVariance] = {  # by the names that Diffusers' configurations have for them
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "forward",
    "fixed_large_log": "forward",
    "learned": "learned",
    "learned_range": "learned_range",
    "optimal": "optimal",
}


def posterior_variance(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
    """The variance sigma_s^2 (1 - SNR_t / SNR_s) of q(z_s | z_t, x), float64, of the log SNRs' shape."""
    return posterior_coefficients(log_snr_t, log_snr_s).variance


def forward_variance(log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
    """The variance sigma_t^2 (1 - SNR_t / SNR_s) of q(z_t | z_s), beta of a DDPM chain, float64."""
    return transition_coefficients(log_snr_s, log_snr_t)[1]


def learned_range_variance(fraction: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """exp(v ln high + (1 - v) ln low), v = (fraction + 1) / 2: a network's output in [-1, 1] as a variance,
    elementwise.

    Arguments:
        fraction: (B, ...) the network's second half of channels. low, high: () or (B,), the two ends of the range.
    Source: Nichol & Dhariwal 2021, equation 15, in the convention of Diffusers and improved-diffusion.
    """
    low, high = as_float64(low).log(), as_float64(high).log()
    v = (fraction.to(compute_dtype(fraction)) + 1) / 2
    return (v * expand_to(high, v) + (1 - v) * expand_to(low, v)).exp()


@dataclass(frozen=True, eq=False)
class OptimalVariance:
    """mse(log_snr) = E|x - x_hat|^2 / D of a network, from which the optimal reverse variance follows: one number, or
    one for each radial band of the cosine transform of each channel (`frequency.RadialBands`), of images of one size.

    The step's optimal variance among all that are diagonal in the cosine transform and equal within a band is
    posterior + (coefficient of x)^2 mse_band, for any network.

    Attributes:
        log_snr: (K,) increasing.
        mse: (K,), or (K, C, bands), not negative: ln mse is linear in between (mse itself next to zeros), constant
            outside.
        shape: (C, H, W) of the images, with a mse for each band; else None.
    Raises:
        ValueError: lists that do not fit, log SNRs that are not distinct and finite, or a negative mse.
    """

    log_snr: Tensor
    mse: Tensor
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        log_snr, mse = as_float64(self.log_snr).cpu(), as_float64(self.mse).cpu()
        rest: tuple[int, ...] = ()
        if self.shape is not None:
            if len(self.shape) != 3 or min(self.shape) < 1:
                raise ValueError(f"`shape` must be that of an image, (C, H, W), got {self.shape}.")
            object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
            rest = (self.shape[0], len(self.bands.counts))
        if log_snr.ndim != 1 or mse.shape != (*log_snr.shape, *rest) or len(mse) == 0:
            each = f", {rest[0]} channels x {rest[1]} bands of shape {self.shape}" if rest else ""
            raise ValueError(
                f"`log_snr` and `mse` must be two lists of one length{each}, got shapes {tuple(log_snr.shape)} and "
                f"{tuple(mse.shape)}."
            )
        if not (bool(log_snr.isfinite().all()) and bool(mse.isfinite().all())):
            raise ValueError("`log_snr` and `mse` must be finite numbers.")
        log_snr, order = log_snr.sort()
        mse = mse[order]
        if not (bool((mse >= 0).all()) and bool((log_snr.diff() > 0).all())):
            raise ValueError("`log_snr` must be distinct, and `mse` not negative.")
        object.__setattr__(self, "log_snr", log_snr)
        object.__setattr__(self, "mse", mse)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> OptimalVariance:
        """From the scheduler's config key `optimal_variance`: {"log_snr": [...], "mse": [...]}, besides "shape": [C,
        H, W] with bands.
        """
        try:
            log_snr, mse = (torch.tensor(config[key], dtype=torch.float64) for key in ("log_snr", "mse"))
            shape = None if config.get("shape") is None else tuple(config["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "`optimal_variance` must hold two lists of one length, `log_snr` and `mse` (with one entry for each "
                "channel and "
                "band if there is a `shape`): what estimate_optimal_variance(...) returns."
            ) from error
        return cls(log_snr, mse, cast("tuple[int, int, int] | None", shape))

    def to_config(self) -> dict[str, list[Any]]:
        """JSON primitives for the scheduler's config."""
        config = {"log_snr": self.log_snr.tolist(), "mse": self.mse.tolist()}
        return config if self.shape is None else {**config, "shape": list(self.shape)}

    @cached_property
    def bands(self) -> RadialBands:
        """The bands of images of `shape`; of one frequency without."""
        return RadialBands.of(*(self.shape or (1, 1, 1))[1:])

    @property
    def overall(self) -> OptimalVariance:
        """One number for all frequencies: the mean of the bands."""
        return OptimalVariance(self.log_snr, self.mean(self.mse))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all frequencies of values (..., C, bands): (...). Without bands the values themselves."""
        return values if self.shape is None else (values @ (self.bands.counts / self.bands.counts.sum())).mean(-1)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless images of `shape` (C, H, W) are those whose bands were measured."""
        if self.shape is not None and tuple(shape) != self.shape:
            raise ValueError(
                f"the scheduler's `optimal_variance` was measured for each frequency of images of shape {self.shape}, "
                "got "
                f"{tuple(shape)}. Measure it again at this size, or without per_frequency=True."
            )

    def at(self, log_snr: Tensor) -> Tensor:
        """The mse at log SNRs of any shape, infinite ones included: (...), or (..., C, bands)."""
        log_snr = as_float64(log_snr).cpu()
        if len(self.log_snr) == 1:
            return self.mse[0].expand(log_snr.shape + self.mse.shape[1:])
        inside = log_snr.clamp(float(self.log_snr[0]), float(self.log_snr[-1]))
        right = torch.searchsorted(self.log_snr, inside.contiguous()).clamp(1, len(self.log_snr) - 1)
        fraction = (inside - self.log_snr[right - 1]) / (self.log_snr[right] - self.log_snr[right - 1])
        fraction = fraction.reshape(fraction.shape + (1,) * (self.mse.ndim - 1))
        low, high = self.mse[right - 1], self.mse[right]
        return torch.where(
            (low > 0) & (high > 0), low ** (1 - fraction) * high**fraction, torch.lerp(low, high, fraction)
        )

    def variance(self, log_snr_s: Tensor | float, log_snr_t: Tensor | float) -> Tensor:
        """posterior variance + (coefficient of x)^2 mse(log_snr_t), float64: (...), or (..., C, bands)."""
        coefficients = posterior_coefficients(log_snr_t, log_snr_s)
        mse = self.at(as_float64(log_snr_t))
        added = (1,) * (self.mse.ndim - 1)
        square, least = (v.reshape(v.shape + added) for v in (coefficients.x**2, coefficients.variance))
        return least + square * mse

    def step_nats(
        self, log_snr_s: Tensor, log_snr_t: Tensor, variance: Literal["posterior", "optimal"] = "optimal"
    ) -> Tensor:
        """A step's expected KL for one dimension, the mean over the frequencies, in nats. The log SNRs broadcast."""
        mse = self.at(log_snr_t)
        if self.shape is None or variance == "posterior":
            return expected_step_nats(log_snr_s, log_snr_t, self.mean(mse), variance)
        weight = (0.5 * self.bands.counts / (self.bands.counts.sum() * self.shape[0])).tolist()
        gain = _snr_gain(log_snr_s, log_snr_t)
        total = torch.zeros_like(gain)
        for channel in range(self.shape[0]):  # one band at a time: the grid's search has a matrix of log SNRs
            for band, w in enumerate(weight):
                total += w * torch.log1p(gain * mse[..., channel, band])
        return total


def expected_step_nats(
    log_snr_s: Tensor, log_snr_t: Tensor, mse_t: Tensor, variance: Literal["posterior", "optimal"] = "optimal"
) -> Tensor:
    """A step's expected KL for one dimension, in nats: 1/2 ln(1 + x) or 1/2 x, x = (SNR_s - SNR_t) mse_t.

    Arguments broadcast; log_snr_s >= log_snr_t. Source: Bao et al. 2022, "Analytic-DPM", theorem 1 and section 4.
    """
    x = _snr_gain(log_snr_s, log_snr_t) * mse_t
    return 0.5 * (torch.log1p(x) if variance == "optimal" else x)


def _snr_gain(log_snr_s: Tensor, log_snr_t: Tensor) -> Tensor:
    """SNR_s - SNR_t."""
    return torch.exp(log_snr_s) * -torch.expm1(log_snr_t - log_snr_s)


def continuous_nats(
    optimal: OptimalVariance, log_snr_max: float, log_snr_min: float, num_points: int = 20_000
) -> float:
    """The limit of many steps for one dimension, 1/2 integral of SNR mse d log_snr, by the midpoint rule: nats."""
    edges = torch.linspace(log_snr_min, log_snr_max, num_points + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    return float((middle.exp() * optimal.mean(optimal.at(middle))).mean()) * (log_snr_max - log_snr_min) / 2


def optimal_grid(
    optimal: OptimalVariance,
    num_steps: int,
    candidates: Tensor,
    *,
    variance: Literal["posterior", "optimal"] = "optimal",
) -> Tensor:
    """The `num_steps` steps through `candidates` whose bound is smallest in expectation: (num_steps + 1,) log SNRs.

    Dynamic programming over the candidates: cost_k(t) = min over s < t of cost_{k-1}(s) + KL(s, t). Both ends are
    kept.

    Arguments:
        optimal: the mse that the costs are computed from.
        candidates: (M,) decreasing log SNRs, M > num_steps; memory and time grow with M^2.
    Raises:
        ValueError: fewer candidates than steps need.
    Source: Bao et al. 2022, "Analytic-DPM", section 4; Watson et al. 2021.
    """
    candidates = as_float64(candidates)
    return candidates[shortest_path(step_costs(optimal, candidates, variance), num_steps)]


def step_costs(
    optimal: OptimalVariance, candidates: Tensor, variance: Literal["posterior", "optimal"] = "optimal"
) -> Tensor:
    """(M, M) the expected nats a dimension of a step to candidate [row] from candidate [column], infinite unless row
    < column.
    """
    step = optimal.step_nats(candidates[:, None], candidates, variance)
    return torch.where(torch.ones_like(step, dtype=torch.bool).triu(1), step, math.inf)


def shortest_path(step: Tensor, num_steps: int) -> Tensor:
    """(num_steps + 1,) the indices of the cheapest path of so many steps from the first to the last candidate; see
    `optimal_grid`.
    """
    count = len(step)
    if not 1 <= num_steps < count:
        raise ValueError(
            f"`num_steps` must lie in 1..{count - 1}, one less than there are candidates, got {num_steps}."
        )
    to, total = step.T.contiguous(), torch.empty_like(step)
    costs = [step[0]]  # of the cheapest path of 1, 2, ... steps to each candidate
    for _ in range(num_steps - 1):
        costs.append(torch.add(to, costs[-1], out=total).amin(dim=1))
    path = [count - 1]
    for cost in reversed(costs[:-1]):
        path.append(int((to[path[-1]] + cost).argmin()))
    return torch.tensor([0, *reversed(path)])
