"""VDMScheduler: DDPMScheduler's interface and configuration, exact coefficients, and schedules given in log SNR."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..gaussian import alpha_sigma, posterior
from ..noise_schedules import (
    CosineSchedule,
    LinearLogSNRSchedule,
    NoiseSchedule,
    ShiftedSchedule,
    TabulatedNoiseSchedule,
    check_end_points,
    log_snr_from_betas,
    log_snr_from_timestep,
    make_betas,
    timestep_from_log_snr,
)
from ..numerics import as_float64, compute_dtype, expand_to, linear_combination, on_host, shown
from ..prediction import PredictionType, check_prediction_type, conversion_coefficients, convert
from ..reverse_variance import OptimalVariance, optimal_grid, shortest_path, step_costs
from .grids import SPACINGS, even_entries, fractional_times, integer_timesteps
from .updates import ReverseCoefficients, factored, multistep_weights, reverse_coefficients

MOST_CHOSEN_STEPS = 128  # by dynamic programming unasked: more need it less, and it takes longer
MAX_KNOTS = 64  # of an optimal variance for each frequency, which travels in the config
LOG_SNR_SCHEDULES = ("log_snr_linear", "log_snr_cosine")
VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
    "optimal",
)


@dataclass
class VDMSchedulerOutput(BaseOutput):
    """What a step returns.

    Arguments:
        prev_sample: (B, ...) the sample at the previous (less noisy) timestep, the model's next input.
        pred_original_sample: (B, ...) the data that the model predicts at this timestep, clipped as configured.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class _Row(NamedTuple):
    """The numbers of one step. x_hat and the next mean are scale * (first + ratio * second), `swap` says which is first."""

    x_swap: float
    x_ratio: float
    x_scale: float
    mean_swap: float
    mean_ratio: float
    mean_scale: float
    noise: float
    multistep: float
    log_variance_low: float
    log_variance_high: float
    deviations: Tensor | None = None  # (C, bands) of the noise, where the variance differs between frequencies


class VDMScheduler(SchedulerMixin, ConfigMixin):
    r"""Samples Gaussian diffusion models: DDPM's ancestral sampler and its deterministic and multistep relatives, exactly.

    Takes every configuration of `DDPMScheduler` (`VDMScheduler.from_config(pipe.scheduler.config)`), and schedules given in
    log SNR, as "Variational Diffusion Models" (Kingma et al. 2021) uses them, in the timestep coordinate

        beta tables        timestep i in 0..T-1 is x_{i+1}, fractions are linear in log SNR in between, -1 is clean data
        log-SNR schedules  tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1, and -1 is z_0

    All coefficients are made in float64 on the CPU, once for each grid of timesteps, from log SNR alone.

    Arguments:
        num_train_timesteps, beta_start, beta_end, trained_betas, thresholding, dynamic_thresholding_ratio,
        clip_sample_range, sample_max_value, steps_offset, rescale_betas_zero_snr: as in `DDPMScheduler`.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp", or in log SNR
            "log_snr_linear", "log_snr_cosine".
        variance_type: "fixed_small", "fixed_large" (and their synonyms "..._log"), "learned" (the model's further channels
            are log-variances), "learned_range" (they are in [-1, 1] between the two fixed ones, in logarithms), "optimal"
            (needs `optimal_variance`). Another value warns and acts as "fixed_small".
        clip_sample: clip the predicted data to +-clip_sample_range in `step`. None: True for betas, False in log SNR.
        prediction_type: "epsilon", "sample", "v_prediction", "score", "flow_prediction" (on the variance-preserving path).
        timestep_spacing: "leading", "trailing" or "linspace". None: "leading" for betas, "trailing" in log SNR.
        log_snr_max, log_snr_min: the end points of a log-SNR schedule (ln alpha^2/sigma^2; VDM's gamma is -log_snr).
        log_snr_table: decreasing log SNRs at equally spaced times from 0 to 1, a learned schedule inside the end points.
            It places the steps; the timesteps' meaning stays.
        log_snr_shift: moves the interior of a cosine schedule along the log-SNR axis (Hoogeboom et al. 2023: 2 ln(64/d));
            the end points stay.
        stochasticity: 1 is ancestral sampling, 0 deterministic (DDIM); in between DDIM's eta. Above 1 each step forgets more
            of the noise and draws more anew, with the same marginals, which corrects a network's errors on the way; it takes
            many steps. Not an argument of `step` called eta, because Diffusers' pipelines pass eta=0.0 unasked to every scheduler that has it.
        multistep_order: 2 is the second-order multistep update (2M of DPM-Solver++) on the exact log-SNR grid, best with
            stochasticity=0. Not called solver_order, whose values DPM-Solver configurations carry.
        optimal_variance: what `estimate_optimal_variance` returns, {"log_snr": [...], "mse": [...]}: E|x - x_hat|^2 / D against log
            SNR, for variance_type="optimal": posterior variance + (coefficient of x_hat)^2 mse. With "shape": [C, H, W] the mse is
            given for each channel and radial band of the cosine transform, and the noise has that variance there.
        step_grid: where `set_timesteps(n)` puts its steps. "time": by `timestep_spacing`; "log_snr": evenly in log SNR; "optimal": by
            dynamic programming, for the smallest expected bound (needs `optimal_variance`). None: "time", but with
            variance_type="optimal", which on other grids can make samples worse, "optimal" up to 128 steps and "log_snr" above.
        final_step: what the last step of a log-SNR schedule returns: "latent", a draw of z_0, or "mean", x_hat. A beta
            table always ends at clean data.

    Raises:
        ValueError: an unknown prediction type, spacing or schedule; end points, table or stochasticity out of range.

    Source: Ho et al. 2020 (DDPM); Kingma et al. 2021 (VDM); Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++).
    """

    __module__ = "vdm_diffusers"

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    _is_ode_scheduler = False
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool | None = None,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None,
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        log_snr_max: float = 13.3,
        log_snr_min: float = -5.0,
        log_snr_table: list[float] | None = None,
        log_snr_shift: float = 0.0,
        stochasticity: float = 1.0,
        multistep_order: int = 1,
        optimal_variance: dict[str, list] | None = None,
        final_step: Literal["latent", "mean"] = "latent",
        step_grid: Literal["time", "log_snr", "optimal"] | None = None,
    ):
        self.is_log_snr_schedule = beta_schedule in LOG_SNR_SCHEDULES and trained_betas is None
        if clip_sample is None:
            clip_sample = not self.is_log_snr_schedule
        if timestep_spacing is None:
            timestep_spacing = "trailing" if self.is_log_snr_schedule else "leading"
        # The class name in the live config tells Diffusers whose keys these are, so that other schedulers take it silently.
        self.register_to_config(
            clip_sample=clip_sample, timestep_spacing=timestep_spacing, _class_name=type(self).__name__
        )
        self._check_config()

        self._table: Tensor | None = None  # (T,) float64 log SNRs of a beta table
        if self.is_log_snr_schedule:
            log_snr = self.log_snr(torch.arange(num_train_timesteps))
            log_alpha_bar = torch.nn.functional.logsigmoid(log_snr)
            previous = torch.cat([log_alpha_bar.new_zeros(1), log_alpha_bar[:-1]])
            betas, alphas_cumprod = -torch.expm1(log_alpha_bar - previous), log_alpha_bar.exp()
        else:
            if trained_betas is None:
                betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
            else:
                betas = torch.tensor(np.asarray(trained_betas), dtype=torch.float64)
            self._table = log_snr_from_betas(betas, zero_terminal_snr=rescale_betas_zero_snr)
            alphas_cumprod = self._table.sigmoid()
            if rescale_betas_zero_snr:
                betas = 1 - alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]])
            self._check_table(betas)
        # The names and the precision that Diffusers' pipelines and training scripts know; nothing here computes with them.
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.init_noise_sigma = 1.0

        self._placed: dict[tuple[str, int], Tensor] = {}  # grids that were chosen
        self._marginals: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        num_steps = num_train_timesteps if self._table is None else len(self._table)
        self._use_grid(self._as_fed(self._spaced_timesteps(num_steps, "trailing")))

    def _check_config(self) -> None:
        config = self.config
        check_prediction_type(config.prediction_type)
        if config.timestep_spacing not in SPACINGS:
            raise ValueError(
                f"`timestep_spacing` must be one of {', '.join(SPACINGS)}, got {config.timestep_spacing!r}."
            )
        if (
            not 1 <= config.num_train_timesteps <= 10**6
        ):  # tables of that many are made: a config must not fill the memory
            raise ValueError(f"`num_train_timesteps` must lie in 1..1000000, got {config.num_train_timesteps}.")
        if not 0 <= config.stochasticity < math.inf:
            raise ValueError(
                "`stochasticity` must be a finite number that is not negative (0 deterministic, 1 ancestral, above 1 noisier), "
                f"got {config.stochasticity}."
            )
        if config.multistep_order not in (1, 2):
            raise ValueError(f"`multistep_order` must be 1 or 2, got {config.multistep_order}.")
        if config.final_step not in ("latent", "mean"):
            raise ValueError(f"`final_step` must be 'latent' or 'mean', got {config.final_step!r}.")
        if config.variance_type not in (*VARIANCE_TYPES, None):  # None stands in the configurations of DPM-Solver
            warnings.warn(
                f"`variance_type` {config.variance_type!r} is not one of {', '.join(VARIANCE_TYPES)}: it acts as 'fixed_small'.",
                stacklevel=4,
            )
        if config.step_grid not in (None, "time", "log_snr", "optimal"):
            raise ValueError(f"`step_grid` must be 'time', 'log_snr', 'optimal' or None, got {config.step_grid!r}.")
        if "optimal" in (config.variance_type, config.step_grid) and config.optimal_variance is None:
            raise ValueError(
                "`variance_type='optimal'` (and `step_grid='optimal'`) needs `optimal_variance={'log_snr': [...], 'mse': [...]}`: the measured "
                "E|x - x_hat|^2 / D against log SNR."
            )
        self._optimal = (
            None if config.optimal_variance is None else OptimalVariance.from_config(config.optimal_variance)
        )
        if self._optimal is not None and self._optimal.shape is not None and len(self._optimal.log_snr) > MAX_KNOTS:
            raise ValueError(
                f"`optimal_variance` for each frequency must have at most {MAX_KNOTS} log SNRs, got {len(self._optimal.log_snr)}."
            )
        if self.is_log_snr_schedule:
            check_end_points(config.log_snr_max, config.log_snr_min)
            table = config.log_snr_table
            if table is not None and not (table[0] <= config.log_snr_max and table[-1] >= config.log_snr_min):
                raise ValueError(
                    f"`log_snr_table` must stay between log_snr_max = {config.log_snr_max} and log_snr_min = "
                    f"{config.log_snr_min}, got {table[0]} to {table[-1]}."
                )
        elif config.log_snr_table is not None:
            raise ValueError(
                f"`log_snr_table` needs a schedule in log SNR ({', '.join(LOG_SNR_SCHEDULES)}), got beta_schedule = "
                f"{config.beta_schedule!r}."
            )

    def _check_table(self, betas: Tensor) -> None:
        if len(betas) != self.config.num_train_timesteps:
            warnings.warn(
                f"`trained_betas` has {len(betas)} entries and `num_train_timesteps` is {self.config.num_train_timesteps}: "
                f"the chain has {len(betas)} steps.",
                stacklevel=4,
            )
        if not ((betas > 0) & (betas <= 1)).all():
            warnings.warn(
                f"betas must lie in (0, 1], got values from {float(betas.min())} to {float(betas.max())}: steps that "
                "are undefined will raise when they are reached.",
                stacklevel=4,
            )

    # --- the schedule -------------------------------------------------------------------------------------------------

    @property
    def variance_type(self) -> str:
        """The configured variance type."""
        return self.config.variance_type

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule as a function log_snr(t) of time t in [0, 1]; a beta table's entry i lies at t = i / (T - 1)."""
        if self._table is not None:
            return TabulatedNoiseSchedule(self._table)
        log_snr_max, log_snr_min = self.config.log_snr_max, self.config.log_snr_min
        if self.config.log_snr_table is not None:
            return TabulatedNoiseSchedule(torch.tensor(self.config.log_snr_table, dtype=torch.float64))
        if self.config.beta_schedule == "log_snr_linear":
            return LinearLogSNRSchedule(log_snr_max, log_snr_min)
        shift = self.config.log_snr_shift
        schedule = CosineSchedule(log_snr_max - shift, log_snr_min - shift)
        return ShiftedSchedule(schedule, shift) if shift else schedule

    @property
    def _last(self) -> int:
        """T - 1, the noisiest timestep."""
        return (self.config.num_train_timesteps if self._table is None else len(self._table)) - 1

    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        """Log SNR at `timesteps` of any shape, whole or fractional, float64. -1: +inf for betas, log_snr_max in log SNR.

        Raises:
            ValueError: a timestep on the CPU outside the schedule.
        """
        timesteps = _as_float64(timesteps)
        if on_host(timesteps):
            self._check_timesteps(timesteps)
        if self._table is None:
            config = self.config
            return log_snr_from_timestep(timesteps, config.num_train_timesteps, config.log_snr_max, config.log_snr_min)
        table, last = self._table.to(timesteps), self._last
        position = timesteps.clamp(0, last)
        index = position.long()
        fraction = position - index
        left, right = _at(table, index), _at(table, (index + 1).clamp(max=last))
        # where fraction = 0 the right neighbour has no say, not even an infinite one
        log_snr = torch.where(fraction == 0, left, (1 - fraction) * left + fraction * right)
        return torch.where(timesteps < 0, math.inf, log_snr)

    def _check_timesteps(self, timesteps: Tensor) -> None:
        slack = 1e-9 * (self._last + 1)  # for those computed as T t - 1
        wrong = ~((timesteps >= -1 - slack) & (timesteps <= self._last + slack))
        if self._table is not None:
            wrong |= (timesteps < 0) & (timesteps != -1)  # nothing is defined between x_1 and clean data
        if wrong.any():
            between = "" if self._table is None else ", or be -1"
            raise ValueError(
                f"timesteps must lie in [{'-1' if self._table is None else '0'}, {self._last}]{between}, got "
                f"{float(timesteps[wrong].flatten()[0])}."
            )

    def timestep_from_log_snr(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        """The (fractional) timestep at which the schedule has `log_snr`, what the network is to be fed; float64.

        Beta tables: +inf gives -1; what else lies outside of the table has no timestep.

        Raises:
            ValueError: a log SNR on the CPU outside the schedule.
        """
        log_snr = _as_float64(log_snr)
        config, table = self.config, self._table
        high, low = (config.log_snr_max, config.log_snr_min) if table is None else (float(table[0]), float(table[-1]))
        clean = (log_snr == math.inf) & (table is not None)
        slack = 1e-6 * (1 + log_snr.abs())  # for end points that went through float32
        if on_host(log_snr) and not bool((clean | ((log_snr <= high + slack) & (log_snr >= low - slack))).all()):
            raise ValueError(
                f"`log_snr` must lie in [{low}, {high}], the range of the schedule, got {shown(log_snr)}."
            )
        log_snr = log_snr.clamp(low, high)
        if table is None:
            return timestep_from_log_snr(log_snr, config.num_train_timesteps, high, low)
        timesteps = torch.zeros_like(log_snr) if len(table) == 1 else self.noise_schedule.inverse(log_snr) * self._last
        return torch.where(clean, -1.0, timesteps)

    def as_discrete(self) -> VDMScheduler:
        """This schedule as a plain table of `num_train_timesteps` betas, whose timesteps mean the same to the network.

        After it any Diffusers sampler serves the model: `DPMSolverMultistepScheduler.from_config(s.as_discrete().config)`.
        Diffusers rounds 1 - beta to float32 and takes the product: each beta is chosen so that the rounded product stays next
        to the exact one (error feedback). What is left is Diffusers' rounding of alpha_bar itself, an error in log SNR of some
        2^-25 e^log_snr: 0.015 at log SNR 13.3, where betas as they come give 0.18. This class reads the table to 0.009.

        A schedule that is a table already is returned as an equal scheduler. The number of timesteps is not free: another one
        would feed the network other inputs.

        """
        if not self.is_log_snr_schedule:
            return type(self).from_config(self.config)
        target = torch.sigmoid(self.log_snr(torch.arange(self._last + 1))).tolist()
        rounded, exact, betas = 1.0, 1.0, []  # the two running products: with 1 - beta in float32, and in float64
        for alpha_bar in target:
            alpha = np.float32(alpha_bar / rounded)
            # any beta within half a unit of 1 - alpha is rounded to that alpha: take the one that is best in float64
            half = 0.49 * float(alpha - np.nextafter(alpha, np.float32(0)))
            low, high = max(1 - float(alpha) - half, 1e-3 * half), 1 - float(alpha) + half
            betas.append(min(max(1 - alpha_bar / exact, low), high))
            rounded, exact = rounded * float(alpha), exact * (1 - betas[-1])
        own = {
            key: self.config[key] for key in ("stochasticity", "multistep_order", "step_grid") if self._was_set(key)
        }
        if self.config.optimal_variance is not None:
            own["optimal_variance"] = self.config.optimal_variance
        return type(self)(
            num_train_timesteps=len(betas),
            trained_betas=betas,
            variance_type=self.config.variance_type,
            clip_sample=self.config.clip_sample,
            clip_sample_range=self.config.clip_sample_range,
            prediction_type=self.config.prediction_type,
            thresholding=self.config.thresholding,
            dynamic_thresholding_ratio=self.config.dynamic_thresholding_ratio,
            sample_max_value=self.config.sample_max_value,
            timestep_spacing=self.config.timestep_spacing,
            steps_offset=self.config.steps_offset,
            **own,
        )

    def _was_set(self, key: str) -> bool:
        return key not in self.config.get("_use_default_values", [])

    # --- the grid -----------------------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> Tensor:
        """(n,) the timesteps that sampling visits, descending. Assigning to it makes a grid of one's own."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self.set_timesteps(timesteps=value, device=value.device)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        log_snrs: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the steps of the sampler, in one of three ways, and make their coefficients.

        Arguments:
            num_inference_steps: their number, placed as `step_grid` says: by `timestep_spacing`, in a log-SNR schedule uniform in t,
                or, by default with variance_type="optimal", where they make the bound smallest.
            device: where `timesteps` goes.
            timesteps: the timesteps themselves, descending, whole or fractional.
            log_snrs: the log SNRs at which the model is evaluated, ascending.
        Raises:
            ValueError: not exactly one of the three; values out of order or range; more steps than a beta table has; a
                configuration made for the flow path.
        """
        if self.config.get("use_flow_sigmas") and self.config.prediction_type == "flow_prediction":
            raise ValueError(
                "this configuration has use_flow_sigmas=True: its model was trained on the path z = (1 - s) x + s eps, and "
                "VDMScheduler samples variance-preserving models. Keep the scheduler that the pipeline came with."
            )
        given = [v is not None for v in (num_inference_steps, timesteps, log_snrs)]
        if sum(given) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `timesteps` and `log_snrs`.")
        if num_inference_steps is not None:
            if num_inference_steps < 1 or int(num_inference_steps) != num_inference_steps:
                raise ValueError(f"`num_inference_steps` must be a positive integer, got {num_inference_steps}.")
            grid = self._placed_timesteps(int(num_inference_steps))
        elif timesteps is not None:
            grid = _as_float64(timesteps).cpu()
        else:
            grid = self.timestep_from_log_snr(_as_float64(log_snrs).cpu())
        grid = self._as_fed(grid)
        self._check_grid(grid)
        self.num_inference_steps = len(grid)
        self.custom_timesteps = num_inference_steps is None
        self._use_grid(grid, device)

    def _placed_timesteps(self, num_steps: int) -> Tensor:
        """The timesteps that `step_grid` asks for, descending."""
        config = self.config
        kind = config.step_grid
        if kind is None:
            kind = "time"
            if config.variance_type == "optimal" and config.stochasticity > 0:
                kind = "optimal" if num_steps <= MOST_CHOSEN_STEPS else "log_snr"
        if kind == "time" or (self._table is not None and num_steps > len(self._table)):  # which is refused there
            return self._spaced_timesteps(num_steps, config.timestep_spacing)
        if (kind, num_steps) not in self._placed:
            place = self._even_timesteps if kind == "log_snr" else self._optimal_timesteps
            self._placed[kind, num_steps] = place(num_steps)
        return self._placed[kind, num_steps]

    def _even_timesteps(self, num_steps: int) -> Tensor:
        if self._table is not None:
            return even_entries(self._table, num_steps).flip(0)
        high, low = (float(self.log_snr(t)) for t in (self._terminal_timestep, self._noisiest_timestep))
        return self._whole(
            self.timestep_from_log_snr(torch.linspace(low, high, num_steps + 1, dtype=torch.float64)[:-1])
        )

    def _optimal_timesteps(self, num_steps: int) -> Tensor:
        """The grid by dynamic programming. A last step to x_hat adds no noise, so it starts where little is left: at timestep 0 of
        a table, or one timestep of the training chain before the end."""
        optimal = cast(OptimalVariance, self._optimal)
        variance: Literal["optimal", "posterior"] = (
            "optimal" if self.config.variance_type == "optimal" else "posterior"
        )
        to_x_hat = self._table is not None or self.config.final_step == "mean"
        if to_x_hat and num_steps == 1:
            return torch.tensor([self._noisiest_timestep], dtype=torch.float64)
        if self._table is not None:
            path = shortest_path(step_costs(optimal, self._table, variance), num_steps - 1)
            return path.flip(0)
        first = self._terminal_timestep + to_x_hat
        high, low = (float(self.log_snr(t)) for t in (first, self._noisiest_timestep))
        candidates = torch.linspace(high, low, max(512, 2 * num_steps), dtype=torch.float64)
        log_snrs = optimal_grid(optimal, num_steps - to_x_hat, candidates, variance=variance)
        return self._whole(self.timestep_from_log_snr(log_snrs[not to_x_hat :].flip(0)))

    @property
    def _noisiest_timestep(self) -> float:
        """Where sampling begins: the last of the table, or where a learned schedule has its z_1."""
        table = self.config.log_snr_table
        return float(self._last) if table is None else float(self.timestep_from_log_snr(table[-1]))

    @staticmethod
    def _whole(timesteps: Tensor) -> Tensor:
        """Without what rounding left of whole numbers."""
        whole = timesteps.round()
        return torch.where((timesteps - whole).abs() < 1e-9, whole, timesteps)

    def _spaced_timesteps(self, num_steps: int, spacing: str) -> Tensor:
        offset, total = self.config.steps_offset, self._last + 1
        if self._table is None:
            times = fractional_times(spacing, num_steps, total, offset)
            return self._whole(self.timestep_from_log_snr(self.noise_schedule.log_snr(times)))
        if num_steps > total:
            raise ValueError(
                f"`num_inference_steps` must not exceed the {total} timesteps that the model was trained on, got {num_steps}."
            )
        return integer_timesteps(spacing, num_steps, total, offset)

    def _check_grid(self, grid: Tensor) -> None:
        if grid.ndim != 1 or len(grid) == 0:
            raise ValueError(f"`timesteps` must be a list of at least one timestep, got shape {tuple(grid.shape)}.")
        if not (grid.diff() < 0).all():
            raise ValueError(
                f"`timesteps` must be in descending order without repetition (log_snrs ascending), got {shown(grid)}."
            )
        self._check_timesteps(grid)
        if grid[-1] <= self._terminal_timestep:
            raise ValueError(
                f"`timesteps` must lie above {self._terminal_timestep}, where sampling ends, got {float(grid[-1])}."
            )

    @property
    def _terminal_timestep(self) -> float:
        """Where the last step ends: -1, clean data or z_0; a learned schedule may have its z_0 a little later."""
        table = self.config.log_snr_table
        return -1.0 if table is None else float(self.timestep_from_log_snr(table[0]))

    def _as_fed(self, grid: Tensor) -> Tensor:
        """Timesteps as a network is fed them: int64 where all are whole in a beta table, else float32."""
        whole = self._table is not None and bool((grid == grid.round()).all())
        return grid.to(torch.int64 if whole else torch.float32)

    @torch.inference_mode(False)  # what is kept here may be used in training later
    def _use_grid(self, grid: Tensor, device: str | torch.device | None = None) -> None:
        """Take `grid`, on the CPU, as the timesteps and make every coefficient of their steps, from log SNR in float64.

        The coefficients belong to the timesteps as the network is fed them, after any rounding to float32.
        """
        self._values: list[float] = grid.tolist()
        self._timesteps = grid.to(device)
        self._index = {value: index for index, value in enumerate(self._values)}
        log_snrs = self.log_snr(self._values)
        end = self._log_snr_of_target(torch.tensor([self._terminal_timestep], dtype=torch.float64))
        table = self._step_table(log_snrs, torch.cat([log_snrs[1:], end]))
        if self.config.multistep_order == 2:
            table[:, 5] = multistep_weights(torch.cat([log_snrs, end]))
        # At clean data the posterior has no variance, and the range of learned ones ends at the last step's before it.
        if len(table) > 1:
            table[-1, 6] = torch.where(table[-1, 6].isfinite(), table[-1, 6], table[-2, 6])
        self._coefficients = table
        self._device_coefficients = table.to(device=self._timesteps.device, dtype=torch.float32)
        x_hat, mean = factored(table[:, 0], table[:, 1]), factored(table[:, 2], table[:, 3])
        columns = torch.stack([*x_hat, *mean], dim=1)
        rows = torch.cat([columns, table[:, 4:8]], dim=1).tolist()
        self._rows = [_Row(*row) for row in rows]
        if self._by_frequency is not None:
            device = self._timesteps.device
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            self._bands = self._by_frequency.bands.to(device, dtype)
            deviations = self._band_columns(table.to(device, dtype))
            self._rows = [row._replace(deviations=d) for row, d in zip(self._rows, deviations, strict=True)]
        self._undefined = frozenset((~table[:, :6].isfinite().all(1)).nonzero().flatten().tolist())
        self._ascending = torch.tensor([self._terminal_timestep, *reversed(self._values)], dtype=torch.float64)

        config = self.config
        self._clip = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        self._limited = config.clip_sample or config.thresholding
        self._through_x_hat = self._limited or config.multistep_order == 2
        self._learned = config.variance_type in ("learned", "learned_range")
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._history: tuple[int, Tensor] | None = None

    def _log_snr_of_target(self, timesteps: Tensor) -> Tensor:
        """Log SNR at the end of a step; +inf, which makes it end at x_hat, for the last one with final_step="mean"."""
        log_snr = self.log_snr(timesteps)
        if self.config.final_step == "mean":
            log_snr = torch.where(timesteps <= self._terminal_timestep, math.inf, log_snr)
        return log_snr

    def _step_table(self, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
        """(..., 8) coefficients of the steps from t to s, float64; undefined ones are not finite. See below for more columns.

        Columns: x_hat = 0 z + 1 output, mean = 2 z + 3 (x_hat if it is clipped or extrapolated, else the output),
        4 the noise's standard deviation, 5 multistep weight, 6 and 7 the log-variance of the posterior and of the forward step;
        with an optimal variance for each frequency, its standard deviations (C * bands) follow, and 4 is their root mean square.
        """
        config = self.config
        step = reverse_coefficients(log_snr_t, log_snr_s, config.stochasticity)
        # At zero terminal SNR these two say nothing of x: not a number, which is reported if that step is ever taken.
        unknown = (log_snr_t == -math.inf) & (config.prediction_type in ("epsilon", "score"))
        x_z, x_output = conversion_coefficients(
            torch.where(unknown, math.nan, log_snr_t), source=config.prediction_type, target="sample"
        )
        if config.clip_sample or config.thresholding or config.multistep_order == 2:
            mean_z, mean_y = step.z, step.x
        else:
            mean_z, mean_y = step.z + step.x * x_z, step.x * x_output
        variance = self._fixed_variance(config.variance_type, log_snr_t, step)
        # the last step to clean data adds no noise, whatever the type
        noise = torch.where(log_snr_s == math.inf, 0.0, step.stochasticity * variance.sqrt())
        low, high = step.posterior_variance.log(), step.forward_variance.log()
        table = torch.stack([x_z, x_output, mean_z, mean_y, noise, torch.zeros_like(noise), low, high], dim=-1)
        if self._by_frequency is None:
            return table
        mse = self._by_frequency.at(log_snr_t).to(table).flatten(-2)
        deviations = (
            step.stochasticity[..., None] * (step.posterior_variance[..., None] + step.x[..., None] ** 2 * mse).sqrt()
        )
        return torch.cat([table, torch.where(log_snr_s[..., None] == math.inf, 0.0, deviations)], dim=-1)

    def _fixed_variance(self, variance_type: str, log_snr_t: Tensor, step: ReverseCoefficients) -> Tensor:
        """The variance of a reverse step by type; one for learned ones, whose factor the model gives."""
        if variance_type in ("learned", "learned_range"):
            return torch.ones_like(log_snr_t)
        if variance_type in ("fixed_large", "fixed_large_log"):
            return step.forward_variance
        if variance_type == "optimal":
            optimal = cast(OptimalVariance, self._optimal)
            return step.posterior_variance + step.x**2 * optimal.mean(optimal.at(log_snr_t)).to(log_snr_t)
        return step.posterior_variance

    @property
    def _by_frequency(self) -> OptimalVariance | None:
        """The optimal variance, if it is in use and differs between frequencies."""
        if self.config.variance_type != "optimal" or self._optimal is None or self._optimal.shape is None:
            return None
        return self._optimal

    def _band_columns(self, table: Tensor) -> Tensor:
        """The standard deviations (..., C, bands) in a table of coefficients."""
        return table[..., 8:].unflatten(-1, cast(OptimalVariance, self._by_frequency).mse.shape[1:])

    def _colored(self, noise: Tensor, deviations: Tensor) -> Tensor:
        """White noise (B, C, H, W) with the standard deviations (C, bands), or (B, C, bands), in the cosine transform.

        Raises:
            ValueError: images of another shape than those whose frequencies were measured.
        """
        cast(OptimalVariance, self._by_frequency).check_shape(noise.shape[1:])
        bands, white = self._bands, noise.to(compute_dtype(noise))
        return bands.inverse(bands.spread(deviations.to(white)) * bands.transform(white)).to(noise.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def begin_index(self) -> int | None:
        """The index of the first step that sampling takes, where `set_begin_index` has set it."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The index of the next step, once the first is taken."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` sampling begins (image-to-image, inpainting), without reading a timestep."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Nothing: the model is fed the sample itself. Here for interchange with schedulers that scale."""
        return sample

    def previous_timestep(self, timestep: Tensor | float) -> Tensor | float:
        """Where a step from `timestep` ends: the next entry of the grid if it is on it (-1 after the last), else timestep - 1.

        A number gives a number, a tensor a tensor of its shape, on its device.
        """
        if not isinstance(timestep, Tensor):
            index = self._index.get(timestep)
            if index is None:
                return -1 if timestep < (0 if self._table is None else 1) else timestep - 1
            return self._values[index + 1] if index + 1 < len(self._values) else self._terminal_timestep
        values, place, on_grid = self._locate(timestep)
        below = values - 1
        below = torch.where(
            below < (-1 if self._table is None else 0), -1.0, below
        )  # nothing is between x_1 and clean data
        return torch.where(on_grid, _at(self._ascending.to(values), place), below).to(timestep.dtype)

    def _locate(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`timestep` as floats, its place in the ascending grid, and whether it is there; all on its device, nothing read."""
        values = as_float64(timestep).contiguous()
        grid = self._ascending[1:].to(values)
        place = torch.searchsorted(grid, values).clamp(max=len(grid) - 1)
        return values, place, _at(grid, place) == values

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> VDMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the sampler: from the sample at `timestep` to the one at the next timestep of the grid.

        Before `set_timesteps` the grid is the whole training chain, and fractional timesteps step down by 1.
        A timestep on the CPU is looked up; one on another device is never read: it is known by its place in `timesteps`, or,
        where it is a tensor of its own, by counting from the begin index.

        Arguments:
            model_output: (B, C, ...) the model's prediction, of type `prediction_type`; (B, 2 C, ...) with learned variances.
            timestep: a number, a tensor of one element, or one timestep for each sample (B,).
            sample: (B, C, ...) the noisy sample that the model saw.
            generator: one, or a list of B.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        Raises:
            ValueError: shapes that do not fit, a timestep that is not on the grid, or a step that is undefined (epsilon at
                zero terminal SNR).
        """
        predicted_variance = None
        if model_output.shape != sample.shape:
            model_output, predicted_variance = self._split(model_output, sample)
        elif self._learned:
            raise ValueError(
                f"`variance_type={self.config.variance_type!r}` needs a model with twice the sample's channels, got "
                f"{tuple(model_output.shape)} for both. If the model has no variances, set variance_type='fixed_small'."
            )
        if not (model_output.dtype.is_floating_point and sample.dtype.is_floating_point):
            raise ValueError(
                f"`model_output` and `sample` must be floating-point, got {model_output.dtype} and {sample.dtype}."
            )
        if torch.compiler.is_compiling() or (isinstance(timestep, Tensor) and timestep.numel() > 1):
            prev_sample, x_hat = self._step_tensor(model_output, predicted_variance, timestep, sample, generator)
        else:
            prev_sample, x_hat = self._step_row(model_output, predicted_variance, timestep, sample, generator)
        if not return_dict:
            return prev_sample, x_hat
        return VDMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_hat)

    def _step_row(
        self,
        output: Tensor,
        predicted_variance: Tensor | None,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[Tensor, Tensor]:
        """A step whose coefficients are numbers: no tensor of them exists, so nothing is copied, cast or waited for."""
        index = self._index_of(timestep)
        row = self._off_grid_row(timestep) if index is None else self._rows[index]
        if index in self._undefined:
            self._raise_undefined(index)
        shape, dtype = output.shape, output.dtype  # of the noise, drawn as Diffusers draws it
        narrow = sample.dtype.itemsize == 2 and sample.device.type == "cpu"
        if narrow:  # sums of half-precision tensors round their coefficient too on the CPU, unlike on a GPU
            narrow_dtype = torch.promote_types(sample.dtype, dtype)
            sample, output = sample.float(), output.float()
        x_hat = _combine(sample, output, row.x_swap, row.x_ratio, row.x_scale)
        if self._limited:
            x_hat = self._limit(x_hat)
        second = output
        if self._through_x_hat:
            second = x_hat
            if row.multistep and self._history is not None and index is not None and self._history[0] == index - 1:
                second = torch.lerp(self._history[1], x_hat, 1 + row.multistep)
        prev_sample = _combine(sample, second, row.mean_swap, row.mean_ratio, row.mean_scale)
        if index is not None:
            self._step_index = index + 1
            if self.config.multistep_order == 2:
                self._history = (index, x_hat)
        if row.noise:
            noise = randn_tensor(shape, generator=generator, device=output.device, dtype=dtype)
            if predicted_variance is not None:
                noise = noise * self._learned_deviation(
                    predicted_variance, row.log_variance_low, row.log_variance_high
                )
            if row.deviations is None:
                prev_sample.add_(noise, alpha=row.noise)
            else:
                prev_sample.add_(self._colored(noise, row.deviations))
        return (prev_sample.to(narrow_dtype), x_hat.to(narrow_dtype)) if narrow else (prev_sample, x_hat)

    def _step_tensor(
        self,
        output: Tensor,
        predicted_variance: Tensor | None,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[Tensor, Tensor]:
        """A step whose coefficients are tensors: one timestep for each sample, or under torch.compile."""
        if not isinstance(timestep, Tensor):
            timestep = torch.full((), timestep, device=sample.device)
        c = self._coefficients_at(timestep.flatten() if timestep.numel() > 1 else timestep.reshape(()), sample)
        x_hat = linear_combination(c[..., 0], sample, c[..., 1], output)
        if self._limited:
            x_hat = self._limit(x_hat)
        second = x_hat if self._through_x_hat else output
        if self.config.multistep_order == 2:
            if timestep.numel() > 1:
                raise ValueError("`multistep_order=2` needs one timestep for the whole batch: it remembers one step.")
            if self._history is not None:
                second = x_hat + (c[..., 5] * (x_hat - self._history[1])).to(x_hat.dtype)
            self._history = (-2, x_hat)
        mean = linear_combination(c[..., 2], sample, c[..., 3], second)
        if self.config.stochasticity == 0:
            return mean, x_hat
        noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        deviation = expand_to(c[..., 4], noise)
        if predicted_variance is not None:
            low, high = expand_to(c[..., 6], noise), expand_to(c[..., 7], noise)
            # where no noise is added the bounds may be infinite
            deviation = torch.where(
                deviation == 0, 0.0, deviation * self._learned_deviation(predicted_variance, low, high)
            )
        if self._by_frequency is not None:
            return mean + self._colored(noise, self._band_columns(c)).to(mean.dtype), x_hat
        return (mean + deviation * noise).to(mean.dtype), x_hat

    def _coefficients_at(self, timestep: Tensor, sample: Tensor) -> Tensor:
        """Rows of coefficients for `timestep` of shape () or (B,), on the sample's device: (..., 8)."""
        values, place, on_grid = self._locate(timestep)
        index = len(self._values) - 1 - place
        if on_host(timestep):
            if bool(on_grid.all()):
                return self._checked(_at(self._coefficients, index))
            self._refuse_off_grid(values[~on_grid])
            return self._checked(self._off_grid_table(values))
        table = self._device_coefficients
        if sample.dtype == torch.float64 or table.device != sample.device:
            table = self._coefficients.to(device=sample.device, dtype=compute_dtype(sample))
        return _at(table, index.to(sample.device))

    def _checked(self, table: Tensor) -> Tensor:
        if not bool(table[..., :6].isfinite().all()):
            self._raise_undefined(None)
        return table

    def _index_of(self, timestep: Tensor | float) -> int | None:
        """The place of `timestep` on the grid; None for one off the training chain's whole steps. Never waits for a device."""
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu":
                return self._index_of_device_tensor(timestep)
            timestep = timestep.item()
        index = self._index.get(timestep)
        if index is None:
            index = self._index.get(float(np.float32(timestep)))  # fractional timesteps are rounded to float32
            if index is None:
                self._refuse_off_grid(as_float64(timestep))
        return index

    def _index_of_device_tensor(self, timestep: Tensor) -> int | None:
        grid = self._timesteps
        if timestep.dtype == grid.dtype and timestep.device == grid.device:
            # an element of `timesteps`, or of a slice of it, shares its memory: its offset says which it is
            index = int(timestep.storage_offset()) - int(grid.storage_offset())
            if timestep.untyped_storage().data_ptr() == grid.untyped_storage().data_ptr():
                return index
        counted = self._begin_index if self._step_index is None else self._step_index
        if (
            counted is None
        ):  # once for each grid: a tensor from elsewhere, and nothing was said about where sampling begins
            return self._index_of(timestep.cpu())
        if counted >= len(self._values):
            raise ValueError(
                f"all {len(self._values)} steps are taken: call `set_timesteps` (or `set_begin_index`) before the next sample."
            )
        return counted

    def _refuse_off_grid(self, timestep: Tensor) -> None:
        self.log_snr(timestep)  # names the range if that is what is wrong
        if self.num_inference_steps is not None or bool((timestep <= self._terminal_timestep).any()):
            raise ValueError(
                f"timestep {shown(timestep.flatten())} is not one of the {len(self._values)} of `set_timesteps`: pass one of "
                "`scheduler.timesteps`, or choose your own with `set_timesteps(timesteps=...)`."
            )

    def _off_grid_row(self, timestep: Tensor | float) -> _Row:
        """A fractional timestep of the training chain, to the one before it."""
        c = self._checked(self._off_grid_table(as_float64(timestep).reshape(())))
        numbers: list[Any] = [float(v) for v in (*factored(c[0], c[1]), *factored(c[2], c[3]), *c[4:8])]
        row = _Row(*numbers)
        return row if self._by_frequency is None else row._replace(deviations=self._band_columns(c))

    def _off_grid_table(self, timestep: Tensor) -> Tensor:
        return self._step_table(
            self.log_snr(timestep), self._log_snr_of_target(_as_float64(self.previous_timestep(timestep)))
        )

    def _raise_undefined(self, index: int | None) -> None:
        where = "" if index is None else f" at timestep {self._values[index]:g}"
        if (
            self.config.prediction_type in ("epsilon", "score")
            and self._table is not None
            and self._table[-1] == -math.inf
        ):
            raise ValueError(
                f"the step{where} is undefined: at zero terminal SNR a prediction of type {self.config.prediction_type!r} says "
                "nothing about the data. Use a model that predicts v, flow or the sample, or timesteps that leave T - 1 out."
            )
        raise ValueError(f"the step{where} is undefined: its coefficients are not finite. Check the betas.")

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction and the predicted variances of a model output with twice the sample's channels."""
        doubled = sample.ndim > 1 and model_output.shape == (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
        if not (self._learned and doubled):
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, or twice its channels with "
                f"variance_type 'learned' or 'learned_range', got {tuple(model_output.shape)} and {self.config.variance_type!r}."
            )
        prediction, variance = model_output.chunk(2, dim=1)
        return prediction, variance

    def _learned_deviation(self, predicted: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """The standard deviation that the model predicts: the root of the exponential of its log-variance."""
        predicted = predicted.to(compute_dtype(predicted))
        if self.config.variance_type == "learned":
            return torch.exp(predicted / 2)
        return torch.exp(
            predicted * ((high - low) / 4) + (high + low) / 4
        )  # half of low + (predicted + 1)/2 (high - low)

    def _limit(self, x_hat: Tensor) -> Tensor:
        if self._clip is not None:
            return x_hat.clamp_(-self._clip, self._clip)
        return self._threshold_sample(x_hat)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding: x_hat is clipped to [-s, s] and divided by s, s a quantile of |x_hat| of each sample.

        s = clamp(quantile, 1, sample_max_value). Source: Saharia et al. 2022, "Imagen", section 2.3.
        """
        values = sample.to(compute_dtype(sample))
        s = values.flatten(1).abs().quantile(self.config.dynamic_thresholding_ratio, dim=1)
        s = expand_to(s.clamp(min=1, max=self.config.sample_max_value), values)
        return (values.clamp(-s, s) / s).to(sample.dtype)

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The means of steps from one timestep for each sample (B,), without noise, for parallel sampling.

        Source: Shih et al. 2023, "Parallel Sampling of Diffusion Models"; `DDPMParallelScheduler`.
        """
        if model_output.shape != sample.shape:
            model_output, _ = self._split(model_output, sample)
        c = self._coefficients_at(timesteps.flatten(), sample)
        second = model_output
        if self._through_x_hat:
            second = linear_combination(c[..., 0], sample, c[..., 1], model_output)
            second = self._limit(second) if self._limited else second
        return linear_combination(c[..., 2], sample, c[..., 3], second)

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """The variance (never its root or logarithm) of the noise of the step at timestep t, for pipelines that ask for it."""
        timestep = as_float64(t).cpu()
        log_snr = self.log_snr(timestep)
        step = reverse_coefficients(log_snr, self.log_snr(self.previous_timestep(timestep)))
        variance_type = variance_type or self.config.variance_type
        if predicted_variance is not None and variance_type == "learned":
            return predicted_variance.exp()
        if predicted_variance is not None and variance_type == "learned_range":
            index = self._index_of(timestep)
            low = step.posterior_variance.log() if index is None else self._rows[index].log_variance_low
            return torch.exp(low + (predicted_variance + 1) / 2 * (step.forward_variance.log() - low))
        return self._fixed_variance(variance_type, log_snr, step)

    # --- the exact maths as methods -----------------------------------------------------------------------------------

    def posterior_mean_variance(
        self,
        sample: Tensor,
        pred_original_sample: Tensor,
        timestep: Tensor | float,
        prev_timestep: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q(z_s | z_t, x) = N(mean, variance I): its mean, of the sample's shape, and its variance, float64, of timestep's.

        Arguments:
            sample: (B, ...) z_t. pred_original_sample: (B, ...) x.
            timestep: t, a number or a tensor of shape () or (B,). prev_timestep: s; None: see `previous_timestep`.
        Raises:
            ValueError: timesteps out of range or order. Never clips.
        """
        if prev_timestep is None:
            prev_timestep = self.previous_timestep(timestep)
        return posterior(sample, pred_original_sample, self.log_snr(timestep), self.log_snr(prev_timestep))

    def convert_prediction(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, *, target: PredictionType
    ) -> Tensor:
        """The model's output, of type `prediction_type`, as one of type `target`. Never clips.

        Raises:
            ValueError: an unknown type, or a timestep at which the output does not determine the target.
        """
        return convert(model_output, sample, self.log_snr(timestep), source=self.config.prediction_type, target=target)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """z_t = alpha_t x + sigma_t noise, for training and for image-to-image.

        Arguments:
            original_samples, noise: (B, ...). timesteps: one for each sample (B,), or one for all; whole or fractional.
        """
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return linear_combination(alpha, original_samples, sigma, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """v = alpha_t noise - sigma_t x, what a network with prediction_type="v_prediction" is trained on; see `add_noise`."""
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return linear_combination(alpha, noise, -sigma, sample)

    def _alpha_sigma(self, timesteps: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `timesteps`: by table for whole timesteps of betas, else from log SNR."""
        if isinstance(timesteps, Tensor) and timesteps.ndim > 1:
            timesteps = timesteps.flatten()
        if self._table is None or not isinstance(timesteps, Tensor) or timesteps.is_floating_point():
            return alpha_sigma(self.log_snr(timesteps))
        if on_host(timesteps):
            self._check_timesteps(timesteps)
        key = (timesteps.device, compute_dtype(like))
        if key not in self._marginals:
            self._marginals[key] = self._marginal_table(self._table, *key)
        alpha, sigma = self._marginals[key]
        return alpha[timesteps], sigma[timesteps]

    @staticmethod
    @torch.inference_mode(False)  # made while sampling, it may be used in training later
    def _marginal_table(log_snrs: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(2, T + 1) alpha and sigma of a beta table; clean data stands at the end, where index -1 finds it."""
        return torch.stack(alpha_sigma(torch.cat([log_snrs, log_snrs.new_tensor([math.inf])]))).to(device, dtype)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for an index of any shape, zero dimensions too, where torch.compile would read a number."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape + table.shape[1:])


def _as_float64(value: Tensor | Sequence[float] | float | None) -> Tensor:
    return as_float64(value if isinstance(value, Tensor) else torch.tensor(np.asarray(value, dtype=np.float64)))


def _combine(z: Tensor, y: Tensor, swap: float, ratio: float, scale: float) -> Tensor:
    """scale * (z + ratio y), or with `swap` scale * (y + ratio z): a new tensor."""
    first, second = (y, z) if swap else (z, y)
    if ratio == 0:
        return first * scale
    result = torch.add(first, second, alpha=ratio)
    return result if scale == 1 else result.mul_(scale)
