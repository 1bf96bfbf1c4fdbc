"""VDMSigmaScheduler: the networks of EDM, in sigma space, with EDMEulerScheduler's interface and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..gaussian import posterior
from ..noise_schedules import NoiseSchedule
from ..numerics import as_float64, compute_dtype, linear_combination, on_cpu
from ..step_grids import GRIDS, place_steps
from ..timelines import SigmaTimeline
from .adoption import adopted_sigma
from .coefficients import StepSettings
from .configuration import plain, unset_keys
from .flow_sigmas import Numbers, numbers
from .sampling_grid import SamplingGrid
from .sampling_step import step_together
from .scheduling_vdm import VDMSchedulerOutput


class VDMSigmaScheduler(SchedulerMixin, ConfigMixin):
    r"""Samples EDM's models, z = x + sigma eps, whose network is preconditioned and fed ln(sigma) / 4.

    Takes every configuration of `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler`
    (`VDMSigmaScheduler.from_config(pipe.scheduler.config)`). The network's input is c_in z, which `scale_model_input`
    computes, and x_hat = c_skip z + c_out y, see `timelines.SigmaTimeline`. Coefficients are made in float64 once for
    each grid.

    Arguments:
        sigma_min, sigma_max, sigma_data, sigma_schedule, rho, final_sigmas_type, num_train_timesteps: as in
        `EDMEulerScheduler`.
        prediction_type: "epsilon" or "v_prediction", the sign of c_out: both are EDM's preconditioned output.
        stochasticity: 0 is Euler's step in sigma, the default; 1 is ancestral; see `VDMScheduler`.
        multistep_order: 2 is the second-order multistep update of `EDMDPMSolverMultistepScheduler`.
        variance_type, optimal_variance, step_grid: as in `VDMFlowScheduler`.

    Raises:
        ValueError: values out of range or unknown.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"; Lu et al. 2022.
    """

    __module__ = "vdm_diffusers"

    _compatibles: list[str] = []
    order = 1

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        stochasticity: float = 0.0,
        multistep_order: int = 1,
        variance_type: str = "fixed_small",
        optimal_variance: dict[str, list] | None = None,
        step_grid: Literal["time", "log_snr", "optimal"] | None = None,
    ):
        config = {key: plain(key, value) for key, value in self.config.items() if not key.startswith("_")}
        unset = unset_keys(VDMSigmaScheduler.__init__, self.config)
        self.register_to_config(**config, **unset, _class_name=type(self).__name__)
        _check(self.config)
        self.num_inference_steps: int | None = None
        ramp = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        self._use(self._spaced(ramp), torch.device("cpu"))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler with this config, which either of EDM's schedulers may have written:
        `vdm_diffusers.schedulers.adoption`.

        Raises:
            ValueError: the config is of another kind of model; names the class to use.
        """
        if isinstance(config, Mapping):
            config = adopted_sigma(config, cls.__name__)
        return super().from_config(cast("dict[str, Any]", config), return_unused_kwargs, **kwargs)

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied by to begin with."""
        return float((self.config.sigma_max**2 + 1) ** 0.5)

    @property
    def timeline(self) -> SigmaTimeline:
        """What the timesteps mean."""
        config = self.config
        return SigmaTimeline(
            config.sigma_min, config.sigma_max, config.sigma_data, config.num_train_timesteps, config.rho
        )

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Log SNR, -2 ln(sigma), against time."""
        return self.timeline.noise_schedule

    def log_snr(self, timesteps: Tensor | float) -> Tensor:
        """Log SNR at `timesteps` of any shape, -8 times them, float64."""
        return self.timeline.log_snr(timesteps)

    def timestep_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """What the network is fed at `log_snr`, float64."""
        return self.timeline.timestep(log_snr)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _spaced(self, ramp: Tensor) -> Tensor:
        """Sigmas at places of [0, 1], from sigma_max to sigma_min."""
        high, low, rho = self.config.sigma_max, self.config.sigma_min, self.config.rho
        if self.config.sigma_schedule == "exponential":
            return torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    @on_cpu
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Numbers | None = None,
    ) -> None:
        """Choose the steps of the sampler, and make their coefficients.

        Arguments:
            num_inference_steps: their number, spaced by `sigma_schedule`, or as `step_grid` says.
            device: where `timesteps` goes. `sigmas` stays on the CPU.
            sigmas: the sigmas themselves, positive and descending.
        Raises:
            ValueError: not exactly one of number and sigmas; sigmas that are not positive or do not descend.
        """
        config = self.config
        count = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        if count is None or (sigmas is not None and len(sigmas) != count):
            raise ValueError("Pass `num_inference_steps` or `sigmas`; if both, of one length.")
        if count < 1 or int(count) != count:
            raise ValueError(f"`num_inference_steps` must be a positive integer, got {count}.")
        if sigmas is not None:
            values = torch.from_numpy(numbers(sigmas))
            if not bool((values > 0).all()) or not bool((values.diff() < 0).all()):
                raise ValueError(
                    f"`sigmas` must be positive and descend, from noise to data, got {values.tolist()[:8]}."
                )
        elif config.step_grid in (None, "time"):
            values = self._spaced(torch.linspace(0, 1, int(count), dtype=torch.float64))
        else:
            steps = place_steps(
                self.timeline,
                int(count),
                config.step_grid,
                optimal=self._settings().optimal,
                variance="optimal" if config.variance_type == "optimal" else "posterior",
                ends_at_mean=True,
            )
            values = torch.exp(-steps.log_snrs / 2)
        self._use(values, torch.device("cpu" if device is None else device))
        self.num_inference_steps = len(values)

    def _use(self, sigmas: Tensor, device: torch.device) -> None:
        """Make the grid of these sigmas (n,), as float32 has them."""
        sigmas = sigmas.float()
        end = sigmas[-1:] if self.config.final_sigmas_type == "sigma_min" else torch.zeros(1)
        self.sigmas = torch.cat([sigmas, end])
        self._log_snrs = -2 * self.sigmas.double().log()
        self._grid = SamplingGrid(
            self.timeline, 0.25 * sigmas.log(), self._settings(), device=device, log_snrs=self._log_snrs
        )
        self._grid.counted = True
        self._scales = self.timeline.network_scale(self._log_snrs).tolist()
        self.is_scale_input_called = False

    def _settings(self) -> StepSettings:
        config = self.config
        return StepSettings(
            prediction_type=config.prediction_type,
            variance_type=config.variance_type,
            stochasticity=config.stochasticity,
            multistep_order=config.multistep_order,
            final_step="mean",
            clip_sample=False,
            clip_sample_range=1.0,
            thresholding=False,
            dynamic_thresholding_ratio=1.0,
            sample_max_value=1.0,
            optimal_variance=config.optimal_variance,
        )

    @property
    def timesteps(self) -> Tensor:
        """(n,) float32, ln(sigma) / 4, what the network is fed."""
        return self._grid.timesteps

    @property
    def step_index(self) -> int | None:
        """The index of the next step, once the first is begun."""
        return self._grid.step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step, where `set_begin_index` has set it."""
        return self._grid.begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` sampling begins, without reading a timestep."""
        self._grid.begin_index = begin_index

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # --- the step ----------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """c_in z, what the network is fed at this step, or, between the steps of the grid, at any other timestep."""
        grid = self._grid
        self.is_scale_input_called = True
        unplaced = grid.step_index is None and grid.begin_index is None and not _is_elsewhere(timestep)
        if unplaced and float(timestep) not in grid.places:
            return self.precondition_inputs(sample, math.exp(4 * float(timestep)))
        if grid.step_index is None:
            grid.step_index = grid.index_of(timestep)
        return sample * self._scales[cast(int, grid.step_index)]

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """sample / sqrt(sigma^2 + sigma_data^2)."""
        return sample / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """ln(sigma) / 4."""
        return 0.25 * torch.log(sigma if isinstance(sigma, Tensor) else torch.tensor([sigma]))

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: float | Tensor) -> Tensor:
        """x_hat = c_skip sample + c_out model_output."""
        log_snr = -2 * as_float64(sigma).log()
        skip, out = self.timeline.denoising(log_snr, self.config.prediction_type)
        return linear_combination(skip, sample, out, model_output)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> VDMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the sampler: from the sample at `timesteps[i]` to the one at the next sigma.

        Arguments:
            model_output: (B, ...) the network's output at `scale_model_input(sample, timestep)`.
            timestep: one of `timesteps`, which places the first step; the others are counted.
            sample: (B, ...) z, not scaled.
            s_churn, s_tmin, s_tmax, s_noise: Karras et al.'s noise, added as the peer adds it: after the network has
                been evaluated.
            generator: one, or a list of B.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        Returns:
            prev_sample in the model output's dtype (float64 where the sample is).
        Raises:
            ValueError: an integer index for a timestep; shapes that do not fit; all steps are taken.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.dtype.is_floating_point):
            raise ValueError("`timestep` must be one of `scheduler.timesteps`, not its index in them.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
        dtype = sample.dtype if sample.dtype == torch.float64 else model_output.dtype
        if s_churn > 0:
            prev_sample, x_hat = self._churned(
                model_output, timestep, sample, (s_churn, s_tmin, s_tmax, s_noise), generator
            )
        else:
            prev_sample, x_hat = step_together(self._grid, model_output, None, timestep, sample, generator)
        prev_sample = prev_sample.to(dtype)
        if not return_dict:
            return prev_sample, x_hat
        return VDMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_hat)

    def _churned(
        self, output: Tensor, timestep: float | Tensor, sample: Tensor, churn: tuple[float, ...], generator: Any
    ) -> tuple[Tensor, Tensor]:
        """Euler's step from a larger sigma, to which noise has been added. Source: Karras et al. 2022, algorithm 2."""
        amount, low, high, scale = churn
        index = cast(int, self._grid.index_of(timestep))
        sigma, following = self.sigmas[index].item(), self.sigmas[index + 1].item()
        gamma = min(amount / (len(self.sigmas) - 1), math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        raised = sigma * (1 + gamma)
        z = sample.to(compute_dtype(sample))
        if gamma > 0:
            noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
            z = z + scale * math.sqrt(raised**2 - sigma**2) * noise
        x_hat = self.precondition_outputs(z, output.to(z.dtype), raised)
        self._grid.step_index = index + 1
        return torch.lerp(x_hat, z, following / raised), x_hat

    # --- the exact maths as methods ----------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z = x + sigma noise.

        Arguments:
            timesteps: (B,) or one, ln(sigma) / 4. As the peer has it, a run that has begun uses its own place instead.
        """
        place = self.begin_index if self.step_index is None else self.step_index
        if place is not None:
            sigma = torch.full((1,), self.sigmas[place].item(), dtype=torch.float64)
        else:
            sigma = torch.exp(4 * as_float64(timesteps).reshape(-1))
        one = torch.ones_like(sigma)
        return linear_combination(one, original_samples, sigma, noise)

    def posterior_mean_variance(
        self,
        sample: Tensor,
        pred_original_sample: Tensor,
        timestep: Tensor | float,
        prev_timestep: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """q(z_s | z_t, x) = N(mean, variance I) in sigma space; timesteps are ln(sigma) / 4. Never clips.

        Raises:
            ValueError: timesteps out of order.
        """
        ends = (self.log_snr(timestep), self.log_snr(prev_timestep))
        return posterior(sample, pred_original_sample, *ends, path="ve")


def _is_elsewhere(timestep: float | Tensor) -> bool:
    """Whether a timestep lies on a device, where it is not read."""
    return isinstance(timestep, Tensor) and timestep.device.type != "cpu"


def _check(config: Mapping[str, Any]) -> None:
    for key, choices in [
        ("sigma_schedule", ("karras", "exponential")),
        ("prediction_type", ("epsilon", "v_prediction")),
        ("final_sigmas_type", ("zero", "sigma_min")),
        ("multistep_order", (1, 2)),
        ("variance_type", ("fixed_small", "optimal")),
        ("step_grid", (*GRIDS, None)),
    ]:
        if config[key] not in choices:
            raise ValueError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {config[key]!r}.")
    count = config["num_train_timesteps"]
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1_000_000:
        raise ValueError(f"`num_train_timesteps` must be an integer in 1..1000000, got {count!r}.")
    if not 0 <= config["stochasticity"] < math.inf:
        raise ValueError(
            "`stochasticity` must be a finite number that is not negative (0 deterministic, 1 ancestral), got "
            f"{config['stochasticity']}."
        )
    SigmaTimeline(config["sigma_min"], config["sigma_max"], config["sigma_data"])  # says what is wrong with them
    if "optimal" in (config["variance_type"], config["step_grid"]) and config["optimal_variance"] is None:
        raise ValueError(
            "variance_type='optimal' and step_grid='optimal' need `optimal_variance`: pass what "
            "estimate_optimal_variance(...) returns."
        )
