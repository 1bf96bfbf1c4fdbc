r"""Timelines: what a network is fed as its time, and the log SNR that it stands for.

A network is trained on timesteps, the maths of a Gaussian diffusion sees log SNR, and a chain is laid out in time t:

    timestep  <->  log SNR  <->  t in [0, 1]
           Timeline        NoiseSchedule

A timeline holds both maps, and the path on which the log SNR is meant. Schedulers, evaluators and trainers take one and ask
it; none of them asks what kind it is.

    BetaTableTimeline    timestep i in 0..T-1 is x_{i+1} of a table of T betas; -1 is clean data, where its chains end
    LogSNRTimeline       tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1; its chains end at z_0

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

from .gaussian import Path
from .noise_schedules import (
    NoiseSchedule,
    TabulatedNoiseSchedule,
    check_end_points,
    log_snr_from_timestep,
    timestep_from_log_snr,
)
from .numerics import as_float64, on_host, shown, take


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
        """(T,) decreasing log SNRs of timesteps 0..T-1, if a chain may visit these alone; None: it may visit any timestep."""

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


@dataclass(frozen=True, eq=False)
class BetaTableTimeline(Timeline):
    """The timeline of a table of T betas: timestep i in 0..T-1 is x_{i+1}, fractions are linear in log SNR, -1 is clean data.

    Arguments:
        table: (T,) log SNRs of x_1..x_T, see `noise_schedules.log_snr_from_betas`. They should decrease and be finite, but for
            a last one of -inf (zero terminal SNR); a table that is not so serves where it is, and has no `noise_schedule`.
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
                f"`betas` must be positive, got 0 (to rounding) at entry {int(same[0]) + 1}: such a step adds no noise, and its "
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

    Linear in log SNR over a fixed envelope, whose clean end is tau = -1 and whose noisy end T - 1. The noise schedule says how
    log SNR goes with time; a learned one moves inside the envelope and leaves tau's meaning, the network's input, alone.

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
