r"""Timelines: what a network is fed as its time, and the log SNR that it stands for.

A network is trained on timesteps, the maths of a Gaussian diffusion sees log SNR, and a chain is laid out in time t:

    timestep  <->  log SNR  <->  t in [0, 1]
           Timeline        NoiseSchedule

A timeline holds both maps, and the path on which the log SNR is meant. Schedulers, evaluators and trainers take one
and ask it; none of them asks what kind it is.

    BetaTableTimeline    timestep i in 0..T-1 is x_{i+1} of a table of T betas; -1 is clean data, where its chains end
    LogSNRTimeline       tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1; its chains end at z_0
    FlowTimeline         T sigma of the straight path z = (1 - sigma) x + sigma eps; 0 is clean data, where its chains
    end SigmaTimeline        ln(sigma) / 4 of z = x + sigma eps, as EDM feeds it; -inf is clean data, where its chains
    end

Every path is the variance-preserving one with its latents rescaled: z of one is z of the other times a factor that log
SNR alone gives. That factor, and what the network's output means there, is what an evaluator asks a timeline for.

Log SNRs and timesteps are float64. They lie where the argument lies: numbers and lists on the CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .gaussian import Path, alpha_sigma
from .noise_schedules import (
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
    TabulatedNoiseSchedule,
    check_end_points,
    log_snr_from_timestep,
    timestep_from_log_snr,
)
from .numerics import as_float64, on_host, shown, take
from .prediction import PredictionType, conversion_coefficients


class Timeline(ABC):
    """Maps timestep (exactly what the network is fed) to log SNR and back, and log SNR to time t in [0, 1].

    Attributes:
        path: "vp", "flow" or "ve", how alpha and sigma follow from log SNR (`gaussian.alpha_sigma`).
        num_timesteps: T, what the network's timesteps count.
        ends_at_data: whether a chain's last step ends at clean data (log SNR +inf), or at a z_0 that is still noisy.
    """

    path: ClassVar[Path]
    ends_at_data: ClassVar[bool]
    num_timesteps: int

    @property
    @abstractmethod
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule as a function log_snr(t) of time t in [0, 1].

        Raises:
            ValueError: the timeline's log SNRs do not decrease, or are not finite.
        """

    @property
    @abstractmethod
    def entries(self) -> Tensor | None:
        """(T,) decreasing log SNRs of timesteps 0..T-1, if a chain may visit these alone; None: it may visit any
        timestep.
        """

    @property
    @abstractmethod
    def last_timestep(self) -> float:
        """The noisiest timestep that means anything to the network."""

    @property
    @abstractmethod
    def noisiest_timestep(self) -> float:
        """Where sampling begins, at t = 1: `last_timestep`, or less where the noise schedule ends before it."""

    @property
    @abstractmethod
    def terminal_timestep(self) -> float:
        """Where a chain's last step ends, at t = 0: clean data or z_0. The network is never fed it."""

    @abstractmethod
    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        """Log SNR at `timesteps` of any shape, whole or fractional: float64, of their shape.

        Raises:
            ValueError: a timestep (on the CPU) outside the timeline, see `check`.
        """

    @abstractmethod
    def timestep(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        """The timestep, in general fractional, at which the timeline has `log_snr`: float64, of its shape.

        Raises:
            ValueError: a log SNR (on the CPU) outside the timeline.
        """

    @abstractmethod
    def below(self, timesteps: Tensor) -> Tensor:
        """One step of the training chain further down, at most to the terminal timestep: float64."""

    @abstractmethod
    def fed(self, timesteps: Tensor) -> Tensor:
        """`timesteps` in the dtype in which the network is fed them."""

    @abstractmethod
    def check(self, timesteps: Tensor) -> None:
        """Raise ValueError, which names the range and the first offender, if a timestep lies outside the timeline."""

    def denoising(self, log_snr: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
        """(a, b) with x_hat = a z + b y: z on this timeline's path, y the network's output. Float64, of log_snr's
        shape.

        NaN where the output says nothing of x: noise or score at log SNR -inf.
        """
        unknown = (log_snr == -math.inf) & (prediction_type in ("epsilon", "score"))
        known = torch.where(unknown, math.nan, log_snr)
        return conversion_coefficients(known, source=prediction_type, target="sample", path=self.path)

    def extrapolates_output(self, prediction_type: PredictionType) -> bool:
        """Whether the second-order update extrapolates the network's output in sigma, instead of x_hat in log SNR."""
        return False

    def input_scale(self, log_snr: Tensor) -> Tensor:
        """What the variance-preserving z_t is multiplied by to become the network's input.

        Float64, of log_snr's shape.
        """
        alpha, _ = alpha_sigma(log_snr, self.path)
        return alpha / alpha_sigma(log_snr, "vp")[0]

    def on_vp(self, log_snr: Tensor, prediction_type: PredictionType) -> tuple[PredictionType, Tensor, Tensor]:
        """(type, a, b): a z + b y is a prediction of this type on the variance-preserving path, z and the network's
        output y there.
        """
        one = torch.ones_like(log_snr)
        return prediction_type, 0 * one, one


@dataclass(frozen=True, eq=False)
class BetaTableTimeline(Timeline):
    """The timeline of a table of T betas: timestep i in 0..T-1 is x_{i+1}, fractions are linear in log SNR, -1 is
    clean data.

    Arguments:
        table: (T,) log SNRs of x_1..x_T, see `noise_schedules.log_snr_from_betas`. They should decrease and be finite,
            but for a last one of -inf (zero terminal SNR); a table that is not so serves where it is, and has no
            `noise_schedule`.
    Raises:
        ValueError: a table that is not a list of at least one number.
    """

    path: ClassVar[Path] = "vp"
    ends_at_data: ClassVar[bool] = True
    table: Tensor
    num_timesteps: int = field(init=False)

    def __post_init__(self) -> None:
        table = as_float64(self.table).detach().cpu()
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"`table` must be a list of at least one log SNR, got shape {tuple(table.shape)}.")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "num_timesteps", len(table))

    @property
    def noise_schedule(self) -> NoiseSchedule:
        table = self.table
        same = (table.diff() == 0).nonzero()
        if len(same):
            raise ValueError(
                f"`betas` must be positive, got 0 (to rounding) at entry {int(same[0]) + 1}: such a step adds no "
                "noise, and its "
                "two ends are one. Leave it out of the table."
            )
        if len(table) == 1:
            raise ValueError("`betas` must have at least two entries to be a function of time, got 1.")
        return TabulatedNoiseSchedule(table)

    @property
    def entries(self) -> Tensor:
        return self.table

    @property
    def last_timestep(self) -> float:
        return float(len(self.table) - 1)

    @property
    def noisiest_timestep(self) -> float:
        return self.last_timestep

    @property
    def terminal_timestep(self) -> float:
        return -1.0

    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        timesteps = as_float64(timesteps)
        if on_host(timesteps):
            self.check(timesteps)
        table, last = self.table.to(timesteps), len(self.table) - 1
        position = timesteps.clamp(0, last)
        index = position.long()
        fraction = position - index
        left, right = take(table, index), take(table, (index + 1).clamp(max=last))
        # where fraction = 0 the right neighbour has no say, not even an infinite one
        log_snr = torch.where(fraction == 0, left, (1 - fraction) * left + fraction * right)
        return torch.where(timesteps < 0, math.inf, log_snr)

    def timestep(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        log_snr = as_float64(log_snr)
        clean = log_snr == math.inf
        high, low = float(self.table[0]), float(self.table[-1])
        _check_range(log_snr[~clean] if on_host(log_snr) else log_snr, high, low)
        if len(self.table) == 1:
            timesteps = torch.zeros_like(log_snr)
        else:
            timesteps = self.noise_schedule.inverse(log_snr.clamp(low, high)) * self.last_timestep
        return torch.where(clean, -1.0, timesteps)

    def below(self, timesteps: Tensor) -> Tensor:
        values = as_float64(timesteps) - 1
        return torch.where(values < 0, -1.0, values)  # nothing is defined between x_1 and clean data

    def fed(self, timesteps: Tensor) -> Tensor:
        """int64 where all are whole, else float32."""
        return timesteps.to(torch.int64 if bool((timesteps == timesteps.round()).all()) else torch.float32)

    def check(self, timesteps: Tensor) -> None:
        # nothing is defined between x_1 and clean data, but for the rounding of one computed as T t - 1
        slack = 1e-9 * len(self.table)
        wrong = ~((timesteps >= 0) & (timesteps <= self.last_timestep + slack) | (timesteps == -1))
        if bool(wrong.any()):
            raise ValueError(
                f"timesteps must lie in [0, {self.last_timestep:g}], or be -1, got {_first(timesteps, wrong)}."
            )


@dataclass(frozen=True, eq=False)
class LogSNRTimeline(Timeline):
    """The timeline of a schedule given in log SNR: tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1.

    Linear in log SNR over a fixed envelope, whose clean end is tau = -1 and whose noisy end T - 1. The noise schedule
    says how log SNR goes with time; a learned one moves inside the envelope and leaves tau's meaning, the network's
    input, alone.

    Arguments:
        num_timesteps: T.
        log_snr_max, log_snr_min: the envelope.
        schedule: log SNR against time, inside the envelope.
    Raises:
        ValueError: an envelope that is no range, or a schedule that leaves it.
    """

    path: ClassVar[Path] = "vp"
    ends_at_data: ClassVar[bool] = False
    num_timesteps: int
    log_snr_max: float
    log_snr_min: float
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        check_end_points(self.log_snr_max, self.log_snr_min)
        high, low = self.schedule.log_snr_max, self.schedule.log_snr_min
        slack = 1e-9 * (1 + abs(self.log_snr_max) + abs(self.log_snr_min))
        if not (high <= self.log_snr_max + slack and low >= self.log_snr_min - slack):
            raise ValueError(
                f"`schedule` must stay between log_snr_max = {self.log_snr_max} and log_snr_min = {self.log_snr_min}, "
                f"got {high} to {low}."
            )

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self.schedule

    @property
    def entries(self) -> None:
        return None

    @property
    def last_timestep(self) -> float:
        return float(self.num_timesteps - 1)

    @property
    def noisiest_timestep(self) -> float:
        return float(whole(self.timestep(self.schedule.log_snr_min)))

    @property
    def terminal_timestep(self) -> float:
        return float(whole(self.timestep(self.schedule.log_snr_max)))

    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        timesteps = as_float64(timesteps)
        if on_host(timesteps):
            self.check(timesteps)
        return log_snr_from_timestep(timesteps, self.num_timesteps, self.log_snr_max, self.log_snr_min)

    def timestep(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        log_snr = as_float64(log_snr)
        _check_range(log_snr, self.log_snr_max, self.log_snr_min)
        inside = log_snr.clamp(self.log_snr_min, self.log_snr_max)
        return timestep_from_log_snr(inside, self.num_timesteps, self.log_snr_max, self.log_snr_min)

    def below(self, timesteps: Tensor) -> Tensor:
        return (as_float64(timesteps) - 1).clamp(min=-1)

    def fed(self, timesteps: Tensor) -> Tensor:
        """float32."""
        return timesteps.to(torch.float32)

    def check(self, timesteps: Tensor) -> None:
        slack = 1e-9 * self.num_timesteps  # for those computed as T t - 1
        wrong = ~((timesteps >= -1 - slack) & (timesteps <= self.last_timestep + slack))
        if bool(wrong.any()):
            raise ValueError(f"timesteps must lie in [-1, {self.last_timestep:g}], got {_first(timesteps, wrong)}.")


@dataclass(frozen=True, eq=False)
class FlowTimeline(Timeline):
    """The timeline of flow matching: T sigma, on the path z = (1 - sigma) x + sigma eps, where log_snr = 2 ln((1 -
    sigma) / sigma).

    0 is clean data, T pure noise. `noise_schedule` is that of sigma = shift u / (1 + (shift - 1) u), for u from 1/T to
    1 - 1/T: the two ends, where log SNR is infinite, belong to chains but not to a schedule.

    Arguments:
        num_timesteps: T.
        shift: of the schedule, see `noise_schedules.FlowSchedule`. Timesteps do not depend on it.
        inverted: the network is fed T (1 - sigma) instead, and predicts x - eps, as Mochi's.
    Raises:
        ValueError: a shift that is not positive, or fewer than three timesteps.
    """

    path: ClassVar[Path] = "flow"
    ends_at_data: ClassVar[bool] = True
    num_timesteps: int
    shift: float = 1.0
    inverted: bool = False

    def __post_init__(self) -> None:
        if self.num_timesteps < 3:
            raise ValueError(f"`num_timesteps` must be at least 3, got {self.num_timesteps}.")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"`shift` must be a positive number, got {self.shift}.")

    @property
    def noise_schedule(self) -> NoiseSchedule:
        end, moved = 2 * math.log(self.num_timesteps - 1), 2 * math.log(self.shift)
        return FlowSchedule(end - moved, -end - moved, self.shift)

    @property
    def entries(self) -> None:
        return None

    @property
    def last_timestep(self) -> float:
        return 0.0 if self.inverted else float(self.num_timesteps)

    @property
    def noisiest_timestep(self) -> float:
        return self.last_timestep

    @property
    def terminal_timestep(self) -> float:
        return float(self.num_timesteps) if self.inverted else 0.0

    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        timesteps = as_float64(timesteps)
        if on_host(timesteps):
            self.check(timesteps)
        fraction = (timesteps / self.num_timesteps).clamp(0, 1)
        log_snr = log_snr_of_flow(fraction)
        return -log_snr if self.inverted else log_snr

    def timestep(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        log_snr = as_float64(log_snr)
        return self.num_timesteps * torch.sigmoid(log_snr / 2 if self.inverted else -log_snr / 2)

    def below(self, timesteps: Tensor) -> Tensor:
        return (as_float64(timesteps) + (1 if self.inverted else -1)).clamp(0, self.num_timesteps)

    def fed(self, timesteps: Tensor) -> Tensor:
        """float32."""
        return timesteps.to(torch.float32)

    def check(self, timesteps: Tensor) -> None:
        slack = 1e-6 * self.num_timesteps  # for those that went through float32
        wrong = ~((timesteps >= -slack) & (timesteps <= self.num_timesteps + slack))
        if bool(wrong.any()):
            raise ValueError(f"timesteps must lie in [0, {self.num_timesteps}], got {_first(timesteps, wrong)}.")

    def extrapolates_output(self, prediction_type: PredictionType) -> bool:
        """For velocities: a flow is nearly straight in sigma.

        In log SNR the usual grids' last step is far too long for a second order.
        """
        return prediction_type == "flow_prediction"

    def denoising(self, log_snr: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
        z, output = super().denoising(log_snr, prediction_type)
        return z, -output if self.inverted else output

    def on_vp(self, log_snr: Tensor, prediction_type: PredictionType) -> tuple[PredictionType, Tensor, Tensor]:
        kind, z, output = super().on_vp(log_snr, prediction_type)
        if prediction_type == "score":  # of other latents
            output = output * self.input_scale(log_snr)
        elif prediction_type == "v_prediction":
            raise ValueError(
                "`prediction_type` 'v_prediction' is defined on the variance-preserving path: use flow_prediction."
            )
        return kind, z, -output if self.inverted else output


@dataclass(frozen=True, eq=False)
class SigmaTimeline(Timeline):
    r"""The timeline of EDM: the network is fed ln(sigma) / 4, on the path z = x + sigma eps, where log_snr = -2
    ln(sigma).

    The network is preconditioned. Its input is c_in z, and x_hat = c_skip z + c_out y, with

        c_in = 1 / sqrt(sigma^2 + d^2)    c_skip = d^2 / (sigma^2 + d^2)    c_out = sigma d / sqrt(sigma^2 + d^2),    d
        = sigma_data.

    In units of d that is the variance-preserving path, and y is -v. With prediction type "v_prediction" c_out has the
    other sign.

    Arguments:
        sigma_min, sigma_max, rho: of the noise schedule, see `noise_schedules.KarrasSchedule`.
        sigma_data: d, the data's standard deviation.
        num_timesteps: T, what chains of the training length have.
    Raises:
        ValueError: sigmas that are no range.
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1.
    """

    path: ClassVar[Path] = "ve"
    ends_at_data: ClassVar[bool] = True
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    num_timesteps: int = 1000
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0 < self.sigma_data < math.inf:
            raise ValueError(
                "`sigma_min`, `sigma_max` and `sigma_data` must be positive, the first two in this order, got "
                f"{self.sigma_min}, {self.sigma_max} and {self.sigma_data}."
            )

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return KarrasSchedule(-2 * math.log(self.sigma_min), -2 * math.log(self.sigma_max), self.rho)

    @property
    def entries(self) -> None:
        return None

    @property
    def last_timestep(self) -> float:
        return math.log(self.sigma_max) / 4

    @property
    def noisiest_timestep(self) -> float:
        return self.last_timestep

    @property
    def terminal_timestep(self) -> float:
        return -math.inf

    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        timesteps = as_float64(timesteps)
        if on_host(timesteps):
            self.check(timesteps)
        return -8 * timesteps

    def timestep(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        return -as_float64(log_snr) / 8

    def below(self, timesteps: Tensor) -> Tensor:
        schedule = self.noise_schedule
        t = schedule.inverse(-8 * as_float64(timesteps)) - 1 / self.num_timesteps
        return torch.where(t < 0, -math.inf, self.timestep(schedule.log_snr(t.clamp(min=0))))

    def fed(self, timesteps: Tensor) -> Tensor:
        """float32."""
        return timesteps.to(torch.float32)

    def check(self, timesteps: Tensor) -> None:
        wrong = timesteps.isnan() | (timesteps == math.inf)
        if bool(wrong.any()):
            raise ValueError(f"timesteps must be ln(sigma) / 4 of a positive sigma, got {_first(timesteps, wrong)}.")

    def _units(self, log_snr: Tensor) -> Tensor:
        """Log SNR of the data in units of sigma_data."""
        return log_snr + 2 * math.log(self.sigma_data)

    def denoising(self, log_snr: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
        kept, lost = alpha_sigma(self._units(log_snr), "vp")  # c_skip = kept^2
        c_out = self.sigma_data * lost
        return kept**2, -c_out if prediction_type == "v_prediction" else c_out

    def input_scale(self, log_snr: Tensor) -> Tensor:
        alpha, _ = alpha_sigma(log_snr, "vp")
        return self.network_scale(log_snr) / alpha

    def network_scale(self, log_snr: Tensor) -> Tensor:
        """c_in, by which z is multiplied before the network sees it."""
        return alpha_sigma(self._units(log_snr), "vp")[0] / self.sigma_data

    def on_vp(self, log_snr: Tensor, prediction_type: PredictionType) -> tuple[PredictionType, Tensor, Tensor]:
        alpha, sigma = alpha_sigma(log_snr, "vp")
        _, c_out = self.denoising(log_snr, prediction_type)
        # v = (alpha z - x_hat) / sigma, z on the variance-preserving path, and alpha^2 - c_skip = (1 - d^2) alpha^2
        # lost^2
        lost = alpha_sigma(self._units(log_snr), "vp")[1]
        return "v_prediction", (1 - self.sigma_data**2) * lost**2 * alpha / sigma, -c_out / sigma


def log_snr_of_flow(sigma: Tensor) -> Tensor:
    """2 ln((1 - sigma) / sigma), the log SNR on the flow path of sigma in [0, 1]."""
    return 2 * (torch.log1p(-sigma) - sigma.log())


def whole(timesteps: Tensor) -> Tensor:
    """`timesteps` without what rounding left of whole numbers."""
    nearest = timesteps.round()
    return torch.where((timesteps - nearest).abs() < 1e-9, nearest, timesteps)


def _check_range(log_snr: Tensor, high: float, low: float) -> None:
    slack = 1e-6 * (1 + log_snr.abs())  # for end points that went through float32
    if on_host(log_snr) and not bool(((log_snr <= high + slack) & (log_snr >= low - slack)).all()):
        raise ValueError(f"`log_snr` must lie in [{low}, {high}], the range of the schedule, got {shown(log_snr)}.")


def _first(timesteps: Tensor, wrong: Tensor) -> float:
    return float(timesteps[wrong].flatten()[0])
