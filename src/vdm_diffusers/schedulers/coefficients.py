r"""The coefficients of reverse steps: records with named float64 fields, made once for a grid of timesteps.

A step from t to s < t with a network's output y computes

    x_hat = x_z z_t + x_output y
    mean  = mean_z z_t + mean_y m,    m = x_hat if it is clipped or extrapolated, else y
    z_s   = mean + noise eps
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..prediction import PredictionType
from ..reverse_variance import OptimalVariance
from ..timelines import Timeline
from .updates import ReverseCoefficients, factored, reverse_coefficients

LEARNED = ("learned", "learned_range")


class StepSettings(NamedTuple):
    """What a step reads of a scheduler's config, under the config's own names."""

    prediction_type: PredictionType
    variance_type: str | None
    stochasticity: float
    multistep_order: int
    final_step: str
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    optimal_variance: Mapping[str, Any] | None

    @property
    def limits(self) -> bool:
        """Whether x_hat is clipped or thresholded."""
        return self.clip_sample or self.thresholding

    def through_x_hat(self, timeline: Timeline) -> bool:
        """Whether the mean is made of x_hat, because it is changed on the way, instead of the network's output."""
        return self.limits or (self.multistep_order == 2 and not timeline.extrapolates_output(self.prediction_type))

    @property
    def optimal(self) -> OptimalVariance | None:
        """`optimal_variance`, read."""
        return None if self.optimal_variance is None else OptimalVariance.from_config(self.optimal_variance)


# As plain attributes, which is how Diffusers' schedulers read theirs: pipelines assign to them (config.clip_sample =
# False).
read_settings = attrgetter(*StepSettings._fields)


class StepCoefficients(NamedTuple):
    """Steps from times t to times s, as float64 tensors of the log SNRs' shape.

    Those of an undefined step are not finite.
    """

    x_z: Tensor
    x_output: Tensor
    mean_z: Tensor
    mean_y: Tensor
    noise: (
        Tensor  # standard deviation; the root mean square of `bands`, if there are any; one where the network gives it
    )
    multistep: Tensor  # k of the second-order update: m = x_hat + k (x_hat - x_hat of the step before)
    log_variance_low: Tensor  # of the posterior and of the forward step, between which a network may interpolate
    log_variance_high: Tensor
    bands: Tensor | None = None  # (..., C, bands) standard deviations, where they differ between frequencies

    def packed(self) -> Tensor:
        """(..., 8) all fields but `bands` in one tensor, to be moved or indexed at once; see `unpacked`."""
        return torch.stack(self[:8], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor, bands: Tensor | None) -> StepCoefficients:
        """The inverse of `packed`."""
        return cls._make((*packed.unbind(-1), bands))

    @property
    def defined(self) -> Tensor:
        """Whether a step is, bool of the fields' shape."""
        return torch.stack(self[:6]).isfinite().all(0)


class StepNumbers(NamedTuple):
    """One step's coefficients as Python floats, factored: x_hat and the mean are scale * (first + ratio * second)."""

    x_swap: float  # whether the network's output comes first
    x_ratio: float
    x_scale: float
    mean_swap: float
    mean_ratio: float
    mean_scale: float
    noise: float
    multistep: float
    log_variance_low: float
    log_variance_high: float
    bands: Tensor | None = None  # (C, bands)


def step_coefficients(
    log_snr_t: Tensor, log_snr_s: Tensor, settings: StepSettings, optimal: OptimalVariance | None, timeline: Timeline
) -> StepCoefficients:
    """The coefficients of the steps from t to s, without a multistep update, which knows its neighbours.

    Arguments:
        log_snr_t, log_snr_s: float64 of one shape; +inf for s is clean data, where no noise is added.
        optimal: the network's mean squared errors, for variance_type="optimal".
        timeline: knows the path, and what the network's output means. What says nothing of x is not a number, which is
            reported if that step is ever taken.
    """
    step = reverse_coefficients(log_snr_t, log_snr_s, settings.stochasticity, path=timeline.path)
    x_z, x_output = timeline.denoising(log_snr_t, settings.prediction_type)
    if settings.through_x_hat(timeline):
        mean_z, mean_y = step.z, step.x
    else:
        mean_z, mean_y = step.z + step.x * x_z, step.x * x_output
        mean_z = torch.where((mean_z - 1).abs() < 4e-15, 1.0, mean_z)  # of Euler's steps, which scale nothing
    to_data = log_snr_s == math.inf
    noise = step.stochasticity * fixed_variance(settings.variance_type, log_snr_t, step, optimal).sqrt()
    bands = None
    if settings.variance_type == "optimal" and optimal is not None and optimal.shape is not None:
        mse = optimal.at(log_snr_t).to(noise)
        least, gain, eta = (v[..., None, None] for v in (step.posterior_variance, step.x**2, step.stochasticity))
        bands = torch.where(to_data[..., None, None], 0.0, eta * (least + gain * mse).sqrt())
    return StepCoefficients(
        x_z=x_z,
        x_output=x_output,
        mean_z=mean_z,
        mean_y=mean_y,
        noise=torch.where(to_data, 0.0, noise),  # whatever the type
        multistep=torch.zeros_like(noise),
        log_variance_low=step.posterior_variance.log(),
        log_variance_high=step.forward_variance.log(),
        bands=bands,
    )


def fixed_variance(
    variance_type: str | None, log_snr_t: Tensor, step: ReverseCoefficients, optimal: OptimalVariance | None
) -> Tensor:
    """The variance of a reverse step by type; one for learned ones, whose factor the network gives."""
    if variance_type in LEARNED:
        return torch.ones_like(log_snr_t)
    if variance_type in ("fixed_large", "fixed_large_log"):
        return step.forward_variance
    if variance_type == "optimal":
        mse = cast(OptimalVariance, optimal)
        return step.posterior_variance + step.x**2 * mse.mean(mse.at(log_snr_t)).to(log_snr_t)
    return step.posterior_variance  # "fixed_small", its synonym, and types that were warned of


def step_numbers(coefficients: StepCoefficients) -> list[StepNumbers]:
    """The steps of (n,) coefficients, each as numbers."""
    c = coefficients
    columns = [*factored(c.x_z, c.x_output), *factored(c.mean_z, c.mean_y), *c[4:8]]
    rows = torch.stack(columns, dim=-1).tolist()
    if c.bands is None:
        return [StepNumbers(*row) for row in rows]
    return [StepNumbers._make((*row, bands)) for row, bands in zip(rows, c.bands, strict=True)]
