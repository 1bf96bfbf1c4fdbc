r"""Noise schedules: how much signal is left at time t.

A noise schedule is a decreasing function from time t in [0, 1] to the log signal-to-noise ratio

    log_snr(t) = ln(alpha_t^2 / sigma_t^2),

which is all of it that the maths of a Gaussian diffusion sees: alpha and sigma follow from log SNR and a path
(`vdm_diffusers.gaussian`), and in continuous time the expected loss depends on the schedule's end points alone
(Kingma et al. 2021, equation 18). VDM writes gamma = -log_snr.

Every schedule has three methods, all in float64 and of the argument's shape:

    schedule.log_snr(t)          the log SNR
    schedule.derivative(t)       d log_snr / dt, in closed form
    schedule.inverse(log_snr)    the time at which it is reached

A table of T betas (Ho et al. 2020) becomes a `TabulatedNoiseSchedule`: entry i is x_{i+1} of the paper, its time is
i / (T - 1), and between entries log SNR is interpolated linearly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import as_float64

LOG_SNR_MAX = 13.3  # VDM's end points: gamma from -13.3 to 5 (the configurations released with Kingma et al. 2021)
LOG_SNR_MIN = -5.0
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")  # of `make_betas`


class NoiseSchedule(ABC):
    """A decreasing function log_snr(t) of time t in [0, 1]."""

    @abstractmethod
    def log_snr(self, t: Tensor | float) -> Tensor:
        """Log SNR at time t, float64, of t's shape."""

    @abstractmethod
    def derivative(self, t: Tensor | float) -> Tensor:
        """d log_snr / dt at time t (not positive), float64, of t's shape."""

    @abstractmethod
    def inverse(self, log_snr: Tensor | float) -> Tensor:
        """The time t at which `log_snr` is reached; values outside the end points map to 0 or 1."""

    @property
    def log_snr_max(self) -> float:
        """Log SNR at t = 0."""
        return float(self.log_snr(0.0))

    @property
    def log_snr_min(self) -> float:
        """Log SNR at t = 1."""
        return float(self.log_snr(1.0))


@dataclass(frozen=True)
class LinearLogSNRSchedule(NoiseSchedule):
    """Linear in log SNR: log_snr(t) = (1 - t) log_snr_max + t log_snr_min.

    Source: Kingma et al. 2021, "Variational Diffusion Models", section 6.2: the "log SNR-linear" schedule of the
    ablation.
    """

    log_snr_max: float = LOG_SNR_MAX
    log_snr_min: float = LOG_SNR_MIN

    def __post_init__(self) -> None:
        check_end_points(self.log_snr_max, self.log_snr_min)

    def log_snr(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        return (1 - t) * self.log_snr_max + t * self.log_snr_min

    def derivative(self, t: Tensor | float) -> Tensor:
        return torch.full_like(as_float64(t), self.log_snr_min - self.log_snr_max)

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return ((self.log_snr_max - as_float64(log_snr)) / (self.log_snr_max - self.log_snr_min)).clamp(0, 1)


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """The cosine schedule alpha = cos(phi), sigma = sin(phi), phi linear in t, between two exact end points.

    log_snr(t) = -2 ln tan phi(t), phi(t) = (1 - t) arctan e^(-log_snr_max/2) + t arctan e^(-log_snr_min/2).
    Infinite end points are allowed and give phi = pi t / 2.

    Source: Nichol & Dhariwal 2021, "Improved DDPM", equation 17, without its offset; bounded in log SNR as in
        Hoogeboom et al. 2023, "simple diffusion".
    """

    log_snr_max: float = LOG_SNR_MAX
    log_snr_min: float = LOG_SNR_MIN

    def __post_init__(self) -> None:
        check_end_points(self.log_snr_max, self.log_snr_min, finite=False)

    def _angles(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """phi and pi/2 - phi, each without cancellation: the smaller of the two carries the precision."""
        phi = (1 - t) * _arctan_exp(-self.log_snr_max / 2) + t * _arctan_exp(-self.log_snr_min / 2)
        complement = (1 - t) * _arctan_exp(self.log_snr_max / 2) + t * _arctan_exp(self.log_snr_min / 2)
        return phi, complement

    def log_snr(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        phi, complement = self._angles(t)
        log_snr = torch.where(phi < math.pi / 4, -2 * phi.tan().log(), 2 * complement.tan().log())
        log_snr = torch.where(t == 0, self.log_snr_max, log_snr)  # the end points are promised exactly
        return torch.where(t == 1, self.log_snr_min, log_snr)

    def derivative(self, t: Tensor | float) -> Tensor:
        phi, complement = self._angles(as_float64(t))
        slope = _arctan_exp(-self.log_snr_min / 2) - _arctan_exp(-self.log_snr_max / 2)
        return -4 * slope / torch.sin(2 * torch.minimum(phi, complement))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        log_snr = as_float64(log_snr)
        low, high = _arctan_exp(-self.log_snr_max / 2), _arctan_exp(-self.log_snr_min / 2)
        return ((torch.atan(torch.exp(-log_snr / 2)) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class ShiftedSchedule(NoiseSchedule):
    """Another schedule moved along the log-SNR axis: log_snr(t) = base.log_snr(t) + shift.

    Source: Hoogeboom et al. 2023, "simple diffusion", section 3.1: shift = 2 ln(base_resolution / resolution).
    """

    base: NoiseSchedule
    shift: float

    @classmethod
    def for_resolution(cls, base: NoiseSchedule, resolution: int, base_resolution: int = 64) -> ShiftedSchedule:
        """The shift that gives images of `resolution` the noise that `base_resolution` has after average pooling.

        Raises:
            ValueError: a resolution that is not positive.
        """
        if resolution <= 0 or base_resolution <= 0:
            raise ValueError(f"resolutions must be positive, got {resolution} and {base_resolution}.")
        return cls(base, 2 * math.log(base_resolution / resolution))

    def log_snr(self, t: Tensor | float) -> Tensor:
        return self.base.log_snr(t) + self.shift

    def derivative(self, t: Tensor | float) -> Tensor:
        return self.base.derivative(t)

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return self.base.inverse(as_float64(log_snr) - self.shift)


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Flow matching's schedule: sigma runs evenly from one end to the other, and is then shifted, on the path alpha =
    1 - sigma.

    With u linear in t, sigma = shift u / (1 + (shift - 1) u), and log_snr = 2 ln((1 - sigma) / sigma) = 2 ln((1 - u) /
    u) - 2 ln(shift): a shift moves the schedule along the log-SNR axis.

    Arguments:
        log_snr_max, log_snr_min: the end points, after the shift.
        shift: above 1 for more time in the noise.
    Raises:
        ValueError: end points that are no range, or a shift that is not positive.
    Source: Liu et al. 2022, "Flow Straight and Fast"; Esser et al. 2024, "Scaling Rectified Flow Transformers",
        section 5.3.2 (shift).
    """

    log_snr_max: float = LOG_SNR_MAX
    log_snr_min: float = -LOG_SNR_MAX
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_end_points(self.log_snr_max, self.log_snr_min)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"`shift` must be a positive number, got {self.shift}.")

    def _even(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2 - math.log(self.shift))

    def _ends(self) -> tuple[Tensor, Tensor]:
        ends = self._even(torch.tensor([self.log_snr_max, self.log_snr_min], dtype=torch.float64))
        return ends[0], ends[1]

    def log_snr(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        first, last = (end.to(t) for end in self._ends())
        u = (1 - t) * first + t * last
        log_snr = 2 * (torch.log1p(-u) - u.log() - math.log(self.shift))
        log_snr = torch.where(t == 0, self.log_snr_max, log_snr)  # the end points are promised exactly
        return torch.where(t == 1, self.log_snr_min, log_snr)

    def derivative(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        first, last = (end.to(t) for end in self._ends())
        u = (1 - t) * first + t * last
        return -2 * (last - first) / (u * (1 - u))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        log_snr = as_float64(log_snr)
        first, last = (end.to(log_snr) for end in self._ends())
        return ((self._even(log_snr) - first) / (last - first)).clamp(0, 1)


@dataclass(frozen=True)
class KarrasSchedule(NoiseSchedule):
    """The schedule of EDM in sigma space: sigma^(1/rho) is linear in t, and log_snr = -2 ln(sigma), sigma in units of
    the data.

    Arguments:
        log_snr_max, log_snr_min: -2 ln(sigma_min) and -2 ln(sigma_max).
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5.
    """

    log_snr_max: float = -2 * math.log(0.002)
    log_snr_min: float = -2 * math.log(80.0)
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_end_points(self.log_snr_max, self.log_snr_min)
        if not 0 < self.rho < math.inf:
            raise ValueError(f"`rho` must be a positive number, got {self.rho}.")

    def _roots(self) -> tuple[float, float]:
        return math.exp(-self.log_snr_max / 2 / self.rho), math.exp(-self.log_snr_min / 2 / self.rho)

    def log_snr(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        first, last = self._roots()
        log_snr = -2 * self.rho * torch.log((1 - t) * first + t * last)
        log_snr = torch.where(t == 0, self.log_snr_max, log_snr)  # the end points are promised exactly
        return torch.where(t == 1, self.log_snr_min, log_snr)

    def derivative(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        first, last = self._roots()
        return -2 * self.rho * (last - first) / ((1 - t) * first + t * last)

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        first, last = self._roots()
        return ((torch.exp(-as_float64(log_snr) / 2 / self.rho) - first) / (last - first)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class TabulatedNoiseSchedule(NoiseSchedule):
    """Log SNR given at equally spaced times 0, 1/(n-1), ..., 1 and linear in between.

    Arguments:
        table: (n,) decreasing log SNRs, n >= 2. The last may be -inf (zero terminal SNR): all times after the last but
            one are then -inf too, and such an interval has no finite derivative.
    Raises:
        ValueError: a table that is too short, not decreasing, or not finite elsewhere.
    """

    table: Tensor

    def __post_init__(self) -> None:
        table = as_float64(self.table).detach().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"`table` must be a list of at least two log SNRs, got shape {tuple(table.shape)}.")
        # -inf is a value of the last entry only, +inf of none: an interval from infinity has no slope
        if not (table[:-1].isfinite().all() and (table[-1].isfinite() or table[-1] == -math.inf)):
            raise ValueError("`table` must hold finite log SNRs (the last one may be -inf); check the betas.")
        if not (table.diff() < 0).all():
            index = int((table.diff() >= 0).nonzero()[0])
            raise ValueError(
                f"`table` must decrease with time, got {float(table[index])} then {float(table[index + 1])} at "
                f"entry {index}. Did you pass gamma? log_snr = -gamma."
            )
        object.__setattr__(self, "table", table)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> TabulatedNoiseSchedule:
        """The schedule of a DDPM chain with the given betas (see `log_snr_from_betas`)."""
        return cls(log_snr_from_betas(betas))

    def _locate(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = as_float64(t)
        table = self.table.to(t)
        position = t.clamp(0, 1) * (len(table) - 1)
        # t = i / (n - 1) must find entry i, though i / (n - 1) * (n - 1) may miss i by one unit in the last place
        nearest = position.round()
        position = torch.where((position - nearest).abs() <= 4e-16 * len(table), nearest, position)
        index = position.floor().long().clamp(0, len(table) - 2)
        return position - index, table[index], table[index + 1], table

    def log_snr(self, t: Tensor | float) -> Tensor:
        fraction, left, right, _ = self._locate(t)
        inside = (1 - fraction) * left + fraction * right
        return torch.where(fraction == 0, left, torch.where(fraction == 1, right, inside))

    def derivative(self, t: Tensor | float) -> Tensor:
        _, left, right, table = self._locate(t)
        return (right - left) * (len(table) - 1)

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        log_snr = as_float64(log_snr)
        table = self.table.to(log_snr)
        index = (torch.searchsorted(-table, -log_snr.detach().contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        left, right = table[index], table[index + 1]
        fraction = torch.where(log_snr == right, 1.0, (left - log_snr) / (left - right))
        return ((index + fraction) / (len(table) - 1)).clamp(0, 1)


LOG_SNR_SCHEDULES: dict[str, Callable[[float, float], NoiseSchedule]] = {
    "log_snr_linear": LinearLogSNRSchedule,
    "log_snr_cosine": CosineSchedule,
}
"""Schedules by the name that a scheduler's config and `train.py` know them by: (log_snr_max, log_snr_min) ->
schedule.
"""


# --- betas -----------------------------------------------------------------------------------------------------------


def make_betas(name: str, num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The named beta tables of Diffusers, in float64: (num_steps,).

    linear: equally spaced. scaled_linear: equally spaced roots. sigmoid: sigmoid of [-6, 6] between the two ends.
    squaredcos_cap_v2, laplace, exp: 1 - f((i+1)/T) / f(i/T), capped at 0.999, of an alpha-bar function f.

    Raises:
        ValueError: an unknown name, or fewer than one step.
    Source: Ho et al. 2020; Nichol & Dhariwal 2021, equation 17; Hang & Gu 2024 (laplace); the names and constants are
        those of Diffusers' `DDPMScheduler`, whose own tables are these rounded to float32.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    ends = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if name == "linear":
        return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64) ** 2
    if name == "sigmoid":
        return torch.sigmoid(12 * ends - 6) * (beta_end - beta_start) + beta_start
    i = torch.arange(num_steps + 1, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        # 1 - cos^2 b / cos^2 a = sin(b - a) sin(b + a) / cos^2 a has no cancellation
        angle = (i / num_steps + 0.008) / 1.008 * math.pi / 2
        a, b = angle[:-1], angle[1:]
        step = math.pi / 2 / 1.008 / num_steps
        return (math.sin(step) * torch.sin(a + b) / torch.cos(a) ** 2).clamp(max=0.999)
    if name == "laplace":
        distance = 2 * torch.minimum(i, num_steps - i) / num_steps + 1e-6  # 1 - 2 |1/2 - t| + 1e-6
        log_snr = -0.5 * torch.where(2 * i > num_steps, -1.0, 1.0) * distance.log()
        log_alpha_bar = F.logsigmoid(log_snr) / 2
    elif name == "exp":
        log_alpha_bar = -12 * i / num_steps
    else:
        raise ValueError(f"`name` of a beta table must be one of {', '.join(BETA_SCHEDULES)}, got {name!r}.")
    return (-torch.expm1(log_alpha_bar.diff())).clamp(max=0.999)


def log_snr_from_betas(betas: Sequence[float] | Tensor, *, zero_terminal_snr: bool = False) -> Tensor:
    """Log SNR of a DDPM chain: alpha_bar_i = prod_{j<=i} (1 - beta_j), log_snr_i = ln(alpha_bar_i / (1 -
    alpha_bar_i)).

    Arguments:
        betas: (T,) with 0 < beta <= 1. A beta above 1 gives NaN from there on, for the caller to refuse.
        zero_terminal_snr: shift and scale sqrt(alpha_bar) so that the last is 0 and the first stays (Lin et al. 2024,
            "Common diffusion noise schedules and sample steps are flawed", algorithm 1), in exact arithmetic's sense.
    Returns:
        (T,) float64, right to a few units in the last place of max(1, |log_snr|): sums are compensated, and 1 -
        alpha_bar is never formed from a rounded alpha_bar.
    Raises:
        ValueError: betas that are no list, or a rescaling of fewer than two.
    """
    betas = as_float64(betas if isinstance(betas, Tensor) else torch.tensor(list(betas), dtype=torch.float64))
    if betas.ndim != 1 or len(betas) < 1 + zero_terminal_snr:
        needs = "at least two betas, to keep the first and move the last" if zero_terminal_snr else "a list of betas"
        raise ValueError(f"`betas` must be {needs}, got shape {tuple(betas.shape)}.")
    log_alpha_bar = torch.tensor(_compensated_cumsum(torch.log1p(-betas).tolist()), dtype=torch.float64)
    return log_snr_at_zero_end(log_alpha_bar) if zero_terminal_snr else _log_snr(log_alpha_bar)


def log_snr_at_zero_end(log_alpha_bar: Tensor) -> Tensor:
    """Log SNR of a chain whose sqrt(alpha_bar) is shifted and scaled so that the last is 0 and the first stays.

    Arguments:
        log_alpha_bar: (T,) float64, T >= 2.
    Source: Lin et al. 2024, algorithm 1.
    """
    log_root = log_alpha_bar / 2
    root = log_root.exp()
    first, last = root[0], root[-1]
    scale = first / (first - last)
    new_root = -root * torch.expm1(log_root[-1] - log_root) * scale  # (root - last) scale
    # 1 - new_root = (1 - first) + first (first - root) / (first - last), every part without cancellation
    complement = -torch.expm1(log_root[0]) - scale * first * torch.expm1(log_root - log_root[0])
    return 2 * new_root.log() - torch.log(complement) - torch.log1p(new_root)


def _log_snr(log_alpha_bar: Tensor) -> Tensor:
    return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))


def _compensated_cumsum(values: list[float]) -> list[float]:
    """Running sums with Neumaier's compensation: each is right to about one unit in the last place."""
    total, lost, sums = 0.0, 0.0, []
    for value in values:
        new = total + value
        if math.isfinite(new):
            lost += (total - new) + value if abs(total) >= abs(value) else (value - new) + total
        total = new
        sums.append(total + lost)
    return sums


# --- the timestep coordinate of schedules given in log SNR -----------------------------------------------------------


def timestep_from_log_snr(
    log_snr: Tensor | float, num_train_timesteps: int, log_snr_max: float, log_snr_min: float
) -> Tensor:
    """tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1: what a network of a log-SNR schedule is fed,
    float64.

    Linear in log SNR over the fixed envelope [log_snr_max, log_snr_min]: -1 is the clean end, T - 1 the noisy one, and
    integers 0..T-1 are the steps x_1..x_T of a chain of T steps, as in Diffusers. A learned schedule moves inside the
    envelope and leaves tau's meaning alone.
    """
    return num_train_timesteps * ((log_snr_max - as_float64(log_snr)) / (log_snr_max - log_snr_min)) - 1


def log_snr_from_timestep(
    timestep: Tensor | float, num_train_timesteps: int, log_snr_max: float, log_snr_min: float
) -> Tensor:
    """The inverse of `timestep_from_log_snr`, exact at both ends."""
    t = (as_float64(timestep) + 1) / num_train_timesteps
    return (1 - t) * log_snr_max + t * log_snr_min


def check_end_points(log_snr_max: float, log_snr_min: float, *, finite: bool = True) -> None:
    """Raise ValueError unless log_snr_max > log_snr_min (and both are finite)."""
    if not log_snr_max > log_snr_min:
        raise ValueError(
            f"`log_snr_max` must exceed `log_snr_min`, got {log_snr_max} <= {log_snr_min}. Did "
            "you pass gamma? log_snr = -gamma."
        )
    if finite and not (math.isfinite(log_snr_max) and math.isfinite(log_snr_min)):
        raise ValueError(f"`log_snr_max` and `log_snr_min` must be finite, got {log_snr_max} and {log_snr_min}.")


def _arctan_exp(x: float) -> float:
    """arctan(e^x), at infinities too."""
    return math.pi / 2 if x > 700 else math.atan(math.exp(x))
