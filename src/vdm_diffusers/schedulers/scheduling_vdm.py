"""VDMScheduler: DDPMScheduler's interface and configuration, exact coefficients, and schedules given in log SNR."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ..gaussian import alpha_sigma, posterior
from ..noise_schedules import NoiseSchedule
from ..numerics import as_float64, compute_dtype, linear_combination, on_cpu, on_host, shown
from ..prediction import PredictionType, convert
from ..step_grids import default_grid, place_steps
from ..timelines import Timeline
from .adoption import adopted
from .beta_tables import BetaTables
from .coefficients import StepSettings, fixed_variance, read_settings
from .configuration import (
    betas_for_diffusers,
    betas_of,
    check_config,
    is_in_log_snr,
    plain,
    timeline_of,
    unset_keys,
    warn_of_odd_betas,
)
from .sampling_grid import SamplingGrid
from .sampling_step import mean_each, split_output, step_each, step_together, thresholded
from .updates import reverse_coefficients


@dataclass
class VDMSchedulerOutput(BaseOutput):
    """What a step returns.

    Arguments:
        prev_sample: (B, ...) the sample at the previous (less noisy) timestep, the model's next input.
        pred_original_sample: (B, ...) the data that the model predicts at this timestep, clipped as configured.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


_KEPT_IN_A_TABLE = (
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
)


def _table(name: str, doc: str) -> property:
    """A table under Diffusers' name. Assigned to, it becomes the schedule; see `BetaTables`."""

    def get(self: VDMScheduler) -> Tensor:
        return self._tables.named[name]

    def put(self: VDMScheduler, value: Tensor) -> None:
        self._tables.put(name, value)
        assert self.timeline is not None  # takes it
        self._tables.put(name, value)

    return property(get, put, doc=doc)


class VDMScheduler(SchedulerMixin, ConfigMixin):
    r"""Samples Gaussian diffusion models: DDPM's ancestral sampler and its deterministic and multistep relatives,
    exactly.

    Takes every configuration of `DDPMScheduler` (`VDMScheduler.from_config(pipe.scheduler.config)`), and schedules
    given in log SNR, as "Variational Diffusion Models" (Kingma et al. 2021) uses them, in the timestep coordinate

        beta tables        timestep i in 0..T-1 is x_{i+1}, fractions are linear in log SNR in between, -1 is clean
        data log-SNR schedules  tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1, and -1 is z_0

    All coefficients are made in float64 on the CPU, once for each grid of timesteps, from log SNR alone.

    Arguments:
        num_train_timesteps, beta_start, beta_end, trained_betas, thresholding, dynamic_thresholding_ratio,
        clip_sample_range, sample_max_value, steps_offset, rescale_betas_zero_snr: as in `DDPMScheduler`.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp", or in log SNR
            "log_snr_linear", "log_snr_cosine".
        variance_type: "fixed_small", "fixed_large" (and their synonyms "..._log"), "learned" (the model's further
            channels are log-variances), "learned_range" (they are in [-1, 1] between the two fixed ones, in
            logarithms), "optimal" (needs `optimal_variance`). Another value warns and acts as "fixed_small".
        clip_sample: clip the predicted data to +-clip_sample_range in `step`. None: True for betas, False in log SNR.
        prediction_type: "epsilon", "sample", "v_prediction", "score", "flow_prediction" (on the variance-preserving
            path).
        timestep_spacing: "leading", "trailing" or "linspace". None: "leading" for betas, "trailing" in log SNR.
        log_snr_max, log_snr_min: the end points of a log-SNR schedule (ln alpha^2/sigma^2; VDM's gamma is -log_snr).
        log_snr_table: decreasing log SNRs at equally spaced times from 0 to 1, a learned schedule inside the end
            points. It places the steps; the timesteps' meaning stays.
        log_snr_shift: moves the interior of a cosine schedule along the log-SNR axis (Hoogeboom et al. 2023: 2
            ln(64/d)); the end points stay.
        stochasticity: 1 is ancestral sampling, 0 deterministic (DDIM); in between DDIM's eta. Above 1 each step
            forgets more of the noise and draws more anew, with the same marginals, which corrects a network's errors
            on the way; it takes many steps. Not an argument of `step` called eta, because Diffusers' pipelines pass
            eta=0.0 unasked to every scheduler that has it.
        multistep_order: 2 is the second-order multistep update (2M of DPM-Solver++) on the exact log-SNR grid, best
            with stochasticity=0. Not called solver_order, whose values DPM-Solver configurations carry.
        optimal_variance: what `estimate_optimal_variance` returns, {"log_snr": [...], "mse": [...]}: E|x - x_hat|^2 /
            D against log SNR, for variance_type="optimal": posterior variance + (coefficient of x_hat)^2 mse. With
            "shape": [C, H, W] the mse is given for each channel and radial band of the cosine transform, and the noise
            has that variance there.
        step_grid: where `set_timesteps(n)` puts its steps. "time": by `timestep_spacing`; "log_snr": evenly in log
            SNR; "optimal": by dynamic programming, for the smallest expected bound (needs `optimal_variance`). None:
            "time", but with variance_type="optimal", which on other grids can make samples worse, "optimal" below
            `num_train_timesteps` steps and "log_snr" from there on. `evaluate_likelihood` places the steps of a chain
            by the same rule.
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
        config = {key: plain(key, value) for key, value in self.config.items() if not key.startswith("_")}
        unset = unset_keys(VDMScheduler.__init__, self.config)
        self.is_log_snr_schedule = is_in_log_snr(config)
        if config["clip_sample"] is None:
            config["clip_sample"] = not self.is_log_snr_schedule
        if config["timestep_spacing"] is None:
            config["timestep_spacing"] = "trailing" if self.is_log_snr_schedule else "leading"
        # The class name in the live config tells Diffusers whose keys these are, so that other schedulers take it
        # silently.
        self.register_to_config(**config, **unset, _class_name=type(self).__name__)
        check_config(self.config)
        self.init_noise_sigma = 1.0
        self._use_timeline(timeline_of(self.config))
        warn_of_odd_betas(self.config, self._timeline)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler with this config, which any of Diffusers' schedulers may have written:
        `vdm_diffusers.schedulers.adoption`.

        Raises:
            ValueError: the config is of a model on another path, in sigma space or with other timesteps; names the
                class to use.
        """
        if isinstance(config, Mapping):
            config = adopted(config, cls)
        made = super().from_config(cast("dict[str, Any]", config), return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        if "_refused" in scheduler.config:
            scheduler._latest = None
        return made

    # --- the schedule ------------------------------------------------------------------------------------------------

    @on_cpu
    def _use_timeline(self, timeline: Timeline) -> None:
        self._timeline = timeline
        log_snrs = timeline.log_snr(torch.arange(timeline.num_timesteps))
        known = not (self.is_log_snr_schedule or self.config.rescale_betas_zero_snr)
        self._tables = BetaTables(log_snrs, betas_of(self.config) if known else None)
        self._marginals: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._placed: tuple[Any, Tensor] | None = (
            None  # the last grid that took long to find, and what it was found for
        )
        self._own = threading.local()  # each thread's own grid, so that threads may share a scheduler
        every = torch.arange(timeline.num_timesteps - 1, -1, -1)
        if timeline.entries is None:
            every = place_steps(timeline, timeline.num_timesteps, "time").timesteps
        self._latest: SamplingGrid | None = SamplingGrid(
            timeline, timeline.fed(every), StepSettings(*read_settings(self.config)), chosen=False
        )

    @property
    def timeline(self) -> Timeline:
        """What the timesteps mean: maps them to log SNR and back.

        Raises:
            ValueError: the config that this scheduler was made of is another model's.
        """
        if (reason := self.config.get("_refused")) is not None:
            raise ValueError(reason)
        if (betas := self._tables.changed()) is not None:
            self._follow(betas)
        return self._timeline

    def _follow(self, betas: Tensor) -> None:
        """Take the betas that were assigned, and put them into the config, with which they are saved."""
        if self.is_log_snr_schedule:
            raise ValueError(
                f"`betas`, `alphas` and `alphas_cumprod` of a schedule in log SNR ({self.config.beta_schedule}) "
                "follow from it and "
                "cannot be assigned. Make a VDMScheduler(trained_betas=...), or start from `scheduler.as_discrete()`."
            )
        new = {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas), "rescale_betas_zero_snr": False}
        unset = [key for key in self.config.get("_use_default_values", []) if key not in new]
        live = {key: getattr(self.config, key) for key in self.config if not key.startswith("_")}
        self.register_to_config(**live | new, _use_default_values=unset)
        run = self._grid()
        self._use_timeline(timeline_of(self.config))
        if run.chosen and run.values[0] < len(betas):
            self._keep(run.remade(self._timeline, run.settings))

    betas = _table("betas", "(T,) float32 variances of q(z_t | z_{t-1}).")
    alphas = _table("alphas", "(T,) float32, 1 - betas.")
    alphas_cumprod = _table("alphas_cumprod", "(T,) float32, alpha_t^2 of z_t = alpha_t x + sigma_t eps.")

    @property
    def variance_type(self) -> str:
        """The configured variance type."""
        return self.config.variance_type

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule as a function log_snr(t) of time t in [0, 1]; a beta table's entry i lies at t = i / (T -
        1).
        """
        return self.timeline.noise_schedule

    def log_snr(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        """Log SNR at `timesteps` of any shape, whole or fractional, float64. -1: +inf for betas, log_snr_max in log
        SNR.

        Raises:
            ValueError: a timestep on the CPU outside the schedule.
        """
        return self.timeline.log_snr(_numbers(timesteps))

    def timestep_from_log_snr(self, log_snr: Tensor | Sequence[float] | float) -> Tensor:
        """The (fractional) timestep at which the schedule has `log_snr`, what the network is to be fed; float64.

        Beta tables: +inf gives -1; what else lies outside of the table has no timestep.

        Raises:
            ValueError: a log SNR on the CPU outside the schedule.
        """
        return self.timeline.timestep(_numbers(log_snr))

    def as_discrete(self) -> VDMScheduler:
        """This schedule as a plain table of `num_train_timesteps` betas, whose timesteps mean the same to the network.

        After it any Diffusers sampler serves the model:
        `DPMSolverMultistepScheduler.from_config(s.as_discrete().config)`. Diffusers rounds 1 - beta to float32 and
        takes the product: each beta is chosen so that the rounded product stays next to the exact one (error
        feedback). What is left is Diffusers' rounding of alpha_bar itself, an error in log SNR of some 2^-25
        e^log_snr: 0.015 at log SNR 13.3, where betas as they come give 0.18. This class reads the table to 0.009.

        A schedule that is a table already is returned as an equal scheduler. The number of timesteps is not free:
        another one would feed the network other inputs.
        """
        if not self.is_log_snr_schedule:
            return type(self).from_config(self.config)
        alphas_cumprod = torch.sigmoid(self.log_snr(torch.arange(self._timeline.num_timesteps, device="cpu")))
        unset = self.config.get("_use_default_values", [])
        kept = {key: self.config[key] for key in _KEPT_IN_A_TABLE}
        kept |= {
            key: self.config[key] for key in ("stochasticity", "multistep_order", "step_grid") if key not in unset
        }
        if self.config.optimal_variance is not None:
            kept["optimal_variance"] = self.config.optimal_variance
        betas = betas_for_diffusers(alphas_cumprod)
        return type(self)(num_train_timesteps=len(betas), trained_betas=betas, **kept)

    # --- the grid ----------------------------------------------------------------------------------------------------

    def _grid(self) -> SamplingGrid:
        """This thread's grid, or else the last that was set, made anew if the config has changed since."""
        grid = getattr(self._own, "grid", None) or self._latest
        if grid is None:
            raise ValueError(self.config["_refused"])
        if torch.compiler.is_compiling():  # a compiled step keeps the config that it was compiled with
            return grid
        settings = read_settings(self.config)
        if grid.settings != settings:
            check_config({**self.config, **vars(self.config)})
            grid = grid.remade(self._timeline, StepSettings(*settings))
            self._keep(grid)
        return grid

    def _keep(self, grid: SamplingGrid) -> None:
        self._own.grid = self._latest = grid

    @property
    def timesteps(self) -> Tensor:
        """(n,) the timesteps that sampling visits, descending. Assigning to it makes a grid of one's own."""
        return self._grid().timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self.set_timesteps(timesteps=value, device=value.device)

    @property
    def num_inference_steps(self) -> int | None:
        """How many steps were chosen; None before."""
        grid = self._grid()
        return len(grid.host) if grid.chosen else None

    @property
    def custom_timesteps(self) -> bool:
        """Whether the steps were chosen one by one, and not by their number."""
        return self._grid().custom

    @on_cpu
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        log_snrs: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the steps of the sampler, in one of three ways, and make their coefficients. Each thread has a grid
        of its own.

        Arguments:
            num_inference_steps: their number, placed as `step_grid` says: by `timestep_spacing`, in a log-SNR schedule
                uniform in t, or, by default with variance_type="optimal", where they make the bound smallest.
            device: where `timesteps` goes.
            timesteps: the timesteps themselves, descending, whole or fractional.
            log_snrs: the log SNRs at which the model is evaluated, ascending.
        Raises:
            ValueError: not exactly one of the three; values out of order or range; more steps than a beta table has; a
                configuration made for another kind of model.
        """
        timeline = self.timeline
        if sum(v is not None for v in (num_inference_steps, timesteps, log_snrs)) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `timesteps` and `log_snrs`.")
        if num_inference_steps is not None:
            if num_inference_steps < 1 or int(num_inference_steps) != num_inference_steps:
                raise ValueError(f"`num_inference_steps` must be a positive integer, got {num_inference_steps}.")
            wanted = self._place(int(num_inference_steps))
        elif timesteps is not None:
            wanted = _numbers(timesteps).cpu()
        elif log_snrs is not None:
            wanted = timeline.timestep(_numbers(log_snrs).cpu())
        wanted = timeline.fed(wanted)
        check_grid(timeline, wanted)
        settings = StepSettings(*read_settings(self.config))
        grid = SamplingGrid(timeline, wanted, settings, device=device)
        grid.custom = num_inference_steps is None
        self._keep(grid)

    def _place(self, num_steps: int) -> Tensor:
        """The timesteps that `step_grid` asks for, descending."""
        config, timeline = self.config, self._timeline
        settings = StepSettings(*read_settings(config))
        matched = settings.variance_type == "optimal" and settings.stochasticity > 0
        grid = config.step_grid or default_grid(timeline, num_steps, optimal_variance=matched)
        key = (num_steps, grid, config.timestep_spacing, config.steps_offset, settings)
        if self._placed is None or self._placed[0] != key:
            steps = place_steps(
                timeline,
                num_steps,
                grid,
                spacing=config.timestep_spacing,
                offset=config.steps_offset,
                optimal=settings.optimal,
                variance="optimal" if settings.variance_type == "optimal" else "posterior",
                ends_at_mean=timeline.ends_at_data or settings.final_step == "mean",
            )
            self._placed = (key, steps.timesteps)
        return self._placed[1]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def begin_index(self) -> int | None:
        """The index of the first step that sampling takes, where `set_begin_index` has set it."""
        return self._grid().begin_index

    @property
    def step_index(self) -> int | None:
        """The index of the next step, once the first is taken."""
        return self._grid().step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` sampling begins (image-to-image, inpainting), without reading a
        timestep.
        """
        self._grid().begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Nothing: the model is fed the sample itself. Here for interchange with schedulers that scale."""
        return sample

    def previous_timestep(self, timestep: Tensor | float) -> Tensor | float:
        """Where a step from `timestep` ends: the next entry of the grid if it is on it (-1 after the last), else
        timestep - 1.

        A number gives a number, a tensor a tensor of its shape, on its device.
        """
        return self._grid().previous(timestep)

    # --- the step ----------------------------------------------------------------------------------------------------

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
        A timestep on the CPU is looked up; one on another device is never read: it is known by its place in
        `timesteps`, or, where it is a tensor of its own, by counting from the begin index.

        Arguments:
            model_output: (B, C, ...) the model's prediction, of type `prediction_type`; (B, 2 C, ...) with learned
                variances.
            timestep: a number, a tensor of one element, or one timestep for each sample (B,).
            sample: (B, C, ...) the noisy sample that the model saw.
            generator: one, or a list of B.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        Raises:
            ValueError: shapes that do not fit, a timestep that is not on the grid, or a step that is undefined
                (epsilon at zero terminal SNR).
        """
        grid = self._grid()
        output, variance = split_output(grid, model_output, sample)
        several = isinstance(timestep, Tensor) and timestep.numel() > 1
        take_step = step_each if several or torch.compiler.is_compiling() else step_together
        prev_sample, x_hat = take_step(grid, output, variance, timestep, sample, generator)
        if not return_dict:
            return prev_sample, x_hat
        return VDMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_hat)

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The means of steps from one timestep for each sample (B,), without noise, for parallel sampling.

        Source: Shih et al. 2023, "Parallel Sampling of Diffusion Models"; `DDPMParallelScheduler`.
        """
        grid = self._grid()
        output, _ = split_output(grid, model_output, sample)
        return mean_each(grid, output, timesteps, sample)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding as configured; a name that Diffusers' tests and parallel pipelines know."""
        return thresholded(sample, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """The variance (never its root or logarithm) of the noise of the step at timestep t, for pipelines that ask
        for it.
        """
        grid, timestep = self._grid(), as_float64(t).cpu()
        log_snr = self.log_snr(timestep)
        step = reverse_coefficients(log_snr, self.log_snr(grid.previous(timestep)))
        variance_type = variance_type or self.config.variance_type
        if predicted_variance is not None and variance_type == "learned":
            return predicted_variance.exp()
        if predicted_variance is not None and variance_type == "learned_range":
            index = grid.index_of(timestep)
            low = step.posterior_variance.log() if index is None else grid.numbers[index].log_variance_low
            return torch.exp(low + (predicted_variance + 1) / 2 * (step.forward_variance.log() - low))
        return fixed_variance(variance_type, log_snr, step, grid.settings.optimal)

    # --- the exact maths as methods ----------------------------------------------------------------------------------

    def posterior_mean_variance(
        self,
        sample: Tensor,
        pred_original_sample: Tensor,
        timestep: Tensor | float,
        prev_timestep: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q(z_s | z_t, x) = N(mean, variance I): its mean, of the sample's shape, and its variance, float64, of
        timestep's.

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
            original_samples, noise: (B, ...), or (1, ...) for all. timesteps: one for each sample (B,), or one for
                all; whole or fractional.
        """
        alpha, sigma, x, noise = self._at(timesteps, original_samples, noise)
        return linear_combination(alpha, x, sigma, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """v = alpha_t noise - sigma_t x, what a network with prediction_type="v_prediction" is trained on; see
        `add_noise`.
        """
        alpha, sigma, x, noise = self._at(timesteps, sample, noise)
        return linear_combination(alpha, noise, -sigma, x)

    def _at(self, timesteps: Tensor | float, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma) at `timesteps`, by table for whole timesteps of betas, and x and noise of one batch size."""
        timeline = self.timeline
        if isinstance(timesteps, Tensor) and timesteps.ndim > 1:
            timesteps = timesteps.flatten()
        if timeline.entries is None or not isinstance(timesteps, Tensor) or timesteps.is_floating_point():
            alpha, sigma = alpha_sigma(self.log_snr(timesteps))
        else:
            if on_host(timesteps):
                timeline.check(timesteps)
            key = (timesteps.device, compute_dtype(x))
            if key not in self._marginals:
                self._marginals[key] = _marginal_table(timeline.entries, *key)
            index = timesteps.long()  # of int8 and uint8 too, which would be a mask
            alpha, sigma = self._marginals[key][0][index], self._marginals[key][1][index]
        return (alpha, sigma, *_one_batch(x, noise, alpha))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which begin with the grid of the thread that makes them."""
        return {**self.__dict__, "_own": None, "_latest": getattr(self._own, "grid", None) or self._latest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = threading.local()


@on_cpu
def _marginal_table(log_snrs: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2, T + 1) alpha and sigma of a beta table; clean data stands at the end, where index -1 finds it."""
    return torch.stack(alpha_sigma(torch.cat([log_snrs, log_snrs.new_tensor([torch.inf])]))).to(device, dtype)


def _one_batch(x: Tensor, noise: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """x and noise, of which one sample may stand for a whole batch, repeated to one size of batch without a copy."""
    sizes = [len(x) if x.ndim else 1, len(noise) if noise.ndim else 1, *coefficient.shape]
    batch = max(sizes)
    if min(sizes) == batch or x.shape[1:] != noise.shape[1:] or any(size not in (1, batch) for size in sizes):
        return x, noise
    return x.expand(batch, *x.shape[1:]), noise.expand(batch, *noise.shape[1:])


def check_grid(timeline: Timeline, timesteps: Tensor) -> None:
    """Raise ValueError unless `timesteps`, on the CPU, are steps of a chain: descending, in range, above its end."""
    if timesteps.ndim != 1 or len(timesteps) == 0:
        raise ValueError(f"`timesteps` must be a list of at least one timestep, got shape {tuple(timesteps.shape)}.")
    if not bool((timesteps.diff() < 0).all()):
        raise ValueError(
            f"`timesteps` must be in descending order without repetition (log_snrs ascending), got {shown(timesteps)}."
        )
    timeline.check(timesteps)
    if timesteps[-1] <= timeline.terminal_timestep:
        raise ValueError(
            f"`timesteps` must lie above {timeline.terminal_timestep}, where sampling ends, got "
            f"{float(timesteps[-1])}."
        )


def _numbers(value: Tensor | Sequence[float] | float) -> Tensor:
    """As float64, lists of tensors and NumPy's numbers too."""
    return as_float64(value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float64)))
